"""Layers whose parameters are spread over processes (`torch.distributed.fsdp.fully_shard`), made whole one at a time."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)
_OWN = "torch.distributed.fsdp."  # where the hooks of fully_shard are from; others compute something else


def is_dtensor(tensor: Any) -> bool:
    """Whether it is a `DTensor`. (Their module takes a second to import; where nobody has, there is none.)"""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def is_wrapped(module: nn.Module) -> bool:
    """Whether `fully_shard` was applied to it."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def is_sharded(module: nn.Module) -> bool:
    """Whether a parameter of the module is spread over processes."""
    return any(is_dtensor(parameter) for parameter in module.parameters())


def whole(tensor: Tensor) -> Tensor:
    """The tensor with all its entries; gathered where it is spread, by all processes together."""
    held: Any = tensor
    return held.full_tensor() if is_dtensor(held) else tensor


def local(tensor: Tensor) -> Tensor:
    """The entries that this process holds, in the tensor's own memory."""
    held: Any = tensor
    return held.to_local() if is_dtensor(held) else tensor


@torch.no_grad()
def unsharded(module: Module) -> Module:
    """The module as it was before `fully_shard`, with gathered parameters; itself where nothing is spread.

    A copy of the module tree: a change of it changes nothing in the original (`write_back_` does). Constants, buffers and
    hooks but those of `fully_shard` are shared. Collective.
    """
    wrapped = any(is_wrapped(inner) for inner in module.modules())
    return _plain(module, {}) if wrapped or is_sharded(module) else module


def _plain(module: Module, known: dict[int, nn.Parameter]) -> Module:
    kind = type(module)
    if is_wrapped(module):  # a class made by fully_shard: (FSDP..., FSDPModule, the module's own, ...)
        kind = kind.__mro__[2]
    plain = kind.__new__(kind)
    plain.__dict__.update(vars(module))
    for name in ("_forward_hooks", "_forward_pre_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks"):
        hooks = vars(module)[name]
        plain.__dict__[name] = type(hooks)((key, hook) for key, hook in hooks.items() if not _is_own(hook))
    plain.__dict__["_parameters"] = {
        name: None if p is None else _gathered(p, known) for name, p in module._parameters.items()
    }
    plain.__dict__["_modules"] = {
        name: None if child is None else _plain(child, known) for name, child in module._modules.items()
    }
    return plain


def _gathered(parameter: nn.Parameter, known: dict[int, nn.Parameter]) -> nn.Parameter:
    """Once for a parameter that several modules share."""
    if id(parameter) not in known:
        known[id(parameter)] = nn.Parameter(whole(parameter.detach()), parameter.requires_grad)
    return known[id(parameter)]


def _is_own(hook: object) -> bool:
    return str(getattr(hook, "__module__", "")).startswith(_OWN)


@torch.no_grad()
def write_back_(module: nn.Module, plain: nn.Module) -> None:
    """Give every parameter of the module the values that `unsharded(module)` has now; no communication."""
    from torch.distributed.tensor import distribute_tensor

    values = dict(plain.named_parameters())
    for name, parameter in module.named_parameters():
        if is_dtensor(parameter):
            held: Any = parameter
            spread = distribute_tensor(values[name].detach(), held.device_mesh, held.placements, src_data_rank=None)
            held.to_local().copy_(spread.to_local())
        else:
            parameter.copy_(values[name])


def shard_number(tensors: Sequence[Any]) -> int:
    """Which shard this process holds: the same number for processes that hold replicas, another for other entries.

    All tensors must be spread alike.
    """
    mesh, number = tensors[0].device_mesh, 0
    coordinate = mesh.get_coordinate() or [0] * mesh.ndim
    for dim, placement in enumerate(tensors[0].placements):
        if placement.is_shard():
            number = number * mesh.size(dim) + coordinate[dim]
    return number
