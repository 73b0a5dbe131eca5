"""An optimiser's closure: evaluated once, its gradient has its noise, and every way around that is refused."""

from __future__ import annotations

import pytest
import torch
from kit import lipschitz_net, plain_net, private, table, weights
from torch import nn

from lipdp.errors import EngineError, OptimizerError

pytestmark = pytest.mark.usefixtures("one_thread", "unjudged")


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
        criterion(model(x), y).backward()

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
