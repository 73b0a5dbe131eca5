"""The guessing rule: which score to look at and where to abstain, chosen on games that are then set aside."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from lipdp.audit.statistics import independent_lower_bound

Array = NDArray[np.float64]
_TAILS = np.geomspace(1e-3, 0.5, 12)  # shares of the games to guess in, at either end
_NORMAL = 1e-3  # p-value
_ENOUGH = 100  # games of a kind, to fit a normal law


@dataclass(frozen=True)
class Rule:
    """Guess "in" where `sign`·score > `high`, "out" where it is < `low`, else abstain.

    `share_in` and `share_out` say how often either guess was made in the games the rule was chosen on.
    """

    score: str
    sign: float
    high: float
    low: float
    share_in: float
    share_out: float

    def by_threshold(self, scores: Mapping[str, Array], included: NDArray[np.bool_]) -> tuple[int, int]:
        """(right guesses, all guesses), each game by itself."""
        values = self.sign * scores[self.score]
        said_in, said_out = values > self.high, values < self.low
        return int((said_in & included).sum() + (said_out & ~included).sum()), int(said_in.sum() + said_out.sum())

    def by_rank(self, scores: Mapping[str, Array], included: NDArray[np.bool_]) -> tuple[int, int]:
        """(right guesses, all guesses), as many guesses as the shares say, however the scores fall: for one run."""
        order = np.argsort(-self.sign * scores[self.score], kind="stable")
        first = round(self.share_in * len(order))
        last = min(round(self.share_out * len(order)), len(order) - first)
        right = included[order[:first]].sum() + (~included[order[len(order) - last :]]).sum()
        return int(right), first + last


def choose(
    scores: Mapping[str, Array], included: NDArray[np.bool_], *, delta: float, confidence: float, games: int
) -> Rule:
    """The rule that promises the best lower bound for `games` games, judged by these, which must not be used for it."""
    best, value = Rule(next(iter(scores)), 1.0, np.inf, -np.inf, 0.0, 0.0), -1.0
    for name, raw in scores.items():
        for sign in (1.0, -1.0):
            values = sign * raw
            tails = _tails(values[included], values[~included], games)
            bounds = independent_lower_bound(
                tails.correct, tails.guesses, tails.games, delta=delta, confidence=confidence
            )
            i, j = np.unravel_index(int(bounds.argmax()), bounds.shape)
            if bounds[i, j] > value:
                high, low = float(tails.highs[i]), float(tails.lows[j])
                shares = float((values > high).mean()), float((values < low).mean())
                best, value = Rule(name, sign, high, low, *shares), float(bounds[i, j])
    return best


@dataclass(frozen=True)
class _Tails:
    """Thresholds (H,) and (L,), and how many guesses they make in `games` games: right ones and all, (H, L)."""

    highs: Array
    lows: Array
    correct: Array
    guesses: Array
    games: int


def _tails(inside: Array, outside: Array, games: int) -> _Tails:
    """Counted, or where both scores look normal, as normal ones have: far out there is little to count."""
    both = np.sort(np.concatenate([inside, outside]))
    ranks = np.unique(np.minimum(np.round(_TAILS * len(both)).astype(int), (len(both) - 1) // 2))  # low ≤ high
    highs = np.array([np.inf, *both[len(both) - 1 - ranks[ranks > 0]]])
    lows = np.array([-np.inf, *both[ranks[ranks > 0]]])
    if min(len(inside), len(outside)) >= _ENOUGH and all(_looks_normal(v) for v in (inside, outside)):
        scale = games / len(both)
        right_in, wrong_in = (scale * len(v) * stats.norm.sf(highs, v.mean(), v.std()) for v in (inside, outside))
        right_out, wrong_out = (scale * len(v) * stats.norm.cdf(lows, v.mean(), v.std()) for v in (outside, inside))
        return _together(highs, lows, (right_in, wrong_in), (right_out, wrong_out), games, 0.0)
    right_in, wrong_in = ((v[None, :] > highs[:, None]).sum(1) for v in (inside, outside))
    right_out, wrong_out = ((v[None, :] < lows[:, None]).sum(1) for v in (outside, inside))
    # one wrong guess more than seen: at the very ends few games tell nothing of the wrong ones to come
    return _together(highs, lows, (right_in, wrong_in), (right_out, wrong_out), len(both) + 1, 1.0)


def _together(
    highs: Array, lows: Array, said_in: tuple[Array, Array], said_out: tuple[Array, Array], games: int, extra: float
) -> _Tails:
    correct = said_in[0][:, None] + said_out[0][None, :]
    guesses = correct + said_in[1][:, None] + said_out[1][None, :]
    return _Tails(highs, lows, correct, guesses + extra * (guesses > 0), games)


def _looks_normal(values: Array) -> bool:
    return bool(values.std() > 0 and stats.normaltest(values).pvalue > _NORMAL)
