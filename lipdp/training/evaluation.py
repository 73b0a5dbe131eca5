"""Metrics of a model on held-out records."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve
from torch import Tensor, nn

from lipdp.batches.records import finite
from lipdp.bounds.trace import mode
from lipdp.errors import DataError, NonFiniteError

_log = logging.getLogger(__name__)
_OF_BOTH_CLASSES = ("auroc", "average_precision", "base_rate", "recall", "specificity")
_MOST_CLASSES, _MOST_POINTS = 20, 200  # of a confusion matrix, and of a ROC curve


@torch.no_grad()
def outputs(model: nn.Module, inputs: Iterable[Tensor], *, device: torch.device | str | None = None) -> Tensor:
    """(N, C) float64 outputs on the CPU, of inputs that come in batches; in evaluation mode, which is left as it was.

    Args:
        model: gives (n, C), or (n,) for C = 1.
        inputs: (n, *input_shape) each; moved to the device, and to the model's dtype where they are floating-point.
        device: where the model is; that of its first parameter by default.

    >>> outputs(torch.nn.Flatten(0), [torch.ones(2, 1), torch.zeros(1, 1)]).tolist()
    [[1.0], [1.0], [0.0]]
    """
    chunks = []
    with mode(model, False):
        for x in inputs:
            like = next(model.parameters(), x)
            dtype = like.dtype if x.is_floating_point() else x.dtype
            chunks.append(model(finite(x.to(device or like.device, dtype, non_blocking=True))).double().cpu())
    if not sum(map(len, chunks)):
        raise DataError("there are no records to evaluate on")
    return torch.cat(chunks).flatten(1) if chunks[0].dim() > 1 else torch.cat(chunks)[:, None]


def evaluate(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    binary: bool = False,
    device: torch.device | str | None = None,
    batch_size: int = 1024,
) -> dict[str, float | None]:
    """Accuracy, and for a binary task what tells how good a model is where one class is rare.

    These are exact figures of the records given: if those are private, ε does not cover them.

    Args:
        model: in any mode; evaluated in evaluation mode and left as it was.
        x: (N, *input_shape), of any float dtype and on any device; entries that are not finite count as 0, as in
            training.
        y: (N,) int64 labels.
        binary: score two classes, by the single logit or by the difference of two.
        device: where the model is; that of its first parameter by default.
        batch_size: of the forward passes.

    Returns:
        {"accuracy": …}, in [0, 1]. If binary, also "auroc", the area under the ROC curve; "average_precision", which is
        the base rate for a coin; "base_rate", the share of positive records; and the confusion matrix by its rows:
        "recall", the share of positive records that are found, and "specificity", of negative ones that are let pass.
        They are None, with a warning in the log, where the records are all of one class.

    Raises:
        DataError: no records.
        NonFiniteError: the model answers NaN.

    >>> evaluate(torch.nn.Identity(), torch.eye(2), torch.tensor([0, 0]))
    {'accuracy': 0.5}
    """
    batches = zip(x.split(batch_size), y.split(batch_size), strict=True)
    return evaluate_batches(model, batches, binary=binary, device=device)


def evaluate_batches(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    binary: bool = False,
    device: torch.device | str | None = None,
) -> dict[str, float | None]:
    """`evaluate` on records that come in batches, of which only the outputs are kept.

    >>> evaluate_batches(torch.nn.Identity(), [(torch.eye(2), torch.tensor([0, 0]))] * 3)
    {'accuracy': 0.5}
    """
    return metrics_of(*answers(model, batches, device=device), binary=binary)


def answers(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], *, device: torch.device | str | None = None
) -> tuple[Tensor, Tensor]:
    """The model's `outputs` on records that come in batches, and their labels (N,)."""
    truths: list[Tensor] = []

    def inputs() -> Iterator[Tensor]:
        for x, y in batches:
            truths.append(y.cpu())
            yield x

    found = outputs(model, inputs(), device=device)
    if bool(torch.isnan(found).any()):
        raise NonFiniteError("the model's outputs are NaN")
    return found, torch.cat(truths)


def metrics_of(found: Tensor, truth: Tensor, *, binary: bool) -> dict[str, float | None]:
    """What `evaluate` says, from outputs (N, C) and labels (N,)."""
    if not binary:
        return {"accuracy": float((found.argmax(1) == truth).double().mean())}
    return _binary_metrics(_margin(found), truth.bool())


def detail_of(found: Tensor, truth: Tensor, *, binary: bool, num_classes: int) -> dict[str, Any]:
    """The confusion matrix, and the ROC curve of two classes, as plain values for a file.

    Returns:
        {"confusion": counts, a row for each true class and a column for each answer; null where there are more than
        20 classes. "roc": {"false_positive": …, "true_positive": …}, rates at up to 200 thresholds; null where there
        is no such curve}.

    >>> found, truth = torch.tensor([[1.0], [-1.0], [2.0]]), torch.tensor([1, 0, 0])
    >>> detail_of(found, truth, binary=True, num_classes=2)["confusion"]
    [[1, 1], [0, 1]]
    """
    said = (_margin(found) > 0).long() if binary else found.argmax(1)
    counts = torch.bincount(truth * num_classes + said, minlength=num_classes**2).view(num_classes, num_classes)
    detail: dict[str, Any] = {"confusion": counts.tolist() if num_classes <= _MOST_CLASSES else None, "roc": None}
    if binary and 0 < int(truth.sum()) < len(truth):
        false, true, _ = roc_curve(truth.numpy(), _margin(found).numpy())
        kept = np.unique(np.linspace(0, len(false) - 1, _MOST_POINTS).round().astype(int))
        detail["roc"] = {"false_positive": false[kept].tolist(), "true_positive": true[kept].tolist()}
    return detail


def _margin(found: Tensor) -> Tensor:
    """(N,): what the model says for the second of two classes, over the first."""
    return found[:, 0] if found.shape[1] == 1 else found[:, 1] - found[:, 0]


def _binary_metrics(scores: Tensor, positive: Tensor) -> dict[str, float | None]:
    predicted = scores > 0
    accuracy = float((predicted == positive).double().mean())
    if not 0 < int(positive.sum()) < len(positive):
        _log.warning("the test records are all of one class: there is no ROC curve; use a larger test part")
        return {"accuracy": accuracy, **dict.fromkeys(_OF_BOTH_CLASSES)}
    areas = (area(positive.numpy(), scores.numpy()) for area in (roc_auc_score, average_precision_score))
    ranked = (min(float(area), 1.0) for area in areas)  # sums of shares, which rounding takes above 1
    shares = (float(part.double().mean()) for part in (positive, predicted[positive], ~predicted[~positive]))
    return {"accuracy": accuracy, **dict(zip(_OF_BOTH_CLASSES, (*ranked, *shares), strict=True))}


def metrics_or_null(
    evaluated: Callable[[], dict[str, float | None]], *, binary: bool, step: int
) -> dict[str, float | None]:
    """What `evaluated` gives; null for each metric, and a warning, where it fails: a run never dies of a metric.

    >>> metrics_or_null(lambda: {"accuracy": 0.5}, binary=False, step=1)
    {'accuracy': 0.5}
    """
    try:
        return {**evaluated()}
    except Exception as error:  # whatever a model or a test part raises: the budget is spent, and the weights are there
        _log.warning("step %d: no test metric (%s: %s)", step, type(error).__name__, error)
        return dict.fromkeys(("accuracy", *_OF_BOTH_CLASSES) if binary else ("accuracy",))
