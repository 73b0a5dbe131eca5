"""The multi-layer perceptron at the size tables want."""

from __future__ import annotations

from .families import Family
from .mlp import mlp
from .stages import Stages


def tabular(
    layers: Family, input_shape: tuple[int, ...], num_classes: int, gain: float, *, width: int = 64, depth: int = 1
) -> Stages:
    """`mlp` with one hidden layer of 64: a table has few columns, and every weight costs noise.

    Use `num_classes=1` (a single logit, `losses.TauBCEWithLogits`) or 2 for a yes-or-no table. Joints: `depth`.

    Args:
        width: neurons of a hidden layer, even.
        depth: hidden layers.

    Parameters: w (n + (depth − 1) w + C); 704 on 10 columns with a single logit.

    >>> model = lipdp.models.build("tabular", input_shape=(10,), num_classes=1)
    >>> sum(p.numel() for p in model.parameters())
    704
    """
    return mlp(layers, input_shape, num_classes, gain, width=width, depth=depth)
