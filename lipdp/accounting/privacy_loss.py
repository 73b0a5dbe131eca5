"""The privacy loss of one step, a Gaussian mechanism on a random subsample, in the forms that the accountants take.

Units: the sum moves by 1 between neighbours and the noise has std σ. Write `N_c` for `N(c, σ²)` and
`mix = (1−q)·N_0 + q·N_1`. The ratio `mix/N_0` at x is `e^ℓ`, `ℓ(x) = log(1−q + q·e^{(2x−1)/2σ²})`, increasing, with
inverse `x(t) = σ²·z(t) + 1/2`, `z(t) = log((e^t − 1 + q)/q)`. `H_α(P‖Q) = ∫ (P − αQ)₊` is the hockey-stick divergence:
ε is reached at δ when `H_{e^ε} ≤ δ`. A pair (P, Q) *dominates* a mechanism when no neighbours have a larger `H_α`, for
any α > 0; then the product of the pairs dominates the adaptive composition (Zhu, Dong & Wang 2022, theorem 10), so
composing the losses below is sound.

- **Add or remove one, Poisson.** Removing a record is dominated by (mix, N_0), adding one by (N_0, mix). A run is
  either one or the other from end to end, so ε is the larger of two accounts. In every case computed here removing is
  the larger, but under composition this is not a theorem (Lebeda et al. 2024), so both are always computed.
- **Add or remove one, truncated Poisson.** Of the records drawn at rate q a uniform subset of C takes part where they
  are more than C. The pair: a public coin falls with probability t; then (mix, N_0) at σ/2, else at σ, both of rate q
  (adding: swapped). Proof: let i be the record, D ∋ i, and K how many of the others are drawn, which has one law on
  both sides. Where K < C, i joins with probability q and nobody makes room: the pair at σ. Where K = k ≥ C, D∖i uses a
  uniform C-subset S of the k; under D, i takes part with probability p = qC/(k+1) < q, together with a uniform
  (C−1)-subset, which is S without a uniform member j. So given S and j the sum moves by g_i − g_j, of norm ≤ 2Δ, with
  probability p: the pair at σ/2 of rate p, which that of rate q dominates. By joint convexity of `H_α` over K, S and j,
  D and D∖i are dominated with t = P(K ≥ C). The pair at σ/2 dominates that at σ, so a larger t is an upper bound:
  t = P(Bin(N, q) ≥ C) serves all data sets of at most N records, and their neighbours of N + 1.
- **Replace one, batches of qN without replacement.** The pair whose curve is `H_α(mix‖N_0)` for α ≥ 1 and
  `H_α(N_0‖mix)` for α < 1. Proof: let i be the replaced record. A uniform batch S without i becomes a uniform batch
  with i when i takes the place of a uniformly drawn member, so by joint convexity of `H_α` it is enough to
  look at one S and one member: (1−q)a + qb against (1−q)a + qb', three Gaussians with centres at most 1 apart. For
  α ≥ 1, `(1−q)a + qb − α((1−q)a + qb') = q·(b − α'·((1−β)a + βb'))` with `α' = 1 + (α−1)/q`, `β = α/α'`, hence
  `H_α = q·H_α'(b‖(1−β)a + βb') ≤ q·((1−β)H_α'(b‖a) + βH_α'(b‖b')) ≤ q·H_α'(N_1‖N_0)`, which by the same identity
  with a = b' = N_0 is `H_α(mix‖N_0)`. For α < 1 use `H_α(P‖Q) = 1 − α + αH_{1/α}(Q‖P)`: the relation is symmetric.
  The bound is attained (all others at +Δ, the record at −Δ or +Δ), so at one step it is exact. dp-accounting 0.6 has
  no PLD for this (its `REPLACE` is Poisson sampling), and its Rényi bound is looser; both are built here on its parts.

Sources: Balle, Barthe & Gaboardi (2018), theorems 2 and 9; Zhu, Dong & Wang (2022), theorem 11; Mironov, Talwar &
Zhang (2019). Truncated batches: dp-accounting's `TruncatedSubsampledGaussianDpEvent` (arXiv:2508.15089) reveals the
same coin.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
from absl import logging as absl_logging
from dp_accounting import dp_event
from dp_accounting.pld import pld_pmf, privacy_loss_distribution, privacy_loss_mechanism
from dp_accounting.rdp import RdpAccountant
from numpy.typing import NDArray
from prv_accountant import PrivacyRandomVariable
from scipy.special import log_ndtr, ndtr

from lipdp.accounting.events import Event
from lipdp.accounting.relation import Relation

Array = NDArray[np.float64]
_MAX_POINTS = 100_000  # of one step's distribution; dp-accounting visits those of the sum in a Python loop


class StepLoss(PrivacyRandomVariable):
    """The loss `Y = log(P/Q)` under P of one step, for both accountants; (P, Q) is one of the pairs above."""

    def __init__(self, event: Event) -> None:
        self._sigma, self._q = event.noise_multiplier, event.sampling_rate

    @abstractmethod
    def cdf(self, t: Any) -> Array:
        """`P(Y ≤ t)`, elementwise."""

    @abstractmethod
    def delta(self, t: Any) -> Array:
        """`H_{e^t}(P‖Q)`, elementwise: the δ of one step at ε = t."""

    @abstractmethod
    def mean(self) -> float:
        """`E[Y]`, from an integrand ≥ 0, so that it is precise however small."""

    def _standardised_x(self, t: Any) -> Array:
        """`x(t)/σ`, −∞ where no x has ℓ(x) ≤ t. Above t = 40, `z(t) = t − log q` to all digits."""
        t = np.asarray(t, dtype=np.float64)
        odds = np.expm1(np.minimum(t, 40.0)) / self._q
        with np.errstate(divide="ignore"):
            z = np.where(t > 40.0, t - math.log(self._q), np.log1p(np.maximum(odds, -1.0)))
        return self._sigma * z + 0.5 / self._sigma

    def _integral(self, integrand: Callable[[Array, Array], Array], upper_half: bool = False) -> float:
        """`∫ N_0(x)·integrand(u, ℓ) dx` with `u = e^ℓ − 1`, over all x or over x > 1/2 where ℓ > 0."""
        sigma, q = self._sigma, self._q
        panel = min(sigma, sigma**2)  # ℓ is analytic in a strip of half-width πσ²
        start = 0.5 if upper_half else 0.5 - panel * math.ceil((0.5 + 14.0 * sigma) / panel)
        panels = math.ceil((1.0 + 14.0 * sigma - start) / panel)
        nodes, weights = np.polynomial.legendre.leggauss(16)
        x = start + panel * (np.arange(panels)[:, None] + 0.5 + 0.5 * nodes)
        exponent = (2.0 * x - 1.0) / (2.0 * sigma**2)
        u = q * np.expm1(exponent)
        values = integrand(u, exponent if q == 1.0 else np.log1p(u))
        density = np.exp(-0.5 * (x / sigma) ** 2) / (sigma * math.sqrt(2.0 * math.pi))
        return float(np.sum(density * values * weights)) * panel / 2.0


class RemoveLoss(StepLoss):
    """(mix, N_0): the law of prv-accountant's `PoissonSubsampledGaussianMechanism`, in float64.

    That one works in extended precision, eight times slower.
    """

    def cdf(self, t: Any) -> Array:
        """`(1−q)·Φ(x(t)/σ) + q·Φ((x(t)−1)/σ)`, with Φ the normal distribution function."""
        x = self._standardised_x(t)
        return (1.0 - self._q) * ndtr(x) + self._q * ndtr(x - 1.0 / self._sigma)

    def delta(self, t: Any) -> Array:
        """`mix(x > x(t)) − e^t·N_0(x > x(t))`."""
        t = np.asarray(t, dtype=np.float64)
        x = self._standardised_x(t)
        mix = (1.0 - self._q) * ndtr(-x) + self._q * ndtr(1.0 / self._sigma - x)
        return np.clip(mix - np.exp(t + log_ndtr(-x)), 0.0, 1.0)

    def mean(self) -> float:
        """`∫ N_0·((1+u)·ℓ − u)`, as `∫ N_0·u = 0`."""
        return self._integral(lambda u, loss: (1.0 + u) * loss - u)


class AddLoss(StepLoss):
    """(N_0, mix)."""

    def cdf(self, t: Any) -> Array:
        """`Φ(−x(−t)/σ)`."""
        return ndtr(-self._standardised_x(-np.asarray(t, dtype=np.float64)))

    def delta(self, t: Any) -> Array:
        """`N_0(x < x(−t)) − e^t·mix(x < x(−t))`."""
        t = np.asarray(t, dtype=np.float64)
        x = self._standardised_x(-t)
        if self._q == 1.0:  # the one case with a large t
            log_mix = log_ndtr(x - 1.0 / self._sigma)
        else:
            with np.errstate(divide="ignore"):
                log_mix = np.log((1.0 - self._q) * ndtr(x) + self._q * ndtr(x - 1.0 / self._sigma))
        return np.clip(ndtr(x) - np.exp(t + log_mix), 0.0, 1.0)

    def mean(self) -> float:
        """`∫ N_0·(u − ℓ)`."""
        return self._integral(lambda u, loss: u - loss)


class ReplaceLoss(StepLoss):
    """The pair for replace one: add's law below 0, remove's above, and an atom at 0."""

    def cdf(self, t: Any) -> Array:
        """Add's for t < 0, remove's for t ≥ 0."""
        t = np.asarray(t, dtype=np.float64)
        x = self._standardised_x(np.abs(t))
        remove = (1.0 - self._q) * ndtr(x) + self._q * ndtr(x - 1.0 / self._sigma)
        return np.where(t < 0.0, ndtr(-x), remove)

    def delta(self, t: Any) -> Array:
        """The larger of remove's and add's, which is remove's for t ≥ 0 and add's below."""
        return np.maximum(RemoveLoss.delta(self, t), AddLoss.delta(self, t))

    def mean(self) -> float:
        """`∫_{x > 1/2} N_0·((1+u)·ℓ − ℓ)`: remove's losses above 0 less add's below."""
        return self._integral(lambda u, loss: u * loss, upper_half=True)


class TruncatedLoss(StepLoss):
    """The loss of a coin that chooses between two steps, whose losses add up by its probabilities."""

    def __init__(self, event: Event, kind: type[StepLoss]) -> None:
        self._parts = [(probability, kind(step)) for probability, step in branches(event)]

    def cdf(self, t: Any) -> Array:
        return np.sum([probability * loss.cdf(t) for probability, loss in self._parts], axis=0)

    def delta(self, t: Any) -> Array:
        return np.sum([probability * loss.delta(t) for probability, loss in self._parts], axis=0)

    def mean(self) -> float:
        return sum(probability * loss.mean() for probability, loss in self._parts)


def branches(event: Event) -> list[tuple[float, Event]]:
    """Between which steps the coin of a step with truncation chooses, and with which probabilities."""
    t, step = event.truncation, replace(event, truncation=0.0)
    half = replace(step, noise_multiplier=step.noise_multiplier / 2)
    return [(p, one) for p, one in ((1.0 - t, step), (t, half)) if p]


def step_loss(event: Event, kind: type[StepLoss]) -> StepLoss:
    """The loss of one step in one direction."""
    return TruncatedLoss(event, kind) if event.truncation else kind(event)


DIRECTIONS: dict[Relation, tuple[type[StepLoss], ...]] = {
    Relation.ADD_OR_REMOVE_ONE: (RemoveLoss, AddLoss),
    Relation.REPLACE_ONE: (ReplaceLoss,),
}


def loss_deviation(event: Event) -> float:
    """About the std of one step's loss: `q·sqrt(e^{1/σ²} − 1)`, the scale that its distribution must be resolved on."""
    return event.sampling_rate * math.sqrt(math.expm1(min(event.noise_multiplier**-2, 50.0)))


def loss_distribution(event: Event, interval: float) -> privacy_loss_distribution.PrivacyLossDistribution:
    """One step's privacy loss distribution on multiples of `interval`, rounded up in the sense of ε, for dp-accounting.

    "Connect the dots": the curve δ(ε) is replaced by its chords in e^ε, which lie above it as it is convex. The curve
    is computed here, all points at once; dp-accounting's own does so point by point in Python, ten times slower.
    """
    masses = []
    for kind in DIRECTIONS[event.relation]:
        lowest, highest = _range(event, kind)
        low, high = math.floor(lowest / interval), math.ceil(highest / interval)
        deltas = step_loss(event, kind).delta(np.arange(low, high + 1) * interval)
        masses.append(pld_pmf.create_pmf_pessimistic_connect_dots_fixed_gap(interval, low, high, deltas))
    return privacy_loss_distribution.PrivacyLossDistribution(*masses)


def smallest_interval(event: Event) -> float:
    """The finest interval for which `loss_distribution` stays quick."""
    lowest, highest = _range(event, ReplaceLoss)
    return (highest - lowest) / _MAX_POINTS


def _range(event: Event, kind: type[StepLoss]) -> tuple[float, float]:
    """Between which losses the curve is followed; outside lies a mass of e^{−50}, which counts as an infinite loss."""
    kinds = privacy_loss_mechanism.AdjacencyType
    lower, upper = {
        RemoveLoss: (kinds.REMOVE, kinds.REMOVE),
        AddLoss: (kinds.ADD, kinds.ADD),
        ReplaceLoss: (kinds.ADD, kinds.REMOVE),
    }[kind]
    lows, highs = [], []
    for _, step in branches(event):
        bounds = {
            adjacency: privacy_loss_mechanism.GaussianPrivacyLoss(
                step.noise_multiplier, sampling_prob=step.sampling_rate, adjacency_type=adjacency
            ).connect_dots_bounds()
            for adjacency in {lower, upper}
        }
        lows.append(float(bounds[lower].epsilon_lower))
        highs.append(float(bounds[upper].epsilon_upper))
    return min(lows), max(highs)


@lru_cache(maxsize=1024)
def renyi(event: Event, orders: tuple[float, ...]) -> Array:
    """An upper bound on the Rényi divergence of `event`, all its steps, at each order α > 1; shape (orders,).

    One step, `K = (α−1)·D_α(mix‖N_0)` from dp-accounting, which is the larger direction (Mironov, Talwar & Zhang 2019,
    theorem 5). Where its series does not converge, the next order's value stands in: D is non-decreasing in α.
    Replace one, q < 1: a divergence `∫ f''(α)·H_α dα` of the pair is at most the sum of those of (mix, N_0) and
    (N_0, mix), so the moment `e^K` becomes at most `2e^K − 1`.
    With truncation the moment is that of the coin's two steps, by its probabilities.
    The slack 1e-14 covers rounding, whose sign dp-accounting does not control.
    """
    if event.truncation:
        scale = np.array(orders) - 1.0
        parts = [math.log(p) + renyi(one.with_steps(1), orders) * scale for p, one in branches(event)]
        return event.steps * np.logaddexp.reduce(parts) / scale
    accountant = RdpAccountant(list(orders))
    verbosity = absl_logging.get_verbosity()
    absl_logging.set_verbosity(absl_logging.ERROR)  # it warns of every order whose series does not converge
    try:
        gaussian = dp_event.GaussianDpEvent(event.noise_multiplier)
        accountant.compose(dp_event.PoissonSampledDpEvent(event.sampling_rate, gaussian))
    finally:
        absl_logging.set_verbosity(verbosity)
    divergence = np.minimum.accumulate(accountant.rdp[::-1])[::-1]
    moments = np.maximum(divergence, 0.0) * (np.array(orders) - 1.0) + 1e-14
    if event.relation is Relation.REPLACE_ONE and event.sampling_rate < 1.0:
        moments = moments + np.log1p(-np.expm1(-moments))
    return event.steps * moments / (np.array(orders) - 1.0)
