"""Losses of class labels and of distributions over classes: cross-entropies, likelihood, cosine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral

import torch
from torch import Tensor
from torch.nn import functional as F

from lipdp.constraints import check_positive, is_positive
from lipdp.errors import LossError, ParameterError
from lipdp.losses.base import LipschitzLoss, OfLabels, class_labels, one_hot_labels, public_weights


class TauCrossEntropy(OfLabels):
    r"""Cross-entropy at temperature: CE(τz, y)/τ; constant √2, less with smoothing, more with class weights.

    ∇_z = (Σ_c a_c) p − a with p = softmax(τz) and a_c = w_c ((1 − s) [c = y] + s/C), for weights w and smoothing s. It
    is affine in p, so longest where p is a unit vector e_j: ‖∇‖² = ‖a‖² − 2 a_j Σa + (Σa)². Without smoothing that is
    2 w_y²; without weights 1 + (1 − s)² − s²/C, of which s²/C is left out, because C is not known here. A large τ
    sharpens the loss of a network whose logits are small because it is 1-Lipschitz.

    Args:
        tau: τ > 0.
        weight: w, one public number for each class; the loss of a sample is multiplied by that of its class, and never
            divided by those of a batch. Shares of classes in the private data are not public.
        label_smoothing: s in [0, 1].
        ignore_index: the label of samples without one: loss 0, gradient 0.
    Shapes:
        logits (N, C), target (N,) int64; without weights and smoothing also (N, C) probabilities (`SoftCrossEntropy`).

    >>> lipdp.losses.TauCrossEntropy(tau=32.0).lipschitz == 2 ** 0.5
    True
    >>> round(lipdp.losses.TauCrossEntropy(weight=[1.0, 3.0], label_smoothing=0.2).lipschitz, 4)
    3.8184

    Source: Béthune et al. (2022), "Pay attention to your loss", section 4; deel-torchlip's `TauCrossEntropyLoss`.
    """

    ignore_index: int

    def __init__(
        self,
        tau: float = 1.0,
        *,
        weight: Tensor | Sequence[float] | None = None,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
    ) -> None:
        super().__init__()
        self.tau = check_positive("tau", tau)
        self.weight = None if weight is None else public_weights("weight", weight)
        if label_smoothing != 0 and not (is_positive(label_smoothing) and label_smoothing <= 1):
            raise ParameterError(f"label_smoothing lies in [0, 1], got {label_smoothing!r}")
        self.label_smoothing = float(label_smoothing)
        self.ignore_index = _label(ignore_index)
        self.lipschitz = math.sqrt(1 + (1 - self.label_smoothing) ** 2) if self.weight is None else self._of_weights()

    @property
    def _is_plain(self) -> bool:
        """Neither weights nor smoothing: the constant holds for probabilities as well."""
        return self.weight is None and not self.label_smoothing

    def _of_weights(self) -> float:
        weight, share = torch.tensor(self.weight, dtype=torch.float64), self.label_smoothing
        a = weight * ((1 - share) * torch.eye(len(weight), dtype=torch.float64) + share / len(weight))
        total = a.sum(1)
        return float((a.square().sum(1) - 2 * a.amin(1) * total + total.square()).amax().sqrt())

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        if target.is_floating_point() and logits.dim() == 2 and target.shape == logits.shape and self._is_plain:
            return _of_shares(logits, target, self.tau)
        labels = class_labels(logits, target)
        weight = _as_row(self.weight, logits)
        wide = logits if weight is None else logits.to(weight.dtype)
        values = F.cross_entropy(
            wide * self.tau,
            labels,
            weight,
            ignore_index=self.ignore_index,
            reduction="none",
            label_smoothing=self.label_smoothing,
        )
        return values / self.tau

    def extra_repr(self) -> str:
        weight = "" if self.weight is None else f", weight={list(self.weight)}"
        smoothing = f", label_smoothing={self.label_smoothing}" if self.label_smoothing else ""
        return f"tau={self.tau}{weight}{smoothing}" + _ignoring(self.ignore_index)


class SoftCrossEntropy(LipschitzLoss):
    """Cross-entropy with a distribution over the classes as target: CE(τz, q)/τ; constant √2.

    ∇_z = (Σq) p − q = (Σq) (p − q/Σq), and two distributions are √2 apart at most. Negative entries of a target are
    taken as 0, and one whose sum is above 1 is divided by it, so that Σq ≤ 1 for every target.

    Args:
        tau: τ > 0.
    Shapes:
        logits and target (N, C).

    >>> lipdp.losses.SoftCrossEntropy()(torch.zeros(1, 2), torch.tensor([[0.3, 0.7]]))
    tensor([0.6931])
    """

    def __init__(self, tau: float = 1.0) -> None:
        super().__init__()
        self.tau = check_positive("tau", tau)
        self.lipschitz = math.sqrt(2)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        if logits.dim() != 2 or target.shape != logits.shape or not target.is_floating_point():
            raise LossError(
                f"SoftCrossEntropy takes logits and probabilities (N, C), got {tuple(logits.shape)} and"
                f" {tuple(target.shape)} {target.dtype}; for class labels there is TauCrossEntropy"
            )
        return _of_shares(logits, target, self.tau)

    def extra_repr(self) -> str:
        return f"tau={self.tau}"


def _of_shares(logits: Tensor, target: Tensor, tau: float) -> Tensor:
    """In float32 at least: shares that are rounded to bfloat16 add up to more than 1."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    shares = target.to(wide.dtype).clamp_min(0)
    shares = shares / shares.sum(1, keepdim=True).clamp_min(1.0)
    return F.cross_entropy(wide * tau, shares, reduction="none") / tau


class NegativeLogLikelihood(OfLabels):
    """−w_y z_y of log-probabilities z, for a model that ends in LogSoftmax; constant max w (the gradient is −w_y e_y).

    LogSoftmax has the Lipschitz constant √C, so that both together are bounded by √C. `TauCrossEntropy()` on the logits
    computes the same with √2.

    Args:
        weight: w, one public number for each class; 1 by default.
        ignore_index: the label of samples without one: loss 0, gradient 0.
    Shapes:
        logits (N, C) log-probabilities, target (N,) int64.

    >>> lipdp.losses.NegativeLogLikelihood(weight=[1.0, 2.0]).lipschitz
    2.0
    """

    ignore_index: int

    def __init__(self, *, weight: Tensor | Sequence[float] | None = None, ignore_index: int = -100) -> None:
        super().__init__()
        self.weight = None if weight is None else public_weights("weight", weight)
        self.ignore_index = _label(ignore_index)
        self.lipschitz = 1.0 if self.weight is None else max(self.weight)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        labels = class_labels(logits, target)
        weight = _as_row(self.weight, logits)
        wide = logits if weight is None else logits.to(weight.dtype)
        return F.nll_loss(wide, labels, weight, ignore_index=self.ignore_index, reduction="none")


class CosineSimilarity(OfLabels):
    """−⟨u, z/max(‖z‖, K)⟩ with ‖u‖ ≤ 1; constant 1/K.

    Inside the ball of radius K the gradient is u/K; outside it is (I − ẑẑᵀ)u/‖z‖.

    Args:
        floor: K > 0.
    Shapes:
        logits (N, C); target (N,) int64 (u = e_y) or (N, C) floating (projected on the unit ball).

    >>> lipdp.losses.CosineSimilarity(0.5).lipschitz
    2.0
    """

    def __init__(self, floor: float = 1.0) -> None:
        super().__init__()
        self.floor = check_positive("floor", floor)
        self.lipschitz = 1 / self.floor

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        if target.dim() == 1:
            direction = one_hot_labels(logits, target, logits.shape[-1])
        elif target.shape == logits.shape:
            direction = target / torch.linalg.vector_norm(target, dim=1, keepdim=True).clamp_min(1.0)
        else:
            raise LossError(
                f"CosineSimilarity: logits of shape {tuple(logits.shape)} need targets (N,) or of the same shape, got"
                f" {tuple(target.shape)}"
            )
        norm = torch.linalg.vector_norm(logits, dim=1).clamp_min(self.floor)
        return -(direction * logits).sum(1) / norm


def probabilities(logits: Tensor, tau: float = 1.0) -> Tensor:
    """(N, C) of logits (N, C), or (N, 1) for two classes: the softmax or sigmoid of τ z.

    >>> probabilities(torch.zeros(1, 1)).tolist()
    [[0.5, 0.5]]
    """
    scaled = tau * logits
    return scaled.softmax(1) if scaled.shape[1] > 1 else torch.cat([(-scaled).sigmoid(), scaled.sigmoid()], dim=1)


def answers_of(logits: Tensor) -> Tensor:
    """(N,) the label with the largest logit; by one logit, whether it is above 0."""
    return logits.argmax(1) if logits.shape[1] > 1 else (logits[:, 0] > 0).long()


def _as_row(weight: tuple[float, ...] | None, logits: Tensor) -> Tensor | None:
    """The weights beside logits, in float32 at least: a rounded weight may be larger than the constant allows."""
    if weight is None:
        return None
    if logits.shape[1] != len(weight):
        raise LossError(f"the loss has {len(weight)} class weights but the logits have shape {tuple(logits.shape)}")
    return torch.tensor(weight, dtype=torch.promote_types(logits.dtype, torch.float32), device=logits.device)


def _label(index: int) -> int:
    if isinstance(index, bool) or not isinstance(index, Integral):
        raise ParameterError(f"ignore_index is a whole number, got {index!r}")
    return int(index)


def _ignoring(index: int) -> str:
    return "" if index == -100 else f", ignore_index={index}"
