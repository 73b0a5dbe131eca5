"""A patch MLP-Mixer: dense layers across tokens and across features, in turn."""

from __future__ import annotations

from torch import nn

from .families import Family, Transpose
from .stages import Stages, count, embedding


def mixer(layers: Family, *, patch: int = 4, width: int = 64, depth: int = 2, residual_weight: float = 1.0) -> Stages:
    """Patches become tokens (N, T, w); each block mixes tokens, then features, by perceptrons with one hidden layer.

    A pixel lies in one patch, so nothing overlaps, and square orthogonal matrices and sorting keep every norm: the
    bounds on values and cotangents are nearly reached, where convolutions lose. So there is no shortcut by default,
    which would add what is not in phase. On (N, T, d), ‖∇_W‖ ≤ X G by Cauchy–Schwarz over the tokens.

    Joints: `depth` + 1, behind the patch embedding and behind every block.

    Args:
        patch: side p of a patch; divides height and width.
        width: features w of a token, even; a perceptron's hidden layer is as wide as its input.
        depth: blocks.
        residual_weight: λ of (1−λ) x + λ f(x), in (0, 1]; 1 is no shortcut. (The plain twin adds x + f(x).)

    Parameters: c p² w + depth · (2 T² + 2 w²) + T w C for even T; 58 568 on 1x28x28, 76 800 on 3x32x32, ten classes.

    >>> model = lipdp.models.build("mixer", input_shape=(1, 28, 28), num_classes=10)
    >>> sum(p.numel() for p in model.parameters())
    58568

    Source: Tolstikhin et al. (2021); Béthune et al. (2024), appendix C.
    """
    patch, width, depth = count("patch", patch), count("width", width, even=True), count("depth", depth)
    first, tokens = embedding(layers, "mixer", patch, width)

    def perceptron(size: int) -> list[nn.Module]:
        hidden = size + size % 2
        return [layers.linear(size, hidden), layers.activation(-1), layers.linear(hidden, size)]

    def block() -> list[nn.Module]:
        across_tokens = nn.Sequential(Transpose(), *perceptron(tokens), Transpose())
        across_features = nn.Sequential(*perceptron(width))
        return [layers.residual(across_tokens, residual_weight), layers.residual(across_features, residual_weight)]

    blocks = [block() for _ in range(depth)]
    return [first, *blocks, [nn.Flatten(), layers.linear(tokens * width, layers.num_classes)]]
