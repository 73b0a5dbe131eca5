"""The options of `make_private`, and what stands here for those of Opacus."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from lipdp.batches.inputs import Fields
from lipdp.batches.population import Group
from lipdp.errors import ParameterError
from lipdp.noise.allocation import Allocation
from lipdp.privacy.gate import FixedGate, QuantileGate
from lipdp.suggestion.joints import Joint

if TYPE_CHECKING:
    from typing_extensions import Required


class Options(TypedDict, total=False):
    """What every way of making a model private takes; see `PrivacyEngine.make_private_with_plan`."""

    input_shape: tuple[int, ...] | None
    forward_dtype: torch.dtype | None
    group: Group | None
    multiplicity: int
    shards: bool
    num_workers: int
    pin_memory: bool


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
    fields: Fields | None
    dataset_size: int | None
    gate: float | FixedGate | QuantileGate | None
    allocation: str | Allocation | None
    joints: tuple[Joint, ...] | None


_ANSWERS = {
    "alphas": "leave it out: PrivacyEngine(accountant='rdp') has orders of its own",
    "batch_first": "leave it out: the first axis is the batch",
    "batch_size": "it is expected_batch_size here, since batches are drawn at random",
    "clipping": "leave it out: nothing is clipped; bounds come from the model",
    "data_loader": "give dataset=loader.dataset: batches are drawn afresh, and a loader is returned",
    "grad_sample_mode": "leave it out: there are no per-sample gradients",
    "loss_reduction": "leave it out: the criterion that is returned reads as a mean, and gradients are summed",
    "max_grad_norm": "leave it out: gradients are bounded by the model; gate= bounds the cotangent at the logits",
    "noise_generator": "give PrivacyEngine(seed=...), for tests",
    "poisson_sampling": "it is sampling='poisson' (default) or 'fixed_size'",
    "sample_rate": "it follows from expected_batch_size and the dataset's length",
    "secure_mode": "give PrivacyEngine(secure=True)",
}


def refuse_unknown(function: str, given: Mapping[str, Any], known: type[Options] | None = None) -> None:
    """Refuse options that the function lacks, and say what stands for those of Opacus.

    Raises:
        ParameterError: there is one.

    >>> refuse_unknown("make_private", {"max_grad_norm": 1.0}, Options)
    Traceback (most recent call last):
    lipdp.errors.ParameterError: make_private has no max_grad_norm: leave it out: gradients are bounded by the model;...
    """
    unknown = [n for n in given if known is None or n not in known.__annotations__]
    if unknown:
        raise ParameterError(
            "; ".join(f"{function} has no {n}: {_ANSWERS.get(n, 'see its documentation')}" for n in unknown)
        )
