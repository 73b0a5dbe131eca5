"""How much a bound must allow for floating-point rounding in the forward and backward pass."""

from __future__ import annotations

import torch
from torch import Tensor

_TF32_EPS = 2.0**-10


class Rounding:
    """Relative slack of an operation computed in `dtype` on `device`.

    A sum of n terms in float32 (or float64) has a relative error of at most n ε, and the bound allows 8 n ε: the
    backward pass rounds as well. Where products are of less precise numbers (bfloat16 under autocast, TF32 on a GPU
    that is allowed to use it, bfloat16 for `set_float32_matmul_precision("medium")`), 4 ε of that format is added.

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


def batch_slack(records: int, dtype: torch.dtype) -> float:
    """What Δ is multiplied by for the rounding of a sum over a batch in `dtype`: 1 + 2 n u, u the unit roundoff.

    Records whose terms are alike move the rounded sum of n by (1 + n u) Δ at most: each of the n additions errs by u of
    a partial sum, and an error depends on the record that comes or goes only as far as that moves the partial sum.

    No proof for all data. A batch can be made so that every addition rounds the other way once a record is there: half
    of it takes the sum just above a power of two, the other half is a little longer than half the spacing there. On the
    CPU of torch 2.13 a float32 product of 8 columns then moves by 1.016 Δ for n = 1024, 1.25 Δ for 4096 and 2 Δ for
    16,384, and no slack below 1 + 2 n² u holds for any order of summation. Train in float64 (2⁻⁵³) where that matters.

    Args:
        records: n, a public number: the expected size of a batch.
        dtype: that the sum is accumulated in.

    Source: Higham (2002), section 4.2; for the attack Casacuberta, Shoemate, Vadhan & Wagaman (2022).
    """
    return 1.0 + records * torch.finfo(dtype).eps


def _float32_product_eps(device: torch.device) -> float:
    """0 where float32 products are computed in float32; torch's switches say where they are not."""
    precision = torch.get_float32_matmul_precision()
    if precision == "medium":
        return torch.finfo(torch.bfloat16).eps
    tf32 = precision == "high" or (device.type == "cuda" and torch.backends.cudnn.allow_tf32)
    return _TF32_EPS if tf32 else 0.0
