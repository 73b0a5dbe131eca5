"""The audit: its bounds hold at the confidence they state, its canaries are the worst, the engine passes it."""

from __future__ import annotations

import json
import math
from functools import partial

import numpy as np
import pytest
import torch
from defects import planted
from torch.func import functional_call, grad, vmap

import lipdp
from lipdp import audit
from lipdp.audit.guessing import Rule, choose
from lipdp.audit.suite import METHODS, Suite, SuiteResult, draw, write
from lipdp.cli import main
from lipdp.errors import ParameterError, UnknownNameError
from lipdp.nn.gates import InputBound
from lipdp.noise.banded import BandedNoise, coefficients

pytestmark = pytest.mark.usefixtures("one_thread")

DELTA = 1e-5


def per_sample_norms(experiment):
    """Parameter name → gradient norm of every canary."""
    model, loss = experiment.fresh_model(), experiment.loss
    weights = {n: p.detach() for n, p in model.named_parameters()}

    def value(w, x, y):
        return loss(functional_call(model, w, (x[None],)), y[None]).sum()

    gradients = vmap(grad(value), (None, 0, 0))(weights, *experiment.canaries)
    return {n: g.flatten(1).norm(dim=1) for n, g in gradients.items()}, gradients


def deltas(experiment):
    return lipdp.sensitivity(experiment.model, experiment.loss, tuple(experiment.canaries[0].shape[1:]))


# --- bounds from guesses ----------------------------------------------------------------------------------------------


def leaky_games(rng, count, *, epsilon, delta):
    """Coins, and the guesses that the worst (ε, δ)-DP mechanism allows: with probability δ it tells the coin."""
    coins = rng.random(count) < 0.5
    right = rng.random(count) < np.where(rng.random(count) < delta, 1.0, 1.0 / (1.0 + math.exp(-epsilon)))
    return coins, right


@pytest.mark.statistical
@pytest.mark.parametrize(("epsilon", "delta"), [(1.0, 0.0), (4.0, 0.0), (1.0, 0.02)])
def test_the_bound_of_independent_games_holds_at_its_confidence_and_not_with_5_percent_more(epsilon, delta):
    rng, games, repeats = np.random.default_rng(0), 20_000, 2_000
    p = (1.0 - delta) / (1.0 + math.exp(-epsilon)) + delta
    correct = rng.binomial(games, p, size=repeats)
    guesses = np.full(repeats, games)
    bounds = audit.independent_lower_bound(correct, guesses, games, delta=delta, confidence=0.9)
    assert (bounds > epsilon).mean() <= 0.1 + 3 * math.sqrt(0.09 / repeats)
    if delta == 0:
        assert (bounds * 1.05 > epsilon).mean() > 0.12  # so a bound 5 % too large would have failed


@pytest.mark.statistical
def test_the_bound_counts_delta_against_the_guesses_that_are_made():
    """A mechanism that tells the coin with probability δ, else nothing: (0, δ)-DP, and always guessed right."""
    rng, games, delta, repeats = np.random.default_rng(1), 1000, 0.01, 500
    guesses = rng.binomial(games, delta, size=repeats)
    bounds = audit.independent_lower_bound(guesses, guesses, games, delta=delta, confidence=0.95)
    assert (bounds > 0).mean() <= 0.05
    careless = audit.independent_lower_bound(guesses, guesses, games, delta=0.0, confidence=0.95)
    assert (careless > 0).mean() > 0.9


@pytest.mark.statistical
def test_the_p_value_of_one_run_holds_under_delta_and_would_not_without_it():
    rng, canaries, epsilon, delta = np.random.default_rng(2), 1000, 1.0, 0.05
    alarms, careless = [], []
    for _ in range(300):
        _, right = leaky_games(rng, canaries, epsilon=epsilon, delta=delta)
        count = int(right.sum())
        alarms.append(audit.one_run_p_value(count, canaries, canaries, epsilon=epsilon, delta=delta) < 0.05)
        careless.append(audit.one_run_p_value(count, canaries, canaries, epsilon=epsilon, delta=0.0) < 0.05)
    assert np.mean(alarms) <= 0.05
    assert np.mean(careless) > 0.15


def test_the_bound_of_one_run_gives_the_published_example():
    assert audit.one_run_lower_bound(75, 100, 1000, delta=1e-4, confidence=0.95) == pytest.approx(0.673, abs=5e-4)


def test_bounds_are_zero_without_evidence_and_grow_with_it():
    for right in (0, 10, 50):
        assert audit.one_run_lower_bound(right, 100, 1000, delta=DELTA, confidence=0.95) == pytest.approx(0, abs=1e-9)
        assert audit.independent_lower_bound(right, 100, 1000, delta=DELTA, confidence=0.95) == 0
    bounds = audit.independent_lower_bound([70, 80, 90, 100], [100] * 4, 1000, delta=DELTA, confidence=0.95)
    assert (np.diff(bounds) > 0).all()
    assert np.isfinite(bounds).all()


def test_numbers_that_cannot_be_are_refused():
    with pytest.raises(ParameterError, match="at most the next"):
        audit.one_run_lower_bound(10, 5, 100, delta=DELTA, confidence=0.95)
    with pytest.raises(ParameterError, match="confidence"):
        audit.independent_lower_bound(1, 2, 3, delta=DELTA, confidence=1.0)
    with pytest.raises(ParameterError, match="delta"):
        audit.one_run_lower_bound(1, 2, 3, delta=1.0, confidence=0.9)


# --- guessing ---------------------------------------------------------------------------------------------------------


def test_the_rule_picks_the_score_and_the_sign_that_tell_something():
    rng = np.random.default_rng(0)
    coins = rng.random(4000) < 0.5
    scores = {"noise": rng.normal(size=4000), "backwards": rng.normal(size=4000) - 2.0 * coins}
    rule = choose(scores, coins, delta=DELTA, confidence=0.95, games=4000)
    assert (rule.score, rule.sign) == ("backwards", -1.0)
    for correct, guesses in (rule.by_threshold(scores, coins), rule.by_rank(scores, coins)):
        assert guesses < 4000
        assert correct / guesses > 0.9


def test_guesses_by_rank_are_as_many_as_was_fixed_before():
    rule = Rule("s", 1.0, 0.5, -0.5, 0.1, 0.05)
    coins = np.arange(200) % 2 == 0
    correct, guesses = rule.by_rank({"s": np.where(coins, 1.0, -1.0)}, coins)
    assert (correct, guesses) == (30, 30)
    assert rule.by_rank({"s": np.where(coins, -1.0, 1.0)}, coins) == (0, 30)


@pytest.mark.parametrize("games", [41, 100, 301])
def test_no_game_is_guessed_twice(games):
    coins = np.arange(games) % 2 == 0
    scores = {"s": np.where(coins, 1.0, -1.0) + np.linspace(0, 1e-3, games)}
    rule = choose(scores, coins, delta=DELTA, confidence=0.95, games=games)
    assert rule.low <= rule.high
    for correct, guesses in (rule.by_threshold(scores, coins), rule.by_rank(scores, coins)):
        assert 0.9 * games < guesses <= games
        assert correct >= guesses - 1
    assert Rule("s", 1.0, 0.0, 0.0, 0.5, 0.5).by_rank(scores, coins)[1] <= games


# --- canaries ---------------------------------------------------------------------------------------------------------


def test_the_worst_case_record_is_at_every_bound_and_the_others_have_no_gradient():
    experiment = audit.worst_case()
    bounds, (norms, _) = deltas(experiment), per_sample_norms(experiment)
    assert set(norms) == {"conv.weight", "conv.bias", "dense.weight"}
    for name, norm in norms.items():
        assert 1 - 1e-3 < norm.item() / bounds[name] <= 1  # float32 certificates keep a slack
    model = experiment.fresh_model()
    experiment.loss(model(experiment.others[0]), experiment.others[1]).sum().backward()
    assert all(not p.grad.any() for p in model.parameters())


def test_opposed_records_pull_the_other_way():
    experiment = audit.worst_case(opposed=True, records=2)
    gradients = []
    for x, y in (experiment.canaries, tuple(t[:1] for t in experiment.others)):
        model = experiment.fresh_model()
        experiment.loss(model(x), y).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(gradients[0], -gradients[1])


def test_gradient_canaries_are_orthogonal_and_at_both_bounds():
    experiment = audit.gradient_canaries(64)
    bounds, (norms, gradients) = deltas(experiment), per_sample_norms(experiment)
    assert len(experiment.canaries[0]) == 64
    for name, norm in norms.items():
        assert (norm / bounds[name]).min() > 1 - 1e-3
        assert (norm / bounds[name]).max() <= 1
        rows = gradients[name].flatten(1)
        gram = rows @ rows.T
        assert (gram - torch.diag(gram.diag())).abs().max() < 1e-6 * gram.diag().min()
    assert bounds["second.weight"] == pytest.approx(2 * bounds["first.weight"], rel=1e-4)


def test_input_canaries_are_mislabelled_within_the_bound_and_steeper_than_the_records_they_were():
    torch.manual_seed(0)
    plain = audit.input_canaries(40, climb=0)
    torch.manual_seed(0)
    climbed = audit.input_canaries(40, climb=5)
    radius = next(float(m.bound) for m in climbed.model.modules() if isinstance(m, InputBound))
    assert climbed.canaries[0].flatten(1).norm(dim=1).max() <= radius * (1 + 1e-6)
    assert torch.equal(plain.canaries[1], climbed.canaries[1])
    split = lipdp.data.load("digits")
    where = (plain.canaries[0].flatten(1)[:, None] == split.train_x.flatten(1)[None]).all(2).float().argmax(1)
    assert (split.train_y[where] != plain.canaries[1]).all()
    assert len(climbed.others[0]) == len(split.train_x) - 40
    bounds = deltas(climbed)
    before, after = (
        sum((norm / bounds[n]) ** 2 for n, norm in per_sample_norms(e)[0].items()) for e in (plain, climbed)
    )
    assert (after >= before - 1e-6).all()
    assert after.mean() > 1.2 * before.mean()
    assert after.max() <= len(bounds)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: audit.worst_case(sampling_rate=0.3, records=4), "whole number"),
        (lambda: audit.worst_case(kernel=4), "odd"),
        (lambda: audit.gradient_canaries(1), "2 to"),
        (lambda: audit.input_canaries(2000), "input_canaries=2000: .* can be canaries"),
        (lambda: audit.many_runs(audit.gradient_canaries(8), epsilon=1.0), "one canary"),
        (lambda: audit.many_runs(epsilon=1.0, runs=3), "40 to"),
        (lambda: audit.one_run(audit.worst_case(), epsilon=1.0), "40 to"),
    ],
)
def test_experiments_that_cannot_be_are_refused(make, message):
    with pytest.raises(ParameterError, match=message):
        make()


# --- the engine passes ------------------------------------------------------------------------------------------------


@pytest.mark.statistical
@pytest.mark.parametrize("epsilon", [1.0, 4.0, 8.0])
@pytest.mark.parametrize("allocation", ["per_layer", "min_variance"])
def test_one_run_finds_about_half_of_the_claim_and_never_more_than_all(epsilon, allocation):
    result = audit.one_run(audit.gradient_canaries(16_384), epsilon=epsilon, allocation=allocation, seed=1)
    assert result.claimed_epsilon == pytest.approx(epsilon, rel=0.01)
    assert 0.4 < result.ratio <= 1
    assert not result.violated


@pytest.mark.statistical
def test_the_scores_have_the_law_of_the_claim():
    """Worst-case gradient canaries, T steps at rate q = 1: the score is normal, of the claimed shift and unit noise."""
    result = audit.one_run(audit.gradient_canaries(4096, steps=3), epsilon=4.0, seed=0)
    shift = math.sqrt(3) / result.noise_multiplier
    for scores, mean in ((result.scores_in, shift**2 / 2), (result.scores_out, -(shift**2) / 2)):
        assert abs(scores.mean() - mean) < 5 * shift / math.sqrt(len(scores))
        assert abs(scores.std() / shift - 1) < 5 / math.sqrt(2 * len(scores))


@pytest.mark.statistical
def test_many_runs_with_sampling_and_several_steps_stay_below_the_claim():
    experiment = audit.worst_case(steps=2, sampling_rate=0.5)
    result = audit.many_runs(experiment, epsilon=8.0, runs=120, seed=0)
    assert 0 < result.lower_bound < result.claimed_epsilon
    assert (result.steps, result.sampling_rate, result.trials) == (2, 0.5, 120)


@pytest.mark.slow
@pytest.mark.statistical
@pytest.mark.parametrize(("epsilon", "runs", "least"), [(1.0, 60_000, 0.3), (4.0, 20_000, 0.45), (8.0, 30_000, 0.45)])
def test_many_runs_find_about_half_of_the_claim(epsilon, runs, least):
    """Expected 0.57 ± 0.09, 0.57 ± 0.08 and 0.54 ± 0.04 by simulation of the claimed mechanism."""
    result = audit.many_runs(epsilon=epsilon, runs=runs, seed=1)
    assert least <= result.ratio <= 1


@pytest.mark.statistical
@pytest.mark.parametrize("epsilon", [1.0, 4.0, 8.0])
def test_one_run_finds_half_of_the_claim(epsilon):
    result = audit.one_run(epsilon=epsilon, seed=1)
    assert 0.5 <= result.ratio <= 1


def test_a_seed_repeats_an_audit_and_no_seed_does_not():
    def bound(seed):
        return audit.one_run(audit.gradient_canaries(1024), epsilon=8.0, seed=seed).scores_in

    assert np.array_equal(bound(5), bound(5))
    assert not np.array_equal(bound(None), bound(None))


# --- correlated noise -------------------------------------------------------------------------------------------------


def too_little(factor):
    """`BandedNoise.add_` with that part of the noise."""
    add = BandedNoise.add_
    return "add_", lambda self, tensors, stds, *, row: add(self, tensors, stds * factor, row=row)


def correlated_by(c):
    """`BandedNoise` with other coefficients than b bands have."""
    make = BandedNoise.__init__

    def init(self, noise, bands):
        make(self, noise, bands)
        self.coefficients = tuple(c(bands))

    return "__init__", init


def law(result):
    """Whether the scores with and without the canary are as the claim has them, up to five standard errors.

    A use in rows t, t + 1, … of T moves v = C y by the first T − t of c/σ. Every canary is drawn, each b steps.
    """
    c, left = np.array(coefficients(result.bands)), result.steps - np.arange(result.bands)
    group = [sum((c[: g - s] ** 2).sum() for s in range(0, g, result.bands)) for g in left]
    square = np.mean(group) / result.noise_multiplier**2
    spread = math.sqrt(square + np.var(group) / result.noise_multiplier**4 / 4)
    return all(
        abs(scores.mean() - mean) < 5 * spread / math.sqrt(len(scores))
        and abs(scores.std() / spread - 1) < 5 / math.sqrt(2 * len(scores))
        for scores, mean in ((result.scores_in, square / 2), (result.scores_out, -square / 2))
    )


def banded_run(steps=2, bands=4):
    return audit.one_run(audit.gradient_canaries(4096, steps=steps), epsilon=1.0, bands=bands, seed=1)


@pytest.mark.statistical
@pytest.mark.parametrize(("steps", "bands"), [(2, 4), (3, 3)])
def test_one_run_with_bands_finds_the_law_of_the_claim(steps, bands):
    result = banded_run(steps, bands)
    assert law(result)
    assert (result.steps, result.bands) == (steps * bands, bands)
    assert result.claimed_epsilon == pytest.approx(1.0, rel=0.01)
    assert 0 <= result.lower_bound < result.claimed_epsilon


@pytest.mark.statistical
@pytest.mark.parametrize(
    "wrong",
    [
        too_little(0.9),
        correlated_by(lambda b: coefficients(2 * b)),  # cancels between uses of a record
        correlated_by(lambda b: np.array(coefficients(b)) / coefficients(b)[0]),  # a σ for independent noise
    ],
    ids=["a noise of 90 %", "bands too many", "columns not scaled to norm 1"],
)
def test_the_law_of_the_claim_tells_wrong_correlated_noise(wrong, monkeypatch):
    monkeypatch.setattr(BandedNoise, *wrong)
    assert not law(banded_run(steps=4))


@pytest.mark.statistical
def test_one_run_refutes_a_quarter_of_the_correlated_noise(monkeypatch):
    monkeypatch.setattr(BandedNoise, *too_little(0.25))
    assert banded_run().violated


@pytest.mark.statistical
def test_many_runs_refute_a_tenth_of_the_correlated_noise_and_not_all_of_it(monkeypatch):
    play = partial(audit.many_runs, audit.worst_case(steps=2), bands=2, runs=100, seed=0)
    right = play(epsilon=8.0)
    assert 0 < right.lower_bound < right.claimed_epsilon
    monkeypatch.setattr(BandedNoise, *too_little(0.1))
    assert play(epsilon=1.0).violated


def test_many_runs_with_bands_refuse_records_that_show_how_they_were_dealt():
    with pytest.raises(ParameterError, match="must have no gradient"):
        audit.many_runs(audit.worst_case(records=2, opposed=True), epsilon=1.0, bands=2, runs=40)


def test_a_suite_with_bands_says_what_it_leaves_out(capsys):
    suite = Suite(8.0, methods=("sampled-runs", "input-canaries"), input_canaries=60, bands=2, seed=0)
    result = suite.run()
    assert [one.experiment for one in result.results] == ["input canaries"]
    assert result.results[0].confidence == 0.95
    assert "sampled-runs is left out" in result.as_dict()["left_out"]
    assert main(["audit", "--epsilon", "4", "--method", "sampled-runs", "--bands", "2"]) == 2
    assert "--bands 2: sampled-runs is left out" in capsys.readouterr().err


# --- the command ------------------------------------------------------------------------------------------------------

QUICK = ["audit", "--epsilon", "4", "--method", "gradient-canaries", "--canaries", "2048", "--seed", "0"]


def test_the_command_writes_its_report_and_its_picture(tmp_path, capsys):
    assert main([*QUICK, "--out", str(tmp_path / "audit")]) == 0
    printed = capsys.readouterr().out
    assert "consistent" in printed
    assert "claimed" in printed
    report = json.loads((tmp_path / "audit" / "audit.json").read_text())
    assert report["claimed_epsilon"] == pytest.approx(4, rel=0.01)
    assert 0 < report["lower_bound"] < report["claimed_epsilon"]
    assert (report["confidence"], report["delta"], report["method"]) == (0.95, DELTA, "one run")
    assert report["violated"] is False
    assert report["audits"][0]["trials"] == 2048
    assert "seed" not in report
    assert (tmp_path / "audit" / "audit.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in (tmp_path / "audit").iterdir()) == ["audit.json", "audit.png"]


@pytest.mark.filterwarnings("error:this run can hardly learn", "error:this learning rate is far too")
def test_an_audit_has_no_advice_for_a_model_that_nobody_wants_to_learn(capsys):
    assert main(["audit", "--epsilon", "1", "--method", "many-runs", "--runs", "40"]) == 0


def test_the_command_ends_with_1_when_the_claim_is_refuted(capsys):
    with planted("noise per microbatch"):
        code = main(["audit", "--epsilon", "1", "--method", "gradient-canaries", "--seed", "1", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert code == 1
    assert report["violated"]
    assert report["lower_bound"] > report["claimed_epsilon"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--epsilon", "-1"],
        ["--epsilon", "4", "--method", "none"],
        ["--epsilon", "4", "--confidence", "2"],
        ["--epsilon", "4", "--method", "many-runs", "--runs", "1"],
        ["--epsilon", "4", "--method", "gradient-canaries", "--method", "gradient-canaries"],
        ["--epsilon", "4", "--delta", "0"],
        ["--epsilon", "nan"],
        ["--epsilon", "4", "--seed", "-1"],
        ["--epsilon", "4", "--canaries", "1000000000", "--method", "gradient-canaries"],
        ["--epsilon", "4", "--runs", "1000000000000", "--method", "many-runs"],
        ["--epsilon", "4", "--out", __file__],
        ["--epsilon", "4", "--bands", "0"],
    ],
)
def test_the_command_refuses_with_one_message(arguments, capsys):
    assert main(["audit", *arguments]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_audits_together_share_the_error_probability():
    suite = Suite(8.0, methods=("many-runs", "gradient-canaries"), runs=60, canaries=1024, confidence=0.9, seed=0)
    told = []
    result = suite.run(lambda *step: told.append(step))
    for name in suite.methods:
        steps = [(done, total) for method, done, total in told if method == name]
        assert [done for done, _ in steps] == sorted(done for done, _ in steps)
        assert steps[-1][0] == steps[-1][1] == steps[0][1] > steps[0][0]
    assert [one.confidence for one in result.results] == pytest.approx([0.95, 0.95])
    assert result.strongest.ratio == max(one.ratio for one in result.results)
    assert result.as_dict()["confidence"] == 0.9
    assert len(draw(result.results).axes) == 2


def test_every_method_of_the_suite_has_a_name_that_is_checked():
    with pytest.raises(UnknownNameError, match="many-runs"):
        Suite(1.0, methods=("many-run",))
    assert set(Suite(1.0).methods) == set(METHODS)


def test_a_report_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    result = SuiteResult((audit.one_run(audit.gradient_canaries(256), epsilon=8.0, seed=0),), 0.95)
    monkeypatch.setattr("json.dumps", lambda *args, **kwargs: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        write(result, tmp_path)
    assert list(tmp_path.iterdir()) == []
