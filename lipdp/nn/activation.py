"""Sorting activations: 1-Lipschitz and gradient-norm-preserving.

`MaxMin`, `LPReLU` and `HouseHolder` are deel-torchlip's modules, used as they are. Its `GroupSort` is not: it sorts
pairs by `min` and `max`, which send both gradients to one entry where the two are equal (zeros are), so that cotangents
grow by √2. `GroupSort2` is ours for speed: it pairs channel j with channel j + C/2, so that both halves are contiguous.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import torch
from deel import torchlip
from deel.torchlip import HouseHolder, LPReLU, MaxMin
from torch import Tensor, nn

from lipdp.constraints import check_positive
from lipdp.errors import ParameterError
from lipdp.nn.blocks import Function, is_traced

__all__ = ["BetaAbs", "FullSort", "GroupSort", "GroupSort2", "HouseHolder", "LPReLU", "MaxMin"]


def _halves(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    half = x.shape[dim] // 2
    return x.narrow(dim, 0, half), x.narrow(dim, half, half)


class _Mix(Function):
    """(a, b) ↦ (m a + (1−m) b, m b + (1−m) a) for a 0/1 mask m: linear, symmetric, its own transpose."""

    @staticmethod
    def forward(x: Tensor, mask: Tensor, dim: int) -> Tensor:
        a, b = _halves(x, dim)
        if is_traced(x, mask):
            chosen = mask.bool()
            return torch.cat([torch.where(chosen, a, b), torch.where(chosen, b, a)], dim)
        out = torch.empty_like(x)
        first, second = _halves(out, dim)
        torch.lerp(b, a, mask, out=first)
        torch.lerp(a, b, mask, out=second)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.dim = inputs[2]
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _Mix.apply(grads[0], ctx.saved_tensors[0], ctx.dim), None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], x: Tensor, mask: Tensor, dim: int) -> tuple[Tensor, int]:
        x, mask = _batched(info, in_dims[0], x), _batched(info, in_dims[1], mask)
        return _Mix.apply(x, mask, dim if dim < 0 else dim + 1), 0


class _MaxMin(Function):
    """(a, b) ↦ (max(a, b), min(a, b)) on the halves of an axis, with few passes over memory."""

    @staticmethod
    def forward(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        a, b = _halves(x, dim)
        if torch.compiler.is_compiling():
            upper = torch.maximum(a, b)
            return torch.cat([upper, torch.minimum(a, b)], dim), (a - upper).eq(0).to(x.dtype)
        out = torch.empty_like(x)
        first, second = _halves(out, dim)
        torch.maximum(a, b, out=first)
        torch.minimum(a, b, out=second)
        return out, torch.sub(a, first).eq_(0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.dim = inputs[1]
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _Mix.apply(grads[0], ctx.saved_tensors[0], ctx.dim), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], x: Tensor, dim: int) -> tuple[Any, tuple[int, int]]:
        return _MaxMin.apply(_batched(info, in_dims[0], x), dim if dim < 0 else dim + 1), (0, 0)


def _batched(info: Any, in_dim: int | None, x: Tensor) -> Tensor:
    """`x` with the axis that vmap maps over in front."""
    return x.expand(info.batch_size, *x.shape) if in_dim is None else x.movedim(in_dim, 0)


class GroupSort(torchlip.GroupSort):
    """Sort groups of channels (axis 1) in ascending order: a permutation, also where entries are equal.

    Args:
        group_size: channels in a group; None sorts all of them.
        k_coef_lip: k, the Lipschitz constant.

    >>> lipdp.nn.GroupSort(2)(torch.tensor([[5.0, 1.0, 2.0, 3.0]]))
    tensor([[1., 5., 2., 3.]])

    Source: Anil, Lucas & Grosse (2019), section 4.3; name and meaning from deel-torchlip.
    """

    def forward(self, input: Tensor) -> Tensor:
        channels = input.shape[1]
        size = min(self.group_size or channels, channels)
        if channels % size:
            raise ParameterError(f"GroupSort: {channels} channels do not divide into groups of {size}")
        groups = input.unflatten(1, (channels // size, size))
        return groups.sort(dim=2).values.flatten(1, 2) * self._coefficient_lip


class FullSort(GroupSort):
    """`GroupSort` of all channels.

    >>> lipdp.nn.FullSort()(torch.tensor([[5.0, 1.0, 2.0]]))
    tensor([[1., 2., 5.]])
    """

    def __init__(self, k_coef_lip: float = 1.0) -> None:
        super().__init__(None, k_coef_lip)


class GroupSort2(nn.Module):
    """Sort pairs: (a, b) ↦ (max(a, b), min(a, b)) with a the first and b the second half of the channels.

    A permutation of every input's entries, so the norm is preserved forwards and backwards: 1-Lipschitz. The pairs are
    (j, j + C/2), not neighbours as in deel-torchlip: the same function after permuting the channels, and about three
    times faster.

    Args:
        dim: the axis of the channels, 1 for (N, C, *), -1 for tokens (N, T, d).

    Raises:
        ParameterError: an odd number of channels.

    >>> lipdp.nn.GroupSort2()(torch.tensor([[1.0, 5.0, 3.0, 2.0]]))
    tensor([[3., 5., 1., 2.]])

    Source: Anil, Lucas & Grosse (2019), section 4.3.
    """

    def __init__(self, dim: int = 1) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, input: Tensor) -> Tensor:
        if input.shape[self.dim] % 2:
            raise ParameterError(
                f"GroupSort2 sorts pairs of channels: axis {self.dim} of an input {tuple(input.shape)} is odd;"
                " use an even number of channels"
            )
        return _MaxMin.apply(input, self.dim)[0]

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


class BetaAbs(nn.Module):
    """β-Abs: the absolute value of the first ⌊β C⌋ channels; the others stay as they are.

    A change of signs, so the norm is preserved forwards and (but for entries that are 0) backwards: 1-Lipschitz, and
    cheaper than sorting.

    Args:
        share: β in (0, 1], rounded to a fraction with a denominator of 1000 at most.
        dim: the axis of the channels, 1 for (N, C, *), -1 for tokens (N, T, d).

    Raises:
        ParameterError: another share.

    >>> lipdp.nn.BetaAbs(0.5)(torch.tensor([[-1.0, -2.0, -3.0, 4.0]]))
    tensor([[ 1.,  2., -3.,  4.]])

    Source: Hu, Hu & Fredrikson (2026), "LipNeXt".
    """

    def __init__(self, share: float = 0.5, dim: int = 1) -> None:
        super().__init__()
        if not 0 < check_positive("share", share) <= 1:
            raise ParameterError(f"BetaAbs: share is the part of the channels, above 0 and at most 1, got {share!r}")
        self.share, self.dim = Fraction(share).limit_denominator(1000), dim

    def forward(self, input: Tensor) -> Tensor:
        channels = input.shape[self.dim]
        count = channels * self.share.numerator // self.share.denominator
        kept = input.narrow(self.dim, count, channels - count)
        return torch.cat([input.narrow(self.dim, 0, count).abs(), kept], dim=self.dim)

    def extra_repr(self) -> str:
        return f"share={float(self.share):g}, dim={self.dim}"
