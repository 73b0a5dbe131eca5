"""The rules of products: of activations and a weight (`F.linear`, `x @ W`, `einsum`), and of two activations."""

from __future__ import annotations

import math
import operator
from string import ascii_letters

import torch
from torch import Tensor
from torch.nn import functional as F

from lipdp.bounds.rules import Call, Input, Local, Number, rule, times
from lipdp.errors import UnsupportedOperationError
from lipdp.norms import certified_norm, vector_norm


def _product(call: Call, repeats: tuple[float, float], norms: tuple[Number, Number], fan_in: int) -> Local:
    """Y = A B block by block, entries repeated to fill the blocks where an operand has fewer.

    The cotangent of a block of A is Σ_r G_r B_rᵀ, of norm ≤ ‖G‖ √Σ_r ‖B_r‖² by Cauchy–Schwarz. Where A is repeated, B
    isn't: activations have Σ_r ‖B_r‖² ≤ ‖B‖_F², and r times the largest ‖B_r‖₂² serves for a weight. In the same way
    ‖Y‖² ≤ Σ ‖A‖² ‖B‖² over pairs that are there once.

    Args:
        repeats: r of each operand.
        norms: the largest norm of a block, where the operand is a weight; else its value bound.
    """
    (first, second), (one, two) = call.inputs, norms
    gains = (
        times(math.sqrt(repeats[0]) if second.constant is not None else 1.0, two),
        times(math.sqrt(repeats[1]) if first.constant is not None else 1.0, one),
    )
    activation = 0 if first.constant is None else 1
    return Local(gains=gains, value_cap=times(gains[activation], call.inputs[activation].value), fan_in=fan_in)


def _norm(call: Call, source: Input, blocks: Tensor | None = None) -> Number:
    """The largest norm of a weight's matrices; of activations the value bound."""
    if source.constant is None:
        return source.value
    weight = call.used(source.constant if blocks is None else blocks)
    return certified_norm(weight.reshape(-1, *weight.shape[-2:])).max()


@rule(F.linear)
def _linear(call: Call) -> Local:
    """y = x Wᵀ + b over R rows, W and b tensors of the model: ‖W‖₂ in x, X in W, √R in b."""
    weight, bias = call.argument(1, "weight"), call.argument(2, "bias")
    tensors = [t for t in (weight, bias) if t is not None]
    if call.x.constant is not None or any(t.constant is None for t in tensors) or len(weight.shape) != 2:
        raise UnsupportedOperationError(
            f"node '{call.name}': F.linear takes activations and a weight (out, in) of the model"
        )
    rows = call.x.numel // weight.shape[1]
    norm, terms = _norm(call, weight), max(weight.shape[1], rows)
    if bias is None:
        return Local(gains=(norm, call.x.value), value_cap=times(norm, call.x.value), fan_in=terms)
    cap = times(norm, call.x.value) + math.sqrt(rows) * vector_norm(call.used(bias.constant))
    return Local(gains=(norm, call.x.value, math.sqrt(rows)), value_cap=cap, fan_in=terms)


@rule(operator.matmul, torch.matmul, torch.mm, torch.bmm, "matmul", "mm", "bmm")
def _matmul(call: Call) -> Local:
    """`_product`, of matrices in the last two axes."""
    first, second = call.inputs
    axes = [len(t.shape) + (t.constant is None) for t in (first, second)]
    rank = len(call.output_shape) + 1
    if min(axes) < 2 or any(t.constant is None and n != rank for t, n in zip(call.inputs, axes, strict=True)):
        raise UnsupportedOperationError(
            f"node '{call.name}' multiplies tensors of {axes[0]} and {axes[1]} axes into one of {rank}; give the"
            " activations the same number of axes, the batch first, and a weight at least 2"
        )
    if first.constant is None and second.constant is None and rank < 3:
        raise UnsupportedOperationError(f"node '{call.name}' multiplies the samples of a batch with each other")
    blocks = math.prod(call.output_shape[: max(rank - 3, 0)])
    shapes = [t.shape if t.constant is not None else (1, *t.shape) for t in call.inputs]
    repeats = [max(1.0, blocks * math.prod(shape[-2:]) / math.prod(shape)) for shape in shapes]
    inner = shapes[0][-1]
    norms = _norm(call, first), _norm(call, second)
    sums = max(inner, *(math.prod(call.output_shape) * inner // max(t.numel, 1) for t in call.inputs))
    return _product(call, (repeats[0], repeats[1]), norms, sums)


@rule(torch.einsum)
def _einsum(call: Call) -> Local:
    """`_product` of two operands: labels of both number the blocks if they are kept, and are summed if not.

    A label of one operand alone that is not kept is a sum over it, which is refused, as are labels twice in one.
    """
    equation = call.args[0]
    operands = call.inputs
    if not isinstance(equation, str) or len(operands) != 2:
        raise UnsupportedOperationError(f"node '{call.name}': an einsum of two tensors has a bound")
    (one, two), out = _labels(call, equation)
    for labels, source in ((one, operands[0]), (two, operands[1])):
        if source.constant is None and (labels[0] != out[0]):
            raise UnsupportedOperationError(
                f"node '{call.name}': the batch comes first in {equation!r}, and stays first"
            )
        repeated = len(set(labels)) < len(labels)
        summed = set(labels) - set(out) - (set(one) & set(two))
        shared = source.constant is not None and out[0] in labels
        if repeated or summed or shared:
            raise UnsupportedOperationError(
                f"node '{call.name}': {equation!r} takes a diagonal, sums over a label of one operand or gives a weight"
                " a batch axis; there is a bound for products of matrices, block by block"
            )
    sizes = [
        dict(zip(o, s.shape if s.constant is not None else (None, *s.shape), strict=True))
        for o, s in zip((one, two), operands, strict=True)
    ]
    both = [label for label in one if label in two]
    if any(sizes[0][label] != sizes[1][label] for label in both):
        raise UnsupportedOperationError(
            f"node '{call.name}': a label of {equation!r} has two sizes; expand the smaller one"
        )
    blocks, inner = [label for label in both if label in out], [label for label in both if label not in out]
    norms = []
    for labels, source in ((one, operands[0]), (two, operands[1])):
        if source.constant is None:
            norms.append(source.value)
            continue
        own = [label for label in labels if label not in both]
        order = [labels.index(label) for label in (*blocks, *own, *inner)]
        ordered = source.constant.detach().permute(order)
        ends = ordered.shape
        parts = [math.prod(ends[i:j]) for i, j in ((0, len(blocks)), (len(blocks), len(blocks) + len(own)))]
        norms.append(_norm(call, source, ordered.reshape(parts[0], parts[1], -1)))
    x = next(source for source in operands if source.constant is None)
    return _product(call, (1.0, 1.0), (norms[0], norms[1]), max(x.numel, math.prod(call.output_shape)))


def _labels(call: Call, equation: str) -> tuple[tuple[str, str], str]:
    """The labels of both operands and of the output, an ellipsis spelled out."""
    given, arrow, out = equation.replace(" ", "").partition("->")
    parts = given.split(",")
    if not arrow or len(parts) != 2:
        raise UnsupportedOperationError(f"node '{call.name}': write the einsum {equation!r} as 'a,b->c'")
    spare = [letter for letter in ascii_letters if letter not in equation]
    sizes = [
        len(s.shape) + (s.constant is None) - len(p.replace("...", "")) for s, p in zip(call.inputs, parts, strict=True)
    ]
    widest = max([size for size, part in zip(sizes, parts, strict=True) if "..." in part], default=0)
    dots = "".join(spare[:widest])
    one, two = (p.replace("...", dots[widest - size :]) for p, size in zip(parts, sizes, strict=True))
    return (one, two), out.replace("...", dots)


@rule(torch.maximum, torch.minimum, "maximum", "minimum")
def _extreme(call: Call) -> Local:
    """|max(a, b)|² ≤ a² + b² entry by entry; the cotangent goes to one of both, or half to each."""
    if len(call.inputs) != 2 or any(
        len(t.shape) + (t.constant is None) != len(call.output_shape) + 1 for t in call.inputs
    ):
        raise UnsupportedOperationError(f"node '{call.name}' takes two tensors with the same number of axes")
    gains = tuple(math.sqrt(math.prod(call.output_shape) / t.numel) for t in call.inputs)
    repeats = max(math.prod(call.output_shape) // t.numel for t in call.inputs)
    return Local(gains=gains, orthogonal=True, fan_in=max(repeats, 1))


@rule(torch.square, "square", torch.pow, operator.pow, "pow")
def _square(call: Call) -> Local:
    """x²: slope 2|x| ≤ 2X, and ‖x²‖ ≤ X². Other powers have no bound."""
    named = call.args[1] if len(call.args) > 1 else call.kwargs.get("exponent", 2)
    if isinstance(named, Input) or named != 2:
        raise UnsupportedOperationError(f"node '{call.name}' takes the power {named!r}; there is a bound for squares")
    return Local(gains=(times(2.0, call.x.value),), value_cap=times(call.x.value, call.x.value))
