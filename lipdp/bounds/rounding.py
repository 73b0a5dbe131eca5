"""How much a bound must allow for floating-point rounding in the forward and backward pass."""

from __future__ import annotations

import torch

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

    def slack(self, fan_in: int) -> float:
        """The factor by which an operation that sums `fan_in` terms may exceed its exact bound."""
        return 1.0 + 8 * fan_in * self._accumulation + 4 * self._products


def _float32_product_eps(device: torch.device) -> float:
    """0 where float32 products are computed in float32; torch's switches say where they are not."""
    precision = torch.get_float32_matmul_precision()
    if precision == "medium":
        return torch.finfo(torch.bfloat16).eps
    tf32 = precision == "high" or (device.type == "cuda" and torch.backends.cudnn.allow_tf32)
    return _TF32_EPS if tf32 else 0.0
