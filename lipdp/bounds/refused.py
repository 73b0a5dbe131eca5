"""Layers that people ask for and that have no useful bound, each with its reason."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from lipdp.errors import UnsupportedLayerError, UnsupportedOperationError

_RECURRENT = (
    "is recurrent: its weights act once a time step, so that its constant and its sensitivity grow like s^T with the"
    " number T of steps, s the norm of a step, which is above 1 where gates multiply the state. Use layers that look at"
    " all steps at once: lipdp.nn.SpectralConv1d over time, a dense layer over flattened steps, an average of embeddings"
)
_ATTENTION = (
    "computes dot-product attention, which is Lipschitz on a ball alone, with a constant that grows with the square of"
    " its radius (Kim, Papamakarios & Mnih 2021). Use the mixer (lipdp.models), which mixes positions by dense layers"
)

NO_BOUND: dict[type[nn.Module], str] = {
    nn.RNNBase: _RECURRENT,
    nn.RNNCellBase: _RECURRENT,
    nn.MultiheadAttention: _ATTENTION,
    nn.TransformerEncoderLayer: _ATTENTION,
    nn.TransformerDecoderLayer: _ATTENTION,
    nn.Bilinear: "multiplies two inputs, of which each has the other in its gradient; write x1 @ W @ x2 behind InputBound",
    nn.LocalResponseNorm: "divides by powers of its input; use lipdp.nn.GroupNorm in front of the first trainable layer",
}


def refuse_without_bound(name: str, module: nn.Module) -> None:
    """Refuse a layer of the list above.

    Raises:
        UnsupportedLayerError: it is one.
    """
    reason = next((why for kind, why in NO_BOUND.items() if isinstance(module, kind)), None)
    if reason is not None:
        raise UnsupportedLayerError(f"{name} {reason}")


@contextmanager
def nothing_random(name: str) -> Iterator[None]:
    """A block in which the forward pass of `name` is traced: it may draw no random numbers outside the graph.

    Raises:
        UnsupportedOperationError: the state of Python's, numpy's or torch's generator has changed.
    """
    states = random.getstate(), np.random.get_state(legacy=True), torch.get_rng_state()
    yield
    now = random.getstate(), np.random.get_state(legacy=True), torch.get_rng_state()
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    drawn = now[0] != states[0] or not torch.equal(now[2], states[2])
    if drawn or now[1][2] != states[1][2] or not np.array_equal(now[1][1], states[1][1]):
        raise UnsupportedOperationError(
            f"the forward of {name} draws random numbers where it is traced (stochastic depth, a random crop): the graph"
            " would hold what was drawn once, for every step. Use nn.Dropout on the branch, or draw within the data set"
        )
