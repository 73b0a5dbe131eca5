"""What an engine and `make_private` are given, and what stands here for the options of Opacus."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from lipdp.accounting.events import Ledger
from lipdp.accounting.plan import PrivacyPlan
from lipdp.batches.copies import Group
from lipdp.batches.inputs import Fields
from lipdp.batches.samplers import (
    CyclicPoissonSampler,
    FixedSizeSampler,
    PoissonSampler,
    Sampler,
    TruncatedPoissonSampler,
)
from lipdp.errors import ParameterError
from lipdp.noise.allocation import Allocation
from lipdp.noise.gaussian import GaussianNoise
from lipdp.noise.secure import SecureGaussianNoise
from lipdp.privacy.gate import FixedGate, QuantileGate
from lipdp.suggestion.joints import Joint

if TYPE_CHECKING:
    from typing_extensions import Required


class Options(TypedDict, total=False):
    """What every way of making a model private takes; see `PrivacyEngine.make_private_with_plan`."""

    input_shape: tuple[int, ...] | None
    forward_dtype: torch.dtype | None
    group: Group | None
    views: int
    own_records: bool
    num_workers: int
    pin_memory: bool
    piece: int | None


class Given(Options, total=False):
    """What is given beside the noise or the budget; see `PrivacyEngine.make_private`."""

    module: Required[nn.Module]
    dataset: Required[Dataset[Any] | DataLoader[Any]]
    optimizer: torch.optim.Optimizer | None
    criterion: nn.Module | None
    expected_batch_size: int | None
    steps: int | None
    epochs: float | None
    sampling: str
    bands: int
    truncated_batch_size: int | None
    fields: Fields | None
    dataset_size: int | None
    gate: float | FixedGate | QuantileGate | None
    allocation: str | Allocation | None
    joints: tuple[Joint, ...] | None


@dataclass(frozen=True, kw_only=True)
class Request:
    """What `make_private_with_plan` was given; see there."""

    module: nn.Module
    optimizer: torch.optim.Optimizer
    criterion: nn.Module
    dataset: Dataset[Any]
    allocation: str | Allocation
    gate: float | FixedGate | QuantileGate | None
    joints: tuple[Joint, ...]
    passes: float | None
    input_shape: tuple[int, ...] | None = None
    forward_dtype: torch.dtype | None = None
    group: Group | None = None
    views: int = 1
    own_records: bool = False
    num_workers: int = 0
    pin_memory: bool = False
    piece: int | None = None

    @property
    def gating(self) -> FixedGate | QuantileGate:
        """The gate as an object."""
        if isinstance(self.gate, (FixedGate, QuantileGate)):
            return self.gate
        return FixedGate(math.inf if self.gate is None else self.gate)


@dataclass(frozen=True, kw_only=True)
class Draws:
    """How an engine draws and looks: what `PrivacyEngine` was given."""

    accountant: str
    seed: int | None
    secure: bool
    check_every: int | None
    deferred: bool | None
    ledger: Ledger
    measured: list[str]

    def sampler(self, plan: PrivacyPlan, population: int) -> Sampler:
        """Of the batches."""
        options: dict[str, Any] = {"steps": plan.steps, "seed": self.seed, "secure": self.secure}
        if plan.bands > 1:
            return CyclicPoissonSampler(population, sampling_rate=plan.sampling_rate, bands=plan.bands, **options)
        if plan.truncated_batch_size is not None:
            most = plan.truncated_batch_size
            return TruncatedPoissonSampler(
                population, sampling_rate=plan.sampling_rate, truncated_batch_size=most, **options
            )
        if plan.sampling == "poisson":
            return PoissonSampler(population, sampling_rate=plan.sampling_rate, **options)
        return FixedSizeSampler(population, batch_size=plan.expected_batch_size, **options)

    def noise(self, device: torch.device) -> GaussianNoise:
        """Of the steps."""
        return (SecureGaussianNoise if self.secure else GaussianNoise)(self.seed, device=device)


_ANSWERS = {
    "alphas": "leave it out: PrivacyEngine(accountant='rdp') has orders of its own",
    "batch_first": "leave it out: the first axis is the batch",
    "batch_size": "it is expected_batch_size here, since batches are drawn at random",
    "clipping": "leave it out: nothing is clipped; bounds come from the model",
    "data_loader": "give dataset=loader.dataset: batches are drawn afresh, and a loader is returned",
    "grad_sample_mode": "leave it out: there are no per-sample gradients",
    "loss_reduction": "leave it out: the criterion that is returned reads as a mean, and gradients are summed",
    "max_grad_norm": "leave it out: the model bounds gradients; gate= bounds each record's gradient at the logits",
    "noise_multiplier": "it follows from the target ε; to give it, call make_private",
    "noise_generator": "give PrivacyEngine(seed=...), for tests",
    "poisson_sampling": "it is sampling='poisson' (default) or 'fixed_size'",
    "sample_rate": "it follows from expected_batch_size and the dataset's length",
    "secure_mode": "give PrivacyEngine(secure=True)",
}


def refuse_unknown(function: str, given: Mapping[str, Any], known: type[Options] | None = None) -> None:
    """Refuse options that the function lacks, and say what stands for those of Opacus.

    >>> refuse_unknown("make_private", {"max_grad_norm": 1.0}, Options)
    Traceback (most recent call last):
    lipdp.errors.ParameterError: make_private has no max_grad_norm: leave it out: the model bounds gradients;...
    """
    unknown = [n for n in given if known is None or n not in known.__annotations__]
    if unknown:
        raise ParameterError(
            "; ".join(
                f"{function} has no {n}: {_ANSWERS.get(n, 'its documentation lists the options')}" for n in unknown
            )
        )
