"""ε: against an independent fine account, closed forms, integration of worst cases, and wrong values to reject."""

import functools
import itertools
import json
import logging
import math

import numpy as np
import pytest
from dp_accounting import dp_event
from dp_accounting.pld import PLDAccountant, privacy_loss_distribution, privacy_loss_mechanism
from dp_accounting.privacy_accountant import NeighboringRelation
from dp_accounting.rdp import RdpAccountant
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prv_accountant import PoissonSubsampledGaussianMechanism
from prv_accountant import PRVAccountant as LibraryPRVAccountant
from scipy.optimize import brentq
from scipy.special import log_ndtr, ndtr
from scipy.stats import norm

from lipdp.accounting import accountants as accounting
from lipdp.accounting import numerics, waiting
from lipdp.accounting.accountants import epsilon, get_accountant
from lipdp.accounting.calibration import EpsilonCurve, calibrate
from lipdp.accounting.events import Event, Ledger, joint_noise_multiplier, remaining_noise_multiplier
from lipdp.accounting.privacy_loss import AddLoss, RemoveLoss, ReplaceLoss, renyi
from lipdp.accounting.relation import Relation
from lipdp.accounting.rough import rough_epsilon
from lipdp.errors import AccountingError, CalibrationError, ParameterError, UnknownNameError

ADD, REPLACE = Relation.ADD_OR_REMOVE_ONE, Relation.REPLACE_ONE
NAMES = ("prv", "pld", "rdp")

GRID = list(itertools.product((0.001, 0.01, 0.1), (0.6, 1.0, 2.0, 8.0), (100, 10_000), (1e-5, 1e-7)))
QUICK = {
    (0.001, 0.6, 100, 1e-5),  # rare events: ε far from the central limit, Rényi 2.9 times too large
    (0.001, 8.0, 100, 1e-5),  # the smallest ε: 0.0026
    (0.01, 1.0, 10_000, 1e-5),
    (0.1, 0.6, 10_000, 1e-7),  # the largest: 493
    (0.1, 2.0, 100, 1e-5),
    (0.1, 8.0, 10_000, 1e-7),
}


def bound(name, events, delta):
    return get_accountant(name).epsilon(events, delta)


def reference(events, delta):
    return _reference(tuple(events), delta)


@functools.cache
def _reference(events, delta):
    """dp-accounting's PLD at an interval of 3 % of the std of one step's loss, at most 0.003: 0.01 % from its limit."""
    deviations = [event.sampling_rate * math.sqrt(math.expm1(event.noise_multiplier**-2)) for event in events]
    interval = min(0.03 * min(deviations), 0.003)
    total = privacy_loss_distribution.identity(interval)
    for event in events:
        total = total.compose(
            privacy_loss_distribution.from_gaussian_mechanism(
                event.noise_multiplier, sampling_prob=event.sampling_rate, value_discretization_interval=interval
            ).self_compose(event.steps)
        )
    return total.get_epsilon_for_delta(delta)


def agrees(value, truth):
    """The contract: never more than 0.1 % below, at most 1 % above."""
    return 0.999 * truth <= value <= 1.01 * truth


def gaussian_epsilon(mu, delta):
    """Exact ε of the Gaussian mechanism: Balle & Wang (2018), theorem 8."""
    return brentq(lambda e: ndtr(mu / 2 - e / mu) - math.exp(e + log_ndtr(-mu / 2 - e / mu)) - delta, 0, 2000)


# -- against an independent account ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("q", "sigma", "steps", "delta"),
    [cell if cell in QUICK else pytest.param(*cell, marks=pytest.mark.slow) for cell in GRID],
)
def test_all_accountants_against_a_fine_pld(q, sigma, steps, delta):
    events = [Event(sigma, q, steps)]
    truth = reference(events, delta)
    prv, pld, rdp = (bound(name, events, delta) for name in NAMES)
    assert (prv.accountant, pld.accountant, rdp.accountant) == NAMES
    assert agrees(prv.epsilon, truth)
    assert agrees(pld.epsilon, truth)
    assert pld.epsilon <= 1.001 * truth
    assert rdp.epsilon >= 0.999 * truth


def test_the_comparison_rejects_a_slightly_wrong_mechanism():
    truth = reference([Event(1.0, 0.01, 1000)], 1e-5)
    assert agrees(bound("prv", [Event(1.0, 0.01, 1000)], 1e-5).epsilon, truth)
    for wrong in (Event(1.02, 0.01, 1000), Event(0.98, 0.01, 1000), Event(1.0, 0.01, 950), Event(1.0, 0.0103, 1000)):
        assert not agrees(bound("prv", [wrong], 1e-5).epsilon, truth)


def test_where_dp_accountings_default_grid_is_too_coarse_the_finer_one_agrees_with_prv():
    events, delta = [Event(8.0, 0.001, 10_000)], 1e-5
    default = privacy_loss_distribution.from_gaussian_mechanism(8.0, sampling_prob=0.001).self_compose(10_000)
    assert default.get_epsilon_for_delta(delta) > 1.05 * reference(events, delta)
    assert agrees(bound("prv", events, delta).epsilon, reference(events, delta))


def test_prv_accountants_own_class_brackets_the_answer():
    mechanism = PoissonSubsampledGaussianMechanism(sampling_probability=0.03, noise_multiplier=1.5)
    library = LibraryPRVAccountant(mechanism, max_self_compositions=300, eps_error=0.01, delta_error=1e-8)
    low, estimate, _ = library.compute_epsilon(1e-5, [300])
    ours = epsilon(noise_multiplier=1.5, sampling_rate=0.03, steps=300, delta=1e-5)
    assert low <= estimate <= ours <= 1.008 * estimate


# -- the privacy loss of one step --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("q", "sigma"), [(0.001, 0.6), (0.2, 1.0), (0.03, 8.0), (1.0, 2.0)])
def test_losses_have_the_distribution_they_should(q, sigma):
    event = Event(sigma, q, 1)
    x = np.linspace(0.5 - 8 * sigma, 0.5 + 8 * sigma + 1, 801)
    ratio = (2 * x - 1) / (2 * sigma**2)
    loss = np.log1p(q * np.expm1(ratio)) if q < 1 else ratio
    mix = (1 - q) * norm.cdf(x / sigma) + q * norm.cdf((x - 1) / sigma)
    apart = np.gradient(loss, x) > 1e-9  # where ℓ is flat its inverse has no digits
    np.testing.assert_allclose(RemoveLoss(event).cdf(loss)[apart], mix[apart], atol=1e-7)
    np.testing.assert_allclose(AddLoss(event).cdf(-loss)[apart], norm.sf(x / sigma)[apart], atol=1e-7)
    up = loss > 0
    np.testing.assert_allclose(ReplaceLoss(event).cdf(loss[up]), mix[up], atol=1e-7)
    np.testing.assert_allclose(ReplaceLoss(event).cdf(-loss[up]), norm.sf(x / sigma)[up], atol=1e-7)
    library = PoissonSubsampledGaussianMechanism(sampling_probability=q, noise_multiplier=sigma)
    t = np.linspace(-2, 12, 500)
    np.testing.assert_allclose(RemoveLoss(event).cdf(t), library.cdf(np.longdouble(t)).astype(float), atol=1e-12)


@pytest.mark.parametrize(("q", "sigma"), [(0.01, 0.6), (0.2, 1.0), (0.03, 8.0), (1.0, 0.05), (1e-4, 5.0)])
def test_means_of_the_losses(q, sigma):
    """Against plain sums of density times loss; remove is integrated with the mixture's own density."""
    x = np.linspace(-20 * sigma, 1 + 20 * sigma, 400_001)
    ratio = (2 * x - 1) / (2 * sigma**2)
    loss = np.log1p(q * np.expm1(ratio)) if q < 1 else ratio
    cell, alone, mix = x[1] - x[0], norm.pdf(x, 0, sigma), (1 - q) * norm.pdf(x, 0, sigma) + q * norm.pdf(x, 1, sigma)
    half = np.where(loss > 0, loss, 0.0)
    event = Event(sigma, q, 1)
    assert RemoveLoss(event).mean() == pytest.approx(float((mix * loss).sum() * cell), rel=1e-6, abs=1e-14)
    assert AddLoss(event).mean() == pytest.approx(float((alone * -loss).sum() * cell), rel=1e-6, abs=1e-14)
    assert ReplaceLoss(event).mean() == pytest.approx(float(((mix - alone) * half).sum() * cell), rel=1e-6, abs=1e-14)


def test_both_directions_of_add_or_remove_are_needed_for_the_claim_and_are_computed():
    """At one step the accounts of both directions are known in closed form; the maximum is returned."""
    kinds = privacy_loss_mechanism.AdjacencyType
    for q, sigma in [(0.01, 1.0), (0.3, 0.7), (0.5, 3.0)]:
        found = bound("prv", [Event(sigma, q, 1)], 1e-4).epsilon
        exact = {
            kind: brentq(
                lambda e, kind=kind, q=q, sigma=sigma: (
                    privacy_loss_mechanism.GaussianPrivacyLoss(
                        sigma, sampling_prob=q, adjacency_type=kind
                    ).get_delta_for_epsilon(e)
                    - 1e-4
                ),
                -1,
                20,
            )
            for kind in (kinds.ADD, kinds.REMOVE)
        }
        assert agrees(found, max(exact.values()))
        assert not agrees(found, exact[kinds.ADD])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("relation", [ADD, REPLACE])
@pytest.mark.parametrize(
    ("mu", "steps", "delta"), [(0.05, 10, 1e-5), (0.5, 1, 1e-6), (1.0, 100, 1e-5), (4.0, 10, 1e-8)]
)
def test_without_sampling_it_is_the_gaussian_mechanism(name, relation, mu, steps, delta):
    found = bound(name, [Event(math.sqrt(steps) / mu, 1.0, steps, relation)], delta)
    exact = gaussian_epsilon(mu, delta)
    assert found.accountant == name
    assert found.epsilon >= exact
    assert found.epsilon <= exact * (1.2 if name == "rdp" else 1.006)
    assert not 0.999 <= found.epsilon / gaussian_epsilon(2 * mu, delta) <= 1.2
    assert not 0.999 <= found.epsilon / gaussian_epsilon(mu / 2, delta) <= 1.2


@pytest.mark.parametrize("name", ["prv", "pld"])
@pytest.mark.parametrize(("steps", "delta"), [(100, 1e-12), (10_000, 1e-10)])
def test_rounding_never_lowers_epsilon(name, steps, delta):
    for mu in (0.5, 2.0):
        found = bound(name, [Event(math.sqrt(steps) / mu, 1.0, steps)], delta)
        assert found.accountant == name
        assert gaussian_epsilon(mu, delta) <= found.epsilon <= 1.01 * gaussian_epsilon(mu, delta)


# -- replace one, batches without replacement --------------------------------------------------------------------------


def hockey_stick_epsilon(p, q, cell, delta):
    """The larger ε of two densities on a grid, `∫ (p − e^ε q)₊ = δ` either way."""
    return max(
        brentq(lambda e, a=a, b=b: float(np.maximum(a - math.exp(e) * b, 0.0).sum() * cell) - delta, 0.0, 30.0)
        for a, b in ((p, q), (q, p))
    )


@pytest.mark.parametrize(("sigma", "steps", "delta"), [(0.8, 1, 1e-3), (1.5, 1, 1e-5), (1.5, 2, 1e-4)])
def test_replace_one_against_two_records_and_a_batch_of_one(sigma, steps, delta):
    """Two records of norm Δ = 1 and batches of one, so q = 1/2; D = {+1, −1} and D' = {+1, +1}; noise std σ·2Δ.

    The outputs have densities (N(1) + N(−1))/2 and N(1) at one step, products of these at two. At one step this is the
    worst case; at two, a worse mixture of directions may exist, so the account may be larger.
    """
    std = sigma * REPLACE.sensitivity_factor
    cell = std / 60
    x = np.arange(-1 - 8 * std, 1 + 8 * std, cell)
    p, q = (norm.pdf(x, 1, std) + norm.pdf(x, -1, std)) / 2, norm.pdf(x, 1, std)
    if steps == 2:
        p, q, cell = np.multiply.outer(p, p), np.multiply.outer(q, q), cell**2
    exact = hockey_stick_epsilon(p, q, cell, delta)
    for name, loose in (("prv", 1.01), ("pld", 1.005), ("rdp", 2.0)):
        low, high = exact * (1 - 1e-4), exact * (loose if steps == 1 else loose + 0.15)
        found = bound(name, [Event(sigma, 0.5, steps, REPLACE)], delta)
        assert found.accountant == name
        assert low <= found.epsilon <= high
        for wrong in (sigma / 2, sigma * 2):  # Δ taken for 2Δ, and 2Δ for Δ
            assert not low <= bound(name, [Event(wrong, 0.5, steps, REPLACE)], delta).epsilon <= high


@pytest.mark.parametrize(("q", "sigma", "steps"), [(0.03, 1.5, 1000), (0.2, 1.0, 500)])
def test_replace_one_accountants_agree_and_exceed_add_or_remove(q, sigma, steps):
    prv, pld, rdp = (bound(name, [Event(sigma, q, steps, REPLACE)], 1e-5).epsilon for name in NAMES)
    assert agrees(prv, pld)
    assert rdp >= pld
    assert pld >= 1.0001 * bound("pld", [Event(sigma, q, steps, ADD)], 1e-5).epsilon


@pytest.mark.parametrize(("q", "sigma"), [(0.03, 1.5), (0.001, 0.8), (0.3, 4.0)])
def test_replace_one_renyi_lies_between_one_direction_and_the_published_general_bound(q, sigma):
    orders = tuple(range(2, 33))
    published = RdpAccountant(list(orders), NeighboringRelation.REPLACE_ONE)
    published.compose(dp_event.SampledWithoutReplacementDpEvent(1, q, dp_event.GaussianDpEvent(sigma)))
    ours = renyi(Event(sigma, q, 1, REPLACE), orders)
    assert np.all(ours > renyi(Event(sigma, q, 1, ADD), orders))
    assert np.all(ours <= published.rdp * (1 + 1e-9))


def test_the_two_conventions_of_dp_accounting_for_replace_one():
    """As `Event` states: the RDP accountant's noise multiplier is our σ, the PLD accountant's is 2σ."""
    sigma, delta = 2.0, 1e-5
    exact = gaussian_epsilon(1 / sigma, delta)
    for accountant, multiplier in ((RdpAccountant, sigma), (PLDAccountant, 2 * sigma)):
        for factor in (1.0, 2.0, 0.5):
            account = accountant(neighboring_relation=NeighboringRelation.REPLACE_ONE)
            account.compose(dp_event.GaussianDpEvent(factor * multiplier))
            assert (0.999 < account.get_epsilon(delta) / exact < 1.2) == (factor == 1.0)


# -- composition -------------------------------------------------------------------------------------------------------


def test_different_events_compose():
    events = [Event(1.0, 0.01, 500), Event(2.0, 0.02, 300), Event(20.0, 1.0, 2)]
    truth = reference(events, 1e-5)
    for name in ("prv", "pld"):
        assert agrees(bound(name, events, 1e-5).epsilon, truth)
        assert not agrees(bound(name, events[:2], 1e-5).epsilon, truth)
        assert not agrees(bound(name, events[1:], 1e-5).epsilon, truth)
    assert bound("rdp", events, 1e-5).epsilon >= truth
    assert bound("prv", events[::-1], 1e-5) == bound("prv", events, 1e-5)
    split = [Event(1.0, 0.01, 200), *events[1:], Event(1.0, 0.01, 300)]
    assert bound("prv", split, 1e-5) == bound("prv", events, 1e-5)


def test_blocks_share_one_subsample_join_them_first_then_amplify():
    """Two blocks of noise multiplier √2 make σ = 1. Accounted as two subsampled releases, ε comes out too small."""
    blocks = (math.sqrt(2), math.sqrt(2))
    joint = epsilon(noise_multiplier=joint_noise_multiplier(*blocks), sampling_rate=0.01, steps=1000, delta=1e-5)
    wrong = bound("prv", [Event(sigma, 0.01, 1000) for sigma in blocks], 1e-5).epsilon
    assert agrees(joint, reference([Event(1.0, 0.01, 1000)], 1e-5))
    assert wrong < 0.85 * joint


def test_the_central_limit_under_reports():
    """The example of 1.62 for 1.83: q = 0.01, σ = 1, T = 1000, δ = 1e-5."""
    limit = gaussian_epsilon(0.01 * math.sqrt(1000 * math.expm1(1.0)), 1e-5)
    assert round(limit, 2) == 1.62
    assert round(bound("pld", [Event(1.0, 0.01, 1000)], 1e-5).epsilon, 2) == 1.83
    assert not agrees(limit, reference([Event(1.0, 0.01, 1000)], 1e-5))


SIGMAS = st.floats(0.8, 8.0)
RATES = st.floats(5e-3, 0.4)
STEPS = st.integers(1, 500)
DELTAS = st.sampled_from([1e-4, 1e-5, 1e-8])
FACTORS = st.floats(1.1, 2.0)
NUMERIC = settings(max_examples=3, deadline=None, suppress_health_check=list(HealthCheck))


@NUMERIC
@given(sigma=SIGMAS, q=RATES, steps=STEPS, delta=DELTAS, factor=FACTORS)
def test_epsilon_falls_with_noise_and_rises_with_steps_and_rate(sigma, q, steps, delta, factor):
    here = bound("prv", [Event(sigma, q, steps)], delta).epsilon
    assert bound("prv", [Event(sigma * factor, q, steps)], delta).epsilon <= here
    assert bound("prv", [Event(sigma, q, math.ceil(steps * factor))], delta).epsilon >= here
    assert bound("prv", [Event(sigma, q * factor, steps)], delta).epsilon >= here


@given(st.floats(0.1, 100.0), st.lists(st.floats(0.1, 100.0), max_size=4))
def test_joint_and_remaining_noise_multipliers_are_inverse(own, others):
    joint = joint_noise_multiplier(own, *others)
    assert 1 / joint**2 == pytest.approx(sum(1 / sigma**2 for sigma in (own, *others)))
    if joint < 0.99 * min([1e9, *others]):
        assert joint_noise_multiplier(remaining_noise_multiplier(joint, *others), *others) == pytest.approx(joint)


def test_remaining_noise_multiplier_refuses_the_impossible():
    with pytest.raises(ParameterError, match="more noise"):
        remaining_noise_multiplier(1.0, 1.0)
    with pytest.raises(ParameterError, match="at least one"):
        joint_noise_multiplier()


# -- falling back ------------------------------------------------------------------------------------------------------


def test_the_known_hard_cases_of_prv_accountant():
    for event in (Event(1.0, 0.2, 500), Event(1.0, 0.01, 100_000)):
        assert agrees(bound("prv", [event], 1e-5).epsilon, bound("pld", [event], 1e-5).epsilon)


@pytest.mark.parametrize(
    ("event", "delta", "used", "why"),
    [
        (Event(1.0, 0.001, 1_000_000), 1e-6, "pld", "grid"),
        (Event(0.03, 0.01, 100), 1e-5, "pld", "overflow"),
        (Event(1.0, 0.01, 10_000), 1e-12, "rdp", "rounding"),
    ],
)
def test_out_of_reach_the_next_accountant_answers_and_says_so(event, delta, used, why, caplog):
    accounting.spent.cache_clear()
    with caplog.at_level(logging.WARNING, logger="lipdp.accounting.accountants"):
        spent = bound("prv", [event], delta)
    assert (spent.requested, spent.accountant) == ("prv", used)
    assert why in spent.note
    assert f"the {used} accountant, not from prv" in caplog.text
    assert 0 < float(spent) <= bound("rdp", [event], delta).epsilon


@pytest.mark.parametrize("failure", ["raise", "nan", "inf", "warn"])
def test_no_numerical_failure_of_a_library_gets_through(failure, monkeypatch):
    def broken(self, delta, delta_error, epsilon_error):
        if failure == "raise":
            raise RuntimeError("Discrete mean differs from continuous mean significantly.")
        return (0.0, 0.0, float(np.exp(np.float64(1e5))) if failure == "warn" else float(failure))

    target = "prv_accountant.discrete_privacy_random_variable.DiscretePrivacyRandomVariable.compute_epsilon"
    monkeypatch.setattr(target, broken)
    accounting.spent.cache_clear()
    spent = bound("prv", [Event(1.3, 0.02, 100)], 1e-5)
    accounting.spent.cache_clear()
    assert spent.accountant == "pld"
    assert spent.note
    assert agrees(spent.epsilon, reference([Event(1.3, 0.02, 100)], 1e-5))


def test_when_all_fail_it_is_an_error(monkeypatch):
    def broken(*args):
        return math.nan, 0

    monkeypatch.setattr(numerics, "compute_epsilon", broken)
    with pytest.raises(AccountingError, match=r"prv: .*pld: .*rdp: "):
        bound("prv", [Event(1.234, 0.02, 77)], 1e-5)


# -- arguments ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_no_steps_cost_nothing(name):
    assert bound(name, [], 1e-5).epsilon == 0.0
    assert bound(name, [Event(1.0, 0.1, 0)], 1e-5).epsilon == 0.0
    assert epsilon(noise_multiplier=1.0, sampling_rate=0.1, steps=0, delta=1e-5, accountant=name) == 0.0


@pytest.mark.parametrize("name", NAMES)
def test_epsilon_is_zero_where_delta_covers_every_use_of_the_record(name):
    assert bound(name, [Event(1.0, 0.01, 1)], 0.02).epsilon == 0.0
    assert bound(name, [Event(1.0, 0.01, 1)], 0.002).epsilon > 0.0


@pytest.mark.parametrize(
    "wrong",
    [
        {"noise_multiplier": 0.0},
        {"noise_multiplier": -1.0},
        {"noise_multiplier": math.nan},
        {"noise_multiplier": math.inf},
        {"noise_multiplier": "1"},
        {"sampling_rate": 0.0},
        {"sampling_rate": 1.5},
        {"sampling_rate": math.nan},
        {"steps": -1},
        {"steps": 1.5},
        {"steps": True},
        {"delta": 0.0},
        {"delta": 1.0},
        {"delta": math.nan},
    ],
    ids=str,
)
def test_arguments_outside_their_range_are_named(wrong):
    arguments = {"noise_multiplier": 1.0, "sampling_rate": 0.1, "steps": 10, "delta": 1e-5} | wrong
    (name,) = wrong
    with pytest.raises(ParameterError, match=name):
        epsilon(**arguments)


def test_unknown_names_list_the_known_ones():
    arguments = {"noise_multiplier": 1.0, "sampling_rate": 0.1, "steps": 10, "delta": 1e-5}
    with pytest.raises(UnknownNameError, match="pld, prv, rdp"):
        epsilon(**arguments, accountant="moments")
    with pytest.raises(UnknownNameError, match="add_or_remove_one, replace_one"):
        epsilon(**arguments, relation="replace")
    with pytest.raises(ParameterError, match="one relation"):
        bound("pld", [Event(1.0, 0.1, 1), Event(1.0, 0.1, 1, REPLACE)], 1e-5)


# -- calibration -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("relation", [ADD, REPLACE])
@pytest.mark.parametrize(
    ("q", "sigma", "steps", "delta"),
    [(0.07, 4.6, 300, 1e-5), (0.001, 0.67, 2500, 1e-5), (0.01, 1.7, 10_000, 1e-6), (0.5, 18.8, 100, 1e-5)],
)
def test_the_rough_account_is_near_the_exact_one(q, sigma, steps, delta, relation):
    event = Event(sigma, q, steps, relation)
    exact = float(bound("pld", [event], delta))
    assert rough_epsilon([event], delta, near=exact) == pytest.approx(exact, rel=0.01)
    assert rough_epsilon([event.with_steps(10**6)], delta, near=exact) == math.inf


@pytest.mark.parametrize("target", [0.3, pytest.param(1.0, marks=pytest.mark.slow), 8.0])
@pytest.mark.parametrize(("q", "steps"), [(0.07, 300), (0.001, 2500)])
def test_calibration_asks_the_exact_account_once_or_twice(target, q, steps, monkeypatch):
    asked, prv = [], accounting.PRVAccountant
    spend = prv.epsilon
    monkeypatch.setattr(prv, "epsilon", lambda *given: asked.append(given[1]) or spend(*given))
    calibrate(target_epsilon=target, sampling_rate=q, steps=steps, delta=1e-5)
    assert sum(bool(events) for events in asked) <= 2


@pytest.mark.parametrize("kind", [RemoveLoss, AddLoss, ReplaceLoss])
@pytest.mark.parametrize(("q", "sigma"), [(0.001, 0.6), (0.2, 1.0), (0.03, 8.0), (1.0, 2.0), (0.3, 0.1)])
def test_the_curve_of_one_step_is_dp_accountings(q, sigma, kind):
    kinds = privacy_loss_mechanism.AdjacencyType
    remove, add = (
        privacy_loss_mechanism.GaussianPrivacyLoss(sigma, sampling_prob=q, adjacency_type=a)
        for a in (kinds.REMOVE, kinds.ADD)
    )
    t = np.linspace(-3.0, 3.0, 61)
    curves = {RemoveLoss: remove.get_delta_for_epsilon(t), AddLoss: add.get_delta_for_epsilon(t)}
    expected = curves.get(kind, np.maximum(*curves.values()))
    np.testing.assert_allclose(kind(Event(sigma, q, 1)).delta(t), expected, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize(
    ("target", "q", "steps", "delta", "name", "relation"),
    [
        (1.0, 0.03, 1000, 1e-5, "prv", ADD),
        pytest.param(8.0, 0.1, 500, 1e-5, "prv", ADD, marks=pytest.mark.slow),
        (0.05, 0.01, 100, 1e-6, "prv", ADD),
        (50.0, 0.2, 500, 1e-5, "prv", ADD),
        (1.0, 1.0, 10, 1e-5, "prv", ADD),
        (2.0, 0.01, 1000, 1e-5, "prv", REPLACE),
        (1.0, 0.03, 1000, 1e-5, "pld", ADD),
        (1.0, 0.03, 1000, 1e-5, "rdp", REPLACE),
    ],
)
def test_calibrated_noise_spends_the_target_and_no_more(target, q, steps, delta, name, relation):
    setting = {"sampling_rate": q, "steps": steps, "delta": delta, "accountant": name, "relation": relation}
    sigma = calibrate(target_epsilon=target, **setting)
    assert 0.995 * target <= epsilon(noise_multiplier=sigma, **setting) <= target
    assert epsilon(noise_multiplier=0.98 * sigma, **setting) > target
    assert epsilon(noise_multiplier=1.02 * sigma, **setting) < 0.995 * target


def test_calibration_makes_room_for_other_events():
    setting = {"target_epsilon": 1.0, "sampling_rate": 0.01, "steps": 100, "delta": 1e-5}
    extra = (Event(1.5, 0.01, 100), Event(20.0, 1.0, 1))
    sigma = calibrate(**setting, extra_events=extra)
    assert 0.995 <= bound("prv", [Event(sigma, 0.01, 100), *extra], 1e-5).epsilon <= 1.0
    assert sigma > 1.01 * calibrate(**setting)


@pytest.mark.parametrize(
    ("change", "error", "why"),
    [
        ({"target_epsilon": 1e-3, "delta": 1e-9}, CalibrationError, "too small"),
        ({"target_epsilon": 1e9}, CalibrationError, "too large"),
        ({"delta": 0.7}, CalibrationError, "probability that a given record is used"),
        ({"extra_events": (Event(0.5, 0.01, 100),)}, CalibrationError, "extra events alone"),
        ({"target_epsilon": 0.0}, ParameterError, "target_epsilon"),
        ({"steps": 0}, ParameterError, "steps"),
        ({"delta": 2.0}, ParameterError, "delta"),
        ({"sampling_rate": 2.0}, ParameterError, "sampling_rate"),
        ({"accountant": "gdp"}, UnknownNameError, "Known"),
    ],
    ids=str,
)
def test_calibration_says_why_it_cannot(change, error, why):
    setting = {"target_epsilon": 0.1, "sampling_rate": 0.01, "steps": 100, "delta": 1e-5, "accountant": "rdp"} | change
    with pytest.raises(error, match=why):
        calibrate(**setting)


# -- ledger and curve --------------------------------------------------------------------------------------------------


def test_ledger_merges_counts_and_survives_json():
    ledger = Ledger()
    for sigma in (1.0, 1.0, 0.1 + 0.2, 1.0):
        ledger.append(Event(sigma, 0.1, 2))
    ledger.append(Event(1.0, 0.1, 0))
    assert ledger.events == (Event(1.0, 0.1, 4), Event(0.1 + 0.2, 0.1, 2), Event(1.0, 0.1, 2))
    assert ledger.steps == 8
    again = Ledger.from_state(json.loads(json.dumps(ledger.state_dict())))
    assert (again.events, again.steps) == (ledger.events, 8)
    with pytest.raises(ParameterError, match="one relation"):
        ledger.append(Event(1.0, 0.1, 1, REPLACE))


@pytest.mark.parametrize("state", [{}, {"events": [{"sigma": 1.0}]}, {"events": 3}])
def test_ledger_refuses_a_state_that_is_none(state):
    with pytest.raises(ParameterError, match="state_dict"):
        Ledger.from_state(state)


@pytest.mark.parametrize("name", NAMES)
def test_curve_is_an_upper_bound_at_every_step(name):
    plan = [Event(1.0, 0.02, 300), Event(2.0, 0.05, 200), Event(1.0, 0.02, 100)]
    curve = EpsilonCurve(plan, 1e-5, name)
    assert curve.used == name
    assert curve.steps == 600
    parts = {1: [plan[0].with_steps(1)], 300: plan[:1], 400: [plan[0], plan[1].with_steps(100)], 600: plan}
    values = [curve(steps) for steps in parts]
    assert curve(0) == 0.0
    assert values == sorted(values)
    for value, events in zip(values, parts.values(), strict=True):
        exact = bound(name, events, 1e-5).epsilon
        assert 0.993 * exact <= value <= exact + 0.02 * values[-1]
    with pytest.raises(ParameterError, match="600"):
        curve(601)


def test_curve_of_an_empty_plan():
    assert EpsilonCurve([], 1e-5)(0) == 0.0


@pytest.mark.parametrize("name", ["prv", "pld"])
def test_ten_million_steps_are_left_to_rdp_which_is_said(name):
    answer = get_accountant(name).epsilon([Event(5.0, 0.01, 10**7)], 1e-5)
    assert answer.accountant == "rdp"
    assert "minutes" in answer.note
    assert answer.epsilon == get_accountant("rdp").epsilon([Event(5.0, 0.01, 10**7)], 1e-5).epsilon


@pytest.mark.parametrize("search", [False, True])
def test_what_takes_longer_than_a_few_seconds_is_announced(search, monkeypatch, caplog):
    monkeypatch.setattr(waiting, "PATIENCE", 0.0)
    if search:
        calibrate(target_epsilon=2.0, sampling_rate=0.013, steps=511, delta=1e-5)
    else:
        get_accountant("pld").epsilon([Event(1.37, 0.013, 511)], 1e-5)
    said = [record.getMessage() for record in caplog.records if "please wait" in record.getMessage()]
    assert any(("the search for σ" if search else "ε of 511 steps by the pld accountant") in line for line in said)


def test_what_is_quick_is_not_announced(caplog):
    with waiting.announced("nothing"):
        pass
    assert not caplog.records
