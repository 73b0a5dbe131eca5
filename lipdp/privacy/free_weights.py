"""A note before the first step where nothing bounds the weights that the sensitivity depends on."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from lipdp.bounds import BoundGraph
from lipdp.nn.constrained import Constrained
from lipdp.nn.sharded import is_sharded

logger = logging.getLogger(__name__)


def note_free_weights(graph: BoundGraph) -> None:
    """Say which plain layers are free to grow, if the sensitivity grows with them.

    Noise makes weights grow at every step, Δ grows with the weights, and the noise with Δ. A last layer alone, or
    layers between clips and gates, have no such effect: that is tried, with weights twice as long.
    """
    plain = [
        (name, module)
        for name, module in graph.model.named_modules()
        if isinstance(module, (nn.Linear, _ConvNd))
        and not isinstance(module, Constrained)
        and module.weight.requires_grad
    ]
    if not plain or is_sharded(graph.model):
        return
    before = graph.sweep(1.0).parameters
    with _doubled([module.weight for _, module in plain]):
        after = graph.sweep(1.0).parameters
    if not any(bool(after[name] > 1.5 * before[name]) for name in before):
        return
    logger.warning(
        "nothing bounds the weights of %s: the noise of every step makes them longer, and longer weights need more"
        " noise. lipdp.nn.constrain(model) replaces these layers by ones with bounded weights",
        ", ".join(f"'{name or 'the model'}' ({type(module).__name__})" for name, module in plain[:3])
        + (f" and {len(plain) - 3} more" if len(plain) > 3 else ""),
    )


@contextmanager
def _doubled(weights: list[torch.Tensor]) -> Iterator[None]:
    with torch.no_grad():
        for weight in weights:
            weight.mul_(2.0)
    try:
        yield
    finally:
        with torch.no_grad():
            for weight in weights:
                weight.mul_(0.5)
