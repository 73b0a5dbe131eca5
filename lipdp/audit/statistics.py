r"""From right and wrong guesses to a lower bound on ε, at a stated confidence.

The game: a record is put in or left out by a fair coin, the mechanism runs, and an adversary who sees its output
guesses "in", guesses "out", or abstains. The better the guesses, the larger ε must be.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from lipdp.errors import ParameterError

_RATE_SHARE = 0.02  # of the error probability, for the share of games guessed in: it enters only beside δ
_MAX_EPSILON = 60.0


def independent_lower_bound(
    correct: ArrayLike, guesses: ArrayLike, games: int, *, delta: float, confidence: float
) -> NDArray[np.float64]:
    r"""Lower bound on ε from independent games, elementwise (an exact binomial, Clopper–Pearson, bound).

    The maths: in one game let a = P(guess in | in), b = P(guess in | out), c = P(guess out | out), d = P(guess out |
    in). If the mechanism is (ε, δ)-DP, then a ≤ e^ε b + δ and c ≤ e^ε d + δ. A guess is made with probability
    ρ = (a + b + c + d)/2 and is then right with probability p = (a + c)/(2ρ); adding the two inequalities,
    2ρp ≤ 2ρ e^ε (1 − p) + 2δ, so e^ε ≥ (p − δ/ρ)/(1 − p). Given the number of guesses, that of
    right ones is Binomial(guesses, p), and the number of guesses is Binomial(games, ρ). The expression grows in p and
    in ρ, so their lower confidence bounds, with error probabilities that sum to 1 − confidence, bound it.

    Guarantees: below the true ε with probability ≥ `confidence` if the games are independent, the coins fair and the
    guessing rule chosen without looking at these games.

    Args:
        correct, guesses: right guesses and all guesses, of any equal shape.
        games: how many were played, abstentions included.
        delta: δ in [0, 1).
        confidence: in (0, 1).

    >>> float(independent_lower_bound(75, 100, 1000, delta=0.0, confidence=0.95).round(3))
    0.7

    Source: Clopper & Pearson (1934); Jagielski, Ullman & Oprea (2020), section 4; Zanella-Béguelin et al. (2023).
    """
    _check(delta, confidence)
    right, made = np.asarray(correct, dtype=np.float64), np.asarray(guesses, dtype=np.float64)
    error = 1.0 - confidence
    p = _lower_proportion(right, made, error * (1.0 - _RATE_SHARE))
    rate = _lower_proportion(made, np.full_like(made, games), error * _RATE_SHARE)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(rate > 0, (p - delta / rate) / (1.0 - p), 0.0)
        return np.log(np.maximum(ratio, 1.0))


def _lower_proportion(successes: NDArray[np.float64], trials: NDArray[np.float64], error: float) -> NDArray[np.float64]:
    """Clopper–Pearson: the p at which so many successes or more have probability `error`; 0 for none."""
    shape = np.maximum(successes, 1.0)
    return np.where(successes > 0, stats.beta.ppf(error, shape, np.maximum(trials - shape, 0.0) + 1.0), 0.0)


def one_run_p_value(correct: int, guesses: int, canaries: int, *, epsilon: float, delta: float) -> float:
    r"""Probability of at least this many right guesses under (ε, δ)-DP, if all canaries are in one run.

    The maths: the coins are independent, so whatever the run reveals about the others, each guess is right with
    probability at most p = e^ε/(1 + e^ε), and under (ε, 0)-DP the number of right ones is dominated by W ~
    Binomial(guesses, p). δ lets canaries be given away, 2 m δ of them on average; spending that in the worst way adds
    at most 2mδα with α = max_i P(v − i ≤ W < v)/i, v being the number of right guesses.

    Args:
        correct: v.
        guesses: r, fixed before the coins of these canaries are looked at.
        canaries: m, abstentions included, each in by a fair coin of its own.

    >>> round(one_run_p_value(75, 100, 1000, epsilon=0.673, delta=1e-4), 3)
    0.05

    Source: Steinke, Nasr & Jagielski (2023), theorem 5.2 and appendix D, whose example this is.
    """
    p = 1.0 / (1.0 + math.exp(-epsilon))
    beta = float(stats.binom.sf(correct - 1, guesses, p))
    if delta == 0.0 or correct < 1:
        return min(beta, 1.0)
    below = np.cumsum(stats.binom.pmf(np.arange(correct - 1, -1, -1), guesses, p))
    alpha = float((below / np.arange(1, correct + 1)).max())
    return min(beta + 2.0 * canaries * delta * alpha, 1.0)


def one_run_lower_bound(correct: int, guesses: int, canaries: int, *, delta: float, confidence: float) -> float:
    """The largest ε that `one_run_p_value` refutes at this confidence; 0 if it refutes none.

    Args: as `one_run_p_value`.

    >>> round(one_run_lower_bound(75, 100, 1000, delta=1e-4, confidence=0.95), 3)
    0.673
    """
    _check(delta, confidence)
    if not 0 <= correct <= guesses <= canaries:
        raise ParameterError(
            f"{correct} right guesses of {guesses} among {canaries} canaries: each number is at most the next"
        )
    low, high = 0.0, _MAX_EPSILON
    for _ in range(40):
        middle = (low + high) / 2.0
        refuted = one_run_p_value(correct, guesses, canaries, epsilon=middle, delta=delta) < 1.0 - confidence
        low, high = (middle, high) if refuted else (low, middle)
    return low


def _check(delta: float, confidence: float) -> None:
    if not 0.0 <= delta < 1.0:
        raise ParameterError(f"delta={delta}: a probability in [0, 1) is needed")
    if not 0.0 < confidence < 1.0:
        raise ParameterError(f"confidence={confidence}: a probability in (0, 1) is needed, 0.95 say")
