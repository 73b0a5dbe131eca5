"""The two audits: many tiny runs that differ in one record, and one run with many canaries."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lipdp.accounting.plan import PrivacyPlan
from lipdp.audit.experiments import Experiment, gradient_canaries, worst_case
from lipdp.audit.guessing import choose
from lipdp.audit.observe import Progress, Setting, Training, fair_coins, simultaneous, worlds
from lipdp.audit.statistics import independent_lower_bound, one_run_lower_bound
from lipdp.errors import ParameterError

_HELD_OUT = 0.25  # share of the games on which the guessing rule is chosen

Array = NDArray[np.float64]


@dataclass(frozen=True)
class AuditResult:
    """What an audit claims to know: with probability ≥ `confidence`, the true ε at `delta` is above `lower_bound`.

    Attributes:
        method: "many runs" or "one run".
        experiment: what was trained.
        claimed_epsilon: the engine's own account of one run.
        lower_bound, confidence, delta: see above.
        trials: games played: runs, or canaries of the one run.
        guesses, correct: among the trials that were not used to choose the guessing rule.
        score: the score that was looked at.
        noise_multiplier, sampling_rate, steps, bands: σ, q, T and b of one run.
        scores_in, scores_out: that score in the trials with the canary and without.
    """

    method: str
    experiment: str
    claimed_epsilon: float
    lower_bound: float
    confidence: float
    delta: float
    trials: int
    guesses: int
    correct: int
    score: str
    noise_multiplier: float
    sampling_rate: float
    steps: int
    bands: int
    scores_in: Array = field(repr=False, compare=False)
    scores_out: Array = field(repr=False, compare=False)

    @property
    def violated(self) -> bool:
        """The lower bound is above the claim: the guarantee is false, at this confidence."""
        return self.lower_bound > self.claimed_epsilon

    @property
    def ratio(self) -> float:
        """lower_bound / claimed_epsilon; above 1 is a violation."""
        if self.claimed_epsilon == 0.0:
            return math.inf if self.violated else 0.0
        return self.lower_bound / self.claimed_epsilon

    @property
    def verdict(self) -> str:
        """One line."""
        return "VIOLATED: lower bound above the claim" if self.violated else "consistent"

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON, without the scores."""
        names = [n for n in self.__dataclass_fields__ if not n.startswith("scores_")]
        return {**{n: getattr(self, n) for n in names}, "violated": self.violated}


@dataclass(frozen=True)
class Games:
    """Coins, and by name the scores of the games they were tossed in."""

    scores: Mapping[str, Array]
    coins: NDArray[np.bool_]


def many_runs(
    experiment: Experiment | None = None,
    *,
    epsilon: float,
    delta: float = 1e-5,
    runs: int = 10_000,
    confidence: float = 0.95,
    allocation: str = "per_layer",
    accountant: str = "prv",
    seed: int | None = None,
    bands: int = 1,
    progress: Progress = lambda done, total: None,
) -> AuditResult:
    r"""Play many games: tell a tiny run on N records from one on N + 1.

    Every run is trained by the real `PrivacyEngine`, with the noise it calibrates for ε. A quarter of the runs chooses
    the score and the thresholds, the others are guessed, and the number of right guesses gives the bound.

    Guarantees: if every run is (ε, δ)-DP and the runs are independent, the result exceeds ε with probability at most
    1 − `confidence`. Finding nothing proves nothing.

    Args:
        experiment: with one canary; by default `worst_case()`.
        epsilon, delta: the claim to audit: the engine's noise is calibrated to it.
        runs: games; a bound of half the claim takes 10 000 to 20 000 at ε = 4 and 8, 60 000 at ε = 1.
        confidence: of the lower bound.
        allocation, accountant: of the engine.
        seed: repeat the audit exactly.
        bands: b > 1 for noise correlated over b steps, in runs b times as long (`Experiment.in_bands`); the records
            beside the canary must then have no gradient.
        progress: is told how many steps are taken, and of how many.

    Raises:
        ParameterError: not one canary, a learning rate, fewer than 40 runs, or what `bands` says. LipdpError: what the
            engine refuses.

    >>> result = lipdp.audit.many_runs(epsilon=8.0, runs=120, seed=0)
    >>> 0.5 < result.lower_bound < result.claimed_epsilon, result.verdict
    (True, 'consistent')

    Source: Nasr et al. (2023), "Tight auditing of differentially private machine learning".
    """
    experiment = worst_case() if experiment is None else experiment
    if len(experiment.canaries[0]) != 1 or experiment.learning_rate != 0.0:
        raise ParameterError(
            f"{experiment.name}: many_runs takes one canary (given {len(experiment.canaries[0])}) and learning rate 0"
            f" (given {experiment.learning_rate:g}), so that runs do not differ in anything else"
        )
    experiment, coins = experiment.in_bands(bands), fair_coins(runs, seed)
    setting = Setting(_plan(experiment, epsilon, delta, accountant), allocation, seed, progress)
    scores, training = worlds(experiment, setting, coins)
    early, late = _split(Games(scores, coins))
    rule = choose(early.scores, early.coins, delta=delta, confidence=confidence, games=len(late.coins))
    correct, guesses = rule.by_threshold(late.scores, late.coins)
    bound = independent_lower_bound(correct, guesses, len(late.coins), delta=delta, confidence=confidence)
    guessed: dict[str, Any] = {"score": rule.score, "guesses": guesses, "correct": correct, "lower_bound": float(bound)}
    return _result("many runs", training, Games(scores, coins), delta=delta, confidence=confidence, **guessed)


def one_run(
    experiment: Experiment | None = None,
    *,
    epsilon: float,
    delta: float = 1e-5,
    confidence: float = 0.95,
    allocation: str = "per_layer",
    accountant: str = "prv",
    seed: int | None = None,
    bands: int = 1,
    progress: Progress = lambda done, total: None,
) -> AuditResult:
    """Guess which of m canaries took part in one single run.

    The run is trained by the real `PrivacyEngine`; the adversary sees the weights at every step. A quarter of the
    canaries chooses how many guesses to make of either kind, the others are guessed, those with the most extreme
    scores, and the number of right ones gives the bound.

    Guarantees: if the run is (ε, δ)-DP, the result exceeds ε with probability at most 1 − `confidence`, whatever the
    canaries have to do with each other.

    Args:
        experiment: by default `gradient_canaries(32_768)`; `input_canaries` is an ordinary training.
        Others: as `many_runs`; with `bands` any experiment will do.

    >>> result = lipdp.audit.one_run(lipdp.audit.gradient_canaries(1024), epsilon=8.0, seed=0)
    >>> 1 < result.lower_bound < result.claimed_epsilon
    True

    Source: Steinke, Nasr & Jagielski (2023), "Privacy auditing with one (1) training run", algorithm 1.
    """
    experiment = (gradient_canaries(32_768) if experiment is None else experiment).in_bands(bands)
    coins = fair_coins(len(experiment.canaries[0]), seed)
    setting = Setting(_plan(experiment, epsilon, delta, accountant), allocation, seed, progress)
    scores, training = simultaneous(experiment, setting, torch.from_numpy(coins))
    # canaries may be sorted; which are held out must not be
    order = np.random.default_rng(seed).permutation(len(coins))
    early, late = _split(Games({name: values[order] for name, values in scores.items()}, coins[order]))
    rule = choose(early.scores, early.coins, delta=delta, confidence=confidence, games=len(late.coins))
    correct, guesses = rule.by_rank(late.scores, late.coins)
    bound = one_run_lower_bound(correct, guesses, len(late.coins), delta=delta, confidence=confidence)
    guessed: dict[str, Any] = {"score": rule.score, "guesses": guesses, "correct": correct, "lower_bound": bound}
    return _result("one run", training, Games(scores, coins), delta=delta, confidence=confidence, **guessed)


def _plan(experiment: Experiment, epsilon: float, delta: float, accountant: str) -> PrivacyPlan:
    return PrivacyPlan.of(
        dataset_size=experiment.dataset_size, expected_batch_size=experiment.expected_batch_size,
        steps=experiment.steps, bands=experiment.bands, target_epsilon=epsilon, target_delta=delta,
        accountant=accountant,
    )  # fmt: skip


def _split(games: Games) -> tuple[Games, Games]:
    """The games to choose the rule on, and those that count."""
    cut = round(_HELD_OUT * len(games.coins))
    early, late = (
        Games({name: values[part] for name, values in games.scores.items()}, games.coins[part])
        for part in (slice(None, cut), slice(cut, None))
    )
    return early, late


def _result(method: str, training: Training, games: Games, *, score: str, delta: float, **found: Any) -> AuditResult:
    plan, values = training.engine.plan, games.scores[score]
    return AuditResult(
        method=method,
        experiment=training.experiment.name,
        claimed_epsilon=training.claimed_epsilon(delta),
        delta=delta,
        noise_multiplier=plan.noise_multiplier,
        sampling_rate=plan.sampling_rate,
        steps=training.experiment.steps,
        bands=plan.bands,
        trials=len(games.coins),
        score=score,
        scores_in=values[games.coins],
        scores_out=values[~games.coins],
        **found,
    )
