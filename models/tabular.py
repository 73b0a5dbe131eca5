"""Random Fourier features of a table's columns and one dense layer."""

from __future__ import annotations

import torch
from torch import nn

from lipdp.errors import ParameterError
from lipdp.nn.table import TableFeatures, unit_norm


def tabular(input_shape: tuple[int, ...], num_classes: int, *, waves: int = 200) -> nn.Sequential:
    """Features of norm 1 and one dense layer without a bias, from W = 0: the tightest private model of a table.

    The features bound themselves, so no `InputBound` stands in front: `TableFeatures`, then a projection to norm 1,
    then ‖∇_W ℓ‖ = ‖φ‖ ‖∂ℓ/∂z‖ ≤ G for a gate at G. Columns are clipped to ±6 and taken as they are until the features'
    map is set: by `lipdp train`, or by `TableFeatures.set_`. Use `num_classes=1` for a yes-or-no table.

    Args:
        waves: frequencies, an even number.

    Parameters: (1 + n + 2 waves) C; 411 on 10 columns with a single logit.

    >>> model = lipdp.models.build("tabular", input_shape=(10,), num_classes=1)
    >>> sum(p.numel() for p in model.parameters())
    411

    Source: Rahimi & Recht (2007).
    """
    if len(input_shape) != 1:
        raise ParameterError(f"tabular takes tables, input_shape=(columns,), got {input_shape}; for images use 'cnn'")
    features = TableFeatures(input_shape[0], waves=waves)
    dense = nn.Linear(features.out_features, num_classes, bias=False)
    with torch.no_grad():
        dense.weight.zero_()
    return nn.Sequential(features, unit_norm(), dense)
