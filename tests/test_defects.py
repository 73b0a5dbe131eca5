"""Every planted defect is found, and this file says by what: an audit, `lipdp.testing`, or a refusal while training."""

from __future__ import annotations

import dataclasses

import kit
import pytest
import torch
from defects import DEFECTS, CoupledLoss, planted
from kit import train
from torch.utils.data import DataLoader, TensorDataset

import lipdp
from lipdp import audit, losses
from lipdp import nn as lnn
from lipdp.batches.samplers import PoissonSampler
from lipdp.bounds import BoundGraph
from lipdp.bounds import convolution as rules
from lipdp.errors import BoundViolation, EngineError, LossError
from lipdp.noise.gaussian import GaussianNoise
from lipdp.privacy.hooks import StepHooks

pytestmark = pytest.mark.usefixtures("one_thread")

WRONG_BOUNDS = ("halved sensitivity", "convolution over k", "bias without positions")


def convolution():
    return lnn.SpectralConv2d(1, 2, 3, padding=1, bias=True)


def private(experiment, **options):
    """An ordinary run, all guards on, in which every record is the worst case."""
    dataset = TensorDataset(*(t.expand(8, *t.shape[1:]).clone() for t in experiment.canaries))
    defaults = {"criterion": experiment.loss, "expected_batch_size": 8, "lr": 0.1, "steps": 1}
    return kit.private(experiment.fresh_model(), dataset, **{**defaults, **options})


def mixed_experiment():
    """Records of one kind, which count nothing in `CoupledLoss` unless the canary, of another kind, is there."""
    base = audit.worst_case(records=64)
    x, y = base.canaries
    other = y.clone()
    other[:, 0] *= -1
    records = x.expand(64, -1, -1, -1).clone(), other.expand(64, -1).clone()
    return dataclasses.replace(base, loss=CoupledLoss(y.shape[1]), others=records)


# --- planting ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DEFECTS)
def test_a_defect_is_gone_afterwards_whatever_happens(name):
    def originals():
        return (
            BoundGraph.sweep,
            rules._convolution,
            GaussianNoise.add_,
            StepHooks._add_noise,
            PoissonSampler.__iter__,
            "__iter__" in vars(PoissonSampler),
        )

    def use():
        with planted(name):
            assert originals() != before
            raise ZeroDivisionError

    before = originals()
    with pytest.raises(ZeroDivisionError):
        use()
    assert originals() == before


def test_without_a_defect_nothing_is_found():
    train(*private(audit.worst_case())[1:])
    lipdp.testing.falsify_layer(convolution(), (1, 6, 6), steps=5, weights=("given",))
    lipdp.testing.falsify_loss(losses.MeanAbsoluteError(3), 3, targets=torch.tensor([[5.0, 5, 5], [-5, 5, 5]]))


# --- wrong sensitivities: falsify, the guard of the first step, the audit ---------------------------------------------


@pytest.mark.parametrize("name", WRONG_BOUNDS)
def test_falsify_finds_a_wrong_sensitivity(name):
    with planted(name), pytest.raises(BoundViolation, match="times its bound"):
        lipdp.testing.falsify_layer(convolution(), (1, 6, 6), steps=5, weights=("given",))


@pytest.mark.parametrize("name", WRONG_BOUNDS)
def test_the_guard_of_the_first_step_refuses_a_wrong_sensitivity(name):
    with planted(name), pytest.raises(BoundViolation, match="longer than the bound"):
        train(*private(audit.worst_case())[1:])


@pytest.mark.statistical
def test_one_run_refutes_half_the_sensitivity():
    with planted("halved sensitivity"):
        result = audit.one_run(audit.gradient_canaries(32_768), epsilon=1.0, seed=1)
    assert result.violated
    assert result.lower_bound < 3.0  # twice the shift is about ε = 2.3


@pytest.mark.slow
@pytest.mark.statistical
@pytest.mark.parametrize("name", WRONG_BOUNDS)
def test_many_runs_refute_a_wrong_sensitivity(name):
    with planted(name):
        assert audit.many_runs(epsilon=1.0, runs=12_000 if name.startswith("halved") else 3000, seed=1).violated


# --- wrong noise, wrong divisor: only the audit sees the release ------------------------------------------------------


@pytest.mark.statistical
@pytest.mark.parametrize("epsilon", [1.0, 4.0])
def test_one_run_refutes_noise_drawn_per_microbatch(epsilon):
    with planted("noise per microbatch"):
        assert audit.one_run(audit.gradient_canaries(32_768), epsilon=epsilon, seed=1).violated


@pytest.mark.statistical
def test_many_runs_refute_division_by_the_realised_batch_size():
    with planted("realised batch size"):
        result = audit.many_runs(epsilon=1.0, runs=100, seed=1)
    assert result.violated
    assert result.score == "energy"


# --- shuffled batches accounted as Poisson ----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.statistical
def test_many_runs_against_opposed_records_refute_shuffled_batches():
    """Batches of a fixed size: the canary takes the place of one of opposite gradient, which moves the sum by 2Δ."""
    with planted("shuffled batches"):
        experiment = audit.worst_case(sampling_rate=0.25, records=16, opposed=True)
        assert audit.many_runs(experiment, epsilon=2.0, runs=30_000, seed=1).violated


@pytest.mark.statistical
def test_the_law_of_batch_sizes_tells_shuffled_batches_at_once():
    """Binomial(400, ¼) has variance 75; the mean of 200 squared deviations leaves 75 ± 40 with probability < 1e-6."""

    def variance():
        sizes = torch.tensor([len(b) for b in PoissonSampler(400, sampling_rate=0.25, steps=200, seed=0)]).double()
        return float((sizes - 100).square().mean())

    assert abs(variance() - 75) < 40
    with planted("shuffled batches"):
        assert variance() == 0


def test_a_shuffled_loader_of_the_users_own_is_refused():
    _, model, optimizer, loader, criterion = private(audit.worst_case(), expected_batch_size=4, steps=2)
    for x, y in DataLoader(TensorDataset(*loader.dataset.tensors), batch_size=4, shuffle=True):
        criterion(model(x), y).backward()
        with pytest.raises(EngineError, match="without a new batch"):
            optimizer.step()


# --- a loss that couples samples --------------------------------------------------------------------------------------


def test_falsify_loss_finds_that_samples_are_coupled():
    targets = torch.tensor([[5.0, 5, 5], [-5, 5, 5]])
    report = lipdp.testing.falsify_loss(CoupledLoss(3), 3, targets=targets, raise_on_violation=False)
    assert [f.quantity for f in report.violations] == ["influence of one sample on another"]


def test_make_private_refuses_a_coupled_loss_when_the_first_records_show_it():
    experiment = mixed_experiment()
    x, y = (torch.cat([c, o[:3]]) for c, o in zip(experiment.canaries, experiment.others, strict=True))
    with pytest.raises(LossError, match="couples the samples"):
        kit.private(experiment.fresh_model(), TensorDataset(x, y), criterion=CoupledLoss(25), expected_batch_size=4)


def test_make_private_refuses_a_coupled_loss_also_where_the_first_records_are_of_one_kind():
    """Targets of another kind are put beside theirs; the audit of such a loss ends before it begins."""
    with pytest.raises(LossError, match="couples the samples"):
        audit.many_runs(mixed_experiment(), epsilon=1.0, runs=200, seed=1)


@pytest.mark.statistical
def test_many_runs_refute_a_coupled_loss_that_nothing_looked_at(monkeypatch):
    """Without that look, the audit sees it."""
    monkeypatch.setattr("lipdp.privacy.attach.check_loss", lambda *given: None)
    assert audit.many_runs(mixed_experiment(), epsilon=1.0, runs=100, seed=1).violated
