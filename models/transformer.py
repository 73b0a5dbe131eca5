"""A small vision transformer: attention across patches with bounded scores, dense layers across features."""

from __future__ import annotations

import math

from torch import nn

from lipdp.constraints import check_positive
from lipdp.errors import ParameterError

from .families import Family
from .stages import Stages, count, embedding


def transformer(
    layers: Family,
    *,
    patch: int = 4,
    width: int = 16,
    depth: int = 1,
    heads: int = 2,
    sharpness: float = 0.5,
    attention_weight: float = 0.25,
) -> Stages:
    """Patches become tokens (N, T, w); each block is attention beside a shortcut, then a perceptron on every token.

    Values behind the embedding have norm 1 at most over all tokens, so that a token's share in a head is about
    1/√(T h): the scores' bound b. Attention is a-Lipschitz with a of about 4 (`lipdp.nn.SpectralAttention`), so its
    block is 1 − λ + λ a, and bounds in front of it are that much looser. `gates` at the joints repair that.

    Joints: `depth` + 1, behind the patch embedding and behind every block.

    Args:
        patch: side p of a patch; divides height and width.
        width: features w of a token, even, a multiple of `heads`.
        depth: blocks.
        heads: h.
        sharpness: β, the largest score.
        attention_weight: λ of (1−λ) x + λ A(x), in (0, 1]. (The plain twin adds x + A(x).)

    Parameters: c p² w + 6 w² depth + T w C; 9 632 on 1x28x28, ten classes.

    >>> model = lipdp.models.build("transformer", input_shape=(1, 28, 28), num_classes=10)
    >>> sum(p.numel() for p in model.parameters())
    9632

    Source: Dosovitskiy et al. (2021); Kim, Papamakarios & Mnih (2021) for why dot-product attention is left out.
    """
    patch, width, depth = count("patch", patch), count("width", width, even=True), count("depth", depth)
    heads, sharpness = count("heads", heads), check_positive("sharpness", sharpness)
    if width % heads:
        raise ParameterError(f"transformer: {heads} heads do not divide width={width}")
    first, tokens = embedding(layers, "transformer", patch, width)

    def block() -> list[nn.Module]:
        attention = layers.attention(width, heads, sharpness=sharpness, bound=1 / math.sqrt(tokens * heads))
        perceptron = [layers.linear(width, width), layers.activation(-1), layers.linear(width, width)]
        return [layers.residual(attention, attention_weight), nn.Sequential(*perceptron)]

    blocks = [block() for _ in range(depth)]
    return [first, *blocks, [nn.Flatten(), layers.linear(tokens * width, layers.num_classes)]]
