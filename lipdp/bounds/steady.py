"""Functions whose gradients, as torch computes them, break their bound, and what the graph computes in their place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_NORMS = (torch.norm, torch.linalg.vector_norm, "norm")
_NAMES = {"ord": "p", "p": "p", "dim": "dim", "keepdim": "keepdim", "input": "input", "x": "input"}


def steady_norm(input: Tensor, p: Any = 2, dim: int | tuple[int, ...] | None = None, keepdim: bool = False) -> Tensor:
    """‖x‖₂ over axes, of entries divided by the largest first: squares that vanish are those beside larger ones.

    torch's gradient is x/‖x‖ with the norm as computed. Of float32 entries around 1e-23, whose squares are below the
    smallest number, that was 17 long for a thousand entries, and √(n/2) can be reached.

    >>> steady_norm(torch.tensor([[3e-25, 4e-25]]), dim=1)
    tensor([5.0000e-25])
    """
    del p  # the rule refuses others than 2
    axes = (dim,) if isinstance(dim, int) else tuple(dim or ())
    largest = input.detach().abs().amax(axes, keepdim=True)
    largest = largest.clamp_min(torch.finfo(input.dtype).tiny)
    norm = torch.linalg.vector_norm(input / largest, dim=dim, keepdim=keepdim)
    return norm * largest.reshape(norm.shape)


def steadied(kind: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, Any, dict[str, Any]]:
    """A call of a traced function as the graph holds it."""
    given = {name: value for name, value in kwargs.items() if value is not None}  # out=, dtype=
    if kind in ("call_function", "call_method") and target in _NORMS and set(given) <= set(_NAMES) and len(args) <= 4:
        return "call_function", steady_norm, {_NAMES[name]: value for name, value in given.items()}
    return kind, target, kwargs
