"""How a convolution's kernel starts: strategies that look at no data, only at what images are like."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from lipdp.nn import SpectralConv2d

Start: TypeAlias = Callable[[SpectralConv2d], None]

_ROUGHNESS = 0.2  # r of `smooth`; the norms kept hardly change between 0.05 and 0.5


def haar(conv: SpectralConv2d) -> None:
    """Start from a Haar-distributed orthogonal kernel, as the layer does by itself."""


@torch.no_grad()
def smooth(conv: SpectralConv2d) -> None:
    """Start from kernels whose taps are nearly equal: W = proj(A + r B), A constant along the taps.

    The factor 1/√m of a convolution allows for m overlapping windows that add up in phase. With equal taps they do, on
    images, which are smooth; with independent taps they do not, and every layer loses up to √m of the norm of values
    and gradients. On MNIST a second 3x3 convolution keeps 0.83 of the norm instead of 0.55.
    """
    out_channels, in_channels, *taps = conv.weight.shape
    equal = torch.randn(out_channels, in_channels, *[1] * len(taps))
    kernel = equal + _ROUGHNESS * torch.randn(conv.weight.shape)
    conv.weight.copy_(conv.constraint.project(kernel.view_as(conv.weight_matrix())).view_as(conv.weight))


@torch.no_grad()
def cosine(conv: SpectralConv2d) -> None:
    """Start from the smoothest members of the orthonormal cosine basis (DCT-II) of channels x height x width.

    Images have most of their energy there; a random orthogonal kernel has filters of all frequencies alike.
    Where there are more filters than basis members the kernel stays as it is.
    """
    filters, *sizes = conv.weight.shape
    if filters > math.prod(sizes):
        return
    frequencies = torch.cartesian_prod(*(torch.arange(size) for size in sizes))
    difference = frequencies.max(1).values - frequencies.min(1).values
    order = torch.argsort(frequencies.sum(1) * 1000 + difference, stable=True)[:filters]
    picked = [_cosines(size)[frequencies[order, axis]] for axis, size in enumerate(sizes)]
    conv.weight.copy_(torch.einsum("fc,fh,fw->fchw", *picked))


def _cosines(size: int) -> Tensor:
    """The orthonormal DCT-II matrix, one frequency a row, float64."""
    k, i = torch.arange(size, dtype=torch.float64)[:, None], torch.arange(size, dtype=torch.float64)[None, :]
    matrix = math.sqrt(2 / size) * torch.cos(math.pi * (i + 0.5) * k / size)
    matrix[0] = 1 / math.sqrt(size)
    return matrix
