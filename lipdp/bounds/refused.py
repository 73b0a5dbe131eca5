"""Layers that people ask for and that have no useful bound, each with its reason."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from lipdp.bounds.rules import Call, Local, rule
from lipdp.errors import UnsupportedLayerError, UnsupportedOperationError

_RECURRENT = (
    "is recurrent: its weights act once a time step, so that its constant and its sensitivity grow like s^T with the"
    " number T of steps, s the norm of a step, which is above 1 where gates multiply the state. Use layers that look at"
    " all steps at once: lipdp.nn.SpectralConv1d over time, a dense layer over all steps, an average of embeddings"
)
_ATTENTION = (
    "computes dot-product attention. Its scores grow with the square of its input, so it has no Lipschitz constant; on"
    " a ball, its constant grows with the square of the radius (Kim, Papamakarios & Mnih 2021). Use"
    " lipdp.nn.SpectralAttention, whose scores are bounded, or the mixer (lipdp.models)"
)

NO_BOUND: dict[type[nn.Module], str] = {
    nn.RNNBase: _RECURRENT,
    nn.RNNCellBase: _RECURRENT,
    nn.MultiheadAttention: _ATTENTION,
    nn.TransformerEncoderLayer: _ATTENTION,
    nn.TransformerDecoderLayer: _ATTENTION,
    nn.LocalResponseNorm: "divides by powers of its input; use lipdp.nn.GroupNorm before the first trainable layer",
}


@rule(F.scaled_dot_product_attention)
def _dot_product_attention(call: Call) -> Local:
    raise UnsupportedOperationError(f"node '{call.name}' {_ATTENTION}")


def refuse_without_bound(name: str, module: nn.Module) -> None:
    """Refuse a layer of the list above."""
    reason = next((why for kind, why in NO_BOUND.items() if isinstance(module, kind)), None)
    if reason is not None:
        raise UnsupportedLayerError(f"{name} {reason}")


@contextmanager
def nothing_random(name: str) -> Iterator[None]:
    """A block in which the forward pass of `name` is traced: it may draw no random numbers outside the graph."""
    before = _states()
    yield
    after = _states()
    random.setstate(before[0])
    np.random.set_state(before[1])  # noqa: NPY002  (the generator that scripts draw from)
    torch.set_rng_state(before[2])
    numbers = [[*state[1][1].tolist(), state[1][2]] for state in (before, after)]
    if before[0] != after[0] or numbers[0] != numbers[1] or not torch.equal(before[2], after[2]):
        raise UnsupportedOperationError(
            f"the forward of {name} draws random numbers while it is traced (stochastic depth, a random crop), and"
            " every step would repeat the numbers drawn then. Use nn.Dropout on the branch, or draw within the data set"
        )


def _states() -> tuple[Any, Any, torch.Tensor]:
    return random.getstate(), np.random.get_state(legacy=True), torch.get_rng_state()  # noqa: NPY002
