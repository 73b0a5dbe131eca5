"""Rows of a batch some at a time, so that what is computed on the way stays in the cache and is never held whole."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_BLOCK = 1 << 18  # numbers: 1 MiB of float32


def blocks(x: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Equal rows of `x` and of the others, each (N, *): on a CPU at most 1 MiB of `x`, elsewhere all.

    A core is given its MiB at once: small operations in two threads wait for each other.

    >>> [len(rows) for rows, in blocks(torch.zeros(5, 1 << 17))] if torch.get_num_threads() == 1 else [2, 2, 1]
    [2, 2, 1]
    """
    rows = len(x)
    if x.is_cpu and x.numel():
        rows = max(1, _BLOCK * torch.get_num_threads() * rows // x.numel())
    return zip(*(t.split(max(rows, 1)) for t in (x, *others)), strict=True)


def is_traced(x: Tensor) -> bool:
    """Whether `torch.compile` or `torch.func` follows what is done with `x`: no `out=` then, and no blocks."""
    return torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(x)
