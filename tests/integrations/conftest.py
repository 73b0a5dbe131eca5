"""The data, and what the examples must release."""

import sys

import kit
import pytest
import torch
from plain_loop import DELTA, net
from torch.utils.data import TensorDataset

import lipdp


@pytest.fixture(scope="session")
def digits():
    return lipdp.data.load("digits")


@pytest.fixture(autouse=True)
def alone():
    """Accelerate keeps its settings in process-wide objects."""
    yield
    if state := sys.modules.get("accelerate.state"):
        state.AcceleratorState._reset_state(reset_partial_state=True)
        state.GradientState._reset_state()


@pytest.fixture(scope="session")
def twin(digits):
    """A plain loop with the settings of the examples."""
    model, engine = net(), lipdp.PrivacyEngine(seed=0)
    model, optimizer, loader, criterion = engine.make_private_with_epsilon(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9),
        criterion=lipdp.losses.TauCrossEntropy(tau=8.0), gate=0.3,
        dataset=TensorDataset(digits.train_x, digits.train_y),
        expected_batch_size=500, steps=60, target_epsilon=3.0, target_delta=DELTA,
    )  # fmt: skip
    kit.train(model, optimizer, loader, criterion)
    return model.state_dict(), engine.get_epsilon(DELTA)
