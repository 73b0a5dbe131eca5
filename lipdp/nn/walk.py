"""The walk through a model that gives modules their counterparts, and what every conversion of a layer does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NoReturn, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lipdp.errors import UnsupportedLayerError

Converter: TypeAlias = Callable[[str, Any], nn.Module]
Table: TypeAlias = Mapping[type[nn.Module], Converter]


def replaced(module: nn.Module, table: Table, name: str, done: dict[nn.Module, nn.Module]) -> nn.Module:
    """The module, or its replacement, with everything below replaced. `done`: what was met under another name."""
    if module in done:
        return done[module]
    new = module
    converter = find(module, table)
    if converter is not None:
        check_hooks(name, module)
        new = converter(name, module)
        new.training = module.training
    done[module] = new
    for key, child in new._modules.items():
        if child is not None:
            new._modules[key] = replaced(child, table, f"{name}.{key}" if name else key, done)
    return new


def find(module: nn.Module, table: Mapping[type[nn.Module], Any]) -> Any:
    """The entry of the module's class, or of the base class whose `forward` it inherits unchanged; None if none."""
    for base in type(module).__mro__:
        if base in table:
            return table[base] if base.forward is type(module).forward else None  # type: ignore[attr-defined]
    return None


def refuse(name: str, module: nn.Module, reason: str) -> NoReturn:
    raise UnsupportedLayerError(f"'{name or 'the model'}' ({type(module).__name__}): {reason}")


def check_hooks(name: str, module: nn.Module) -> None:
    """Refuse hooks on a module that is to be replaced."""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
        refuse(name, module, "it carries hooks, which its replacement would lose; remove them first")


@torch.no_grad()
def fill(new: nn.Module, old: Any, weight: Tensor) -> nn.Module:
    """Give a new layer this weight and the old one's bias, both trainable where they were."""
    raw = old.parametrizations.weight.original if parametrize.is_parametrized(old, "weight") else old.weight
    for name, value, trainable in (("weight", weight, raw.requires_grad), ("bias", old.bias, None)):
        if value is not None and getattr(new, name) is not None:
            parameter = getattr(new, name)
            parameter.copy_(value)
            parameter.requires_grad_(value.requires_grad if trainable is None else trainable)
    return new


def placed(weight: Tensor) -> dict[str, Any]:
    return {"device": weight.device, "dtype": weight.dtype}


def settings(old: nn.Conv1d | nn.Conv2d) -> tuple[Any, ...]:
    """The positional arguments of a convolution, as torch.nn and lipdp.nn order them."""
    return (
        *(old.in_channels, old.out_channels, old.kernel_size, old.stride, old.padding, old.dilation),
        *(old.groups, old.bias is not None, old.padding_mode),
    )
