"""Spatial pattern without a convolution: channels that look one pixel aside."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lipdp.constraints import check_size


class SpatialShift(nn.Module):
    """Channels of (N, C, H, W) moved by one pixel: the first k up, the next k down, then k left, k right; others stay.

    What leaves the picture is lost, and zeros come in (`torch.roll` brings it back at the other side). Every entry is
    there once at most, so both norms do not grow: 1-Lipschitz. Between two dense layers over channels it does what a
    convolution does, and nothing overlaps: no factor √m is lost.

    Args:
        channels: k, of each direction; 4 k ≤ C, or no channel is left for some of them.

    >>> lipdp.nn.SpatialShift(1)(torch.ones(1, 5, 2, 2))[0, 0]
    tensor([[1., 1.],
            [0., 0.]])

    Source: Hu, Hu & Fredrikson (2026), "LipNeXt" (there with `roll`); Yu et al. (2022), "S²-MLP".
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        check_size("channels", channels)
        self.channels = channels

    def forward(self, input: Tensor) -> Tensor:
        k = self.channels
        return torch.cat(
            [
                F.pad(input[:, :k, 1:], (0, 0, 0, 1)),
                F.pad(input[:, k : 2 * k, :-1], (0, 0, 1, 0)),
                F.pad(input[:, 2 * k : 3 * k, :, 1:], (0, 1)),
                F.pad(input[:, 3 * k : 4 * k, :, :-1], (1, 0)),
                input[:, 4 * k :],
            ],
            dim=1,
        )

    def extra_repr(self) -> str:
        return f"channels={self.channels}"
