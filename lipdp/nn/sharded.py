"""Layers with sharded parameters (`torch.distributed.fsdp.fully_shard`), gathered one at a time."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)
_FSDP = "torch.distributed.fsdp."  # where the hooks of fully_shard are from; others compute something else


def is_dtensor(tensor: Any) -> bool:
    """Whether it is a `DTensor`. (Their module takes a second to import; where nobody has, there is none.)"""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def is_fully_sharded(module: nn.Module) -> bool:
    """Whether `fully_shard` was applied to this very module."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def is_sharded(module: nn.Module) -> bool:
    """Whether a parameter of the module is sharded over processes."""
    return any(is_dtensor(parameter) for parameter in module.parameters())


def full_tensor(tensor: Tensor) -> Tensor:
    """The tensor with all its entries; a sharded one is gathered (collective)."""
    sharded: Any = tensor
    return sharded.full_tensor() if is_dtensor(sharded) else tensor


def local_tensor(tensor: Tensor) -> Tensor:
    """The entries that this process holds, in the tensor's own memory."""
    sharded: Any = tensor
    return sharded.to_local() if is_dtensor(sharded) else tensor


@torch.no_grad()
def unsharded(module: Module) -> Module:
    """The module as it was before `fully_shard`, with gathered parameters; itself where nothing is sharded.

    A copy of the module tree: changing it leaves the original as it is (`load_unsharded_` changes that). Constants,
    buffers and all hooks but those of `fully_shard` are shared. Collective.
    """
    wrapped = any(is_fully_sharded(inner) for inner in module.modules())
    return _copy(module, {}) if wrapped or is_sharded(module) else module


def _copy(module: Module, known: dict[int, nn.Parameter]) -> Module:
    kind = type(module)
    if is_fully_sharded(module):  # a class made by fully_shard: (FSDP..., FSDPModule, the module's own, ...)
        kind = kind.__mro__[2]
    copy = kind.__new__(kind)
    copy.__dict__.update(vars(module))
    for name in ("_forward_hooks", "_forward_pre_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks"):
        hooks = vars(module)[name]
        copy.__dict__[name] = type(hooks)((key, hook) for key, hook in hooks.items() if not _is_fsdp(hook))
    copy.__dict__["_parameters"] = {
        name: None if p is None else _gathered(p, known) for name, p in module._parameters.items()
    }
    copy.__dict__["_modules"] = {
        name: None if child is None else _copy(child, known) for name, child in module._modules.items()
    }
    return copy


def _gathered(parameter: nn.Parameter, known: dict[int, nn.Parameter]) -> nn.Parameter:
    """Once for a parameter that several modules share."""
    if id(parameter) not in known:
        known[id(parameter)] = nn.Parameter(full_tensor(parameter.detach()), parameter.requires_grad)
    return known[id(parameter)]


def _is_fsdp(hook: object) -> bool:
    return str(getattr(hook, "__module__", "")).startswith(_FSDP)


@torch.no_grad()
def load_unsharded_(module: nn.Module, gathered: nn.Module) -> None:
    """Give every parameter of the module the values that `gathered`, its unsharded copy, has now; no communication."""
    from torch.distributed.tensor import distribute_tensor

    values = dict(gathered.named_parameters())
    for name, parameter in module.named_parameters():
        if is_dtensor(parameter):
            sharded: Any = parameter
            value = values[name].detach()
            new = distribute_tensor(value, sharded.device_mesh, sharded.placements, src_data_rank=None)
            sharded.to_local().copy_(new.to_local())
        else:
            parameter.copy_(values[name])


def shard_index(tensors: Sequence[Any]) -> int:
    """Which shard this process holds: the same index for processes that hold replicas, another for other entries.

    All tensors must have one mesh and one placement.
    """
    mesh, index = tensors[0].device_mesh, 0
    coordinate = mesh.get_coordinate() or [0] * mesh.ndim
    for dim, placement in enumerate(tensors[0].placements):
        if placement.is_shard():
            index = index * mesh.size(dim) + coordinate[dim]
    return index
