"""A plain net is told that nothing bounds its weights, and what would; others are not."""

import logging

import pytest
import torch
from kit import private
from torch import nn

from lipdp import nn as lnn
from lipdp.privacy.free_weights import note_free_weights

pytestmark = pytest.mark.usefixtures("one_thread")


def plain():
    return nn.Sequential(lnn.InputBound(1.0), nn.Linear(20, 8), nn.ReLU(), nn.Linear(8, 5))


def bounded():
    return lnn.constrain(plain())


def head():
    return nn.Sequential(lnn.InputBound(1.0), lnn.SpectralLinear(20, 8).requires_grad_(False), nn.Linear(8, 5))


def clipped():
    """Every layer between a clip of its values and a gate of its cotangents."""
    layers = [(nn.Linear(20, 8), lnn.GradientGate(0.5), nn.ReLU()), (lnn.ValueClip(1.0), nn.Linear(8, 5))]
    return nn.Sequential(lnn.InputBound(1.0), *layers[0], *layers[1])


@pytest.mark.parametrize(("net", "told"), [(plain, True), (bounded, False), (head, False), (clipped, False)])
def test_only_weights_that_the_sensitivity_grows_with_are_named(net, told, caplog):
    torch.manual_seed(0)
    model = net()
    before = [p.detach().clone() for p in model.parameters()]
    with caplog.at_level(logging.WARNING, logger=note_free_weights.__module__):
        private(model)
    assert ("lipdp.nn.constrain(model)" in caplog.text) == told
    assert not told or ("'1' (Linear), '3' (Linear)" in caplog.text and caplog.text.count("\n") == 1)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
