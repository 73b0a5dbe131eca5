"""Per-sample centering: an orthogonal projection, so 1-Lipschitz. (Batch statistics mix samples and are refused.)"""

from __future__ import annotations

from collections.abc import Sequence

from deel import torchlip
from torch import Tensor

from lipdp.errors import MixesSamplesError


class LayerCentering(torchlip.LayerCentering):
    """Subtract a sample's mean over the given axes; optionally add a bias per channel.

    x ↦ x − (1/n) 𝟏𝟏ᵀx is an orthogonal projection: ‖y‖ ≤ ‖x‖, cotangent likewise. A bias broadcast over P positions
    has ‖∇_b‖ ≤ √P G.

    Args:
        num_features: channels of the bias (1: one number for all).
        dim: axes of the mean, negative, never the batch axis.
        bias: off by default.

    Raises:
        MixesSamplesError: when an axis is the batch axis, as happens with the default axes on a 2-D input.

    >>> lipdp.nn.LayerCentering()(torch.ones(2, 3, 4, 4)).abs().max().item()
    0.0

    Source: deel-torchlip (name and meaning).
    """

    def __init__(self, num_features: int = 1, dim: Sequence[int] = (-2, -1), bias: bool = False) -> None:
        super().__init__(num_features=num_features, dim=tuple(dim), bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        check_centering_axes(self.dim, x.dim())
        return super().forward(x)


def check_centering_axes(dim: Sequence[int], ndim: int) -> list[int]:
    """The axes as non-negative numbers; refuses the batch axis (axis 0)."""
    axes = [d % ndim if -ndim <= d < ndim else -1 for d in dim]
    if any(a <= 0 for a in axes):
        raise MixesSamplesError(
            f"LayerCentering over axes {tuple(dim)} of a {ndim}-D input takes the mean over the batch axis, so samples"
            " influence each other; choose axes of one sample, e.g. dim=(-1,) for an input (N, d)"
        )
    return axes
