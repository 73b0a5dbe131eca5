"""The cotangent gate at the logits: always on, so that a wrong loss constant cannot break the guarantee."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lipdp.constraints import is_positive
from lipdp.distributed.collectives import World
from lipdp.errors import ParameterError
from lipdp.nn.gates import clip_norm, per_sample_norm
from lipdp.noise.gaussian import GaussianNoise


@dataclass(frozen=True)
class FixedGate:
    """A gate at a constant. `bound` = ∞ sets it to the constant of the loss, where it changes nothing.

    >>> FixedGate(0.3).start().bound
    0.3
    """

    bound: float = math.inf

    def __post_init__(self) -> None:
        if not (self.bound == math.inf or is_positive(self.bound)):
            raise ParameterError(f"gate={self.bound!r}: a number > 0 is needed")

    def __str__(self) -> str:
        return "none below the loss's own bound" if self.bound == math.inf else f"norm {self.bound:.6g} at most"

    @property
    def noise_multiplier(self) -> float:
        """Of what the gate itself releases: nothing, so infinite."""
        return math.inf

    def start(self) -> GateState:
        """The gate at the beginning of a run."""
        return GateState(self.bound)


@dataclass(frozen=True)
class QuantileGate:
    """A gate that follows a quantile of the cotangent norms, estimated privately at every step.

    With b_i = 1(‖g_i‖ ≤ c) the step releases Σ(b_i − 1/2) + N(0, s²), of sensitivity 1/2, hence noise multiplier 2s,
    and moves the gate by c ← c e^(−η(b̃ − γ)) with b̃ = release / B + 1/2. The count
    and the gradient come from the same subsample, so the engine gives the gradient the noise multiplier that makes
    both together cost one σ, which is accounted.

    Args:
        initial: c at the first step.
        quantile: γ in (0, 1), the share of samples whose cotangent should pass unshortened.
        learning_rate: η.
        count_std: s, in records; B/20 is a good value.

    >>> QuantileGate(initial=0.5, count_std=10.0).noise_multiplier
    20.0

    Source: Andrew, Thakkar, McMahan & Ramaswamy (2021), algorithm 1 and theorem 1.
    """

    initial: float
    quantile: float = 0.5
    learning_rate: float = 0.2
    count_std: float = 20.0

    def __post_init__(self) -> None:
        for name in ("initial", "learning_rate", "count_std"):
            if not 0 < getattr(self, name) < math.inf:
                raise ParameterError(f"QuantileGate: {name} is a positive finite number, got {getattr(self, name)}")
        if not 0 < self.quantile < 1:
            raise ParameterError(f"QuantileGate: quantile lies in (0, 1), got {self.quantile}")

    def __str__(self) -> str:
        return f"the {self.quantile:g}-quantile of the norms, as privately counted; {self.initial:.6g} at first"

    @property
    def noise_multiplier(self) -> float:
        """2s: the count of b − 1/2 has sensitivity 1/2."""
        return 2 * self.count_std

    def start(self) -> GateState:
        """The gate at the beginning of a run."""
        return GateState(self.initial, self)


class GateState:
    """The gate of one run, and for a quantile the private count of the step in progress.

    `bound`: the gate is at the smaller of this and the loss's constant. For a quantile, from its first use on, a
    float64 tensor on the device of the logits, which nothing reads on the host.
    """

    def __init__(self, bound: float, quantile: QuantileGate | None = None) -> None:
        self.bound: float | Tensor = bound
        self._rule = quantile
        self._count: Tensor | None = None

    @property
    def moves(self) -> bool:
        """Whether the bound changes from step to step."""
        return self._rule is not None

    def limit(self, cotangent: Tensor, constant: float | Tensor, weights: Tensor | None) -> Tensor:
        """Every row of the cotangent at min(bound, the loss's constant) at most; times w_i with `weights` (n,).

        A row of weight 0 is 0, whatever it holds.
        """
        if self._rule is not None and not isinstance(self.bound, Tensor):
            self.bound = torch.full((), self.bound, dtype=torch.float64, device=cotangent.device)
        limit: float | Tensor
        if isinstance(constant, Tensor):
            limit = constant.clamp(max=self.bound)
        else:
            limit = self.bound.clamp(max=constant) if isinstance(self.bound, Tensor) else min(self.bound, constant)
        if weights is None:
            return clip_norm(cotangent, limit)
        weights = weights.double().view(-1, *[1] * (cotangent.ndim - 1))
        return clip_norm(cotangent, limit * weights).masked_fill(weights == 0, 0.0)

    def count(self, cotangent: Tensor, weights: Tensor | None) -> None:
        """Note for the quantile how many cotangents of a pass are within the bound; a row of weight w_i counts w_i."""
        if self._rule is None:
            return
        ones = torch.ones(len(cotangent), dtype=torch.float64, device=cotangent.device)
        share = ones if weights is None else weights.to(ones)
        passes = per_sample_norm(cotangent).flatten() <= self.bound * share
        centred = (share * (passes.double() - 0.5)).sum()
        self._count = centred if self._count is None else self._count + centred

    def release(
        self, noise: GaussianNoise, batch_size: float, sensitivity_factor: float, world: World, *, views: int = 1
    ) -> None:
        """End the step: for a quantile noise the count of all processes and move the bound.

        Of K views each counts 1/K, so that a record moves the count by 1/2, as it does with one.
        """
        rule, seen = self._rule, self._count
        self.forget()
        if rule is None:
            return
        count = torch.zeros(1, dtype=torch.float64, device=noise.source.device)
        if seen is not None:
            count += seen / views
        world.all_reduce_([count])
        noise.add_([count], torch.full_like(count, rule.count_std * sensitivity_factor))
        share = count[0] / batch_size + 0.5
        self.bound = (-rule.learning_rate * (share - rule.quantile)).exp() * self.bound

    def forget(self) -> None:
        """Begin the count anew."""
        self._count = None

    def state_dict(self) -> dict[str, float]:
        """The bound; a count never outlives its step."""
        return {"bound": float(self.bound)}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue at a saved bound."""
        self.bound = float(state["bound"])
        self.forget()
