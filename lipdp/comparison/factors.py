"""Clipping as factors on per-sample gradients, block by block: for trainers, and as the matrices of `dynamics`.

With n samples and D parameter blocks, ‖g_i‖² = Σ_r ‖g_{i,r}‖². Flat kinds look at ‖g_i‖, per-layer kinds at each
‖g_{i,r}‖; local kinds shorten what is too long, global kinds drop it and scale all else alike. Every factor bounds what
it multiplies: ‖c_i g_i‖ ≤ C flat, ‖c_{i,r} g_{i,r}‖ ≤ C_r per layer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from lipdp.constraints import check_positive
from lipdp.errors import ParameterError


class Clipping(Protocol):
    """Maps the norms of the per-sample gradients to the factors they are multiplied by."""

    name: ClassVar[str]

    def factors(self, norms: Tensor) -> Tensor:
        """c (n, D), from ‖g_{i,r}‖ (n, D), for n samples and D parameter blocks."""
        ...


@dataclass(frozen=True)
class Unclipped:
    """c = 1."""

    name: ClassVar[str] = "none"

    def factors(self, norms: Tensor) -> Tensor:
        return torch.ones_like(norms)


@dataclass(frozen=True)
class PerLayer:
    """Local per-layer clipping: c_{i,r} = min(1, C_r/‖g_{i,r}‖); a zero gradient keeps 1.

    Args:
        bound: C, shared out as C_r = C/√D so that C² = Σ C_r²; or the C_r themselves, one a block.

    >>> PerLayer((3.0, 4.0)).factors(torch.tensor([[6.0, 4.0]]))
    tensor([[0.5000, 1.0000]])
    """

    bound: float | tuple[float, ...]
    name: ClassVar[str] = "per layer"

    def __post_init__(self) -> None:
        _check_bounds("bound", self.bound)

    def factors(self, norms: Tensor) -> Tensor:
        bounds = _shared_out("bound", self.bound, norms)
        return bounds / torch.maximum(norms, bounds)


@dataclass(frozen=True)
class Flat(PerLayer):
    """Local flat clipping: c_i = min(1, C/‖g_i‖), with the norm of the whole gradient.

    >>> Flat(5.0).factors(torch.tensor([[6.0, 8.0], [0.0, 0.0]]))
    tensor([[0.5000, 0.5000],
            [1.0000, 1.0000]])

    Source: Abadi et al. (2016).
    """

    name: ClassVar[str] = "flat"

    def factors(self, norms: Tensor) -> Tensor:
        return super().factors(_whole(norms)).expand_as(norms)


@dataclass(frozen=True)
class Automatic:
    """Automatic clipping: c_i = C/(‖g_i‖ + γ); every gradient counts about the same, and no threshold is left to tune.

    Source: Bu, Wang, Zha & Karypis (2022), AUTO-S.
    """

    bound: float
    stability: float = 0.01
    name: ClassVar[str] = "automatic"

    def factors(self, norms: Tensor) -> Tensor:
        bound = check_positive("bound", self.bound)
        return (bound / (_whole(norms) + self.stability)).expand_as(norms)


@dataclass(frozen=True)
class GlobalPerLayer:
    """Global per-layer clipping: c_{i,r} = (C_r/Z_r) 1(‖g_{i,r}‖ ≤ Z_r); sensitivity C_r of each block.

    Args:
        bound: C, shared out as in `PerLayer`, or the C_r.
        threshold: Z likewise, Z_r ≥ C_r; None takes Z_r = C_r.
    """

    bound: float | tuple[float, ...]
    threshold: float | tuple[float, ...] | None = None
    name: ClassVar[str] = "global per layer"

    def __post_init__(self) -> None:
        _check_bounds("bound", self.bound)
        if self.threshold is not None:
            _check_bounds("threshold", self.threshold)

    def factors(self, norms: Tensor) -> Tensor:
        bounds = _shared_out("bound", self.bound, norms)
        thresholds = bounds if self.threshold is None else _shared_out("threshold", self.threshold, norms)
        if bool((thresholds < bounds).any()):
            raise ParameterError(f"threshold={self.threshold} is below bound={self.bound}: factors would exceed 1")
        return (norms <= thresholds).to(norms.dtype) * (bounds / thresholds)


@dataclass(frozen=True)
class GlobalFlat(GlobalPerLayer):
    """Global flat clipping: c_i = (C/Z) 1(‖g_i‖ ≤ Z); sensitivity C. Z = C is the later definition, 1(‖g_i‖ ≤ C).

    Source: Bu et al. (2021).
    """

    name: ClassVar[str] = "global flat"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.factors(torch.zeros(1, 1))  # refuses a threshold below the bound

    def factors(self, norms: Tensor) -> Tensor:
        return super().factors(_whole(norms)).expand_as(norms)


def _whole(norms: Tensor) -> Tensor:
    """‖g_i‖ (n, 1), as of one block."""
    return torch.linalg.vector_norm(norms, dim=1, keepdim=True)


def _check_bounds(name: str, bound: float | tuple[float, ...]) -> None:
    for value in bound if isinstance(bound, tuple) else (bound,):
        check_positive(name, value)


def _shared_out(name: str, bound: float | tuple[float, ...], norms: Tensor) -> Tensor:
    """One bound for each of the D blocks, (D,)."""
    blocks = norms.shape[1]
    if not isinstance(bound, tuple):
        return norms.new_full((blocks,), bound / math.sqrt(blocks))
    if len(bound) != blocks:
        raise ParameterError(f"{name} has {len(bound)} entries for {blocks} parameter blocks; give one a block")
    return norms.new_tensor(bound)
