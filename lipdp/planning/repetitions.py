"""What a private hyper-parameter search costs: the best of a random number of private runs."""

from __future__ import annotations

import math
import random
import secrets
from dataclasses import dataclass
from typing import Any

import numpy as np
from absl import logging as absl_logging
from dp_accounting import dp_event
from dp_accounting.rdp import RdpAccountant
from scipy.optimize import brentq

from lipdp.accounting.accountants import checked_delta
from lipdp.accounting.calibration import smallest_noise_multiplier
from lipdp.accounting.events import Event, require_positive
from lipdp.accounting.plan import Subsampling
from lipdp.accounting.relation import Relation
from lipdp.errors import AccountingError, ParameterError, UnknownNameError
from lipdp.planning.tan import eta_for

SHAPES = {"logarithmic": 0.0, "geometric": 1.0, "poisson": math.inf}
"""Laws of the number of repetitions by name, as the shape of a truncated negative binomial; Poisson is its limit."""

_MOST = 500.0  # of the mean: more runs are no search, and a Poisson law's P(0) must not vanish
_ORDERS = (*(1 + k / 10 for k in range(1, 100)), *range(11, 33), 36, 40, 48, 64, 96, 128, 192, 256, 384, 512, 1024)


@dataclass(frozen=True)
class Repetitions:
    r"""A private search: K runs, K random, hyper-parameters drawn anew for each. Only the best is released.

    Let one run, hyper-parameters and score included, satisfy D_α ≤ ρ(α). With K from the truncated negative binomial of
    shape s ≥ 0 and γ in (0, 1) (s = 1 geometric, s = 0 logarithmic), for any orders α > 1, β ≥ 1,

    D_α(search) ≤ ρ(α) + (1+s)(1 − 1/β) ρ(β) + (1+s) ln(1/γ)/β + ln E[K]/(α−1)

    and with K from the Poisson law of mean μ, for any δ̂ at which one run is (ln(α/(α−1)), δ̂)-DP,

    D_α(search) ≤ ρ(α) + μ δ̂ + ln μ/(α−1).

    The cost hardly grows with E[K], whereas E[K] runs that are all released cost √E[K] times as much or more. For a
    pure-DP run of ε the search is (2+s)ε-DP.

    Guarantees: an upper bound on the ε of the whole search, provided that K is drawn by `draw`, once and without
    looking at the data; that K stays secret; that every run's hyper-parameters are drawn independently from one law
    fixed beforehand (no Optuna here: it adapts to earlier scores); and that the score is computed from what one run
    releases and from public records, or its own release is part of `event`.

    Args:
        law: "geometric", "logarithmic", "poisson", or a shape s ≥ 0 of the truncated negative binomial.
        mean: E[K], at least 1.

    Raises:
        UnknownNameError: no such law. ParameterError: a number outside its range.

    >>> search = Repetitions("geometric", 10)
    >>> one = Event(3.0, 4096 / 50_000, 2500)
    >>> f"{search.epsilon(one, delta=1e-5):.2f}"
    '12.08'

    Source: Papernot & Steinke, Hyperparameter tuning with Rényi differential privacy, ICLR 2022, theorems 2 and 6 and
    corollary 3; the bound is dp-accounting's.
    """

    law: str | float
    mean: float

    def __post_init__(self) -> None:
        if isinstance(self.law, str):
            if self.law not in SHAPES:
                raise UnknownNameError("law of repetitions", self.law, SHAPES)
        elif not 0.0 <= self.law < math.inf:
            raise ParameterError(
                f"repetitions by the law {self.law}: a shape ≥ 0 is needed, or one of {', '.join(SHAPES)}"
            )
        if not 1.0 <= self.mean <= _MOST:
            raise ParameterError(f"repetitions={self.mean}: a mean number of runs in [1, {_MOST:g}] is needed")

    @property
    def shape(self) -> float:
        """s: 0 logarithmic, 1 geometric, ∞ Poisson."""
        return SHAPES[self.law] if isinstance(self.law, str) else float(self.law)

    def epsilon(self, event: Event, delta: float) -> float:
        """An upper bound on the ε of the whole search, by Rényi moments.

        Args:
            event: all that one run releases, under *add or remove one record*.
            delta: δ of the search, in (0, 1).

        Raises:
            AccountingError: another relation, or no finite bound.
        """
        if event.relation is not Relation.ADD_OR_REMOVE_ONE or event.truncation:
            raise AccountingError(
                "the account of a search covers Poisson batches that are not truncated, got"
                f" {'truncated ones' if event.truncation else event.relation.value}"
            )
        step = dp_event.PoissonSampledDpEvent(event.sampling_rate, dp_event.GaussianDpEvent(event.noise_multiplier))
        run = dp_event.SelfComposedDpEvent(step, event.compositions)
        return _bounded(dp_event.RepeatAndSelectDpEvent(run, self.mean, self.shape), checked_delta(delta))

    def calibrate(self, *, target_epsilon: float, sampling_rate: float, steps: int, delta: float) -> float:
        """The σ of every run with which the whole search costs at most the target, and at least 99.5 % of it.

        Raises:
            CalibrationError: no σ reaches it.

        >>> sigma = Repetitions("geometric", 10).calibrate(target_epsilon=8, sampling_rate=0.08, steps=2500, delta=1e-5)
        >>> 4 < sigma < 6
        True
        """
        require_positive("target_epsilon", target_epsilon)
        drawn = Subsampling.at(sampling_rate, steps=steps)

        def cost(sigma: float) -> float:
            return self.epsilon(drawn.event(sigma), delta)

        eta = eta_for(target_epsilon, delta) / 1.6  # the search costs about as much as a run of that much more signal
        return smallest_noise_multiplier(cost, max(1.0, sampling_rate * math.sqrt(steps / 2.0) / eta), target_epsilon)

    def draw(self, rng: random.Random | None = None) -> int:
        """A K of this law, from the system's entropy.

        P(K=k) ∝ (1−γ)ᵏ ∏_{l<k} (l+s)/(l+1) for k ≥ 1, by inversion, so that P(k+1)/P(k) = (1−γ)(k+s)/(k+1); Poisson:
        e^(−μ) μᵏ/k! for k ≥ 0, and no run at all is then a possible outcome.

        Args:
            rng: for tests; whoever can repeat the draw knows K.
        """
        left = (rng or secrets.SystemRandom()).random()
        if self.shape == math.inf:
            k, mass, ratio = 0, math.exp(-self.mean), lambda k: self.mean / (k + 1)
        elif self.mean == 1.0:
            return 1
        else:
            gamma = self._gamma()
            k, mass, ratio = 1, self._first(gamma), lambda k: (1.0 - gamma) * (k + self.shape) / (k + 1)
        while left >= mass and mass > 0.0:
            left -= mass
            mass *= ratio(k)
            k += 1
        return k

    def _first(self, gamma: float) -> float:
        """P(K = 1) = s(1−γ)/(γ^{−s} − 1), and (1−γ)/ln(1/γ) at s = 0."""
        log = math.log(1.0 / gamma)
        return (1.0 - gamma) * (1.0 / log if self.shape == 0.0 else self.shape / math.expm1(self.shape * log))

    def _gamma(self) -> float:
        """γ with E[K] = s(1/γ − 1)/(1 − γ^s) (s > 0), or (1/γ − 1)/ln(1/γ) (s = 0)."""

        def excess(log: float) -> float:  # log = ln(1/γ)
            part = 1.0 / log if self.shape == 0.0 else -self.shape / math.expm1(-self.shape * log)
            return math.log(math.expm1(log) * part / self.mean)

        return math.exp(-float(brentq(excess, 1e-9, 40.0)))


def _bounded(event: Any, delta: float) -> float:
    accountant = RdpAccountant(list(_ORDERS))
    verbosity = absl_logging.get_verbosity()
    absl_logging.set_verbosity(absl_logging.ERROR)  # it warns of every order whose series does not converge
    try:
        with np.errstate(over="ignore", invalid="ignore"):
            accountant.compose(event)
            value = float(accountant.get_epsilon(delta))
    except (ArithmeticError, ValueError) as error:
        raise AccountingError(f"the account of the repetitions failed ({error})") from error
    finally:
        absl_logging.set_verbosity(verbosity)
    if not math.isfinite(value):
        raise AccountingError("the account of the repetitions has no finite bound: more noise, or a larger δ")
    return value
