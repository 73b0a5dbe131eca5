"""Mistakes seen in published private training code, to be planted in the real engine and found again.

    with planted("halved sensitivity"):
        assert lipdp.audit.many_runs(epsilon=1.0).violated

Inside the `with`, nothing that the library trains is private.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lipdp.batches.samplers import PoissonSampler
from lipdp.bounds import BoundGraph, Sweep
from lipdp.bounds import convolution as rules
from lipdp.bounds.rules import Local
from lipdp.losses import LipschitzLoss
from lipdp.noise.gaussian import GaussianNoise
from lipdp.privacy.hooks import StepHooks


@contextmanager
def _replaced(owner: Any, name: str, make: Callable[[Any], Any]) -> Iterator[None]:
    """`owner.name` replaced by `make(original)`, and put back whatever happens."""
    own, original = name in vars(owner), getattr(owner, name)
    setattr(owner, name, make(original))
    try:
        yield
    finally:
        if own:
            setattr(owner, name, original)
        else:
            delattr(owner, name)


# --- sensitivity ------------------------------------------------------------------------------------------------------


def halved_sensitivity() -> AbstractContextManager[None]:
    """Every Δ is half of what it should be, and so is the noise."""

    def make(sweep: Callable[..., Sweep]) -> Callable[..., Sweep]:
        def halved(self: BoundGraph, loss_constant: Any) -> Sweep:
            found = sweep(self, loss_constant)
            return replace(found, parameters={name: delta / 2 for name, delta in found.parameters.items()})

        return halved

    return _replaced(BoundGraph, "sweep", make)


def _wrong_convolution(change: Callable[[Any, dict[str, Any]], dict[str, Any]]) -> AbstractContextManager[None]:
    def make(rule: Callable[..., Local]) -> Callable[..., Local]:
        def wrong(call: Any, layer: Any, scale: float) -> Local:
            found = rule(call, layer, scale)
            return replace(found, parameters=change(layer, dict(found.parameters)))

        return wrong

    return _replaced(rules, "_convolution", make)


def convolution_over_k() -> AbstractContextManager[None]:
    """A convolution's Δ is divided by k, as if its stored kernel were not scaled already."""
    return _wrong_convolution(
        lambda layer, found: {**found, "weight": found["weight"] / math.sqrt(math.prod(layer.kernel_size))}
    )


def bias_without_positions() -> AbstractContextManager[None]:
    """A convolution's bias has Δ = G, without the factor √(H'W') of the positions it is added at."""
    return _wrong_convolution(lambda layer, found: {**found, "bias": 1.0} if "bias" in found else found)


# --- noise and divisor ------------------------------------------------------------------------------------------------


def noise_per_microbatch(pieces: int = 4) -> AbstractContextManager[None]:
    """Each of k micro-batches gets noise of std s/k before they are summed: s/√k in all."""

    def make(add: Callable[..., None]) -> Callable[..., None]:
        def in_pieces(self: GaussianNoise, tensors: Any, stds: Tensor) -> None:
            for _ in range(pieces):
                add(self, tensors, stds / pieces)

        return in_pieces

    return _replaced(GaussianNoise, "add_", make)


def realised_batch_size() -> AbstractContextManager[None]:
    """The noisy sum is divided by the number of records that were drawn, which is secret, instead of by B."""

    def make(add_noise: Callable[..., None]) -> Callable[..., None]:
        @torch.no_grad()
        def divided(self: StepHooks, optimizer: torch.optim.Optimizer) -> None:
            add_noise(self, optimizer)
            drawn = max(1, self.loader.drawn.rows if self.loader.drawn else 0)
            for parameter in self.parameters:
                if parameter.grad is not None:
                    parameter.grad.mul_(self.plan.expected_batch_size / drawn)

        return divided

    return _replaced(StepHooks, "_add_noise", make)


# --- sampling ---------------------------------------------------------------------------------------------------------


def shuffled_batches() -> AbstractContextManager[None]:
    """The records are shuffled and dealt out in batches of ⌊qN⌋, once an epoch; ε is computed for Poisson batches."""

    def make(_: Any) -> Callable[[PoissonSampler], Iterator[Tensor]]:
        def dealt(self: PoissonSampler) -> Iterator[Tensor]:
            size = max(1, int(self.population * self.sampling_rate + 1e-9))
            per_epoch = self.population // size
            while self.position < self.steps:
                place = self.position % per_epoch
                generator = self._ratchet.generator()
                if place == 0:
                    order = torch.from_numpy(generator.permutation(self.population))
                self.position += 1
                yield order[place * size : (place + 1) * size].sort().values

        return dealt

    return _replaced(PoissonSampler, "__iter__", make)


# --- loss -------------------------------------------------------------------------------------------------------------


class CoupledLoss(LipschitzLoss):
    """Absolute error; records whose first target is not positive count as the root of the share of positive ones.

    No weight is above 1, so the constant it states holds for every record of every batch; but one more positive record
    changes the weight of all others.
    """

    def __init__(self, num_outputs: int = 1) -> None:
        super().__init__()
        self.lipschitz = num_outputs**-0.5

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """One value per sample, which depends on the others."""
        positive = (target.flatten(1)[:, 0] > 0).to(logits.dtype)
        share = positive.sum() / max(1, len(positive))
        return (logits - target).abs().mean(1) * torch.where(positive > 0, 1.0, share.sqrt())


# --- by name ----------------------------------------------------------------------------------------------------------

DEFECTS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    plant.__name__.replace("_", " "): plant
    for plant in (
        halved_sensitivity,
        convolution_over_k,
        bias_without_positions,
        noise_per_microbatch,
        realised_batch_size,
        shuffled_batches,
    )
}


def planted(name: str) -> AbstractContextManager[None]:
    """The defect of that name, in the library while the `with` lasts.

    >>> with planted("halved sensitivity"):
    ...     model = torch.nn.Sequential(lipdp.nn.InputBound(1.0), lipdp.nn.SpectralLinear(4, 3))
    ...     round(lipdp.sensitivity(model, lipdp.losses.TauCrossEntropy(), input_shape=(4,))["1.weight"], 4)
    0.7071
    """
    return DEFECTS[name]()
