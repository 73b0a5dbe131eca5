"""Projections of values and gates of cotangents: what bounds X and G where the network itself does not."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lipdp.constraints import check_positive
from lipdp.nn.blocks import Function, blocks, is_traced


def per_sample_norm(x: Tensor) -> Tensor:
    """Euclidean norm of every sample of (N, *), in float64, where no float32 overflows or vanishes: (N, 1, …, 1)."""
    x = x.double()  # first, not within: torch's mixed norm takes 2.6 times as long on a CPU
    norm = torch.linalg.vector_norm(x.reshape(len(x), x.shape[1:].numel()), dim=1) if x.dim() > 1 else x.abs()
    return norm.view(-1, *[1] * (x.dim() - 1))


def clip_norm(x: Tensor, bound: float | Tensor, radius: float | Tensor | None = None) -> Tensor:
    """Project every sample of (N, *) on the ball of radius `bound`, then scale that ball to `radius`, if given.

    What is inside keeps its place, zero stays zero, and gradients stay finite.

    Guarantee: the norm of what comes out, as computed, is at most the radius. With u = ε/2 the unit roundoff of `x`,
    the factor and the n products by it are rounded by u at most, so the norm grows by (1 + u)² at most, and the float64
    norm is off by n 2⁻⁵³ at most. So the ball projected on is smaller by ε + n 2⁻⁵², and (1 + u)²(1 − 2u) < 1. (In
    float64 up to n 2⁻⁵³ for the norm itself.) A factor below the smallest normal number, which would be rounded by
    more, becomes 0.
    """
    entries = x[0].numel() if len(x) else 0
    margin = 1 - torch.finfo(x.dtype).eps - entries * torch.finfo(torch.float64).eps
    out: Tensor = _Ball.apply(x, margin * bound, margin * (bound if radius is None else radius))[0]
    return out


class _Ball(Function):
    r"""x ↦ f x of every sample, f = r/max(‖x‖, c); and the norms.

    Backward, with u = x/‖x‖ beyond the ball and 0 within: f (g − ⟨u, g⟩ u).
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, bound: float | Tensor, radius: float | Tensor) -> tuple[Tensor, Tensor]:
        if is_traced(x, bound, radius):
            norm = per_sample_norm(x)
            return (x * _factor(norm, bound, radius, x.dtype)).to(x.dtype), norm
        norm = torch.cat([per_sample_norm(some) for (some,) in blocks(x)])
        out = torch.empty_like(x)
        for some, factor, to in blocks(x, _factor(norm, bound, radius, x.dtype), out):
            torch.mul(some, factor, out=to)
        return out, norm

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(inputs[0], output[1], *(t for t in inputs[1:] if isinstance(t, Tensor)))
        ctx.numbers = [None if isinstance(t, Tensor) else t for t in inputs[1:]]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        x, norm, *tensors = ctx.saved_tensors
        bound, radius = (tensors.pop(0) if number is None else number for number in ctx.numbers)
        if torch.is_grad_enabled() or is_traced(x, bound, radius, *grads):
            norm = per_sample_norm(x)
            factor = _factor(norm, bound, radius, x.dtype)
            return (_tangent(x, grads[0], norm, bound, factor.dtype) * factor).to(x.dtype), None, None
        out, factor = torch.empty_like(x), _factor(norm, bound, radius, x.dtype)
        limits = torch.as_tensor(bound, dtype=norm.dtype, device=norm.device).expand_as(norm)
        for some, upper, norms, limit, f, to in blocks(x, grads[0], norm, limits, factor, out):
            torch.mul(_tangent(some, upper, norms, limit, f.dtype), f, out=to)
        return out, None, None


def _factor(norm: Tensor, bound: float | Tensor, radius: float | Tensor, dtype: torch.dtype) -> Tensor:
    wide = torch.promote_types(dtype, torch.float32)
    return F.hardshrink(radius / norm.clamp_min(bound), torch.finfo(wide).smallest_normal).to(wide)


def _tangent(x: Tensor, g: Tensor, norm: Tensor, bound: float | Tensor, dtype: torch.dtype) -> Tensor:
    """g − ⟨u, g⟩ u with u = x/‖x‖ where ‖x‖ > c, else 0."""
    unit = x * torch.where(norm > bound, norm.clamp_min(bound).reciprocal(), 0.0).to(dtype)
    along = (unit * g).reshape(len(x), x.shape[1:].numel()).sum(1).view(norm.shape) if x.dim() > 1 else unit * g
    return torch.addcmul(g.to(dtype), along, unit, value=-1)


class ValueClip(nn.Module):
    """Projection of every sample on the ball of radius c, then scaling to radius r: x ↦ (r/c) x min(1, c/‖x‖).

    The projection on a convex set is 1-Lipschitz, so cotangents grow by r/c at most, and ‖y‖ ≤ r/c min(X, c). It
    tightens the sensitivity of the layer behind it at the price of a bias on the samples it clips. With c below nearly
    all norms it normalises: every sample leaves with norm r, and the bound is tight.

    Args:
        bound: c > 0.
        radius: r > 0, by default c (no scaling).

    >>> lipdp.nn.ValueClip(1.0)(torch.tensor([[3.0, 4.0]]))
    tensor([[0.6000, 0.8000]])

    Source: Stevens et al. (2022), section 4 (clipping of layer inputs).
    """

    def __init__(self, bound: float, radius: float | None = None) -> None:
        super().__init__()
        self.bound = check_positive("bound", bound)
        self.radius = self.bound if radius is None else check_positive("radius", radius)

    def forward(self, input: Tensor) -> Tensor:
        return clip_norm(input, self.bound, self.radius)

    def extra_repr(self) -> str:
        return f"bound={self.bound}" + (f", radius={self.radius}" if self.radius != self.bound else "")


class InputBound(ValueClip):
    """`ValueClip` at the network's input: makes ‖x‖ ≤ c true for every record, whatever the file holds.

    The bound must be a public constant: chosen from the format (pixels in [0, 1] give ‖x‖ ≤ √n), not from the records.

    Args:
        bound: c > 0.

    >>> lipdp.nn.InputBound(5.0)(torch.tensor([[1.5, 2.0], [6.0, 8.0]]))
    tensor([[1.5000, 2.0000],
            [3.0000, 4.0000]])
    """


def default_input_bound(input_shape: tuple[int, ...]) -> float:
    """The default bound on inputs. It depends on the shape of the inputs alone.

    n entries in [0, 1] have ‖x‖ ≤ √n, which no natural image comes near: an MNIST digit has a norm of about 0.33 √n, an
    8x8 digit 0.42 √n, a CIFAR-10 photograph 0.53 √n. Images get √n/4, so that nearly all of them lie *on* the sphere
    and the bound is tight (what is lost is an overall factor, that is the exposure); tables, where the norm may carry
    information, get √n/2. Neither looks at the data.

    Args:
        input_shape: of one sample; three axes are an image.

    >>> lipdp.models.default_input_bound((1, 28, 28)), lipdp.models.default_input_bound((64,))
    (7.0, 4.0)
    """
    root = math.sqrt(math.prod(input_shape))
    return root / 4 if len(input_shape) == 3 else root / 2


class _Gate(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, bound: float) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.bound = inputs[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return clip_norm(grads[0], ctx.bound), None


def gate_cotangent(x: Tensor, bound: float) -> Tensor:
    """Identity forwards; backwards every sample's cotangent is scaled to norm at most `bound`.

    >>> x = torch.zeros(1, 2, requires_grad=True)
    >>> (gate_cotangent(x, 1.0) @ torch.tensor([3.0, 4.0])).sum().backward()
    >>> x.grad
    tensor([[0.6000, 0.8000]])
    """
    return _Gate.apply(x, bound)


class GradientGate(nn.Module):
    """Cotangent gate: identity forwards; backwards g ↦ g min(1, c/‖g‖) per sample.

    Everything in front of the gate sees a cotangent of norm at most min(G, c). Samples whose cotangent is larger
    contribute a shorter step (a bias, as in clipping), and all others are exact. The loss must be summed, not
    averaged, over the batch: the engine's criterion is.

    Args:
        bound: c > 0, in units of the summed loss.

    >>> lipdp.nn.GradientGate(0.5)
    GradientGate(bound=0.5)

    Source: Stevens et al. (2022), section 4 (clipping of upstream gradients).
    """

    def __init__(self, bound: float) -> None:
        super().__init__()
        self.bound = check_positive("bound", bound)

    def forward(self, input: Tensor) -> Tensor:
        return gate_cotangent(input, self.bound)

    def extra_repr(self) -> str:
        return f"bound={self.bound}"
