"""Convolutions with a certified norm: the reshaped kernel is a matrix, and the overlap of the windows is counted."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lipdp.constraints import Constraint, check_size
from lipdp.errors import UnsupportedLayerError
from lipdp.nn import autocast
from lipdp.nn.constrained import Constrained


def window_overlap(kernel: int, stride: int) -> int:
    """⌈k/s⌉: the most windows an entry lies in, along one axis, for zero padding and for 'same' circular padding."""
    return math.ceil(kernel / stride)


def check_convolution(conv: nn.Conv1d | nn.Conv2d) -> None:
    """Refuse the settings that have no rule, with the reason."""
    name = type(conv).__name__
    if any(d != 1 for d in conv.dilation):
        raise UnsupportedLayerError(
            f"{name}: dilation={conv.dilation}; the windows of a dilated kernel interleave and their overlap is not"
            " bounded by the rule used here. Use dilation=1 and a larger kernel or a stride."
        )
    if conv.padding_mode not in ("zeros", "circular"):
        raise UnsupportedLayerError(
            f"{name}: padding_mode={conv.padding_mode!r} repeats border entries, which raises the layer's norm beyond"
            " the bound. Use 'zeros' or 'circular'."
        )


def padding_of(conv: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> list[tuple[int, int]]:
    """What a convolution adds before and after each axis, in order, whichever way it was asked for.

    >>> padding_of(nn.Conv2d(1, 1, (2, 3), padding="same"))
    [(0, 1), (1, 1)]
    """
    sides = conv._reversed_padding_repeated_twice  # (before, after) of the last axis first
    return list(zip(sides[::2], sides[1::2], strict=True))[::-1]


def padded(conv: nn.Conv1d | nn.Conv2d, x: Tensor) -> Tensor:
    """The input of a convolution with its zeros, or its other end, around it."""
    sides = [side for pair in padding_of(conv)[::-1] for side in pair]
    return F.pad(x, sides, mode="circular" if conv.padding_mode == "circular" else "constant")


class _SpectralConv(Constrained):
    """The two convolutions: torch's `nn.Conv1d` or `nn.Conv2d` with a constrained kernel."""

    groups: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding_mode: Literal["zeros", "reflect", "replicate", "circular"]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] | str = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = False,
        padding_mode: Literal["zeros", "circular"] = "zeros",
        *,
        constraint: Constraint | None = None,
        k_coef_lip: float = 1.0,
        bias_radius: float = 1.0,
        weight_gate: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        sizes = {"in_channels": in_channels, "out_channels": out_channels, "kernel_size": kernel_size, "stride": stride}
        for name, size in sizes.items():
            check_size(name, size, pair=not name.endswith("channels"))
        geometry = (in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode)
        super().__init__(*geometry, device=device, dtype=dtype)
        check_convolution(self)  # type: ignore[arg-type]
        overlap = math.prod(map(window_overlap, self.kernel_size, self.stride))
        self._constrain(constraint, k_coef_lip, bias_radius, overlap=overlap, weight_gate=weight_gate)

    def weight_matrix(self) -> Tensor:
        """The kernel as a stack (groups, out/groups, in/groups · kernel size)."""
        return self.weight.reshape(self.groups, self.weight.shape[0] // self.groups, -1)

    def forward(self, input: Tensor) -> Tensor:
        weight, dtype = self.weight * self.scale, autocast.autocast_dtype(input)
        if dtype is None and self.weight_gate is None:
            return self._conv_forward(input, weight, self.bias)  # type: ignore[operator]
        x, gate = padded(self, input), self.effective_gate  # type: ignore[arg-type]
        return autocast.convolution(
            x, weight, self.bias, dtype or x.dtype, stride=self.stride, groups=self.groups, gate=gate
        )


_DOC = """{dimension} convolution y = α W ∗ x + b, k-Lipschitz for α = k/√m.

    W, the kernel reshaped to (out, in · {kernel}), has ‖W‖₂ ≤ 1. The patch matrix P of an input repeats each entry at
    most m = {overlap} times, so ‖P‖_F ≤ √m ‖x‖, and y = αWP gives ‖y‖ ≤ α √m ‖W‖₂ ‖x‖. The transposed map gives the
    same constant backwards, and ∇_W = α g Pᵀ gives ‖∇_W‖_F ≤ α √m X G. A bias is added at {positions} positions:
    ‖∇_b‖ ≤ √({positions}) G.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, groups: as `{base}`.
        bias: add b, projected on the ball of radius `bias_radius`. Off by default: its sensitivity is √({positions}).
        padding_mode: 'zeros' or 'circular'.
        constraint: where W is projected, `Orthogonal()` by default.
        k_coef_lip: k, the layer's Lipschitz constant.
        weight_gate: C: every sample's ∇_W is scaled to norm C at most: ‖∇_W‖_F ≤ C as well.

    Raises:
        UnsupportedLayerError: dilation, or a padding mode that repeats border entries.

    >>> lipdp.nn.{name}(1, 4, 3, padding=1)(torch.zeros(2, 1, {shape})).shape
    torch.Size([2, 4, {shape}])

    Source: Tsuzuku, Sato & Sugiyama (2018), section 3.2; Béthune et al. (2024), appendix C.
    """


class SpectralConv1d(_SpectralConv, nn.Conv1d):
    __doc__ = _DOC.format(
        name="SpectralConv1d", dimension="1-D", kernel="k", overlap="⌈k/s⌉", positions="L'", base="nn.Conv1d", shape="6"
    )


class SpectralConv2d(_SpectralConv, nn.Conv2d):
    __doc__ = _DOC.format(
        name="SpectralConv2d",
        dimension="2-D",
        kernel="k_h · k_w",
        overlap="⌈k_h/s_h⌉·⌈k_w/s_w⌉",
        positions="H'W'",
        base="nn.Conv2d",
        shape="6, 6",
    )
