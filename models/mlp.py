"""A multi-layer perceptron on flattened inputs."""

from __future__ import annotations

import math
from itertools import pairwise

from torch import nn

from .families import Family
from .stages import Stages, count, head


def mlp(layers: Family, *, width: int = 128, depth: int = 2) -> Stages:
    """`depth` hidden layers of `width` neurons, then the head: orthogonal dense layers and sorted pairs.

    Joints: `depth`, one behind every hidden layer.

    Args:
        width: neurons of a hidden layer, even.
        depth: hidden layers.

    Parameters: w (n + (depth − 1) w + C); 118 016 on 1x28x28, 410 880 on 3x32x32, 25 856 on 1x8x8, ten classes.

    >>> model = lipdp.models.build("mlp", input_shape=(1, 8, 8), num_classes=10)
    >>> sum(p.numel() for p in model.parameters())
    25856

    Source: Anil, Lucas & Grosse (2019).
    """
    width, depth = count("width", width, even=True), count("depth", depth)
    sizes = [math.prod(layers.input_shape), *[width] * depth]
    hidden = [
        [layers.linear(m, n, lipschitz=1.0 if i else layers.gain), layers.activation()]
        for i, (m, n) in enumerate(pairwise(sizes))
    ]
    return [[nn.Flatten(), *hidden[0]], *hidden[1:], *head(layers, width)]
