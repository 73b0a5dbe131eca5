"""From a budget to (B, σ, T): the account of TAN beside the exact one, the choice, the search and what it costs."""

from __future__ import annotations

import json
import math
import random
import re
from dataclasses import replace

import numpy as np
import pytest
from dp_accounting import dp_event
from dp_accounting.rdp import RdpAccountant
from hypothesis import given, settings
from hypothesis import strategies as st
from kit import refusal

import lipdp
from lipdp import planning
from lipdp.accounting.events import Event
from lipdp.cli import main
from lipdp.errors import AccountingError, CalibrationError, ParameterError, UnknownNameError
from lipdp.planning import (
    Budget,
    Plan,
    Repetitions,
    constant_eta,
    eta_for,
    evaluate,
    iso_budget,
    plan,
    rule,
    tan_epsilon,
    tan_eta,
)
from lipdp.planning.budget import with_batch_size, with_noise_multiplier
from lipdp.planning.repetitions import SHAPES, _bounded

pytestmark = pytest.mark.usefixtures("one_thread")

CIFAR = {"records": 50_000, "batch_size": 4096, "noise_multiplier": 3.0, "steps": 2500, "delta": 1e-5}
IMAGENET = {"records": 1_281_167, "batch_size": 32_768, "noise_multiplier": 2.5, "steps": 18_000, "delta": 8e-7}


# --- the total amount of noise ----------------------------------------------------------------------------------------


def test_eta_and_tan_epsilon_are_the_published_formulas():
    q, sigma, steps = 0.08, 3.0, 2500
    assert tan_eta(noise_multiplier=sigma, sampling_rate=q, steps=steps) ** 2 == pytest.approx(
        q**2 * steps / (2 * sigma**2)
    )
    assert tan_epsilon(0.5, 1e-5) == pytest.approx(0.25 + math.sqrt(math.log(1e5)), rel=1e-12)
    assert tan_epsilon(0.0, 1e-5) == 0.0


@given(st.floats(1e-3, 100.0), st.floats(1e-12, 0.5))
@settings(deadline=None)
def test_eta_for_inverts_tan_epsilon(epsilon, delta):
    assert tan_epsilon(eta_for(epsilon, delta), delta) == pytest.approx(epsilon, rel=1e-9)


@given(st.floats(0.01, 1.0), st.floats(0.1, 50.0), st.integers(1, 10**5), st.floats(1.0, 128.0))
@settings(deadline=None)
def test_eta_is_kept_by_scaling_the_batch_with_the_noise(q, sigma, steps, k):
    small = tan_eta(noise_multiplier=sigma / k, sampling_rate=q / k, steps=steps)
    assert small == pytest.approx(tan_eta(noise_multiplier=sigma, sampling_rate=q, steps=steps), rel=1e-12)


@pytest.mark.parametrize("setting", [CIFAR, IMAGENET])
def test_tan_is_close_from_two_on_and_far_off_behind_the_wall(setting):
    at = evaluate(**setting)
    far, two, four, eight = (
        e for _, e in constant_eta(at.eta, steps=at.steps, delta=at.delta, noise_multipliers=(0.4, 2, 4, 8))
    )
    for exact in (two, four, eight):
        assert 0.80 * at.tan_epsilon < exact < 1.0 * at.tan_epsilon
    assert far > 5 * at.tan_epsilon
    assert two > four > eight  # more compute at constant η always helps,
    assert two < 1.12 * eight  # but little beyond 2


def test_the_published_settings_accounted_exactly():
    cifar, imagenet = evaluate(**CIFAR), evaluate(**IMAGENET)
    assert cifar.epsilon == pytest.approx(6.61, abs=0.04)
    assert imagenet.epsilon == pytest.approx(7.5, abs=0.04)
    assert (cifar.samples, imagenet.samples) == (10_240_000, 589_824_000)
    assert evaluate(**CIFAR, accountant="rdp").epsilon == pytest.approx(7.10, abs=0.05)


def test_without_subsampling_there_is_no_wall():
    """At q = 1 the exact ε depends on η alone: (σ, T) → (2σ, 4T)."""
    one = evaluate(records=100, batch_size=100, noise_multiplier=0.4, steps=1, delta=1e-5)
    four = evaluate(records=100, batch_size=100, noise_multiplier=0.8, steps=4, delta=1e-5)
    assert one.epsilon == pytest.approx(four.epsilon, rel=0.01)
    assert one.move.factor == 1.0


def test_the_rule_ends_in_the_sweet_spot_from_anywhere():
    for start in (0.05, 0.49, 1.999, 2.0, 4.0, 4.001, 77.0):
        sigma = start
        for _ in range(20):
            sigma *= rule(sigma).factor
        assert 2.0 <= sigma <= 4.0
    assert "wall" in rule(0.49).reason
    assert "wall" not in rule(0.51).reason


# --- plans ------------------------------------------------------------------------------------------------------------


def test_a_plan_keeps_its_budget_and_lies_in_the_sweet_spot():
    found = plan(Budget(50_000, 8.0, 1e-5), steps=400, beside=[(4096, 3.0, 400)])
    chosen = found.chosen
    exact = lipdp.epsilon(
        noise_multiplier=chosen.noise_multiplier,
        sampling_rate=chosen.expected_batch_size / 50_000,
        steps=400,
        delta=1e-5,
    )
    assert chosen.epsilon == exact
    assert 0.995 * 8 <= exact <= 8
    assert chosen.noise_multiplier == pytest.approx(3.0, rel=0.02)
    assert chosen.steps == 400
    assert found.beside == (evaluate(**{**CIFAR, "steps": 400}),)


@pytest.mark.parametrize("epochs", [100.0, 20.0, 5.0])
def test_a_plan_stays_within_its_compute_limit(epochs):
    limit = int(epochs * 50_000)
    chosen = planning.budget._choose(Budget(50_000, 8.0, 1e-5, "rdp"), None, limit)
    assert 0.7 * limit <= chosen.samples <= limit
    assert 7.96 <= chosen.epsilon <= 8.0
    assert chosen.noise_multiplier >= 1.99 or chosen.sampling_rate == 1.0


def test_given_steps_are_kept_even_below_the_sweet_spot():
    chosen = planning.budget._choose(Budget(50_000, 8.0, 1e-5, "rdp"), 1000, 500_000)
    assert (chosen.steps, chosen.expected_batch_size) == (1000, 500)
    assert chosen.noise_multiplier < 2.0
    assert chosen.move.factor == 2.0


@pytest.mark.parametrize("sigma", [0.7, 6.0])
def test_a_noise_multiplier_is_met(sigma):
    point = with_noise_multiplier(Budget(60_000, 2.0, 1e-5, "pld"), sigma, 300)
    assert point.noise_multiplier == pytest.approx(sigma, rel=0.02)
    assert 1.99 <= point.epsilon <= 2.0


def test_a_batch_beyond_all_records_is_all_records():
    point = with_noise_multiplier(Budget(1000, 8.0, 1e-4, "rdp"), 30.0, 20)
    assert point.expected_batch_size == 1000
    assert point.noise_multiplier < 30.0


def test_points_that_nothing_reaches_are_left_out():
    budget = Budget(10**6, 1.0, 1e-5, "rdp")  # one step of one record: δ is above the chance to be used at all
    assert [point.expected_batch_size for point in iso_budget(budget, 1, [1, 10**5])] == [10**5]
    with pytest.raises(CalibrationError, match="δ=1e-05"):
        with_batch_size(budget, 1, 1)


@pytest.mark.parametrize(
    "call",
    [
        lambda: Budget(0, 1.0, 1e-5),
        lambda: Budget(100, 0.0, 1e-5),
        lambda: Budget(100, math.inf, 1e-5),
        lambda: Budget(100, 1.0, 1.0),
        lambda: Budget(100, 1.0, 1e-5, "gdp"),
        lambda: plan(Budget(100, 1.0, 1e-5), steps=0),
        lambda: plan(Budget(100, 1.0, 1e-5), max_samples=-1),
        lambda: plan(Budget(100, 1.0, 1e-5, "rdp"), steps=50, max_samples=10),
        lambda: with_batch_size(Budget(100, 1.0, 1e-5), 101, 10),
        lambda: evaluate(**{**CIFAR, "noise_multiplier": 0.0}),
        lambda: tan_eta(noise_multiplier=1.0, sampling_rate=1.5, steps=1),
        lambda: tan_eta(noise_multiplier=1.0, sampling_rate=0.5, steps=0),
        lambda: tan_eta(noise_multiplier=math.nan, sampling_rate=0.5, steps=1),
        lambda: tan_epsilon(-1.0, 1e-5),
        lambda: rule(-1.0),
    ],
)
def test_refusals_of_plans(call):
    with pytest.raises((ParameterError, UnknownNameError), match=r"needed|Known|less than one record|or fewer"):
        call()


# --- the cost of a private search -------------------------------------------------------------------------------------


def theorem_2(orders, rho, shape, gamma, mean):
    """Papernot & Steinke 2022, theorem 2, written down again; the least over both orders."""
    orders, rho = np.asarray(orders), np.asarray(rho)
    constant = (1 + shape) * np.min((1 - 1 / orders) * rho + math.log(1 / gamma) / orders)
    return rho + constant + math.log(mean) / (orders - 1)


@pytest.mark.parametrize("mean", [2.0, 10.0, 100.0])
def test_a_geometric_search_costs_what_theorem_2_says(mean):
    event, orders = Event(2.0, 0.02, 500), (*(1 + k / 10 for k in range(1, 100)), *range(11, 65), 96, 128, 256, 512)
    one = RdpAccountant(list(orders))
    one.compose(dp_event.PoissonSampledDpEvent(0.02, dp_event.GaussianDpEvent(2.0)), 500)
    search = theorem_2(orders, one.rdp, 1.0, 1 / mean, mean)
    expected = min(d + math.log1p(-1 / a) - math.log(1e-5 * a) / (a - 1) for a, d in zip(orders, search, strict=True))
    assert Repetitions("geometric", mean).epsilon(event, 1e-5) == pytest.approx(expected, rel=2e-3)
    assert Repetitions(1.0, mean).epsilon(event, 1e-5) == Repetitions("geometric", mean).epsilon(event, 1e-5)


@pytest.mark.parametrize(("law", "factor"), [("logarithmic", 2.0), ("geometric", 3.0), (0.5, 2.5)])
def test_a_pure_run_of_epsilon_costs_two_plus_s_times_as_much(law, factor):
    """Corollary 3 of the source. The orders end at 1024, where ln E[K]/(α−1) and the conversion leave a little."""
    laplace = dp_event.LaplaceDpEvent(1 / 0.5)  # ε = 1/2
    shape = SHAPES.get(law, law)
    cost = _bounded(dp_event.RepeatAndSelectDpEvent(laplace, 5.0, shape), 1e-12)
    assert 0.9 * factor * 0.5 < cost < factor * 0.5 + 0.04


def test_a_search_costs_more_than_a_run_and_little_more_for_more_runs():
    event = Event(3.0, 0.08, 500)
    run = lipdp.epsilon(noise_multiplier=3.0, sampling_rate=0.08, steps=500, delta=1e-5, accountant="rdp")
    for law in ("logarithmic", "geometric", "poisson"):
        costs = [Repetitions(law, mean).epsilon(event, 1e-5) for mean in (1.5, 10.0, 100.0)]
        assert run < costs[0] < costs[1] < costs[2]
    many = Repetitions("logarithmic", 100.0).epsilon(event, 1e-5)
    released = lipdp.epsilon(noise_multiplier=3.0, sampling_rate=0.08, steps=50_000, delta=1e-5, accountant="rdp")
    assert many < 2.2 * run
    assert released > 10 * run
    least = [Repetitions(law, 10.0).epsilon(event, 1e-5) for law in ("logarithmic", 0.5, "geometric")]
    assert least == sorted(least)


def test_a_search_within_a_budget():
    search = Repetitions("geometric", 10.0)
    sigma = search.calibrate(target_epsilon=4.0, sampling_rate=0.05, steps=300, delta=1e-5)
    assert 0.995 * 4 <= search.epsilon(Event(sigma, 0.05, 300), 1e-5) <= 4.0
    assert sigma > lipdp.calibrate(target_epsilon=4.0, sampling_rate=0.05, steps=300, delta=1e-5, accountant="rdp")


@pytest.mark.statistical
@pytest.mark.parametrize("law", ["logarithmic", "geometric", "poisson", 0.5, 3.0])
def test_the_number_of_repetitions_has_its_mean(law):
    """Mean of 20 000 draws with a fixed seed; the standard error is below 1.3 % for all these laws."""
    search, rng = Repetitions(law, 6.0), random.Random(1)
    drawn = [search.draw(rng) for _ in range(20_000)]
    assert np.mean(drawn) == pytest.approx(6.0, rel=0.05)
    assert min(drawn) == (0 if law == "poisson" else 1)
    if law == "geometric":
        assert np.mean([k == 1 for k in drawn]) == pytest.approx(1 / 6, abs=0.012)


def test_one_run_is_one_run():
    assert Repetitions("geometric", 1.0).draw() == 1
    assert Repetitions("logarithmic", 1.0).draw() == 1
    assert Repetitions("poisson", 3.0).draw() >= 0


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda: Repetitions("binomial", 10), UnknownNameError),
        (lambda: Repetitions("geometric", 0.5), ParameterError),
        (lambda: Repetitions("poisson", 10**4), ParameterError),
        (lambda: Repetitions(-0.5, 10), ParameterError),
        (lambda: Repetitions(math.inf, 10), ParameterError),
        (lambda: Repetitions("geometric", 10).epsilon(Event(1.0, 0.1, 1, "replace_one"), 1e-5), AccountingError),
        (
            lambda: Repetitions("geometric", 10).calibrate(target_epsilon=0, sampling_rate=0.1, steps=1, delta=1e-5),
            ParameterError,
        ),
        (
            lambda: Repetitions("geometric", 10).calibrate(target_epsilon=1e-6, sampling_rate=1, steps=99, delta=1e-9),
            CalibrationError,
        ),
    ],
)
def test_refusals_of_private_searches(call, error):
    with pytest.raises(error):
        call()


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_run_named_is_the_plan_to_the_last_digit(capsys):
    exact = ["--epsilon", "1.23456789", "--delta", "1.23456789e-06"]
    assert main(["plan", "--records", "5000", *exact, "--steps", "20", "--accountant", "rdp", "--json"]) == 0
    assert " ".join(exact) in json.loads(capsys.readouterr().out)["command"]


PLAN = ["plan", "--records", "60000", "--epsilon", "2", "--delta", "1e-5", "--steps", "100", "--accountant", "rdp"]


def test_the_command_writes_a_plan_and_names_the_run(tmp_path, capsys):
    extra = ["--dataset", "mnist", "--beside", "4096,3,100", "--private-search", "geometric", "--repetitions", "5"]
    assert main([*PLAN, *extra, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    written = json.loads((tmp_path / "plan.json").read_text())
    chosen = written["chosen"]
    assert written["command"] in printed
    assert written["command"] == (
        f"lipdp train --dataset mnist --epsilon 2 --delta 1e-05 --batch-size {chosen['batch_size']} --steps 100"
        " --accountant rdp"
    )
    assert written["relation"] == "add_or_remove_one"
    assert "sweet spot" in printed
    assert "the same total noise at σ = 0.5" in printed
    assert written["private_search"]["epsilon_at_plan"] > 2 > 0
    assert written["private_search"]["noise_multiplier_within_budget"] > chosen["noise_multiplier"]
    assert written["beside"][0]["batch_size"] == 4096
    curve = written["iso_budget"]
    assert chosen in curve
    assert all(0.99 * 2 <= point["epsilon"] <= 2 for point in curve)
    noises, etas = ([point[name] for point in curve] for name in ("noise_multiplier", "eta"))
    assert noises == sorted(noises)
    assert etas == sorted(etas)  # a larger batch buys more signal for the same ε,
    assert etas[-1] < 1.12 * chosen["eta"]  # but hardly any beyond the sweet spot
    wall = [point["epsilon"] for point in written["constant_eta"]]
    assert wall == sorted(wall, reverse=True)
    for name in ("epsilon-against-noise", "batch-against-compute"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert b"<svg" in (tmp_path / f"{name}.svg").read_bytes()


def test_a_plan_of_truncated_batches_pays_for_them(capsys, monkeypatch):
    monkeypatch.setattr(planning.budget, "_CURVE", (0.5, 8))
    assert main([*PLAN, "--truncated-batch-size", "1000"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "(add or remove one record), at most 1,000 a batch" in printed
    assert re.search(r"--batch-size 853 --steps 100 --accountant rdp --truncated-batch-size 1000$", printed)
    free = Budget(60_000, 2.0, 1e-5, "pld")
    cut = replace(free, truncated_batch_size=1000)
    assert cut.drawn(1 / 60, 100).truncation > 0.4
    found, plain = (with_batch_size(budget, 1000, 100) for budget in (cut, free))
    assert found.noise_multiplier > 1.2 * plain.noise_multiplier
    assert 1.98 <= found.epsilon <= 2.0
    assert found.subsampling == cut.drawn(found.sampling_rate, 100)
    wall = Plan(cut, None, found).constant_eta
    assert wall[-1][1] > 1.2 * constant_eta(found.eta, steps=100, delta=1e-5)[-1][1]


def test_the_command_as_json(capsys, monkeypatch):
    monkeypatch.setattr(planning.budget, "_CURVE", ())
    assert main([*PLAN[:-4], "--max-epochs", "8", "--accountant", "rdp", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["chosen"]["samples"] <= found["max_samples"] == 480_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan"], "give --records"),
        (["plan", "--records", "100"], "give --records"),
        ([*PLAN, "--max-epochs", "5", "--max-samples", "5"], "both given"),
        ([*PLAN, "--max-epochs", "-5"], "> 0"),
        ([*PLAN, "--beside", "4096,3"], "B,σ,T"),
        ([*PLAN, "--repetitions", "3"], "--private-search"),
        ([*PLAN, "--private-search", "binomial"], "unknown law"),
        ([*PLAN, "--private-search", "-1"], "shape"),
        ([*PLAN, "--private-search", "geometric", "--repetitions", "0"], "--repetitions 0"),
        ([*PLAN, "--private-search", "geometric", "--truncated-batch-size", "9000"], "got truncated ones"),
        ([*PLAN, "--truncated-batch-size", "70000"], "--truncated-batch-size 70000: a whole number from"),
    ],
)
def test_the_command_refuses_in_one_line(arguments, message, capsys):
    assert message in refusal(arguments, capsys)
