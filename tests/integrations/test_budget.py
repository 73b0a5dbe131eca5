"""The callback that counts ε, and stops before a step that the budget does not pay for."""

from __future__ import annotations

import runpy
import sys

import pytest
from kit import train
from lightning_runs import Module, PrivacyBudget, callbacks, fit, trainer
from plain_loop import DELTA, QUIET, STEPS, net, plain, private, same

import lipdp
from lipdp.errors import EngineError, ParameterError
from lipdp.integrations.budget import steps_within

pytestmark = QUIET


@pytest.mark.parametrize("budget", [0.9, 1.5, 1.9])
def test_training_stops_before_a_step_that_the_budget_does_not_pay_for(budget, digits):
    weights, engine, run = fit(digits, budget=budget)
    taken = engine.steps_taken
    assert 0 < taken < STEPS
    assert engine.get_epsilon(DELTA) <= budget
    more = engine.accountant.epsilon([engine.plan.step_event.with_steps(taken + 1)], DELTA).epsilon
    assert more > budget
    assert float(run.callback_metrics["epsilon"]) == pytest.approx(engine.get_epsilon(DELTA), rel=1e-6)
    assert same(weights, plain(digits, steps=taken)[0])


def test_a_budget_that_pays_for_nothing_trains_nothing(digits):
    weights, engine, run = fit(digits, budget=0.01)
    assert engine.steps_taken == run.global_step == 0
    assert same(weights, net().state_dict())


@pytest.mark.parametrize("insist", [{"min_steps": STEPS}, {"min_epochs": 1}])
def test_a_trainer_that_goes_on_beyond_the_budget_is_refused(insist, digits):
    with pytest.raises(EngineError, match="pays for 5 steps"):
        fit(digits, budget=1.5, **insist)


def test_epsilon_is_logged_every_so_often(digits):
    seen = []

    class Watch(callbacks.Callback):
        def on_train_batch_end(self, trainer, *args):
            seen.append(float(trainer.callback_metrics.get("epsilon", 0.0)))

    engine = lipdp.PrivacyEngine("rdp", seed=0)
    watched = trainer(PrivacyBudget(engine, delta=DELTA, log_every=5), Watch())
    watched.fit(Module(engine, digits))
    steps = [engine.accountant.epsilon([engine.plan.step_event.with_steps(n)], DELTA).epsilon for n in (5, 10, STEPS)]
    assert seen[3] == 0
    assert sorted(set(seen)) == pytest.approx([0.0, *steps], rel=1e-6)


@pytest.mark.parametrize(
    "options", [{"delta": 0.0}, {"delta": 1.0}, {"delta": 1e-5, "epsilon": 0.0}, {"delta": 1e-5, "log_every": 0}]
)
def test_the_callback_names_bad_arguments(options):
    with pytest.raises(ParameterError, match=list(options)[-1]):
        PrivacyBudget(lipdp.PrivacyEngine(), **options)


def test_the_number_of_steps_counts_those_of_earlier_runs(digits):
    engine, model, *made = private(digits)
    alone = steps_within(engine, epsilon=1.5, delta=DELTA)
    train(model, *made, steps=3)
    assert steps_within(engine, epsilon=1.5, delta=DELTA) == alone - 3
    assert steps_within(engine, epsilon=float("inf"), delta=DELTA) == STEPS - 3
    engine.detach()
    private(digits, model, engine=engine)
    assert steps_within(engine, epsilon=1.5, delta=DELTA) == alone - 3
    assert steps_within(engine, epsilon=float("inf"), delta=DELTA) == STEPS
    with pytest.raises(ParameterError, match="epsilon"):
        steps_within(engine, epsilon=0.0, delta=DELTA)


def test_without_lightning_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    with pytest.raises(ParameterError, match=r'pip install "lipdp\[lightning\]"'):
        runpy.run_path(sys.modules[PrivacyBudget.__module__].__file__)
