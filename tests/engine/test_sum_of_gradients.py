"""The sum that a step releases: over the public batch size, moved by one record by at most Δ, in any precision."""

from __future__ import annotations

import math

import pytest
import torch
from kit import EMPTY_FIRST, lipschitz_net, plain_net, private, table, train, weights
from torch import nn
from torch.utils.data import TensorDataset

import lipdp
from lipdp import losses
from lipdp import nn as lnn
from lipdp.errors import EngineError, ParameterError
from lipdp.privacy.gate import QuantileGate
from lipdp.suggestion.joints import Joint

pytestmark = pytest.mark.usefixtures("one_thread")

# --- the sum ----------------------------------------------------------------------------------------------------------


def test_without_noise_the_step_is_the_sum_over_the_public_batch_size():
    dataset = table(dtype=torch.float64)
    model = lipschitz_net(dtype=torch.float64)
    twin = lipschitz_net(dtype=torch.float64)
    twin.load_state_dict(model.state_dict())
    _, _, optimizer, loader, criterion = private(model, dataset, noise_multiplier=1e-9, lr=1.0)
    x, y = next(iter(loader))
    assert len(x) != 64  # the realised batch size is not the divisor
    criterion(model(x), y).backward()
    optimizer.step()
    (losses.TauCrossEntropy(8.0)(twin(x), y).sum() / 64).backward()
    with torch.no_grad():
        for p in twin.parameters():
            p -= p.grad
        lnn.project_(twin)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=0, atol=1e-8)


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_microbatches_release_what_the_whole_batch_does(size):
    results = []
    for pieces in (None, size):
        torch.manual_seed(0)
        model = lipschitz_net(dtype=torch.float64)
        engine, _, optimizer, loader, criterion = private(
            model, table(dtype=torch.float64), steps=3, gate=QuantileGate(0.5, count_std=4.0)
        )
        for x, y in loader:
            optimizer.zero_grad()
            for xb, yb in engine.microbatches(x, y, pieces or len(x)):
                criterion(model(xb), yb).backward()
            optimizer.step()
        results.append((weights(model), engine.state_dict()))
    (whole, state), (parts, other) = results
    assert all(torch.allclose(whole[n], parts[n], rtol=0, atol=1e-12) for n in whole)
    assert state["noise"] == other["noise"]  # as many draws
    assert state["ledger"] == other["ledger"]
    assert state["gate"]["bound"] == pytest.approx(other["gate"]["bound"], rel=1e-12)


def test_microbatches_of_an_empty_batch_and_of_no_size():
    engine, model, optimizer, loader, criterion = private(
        dataset=table(200), expected_batch_size=1, steps=1, seed=EMPTY_FIRST
    )
    x, y = next(iter(loader))
    assert [len(xb) for xb, _ in engine.microbatches(x, y, 8)] == [0]
    for xb, yb in engine.microbatches(x, y, 8):
        criterion(model(xb), yb).backward()
    optimizer.step()
    with pytest.raises(ParameterError, match="size=0"):
        list(engine.microbatches(x, y, 0))


def neighbours(engine, model, criterion, x, y):
    """Largest ratio, over parameters and records, of what one record moves the summed gradient by to the declared Δ."""
    bounds, parameters = engine.sensitivity(), dict(model.named_parameters())
    worst = 0.0
    for i in range(len(x)):
        grads = torch.autograd.grad(criterion(model(x[i : i + 1]), y[i : i + 1]), list(parameters.values()))
        worst = max(worst, *(float(g.norm()) / bounds[n] for n, g in zip(parameters, grads, strict=True)))
    return worst


@pytest.mark.parametrize("gate", [None, 0.2])
def test_one_record_moves_the_sum_by_at_most_delta_along_a_run(gate):
    dataset = table(dtype=torch.float64)
    engine, model, optimizer, loader, criterion = private(
        lipschitz_net(dtype=torch.float64), dataset, steps=20, lr=2.0, gate=gate
    )
    x, y = dataset.tensors
    assert 0.3 < neighbours(engine, model, criterion, x[:40], y[:40]) <= 1.0
    train(model, optimizer, loader, criterion)
    assert 0.3 < neighbours(engine, model, criterion, x[:40], y[:40]) <= 1.0


class Understated(losses.TauCrossEntropy):
    """Claims the constant √2 and has a thousand times that."""

    def forward(self, logits, target):
        return 1000.0 * super().forward(logits, target)


@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_the_gate_holds_whatever_the_loss_says_or_the_caller_multiplies(scale):
    dataset = table(dtype=torch.float64)
    engine, model, _, _, criterion = private(lipschitz_net(dtype=torch.float64), dataset, criterion=Understated(8.0))
    x, y = dataset.tensors
    assert 0.9 < neighbours(engine, model, lambda z, t: scale * criterion(z, t), x[:20], y[:20]) <= 1.0 + 1e-9
    raw = losses.TauCrossEntropy()
    assert neighbours(engine, model, lambda z, t: 1000.0 * raw(z, t).sum(), x[:20], y[:20]) > 100  # the attack is real


def test_squared_error_is_gated_at_its_constant_for_the_current_weights():
    dataset = TensorDataset(torch.randn(64, 6, dtype=torch.float64), 50 * torch.randn(64, 2, dtype=torch.float64))
    model = nn.Sequential(lnn.InputBound(1.0), nn.Linear(6, 2, bias=False, dtype=torch.float64))
    loss = losses.MeanSquaredError(target_bound=1.0, num_outputs=2)
    engine, model, optimizer, loader, criterion = private(model, dataset, criterion=loss, expected_batch_size=16)
    x, y = dataset.tensors
    assert neighbours(engine, model, criterion, x, y) <= 1.0
    train(model, optimizer, loader, criterion)
    assert neighbours(engine, model, criterion, x, y) <= 1.0


def test_weight_sharing_adds_sensitivities():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.bound = lnn.InputBound(1.0)
            self.inner = lnn.SpectralLinear(6, 6, dtype=torch.float64)

        def forward(self, x):
            return self.inner(torch.relu(self.inner(self.bound(x))))

    dataset = TensorDataset(torch.randn(64, 6, dtype=torch.float64), torch.randint(6, (64,)))
    engine, model, optimizer, loader, criterion = private(Twice(), dataset, expected_batch_size=16)
    assert list(engine.noise_stds()) == ["inner.weight"]
    assert engine.sensitivity()["inner.weight"] == pytest.approx(2 * math.sqrt(2), rel=1e-4)
    x, y = dataset.tensors
    assert 0.2 < neighbours(engine, model, criterion, x, y) <= 1.0
    train(model, optimizer, loader, criterion)
    assert engine.steps_taken == 5


# --- frozen parameters ------------------------------------------------------------------------------------------------


def test_frozen_parameters_stay_and_cost_nothing():
    model = lipschitz_net()
    model[1].weight.requires_grad_(False)
    engine, model, optimizer, loader, criterion = private(model, momentum=0.9)  # the optimiser holds it all the same
    assert list(engine.sensitivity()) == list(engine.noise_stds()) == ["3.weight"]
    before = model[1].weight.clone()
    train(model, optimizer, loader, criterion)
    assert torch.equal(model[1].weight, before)


def test_unfreezing_brings_noise_and_freezing_takes_a_raw_gradient_away():
    model = plain_net()
    model[1].requires_grad_(False)
    engine, _, optimizer, loader, criterion = private(model, table(features=100, classes=50), lr=1.0, steps=3)
    batches = iter(loader)

    def step(thaw: bool, *, late: bool = False):
        if not late:
            model[1].requires_grad_(thaw)
        before = weights(model)
        x, y = next(batches)
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        if late:  # frozen between backward and step, with its raw gradient still there
            model[1].weight.grad.fill_(1.0)
            model[1].requires_grad_(thaw)
        optimizer.step()
        return (model[1].weight - before["1.weight"]).abs().mean()

    assert step(False) == 0
    assert step(True) > 0
    assert list(engine.noise_stds()) == ["1.weight", "1.bias", "3.weight"]
    assert step(False, late=True) == 0


def test_a_parameter_the_trace_did_not_see_is_caught():
    class Deceptive(nn.Module):
        def __init__(self):
            super().__init__()
            self.bound = lnn.InputBound(1.0)
            self.a = nn.Linear(20, 5, bias=False)
            self.b = nn.Linear(20, 5, bias=False)

        def forward(self, x):
            x = self.bound(x)
            return self.a(x) + self.b(x) if late else self.a(x)

    late, model = False, Deceptive()
    _, _, optimizer, loader, criterion = private(model)
    late = True  # no attribute of the model, so that only the gradient shows it
    with pytest.raises(EngineError, match="is not the one that make_private traced"):
        train(model, optimizer, loader, criterion)


# --- lower precision --------------------------------------------------------------------------------------------------


def test_autocast_needs_its_dtype_in_the_bound():
    _, model, _, loader, criterion = private()
    x, y = next(iter(loader))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(x)
        with pytest.raises(EngineError, match=r"forward_dtype=torch\.bfloat16"):
            criterion(logits.float(), y)  # the logits look like float32, the layers were not
    for cast in (logits, logits.float()):  # outside of autocast, and as trainers cast it back for the loss
        with pytest.raises(EngineError, match=r"forward_dtype=torch\.bfloat16"):
            criterion(cast, y)
    assert criterion(logits.detach().float(), y) > 0  # a metric needs no bound


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_float16_is_refused_with_the_reason(dtype):
    _, model, _, loader, criterion = private(forward_dtype=dtype)
    x, y = next(iter(loader))
    with torch.autocast("cpu", dtype=torch.float16):
        logits = model(x)
    with pytest.raises(EngineError, match="16-mixed"):
        criterion(logits.float(), y)


def test_autocast_within_the_bound():
    engine, model, optimizer, loader, criterion = private(forward_dtype=torch.bfloat16, steps=3)
    assert engine.sensitivity()["1.weight"] > lipdp.sensitivity(model, losses.TauCrossEntropy(), (20,))["1.weight"]

    def forward(x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(x)

    x, y = table().tensors
    bounds = engine.sensitivity()
    for i in range(30):
        grads = torch.autograd.grad(1000 * criterion(forward(x[i : i + 1]), y[i : i + 1]), list(model.parameters()))
        assert all(g.norm() <= bounds[n] for n, g in zip(bounds, grads, strict=True))
    for xb, yb in loader:
        optimizer.zero_grad()
        criterion(forward(xb), yb).backward()
        optimizer.step()
    assert engine.steps_taken == 3


@pytest.mark.parametrize("cap", [0.01, 0.5])
def test_the_look_at_records_goes_through_gates_at_the_cotangent_of_the_run(cap):
    """A gate at a weight is not linear: what it lets through of a cotangent of norm 1, times √2, exceeds its bound."""
    torch.manual_seed(0)
    model = nn.Sequential(lnn.InputBound(5.0), lnn.SpectralLinear(20, 8), lnn.SpectralLinear(8, 5))
    joints = tuple(Joint(name, weight=cap) for name in "12")
    engine, model, optimizer, loader, criterion = private(model, joints=joints, check_every=1)
    train(model, optimizer, loader, criterion)
    assert engine.sensitivity()["1.weight"] == pytest.approx(cap, rel=1e-3)
