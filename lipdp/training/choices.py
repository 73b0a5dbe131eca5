"""What a run chooses by name: the loss, the optimiser, the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lipdp.errors import ParameterError, UnknownNameError, check_known
from lipdp.losses import (
    HKR,
    CategoricalHinge,
    CosineSimilarity,
    LipschitzLoss,
    MulticlassHinge,
    TauBCEWithLogits,
    TauCrossEntropy,
)
from lipdp.models import build

if TYPE_CHECKING:
    from lipdp.training.config import TrainConfig


LOSSES: dict[str, Callable[..., LipschitzLoss]] = {
    "bce": TauBCEWithLogits,
    "cosine": CosineSimilarity,
    "cross-entropy": TauCrossEntropy,
    "hinge": CategoricalHinge,
    "hkr": HKR,
    "multiclass-hinge": MulticlassHinge,
}
"""By name; `bce` alone is for two classes with a single logit."""


def make_loss(name: str, num_classes: int, options: Mapping[str, Any] | None = None) -> tuple[LipschitzLoss, int]:
    """A loss by name, and how many outputs the model needs for it.

    Args:
        name: one of `LOSSES`.
        num_classes: C, a public fact; "hkr" takes uniform priors unless told others.
        options: of the loss, e.g. {"tau": 32.0}.

    Raises:
        UnknownNameError: no such loss.
        ParameterError: an option it lacks, or a single-logit loss for more than two classes.

    >>> make_loss("cross-entropy", 10, {"tau": 8.0})
    (TauCrossEntropy(tau=8.0), 10)
    >>> make_loss("bce", 2)[1]
    1
    """
    if name not in LOSSES:
        raise UnknownNameError("loss", name, LOSSES)
    if name == "bce" and num_classes != 2:
        raise ParameterError(f"loss {name!r} has a single logit, for 2 classes; there are {num_classes}")
    kind, own = LOSSES[name], dict(options or {})
    check_known(f"loss {name!r}", own, [one for one in signature(kind).parameters if one != "num_classes"])
    if kind is HKR:
        own.setdefault("priors", [1 / num_classes] * num_classes)
    elif kind is MulticlassHinge:
        own["num_classes"] = num_classes
    return kind(**own), 1 if name == "bce" else num_classes


def make_network(
    config: TrainConfig, input_shape: Sequence[int], num_classes: int, *, input_bound: float | None = None
) -> tuple[nn.Module, LipschitzLoss]:
    """The untrained model of a run, and its loss."""
    loss, outputs = make_loss(str(config.loss), num_classes, config.loss_options)
    options = dict(config.model_options)
    if input_bound is not None and ":" not in config.model:
        options.setdefault("input_bound", input_bound)
    return make_model(config.model, input_shape, outputs, options), loss


def make_model(name: str, input_shape: Sequence[int], num_classes: int, options: Mapping[str, Any]) -> nn.Module:
    """`lipdp.models.build`, refusing options that belong to the data.

    >>> make_model("mlp", (4,), 3, {"depth": 1})[-1].out_features
    3
    """
    of_data = sorted({"name", "input_shape", "num_classes"} & set(options))
    if of_data:
        raise ParameterError(
            f"{', '.join(of_data)} of model {name!r} follow from the data; leave them out of the options"
        )
    return build(name, input_shape=input_shape, num_classes=num_classes, **options)


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": lambda parameters, lr, momentum: torch.optim.Adam(parameters, lr=lr, betas=(momentum, 0.999)),
    "sgd": lambda parameters, lr, momentum: torch.optim.SGD(parameters, lr=lr, momentum=momentum),
}


def make_optimizer(
    name: str, parameters: Iterable[nn.Parameter], *, lr: float, momentum: float
) -> torch.optim.Optimizer:
    """An optimiser by name; `momentum` is Adam's first β."""
    if name not in OPTIMIZERS:
        raise UnknownNameError("optimizer", name, OPTIMIZERS)
    return OPTIMIZERS[name](parameters, lr, momentum)


SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "cosine": lambda progress: (1.0 + math.cos(math.pi * progress)) / 2.0,
    "linear": lambda progress: 1.0 - progress,
}


def make_scheduler(name: str, optimizer: torch.optim.Optimizer, *, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """The learning rate as a share of its initial value, by the part of the run that is done.

    >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    >>> make_scheduler("linear", optimizer, steps=4).get_last_lr()
    [1.0]
    """
    if name not in SCHEDULES:
        raise UnknownNameError("schedule", name, SCHEDULES)
    share = SCHEDULES[name]
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: share(min(step / steps, 1.0)))
