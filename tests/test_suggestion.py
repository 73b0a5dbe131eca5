"""What is chosen where a script chooses nothing: from public facts, readable, reproducible; and what can't learn."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from itertools import islice

import kit
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lipdp
from lipdp import losses
from lipdp import nn as lnn
from lipdp.accounting.plan import PrivacyPlan
from lipdp.batches.rows import plain as plain_tensor
from lipdp.errors import CannotLearnWarning, CheckpointError, EngineError, LossError, OptimizerError, ParameterError
from lipdp.noise import GaussianNoise
from lipdp.noise.banded import BandedNoise, accumulation
from lipdp.suggestion import Joint, place_joints
from lipdp.suggestion.choose import CLIP_AT, GATE_AT, LOOSE, NOISE, _temperature, budget
from lipdp.suggestion.decay import decaying
from lipdp.suggestion.joints import joint_layers, without_joints
from lipdp.suggestion.learning import GrowthWatch, drowned, noise_moves, signal_over_noise
from lipdp.suggestion.probe import gradient_norms, output_shape, public_inputs, typical

SHAPE = (1, 8, 8)
FACTS = {"input_shape": SHAPE, "dataset_size": 4000, "target_epsilon": 3.0, "target_delta": 1e-5}


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.inner = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = x + torch.relu(self.inner(x))
        return self.head(x.mean((2, 3)))


def chain(seed=0):
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64, 8), nn.ReLU(),
        nn.Linear(8, 3),
    )  # fmt: skip
    return lnn.from_torch(net, SHAPE)


def graph():
    torch.manual_seed(0)
    return lnn.from_torch(Residual(), SHAPE)


def data(n=400, shape=SHAPE):
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.rand(n, *shape, generator=generator), torch.randint(3, (n,), generator=generator))


def private(model, dataset=None, **options):
    engine = lipdp.PrivacyEngine(seed=0)
    given = {"target_epsilon": 3.0, "target_delta": 1e-4, **options}
    return engine, *engine.make_private_with_epsilon(module=model, dataset=dataset or data(), **given)


def train(optimizer, loader, engine, steps=None):
    for batch in islice(loader, steps):
        optimizer.zero_grad()
        engine.backward(*batch)
        optimizer.step()


# --- the choice ------------------------------------------------------------------------------------------------------


def test_a_model_and_a_budget_are_enough():
    engine, model, optimizer, loader, criterion = private(chain())
    names = set(dict(model.named_parameters()))
    assert {b.name for b in engine.settings.blocks} == names == set(engine.noise_stds())
    assert isinstance(criterion.loss, losses.TauCrossEntropy)
    assert engine.plan.target_epsilon == 3.0
    assert "norm 0.3 at most" in str(engine.plan)
    train(optimizer, loader, engine)
    assert engine.steps_left == 0
    assert 2.9 < engine.get_epsilon(1e-4) <= 3.0
    assert all(group["lr"] == 0 for group in optimizer.param_groups)


@pytest.mark.parametrize("make", [chain, graph])
def test_the_choice_passed_explicitly_is_the_same_run(make):
    weights, chosen = [], None
    for way in ("left out", "of the engine", "of suggest"):
        model, engine = make(), lipdp.PrivacyEngine(seed=0)
        options = {"noise_multiplier": None, "target_epsilon": 3.0, "target_delta": 1e-5}
        if way == "of the engine":
            options = chosen.arguments(model)
        if way == "of suggest":
            options = lipdp.suggest(model, **{**FACTS, "dataset_size": 400}).arguments(model)
        _, optimizer, loader, _ = engine.make_private(module=model, dataset=data(), **options)
        chosen = chosen or engine.settings
        train(optimizer, loader, engine, steps=3)
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(weights[0], weights[1])
    assert torch.equal(weights[0], weights[2])


def test_no_record_is_read_for_the_choice():
    settings = []
    for x in (torch.zeros(400, *SHAPE), 100 * torch.randn(400, *SHAPE)):
        engine, *_ = private(chain(), TensorDataset(x, torch.zeros(400, dtype=torch.int64)))
        settings.append(str(engine.settings))
    assert settings[0] == settings[1]


def test_a_suggestion_leaves_the_model_as_it_is():
    model = chain()
    before, state = repr(model), torch.get_rng_state()
    lipdp.suggest(model, **FACTS)
    assert repr(model) == before
    assert torch.equal(torch.get_rng_state(), state)


def test_what_is_given_stays():
    loss = losses.TauCrossEntropy(4.0)
    settings = lipdp.suggest(
        chain(), **FACTS, criterion=loss, gate=0.1, allocation="global", joints=(), expected_batch_size=500, steps=7
    )
    assert (settings.criterion, settings.gate, settings.allocation, settings.joints) == (loss, 0.1, "global", ())
    assert (settings.plan.expected_batch_size, settings.plan.steps) == (500, 7)


def test_with_an_optimiser_of_ones_own_all_but_its_rates_are_chosen():
    model, chosen = chain(), lipdp.suggest(chain(), **{**FACTS, "dataset_size": 400, "target_delta": 1e-4})
    own = torch.optim.SGD(model.parameters(), lr=0.1)
    engine, _, optimizer, _, criterion = private(model, optimizer=own)
    assert optimizer is own
    assert own.param_groups[0]["lr"] == 0.1
    assert engine.settings == replace(chosen, criterion=engine.settings.criterion, own_optimizer=True)
    assert "your own" in str(engine.settings)
    assert criterion.loss.tau == chosen.criterion.tau
    assert any(isinstance(m, lnn.GradientGate) for m in model.modules())


def test_with_optimiser_and_loss_of_ones_own_only_the_budget_is_chosen():
    model = chain()
    engine, *_ = private(
        model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), criterion=losses.TauCrossEntropy()
    )
    assert engine.settings is None
    assert (engine.plan.allocation, engine.plan.expected_batch_size) == ("per_layer", 400)
    assert not any(isinstance(m, lnn.GradientGate) for m in model.modules())


@pytest.mark.parametrize("bands", [1, 8])
def test_learning_rates_leave_the_noise_at_a_share_of_the_weights(bands):
    """Simulated: noise alone, added up over T steps with momentum and decay, has the norm that was aimed at."""
    model = lnn.from_torch(nn.Sequential(nn.Linear(60, 40), nn.ReLU(), nn.Linear(40, 3)), (60,))
    settings = lipdp.suggest(
        model,
        input_shape=(60,),
        dataset_size=4000,
        expected_batch_size=400,
        target_epsilon=3.0,
        target_delta=1e-5,
        steps=200,
        bands=bands,
    )
    engine = lipdp.PrivacyEngine(seed=0)
    engine.make_private(module=model, dataset=data(4000, (60,)), **settings.arguments(model))
    std = engine.noise_stds()["0.weight"] / settings.plan.expected_batch_size
    weight = nn.Parameter(torch.zeros(40, 60))
    rate = next(b.learning_rate for b in settings.blocks if b.name == "0.weight")
    optimizer = decaying(torch.optim.SGD([weight], lr=rate, momentum=settings.momentum), steps=200)
    noise = GaussianNoise(seed=0) if bands == 1 else BandedNoise(GaussianNoise(seed=0), bands)
    for row in range(1, 201):
        weight.grad = torch.zeros(40, 60)
        noise.add_([weight.grad], torch.tensor([std]), **({} if bands == 1 else {"row": row}))
        optimizer.step()
    assert float(torch.linalg.matrix_norm(weight.detach(), 2)) == pytest.approx(NOISE, rel=0.15)


@pytest.mark.parametrize(("outputs", "loss"), [(1, losses.TauBCEWithLogits), (3, losses.TauCrossEntropy)])
def test_the_loss_goes_by_the_number_of_outputs(outputs, loss):
    model, facts = lnn.SpectralLinear(8, outputs), {**FACTS, "input_shape": (8,)}
    assert type(lipdp.suggest(nn.Sequential(lnn.InputBound(1.0), model), **facts).criterion) is loss
    assert output_shape(nn.Linear(8, outputs), torch.zeros(4, 8)) == (outputs,)


@pytest.mark.parametrize("deep", [False, True])
def test_the_temperature_lets_a_weight_of_its_own_norm_settle_a_record(deep):
    """With joints and depth logits get short: τ is such that the head alone can make τ z as long as 16."""
    model = chain() if deep else lnn.from_torch(nn.Sequential(nn.Linear(8, 3)), (8,))
    facts = FACTS if deep else {**FACTS, "input_shape": (8,)}
    settings = lipdp.suggest(model, **facts)
    place_joints(model, settings.joints)
    head = [m for m in model.modules() if isinstance(m, lnn.SpectralLinear)][-1]
    seen = {}
    head.register_forward_pre_hook(lambda module, args: seen.update(x=args[0].detach()))
    model(public_inputs(facts["input_shape"]))
    radius = float(torch.linalg.matrix_norm(head.weight.detach(), 2))
    reach = settings.criterion.tau * radius * float(seen["x"].flatten(1).norm(dim=1).median())
    assert reach == pytest.approx(16, rel=0.25)


def test_few_records_are_passed_over_more_often():
    assert budget(60_000, steps=None, epochs=None)[1] < budget(1500, steps=None, epochs=None)[1]
    assert budget(300, steps=9, epochs=None) == (300, None)


def test_the_table_says_everything(capsys):
    settings = lipdp.suggest(chain(), **FACTS)
    text = str(settings)
    for word in ("expected_batch_size", "passes", "TauCrossEntropy(tau=", "min_variance", "lr of", "joint at 0"):
        assert word in text
    with pytest.raises(AttributeError):
        settings.gate = 1.0
    plan, lines = str(settings.plan).splitlines(), text.splitlines()
    assert plan[0].split() == lines[0].split() == ["setting", "value", "why"]
    assert [line.split() for line in lines[: len(plan)]] == [line.split() for line in plan]


# --- joints and the probe --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [chain, graph])
def test_joints_are_placed_in_front_of_layers_and_names_stay(make):
    model = make()
    names, layers = list(dict(model.named_parameters())), joint_layers(model)
    assert len(layers) == 2
    before = lipdp.sensitivity(model, losses.TauCrossEntropy(), SHAPE)
    place_joints(model, [Joint(name, clip=0.1, gate=0.05) for name in layers])
    after = lipdp.sensitivity(model, losses.TauCrossEntropy(), SHAPE)
    assert list(dict(model.named_parameters())) == names
    assert all(after[n] < before[n] for n in names)
    assert after[names[0]] <= 0.05 * 1.001 * max(1.0, before.nodes[0].value) * 5
    assert joint_layers(model) == []  # clips are there


@pytest.mark.parametrize("make", [chain, graph])
def test_joints_that_are_there_are_replaced(make):
    model = make()
    layers = joint_layers(model)
    for clip in (0.3, 0.1):
        place_joints(model, [Joint(name, clip=clip, gate=1.0) for name in layers])
    clips = [m.bound for m in model.modules() if type(m) is lnn.ValueClip]
    assert clips == [0.1] * len(layers)
    assert joint_layers(without_joints(model)) == layers
    place_joints(model, [Joint(layers[0], weight=0.1)])
    first = lipdp.suggest(model, **FACTS)
    assert first.joints == lipdp.suggest(make(), **FACTS).joints


def test_clips_and_gates_of_ones_own_stay_alone():
    model = nn.Sequential(lnn.InputBound(1.0), lnn.SpectralLinear(8, 8), lnn.ValueClip(0.5), lnn.SpectralLinear(8, 3))
    assert lipdp.suggest(model, input_shape=(8,), dataset_size=900, noise_multiplier=2.0).joints == ()


@pytest.mark.parametrize("make", [chain, graph])
def test_loose_weights_get_a_gate_at_what_is_typical(make):
    """A bound is loose where a weight is used at many positions; the gate is what the noise is calibrated to."""
    model = make()
    settings = lipdp.suggest(model, **FACTS)
    gates = {f"{j.layer}.weight": j.weight for j in settings.joints if j.weight < math.inf}
    place_joints(model, [j for j in settings.joints if j.weight == math.inf])
    norms = gradient_norms(model, public_inputs(SHAPE), settings.gate)
    before = lipdp.sensitivity(model, settings.criterion, SHAPE, gate=settings.gate)
    assert gates == {n: pytest.approx(norms[n]) for n in before if before[n] > LOOSE * norms[n]}
    assert {n for n, p in model.named_parameters() if p.dim() == 4} <= gates.keys()
    place_joints(model, settings.joints)
    after = lipdp.sensitivity(model, settings.criterion, SHAPE, gate=settings.gate)
    assert all(after[n] == pytest.approx(gates.get(n, before[n]), rel=1e-4) for n in before)


def test_frozen_weights_get_no_gate():
    model = chain()
    model.get_submodule("0").weight.requires_grad_(False)
    assert all(j.layer != "0" for j in lipdp.suggest(model, **FACTS).joints)


def test_what_a_joint_with_a_weight_gate_makes_of_a_record():
    model = chain()
    place_joints(model, lipdp.suggest(model, **FACTS).joints)
    bounds = lipdp.sensitivity(model, losses.TauCrossEntropy(), SHAPE)
    x = torch.rand(6, *SHAPE)
    for i in range(6):
        model.zero_grad()
        losses.TauCrossEntropy(50.0)(model(x[i : i + 1]), torch.tensor([i % 3])).sum().backward()
        assert all(float(p.grad.norm()) <= bounds[n] for n, p in model.named_parameters())
    assert float(model.get_submodule("0").weight.grad.norm()) > 0.95 * bounds["0.weight"]  # the gate is reached


def test_no_place_for_a_gate_at_a_weight_is_named():
    with pytest.raises(ParameterError, match="no gate can be placed at the weight of '0'"):
        place_joints(nn.Sequential(nn.Linear(3, 3)), [Joint("0", weight=1.0)])
    own = nn.Sequential(lnn.InputBound(1.0), lnn.SpectralConv2d(1, 4, 3, weight_gate=0.5), nn.Flatten())
    place_joints(own, ())
    assert without_joints(own)[1].weight_gate == 0.5  # one's own


def test_no_place_for_a_joint_is_named():
    with pytest.raises(ParameterError, match="no joint can be placed in front of 'layer' of Linear"):
        place_joints(nn.Linear(3, 3), [Joint("layer", 1.0, 1.0)])
    shared = nn.Linear(4, 4)
    assert joint_layers(nn.Sequential(nn.Linear(4, 4), shared, shared)) == []


def test_joints_stand_at_shares_of_what_is_typical():
    model = chain()
    x = public_inputs(SHAPE)
    settings = lipdp.suggest(model, **FACTS)
    between = [j for j in settings.joints if j.weight == math.inf]
    seen = typical(model, x, [j.layer for j in between], settings.gate)
    for joint in between:
        assert joint.clip == pytest.approx(CLIP_AT * seen[joint.layer].value)
        assert joint.gate == pytest.approx(GATE_AT * seen[joint.layer].cotangent)


def test_dense_models_get_no_joints():
    model = lnn.from_torch(nn.Sequential(*(nn.Linear(8, 8) for _ in range(4))), (8,))
    assert lipdp.suggest(model, input_shape=(8,), dataset_size=900, noise_multiplier=2.0).joints == ()


def test_a_public_sample_may_be_given():
    bright = lipdp.suggest(chain(), **FACTS, public=torch.full((32, *SHAPE), 1e-3))
    assert bright.joints[0].clip < lipdp.suggest(chain(), **FACTS).joints[0].clip


def test_the_probe_is_public_and_of_the_format():
    images = public_inputs((3, 16, 16), 20)
    assert torch.equal(images, public_inputs((3, 16, 16), 20))
    assert images.min() >= 0
    assert images.max() <= 1
    power = torch.fft.rfft2(images - images.mean((2, 3), keepdim=True)).abs().square().mean((0, 1))
    assert power[1, 1] > 5 * power[6, 6]  # 1/f
    assert public_inputs((30,), 500).std() == pytest.approx(1.0, abs=0.05)


def test_gradient_norms_are_within_their_bounds():
    model, loss = chain(), losses.TauCrossEntropy()
    norms = gradient_norms(model, public_inputs(SHAPE), 0.3)
    bounds = lipdp.sensitivity(model, loss, SHAPE, gate=0.3)
    assert all(0 < norms[n] <= bounds[n] for n in bounds)


# --- what can't learn ------------------------------------------------------------------------------------------------


def test_signal_over_noise_is_what_it_says():
    assert signal_over_noise(norm=1.0, std=0.0, size=4, batch_size=1, steps=1) == math.inf
    generator = torch.Generator().manual_seed(0)
    noise = torch.stack([2.0 * torch.randn(100, generator=generator) for _ in range(50)]).sum(0).norm()
    signal = 50 * 30 * 0.5
    found = signal_over_noise(norm=0.5, std=2.0, size=100, batch_size=30, steps=50)
    assert found == pytest.approx(signal / float(noise), rel=0.2)


@pytest.mark.parametrize(
    ("bound", "epsilon", "warned"), [(5.0, 3.0, False), (100.0, 3.0, True), (5.0, 0.01, True)], ids=str
)  # rows of norm 5
def test_a_run_that_cannot_learn_is_warned_of(bound, epsilon, warned):
    model = nn.Sequential(
        lnn.InputBound(bound), lnn.SpectralLinear(25, 16), lnn.GroupSort2(), lnn.SpectralLinear(16, 3)
    )
    optimizer, loss = torch.optim.SGD(model.parameters(), lr=0.1), losses.TauCrossEntropy(16.0)
    options = {"epochs": 5, "optimizer": optimizer, "criterion": loss, "expected_batch_size": 200}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        engine, *_ = private(model, data(2000, (25,)), target_epsilon=epsilon, target_delta=1e-5, **options)
    assert [w.category for w in caught] == [CannotLearnWarning] * warned
    assert bool(drowned(engine.signals)) is warned


RATES = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


@pytest.mark.parametrize(("kind", "rate"), [("sgd", 1.0), ("adam", 0.01), ("adamw", 0.01)])
def test_a_rate_far_from_what_the_noise_asks_for_is_warned_of(kind, rate):
    for factor, word in ((3, ""), (1e-3, "far too small"), (3e4, "far too large")):
        model = lnn.from_torch(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)), (8,))
        optimizer = RATES[kind](model.parameters(), lr=rate * factor)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            private(model, data(2000, (8,)), optimizer=optimizer, epochs=5)
        assert [(w.category, w.filename) for w in caught] == [(CannotLearnWarning, __file__)] * bool(word)
        assert not word or (word in str(caught[0].message) and "e+" not in str(caught[0].message))


@pytest.mark.parametrize("bands", [1, 4])
@pytest.mark.parametrize("make", RATES.values(), ids=RATES)
def test_noise_moves_weights_as_far_as_is_said(make, bands):
    """The run itself, on noise alone, four times as long as the trial."""
    weight = nn.Parameter(torch.ones(50, 40))
    optimizer = make([weight], lr=1e-4)
    plan = PrivacyPlan.of(dataset_size=10_000, expected_batch_size=100, steps=256, noise_multiplier=1.0, bands=bands)
    said = noise_moves(optimizer, {"w": 3.0}, {"w": weight}, plan)["w"]
    generator = torch.Generator().manual_seed(1)
    for _ in range(256):
        weight.grad = 0.03 * accumulation(bands) * torch.randn(50, 40, generator=generator)
        optimizer.step()
    assert float((weight.detach() - 1).square().mean().sqrt()) == pytest.approx(said, rel=0.2)


@pytest.mark.parametrize(
    ("given", "error"),
    [({"gate": "0.3"}, ParameterError), ({"gate": -1.0}, ParameterError), ({"dataset_size": 0}, ParameterError),
     ({"optimizer": "adam"}, OptimizerError)],
)  # fmt: skip
def test_what_is_no_gate_size_or_optimiser_is_named(given, error):
    with pytest.raises(error, match=f"{next(iter(given))}=.* is needed"):
        private(chain(), **given)


def test_a_scheduler_that_warms_up_is_judged_by_its_highest_rate():
    weight = nn.Parameter(torch.ones(50))
    plain = torch.optim.SGD([weight], lr=0.5, momentum=0.9)
    warm = torch.optim.SGD([weight], lr=0.5, momentum=0.9)
    torch.optim.lr_scheduler.OneCycleLR(warm, max_lr=0.5, total_steps=100, cycle_momentum=False)
    plan = PrivacyPlan.of(dataset_size=1000, expected_batch_size=100, steps=20, noise_multiplier=1.0)
    facts = {"w": 3.0}, {"w": weight}, plan
    assert warm.param_groups[0]["lr"] < 0.1
    assert noise_moves(warm, *facts) == noise_moves(plain, *facts)


def test_an_optimiser_whose_rule_is_not_known_is_not_judged():
    class Mine(torch.optim.SGD):
        pass

    weight = nn.Parameter(torch.ones(5))
    plan = PrivacyPlan.of(dataset_size=1000, expected_batch_size=100, steps=20, noise_multiplier=1.0)
    assert noise_moves(Mine([weight], lr=1.0), {"w": 3.0}, {"w": weight}, plan) == {}


@pytest.mark.filterwarnings("error::lipdp.errors.CannotLearnWarning")
def test_a_warning_that_is_an_error_leaves_model_and_optimiser_plain():
    """Else neither this engine nor another could make them private again, or plain."""
    model = kit.lipschitz_net()
    given = {"engine": lipdp.PrivacyEngine("rdp", seed=0), "optimizer": torch.optim.SGD(model.parameters(), lr=1e-6)}
    with pytest.raises(CannotLearnWarning):
        kit.private(model, **given)
    given["optimizer"].param_groups[0]["lr"] = 10.0
    kit.train(*kit.private(model, **given)[1:], steps=1)
    assert given["engine"].steps_taken == 1


def test_plain_layers_whose_sensitivity_grows_are_warned_of():
    model = nn.Sequential(lnn.InputBound(1.0), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=10.0)
    engine, _, optimizer, loader, _ = private(
        model,
        data(400, (8,)),
        optimizer=optimizer,
        criterion=losses.TauCrossEntropy(16.0),
        expected_batch_size=100,
        steps=8,
    )
    with pytest.warns(CannotLearnWarning, match="has grown"):
        train(optimizer, loader, engine)


def test_growth_is_said_once():
    watch = GrowthWatch()
    watch.look(torch.tensor([1.0]))
    with pytest.warns(CannotLearnWarning, match="11 times"):
        watch.look(torch.tensor([11.0]))
    for _ in range(9):
        watch.look(torch.tensor([100.0]))


# --- loops as people write them --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("epochs", "batch"), [(3, 64), (2.5, 64), (4, 400), (1, 100)])
def test_a_pass_of_the_loader_is_an_epoch(epochs, batch):
    model = chain()
    engine, _, optimizer, loader, _ = private(model, epochs=epochs, expected_batch_size=batch)
    seen = []
    for _ in range(math.ceil(epochs)):
        taken = engine.steps_taken
        train(optimizer, loader, engine)
        seen.append(engine.steps_taken - taken)
        assert seen[-1] <= len(loader)
    assert sum(seen) == engine.plan.steps == max(1, round(epochs * 400 / batch))
    assert all(abs(n - 400 / batch) <= 1 for n in seen[: int(epochs)])
    with pytest.warns(lipdp.errors.BudgetSpentWarning, match="epochs="):
        assert list(loader) == []
    assert list(loader) == []  # said once


def test_a_pass_that_was_left_is_gone_on_with():
    model = chain()
    engine, _, optimizer, loader, _ = private(model, epochs=2, expected_batch_size=50)
    for batch in loader:
        engine.backward(*batch)
        optimizer.step()
        optimizer.zero_grad()
        if engine.steps_taken == 3:
            break
    assert len(list(zip(range(99), iter_steps(optimizer, loader, engine), strict=False))) == 5
    train(optimizer, loader, engine)
    assert engine.steps_left == 0


def iter_steps(optimizer, loader, engine):
    for batch in loader:
        optimizer.zero_grad()
        engine.backward(*batch)
        optimizer.step()
        yield


def test_the_criterion_reads_as_a_mean_and_gradients_are_of_the_sum():
    model = chain()
    plain = chain()
    options = {"optimizer": torch.optim.SGD(model.parameters(), lr=0.0), "criterion": losses.TauCrossEntropy(8.0)}
    _, _, _, loader, criterion = private(model, expected_batch_size=100, steps=2, **options)
    x, y = next(iter(loader))
    value = criterion(model(x), y)
    value.backward()
    x, y = plain_tensor(x), plain_tensor(y)
    values = losses.TauCrossEntropy(8.0)(plain(x), y)
    values.sum().backward()
    assert float(value.detach()) == pytest.approx(float(values.detach().mean()), rel=1e-5)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        assert float(criterion(model(x), y)) == pytest.approx(float(values.detach().mean()), rel=1e-5)
        assert float(criterion(model(x[:0]), y[:0])) == 0.0


def test_backward_returns_the_mean_whatever_the_pieces():
    found = []
    for size in (None, 7):
        model = chain()
        engine, _, _, loader, _ = private(model, expected_batch_size=100, steps=2)
        found.append(float(engine.backward(*next(iter(loader)), microbatch=size)))
    assert found[0] == pytest.approx(found[1], rel=1e-5)


@pytest.mark.parametrize(
    ("name", "answer"),
    [("data_loader", "dataset=loader.dataset"), ("max_grad_norm", "gate="), ("batch_size", "expected_batch_size"),
     ("secure_mode", "secure=True"), ("nonsense", "documentation")],
)  # fmt: skip
def test_opacus_names_are_answered(name, answer):
    for make in (lipdp.PrivacyEngine().make_private_with_epsilon, lipdp.PrivacyEngine().make_private):
        options = {} if make.__name__.endswith("epsilon") else {"noise_multiplier": 1.0}
        with pytest.raises(ParameterError, match=f"has no {name}: .*{answer}"):
            make(module=chain(), dataset=data(), target_epsilon=1.0, target_delta=1e-5, **options, **{name: 1})
        with pytest.raises(ParameterError, match=f"has no {name}: .*{answer}"):
            make(module=chain(), **options, **{"target_epsilon": 1.0, "target_delta": 1e-5, name: 1})
        with pytest.raises(ParameterError, match="needs dataset="):
            make(module=chain(), target_epsilon=1.0, target_delta=1e-5, **options)
    with pytest.raises(ParameterError, match="secure=True"):
        lipdp.PrivacyEngine(secure_mode=True)


def test_a_torch_loader_stands_for_its_data_set():
    dataset = data()
    with pytest.warns(UserWarning, match="takes the data set of the DataLoader"):
        engine, _, _, loader, _ = private(chain(), DataLoader(dataset, batch_size=7))
    assert loader.dataset is dataset
    assert engine.plan.dataset_size == 400
    with pytest.raises(EngineError, match="collate_fn"):
        private(chain(), DataLoader(dataset, batch_size=7, collate_fn=lambda records: records))


def test_a_checkpoint_continues_the_run(tmp_path):
    weights = []
    for interrupted in (False, True):
        engine, model, optimizer, loader, _ = private(chain(), epochs=2, expected_batch_size=100)
        train(optimizer, loader, engine)
        if interrupted:
            engine.save_checkpoint(tmp_path / "run.pt", extra={"epoch": 1})
            engine, model, optimizer, loader, _ = private(chain(seed=1), epochs=2, expected_batch_size=100)
            place_joints(model, ())
            assert engine.load_checkpoint(tmp_path / "run.pt") == {"epoch": 1}
        train(optimizer, loader, engine)
        assert engine.steps_left == 0
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert weights[0].shape == weights[1].shape
    with pytest.raises(CheckpointError, match="cannot be read"):
        engine.load_checkpoint(tmp_path / "none.pt")
    torch.save({"model": {}}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="save_checkpoint"):
        engine.load_checkpoint(tmp_path / "other.pt")


def test_the_sensitivity_prints_as_a_table():
    engine, *_ = private(chain())
    lines = str(engine.sensitivity()).splitlines()
    assert lines[0].split() == ["parameter", "X", "G", "Δ", "share"]
    assert len(lines) == len(engine.noise_stds()) + 2


def test_a_criterion_without_a_constant_is_refused():
    with pytest.raises(LossError):
        private(chain(), criterion=nn.MSELoss())


@pytest.mark.parametrize(("weight", "tau"), [(1e-20, 1e9), (0.0, 16.0), (math.nan, 16.0)])
def test_the_temperature_of_strange_weights_is_a_number_that_float32_can_take(weight, tau):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(weight)
    assert _temperature(model, gradient_norms(model, public_inputs((8,)), 1.0), 1.0) == tau
