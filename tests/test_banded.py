"""Noise with bands: its covariance, its batches, its account, its state, and what an attacker can make of it."""

import base64
import copy
import json
from functools import partial

import dp_accounting
import kit
import numpy as np
import pytest
import torch
from dp_accounting.pld import PLDAccountant
from kit import FALSE_ALARM, train, weights
from scipy import stats
from torch.utils.data import TensorDataset

import lipdp
from lipdp.accounting.accountants import epsilon, get_accountant
from lipdp.accounting.calibration import EpsilonCurve
from lipdp.accounting.events import Event, Ledger
from lipdp.accounting.plan import PrivacyPlan
from lipdp.accounting.tradeoff import trade_off
from lipdp.audit.likelihood import Likelihood
from lipdp.batches.population import glance
from lipdp.batches.samplers import CyclicPoissonSampler, PoissonSampler
from lipdp.cli import main
from lipdp.data.augment import Augmented, augment
from lipdp.errors import CheckpointError, EngineError, ParameterError, ResumeError
from lipdp.noise import GaussianNoise, SecureGaussianNoise
from lipdp.noise.banded import BandedNoise, Whitened, coefficients
from lipdp.privacy.gate import QuantileGate
from lipdp.report import reading, statement
from lipdp.training import configure

pytestmark = pytest.mark.usefixtures("one_thread", "unjudged")

private = partial(kit.private, steps=12, expected_batch_size=32, bands=4)


# -- the noise ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bands", [2, 3, 8, 64])
def test_the_bands_are_the_square_root_of_prefix_sums_with_columns_of_norm_1(bands):
    c = np.array(coefficients(bands))
    assert 1 - 1e-11 < np.linalg.norm(c) <= 1
    assert np.convolve(c, c)[:bands] == pytest.approx(np.full(bands, c[0] ** 2))  # C² = c₀² A in the first b diagonals
    assert (np.diff(c) < 0).all()
    assert (c > 0).all()
    assert (np.abs(np.roots(c)) < 1).all()  # reversed: the recursion forgets rounding errors


def whitened(released, c):
    """(T, n): what C makes of the rows of noise, in units of its std; N(0, 1), all independent, if C is theirs."""
    row = Whitened(tuple(c))
    return np.stack([row(y).numpy() for y in torch.from_numpy(released)])


def is_white(rows):
    """Two-sided tests of all variances and of all correlations of rows, with a false alarm in a million."""
    steps, n = rows.shape
    level = FALSE_ALARM / (steps * (steps + 1))
    found = rows @ rows.T
    diagonal, off = np.diagonal(found), found[np.triu_indices(steps, 1)] / np.sqrt(n)
    return (
        stats.chi2.ppf(level, n) < diagonal.min()
        and diagonal.max() < stats.chi2.isf(level, n)
        and (len(off) == 0 or np.abs(off).max() < stats.norm.isf(level))
    )


WRONG = {
    "one band less": lambda b: coefficients(b - 1),
    "one band more": lambda b: coefficients(b + 1),
    "columns not scaled to norm 1": lambda b: np.array(coefficients(b)) / coefficients(b)[0],
    "a noise of 97 %": lambda b: np.array(coefficients(b)) / 0.97,
}


@pytest.mark.statistical
@pytest.mark.parametrize("bands", [2, 5])
@pytest.mark.parametrize("kind", [GaussianNoise, SecureGaussianNoise])
def test_the_covariance_of_what_is_released(bands, kind):
    noise, sizes, std = BandedNoise(kind(seed=1), bands), [(70, 100), (3000,)], torch.tensor([0.5, 3.0])
    rows = []
    for row in range(1, 13):
        tensors = [torch.zeros(size) for size in sizes]
        noise.add_(tensors, std, row=row)
        rows.append(torch.cat([(t / s).flatten() for t, s in zip(tensors, std, strict=True)]).double().numpy())
    assert is_white(whitened(np.stack(rows), coefficients(bands)))
    for name, wrong in WRONG.items():
        assert not is_white(whitened(np.stack(rows), wrong(bands))), name


@pytest.mark.statistical
def test_the_engine_releases_it_and_a_skipped_batch_has_its_row():
    run = private(net=kit.plain_net, data=partial(kit.table, features=100, classes=50), lr=1.0, bands=3, steps=9)
    engine, model, optimizer, loader, criterion = run
    first = [kit.pure_noise(engine, model, optimizer, batches(loader, 4), criterion)]
    next(iter(loader))
    assert engine.skip_batch() == 1
    first.append(kit.pure_noise(engine, model, optimizer, loader, criterion))
    assert [len(part["1.bias"]) for part in first] == [4, 4]
    stds = engine.noise_stds()
    before, after = (
        np.concatenate([(noise / stds[name]).flatten(1).numpy() for name, noise in part.items()], axis=1)
        for part in first
    )
    c = coefficients(3)
    assert is_white(whitened(before, c))
    together = whitened(np.concatenate([before, after]), c)
    assert not is_white(together)  # row 5 is missing
    lost = np.concatenate([before, np.zeros_like(before[:1]), after])
    assert is_white(whitened(lost, c)[7:])  # rows 8 and 9 do not depend on it


def batches(loader, count):
    for number, batch in enumerate(loader, start=1):
        yield batch
        if number == count:
            return


def test_rows_go_one_by_one_and_an_interrupted_one_ends_them():
    noise, tensor, std = BandedNoise(GaussianNoise(seed=0), 3), torch.zeros(4), torch.ones(1)
    noise.add_([tensor], std, row=2)  # batches before the first step may be looked at
    noise.add_([tensor], std, row=3)
    for row in (2, 3, 5):
        with pytest.raises(EngineError, match="neither used nor skipped"):
            noise.add_([tensor], std, row=row)
    with pytest.raises(EngineError, match="train the same weights"):
        noise.add_([torch.zeros(5)], std, row=4)
    noise.noise.add_ = interrupted(noise.noise)
    with pytest.raises(KeyboardInterrupt):
        noise.add_([tensor], std, row=4)
    for later in (lambda: noise.add_([tensor], std, row=4), lambda: noise.skip_(4), noise.state_dict):
        with pytest.raises(EngineError, match="interrupted"):
            later()


def interrupted(inner):
    def add_(tensors, stds, *, draw):
        draw(2, torch.float32)
        raise KeyboardInterrupt

    return add_


# -- batches -----------------------------------------------------------------------------------------------------------


@pytest.mark.statistical
@pytest.mark.parametrize("secure", [False, True])
@pytest.mark.parametrize(("rate", "bands", "population"), [(0.1, 4, 4000), (0.25, 4, 900), (0.3, 3, 1000)])
def test_the_law_of_the_batches(rate, bands, population, secure):
    sampler = CyclicPoissonSampler(population, sampling_rate=rate, steps=200, bands=bands, seed=3, secure=secure)
    drawn = np.zeros((200, population), bool)
    for t, batch in enumerate(sampler):
        drawn[t, batch.numpy()] = True
    of_group = np.stack([drawn[g::bands].any(axis=0) for g in range(bands)])
    assert (of_group.sum(axis=0) <= 1).all()  # b steps or more between two uses of a record
    sizes, tail = of_group.sum(axis=1), FALSE_ALARM / 10
    assert stats.chisquare([*sizes, population - sizes.sum()][: bands + (sizes.sum() < population)]).pvalue > tail
    uses = sum(drawn[g::bands][:, of_group[g]].sum() for g in range(bands))
    chances = sum(len(drawn[g::bands]) * of_group[g].sum() for g in range(bands))
    assert stats.binomtest(int(uses), int(chances), min(1.0, bands * rate)).pvalue > tail
    if bands * rate < 1:  # coins of their own: the counts of a record, and of a batch, are binomial
        group = drawn[::bands][:, of_group[0]]
        for axis in (0, 1):
            counts, n = group.sum(axis=axis), group.shape[axis]
            spread = ((counts - n * bands * rate) ** 2).sum() / (n * bands * rate * (1 - bands * rate))
            assert tail < stats.chi2.cdf(spread, len(counts)) < 1 - tail


@pytest.mark.statistical
def test_a_record_more_leaves_the_dealing_of_the_others_independent_and_even():
    """No balancing: the sizes of groups vary as dice do, which groups dealt from a shuffled list would not."""
    sizes = [
        np.bincount(CyclicPoissonSampler(100, sampling_rate=0.1, steps=1, bands=2, seed=s).groups)[0]
        for s in range(2000)
    ]
    spread = ((np.array(sizes) - 50) ** 2).sum() / 25
    assert FALSE_ALARM < stats.chi2.cdf(spread, 2000) < 1 - FALSE_ALARM


def test_the_dealing_outlives_a_resume_and_is_of_its_own_for_every_run():
    make = partial(CyclicPoissonSampler, 500, sampling_rate=0.2, steps=10, bands=4)
    one, other = make(), make()
    assert (one.groups != other.groups).any()
    drawn = iter(one)
    for _ in range(3):
        next(drawn)
    state = one.state_dict()
    other.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(drawn, other, strict=True))
    for wrong in (None, 3, "no hex", "f" * 65):
        with pytest.raises(CheckpointError, match="dealing"):
            make().load_state_dict({**state, "dealing": wrong})
    with pytest.raises(ResumeError, match="bands was 4"):
        CyclicPoissonSampler(500, sampling_rate=0.2, steps=10, bands=5).load_state_dict(state)
    with pytest.raises(ResumeError, match="sampler was"):
        make().load_state_dict(PoissonSampler(500, sampling_rate=0.2, steps=10).state_dict())


# -- account -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bands", "steps", "sigma"),
    [
        (4, 101, 0.8),
        (16, 3, 0.7),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((2, 100, 1.0), (8, 799, 1.2))),
    ],
)
def test_the_account_is_that_of_a_composition_for_every_b_steps_begun(bands, steps, sigma):
    plan = PrivacyPlan.of(
        dataset_size=1000, expected_batch_size=60, steps=steps, bands=bands, noise_multiplier=sigma, target_delta=1e-5
    )
    theirs = PLDAccountant(value_discretization_interval=1e-4)
    one = dp_accounting.PoissonSampledDpEvent(bands * 60 / 1000, dp_accounting.GaussianDpEvent(sigma))
    theirs.compose(dp_accounting.SelfComposedDpEvent(one, -(-steps // bands)))
    reference = theirs.get_epsilon(1e-5)
    assert plan.sampling_rate == 0.06
    assert plan.relation is lipdp.Relation.ADD_OR_REMOVE_ONE
    for accountant in ("pld", "prv"):
        assert get_accountant(accountant).epsilon(plan.events, 1e-5).epsilon == pytest.approx(reference, rel=0.007)
        assert get_accountant(accountant).epsilon(plan.events, 1e-5).epsilon > reference * 0.9999
    if steps > bands:
        curve = EpsilonCurve(plan.events, 1e-5, "pld")
        first, last, next_one = curve(1), curve(bands), curve(bands + 1)
        assert epsilon(noise_multiplier=sigma, sampling_rate=bands * 0.06, steps=1, delta=1e-5) * 0.99 <= first == last
        assert epsilon(noise_multiplier=sigma, sampling_rate=bands * 0.06, steps=2, delta=1e-5) * 0.99 <= next_one
        assert last < next_one


def test_the_least_noise_for_a_budget():
    given = {"dataset_size": 2000, "expected_batch_size": 100, "epochs": 20, "target_epsilon": 3.0}
    plans = [PrivacyPlan.of(**given, target_delta=1e-5, bands=bands) for bands in (1, 4, 20)]
    assert all(0.99 * 3 < plan.predicted.epsilon <= 3 for plan in plans)
    assert plans[0].noise_multiplier < plans[1].noise_multiplier < plans[2].noise_multiplier
    assert plans[2].subsampling.mu(1.0) == pytest.approx(20**0.5)
    assert "bands" in str(plans[1])


def test_steps_of_two_runs_are_not_rounded_together():
    event = Event(1.0, 0.4, 3, bands=4)
    assert get_accountant("pld").epsilon([event, event], 1e-5) == get_accountant("pld").epsilon(
        [Event(1.0, 0.4, 2)], 1e-5
    )
    ledger = Ledger([event, event])
    assert [e.compositions for e in ledger.events] == [1, 1]
    assert Ledger.from_state(ledger.state_dict()).events == ledger.events
    ledger.append(Event(1.0, 0.4, 1, bands=4))  # of the run that goes on
    assert [e.steps for e in ledger.events] == [3, 4]


def test_the_engine_counts_a_composition_for_every_b_steps_begun():
    engine, *run = private(accountant="pld", steps=10)
    counts = []
    train(*run, after=lambda: counts.append(engine.get_epsilon(1e-5)))
    exact = [epsilon(noise_multiplier=1.0, sampling_rate=0.5, steps=k, delta=1e-5, accountant="pld") for k in (1, 2, 3)]
    assert counts == [exact[t // 4] for t in range(10)]
    with pytest.raises(EngineError, match="all 10 steps"):
        run[1].step()


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"bands": 9}, "at most 8 bands"),
        ({"bands": 0}, "bands=0"),
        ({"bands": True}, "bands=True"),
        ({"sampling": "fixed_size"}, "proven for sampling='poisson' alone"),
        ({"own_records": True}, "beside own_records=True is not proven"),
        ({"gate": QuantileGate(0.5)}, "beside a QuantileGate is not proven"),
    ],
)
def test_what_is_not_proven_is_refused(given, message):
    with pytest.raises(ParameterError, match=message):
        private(**given)


def test_measurements_are_refused():
    with pytest.raises(ParameterError, match="beside measurements is not proven"):
        PrivacyPlan.of(
            dataset_size=100, expected_batch_size=10, steps=5, bands=2, noise_multiplier=1.0, shares={"counts": 0.1}
        )


def test_a_second_run_needs_an_engine_of_its_own():
    engine, *run = private()
    train(*run, steps=2)
    engine.detach()
    with pytest.raises(EngineError, match="an engine of its own"):
        private(engine=engine)


def test_the_parameters_stay_the_same():
    engine, model, optimizer, loader, criterion = private()
    batch = next(iter(loader))
    kit.step(batch, model, optimizer, criterion)
    model[1].requires_grad_(False)
    with pytest.raises(EngineError, match="trains other parameters"):
        kit.step(next(iter(loader)), model, optimizer, criterion)
    assert engine.steps_taken == 1


# -- state -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"secure": True}, {"group": torch.arange(256) // 2, "expected_batch_size": 16}]
)
def test_a_resume_is_bit_for_bit(options, tmp_path):
    engine, *run = private(momentum=0.9, **options)
    train(*run, after=lambda: engine.steps_taken == 6 and engine.save_checkpoint(tmp_path / "saved.pt"))
    again, *rest = private(momentum=0.9, **options)
    again.load_checkpoint(tmp_path / "saved.pt")
    train(*rest)
    assert all(
        torch.equal(w, other) for w, other in zip(weights(run[0]).values(), weights(rest[0]).values(), strict=True)
    )
    assert again.get_epsilon(1e-5) == engine.get_epsilon(1e-5)


def test_the_state_holds_the_last_draws_as_long_as_they_are_needed():
    engine, *run = private()
    assert engine.state_dict()["correlated"]["recent"] == ""
    train(*run, steps=5)
    raw = base64.b64decode(engine.state_dict()["correlated"]["recent"])
    assert len(raw) == 4 * 3 * sum(p.numel() for p in run[0].parameters())
    train(*run)
    state = engine.state_dict()
    assert state["correlated"]["recent"] == ""


def test_a_batch_drawn_and_not_used_before_a_checkpoint_counts_as_a_step():
    engine, *run = private(steps=12)
    train(*run, steps=5)
    iterator = iter(run[2])
    next(iterator)
    state = engine.state_dict()
    again, *rest = private(steps=12)
    again.load_state_dict(copy.deepcopy(state))
    assert (engine.steps_taken, again.steps_taken) == (5, 6)
    train(*rest)
    assert again.steps_taken == 12
    assert again.ledger.events[0].compositions == 3


def test_another_order_of_the_records_is_refused():
    data = kit.table()
    engine, *run = private(dataset=data)
    train(*run, steps=3)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    shuffled = torch.utils.data.TensorDataset(*(t[order] for t in data.tensors))
    other = private(dataset=shuffled)[0]
    with pytest.raises(ResumeError, match="in two groups"):
        other.load_state_dict(engine.state_dict())


def test_other_owners_are_refused():
    engine = private(group=torch.arange(256) // 2, expected_batch_size=16)[0]
    with pytest.raises(ResumeError, match="protect other units"):
        private(group=torch.arange(256) % 128, expected_batch_size=16)[0].load_state_dict(engine.state_dict())


@pytest.mark.parametrize("change", [lambda s: s.pop("correlated"), lambda s: s["correlated"].update(recent="!")])
def test_a_state_without_its_noise_is_refused(change):
    from lipdp.accounting.digest import with_digest

    engine, *run = private()
    train(*run, steps=3)
    state = engine.state_dict()
    change(state)
    with pytest.raises(CheckpointError):
        private()[0].load_state_dict(with_digest(state))


def test_an_earlier_state_is_refused():
    engine, *run = private()
    train(*run, steps=2)
    early = engine.state_dict()
    train(*run, steps=2)
    with pytest.raises(ResumeError, match="noise would be drawn again"):
        engine.load_state_dict(early)


# -- lipdp train -------------------------------------------------------------------------------------------------------

QUICK = {
    "dataset": "digits",
    "model": "mlp",
    "features": None,
    "batch_size": 128,
    "steps": 12,
    "epsilon": 3.0,
    "bands": 4,
}


def test_a_run_with_bands_ends_alike_when_it_is_interrupted_and_its_report_agrees(tmp_path):
    config = configure(**QUICK, seed=5, checkpoint_every=5, log_every=5)
    account = reading.read_run(kit.killed_and_resumed(config, tmp_path)).account
    assert account.bands == 4
    assert statement.recomputed_epsilon(account) == pytest.approx(account.epsilon, rel=1e-3)


# -- attacks -----------------------------------------------------------------------------------------------------------


def scores(*, bands, steps, rate, n):
    """Log-likelihood ratios of an attacker who knows all but the coins: (n,) without the record, (n,) with it.

    Every entry is a game of its own: one canary of norm Δ in one dimension, beside a record that follows what was
    released.
    """
    sampler = CyclicPoissonSampler(2 * n, sampling_rate=rate, steps=steps, bands=bands)
    likelihood = Likelihood(torch.from_numpy(sampler.groups), bands, min(1.0, bands * rate))
    noise, white, delta, total = BandedNoise(GaussianNoise(), bands), Whitened(coefficients(bands)), 3.0, torch.zeros(1)
    for row, batch in enumerate(sampler, start=1):
        drawn = torch.zeros(2 * n, dtype=torch.float64).index_fill(0, batch, delta)
        drawn[:n] = 0
        others = delta * total.sign()
        total = others + drawn
        noise.add_([total], torch.tensor([delta]), row=row)
        likelihood.add(white((total - others) / delta), torch.ones(()))
    return np.split(likelihood.total.numpy(), 2)


def reached(without, present, rate):
    """TPR at a threshold with that FPR, the threshold from one half of the games without the record."""
    half = len(without) // 2
    threshold = np.quantile(without[:half], 1 - rate)
    false, true = (without[half:] > threshold).sum(), (present > threshold).sum()
    return (
        stats.beta.isf(1e-4, false + 1, len(without) - half - false),
        stats.beta.ppf(1e-4, true, len(present) - true + 1),
        true / len(present),
    )


@pytest.mark.statistical
@pytest.mark.parametrize(
    ("bands", "steps", "rate"), [pytest.param(2, 6, 0.25, marks=pytest.mark.slow), (4, 8, 0.25), (3, 7, 0.2)]
)
def test_an_attacker_reaches_what_the_account_allows_and_no_more(bands, steps, rate):
    without, present = scores(bands=bands, steps=steps, rate=rate, n=40_000)
    curve = trade_off([Event(1.0, min(1.0, bands * rate), steps, bands=bands)])
    for false_rate in (0.01, 0.1):
        false, true, found = reached(without, present, false_rate)
        assert true <= curve.tpr(false)
        assert found > (0.6 if steps % bands else 0.8) * curve.tpr(false_rate)  # a cycle that is cut off costs less


@pytest.mark.statistical
def test_the_attack_finds_noise_out_of_step_with_the_batches():
    """Were a batch given up without its row of noise, two uses of a record would be b − 1 rows apart: both count."""
    n, bands = 40_000, 2
    noise, c, sums = BandedNoise(GaussianNoise(), bands), coefficients(bands), []
    for row in (1, 2):  # batches 1 and 3, of one group; batch 2 is given up
        total = torch.from_numpy(np.repeat([0.0, 1.0], n))
        noise.add_([total], torch.ones(1), row=row)
        sums.append(total.numpy())
    v = whitened(np.stack(sums), c)
    score = c[0] * v[0] + (c[0] + c[1]) * v[1]
    _, true, _ = reached(score[:n], score[n:], 0.01)
    assert true > trade_off([Event(1.0, 1.0, 3, bands=2)]).tpr(0.0125)


def test_what_prints_q_and_steps_prints_the_bands(capsys):
    plan = PrivacyPlan.of(dataset_size=1000, expected_batch_size=50, steps=20, noise_multiplier=1.0, bands=4)
    assert "in 4 bands" in plan.summary
    numbers = ["--noise-multiplier", "1", "--batch-size", "50", "--dataset-size", "1000", "--steps", "20"]
    assert main(["epsilon", *numbers, "--bands", "4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["epsilon"]["prv"] == pytest.approx(
        get_accountant("prv").epsilon([plan.subsampling.event(1.0)], 1e-5).epsilon, rel=1e-6
    )
    assert main(["calibrate", "--epsilon", "3", *numbers[2:], "--bands", "4"]) == 0
    assert "in 4 bands" in capsys.readouterr().out


def test_an_order_of_the_inputs_alone_is_seen_and_random_views_are_not():
    """Targets that are all alike tell nothing of an order."""
    x, y = torch.rand(64, 1, 8, 8), torch.zeros(64, dtype=torch.long)
    first, again = (TensorDataset(x[order], y) for order in (torch.arange(64), torch.arange(64).roll(1)))
    assert glance(first, inputs=True) != glance(again, inputs=True)
    seen = set()
    for seed in range(3):
        torch.manual_seed(seed)
        seen.add(glance(Augmented(first, augment("crop-flip")), inputs=True))
        assert torch.initial_seed() == seed
    assert len(seen) == 1
