"""Blocks of two 3x3 convolutions and a pooling."""

from __future__ import annotations

from torch import nn

from .families import Family
from .stages import Stages, count, image


def vgg(
    layers: Family,
    input_shape: tuple[int, ...],
    num_classes: int,
    gain: float,
    *,
    width: int = 32,
    depth: int = 3,
    hidden: int = 128,
) -> Stages:
    r"""`depth` blocks of two 3x3 convolutions and 2x2 pooling, channels w, 2w, 4w, …; then two dense layers.

    Joints: `depth` + 1, behind every block and behind the hidden dense layer.

    Args:
        width: channels w of the first block, even.
        depth: blocks; the image is halved by each.
        hidden: neurons of the hidden dense layer, even.

    Parameters: 434 720 on 1x28x28, 549 984 on 3x32x32, ten classes.

    >>> model = lipdp.models.build("vgg", input_shape=(3, 32, 32), num_classes=10)
    >>> sum(p.numel() for p in model.parameters())
    549984

    Source: Simonyan & Zisserman (2015).
    """
    width, depth, hidden = count("width", width, even=True), count("depth", depth), count("hidden", hidden, even=True)
    channels, height, columns = image("vgg", input_shape, halvings=depth)
    stages: Stages = []
    for block in range(depth):
        wide = width * 2**block
        stages.append(
            [
                *(layers.conv(channels, wide, 3, lipschitz=1.0 if block else gain), layers.activation()),
                *(layers.conv(wide, wide, 3), layers.activation()),
                layers.pool(2),
            ]
        )
        channels, height, columns = wide, height // 2, columns // 2
    dense = layers.linear(channels * height * columns, hidden)
    return [*stages, [nn.Flatten(), dense, layers.activation()], [layers.linear(hidden, num_classes)]]
