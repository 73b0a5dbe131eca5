"""The engine: what it releases has exactly the noise that ε is computed from, and every way around it is refused."""

from __future__ import annotations

import io
import math

import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import lipdp
from lipdp import losses
from lipdp import nn as lnn
from lipdp.distributed.collectives import Alone
from lipdp.errors import (
    BudgetSpentWarning,
    CheckpointError,
    EngineError,
    LossError,
    NonFiniteError,
    OptimizerError,
    ParameterError,
    ResumeError,
    UnboundedError,
    UnknownNameError,
)
from lipdp.noise.allocation import MinVarianceAllocation
from lipdp.noise.gaussian import GaussianNoise
from lipdp.privacy.gate import QuantileGate

FALSE_ALARM = 1e-6  # of each statistical test; the seeds are fixed, so a pass stays a pass
EMPTY_FIRST = 0  # a seed whose first batch, of 1 in 200 records on average, is empty
ALLOCATIONS = ("per_layer", "global", "min_variance")


def table(n=256, features=20, classes=5, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, features, generator=generator, dtype=dtype)
    return TensorDataset(x, torch.randint(classes, (n,), generator=generator))


def lipschitz_net(features=20, hidden=32, classes=5, dtype=torch.float32):
    return nn.Sequential(
        lnn.InputBound(1.0),
        lnn.SpectralLinear(features, hidden, dtype=dtype),
        lnn.GroupSort2(),
        lnn.SpectralLinear(hidden, classes, dtype=dtype),
    )


def plain_net(features=100, hidden=200, classes=50):
    """Without constraints nothing is projected, so a step moves the weights by the noisy gradient and nothing else."""
    return nn.Sequential(
        lnn.InputBound(1.0), nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, classes, bias=False)
    )


def private(model=None, dataset=None, *, optimizer=None, lr=0.5, momentum=0.0, accountant="rdp", seed=0, **options):
    model = model if model is not None else lipschitz_net()
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)
    defaults = {
        "expected_batch_size": 64,
        "steps": 5,
        "noise_multiplier": 1.0,
        "criterion": losses.TauCrossEntropy(8.0),
    }
    engine = lipdp.PrivacyEngine(accountant, seed=seed)
    made = engine.make_private(
        module=model,
        optimizer=optimizer,
        dataset=dataset if dataset is not None else table(),
        **{**defaults, **options},
    )
    return engine, *made


def train(model, optimizer, loader, criterion, steps=None, scheduler=None):
    for done, (x, y) in enumerate(loader, start=1):
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        if done == steps:
            return


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def has_std(samples: Tensor, std: float) -> bool:
    """Two-sided χ² test of a centred Gaussian's standard deviation."""
    total = float((samples.double() / std).square().sum())
    tail = min(stats.chi2.cdf(total, samples.numel()), stats.chi2.sf(total, samples.numel()))
    return tail > FALSE_ALARM / 2


def pure_noise(engine, model, optimizer, loader, criterion) -> dict[str, Tensor]:
    """Per parameter the noise of every step on the *sum*, with lr = 1 and a gradient of exactly zero."""
    draws: dict[str, list[Tensor]] = {name: [] for name, _ in model.named_parameters()}
    for x, y in loader:
        before = weights(model)
        optimizer.zero_grad()
        (criterion(model(x), y) * 0.0).backward()
        optimizer.step()
        for name, p in model.named_parameters():
            draws[name].append((before[name].double() - p.detach().double()) * engine.facts.expected_batch_size)
            p.data.copy_(before[name])  # the same weights, hence the same bounds, at every step
    return {name: torch.stack(d) for name, d in draws.items()}


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
    assert run[0].facts.relation == ("replace_one" if sampling == "fixed_size" else "add_or_remove_one")


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
    assert sum((deltas[n] / stds[n]) ** 2 for n in deltas) ** -0.5 == pytest.approx(2.0, rel=1e-9)
    assert engine.facts.allocation == "careless"
    assert private(allocation=MinVarianceAllocation())[0].facts.allocation == "min_variance"


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
    (criterion(model(x), y) * 0.0).backward()
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
    engine, model, _, _, criterion = private(
        lipschitz_net(dtype=torch.float64),
        dataset,
        criterion=Understated(8.0) if scale == 1.0 else losses.TauCrossEntropy(),
    )
    x, y = dataset.tensors
    assert 0.9 < neighbours(engine, model, lambda z, t: scale * criterion(z, t), x[:20], y[:20]) <= 1.0 + 1e-9
    raw = losses.TauCrossEntropy()
    assert neighbours(engine, model, lambda z, t: 1000.0 * raw(z, t).sum(), x[:20], y[:20]) > 100  # the attack is real


def test_a_gradient_penalty_cannot_slip_past_the_gate():
    _, model, _, loader, criterion = private()
    x, y = next(iter(loader))
    gradient = torch.autograd.grad(criterion(model(x), y), model[1].weight, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()


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
        (criterion(model(x), y) * 0.0).backward()
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
    with pytest.raises(EngineError, match=r"step 1: b\.weight has a gradient"):
        train(model, optimizer, loader, criterion)


# --- the quantile gate ------------------------------------------------------------------------------------------------


def test_quantile_gate_shares_the_joint_noise_multiplier():
    engine, *_ = private(noise_multiplier=2.0, gate=QuantileGate(0.5, count_std=3.0))
    deltas, stds = engine.sensitivity(), engine.noise_stds()
    gradient = sum((deltas[n] / stds[n]) ** 2 for n in deltas)
    assert gradient + 1 / (2 * 3.0) ** 2 == pytest.approx(1 / 2.0**2, rel=1e-9)
    assert engine.sensitivity().loss_constant == 0.5
    with pytest.raises(ParameterError, match="the other releases alone"):
        private(noise_multiplier=2.0, gate=QuantileGate(0.5, count_std=1.0))


@pytest.mark.statistical
@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_the_count_of_the_quantile_gate_has_its_noise(factor):
    rule = QuantileGate(1.0, quantile=0.5, learning_rate=1e-3, count_std=10.0)
    gate, noise = rule.start(), GaussianNoise(seed=0)
    logits, draws = torch.zeros(30, 4, requires_grad=True), []
    for _ in range(1000):
        gate.bound = 1.0
        (gate.apply(logits, 2.0, batch=1) * 0.4).sum().backward()  # norm 0.8: all 30 pass, the centred count is 15
        gate.release(noise, 64, factor, Alone())
        share = rule.quantile - math.log(gate.bound) / rule.learning_rate
        draws.append((share - 0.5) * 64 - 15)
    assert has_std(torch.tensor(draws), factor * 10.0)
    assert not has_std(torch.tensor(draws), factor * 10.0 * 0.85)
    assert gate.samples.total() == 0


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


# --- state ------------------------------------------------------------------------------------------------------------

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.5),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
}


def scheduled(kind, steps=6, **options):
    torch.manual_seed(3)
    model = lipschitz_net()
    made = private(model, optimizer=OPTIMIZERS[kind](model.parameters()), steps=steps, **options)
    return *made, torch.optim.lr_scheduler.CosineAnnealingLR(made[2], steps)


@pytest.mark.parametrize("sampling", ["poisson", "fixed_size"])
@pytest.mark.parametrize("seed", [0, None])
@pytest.mark.parametrize("kind", list(OPTIMIZERS))
def test_a_resumed_run_ends_bit_identical(kind, seed, sampling):
    options = {"seed": seed, "sampling": sampling, "gate": QuantileGate(0.5, count_std=4.0)}
    engine, model, optimizer, loader, criterion, scheduler = scheduled(kind, **options)
    train(model, optimizer, loader, criterion, steps=2, scheduler=scheduler)
    file = io.BytesIO()
    parts = {"model": model, "optimizer": optimizer, "engine": engine, "scheduler": scheduler}
    torch.save({name: part.state_dict() for name, part in parts.items()}, file)
    train(model, optimizer, loader, criterion, scheduler=scheduler)

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again, model2, optimizer2, loader2, criterion2, scheduler2 = scheduled(kind, **options)
    for name, part in {"model": model2, "optimizer": optimizer2, "engine": again, "scheduler": scheduler2}.items():
        part.load_state_dict(saved[name])
    assert again.steps_taken == loader2.position == 2
    train(model2, optimizer2, loader2, criterion2, scheduler=scheduler2)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), model2.parameters(), strict=True))
    assert engine.state_dict() == again.state_dict()
    assert engine.get_epsilon(1e-5) == again.get_epsilon(1e-5)
    assert again.steps_taken == 6


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"noise_multiplier": 0.9}, "noise_multiplier was 1.0, is now 0.9"),
        ({"expected_batch_size": 32}, "expected_batch_size was 64"),
        ({"steps": 50}, "steps was 5"),
        ({"sampling": "fixed_size"}, "relation was 'add_or_remove_one'"),
        ({"dataset_size": 1000}, "dataset_size was 256"),
        ({"allocation": "global"}, "allocation was 'per_layer'"),
        ({"gate": 0.3}, "gate was"),
        ({"accountant": "pld"}, "accountant was 'rdp'"),
        ({"seed": None}, "seeded was True, is now False"),
        ({"target_epsilon": 1.0, "target_delta": 1e-5}, "target_epsilon was None"),
    ],
)
def test_a_resume_under_other_facts_is_refused(changed, named):
    engine, model, optimizer, loader, criterion = private()
    train(model, optimizer, loader, criterion, steps=2)
    other, *_ = private(**changed)
    with pytest.raises(ResumeError, match=named):
        other.load_state_dict(engine.state_dict())
    assert other.steps_taken == 0


def test_what_is_not_a_state_is_refused():
    engine, *_ = private()
    with pytest.raises(CheckpointError, match="noise"):
        engine.load_state_dict({"facts": {}, "ledger": {}})
    with pytest.raises(EngineError, match="make_private"):
        lipdp.PrivacyEngine().state_dict()


def test_model_and_optimiser_are_the_users_own_and_plain():
    model = lipschitz_net()
    optimizer = torch.optim.Adam(model.parameters())
    keys = list(model.state_dict())
    engine, same_model, same_optimizer, loader, criterion = private(model, optimizer=optimizer)
    assert same_model is model
    assert same_optimizer is optimizer
    assert list(model.state_dict()) == keys
    assert not model._forward_hooks
    train(model, optimizer, loader, criterion)
    file = io.BytesIO()
    torch.save(model, file)  # the whole module, not only its weights: nothing of the engine clings to it
    engine.detach()
    before = weights(model)
    optimizer.zero_grad()
    F.cross_entropy(model(torch.zeros(2, 20)), torch.tensor([0, 1])).backward()
    gradient = model[1].weight.grad.clone()
    optimizer.step()
    assert torch.equal(model[1].weight.grad, gradient)  # no noise any more
    assert any((p != before[n]).any() for n, p in model.named_parameters())
    assert engine.get_epsilon(1e-5) > 0  # what was spent stays spent
    with pytest.raises(EngineError, match="make_private"):
        engine.sensitivity()


def test_a_second_run_of_one_engine_adds_up():
    engine, model, optimizer, loader, criterion = private(seed=None)
    with pytest.raises(EngineError, match="already made a model private"):
        engine.make_private(
            module=model, optimizer=optimizer, criterion=losses.TauCrossEntropy(), dataset=table(),
            expected_batch_size=64, steps=5, noise_multiplier=1.0,
        )  # fmt: skip
    train(model, optimizer, loader, criterion)
    once = engine.get_epsilon(1e-5)
    engine.detach()
    made = engine.make_private(
        module=model, optimizer=optimizer, criterion=losses.TauCrossEntropy(), dataset=table(),
        expected_batch_size=64, steps=5, noise_multiplier=1.0,
    )  # fmt: skip
    train(*made)
    expected = lipdp.epsilon(noise_multiplier=1.0, sampling_rate=0.25, steps=10, delta=1e-5, accountant="rdp")
    assert once < engine.get_epsilon(1e-5) == expected
    assert engine.steps_taken == 10


# --- the account ------------------------------------------------------------------------------------------------------


def test_epsilon_is_that_of_the_steps_taken():
    engine, model, optimizer, loader, criterion = private(accountant="prv")
    assert engine.get_epsilon(1e-5) == 0
    train(model, optimizer, loader, criterion, steps=3)
    assert engine.get_epsilon(1e-5) == lipdp.epsilon(noise_multiplier=1.0, sampling_rate=0.25, steps=3, delta=1e-5)


@pytest.mark.parametrize("sampling", ["poisson", "fixed_size"])
def test_a_target_epsilon_is_reached_and_not_passed(sampling):
    model = lipschitz_net()
    engine = lipdp.PrivacyEngine("rdp", seed=0)
    made = engine.make_private_with_epsilon(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.5), criterion=losses.TauCrossEntropy(8.0),
        dataset=table(), expected_batch_size=32, steps=20, target_epsilon=2.0, target_delta=1e-5, sampling=sampling,
    )  # fmt: skip
    train(*made)
    assert 1.98 <= engine.get_epsilon(1e-5) <= 2.0
    assert engine.facts.target_epsilon == 2.0
    assert engine.facts.seeded


def test_the_sampling_rate_comes_from_the_public_size():
    engine, *_, loader, _ = private(dataset=table(200), dataset_size=1000, expected_batch_size=100)
    assert engine.facts.sampling_rate == loader.sampler.sampling_rate == 0.1
    with pytest.raises(ParameterError, match="dataset_size=1000"):  # q = B/N would understate B/200
        private(dataset=table(200), dataset_size=1000, expected_batch_size=100, sampling="fixed_size")


def test_fixed_size_batches_have_their_size():
    _, _, _, loader, _ = private(sampling="fixed_size", expected_batch_size=50)
    assert {len(x) for x, _ in loader} == {50}


# --- order of use -----------------------------------------------------------------------------------------------------


def test_a_step_needs_a_batch_of_its_own():
    engine, model, optimizer, loader, criterion = private()
    with pytest.raises(EngineError, match="without a new batch"):
        optimizer.step()
    x, y = next(iter(loader))
    criterion(model(x), y).backward()
    optimizer.step()
    with pytest.raises(EngineError, match="without a new batch"):
        optimizer.step()
    loader.load_state_dict({**loader.state_dict(), "position": 0})  # the same draw again
    with pytest.raises(EngineError, match="without a new batch"):
        optimizer.step()
    assert engine.steps_taken == 1


def test_no_step_beyond_the_budget():
    engine, model, optimizer, loader, criterion = private(steps=2)
    train(model, optimizer, loader, criterion)
    with pytest.warns(BudgetSpentWarning):
        assert list(loader) == []
    before = weights(model)
    with pytest.raises(EngineError, match="all 2 steps"):
        optimizer.step()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert engine.steps_taken == 2


def test_two_batches_in_one_step_are_refused():
    _, model, optimizer, loader, criterion = private()
    batches = iter(loader)
    for _ in range(2):
        x, y = next(batches)
        criterion(model(x[:5]), y[:5]).backward()  # few enough to look like one batch
    with pytest.raises(EngineError, match="2 batches were drawn"):
        optimizer.step()


def test_a_look_at_the_first_batch_is_harmless_but_skipping_one_is_not():
    engine, model, optimizer, loader, criterion = private()
    next(iter(loader))
    train(model, optimizer, loader, criterion, steps=2)
    next(iter(loader))
    with pytest.raises(EngineError, match="skipped"):
        train(model, optimizer, loader, criterion, steps=1)
    assert engine.steps_taken == 2


@pytest.mark.parametrize("way", ["two losses", "two backwards", "twice the batch"])
def test_a_record_counts_once(way):
    engine, model, optimizer, loader, criterion = private()
    x, y = next(iter(loader))
    if way == "two losses":
        (criterion(model(x), y) + criterion(model(x), y)).backward()
    elif way == "two backwards":
        loss = criterion(model(x), y)
        loss.backward(retain_graph=True)
        loss.backward()
    else:
        criterion(model(torch.cat([x, x])), torch.cat([y, y])).backward()
    with pytest.raises(EngineError, match="more than once"):
        optimizer.step()
    assert engine.steps_taken == 0


def test_an_audit_of_the_gradients_is_harmless():
    engine, model, optimizer, loader, criterion = private(steps=2)
    for x, y in loader:
        for _ in range(3):
            torch.autograd.grad(criterion(model(x), y), list(model.parameters()))
        criterion(model(x), y).backward()
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert engine.steps_taken == 2


def test_metrics_without_gradients_are_free():
    engine, model, optimizer, loader, criterion = private(steps=1)
    x, y = next(iter(loader))
    logits = model(x)
    criterion(logits, y).backward()
    with torch.no_grad():
        criterion(model(x), y)
    criterion(logits.detach(), y)
    optimizer.step()
    assert engine.steps_taken == 1


def test_another_criterion_is_refused():
    engine, model, optimizer, loader, _ = private()
    x, y = next(iter(loader))
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(EngineError, match="criterion that make_private returned"):
        optimizer.step()
    assert engine.steps_taken == 0


# --- what is refused --------------------------------------------------------------------------------------------------


# --- closures ---------------------------------------------------------------------------------------------------------


def closed(model, optimizer, criterion, x, y, calls=None):
    def closure():
        if calls is not None:
            calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        return loss

    return closure


@pytest.mark.parametrize("how", ["positional", "keyword", "none"])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_a_closure_is_evaluated_once_and_releases_what_the_plain_step_does(kind, how):
    results = []
    for closure_given in (False, True):
        torch.manual_seed(0)
        model = lipschitz_net()
        engine, model, optimizer, loader, criterion = private(model, optimizer=kind(model.parameters(), lr=0.1))
        for x, y in loader:
            calls = []
            closure = closed(model, optimizer, criterion, x, y, calls)
            with torch.set_grad_enabled(not closure_given):  # a step may be taken where gradients are off
                if not closure_given:
                    closure()
                    optimizer.step(None)
                elif how == "none":
                    with torch.enable_grad():
                        closure()
                    assert optimizer.step(closure=None) is None
                else:
                    loss = optimizer.step(closure) if how == "positional" else optimizer.step(closure=closure)
                    assert loss.ndim == 0
            assert calls == [True]
        results.append((weights(model), engine.get_epsilon(1e-5)))
    assert all(torch.equal(results[0][0][n], w) for n, w in results[1][0].items())
    assert results[0][1] == results[1][1]


def test_a_schedule_hands_the_closure_on():
    engine, model, optimizer, loader, criterion = private(steps=2)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)  # wraps optimizer.step
    for x, y in loader:
        optimizer.step(closed(model, optimizer, criterion, x, y))
        schedule.step()
    assert engine.steps_taken == 2


def test_the_gradient_of_a_closure_has_its_noise():
    """Were the noise added before the closure, `zero_grad` inside it would take it away."""
    _, model, optimizer, loader, criterion = private(plain_net(), table(features=100, classes=50), lr=1.0)
    x, y = next(iter(loader))
    before = weights(model)

    def closure():
        optimizer.zero_grad()
        (criterion(model(x), y) * 0.0).backward()

    optimizer.step(closure)
    assert all((p.detach() != before[n]).float().mean() > 0.99 for n, p in model.named_parameters())


class Extragradient(torch.optim.SGD):
    """Takes a second gradient where the first one led, as SAM and extragradient methods do."""

    @torch.no_grad()
    def step(self, closure=None):
        for _ in range(2):
            with torch.enable_grad():
                loss = closure()
            super().step.__wrapped__(self)
        return loss


def test_an_optimiser_that_evaluates_its_closure_again_is_refused():
    model = lipschitz_net()
    with pytest.raises(OptimizerError, match="LBFGS evaluates the gradient several times"):
        private(model, optimizer=torch.optim.LBFGS(model.parameters()))
    engine, model, optimizer, loader, criterion = private(
        model, optimizer=Extragradient(model.parameters(), lr=0.1), steps=2
    )
    x, y = next(iter(loader))
    calls = []
    with pytest.raises(OptimizerError, match="more than once a step"):
        optimizer.step(closed(model, optimizer, criterion, x, y, calls))
    assert len(calls) == 1
    assert engine.steps_taken == 1  # the noise of the first was drawn, so it counts


def test_a_closure_that_returns_before_backward_is_refused():
    engine, model, optimizer, loader, criterion = private()
    x, y = next(iter(loader))
    before = weights(model)
    with pytest.raises(EngineError, match="no gradient went through the criterion"):
        optimizer.step(lambda: criterion(model(x), y))
    assert engine.steps_taken == 0
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_a_closure_that_takes_the_gradient_twice_is_refused():
    engine, model, optimizer, loader, criterion = private()
    x, y = next(iter(loader))

    def closure():
        for _ in range(2):
            criterion(model(x), y).backward()

    with pytest.raises(EngineError, match="more than once"):
        optimizer.step(closure)
    assert engine.steps_taken == 0


def test_a_closure_that_steps_is_refused_after_the_one_step():
    engine, model, optimizer, loader, criterion = private()
    x, y = next(iter(loader))

    def closure():
        closed(model, optimizer, criterion, x, y)()
        optimizer.step()
        closed(model, optimizer, criterion, x, y)()

    with pytest.raises(EngineError, match="without a new batch"):
        optimizer.step(closure)
    assert engine.steps_taken == 1


@pytest.mark.parametrize("what", ["layer", "weights", "constraint"])
def test_a_closure_that_changes_the_model_is_refused(what):
    engine, model, optimizer, loader, criterion = private()
    x, y = next(iter(loader))

    def closure():
        closed(model, optimizer, criterion, x, y)()
        if what == "layer":
            model[2] = nn.ReLU()
        elif what == "constraint":
            model[3].constraint = None
        else:
            with torch.no_grad():
                model[3].weight.mul_(0.1)  # smaller bounds than those of the gradients

    with pytest.raises(EngineError, match="changed"):
        optimizer.step(closure)
    assert engine.steps_taken == 0


def test_a_step_takes_nothing_else():
    _, model, optimizer, loader, criterion = private()
    x, y = next(iter(loader))
    criterion(model(x), y).backward()
    for arguments, named in (
        ({"closure": 3}, "got 3"),
        ({"inner_steps": 2}, "got inner_steps"),
        ({"grad_scaler": None}, "GradScaler"),
    ):
        with pytest.raises(OptimizerError, match=named):
            optimizer.step(**arguments)


# --- between backward and step ----------------------------------------------------------------------------------------


def clip_norm(model, optimizer):
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)


def clip_value(model, optimizer):
    nn.utils.clip_grad_value_(model.parameters(), 0.1)


def replace(model, optimizer):
    model[1].weight.grad = model[1].weight.grad * 2


def drop(model, optimizer):
    optimizer.zero_grad()


def add(model, optimizer):
    model[3].weight.grad.add_(1.0)


def shrink_weights(model, optimizer):
    with torch.no_grad():
        model[3].weight.mul_(0.1)


@pytest.mark.parametrize("change", [clip_norm, clip_value, replace, drop, add, shrink_weights])
@pytest.mark.parametrize("parts", [1, 3])
def test_what_backward_left_is_what_the_step_must_find(change, parts):
    engine, model, optimizer, loader, criterion = private(steps=3)
    batches = iter(loader)
    x, y = next(batches)
    for xb, yb in engine.microbatches(x, y, math.ceil(len(x) / parts)):
        criterion(model(xb), yb).backward()
    change(model, optimizer)
    with pytest.raises(EngineError, match="were changed between"):
        optimizer.step()
    assert engine.steps_taken == 0


def test_a_gradient_changed_between_two_parts_of_a_batch_is_refused():
    engine, model, optimizer, loader, criterion = private()
    x, y = next(iter(loader))
    first, second = engine.microbatches(x, y, math.ceil(len(x) / 2))
    criterion(model(first[0]), first[1]).backward()
    clip_norm(model, optimizer)
    with pytest.raises(EngineError, match="were changed between"):
        criterion(model(second[0]), second[1]).backward()
    assert engine.steps_taken == 0


def test_why_clipping_a_sum_is_refused():
    """Layer 0 of one record, at its bound, changes what clipping leaves of layer 1 by far more than layer 1's bound."""
    deltas = torch.tensor([10.0, 0.01])
    others = torch.tensor([0.0, 5.0])  # what the other records sum to

    def clipped(total, limit=5.0):
        return total * min(1.0, limit / float(total.norm()))

    moved = (clipped(others + torch.tensor([10.0, 0.0])) - clipped(others)).abs()
    assert moved[1] > 100 * deltas[1]
    stds = torch.tensor([2**0.5 * 10.0, 2**0.5 * 0.01])  # per layer, joint σ = 1
    assert (moved / stds).norm() > 100  # where σ = 1 allows 1


def test_weights_may_change_between_the_steps_and_gradients_after_the_noise():
    engine, model, optimizer, loader, criterion = private(steps=4)
    optimizer.register_step_pre_hook(lambda *_: clip_norm(model, optimizer) and None)  # sees the noisy gradients
    for set_to_none, (x, y) in zip((True, False, False, True), loader, strict=True):
        criterion(model(x), y)  # a look with gradients, unused
        with torch.no_grad():
            model[3].weight.mul_(0.9)
        optimizer.zero_grad(set_to_none=set_to_none)
        criterion(model(x), y).backward()
        optimizer.step()
    assert engine.steps_taken == 4


def test_a_fused_optimiser_under_a_scaler_is_refused():
    model = lipschitz_net()
    engine, model, optimizer, loader, criterion = private(
        model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    )
    scaler = torch.amp.GradScaler("cpu")
    x, y = next(iter(loader))
    scaler.scale(criterion(model(x), y)).backward()
    with pytest.raises(OptimizerError, match="bf16"):
        scaler.step(optimizer)
    assert engine.steps_taken == 0


# --- a restored optimiser ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_restored_optimiser_without_its_account_is_refused(momentum):
    engine, model, optimizer, loader, criterion = private(momentum=momentum)
    train(model, optimizer, loader, criterion, steps=2)
    file = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "engine": engine.state_dict()}, file)
    train(model, optimizer, loader, criterion, steps=1)  # the state stays that of step 2
    file.seek(0)
    state = torch.load(file, weights_only=True)
    again, model, optimizer, loader, criterion = private(momentum=momentum)
    optimizer.load_state_dict(state["optimizer"])
    for _ in range(2):
        with pytest.raises(EngineError, match="restored after 2 private steps but the account has 0"):
            train(model, optimizer, loader, criterion, steps=1)
    again.load_state_dict(state["engine"])
    train(model, optimizer, loader, criterion)
    assert again.steps_taken == 5
    optimizer.load_state_dict(state["optimizer"])  # an earlier one: the account has more steps, which is safe
    again.detach()
    assert "lipdp_steps" not in optimizer.state_dict()["param_groups"][0]


def test_an_optimiser_over_other_parameters_is_refused():
    model = lipschitz_net()
    with pytest.raises(OptimizerError, match="1 parameter"):
        private(model, optimizer=torch.optim.SGD([*model.parameters(), nn.Parameter(torch.zeros(2))], lr=0.1))
    with pytest.raises(OptimizerError, match=r"lacks the trainable parameter\(s\) 3\.weight"):
        private(model, optimizer=torch.optim.SGD([model[1].weight], lr=0.1))
    engine, model, optimizer, loader, criterion = private(model)
    with pytest.raises(OptimizerError, match="already private"):
        private(model, optimizer=optimizer)
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    with pytest.raises(OptimizerError, match="the model lacks"):
        train(model, optimizer, loader, criterion)
    assert engine.steps_taken == 0
    frozen = lipschitz_net().requires_grad_(False)
    with pytest.raises(OptimizerError, match="no trainable"):
        private(frozen)


def test_a_replaced_layer_is_refused():
    engine, model, optimizer, loader, criterion = private()
    model[3] = lnn.SpectralLinear(32, 5)
    with pytest.raises(OptimizerError):
        train(model, optimizer, loader, criterion)
    assert engine.steps_taken == 0


class CountWeighted(losses.TauCrossEntropy):
    """Weights by the class counts of the batch, as the published KR losses do."""

    def forward(self, logits, target):
        counts = torch.bincount(target, minlength=logits.shape[1])
        return super().forward(logits, target) / counts[target]


class Averaged(losses.TauCrossEntropy):
    def forward(self, logits, target):
        return super().forward(logits, target).mean()


class DividedByBatch(losses.TauCrossEntropy):
    def forward(self, logits, target):
        return super().forward(logits, target) / len(logits)


@pytest.mark.parametrize("loss", [CountWeighted(), Averaged(), DividedByBatch()])
def test_a_loss_that_couples_samples_is_refused(loss):
    with pytest.raises(LossError, match=r"couples|without reduction"):
        private(criterion=loss)


@pytest.mark.parametrize(
    ("options", "error", "named"),
    [
        ({"expected_batch_size": 0}, ParameterError, "expected_batch_size"),
        ({"expected_batch_size": 257}, ParameterError, "N = 256"),
        ({"steps": 0}, ParameterError, "steps"),
        ({"steps": 2.5}, ParameterError, "steps"),
        ({"noise_multiplier": 0.0}, ParameterError, "noise_multiplier"),
        ({"noise_multiplier": math.nan}, ParameterError, "noise_multiplier"),
        ({"gate": -1.0}, ParameterError, "gate"),
        ({"allocation": "per_block"}, UnknownNameError, "per_layer"),
        ({"sampling": "shuffle"}, UnknownNameError, "poisson"),
        ({"criterion": nn.NLLLoss()}, LossError, "NLLLoss"),
        ({"model": nn.Linear(20, 5)}, UnboundedError, "InputBound"),
        ({"dataset": [torch.zeros(20) for _ in range(64)]}, EngineError, "pairs"),
    ],
)
def test_bad_arguments_are_named(options, error, named):
    with pytest.raises(error, match=named):
        private(**options)


# --- numbers that are not finite --------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_bad_input_is_zero_and_stops_nothing(value):
    ends = []
    for entry in (value, 0.0):
        x, y = table().tensors
        x = x.clone()
        x[100:, ::2] = entry
        torch.manual_seed(0)
        engine, model, optimizer, loader, criterion = private(dataset=TensorDataset(x, y))
        train(model, optimizer, loader, criterion)
        assert engine.steps_taken == len(loader)
        ends.append(weights(model))
    assert all(torch.equal(p, ends[1][n]) for n, p in ends[0].items())


def test_a_bad_weight_stops_the_run():
    engine, model, optimizer, loader, criterion = private()
    train(model, optimizer, loader, criterion, steps=2)
    model[3].weight.data[0, 0] = math.nan
    with pytest.raises(NonFiniteError, match=r"step 3: .*1\.weight"):
        train(model, optimizer, loader, criterion)
    assert engine.steps_taken == 2
    with pytest.raises(NonFiniteError, match="weight is NaN"):
        engine.sensitivity()


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
