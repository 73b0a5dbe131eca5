"""Dense layers with a certified norm."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lipdp.constraints import Constraint, Frobenius, check_size
from lipdp.nn import autocast
from lipdp.nn.constrained import Constrained


class SpectralLinear(Constrained, nn.Linear):
    """Dense layer y = k W x + b with ‖W‖₂ ≤ 1: k-Lipschitz, on (N, d) or (N, T, d).

    Per-sample gradients with X ≥ ‖x‖ and cotangent norm ≤ G obey ‖∇_W‖_F ≤ k X G, because
    ‖Σ_t g_t x_tᵀ‖_F ≤ Σ_t ‖g_t‖‖x_t‖ ≤ ‖g‖‖x‖ (Cauchy–Schwarz over the T tokens), and ‖∇_b‖ ≤ √T G.

    Args:
        in_features, out_features: sizes of the last axis.
        bias: add b, projected on the ball of radius `bias_radius`. Off by default: a bias costs noise.
        constraint: where W is projected; `Orthogonal()` (all singular values 1, preserves gradient norms) or
            `Spectral()` (singular values at most 1).
        k_coef_lip: k, the layer's Lipschitz constant, as deel-torchlip calls it.
        weight_gate: C: every sample's ∇_W is scaled to norm C at most: ‖∇_W‖_F ≤ C as well.

    >>> lipdp.nn.SpectralLinear(8, 4)(torch.zeros(2, 8)).shape
    torch.Size([2, 4])

    Source: Béthune et al. (2024), section 3; Anil, Lucas & Grosse (2019).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        constraint: Constraint | None = None,
        k_coef_lip: float = 1.0,
        bias_radius: float = 1.0,
        weight_gate: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_size("in_features", in_features)
        check_size("out_features", out_features)
        nn.Linear.__init__(self, in_features, out_features, bias, device=device, dtype=dtype)
        self._constrain(constraint, k_coef_lip, bias_radius, overlap=1, weight_gate=weight_gate)

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight if self.scale == 1.0 else self.weight * self.scale
        dtype = autocast.autocast_dtype(input)
        if dtype is not None or self.weight_gate is not None:
            return autocast.linear(input, weight, self.bias, dtype or input.dtype, self.effective_gate)
        return F.linear(input, weight, self.bias)


class FrobeniusLinear(SpectralLinear):
    """Dense layer with ‖W‖_F ≤ 1; for one output it is a `SpectralLinear` without the matrix arithmetic.

    deel-torchlip's `disjoint_neurons=True` normalises every row by itself, which is not 1-Lipschitz for more than one
    output; here the whole matrix is in one ball.

    Args: as `SpectralLinear`, with `constraint=Frobenius()`.

    >>> lipdp.nn.FrobeniusLinear(8, 1).weight.norm().item() <= 1 + 1e-6
    True
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = False, **options: object) -> None:
        super().__init__(in_features, out_features, bias, **{"constraint": Frobenius(), **options})  # type: ignore[arg-type]
