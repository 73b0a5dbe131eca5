"""Truncated Poisson batches: their law, what they cost, and rows that nobody fills."""

import json
from functools import partial
from itertools import pairwise

import dp_accounting
import kit
import numpy as np
import pytest
import torch
from dp_accounting.pld import PLDAccountant
from hypothesis import given, settings
from hypothesis import strategies as st
from kit import FALSE_ALARM, train, weights
from scipy import stats
from scipy.special import ndtr
from torch import nn
from torch.utils.data import TensorDataset

from lipdp import losses
from lipdp import nn as lnn
from lipdp.accounting.accountants import get_accountant
from lipdp.accounting.events import Event, Ledger
from lipdp.accounting.plan import PrivacyPlan, truncation
from lipdp.accounting.privacy_loss import DIRECTIONS, step_loss
from lipdp.accounting.relation import Relation
from lipdp.batches.samplers import PoissonSampler, TruncatedPoissonSampler
from lipdp.cli import main
from lipdp.errors import AccountingError, ParameterError, ResumeError
from lipdp.planning.repetitions import Repetitions
from lipdp.privacy.gate import QuantileGate
from lipdp.report import reading, statement
from lipdp.training import configure

pytestmark = pytest.mark.usefixtures("one_thread", "unjudged")

private = partial(kit.private, steps=12, expected_batch_size=32, truncated_batch_size=36)


# -- the batches -------------------------------------------------------------------------------------------------------


def law(batches, population, rate, most):
    """p-values: of the sizes, of how often each record is in, and of the records of the batches that were cut."""
    sizes = np.minimum([len(batch) for batch in batches], most)
    chances = np.append(stats.binom.pmf(np.arange(most), population, rate), stats.binom.sf(most - 1, population, rate))
    expected, counts = len(batches) * chances, np.bincount(sizes, minlength=most + 1)
    rare = expected < 10
    pooled = [np.append(part[~rare], part[rare].sum() + 1e-9) for part in (counts, expected)]
    p = chances @ np.arange(most + 1) / population
    every = np.bincount(np.concatenate(batches), minlength=population)
    cut = np.bincount(np.concatenate([b for b in batches if len(b) >= most]), minlength=population)
    spread = ((every - len(batches) * p) ** 2).sum() / (len(batches) * p * (1 - p))
    return {
        "size": stats.chisquare(*pooled, sum_check=False).pvalue,
        "in": 2 * min(stats.chi2.cdf(spread, population), stats.chi2.sf(spread, population)),
        "cut": stats.chisquare(cut).pvalue,
    }


@pytest.mark.statistical
@pytest.mark.parametrize(
    ("rate", "most", "secure"),
    [(0.1, 22, False), (0.3, 60, False), (0.02, 5, False), (0.1, 22, True),
     *(pytest.param(*case, True, marks=pytest.mark.slow) for case in ((0.3, 60), (0.02, 5)))],
)  # fmt: skip
def test_at_most_so_many_are_drawn_and_whom_it_leaves_out_is_uniform(rate, most, secure):
    if secure:
        pytest.importorskip("cryptography")
    sampler = TruncatedPoissonSampler(
        200, sampling_rate=rate, truncated_batch_size=most, steps=4000, seed=3, secure=secure
    )
    batches = [batch.numpy() for batch in sampler]
    assert all(len(set(batch)) == len(batch) <= most for batch in batches)
    found = law(batches, 200, rate, most)
    assert min(found.values()) > FALSE_ALARM / 3, found
    poisson = [batch.numpy() for batch in PoissonSampler(200, sampling_rate=rate, steps=4000, seed=3)]
    first = [batch[:most] for batch in poisson]  # the last ones left out: not uniform
    assert law(first, 200, rate, most)["cut"] < FALSE_ALARM
    assert law(poisson, 200, rate, most)["in"] < FALSE_ALARM  # nobody left out


def test_a_large_population_is_cut_too():
    sampler = TruncatedPoissonSampler(1 << 21, sampling_rate=1e-4, truncated_batch_size=200, steps=20, seed=0)
    sizes = [len(set(batch.tolist())) for batch in sampler]
    assert max(sizes) == 200


def test_a_sampler_goes_on_bit_for_bit():
    make = partial(TruncatedPoissonSampler, 500, sampling_rate=0.1, steps=10)
    sampler = make(truncated_batch_size=50)
    batches = iter(sampler)
    for _ in range(4):
        next(batches)
    state, again = sampler.state_dict(), make(truncated_batch_size=50)
    again.load_state_dict(state)
    assert [b.tolist() for b in batches] == [b.tolist() for b in again]
    with pytest.raises(ResumeError, match="truncated_batch_size was 50"):
        make(truncated_batch_size=51).load_state_dict(state)


# -- the account -------------------------------------------------------------------------------------------------------


def exact_delta(epsilons, others, rate, most, sigma, *, removed):
    """The exact δ of one step where the record pulls by +1 and all others by −1: a lower bound for any account."""
    x = np.linspace(-most - 12 * sigma, 2 + 12 * sigma, 10_001)  # cells merged: less than the exact δ, never more
    edges = ndtr((x[:, None] - np.arange(-most, 2)) / sigma)
    cells = np.diff(edges, axis=0)  # (cells, centre −most … 1)
    k = np.arange(others + 1)
    chance = stats.binom.pmf(k, others, rate)
    without, joined = np.zeros(most + 2), np.zeros(most + 2)
    for drawn, p in zip(k, chance, strict=True):
        kept = min(drawn, most)
        without[most - kept] += p
        stays = rate * min(1.0, most / (drawn + 1))
        joined[most - kept] += p * (1 - stays)
        joined[most - min(drawn, most - 1) + 1] += p * stays
    p, q = cells @ joined, cells @ without
    if not removed:
        p, q = q, p
    return np.array([np.maximum(p - np.exp(e) * q, 0).sum() for e in epsilons])


@pytest.mark.parametrize(
    ("others", "rate", "most", "sigma"), [(40, 0.5, 10, 1.0), (12, 0.9, 8, 0.7), (30, 0.2, 6, 2.0)]
)
def test_no_data_set_costs_more_than_the_account(others, rate, most, sigma):
    """The worst data set known, by integration, in both directions; with N one less or more the bound still holds. The
    account of Poisson batches is below it, so it would not do."""
    t = np.linspace(0, 4, 60)
    event = Event(sigma, rate, 1, truncation=truncation(others, rate, most))
    for kind, removed in zip(DIRECTIONS[Relation.ADD_OR_REMOVE_ONE], (True, False), strict=True):
        bound = step_loss(event, kind).delta(t)
        for present in (others - 1, others):
            assert (exact_delta(t, present, rate, most, sigma, removed=removed) <= bound + 1e-9).all()
    exact = exact_delta(t, others, rate, most, sigma, removed=True)
    poisson = step_loss(Event(sigma, rate, 1), DIRECTIONS[Relation.ADD_OR_REMOVE_ONE][0]).delta(t)
    assert (exact > poisson + 1e-6).any()


def test_the_account_is_reached_to_a_few_percent():
    """All are drawn and one must go: with t, σ/2 or the rate 5 % smaller the account would be too small."""
    t, remove = np.linspace(0, 4, 20), DIRECTIONS[Relation.ADD_OR_REMOVE_ONE][0]
    exact = exact_delta(t, 80, 1.0, 80, 1.0, removed=True)
    assert (exact <= step_loss(Event(1.0, 1.0, 1, truncation=truncation(80, 1.0, 80)), remove).delta(t) + 1e-9).all()
    for wrong in (
        Event(1.0, 1.0, 1, truncation=0.95),
        Event(1.0 / 0.95, 1.0, 1, truncation=1.0),
        Event(1.0, 0.95, 1, truncation=1.0),
    ):
        assert (exact > step_loss(wrong, remove).delta(t) * (1 + 1e-3)).any()


@settings(max_examples=6, deadline=None)
@given(st.integers(50, 2000), st.floats(0.02, 0.4), st.floats(0.6, 4.0), st.integers(1, 300), st.integers(0, 40))
def test_more_room_never_costs_more_and_none_is_poisson(units, share, sigma, steps, room):
    batch = max(1, int(share * units))
    given = {"dataset_size": units, "expected_batch_size": batch, "steps": steps, "noise_multiplier": sigma}
    caps = [min(units, batch + room), min(units, batch + 2 * room + 1), units, None]
    costs = [
        PrivacyPlan.of(**given, truncated_batch_size=c, accountant="rdp", target_delta=1e-6).predicted for c in caps
    ]
    assert all(a.epsilon >= b.epsilon * (1 - 1e-9) for a, b in pairwise(costs))


@pytest.fixture(scope="module")
def epsilon_of_dp_accounting():
    """N = 1000, B = 100, 115 at most, 200 steps, σ = 1.5, δ = 1e-5."""
    theirs = PLDAccountant(value_discretization_interval=1e-3)
    one = dp_accounting.TruncatedSubsampledGaussianDpEvent(1001, 0.1, 115, 1.5)
    theirs.compose(dp_accounting.SelfComposedDpEvent(one, 200))
    return theirs.get_epsilon(1e-5)


@pytest.mark.parametrize("accountant", ["prv", "pld", "rdp"])
def test_the_account_is_near_that_of_dp_accounting_and_goes_to_poissons(accountant, epsilon_of_dp_accounting):
    given = {"dataset_size": 1000, "expected_batch_size": 100, "steps": 200, "noise_multiplier": 1.5}
    of = partial(PrivacyPlan.of, **given, target_delta=1e-5, accountant=accountant)
    poisson, tight, wide = (of(truncated_batch_size=most).predicted.epsilon for most in (None, 115, 180))
    assert wide == pytest.approx(poisson, rel=1e-4)
    assert tight > 1.2 * poisson
    assert {"prv": 0.85, "pld": 0.85, "rdp": 0.95}[accountant] < tight / epsilon_of_dp_accounting < 1.25


def test_the_least_noise_for_a_budget():
    given = {
        "dataset_size": 1000,
        "expected_batch_size": 100,
        "steps": 200,
        "target_epsilon": 2.0,
        "target_delta": 1e-5,
    }
    plans = [PrivacyPlan.of(**given, truncated_batch_size=most) for most in (None, 150, 120)]
    assert all(0.99 * 2 < plan.predicted.epsilon <= 2 for plan in plans)
    assert plans[0].noise_multiplier <= plans[1].noise_multiplier * 1.006
    assert plans[1].noise_multiplier < plans[2].noise_multiplier
    assert "truncated_batch_size  120" in str(plans[2])
    assert "at most 120 a batch" in plans[2].summary


def test_a_ledger_and_a_search_know_of_it():
    event = Event(1.0, 0.1, 3, truncation=0.01)
    assert Ledger.from_state(Ledger([event]).state_dict()).events == (event,)
    assert (
        get_accountant("pld").epsilon([event], 1e-5).epsilon
        > get_accountant("pld").epsilon([Event(1.0, 0.1, 3)], 1e-5).epsilon
    )
    with pytest.raises(AccountingError, match="not truncated"):
        Repetitions("geometric", 10).epsilon(event, 1e-5)


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"truncated_batch_size": 31}, "from B = 32 to N = 256 is needed; about 61"),
        ({"truncated_batch_size": 257}, "from B = 32"),
        ({"truncated_batch_size": True}, "truncated_batch_size=True"),
        ({"sampling": "fixed_size"}, "proven for sampling='poisson' and bands=1 alone"),
        ({"bands": 2}, "proven for sampling='poisson' and bands=1 alone"),
        ({"group": torch.arange(256) // 2}, "no fixed number of rows"),
        ({"dataset_size": 255}, "at most dataset_size"),
    ],
)
def test_what_is_not_proven_is_refused(given, message):
    with pytest.raises(ParameterError, match=message):
        private(**given)


def test_several_processes_are_refused():
    from lipdp.distributed.collectives import Alone

    class Two(Alone):
        size = 2

        def gather(self, value):
            return [value, value]

    with pytest.raises(ParameterError, match="for one process"):
        private(world=Two())
    with pytest.raises(ParameterError, match="proven for"):
        Event(1.0, 0.1, 1, Relation.REPLACE_ONE, truncation=0.1)
    with pytest.raises(ParameterError, match="truncation=2"):
        Event(1.0, 0.1, 1, truncation=2)


# -- a run -------------------------------------------------------------------------------------------------------------


LOSS = losses.TauCrossEntropy(8.0)


def biased_net(classes=5):
    """Where an input of zeros has a gradient, that of the bias."""
    return nn.Sequential(lnn.InputBound(1.0), lnn.SpectralLinear(20, classes, bias=True))


def sums(data, *, labels=lambda y: y, net=biased_net, **options):
    """The gradients of some steps, nearly without noise, and the number of rows of every pass."""
    _, model, optimizer, loader, criterion = private(dataset=data, net=net, noise_multiplier=1e-6, lr=0.0, **options)
    found, rows = [], []
    for batch in loader:
        optimizer.zero_grad()
        for x, y in [batch] if loader.piece is None else batch:
            criterion(model(x), labels(y)).backward()
            rows.append(len(x))
        optimizer.step()
        found.append(torch.cat([p.grad.flatten().clone() for p in model.parameters()]))
    return torch.stack(found), rows


def expected_sums(data, *, loss=LOSS, labels=lambda y: y, net=biased_net):
    """The same by plain autograd, of the records of the same batches."""
    torch.manual_seed(0)
    model, (x, y), found = net(), data.tensors, []
    sampler = TruncatedPoissonSampler(256, sampling_rate=32 / 256, truncated_batch_size=36, steps=12, seed=0)
    sizes = set()
    for batch in sampler:
        values = loss(model(x[batch]), labels(y[batch]))
        grads = torch.autograd.grad(values.sum() / 32, list(model.parameters()))
        found.append(torch.cat([g.flatten() for g in grads]))
        sizes.add(len(batch))
    assert min(sizes) < max(sizes) == 36
    return torch.stack(found)


@pytest.mark.parametrize("labels", [lambda y: y, lambda y: y.clamp(min=0), lambda y: y % 5])
def test_every_batch_has_one_shape_and_rows_that_nobody_fills_add_nothing(labels):
    """Also where the script makes labels of their lack: the engine knows which rows are empty."""
    found, rows = sums(kit.table(), labels=labels)
    assert set(rows) == {36}
    torch.testing.assert_close(found, expected_sums(kit.table(), labels=labels), atol=2e-5, rtol=1e-3)


def test_so_do_pieces_and_every_piece_has_its_shape():
    found, rows = sums(kit.table(), piece=15)
    assert rows == [15, 15, 6] * 12
    torch.testing.assert_close(found, expected_sums(kit.table()), atol=2e-5, rtol=1e-3)


def test_so_do_views():
    data = kit.table()
    x, y = data.tensors
    found, rows = sums(TensorDataset(x[:, None].expand(-1, 3, -1), y), views=3)
    assert set(rows) == {108}
    torch.testing.assert_close(found, expected_sums(data), atol=2e-5, rtol=1e-3)


def test_labels_without_a_value_for_none_are_left_out_too():
    """Of a bool every value is a label: only the engine can tell that a row is empty."""
    net = partial(biased_net, classes=1)
    x, y = kit.table().tensors
    data, loss = TensorDataset(x, (y > 2)[:, None]), losses.TauBCEWithLogits(2.0)
    found, _ = sums(data, net=net, criterion=loss)
    torch.testing.assert_close(found, expected_sums(data, net=net, loss=loss), atol=2e-5, rtol=1e-3)


def test_a_gate_that_counts_does_not_count_empty_rows():
    gates = []
    for most in (None, 256):  # the same batches, filled up or not
        engine, *run = private(gate=QuantileGate(0.1, count_std=5.0), noise_multiplier=1.0, truncated_batch_size=most)
        train(*run)
        gates.append(float(engine._hooks.gate.bound))
    assert gates[0] != pytest.approx(0.1, rel=1e-3)
    assert gates[1] == pytest.approx(gates[0], rel=1e-6)


def test_a_loader_of_other_data_draws_the_same_places():
    """What is left out does not depend on what the records hold."""
    places = []
    for scale in (1.0, 100.0):
        x, y = kit.table().tensors
        number = torch.arange(256.0)[:, None]
        data = TensorDataset(torch.cat([scale * x[:, :-1], number], dim=1), y)
        loader = private(dataset=data)[3]
        places.append([(batch[0][:, -1].int().tolist()) for batch in loader])
    assert places[0] == places[1]


@pytest.mark.parametrize("options", [{}, {"secure": True}])
def test_a_resume_is_bit_for_bit(options, tmp_path):
    if options:
        pytest.importorskip("cryptography")
    engine, *run = private(momentum=0.9, **options)
    train(*run, after=lambda: engine.steps_taken == 6 and engine.save_checkpoint(tmp_path / "saved.pt"))
    again, *rest = private(momentum=0.9, **options)
    again.load_checkpoint(tmp_path / "saved.pt")
    train(*rest)
    assert all(torch.equal(w, v) for w, v in zip(weights(run[0]).values(), weights(rest[0]).values(), strict=True))
    assert again.get_epsilon(1e-5) == engine.get_epsilon(1e-5)
    with pytest.raises(ResumeError, match="truncated_batch_size was 36, is now 37"):
        private(momentum=0.9, truncated_batch_size=37, **options)[0].load_checkpoint(tmp_path / "saved.pt")


def test_a_run_is_resumed_and_its_report_agrees(tmp_path, capsys):
    given = {"dataset": "digits", "model": "mlp", "features": None, "batch_size": 128, "steps": 12, "epsilon": 3.0}
    config = configure(**given, truncated_batch_size=150, seed=5, checkpoint_every=5, log_every=5)
    account = reading.read_run(kit.killed_and_resumed(config, tmp_path)).account
    assert account.truncated_batch_size == 150
    assert statement.recomputed_epsilon(account) == pytest.approx(account.epsilon, rel=1e-3)
    arguments = ["--noise-multiplier", str(account.noise_multiplier), "--batch-size", "128", "--dataset-size", "1437",
                 "--steps", "12", "--truncated-batch-size", "150", "--json"]  # fmt: skip
    assert main(["epsilon", *arguments]) == 0
    assert json.loads(capsys.readouterr().out)["epsilon"]["prv"] == pytest.approx(account.epsilon, rel=1e-3)
    assert main(["epsilon", "--noise-multiplier", "1", "--sampling-rate", "0.1", "--steps", "1",
                 "--truncated-batch-size", "150"]) == 2  # fmt: skip
    assert "--batch-size and --dataset-size" in capsys.readouterr().err
