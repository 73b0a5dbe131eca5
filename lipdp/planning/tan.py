"""The total amount of noise (TAN): one number that says, for σ ≥ 2, what a run costs and how well it can learn."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lipdp.accounting.accountants import checked_delta
from lipdp.accounting.events import require_positive
from lipdp.accounting.plan import Subsampling
from lipdp.errors import ParameterError

WALL = 0.5
"""σ below which ε explodes at constant η, whatever else is done: the noise wall."""

SWEET_SPOT = (2.0, 4.0)
"""σ from which on more compute buys little privacy, and σ beyond which it buys nearly none."""


def tan_eta(*, noise_multiplier: float, sampling_rate: float, steps: int) -> float:
    """η, one over the total noise of a run: η² = q² T / (2σ²).

    The signal of T steps over their noise, but for a factor √2: every step has B/σ = qN/σ, and T of them average to
    √T B/σ = √2 N η. (q, σ, T) → (q/k, σ/k, T) leaves it as it is.

    >>> round(tan_eta(noise_multiplier=3.0, sampling_rate=4096 / 50_000, steps=2500), 4)
    0.9654

    Source: Sander, Stock & Sablayrolles, TAN without a burn, ICML 2023, section 3.
    """
    Subsampling(sampling_rate, steps).event(noise_multiplier)  # refuses what is out of range
    return sampling_rate * math.sqrt(steps / 2.0) / noise_multiplier


def tan_epsilon(eta: float, delta: float) -> float:
    """ε_TAN = η² + 2η √ln(1/δ), a first guess, not a bound.

    For small q one step's Rényi divergence of order α is about α q² (e^(1/σ²) − 1)/2, for large σ thus α q²/(2σ²), and
    that of T steps α η². The classical conversion min_α α η² + ln(1/δ)/(α − 1) is the formula. It errs on both
    sides: the conversion is loose (for σ ≥ 2 the exact ε was 6 to 25 % lower, most where ε is small), the expansion too
    low for a small σ (at σ = 0.5 the exact ε was 3.6 to 5.3 times as much). Use `lipdp.epsilon` for a claim.

    >>> round(tan_epsilon(0.9655, 1e-5), 2)
    7.48

    Source: Sander, Stock & Sablayrolles (2023), equation 4.
    """
    if not 0.0 <= eta < math.inf:
        raise ParameterError(f"eta={eta}: a finite number ≥ 0 is needed")
    return eta**2 + 2.0 * eta * math.sqrt(-math.log(checked_delta(delta)))


def eta_for(epsilon: float, delta: float) -> float:
    """The η with ε_TAN(η) = ε: √(ln(1/δ) + ε) − √ln(1/δ).

    >>> round(eta_for(tan_epsilon(0.7, 1e-6), 1e-6), 12)
    0.7
    """
    require_positive("epsilon", epsilon)
    log = -math.log(checked_delta(delta))
    return epsilon / (math.sqrt(log + epsilon) + math.sqrt(log))


@dataclass(frozen=True)
class Move:
    """What to change at this σ: multiply q (or B) and σ by `factor` at fixed T, because of `reason`."""

    factor: float
    reason: str


def rule(noise_multiplier: float, *, sampling_rate: float = 0.0) -> Move:
    """σ < 2: double (q, σ); σ > 4: halve both; else keep them; always at fixed T, where η and so utility stay the same.

    With σ < 2 a run of twice the batch learns as well for a smaller ε; with σ > 4 one of half the batch has nearly the
    same ε for half the compute. At q = 1 there is no amplification by sampling to lose, hence no wall: ε depends on η
    alone, and nothing is to be gained.

    >>> rule(1.0).factor, rule(3.0).factor, rule(6.0).factor, rule(1.0, sampling_rate=1.0).factor
    (2.0, 1.0, 0.5, 1.0)
    """
    require_positive("noise_multiplier", noise_multiplier)
    low, high = SWEET_SPOT
    if sampling_rate == 1.0:
        return Move(1.0, "q = 1: every record in every batch, where ε depends on η alone")
    if noise_multiplier < WALL:
        return Move(2.0, f"behind the noise wall (σ < {WALL:g}): ε explodes; double B and σ")
    if noise_multiplier < low:
        return Move(2.0, f"below the sweet spot (σ < {low:g}): doubling B and σ lowers ε at the same utility")
    if noise_multiplier > high:
        return Move(0.5, f"above the sweet spot (σ > {high:g}): half of B and σ costs nearly the same ε")
    return Move(1.0, f"in the sweet spot ({low:g} ≤ σ ≤ {high:g})")
