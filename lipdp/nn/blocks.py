"""Rows of a batch some at a time, so that what is computed on the way stays in the cache and is never held whole."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

_BLOCK, _SHARED = 1 << 18, 1 << 22  # numbers: 1 MiB of float32, 16 MiB


def blocks(x: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Equal rows of `x` and of the others, each (N, *): on a CPU about 1 MiB of `x`, elsewhere all.

    Several threads are given 16 MiB at once: they wait for each other at every operation, on a busy machine for long.

    >>> sum(len(rows) for rows, in blocks(torch.zeros(5, 1 << 17)))
    5
    """
    rows = len(x)
    if x.is_cpu and x.numel():
        rows = max(1, (_BLOCK if torch.get_num_threads() == 1 else _SHARED) * rows // x.numel())
    if rows >= len(x):
        return iter([(x, *others)])
    return zip(*(t.split(rows) for t in (x, *others)), strict=True)


def is_traced(*values: object) -> bool:
    """Whether `torch.compile` or `torch.func` follows what is done with them: no `out=` then, and no blocks.

    Or with their gradients, of which `torch.autograd.grad(is_grads_batched=True)` takes many at once.
    """
    known = torch._C._functorch
    return torch.compiler.is_compiling() or any(
        known.is_functorch_wrapped_tensor(t) or known.is_legacy_batchedtensor(t)
        for t in values
        if isinstance(t, Tensor)
    )


class Function(torch.autograd.Function):
    """An autograd function whose signature is read once: torch reads it at every call, for 0.1 ms."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.forward.__signature__ = inspect.signature(cls.forward)  # type: ignore[attr-defined]
