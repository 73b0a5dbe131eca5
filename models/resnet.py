"""Convolutions with shortcuts that stay 1-Lipschitz."""

from __future__ import annotations

from torch import nn

from .families import Family
from .stages import Stages, count, image


def resnet(
    layers: Family, *, width: int = 16, depth: int = 3, blocks: int = 1, residual_weight: float = 0.25
) -> Stages:
    """`depth` stages of conv 3x3, sorting, residual blocks, norm pooling 2x2, w, 2w, 4w, … channels; a dense layer.

    A block computes (1 − λ) x + λ f(x) with f two convolutions and a sorting: 1-Lipschitz, with a
    shortcut that carries most of the norm. The sensitivity of a block's weights has the factor λ, so a small λ costs no
    signal to noise. The channels' mean is taken off behind the pooling, as in `cnn`.

    Joints: `depth`, one behind every stage.

    Args:
        width: channels w of the first stage, even.
        depth: stages; the image is halved by each.
        blocks: residual blocks of a stage.
        residual_weight: λ in (0, 1]; 1 is no shortcut. (The plain twin adds x + f(x).)

    Parameters: 125 712 on 1x28x28, 130 480 on 3x32x32, ten classes.

    >>> model = lipdp.models.build("resnet", input_shape=(3, 32, 32), num_classes=10)
    >>> sum(p.numel() for p in model.parameters())
    130480

    Source: He et al. (2016); Béthune et al. (2024), appendix C, for the convex combination.
    """
    width, depth, blocks = count("width", width, even=True), count("depth", depth), count("blocks", blocks)
    channels, height, columns = image("resnet", layers.input_shape, halvings=depth)
    stages: Stages = []
    for stage in range(depth):
        wide = width * 2**stage
        shortcuts = [
            layers.residual(
                nn.Sequential(layers.conv(wide, wide, 3), layers.activation(), layers.conv(wide, wide, 3)),
                residual_weight,
            )
            for _ in range(blocks)
        ]
        first = layers.conv(channels, wide, 3, lipschitz=1.0 if stage else layers.gain)
        stages.append([first, layers.activation(), *shortcuts, *layers.magnitude(2)])
        channels, height, columns = wide, height // 2, columns // 2
    return [*stages, [nn.Flatten(), layers.linear(channels * height * columns, layers.num_classes)]]
