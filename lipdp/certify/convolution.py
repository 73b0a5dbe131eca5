r"""The norm of a convolution from its Fourier transform, where the reshaped kernel's bound is loose."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor, nn

from lipdp.bounds import Call, Local, Rule, least
from lipdp.nn.conv import SpectralConv2d, padding_of
from lipdp.nn.linear import SpectralLinear

_BLOCK = 1 << 22  # complex numbers transformed at a time
_FORWARDS = (nn.Conv1d.forward, nn.Conv2d.forward, SpectralConv2d.forward)


def scale_of(layer: nn.Module) -> float:
    """What the forward pass multiplies the weight by: α in the layers of `lipdp.nn`, 1 where it is torch's."""
    scaled = type(layer).forward in (SpectralLinear.forward, SpectralConv2d.forward)
    return float(layer.scale) if scaled else 1.0  # type: ignore[arg-type]


def is_convolution(module: nn.Module | None) -> bool:
    """Whether it computes what torch's or this library's convolutions do: a class of your own may compute anything."""
    return isinstance(module, (nn.Conv1d, nn.Conv2d)) and type(module).forward in _FORWARDS


def fourier_norm(kernel: Tensor, grid: tuple[int, ...]) -> float:
    """The norm of the circular convolution with a kernel on a periodic grid, max_ω ‖K̂(ω)‖₂.

    The Fourier transform, an isometry up to a factor, turns the convolution into one matrix (out, in) a frequency:
    K̂(ω) = Σ_t K_t e^(−i⟨ω,t⟩), summed over the kernel's entries, whichever way it wraps. A real kernel has K̂(−ω)
    conjugate to K̂(ω), so half of the frequencies are enough.

    Args:
        kernel: (out, in, *sizes), real.
        grid: number of points per axis.

    Returns:
        The norm, rounded upwards. In float64 each entry of a transform is off by 40 ε Σ_t |K_t| at most, the
        eigenvalues by a multiple of ε relative to the largest; the slack (64 + 8 n) ε ‖K‖_F for n entries covers both.

    Source: Sedghi, Gupta & Long (2019), theorem 6.
    """
    spectra = kernel.double().to(torch.complex128)
    rows, columns = kernel.shape[:2]
    for axis, points in enumerate(grid):
        # the last axis stays short: its non-negative frequencies are enough
        frequencies = torch.arange(points // 2 + 1 if axis == len(grid) - 1 else points, dtype=torch.float64)
        places = torch.arange(kernel.shape[2 + axis], dtype=torch.float64)
        wave = torch.exp(-2j * math.pi / points * torch.outer(places, frequencies))
        spectra = torch.tensordot(spectra, wave.to(spectra.device), dims=([2], [0]))
    matrices = spectra.flatten(2).permute(2, 0, 1)
    largest = 0.0
    for block in matrices.split(max(1, _BLOCK // (rows * columns))):
        gram = block @ block.mH if rows <= columns else block.mH @ block
        largest = max(largest, float(torch.linalg.eigvalsh(gram)[:, -1].max()))
    eps, count = torch.finfo(torch.float64).eps, kernel.numel()
    frobenius = float(torch.linalg.vector_norm(kernel.double()))
    return math.sqrt(max(largest, 0.0)) * (1.0 + 8 * count * eps) + (64 + 8 * count) * eps * frobenius


def tightened(rule: Rule) -> Rule:
    """A convolution's rule with the smaller of two bounds: the reshaped kernel's, and the Fourier transform's.

    *Zero padding.* Pad a sample with its zeros (an isometry) and take the padded image for one period of a torus. No
    window of a padded image wraps around, so the layer's outputs are some of the entries of a circular convolution
    there, whatever the stride, and leaving out entries is a projection. So the norm is at most that of the circular
    convolution on the padded grid, which is never above √(k_h k_w) times the norm of the reshaped kernel.

    *Circular padding.* The outputs are entries of the circular convolution on the image's own grid, each at most once
    if there are no more windows than points on each axis (at stride 1, counted before the stride): the same bound. Else
    the reshaped kernel's is kept.
    """

    def bound(call: Call) -> Local:
        local, layer = rule(call), call.module
        if not isinstance(layer, (nn.Conv1d, nn.Conv2d)) or not is_convolution(layer):
            return local
        axes = len(layer.kernel_size)
        sizes = call.x.shape[-axes:]
        padded = tuple(size + sum(sides) for size, sides in zip(sizes, padding_of(layer), strict=True))
        circular = layer.padding_mode == "circular"
        windows = [total - k + 1 for total, k in zip(padded, layer.kernel_size, strict=True)]
        if circular and any(count > size for count, size in zip(windows, sizes, strict=True)):
            return local
        kernel = call.used(layer.weight * scale_of(layer))
        blocks = kernel.reshape(layer.groups, -1, *kernel.shape[1:])
        norm = max(fourier_norm(block, tuple(sizes) if circular else padded) for block in blocks)
        return dataclasses.replace(local, gains=(least(local.gains[0], norm),))

    return bound
