"""The account is that of the steps taken, and steps, batches and losses come in the one order that it holds for."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from kit import lipschitz_net, private, table, train, weights
from torch.nn import functional as F

import lipdp
from lipdp import losses
from lipdp.errors import BudgetSpentWarning, EngineError, ParameterError

pytestmark = pytest.mark.usefixtures("one_thread", "unjudged")

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
    assert engine.plan.target_epsilon == 2.0
    assert engine.plan.seeded


def test_the_sampling_rate_comes_from_the_public_size():
    engine, *_, loader, _ = private(dataset=table(200), dataset_size=1000, expected_batch_size=100)
    assert engine.plan.sampling_rate == loader.sampler.sampling_rate == 0.1
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


def test_of_two_threads_that_step_at_once_one_is_refused(monkeypatch):
    """Both had found the batch unused before the other one had used it: one subsample, two releases."""
    engine, model, optimizer, loader, criterion = private()
    x, y = next(iter(loader))
    criterion(model(x), y).backward()
    sweep = engine._hooks.graph.sweep
    monkeypatch.setattr(engine._hooks.graph, "sweep", lambda start: (time.sleep(0.3), sweep(start))[1])
    with ThreadPoolExecutor() as pool:
        errors = [future.exception() for future in [pool.submit(optimizer.step) for _ in range(2)]]
    assert [type(error) for error in errors if error] == [EngineError]
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
    x, y = next(batches)
    criterion(model(x[:5]), y[:5]).backward()  # few enough to look like one batch
    with pytest.raises(EngineError, match="no private step followed"):
        next(batches)
    optimizer.zero_grad()
    next(iter(loader))
    with pytest.raises(EngineError, match="no gradient went through the criterion"):
        optimizer.step()


def test_a_look_at_the_first_batch_counts_as_a_step_and_no_later_one_is_skipped():
    """Batches were drawn until one suited, and the step on it was told to be the first: ε 0.2, where 1.1 was due."""
    engine, model, optimizer, loader, criterion = private()
    next(iter(loader))
    train(model, optimizer, loader, criterion, steps=2)
    next(iter(loader))
    with pytest.raises(EngineError, match="skipped"):
        train(model, optimizer, loader, criterion, steps=1)
    assert engine.steps_taken == 3


@pytest.mark.parametrize("way", ["two losses", "two backwards", "twice the batch"])
def test_a_record_counts_once(way):
    engine, model, optimizer, loader, criterion = private()
    x, y = next(iter(loader))

    def use():
        if way == "two losses":
            (criterion(model(x), y) + criterion(model(x), y)).backward()
        elif way == "two backwards":
            loss = criterion(model(x), y)
            loss.backward(retain_graph=True)
            loss.backward()
        else:
            criterion(model(torch.cat([x, x])), torch.cat([y, y])).backward()
        optimizer.step()

    with pytest.raises(EngineError, match=r"more than once|cannot tell that every row"):
        use()
    assert engine.steps_taken == 0


def test_another_criterion_is_refused():
    engine, model, optimizer, loader, _ = private()
    x, y = next(iter(loader))
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(EngineError, match="criterion that make_private returned"):
        optimizer.step()
    assert engine.steps_taken == 0
