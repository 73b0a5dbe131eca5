"""The README's loop on digits, with the engine alone: what the trainers must release."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import kit
import pytest
import torch
from torch.utils.data import TensorDataset

from lipdp import nn as lnn

EXAMPLES = Path(__file__).parents[2] / "examples"
DELTA = 1e-5
STEPS = 12
QUIET = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore"),  # the trainers warn of themselves, of each other and of what torch deprecates
]


def net(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(
        torch.nn.Flatten(),
        lnn.InputBound(4.0),
        lnn.SpectralLinear(64, 64),
        lnn.GroupSort2(),
        lnn.SpectralLinear(64, 10),
    )


def private(digits, model=None, *, optimizer=torch.optim.SGD, **options):
    model = net() if model is None else model
    settings = {"lr": 0.3, "momentum": 0.9} if optimizer is torch.optim.SGD else {"lr": 0.05}
    defaults = {"expected_batch_size": 300, "steps": STEPS, "noise_multiplier": 2.0, "gate": 0.3}
    dataset = TensorDataset(digits.train_x, digits.train_y)
    return kit.private(model, dataset, optimizer=optimizer(model.parameters(), **settings), **{**defaults, **options})


@cache
def plain(digits, after=lambda model: None, steps=None, **options):
    """The loop of the README, with the same engine: what the trainers must release."""
    engine, model, *made = private(digits, **options)
    kit.train(model, *made, steps=steps, after=lambda: after(model))
    return model.state_dict(), engine.get_epsilon(DELTA)


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
