"""How much a bound must allow for floating-point rounding in the forward and backward pass."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_TF32_EPS = 2.0**-10


class Rounding:
    """Relative slack of an operation computed in `dtype` on `device`.

    An accumulation of n terms in float32 (or float64) has a relative error of at most n ε, and the bound allows 8 n ε: the
    backward pass rounds as well. Where a product is computed from less precise numbers (bfloat16 under autocast, TF32 on
    a GPU that is allowed to use it, bfloat16 for `set_float32_matmul_precision("medium")`), 4 ε of that format is added.

    Args:
        dtype: of the forward pass.
        device: where it runs.

    >>> Rounding(torch.float64, torch.device("cpu")).slack(1000) < 1 + 1e-11
    True

    Source: Higham (2002), Accuracy and Stability of Numerical Algorithms, section 3.1.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype = dtype
        self._accumulation = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
        self._products = 0.0 if dtype in (torch.float32, torch.float64) else torch.finfo(dtype).eps
        if dtype == torch.float32:
            self._products = _float32_product_eps(device)

    @property
    def cast(self) -> float:
        """The factor by which rounding a tensor to the dtype of the products may lengthen it: the loss's cotangent."""
        return 1.0 + self._products

    def slack(self, fan_in: float | Tensor) -> float | Tensor:
        """The factor by which an operation that sums `fan_in` terms may exceed its exact bound."""
        return 1.0 + 8 * fan_in * self._accumulation + 4 * self._products


def batch_slack(records: int, dtype: torch.dtype, *, terms: int = 1) -> float:
    r"""The factor s such that one record moves a gradient, as summed over a batch in `dtype`, by at most s Δ.

    Let u be the unit roundoff, and let each of n records give t terms whose norms add up to Δ at most (‖g_r‖‖x_r‖ for the
    rows r of a dense layer, by Cauchy–Schwarz). A sum in whatever order is a binary tree with the terms at its leaves: a
    term d nodes below the root, and once more where products are rounded, comes out with a relative error of at most
    :math:`(1+u)^{d+1} - 1 \le (d+1)\,u\,(1+u)^{nt}`. Summed over the terms, d times the norm is the sum over the nodes of what
    lies below them; below a node with k leaves that is at most min(k, n) Δ, and the i-th largest node has at most nt + 1 − i
    leaves, as where the terms are added one after the other. So the sum S is off by at most

    .. math:: e = u\,(1+u)^{nt}\Bigl(n + \sum_{k=2}^{nt} \min(k, n)\Bigr)\Delta
              \le u\,(1+u)^{nt}\,\frac{n\,(n(2t-1)+3)}{2}\,\Delta,

    and so is the sum S' without the record, whose order may be another: ‖fl(S) − fl(S')‖ ≤ Δ + 2e. Infinite for n t u ≥ 1/8.

    It cannot be much smaller for all data. Half of the batch that takes S just above a power of two, and another half whose
    terms are a little longer than half the spacing there: with the record each is rounded up, without it none is. On the
    CPU of torch 2.13 a product of 8 columns adds one record after the other, and such records move it by 1.016 Δ for
    n = 1024, 1.25 Δ for 4096 and 2 Δ for 16,384. Equal records move it by 1.0006 Δ for n = 65,536.

    Args:
        records: n.
        dtype: that the sum is accumulated in.
        terms: t, the rows or positions that a parameter is used at.

    >>> batch_slack(256, torch.float32) < 1.005, batch_slack(65536, torch.float64, terms=1000) < 1.001
    (True, True)

    Source: Higham (2002), section 4.2; for the attack Casacuberta, Shoemate, Vadhan & Wagaman (2022).
    """
    unit = torch.finfo(dtype).eps / 2
    depth = records * terms
    if depth * unit >= 1 / 8:
        return math.inf
    return 1.0 + unit * records * (2 * depth - records + 3) * (1 + unit) ** depth


def _float32_product_eps(device: torch.device) -> float:
    """0 where float32 products are computed in float32; torch's switches say where they are not."""
    precision = torch.get_float32_matmul_precision()
    if precision == "medium":
        return torch.finfo(torch.bfloat16).eps
    tf32 = precision == "high" or (device.type == "cuda" and torch.backends.cudnn.allow_tf32)
    return _TF32_EPS if tf32 else 0.0
