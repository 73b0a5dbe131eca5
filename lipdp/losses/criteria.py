"""From the criteria of torch to losses with a constant."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import nn

from lipdp.errors import LossError
from lipdp.losses.base import LipschitzLoss, OfLabels
from lipdp.losses.columns import Huber, MeanAbsoluteError, SmoothL1, SoftMargin, TauBCEWithLogits
from lipdp.losses.labels import NegativeLogLikelihood, TauCrossEntropy
from lipdp.losses.margin import MultiMargin
from lipdp.losses.pixels import PerPixel

_PER_BATCH = (
    "{name} with {what} and reduction='mean' divides by the {count} of the batch, so samples are coupled. Give"
    " reduction='sum', which the engine divides by the public batch size, or use {instead}"
)


def _check_mean(criterion: Any, instead: str) -> None:
    """Class weights and ignored labels: the mean of torch is over what the batch happens to hold."""
    if criterion.reduction != "mean":
        return
    name = type(criterion).__name__
    if criterion.weight is not None:
        raise LossError(_PER_BATCH.format(name=name, what="class weights", count="sum of the weights", instead=instead))
    if criterion.ignore_index != -100:
        raise LossError(
            _PER_BATCH.format(name=name, what="ignore_index", count="number of labels that count", instead=instead)
        )


def _check_outputs(criterion: Any, count: int) -> None:
    """Losses of several outputs: in lipdp the mean over the outputs of a sample."""
    if criterion.reduction != "mean" and count > 1:
        raise LossError(
            f"{type(criterion).__name__}(reduction={criterion.reduction!r}) adds up the {count} outputs of a sample,"
            " where the losses of lipdp take their mean; give reduction='mean'"
        )


def _cross_entropy(criterion: Any, outputs: int | None) -> LipschitzLoss:
    _check_mean(criterion, "lipdp.losses.TauCrossEntropy(weight=..., ignore_index=...)")
    return TauCrossEntropy(
        weight=criterion.weight, label_smoothing=criterion.label_smoothing, ignore_index=criterion.ignore_index
    )


def _likelihood(criterion: Any, outputs: int | None) -> LipschitzLoss:
    _check_mean(criterion, "lipdp.losses.NegativeLogLikelihood(weight=..., ignore_index=...)")
    return NegativeLogLikelihood(weight=criterion.weight, ignore_index=criterion.ignore_index)


def _binary(criterion: Any, outputs: int | None) -> LipschitzLoss:
    weights = criterion.pos_weight
    count = outputs or (1 if weights is None else weights.numel())
    _check_outputs(criterion, count)
    if criterion.weight is not None:
        raise LossError(
            "BCEWithLogitsLoss(weight=...) is broadcast over the batch, so a sample's loss can depend on its place. To"
            " weight positive targets, use pos_weight="
        )
    return TauBCEWithLogits(1.0, count, pos_weight=weights)


def _multi_margin(criterion: Any, outputs: int | None) -> LipschitzLoss:
    if criterion.p != 1:
        raise LossError(
            "MultiMarginLoss(p=2) has a gradient that grows with the logits: no constant. Use p=1,"
            " lipdp.losses.MultiMargin"
        )
    count = outputs or (None if criterion.weight is None else len(criterion.weight))
    if count is None:
        raise LossError(
            "MultiMarginLoss has a constant for a known number of classes: lipdp.losses.MultiMargin(num_classes)"
        )
    return MultiMargin(count, criterion.margin, weight=criterion.weight)


def _per_output(make: Callable[[Any, int], LipschitzLoss]) -> Callable[[Any, int | None], LipschitzLoss]:
    def converted(criterion: Any, outputs: int | None) -> LipschitzLoss:
        _check_outputs(criterion, outputs or 1)
        return make(criterion, outputs or 1)

    return converted


def _smooth_l1(criterion: Any, outputs: int) -> LipschitzLoss:
    return SmoothL1(criterion.beta, outputs) if criterion.beta else MeanAbsoluteError(outputs)


_KNOWN: dict[type[nn.Module], Callable[[Any, int | None], LipschitzLoss]] = {
    nn.CrossEntropyLoss: _cross_entropy,
    nn.NLLLoss: _likelihood,
    nn.BCEWithLogitsLoss: _binary,
    nn.MultiMarginLoss: _multi_margin,
    nn.L1Loss: _per_output(lambda criterion, outputs: MeanAbsoluteError(outputs)),
    nn.HuberLoss: _per_output(lambda criterion, outputs: Huber(criterion.delta, outputs)),
    nn.SmoothL1Loss: _per_output(_smooth_l1),
    nn.SoftMarginLoss: _per_output(lambda criterion, outputs: SoftMargin(outputs)),
}

_WHY_NOT: dict[type[nn.Module], str] = {
    nn.MSELoss: (
        "has a gradient that grows with logits and targets. Use lipdp.losses.MeanSquaredError(target_bound), which"
        " projects targets on a public ball, or Huber"
    ),
    nn.BCELoss: "has the gradient 1/p, which is unbounded. Leave the sigmoid out and use BCEWithLogitsLoss",
    nn.KLDivLoss: (
        "takes log-probabilities, behind a LogSoftmax of constant √C. lipdp.losses.SoftCrossEntropy on the logits has"
        " the same gradient, with the constant √2"
    ),
    nn.PoissonNLLLoss: "has the gradient exp(z), which is unbounded. Use lipdp.losses.Huber",
    nn.GaussianNLLLoss: "divides by a variance, so that its gradient is unbounded. Use lipdp.losses.Huber",
}


def as_lipschitz(criterion: nn.Module, outputs: int | tuple[int, ...] | None = None) -> LipschitzLoss:
    """The criterion itself, or the lipdp loss that computes the same per sample as a torch criterion.

    A loss of labels of a model with outputs (C, *positions) is `PerPixel` of it.

    Args:
        outputs: C of the model, or the shape of its output for one sample: for criteria of torch that are a mean over
            the outputs; 1 by default.

    Raises:
        LossError: no constant is known, or the criterion couples samples (class weights or `ignore_index` with a mean,
            KR and HKR losses that weight by batch counts).

    >>> lipdp.losses.as_lipschitz(torch.nn.CrossEntropyLoss())
    TauCrossEntropy(tau=1.0)
    """
    shape = outputs if isinstance(outputs, tuple) else ()
    positions = math.prod(shape[1:])
    loss = _converted(criterion, math.prod(outputs) if isinstance(outputs, tuple) else outputs)
    if len(shape) < 2 or not isinstance(loss, OfLabels):
        return loss
    if getattr(criterion, "reduction", "mean") != "mean":
        raise LossError(
            f"{type(criterion).__name__}(reduction={criterion.reduction!r}) adds up the {positions} positions of a"
            " sample, where lipdp takes their mean; give reduction='mean', or lipdp.losses.TauCrossEntropy"
        )
    return PerPixel(loss, positions)


def _converted(criterion: nn.Module, num_outputs: int | None) -> LipschitzLoss:
    if isinstance(criterion, LipschitzLoss):
        return criterion
    name = getattr(criterion, "__name__", type(criterion).__name__)
    forward = getattr(type(criterion), "forward", None)
    base = next((t for t in (*_KNOWN, *_WHY_NOT) if isinstance(criterion, t)), None)
    if base is not None and forward is not base.forward:
        raise LossError(
            f"{name} overrides the forward of {base.__name__}, so that its constant is not known. Subclass"
            " lipdp.losses.LipschitzLoss: set self.lipschitz and return one value per sample"
        )
    if base in _KNOWN:
        return _KNOWN[base](criterion, num_outputs)
    if base is not None:
        raise LossError(f"{name} {_WHY_NOT[base]}")
    if "KR" in name:
        raise LossError(
            f"{name} weights each sample by the class counts of its batch, so one record changes the gradients of"
            " others (measured: up to 200 times the bound). Use lipdp.losses.HKR(priors=...) with public class priors"
        )
    raise LossError(
        f"{name} has no known Lipschitz constant in the logits. Use a loss of lipdp.losses, or subclass"
        " lipdp.losses.LipschitzLoss: set self.lipschitz and return one value per sample"
    )
