"""The guessing rule: which score to look at and where to abstain, chosen on games that are then set aside."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lipdp.audit.statistics import independent_lower_bound

Array = NDArray[np.float64]
_TAILS = np.geomspace(1e-3, 0.5, 12)  # shares of the games to guess in, at either end


@dataclass(frozen=True)
class Rule:
    """Guess "in" where `sign`·score > `high`, "out" where it is < `low`, else abstain.

    Attributes:
        score: name of the score.
        sign: 1.0, or −1.0 if small scores speak for "in".
        high, low: thresholds; ±∞ for no guess of that kind.
        share_in, share_out: how often either guess was made in the games the rule was chosen on.
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
        first, last = round(self.share_in * len(order)), round(self.share_out * len(order))
        right = included[order[:first]].sum() + (~included[order[len(order) - last :]]).sum()
        return int(right), first + last


def choose(scores: Mapping[str, Array], included: NDArray[np.bool_], *, delta: float, confidence: float) -> Rule:
    """The rule with the best lower bound on these games, which must not be used for the result.

    Args:
        scores: name → one number per game.
        included: whether the record was in.
    """
    best, value = Rule(next(iter(scores)), 1.0, np.inf, -np.inf, 0.0, 0.0), -1.0
    for name, raw in scores.items():
        for sign in (1.0, -1.0):
            rule, bound = _best_thresholds(name, sign, sign * raw, included, delta, confidence)
            if bound > value:
                best, value = rule, bound
    return best


def _best_thresholds(
    name: str, sign: float, values: Array, included: NDArray[np.bool_], delta: float, confidence: float
) -> tuple[Rule, float]:
    ascending = np.sort(values)
    count = len(values)
    ranks = np.unique(np.minimum(np.round(_TAILS * count).astype(int), count // 2))
    highs = np.array([np.inf, *(ascending[count - 1 - k] for k in ranks if k)])
    lows = np.array([-np.inf, *(ascending[k] for k in ranks if k)])
    inside, outside = np.sort(values[included]), np.sort(values[~included])
    right_in = len(inside) - np.searchsorted(inside, highs, side="right")
    wrong_in = len(outside) - np.searchsorted(outside, highs, side="right")
    right_out = np.searchsorted(outside, lows, side="left")
    wrong_out = np.searchsorted(inside, lows, side="left")
    correct = right_in[:, None] + right_out[None, :]
    guesses = correct + wrong_in[:, None] + wrong_out[None, :]
    # one wrong guess more than seen: at the very ends few games tell nothing of the wrong ones to come
    padded = guesses + (guesses > 0)
    bounds = independent_lower_bound(correct, padded, count + 1, delta=delta, confidence=confidence)
    i, j = np.unravel_index(int(bounds.argmax()), bounds.shape)
    shares = float((right_in + wrong_in)[i] / count), float((right_out + wrong_out)[j] / count)
    return Rule(name, sign, float(highs[i]), float(lows[j]), *shares), float(bounds[i, j])
