"""What any attack can reach, from the privacy loss distribution: against the Gaussian mechanism and the best attack."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from scipy.special import ndtr, ndtri

from lipdp.accounting import Event, Relation, epsilon, trade_off
from lipdp.cli import main
from lipdp.errors import AccountingError, ParameterError

ADD, REPLACE = Relation.ADD_OR_REMOVE_ONE, Relation.REPLACE_ONE


@pytest.mark.parametrize("relation", [ADD, REPLACE])
@pytest.mark.parametrize(("sigma", "steps"), [(1.0, 1), (2.0, 4), (10.8, 60), (0.5, 1)])
def test_without_sampling_it_is_the_gaussian_mechanism(sigma, steps, relation):
    curve, mu = trade_off([Event(sigma, 1.0, steps, relation)]), math.sqrt(steps) / sigma
    for alpha in (1e-3, 1e-2, 0.1, 0.5):
        exact = float(ndtr(ndtri(alpha) + mu))
        assert exact <= curve.tpr(alpha) <= 1.005 * exact  # so 5 % less noise is rejected
    assert mu <= curve.mu <= 1.01 * mu


@pytest.mark.parametrize(("q", "sigma"), [(0.1, 0.8), (0.3, 1.0), (0.02, 2.0)])
def test_one_sampled_step_bounds_the_best_attack_in_both_directions(q, sigma):
    """The likelihood ratio of mix = (1 − q) N(0) + q N(1) over N(0) is increasing: every best attack is a threshold."""
    curve = trade_off([Event(sigma, q, 1)])
    x = np.linspace(-8.0 * sigma, 1.0 + 8.0 * sigma, 20_001)
    out, within = ndtr(-x / sigma), (1.0 - q) * ndtr(-x / sigma) + q * ndtr((1.0 - x) / sigma)
    for false, true in ((out, within), (1.0 - within, 1.0 - out)):
        for alpha in (0.001, 0.01, 0.2):
            best = true[false <= alpha].max()
            assert best <= curve.tpr(alpha)
        tight = true[false <= 0.2].max()
    assert curve.tpr(0.2) <= 1.02 * max(tight, within[out <= 0.2].max())


def test_the_gaussian_statement_holds_at_every_epsilon():
    event = Event(1.0, 0.01, 1000)
    curve = trade_off([event])
    mu = curve.mu
    for delta in (1e-3, 1e-5, 1e-7):
        exact = epsilon(noise_multiplier=1.0, sampling_rate=0.01, steps=1000, delta=delta, accountant="pld")
        assert (
            exact <= epsilon(noise_multiplier=1 / mu, sampling_rate=1.0, steps=1, delta=delta, accountant="prv") * 1.001
        )
    assert not curve._below(0.99 * mu)


def test_more_false_alarms_more_noise_and_fewer_steps():
    event = Event(1.0, 0.01, 1000)
    curve = trade_off([event])
    assert 0.001 < curve.tpr(0.001) < curve.tpr(0.01) < curve.tpr(0.5) <= 1.0
    assert trade_off([event.with_steps(100)]).tpr(0.01) < curve.tpr(0.01)
    assert trade_off([Event(2.0, 0.01, 1000)]).mu < curve.mu
    two = trade_off([event.with_steps(500), event.with_steps(500)])
    assert two.tpr(0.01) == curve.tpr(0.01)


def test_what_is_out_of_reach_is_refused():
    with pytest.raises(ParameterError, match="no steps"):
        trade_off([Event(1.0, 0.1, 0)])
    with pytest.raises(AccountingError, match="rounding"):
        trade_off([Event(50.0, 0.01, 10**6)])
    with pytest.raises(ParameterError, match=r"a false-positive rate of 1\.0"):
        trade_off([Event(1.0, 1.0, 1)]).tpr(1.0)


def test_the_command_shows_it(capsys):
    arguments = ["epsilon", "--noise-multiplier", "2", "--sampling-rate", "1", "--steps", "4", "--tpr", "0.01", "0.001"]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tpr"]["0.01"] == pytest.approx(0.0924, abs=1e-3)
    assert found["mu"] == pytest.approx(1.0, rel=0.01)
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert "with 0.001 false alarms, an attack finds at most 0.0183 of who took part" in shown
    assert "μ = 1.003 (Gaussian DP, up to a δ of 1e-10)" in shown
