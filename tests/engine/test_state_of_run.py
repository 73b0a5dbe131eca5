"""The state of a run: resumed bit for bit, refused under other facts; model and optimiser stay the user's own."""

from __future__ import annotations

import io
import itertools

import pytest
import torch
from kit import lipschitz_net, private, table, train, weights
from torch.nn import functional as F

import lipdp
from lipdp import losses
from lipdp.errors import CheckpointError, EngineError, ResumeError
from lipdp.privacy.gate import QuantileGate

pytestmark = pytest.mark.usefixtures("one_thread", "unjudged")

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


DEFAULT = {  # every pair of a kind, a seed and a sampling but three; the others are slow
    ("sgd", 0, "fixed_size"), ("momentum", None, "poisson"), ("momentum", 0, "fixed_size"), ("adam", 0, "poisson"),
    ("adam", None, "fixed_size"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "seed", "sampling"),
    [
        case if case in DEFAULT else pytest.param(*case, marks=pytest.mark.slow)
        for case in itertools.product(OPTIMIZERS, (0, None), ("poisson", "fixed_size"))
    ],
)
def test_a_resumed_run_ends_bit_identical(kind, seed, sampling):
    options = {"seed": seed, "sampling": sampling, "gate": QuantileGate(0.5, count_std=4.0)}
    engine, model, optimizer, loader, criterion, scheduler = scheduled(kind, **options)
    train(model, optimizer, loader, criterion, steps=2, after=scheduler.step)
    file = io.BytesIO()
    parts = {"model": model, "optimizer": optimizer, "engine": engine, "scheduler": scheduler}
    torch.save({name: part.state_dict() for name, part in parts.items()}, file)
    train(model, optimizer, loader, criterion, after=scheduler.step)

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again, model2, optimizer2, loader2, criterion2, scheduler2 = scheduled(kind, **options)
    for name, part in {"model": model2, "optimizer": optimizer2, "engine": again, "scheduler": scheduler2}.items():
        part.load_state_dict(saved[name])
    assert again.steps_taken == loader2.position == 2
    train(model2, optimizer2, loader2, criterion2, after=scheduler2.step)
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


def test_an_account_does_not_replace_that_of_other_steps():
    """Those of this engine would be left out: 7 steps were released, and the account said 4."""
    saved, own = private(seed=1), private(seed=2)
    train(*saved[1:], steps=4)
    train(*own[1:], steps=3)
    with pytest.raises(ResumeError, match="has released 3 steps"):
        own[0].load_state_dict(saved[0].state_dict())
    own[0].load_state_dict(own[0].state_dict())
    engine = own[0]
    engine.detach()
    private(engine=engine)
    with pytest.raises(ResumeError, match="has released 3 steps"):  # those of a run before this one
        engine.load_state_dict(saved[0].state_dict())


def test_what_is_not_a_state_is_refused():
    engine, *_ = private()
    with pytest.raises(CheckpointError, match="noise"):
        engine.load_state_dict({"plan": {}, "ledger": {}})
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
        optimizer.zero_grad()
        with pytest.raises(EngineError, match="restored after 2 private steps but the account has 0"):
            train(model, optimizer, loader, criterion, steps=1)
    again.load_state_dict(state["engine"])
    train(model, optimizer, loader, criterion)
    assert again.steps_taken == 5
    optimizer.load_state_dict(state["optimizer"])  # an earlier one: the account has more steps, which is safe
    again.detach()
    assert "lipdp_steps" not in optimizer.state_dict()["param_groups"][0]


def test_the_account_of_a_run_is_one_object():
    """Another one in its place would hold none of the steps to come: ε was 0 after three of them."""
    engine, *run = private()
    with pytest.raises(AttributeError, match="ledger"):
        engine.ledger = lipdp.accounting.Ledger()
    train(*run, steps=3)
    assert engine.ledger.steps == 3


def test_a_batch_that_a_checkpoint_leaves_unused_is_a_step_of_the_account():
    """Else whoever saves and loads skips batches, the empty ones say, uncounted."""
    engine, *run = private(steps=6)
    train(*run, steps=2)
    for _ in range(2):
        next(iter(run[2]))
        engine.load_state_dict(engine.state_dict())
    assert (engine.steps_taken, run[2].position) == (4, 4)
    train(*run)
    assert engine.steps_taken == 6
    looked = private()
    next(iter(looked[3]))
    looked[0].load_state_dict(looked[0].state_dict())
    assert looked[0].steps_taken == 1


def test_an_account_does_not_replace_that_of_an_earlier_run():
    """Of as many steps, but other ones: ε fell from 33 to 3. Of equal ones too: they were taken twice."""
    saved, own = lipdp.PrivacyEngine("rdp", seed=1), lipdp.PrivacyEngine("rdp", seed=2)
    for engine, sigma in ((saved, 30.0), (own, 0.3)):
        train(*private(engine=engine, noise_multiplier=sigma)[1:], steps=3)
        engine.detach()
        private(engine=engine)
    with pytest.raises(ResumeError, match="has released 3 steps"):
        own.load_state_dict(saved.state_dict())
    fresh, *rest = private(engine=lipdp.PrivacyEngine("rdp", seed=3))
    fresh.load_state_dict(saved.state_dict())
    assert fresh.ledger.events == saved.ledger.events
    train(*rest)
    assert fresh.steps_taken == 8
