"""What the engine releases has exactly the noise that ε is computed from, at every step, whatever the allocation."""

from __future__ import annotations

import math

import pytest
import torch
from kit import ALLOCATIONS, EMPTY_FIRST, has_std, lipschitz_net, plain_net, private, pure_noise, table, train, weights
from torch.utils.data import TensorDataset

import lipdp
from lipdp import losses
from lipdp.distributed.collectives import Alone
from lipdp.errors import ParameterError
from lipdp.noise.allocation import MinVarianceAllocation
from lipdp.noise.gaussian import GaussianNoise
from lipdp.privacy.gate import QuantileGate

pytestmark = pytest.mark.usefixtures("one_thread", "unjudged")

# --- the noise --------------------------------------------------------------------------------------------------------


@pytest.mark.statistical
@pytest.mark.parametrize("sampling", ["poisson", "fixed_size"])
@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_noise_on_the_weights_is_what_epsilon_was_computed_from(allocation, sampling):
    sigma, factor = 1.7, 2.0 if sampling == "fixed_size" else 1.0
    model = plain_net()
    loss = losses.TauCrossEntropy(8.0)
    bounds = lipdp.sensitivity(model, loss, (100,))
    run = private(
        model, table(features=100, classes=50), lr=1.0, steps=8, noise_multiplier=sigma, allocation=allocation,
        sampling=sampling, criterion=loss,
    )  # fmt: skip
    expected = run[0].noise_stds()
    draws = pure_noise(*run)
    for name, samples in draws.items():
        assert has_std(samples, expected[name])
        if samples.numel() > 5000:  # 1600 values of a bias can't tell 5 % apart at this level
            assert not has_std(samples, 0.95 * expected[name])
            assert not has_std(samples, expected[name] / 0.95)
    # the joint noise multiplier, from noise that was really drawn, is σ whatever the allocation and the relation
    measured = sum((factor * bounds[n]) ** 2 / float(samples.square().mean()) for n, samples in draws.items())
    assert measured**-0.5 == pytest.approx(sigma, rel=0.02)
    assert run[0].plan.relation == ("replace_one" if sampling == "fixed_size" else "add_or_remove_one")


def test_allocations_differ_where_they_should():
    model = plain_net()
    deltas = lipdp.sensitivity(model, losses.TauCrossEntropy(), (100,))
    stds = {a: private(plain_net(), table(features=100, classes=50), allocation=a)[0].noise_stds() for a in ALLOCATIONS}
    assert len(set(stds["global"].values())) == 1
    ratios = {n: s / deltas[n] for n, s in stds["per_layer"].items()}
    assert max(ratios.values()) / min(ratios.values()) < 1.6  # another random model: the same up to its norms
    sizes = {n: p.numel() for n, p in model.named_parameters()}
    energy = {a: sum(sizes[n] * v**2 for n, v in s.items()) for a, s in stds.items()}
    assert energy["min_variance"] < min(energy["global"], energy["per_layer"])


def test_a_custom_allocation_is_rescaled_to_the_joint_noise_multiplier():
    class Careless:
        name = "careless"

        def stds(self, sensitivities, sizes, noise_multiplier):
            return sensitivities * 1e-3  # a thousandth of what it should be

    engine, *_ = private(allocation=Careless(), noise_multiplier=2.0)
    deltas, stds = engine.sensitivity(), engine.noise_stds()
    assert sum((deltas[n] / stds[n]) ** 2 for n in deltas) ** -0.5 == pytest.approx(
        2.0, rel=1e-4
    )  # above, by `batch_slack`
    assert engine.plan.allocation == "careless"
    assert private(allocation=MinVarianceAllocation())[0].plan.allocation == "min_variance"


def test_noise_follows_the_weights_norms():
    engine, model, *_ = private(plain_net(), table(features=100, classes=50))
    small = engine.noise_stds()["1.weight"]
    model[3].weight.data.mul_(3.0)
    assert engine.noise_stds()["1.weight"] == pytest.approx(3 * small, rel=1e-3)


@pytest.mark.parametrize("how", ["method", "class", "scheduler"])
def test_no_step_is_without_noise(how):
    _, model, optimizer, loader, criterion = private(plain_net(), table(features=100, classes=50), lr=1.0)
    if how == "scheduler":
        torch.optim.lr_scheduler.StepLR(optimizer, 1)  # wraps optimizer.step
    x, y = next(iter(loader))
    criterion(model(x), y).backward()
    before = weights(model)
    torch.optim.SGD.step(optimizer) if how == "class" else optimizer.step()
    assert all((p.detach() != before[n]).float().mean() > 0.99 for n, p in model.named_parameters())


def test_an_empty_batch_is_a_step_like_any_other():
    engine, model, optimizer, loader, criterion = private(dataset=table(200), expected_batch_size=1, steps=40)
    empty = 0
    for x, y in loader:
        before = weights(model)
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()
        assert any((p.detach() != before[n]).any() for n, p in model.named_parameters())
        empty += len(x) == 0
    assert 5 < empty < 30
    assert engine.steps_taken == 40


def test_a_step_without_any_backward_on_an_empty_batch():
    engine, model, optimizer, loader, _ = private(dataset=table(200), expected_batch_size=1, steps=1, seed=EMPTY_FIRST)
    x, _ = next(iter(loader))
    assert len(x) == 0
    before = weights(model)
    optimizer.step()
    assert (model[1].weight != before["1.weight"]).any()
    assert engine.steps_taken == 1


# --- the quantile gate ------------------------------------------------------------------------------------------------


def test_quantile_gate_shares_the_joint_noise_multiplier():
    engine, *_ = private(noise_multiplier=2.0, gate=QuantileGate(0.5, count_std=3.0))
    deltas, stds = engine.sensitivity(), engine.noise_stds()
    gradient = sum((deltas[n] / stds[n]) ** 2 for n in deltas)
    assert gradient + 1 / (2 * 3.0) ** 2 == pytest.approx(1 / 2.0**2, rel=1e-4)
    assert engine.sensitivity().loss_constant == 0.5
    with pytest.raises(ParameterError, match="the other releases alone"):
        private(noise_multiplier=2.0, gate=QuantileGate(0.5, count_std=1.0))


@pytest.mark.statistical
@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_the_count_of_the_quantile_gate_has_its_noise(factor):
    rule = QuantileGate(1.0, quantile=0.5, learning_rate=1e-3, count_std=10.0)
    gate, noise = rule.start(), GaussianNoise(seed=0)
    cotangent, draws = torch.full((30, 4), 0.4), []
    for _ in range(1000):
        gate.bound = 1.0
        gate.limit(cotangent, 2.0, None)
        gate.count(cotangent, None)  # norm 0.8: all 30 pass, the centred count is 15
        gate.release(noise, 64, factor, Alone())
        share = rule.quantile - math.log(gate.bound) / rule.learning_rate
        draws.append((share - 0.5) * 64 - 15)
    assert has_std(torch.tensor(draws), factor * 10.0)
    assert not has_std(torch.tensor(draws), factor * 10.0 * 0.85)


@pytest.mark.statistical
@pytest.mark.parametrize("quantile", [0.3, 0.8])
def test_quantile_gate_converges_to_the_quantile(quantile):
    dataset = table(2000)
    model = lipschitz_net()
    rule = QuantileGate(0.05, quantile=quantile, learning_rate=0.3, count_std=10.0)
    engine, model, optimizer, loader, criterion = private(
        model, dataset, lr=0.0, steps=60, expected_batch_size=400, noise_multiplier=4.0, gate=rule
    )
    x, y = dataset.tensors
    logits = model(x).detach().requires_grad_()
    norms = torch.autograd.grad(losses.TauCrossEntropy(8.0)(logits, y).sum(), logits)[0].norm(dim=1)
    train(model, optimizer, loader, criterion)
    passing = float((norms <= engine.state_dict()["gate"]["bound"]).float().mean())
    assert passing == pytest.approx(quantile, abs=0.06)


# --- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.statistical
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_noise_and_resume():
    dataset = TensorDataset(*(t.cuda() for t in table(features=100, classes=50).tensors))
    run = private(plain_net().cuda(), dataset, lr=1.0, steps=4)
    expected = run[0].noise_stds()
    for name, samples in pure_noise(*run).items():
        assert has_std(samples.cpu(), expected[name])
    other = private(plain_net().cuda(), dataset, lr=1.0, steps=4)
    other[0].load_state_dict(run[0].state_dict())
    assert other[0].steps_taken == 4
