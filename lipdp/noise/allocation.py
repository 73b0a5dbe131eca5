"""How the noise is shared among the parameter blocks, at one noise multiplier."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from lipdp.errors import ParameterError, UnknownNameError


@runtime_checkable
class Allocation(Protocol):
    """Shares one noise multiplier σ among the D parameter blocks.

    The maths: one step releases every block `l` at once with noise `N(0, s_l² I)`. Scaling block `l` by `1/s_l` makes
    this one Gaussian mechanism of unit noise and sensitivity `sqrt(Σ_l Δ_l²/s_l²)`, so the noise multiplier is σ
    when `Σ_l Δ_l²/s_l² = 1/σ²`. Every allocation returns `s` on that surface, so ε does not depend on which is chosen.

    Blocks with `Δ_l = 0`: their gradient is zero for every dataset, it can be released as it is. They get `s_l = 0` and
    take no part (`per_layer` does not count them in D); `0²/0²` stands for 0. Whether Δ_l is 0 is public: Δ is
    computed from weights already released. A NaN or infinite Δ is never taken for 0: it yields a std that is not
    finite, for the engine to refuse.

    The arithmetic is tensors only: no branch on a value, no copy to the host, so no device sync.
    """

    name: ClassVar[str]

    def stds(self, sensitivities: Tensor, sizes: Tensor, noise_multiplier: float) -> Tensor:
        """The noise std of each block.

        Args:
            sensitivities: (D,) Δ_l ≥ 0, how far one neighbouring step moves the *sum* of gradients of block l, so
                already multiplied by `Relation.sensitivity_factor`. Above 1e-150, so that squares do not underflow.
            sizes: (D,) number of weights d_l of each block; only `min_variance` reads it.
            noise_multiplier: σ > 0, joint over all blocks.

        Returns:
            (D,) float64 on the device of `sensitivities`, in the units of the summed gradient.

        Raises:
            ParameterError: σ not in (0, ∞), or shapes that differ.
        """
        ...


@dataclass(frozen=True)
class GlobalAllocation:
    """The same std everywhere: `s_l = σ·sqrt(Σ_j Δ_j²)` where Δ_l > 0.

    With a common s the constraint reads `Σ Δ_l²/s² = 1/σ²`, hence `s = σ·sqrt(Σ Δ_l²)`: the whole gradient is one
    vector of sensitivity `sqrt(Σ Δ_l²)`, as in DP-SGD (Abadi et al. 2016).

    >>> GlobalAllocation().stds(torch.tensor([3.0, 4.0, 0.0]), torch.tensor([10, 10, 10]), 2.0).tolist()
    [10.0, 10.0, 0.0]
    """

    name: ClassVar[str] = "global"

    def stds(self, sensitivities: Tensor, sizes: Tensor, noise_multiplier: float) -> Tensor:
        """See `Allocation.stds`."""
        delta, _, sigma = _checked(sensitivities, sizes, noise_multiplier)
        return torch.where(delta == 0, 0.0, sigma * delta.square().sum().sqrt())


@dataclass(frozen=True)
class PerLayerAllocation:
    """Every block gets the same share of the budget: `s_l = σ·sqrt(D)·Δ_l`, D = number of blocks with Δ_l ≠ 0.

    Each block then has its own noise multiplier `s_l/Δ_l = σ·sqrt(D)` and `Σ Δ_l²/s_l² = D·1/(σ²D) = 1/σ²`. A block
    with Δ_l = 0 contributes nothing to the sum, so counting it would only add noise to the others.

    >>> PerLayerAllocation().stds(torch.tensor([3.0, 4.0, 0.0, 1.0, 1.0]), torch.ones(5), 2.0).tolist()
    [12.0, 16.0, 0.0, 4.0, 4.0]
    """

    name: ClassVar[str] = "per_layer"

    def stds(self, sensitivities: Tensor, sizes: Tensor, noise_multiplier: float) -> Tensor:
        """See `Allocation.stds`."""
        delta, _, sigma = _checked(sensitivities, sizes, noise_multiplier)
        return sigma * (delta != 0).sum().to(delta.dtype).sqrt() * delta


@dataclass(frozen=True)
class MinVarianceAllocation:
    """The least total noise energy `Σ_l d_l s_l²`: `s_l² = σ²·(Σ_j Δ_j √d_j)·Δ_l/√d_l`.

    By Cauchy–Schwarz, for every s on the surface `Σ Δ_l²/s_l² = 1/σ²`:
    `(Σ Δ_l √d_l)² = (Σ (Δ_l/s_l)·(√d_l s_l))² ≤ (Σ Δ_l²/s_l²)·(Σ d_l s_l²) = (1/σ²)·Σ d_l s_l²`,
    so the energy is at least `σ²(Σ Δ_l √d_l)²`, with equality when `√d_l s_l ∝ Δ_l/s_l`, that is `s_l² = c·Δ_l/√d_l`;
    putting this in the constraint gives `c = σ²·Σ Δ_j √d_j`. A block with no weights (d_l = 0) counts as having one.

    >>> stds = MinVarianceAllocation().stds(torch.tensor([1.0, 1.0, 0.0]), torch.tensor([1, 16, 5]), 4.0)
    >>> stds.square().round().tolist()
    [80.0, 20.0, 0.0]
    """

    name: ClassVar[str] = "min_variance"

    def stds(self, sensitivities: Tensor, sizes: Tensor, noise_multiplier: float) -> Tensor:
        """See `Allocation.stds`."""
        delta, size, sigma = _checked(sensitivities, sizes, noise_multiplier)
        root = size.clamp(min=1.0).sqrt()
        return sigma * ((delta * root).sum() * (delta / root)).sqrt()


ALLOCATIONS: dict[str, Allocation] = {
    allocation.name: allocation for allocation in (GlobalAllocation(), PerLayerAllocation(), MinVarianceAllocation())
}


def get_allocation(name_or_object: str | Allocation) -> Allocation:
    """The allocation of that name, or the object itself when it already is one.

    Raises:
        UnknownNameError: neither a known name nor an object with `stds`.

    >>> get_allocation("per_layer")
    PerLayerAllocation()
    """
    if isinstance(name_or_object, str):
        if name_or_object in ALLOCATIONS:
            return ALLOCATIONS[name_or_object]
    elif isinstance(name_or_object, Allocation) and not isinstance(name_or_object, type):
        return name_or_object
    raise UnknownNameError("allocation", name_or_object, ALLOCATIONS)


def rescaled(stds: Tensor, sensitivities: Tensor, noise_multiplier: float) -> Tensor:
    """Stds in the same proportions on the surface Σ_l Δ_l²/s_l² = 1/σ², which rounding or an allocation may miss.

    Args:
        stds: (D,) s_l ≥ 0. Δ_l > 0 with s_l = 0 is no noise at any scale: what comes out is not finite.
        sensitivities: (D,) Δ_l ≥ 0, in the same units. Blocks with Δ_l = 0 count for nothing, whatever their std.
        noise_multiplier: σ, see `lipdp.accounting.joint_noise_multiplier` with σ_l = s_l/Δ_l.

    Returns:
        (D,) float64. Not a sync: nothing is read.

    >>> rescaled(torch.tensor([1.0, 1.0, 0.0]), torch.tensor([3.0, 4.0, 0.0]), 2.0).tolist()
    [10.0, 10.0, 0.0]
    """
    delta, std = sensitivities.to(torch.float64), stds.to(torch.float64)
    joint = torch.where(delta == 0, 0.0, delta / std).square().sum().rsqrt()
    return std * (noise_multiplier / joint)


def _checked(sensitivities: Tensor, sizes: Tensor, noise_multiplier: float) -> tuple[Tensor, Tensor, float]:
    """Shapes and σ checked (neither needs the device), both tensors in float64."""
    if not 0.0 < noise_multiplier < math.inf:
        raise ParameterError(f"noise_multiplier is {noise_multiplier}; it must be a finite number above 0")
    if sensitivities.ndim != 1 or sensitivities.shape != sizes.shape:
        raise ParameterError(
            f"sensitivities have shape {tuple(sensitivities.shape)} and sizes {tuple(sizes.shape)}; "
            "both must be (D,), one entry per parameter block"
        )
    return sensitivities.to(torch.float64), sizes.to(torch.float64), float(noise_multiplier)
