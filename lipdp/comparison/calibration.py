r"""How far a model's probabilities are from frequencies: calibration errors, proper scores and the reliability diagram.

The metrics are torchmetrics' and scikit-learn's. Two of their habits are allowed for:

- torchmetrics puts a confidence of exactly 1 in a bin of its own, above the last. Over-confident models have many; here
  they are moved to the largest float32 below 1, so that there are as many bins as asked for.
- scikit-learn's `log_loss` cuts probabilities at 2.2e-16, hence each record's loss at 36. The negative log-likelihood
  here comes from the logits (torch's cross-entropy in float64), and grows as it should.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from sklearn.metrics import brier_score_loss
from torch import Tensor, nn
from torch.nn import functional as F

from lipdp.constraints import check_positive
from lipdp.errors import DataError, NonFiniteError, ParameterError
from lipdp.training.evaluation import outputs

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BELOW_ONE = 1 - 2.0**-24


@dataclass(frozen=True)
class Bin:
    """The records with confidence in [lower, upper), the last bin closed: count, mean confidence, accuracy (or 0)."""

    lower: float
    upper: float
    count: int
    confidence: float
    accuracy: float

    @property
    def gap(self) -> float:
        """Confidence minus accuracy: positive where the model is over-confident."""
        return self.confidence - self.accuracy


@dataclass(frozen=True)
class Calibration:
    """How well a model's probabilities p = softmax(τ z) agree with what happens. Confidence is max_k p_k.

    Attributes:
        ece: expected calibration error, Σ_b (count_b/N) |accuracy_b − confidence_b|, in [0, 1].
        mce: maximum calibration error, the largest gap of a bin, in [0, 1]; a bin with one record counts like any
            other.
        nll: negative log-likelihood, mean of −ln p_y, in nats.
        brier: mean of Σ_k (p_k − 1[k = y])², in [0, 2]; half of it for two classes, as is customary, in [0, 1].
        accuracy: share of the records predicted rightly.
        records: N.
        temperature: τ.
        bins: equal in width, from confidence 0 to 1.
    """

    ece: float
    mce: float
    nll: float
    brier: float
    accuracy: float
    records: int
    temperature: float
    bins: tuple[Bin, ...]

    @property
    def confidence(self) -> float:
        """Mean confidence; above the accuracy, the model is over-confident as a whole."""
        return sum(b.count * b.confidence for b in self.bins) / self.records


def calibration(
    model: nn.Module, x: Tensor, y: Tensor, *, temperature: float = 1.0, bins: int = 15, batch_size: int = 1024
) -> Calibration:
    r"""Calibration of a classifier on held-out records.

    Exact figures of the records given: if those are private, ε does not cover them. On a finite sample the expected
    error of a perfectly calibrated model is not 0 but up to ½√(b/N), N records in b bins: a bin's accuracy has a
    standard deviation of at most ½/√count_b, and Σ_b (count_b/N) ½/√count_b ≤ ½√(b/N) by Cauchy–Schwarz.

    Args:
        model: gives logits (N, C), or (N,) or (N, 1) for two classes by one logit; evaluated in evaluation mode and
            left as it was.
        x: (N, *input_shape), N ≥ 1; moved to the model's device and floating type.
        y: (N,) labels 0 … C − 1.
        temperature: τ, what the logits are multiplied by. A model trained with CE(τ z)/τ (`TauCrossEntropy(tau)`) has
            the probabilities softmax(τ z); without its τ it looks far too unsure.
        bins: of equal width.
        batch_size: of the forward passes.

    Raises:
        DataError: no records, or labels that are not classes of the model.
        ParameterError: a number out of range, or torchmetrics is not installed.
        NonFiniteError: logits with NaN or infinity.

    >>> logits = torch.tensor([[0.8, 0.2]]).log().expand(5, 2)              # sure to 80 %, and right four times in five
    >>> report = calibration(torch.nn.Identity(), logits, torch.tensor([0, 0, 0, 0, 1]))
    >>> round(report.ece, 6), round(report.brier, 6), report.accuracy
    (0.0, 0.16, 0.8)

    Source: Guo, Pleiss, Sun & Weinberger (2017), "On calibration of modern neural networks"; Brier (1950).
    """
    temperature = check_positive("temperature", temperature)
    if isinstance(bins, bool) or not isinstance(bins, int) or bins < 1:
        raise ParameterError(f"bins={bins!r}: give a whole number of at least 1")
    if batch_size < 1:
        raise ParameterError(f"batch_size={batch_size}: give at least 1")
    logits = temperature * _logits(outputs(model, x.split(batch_size)))
    labels = _labels(y, *logits.shape)
    probabilities = logits.softmax(1)
    confidences, predictions = probabilities.max(1)
    right = predictions == labels
    error = _calibration_error()
    below_one = probabilities.clamp(max=_BELOW_ONE)
    classes = logits.shape[1]
    return Calibration(
        ece=float(error(below_one, labels, num_classes=classes, n_bins=bins, norm="l1")),
        mce=float(error(below_one, labels, num_classes=classes, n_bins=bins, norm="max")),
        nll=float(F.cross_entropy(logits, labels)),
        brier=float(brier_score_loss(labels.numpy(), probabilities.numpy(), labels=np.arange(classes))),
        accuracy=float(right.double().mean()),
        records=len(labels),
        temperature=temperature,
        bins=_binned(confidences, right, bins),
    )


def reliability_diagram(calibration: Calibration, *, title: str | None = None) -> Figure:
    """Accuracy against confidence, bin by bin, over the share of records in each; calibrated is on the diagonal.

    Returns:
        A figure that belongs to no window; `figure.savefig("reliability.png")` writes it.

    >>> report = calibration(torch.nn.Identity(), torch.eye(3), torch.arange(3))
    >>> [axes.get_ylabel() for axes in reliability_diagram(report).axes]
    ['accuracy', 'share of records']
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5, 5.5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    filled = [b for b in calibration.bins if b.count]
    lefts, widths = [b.lower for b in filled], [b.upper - b.lower for b in filled]
    accuracies = [b.accuracy for b in filled]
    above.bar(lefts, accuracies, widths, align="edge", color="C0", edgecolor="white", label="accuracy")
    above.bar(
        lefts,
        [b.gap for b in filled],
        widths,
        bottom=accuracies,
        align="edge",
        color="C3",
        alpha=0.35,
        edgecolor="C3",
        label="confidence − accuracy",
    )
    above.plot([0, 1], [0, 1], color="black", linestyle="--", linewidth=1, label="calibrated")
    figures = f"ECE {calibration.ece:.3f}   MCE {calibration.mce:.3f}   NLL {calibration.nll:.3f}"
    above.set(xlim=(0, 1), ylim=(0, 1), ylabel="accuracy", title=f"{title}\n{figures}" if title else figures)
    above.legend(loc="upper left")
    below.bar(
        lefts, [b.count / calibration.records for b in filled], widths, align="edge", color="C7", edgecolor="white"
    )
    below.set(xlabel="confidence", ylabel="share of records")
    for value, style, name in (
        (calibration.confidence, "-", "mean confidence"),
        (calibration.accuracy, ":", "accuracy"),
    ):
        below.axvline(value, color="black", linestyle=style, linewidth=1, label=name)
    below.legend(loc="upper left")
    return figure


def _logits(logits: Tensor) -> Tensor:
    """Of at least two classes: one logit z becomes (0, z)."""
    if not bool(torch.isfinite(logits).all()):
        raise NonFiniteError("the model's logits are not finite")
    return torch.cat([torch.zeros_like(logits), logits], 1) if logits.shape[1] == 1 else logits


def _labels(y: Tensor, records: int, classes: int) -> Tensor:
    """(N,) int64 on the CPU."""
    labels = y.detach().cpu()
    if labels.shape != (records,):
        raise DataError(f"{records} records have labels of shape {tuple(labels.shape)}; give one label a record, (N,)")
    if not bool(((labels >= 0) & (labels < classes) & (labels == labels.long())).all()):
        raise DataError(
            f"labels are from {labels.min().item()} to {labels.max().item()}; the model has the classes 0 to"
            f" {classes - 1}"
        )
    return labels.long()


def _binned(confidences: Tensor, right: Tensor, bins: int) -> tuple[Bin, ...]:
    """The bins of torchmetrics: equal width in float32, closed below."""
    values = confidences.clamp(max=_BELOW_ONE).float().numpy()
    edges = torch.linspace(0, 1, bins + 1).numpy()
    counts, sums, hits = (
        np.histogram(values, edges, weights=weights)[0]
        for weights in (None, values.astype(np.float64), right.double().numpy())
    )
    return tuple(
        Bin(float(low), float(high), int(n), *((float(s / n), float(h / n)) if n else (0.0, 0.0)))
        for low, high, n, s, h in zip(edges[:-1], edges[1:], counts, sums, hits, strict=True)
    )


def _calibration_error() -> Callable[..., Tensor]:
    try:
        from torchmetrics.functional.classification import multiclass_calibration_error
    except ImportError as error:
        raise ParameterError(
            f'calibration errors need torchmetrics ({error}): pip install "lipdp[comparison]"'
        ) from error
    return multiclass_calibration_error
