"""Blocks of two 3x3 convolutions and a pooling."""

from __future__ import annotations

from torch import nn

from .families import Family
from .stages import Stages, count, head, image


def vgg(layers: Family, *, width: int = 32, depth: int = 3, hidden: int | None = None) -> Stages:
    """`depth` blocks of conv 3x3, sorting, conv 3x3, norm pooling 2x2, with w, 2w, 4w, … channels; then a dense layer.

    As in `cnn`, the channels' mean is taken off what the norm pooling leaves: it is large, the same for all classes,
    and would use up the bounds.

    Joints: `depth`, one behind every block, and one behind the hidden dense layer if there is one.

    Args:
        width: channels w of the first block, even.
        depth: blocks; the image is halved by each.
        hidden: neurons of a hidden dense layer, even, or None.

    Parameters: 297 504 on 1x28x28, 307 040 on 3x32x32, ten classes.

    >>> model = lipdp.models.build("vgg", input_shape=(3, 32, 32), num_classes=10)
    >>> sum(p.numel() for p in model.parameters())
    307040

    Source: Simonyan & Zisserman (2015).
    """
    width, depth = count("width", width, even=True), count("depth", depth)
    channels, height, columns = image("vgg", layers.input_shape, halvings=depth)
    stages: Stages = []
    for block in range(depth):
        wide = width * 2**block
        stages.append(
            [
                *(layers.conv(channels, wide, 3, lipschitz=1.0 if block else layers.gain), layers.activation()),
                *(layers.conv(wide, wide, 3), *layers.magnitude(2)),
            ]
        )
        channels, height, columns = wide, height // 2, columns // 2
    stages[-1].append(nn.Flatten())
    return [*stages, *head(layers, channels * height * columns, hidden=hidden)]
