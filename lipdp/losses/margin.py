"""Losses of a margin between class scores: hinges and Kantorovich-Rubinstein."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from lipdp.constraints import check_positive, check_size, is_positive
from lipdp.errors import LossError, ParameterError
from lipdp.losses.base import LipschitzLoss, OfLabels, class_labels, one_hot_labels, public_weights


class CategoricalHinge(OfLabels):
    """max(0, m − (z_y − max_{j≠y} z_j)); constant √2 (the gradient is e_j − e_y or 0).

    Args:
        margin: m > 0.
    Shapes:
        logits (N, C), C ≥ 2; target (N,) int64.

    >>> lipdp.losses.CategoricalHinge(1.0)(torch.tensor([[2.0, 1.5]]), torch.tensor([0]))
    tensor([0.5000])
    """

    def __init__(self, margin: float = 1.0) -> None:
        super().__init__()
        self.margin = check_positive("margin", margin)
        self.lipschitz = math.sqrt(2)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        target = class_labels(logits, target, at_least=2).unsqueeze(1)
        true = logits.gather(1, target).squeeze(1)
        other = logits.scatter(1, target, -math.inf).amax(1)
        return F.relu(self.margin - (true - other))


class MulticlassHinge(OfLabels):
    """One-against-all hinge, the true class weighted C − 1, mean over C; constant √((C−1)/C).

    (1/C) [(C−1)(m/2 − z_y)₊ + Σ_{j≠y} (m/2 + z_j)₊]: squared gradient norm at most ((C−1)² + (C−1))/C² = (C−1)/C.

    Args:
        num_classes: C ≥ 2.
        margin: m > 0.

    >>> lipdp.losses.MulticlassHinge(4).lipschitz == 0.75 ** 0.5
    True

    Source: deel-torchlip's `HingeMulticlassLoss`.
    """

    def __init__(self, num_classes: int, margin: float = 1.0) -> None:
        super().__init__()
        check_size("num_classes", num_classes)
        self.num_classes = int(num_classes)
        if num_classes < 2:
            raise ParameterError(f"MulticlassHinge needs at least 2 classes, got {num_classes}")
        self.margin = check_positive("margin", margin)
        self.lipschitz = math.sqrt((num_classes - 1) / num_classes)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        one_hot = one_hot_labels(logits, target, self.num_classes)
        sign = 2 * one_hot - 1
        weight = 1 + (self.num_classes - 2) * one_hot
        return (weight * F.relu(self.margin / 2 - sign * logits)).mean(1)


class MultiMargin(OfLabels):
    """(w_y/C) Σ_{j≠y} (m − z_y + z_j)₊; constant max w · √((C−1)/C).

    Where k of the C − 1 hinges are active the gradient is w_y/C times −k at y and 1 at those: its squared norm
    (w_y/C)² (k² + k) is largest for k = C − 1.

    Args:
        num_classes: C ≥ 2.
        margin: m > 0.
        weight: w, one public number for each class; 1 by default.
    Shapes:
        logits (N, C), target (N,) int64.

    >>> lipdp.losses.MultiMargin(4).lipschitz == 0.75 ** 0.5
    True
    """

    def __init__(
        self, num_classes: int, margin: float = 1.0, *, weight: Tensor | Sequence[float] | None = None
    ) -> None:
        super().__init__()
        check_size("num_classes", num_classes)
        self.num_classes = int(num_classes)
        self.margin = check_positive("margin", margin)
        self.weight = public_weights("weight", [1.0] * self.num_classes if weight is None else weight)
        if num_classes < 2 or len(self.weight) != num_classes:
            raise ParameterError(
                f"MultiMargin needs at least 2 classes and a weight for each, got {num_classes} and {len(self.weight)}"
                " weights"
            )
        self.lipschitz = max(self.weight) * math.sqrt((num_classes - 1) / num_classes)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        own = one_hot_labels(logits, target, self.num_classes)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        own = own.to(logits.dtype)
        excess = F.relu(self.margin - (own * logits).sum(1, keepdim=True) + logits) * (1 - own)
        return excess.mean(1) * (own * logits.new_tensor(self.weight)).sum(1)


class HKR(OfLabels):
    """Hinge regularised Kantorovich–Rubinstein loss with PUBLIC class priors π; each class against the others.

    ℓ = (1−α) KR + α hinge, where KR = −(1/C) (z_y/π_y − Σ_{j≠y} z_j/(1−π_j)) and the hinge is (1/C) Σ_c (m/2 ∓ z_c)₊,
    minus for c = y. As commonly written it weights by the class counts of the batch, which couples the samples
    (measured: gradients up to 200 times the bound). With fixed priors the constant is (1/C) max_y ‖((1−α)/ρ_j + α)_j‖
    with ρ_y = π_y and ρ_j = 1 − π_j for j ≠ y; for a single logit it is max_y (1−α)/π_y + α.

    Args:
        priors: class probabilities known in public, C of them; two values with one logit for the binary case.
        alpha: weight of the hinge in [0, 1]; 0 is the pure KR loss.
        margin: m > 0.
    Shapes:
        logits (N, C), or (N, 1) with two priors; target (N,) int64 (for one logit, positive means the second class).

    >>> round(lipdp.losses.HKR(priors=[0.5, 0.5], alpha=0.0).lipschitz, 4)
    2.0

    Source: Serrurier et al. (2021), section 3, made per-sample.
    """

    def __init__(self, priors: Sequence[float], alpha: float = 0.9, margin: float = 1.0) -> None:
        super().__init__()
        numbers = isinstance(priors, Sequence) and len(priors) >= 2 and all(is_positive(p) and p < 1 for p in priors)
        if not numbers or abs(sum(priors) - 1) > 1e-6:
            raise ParameterError(f"HKR: priors are at least two numbers in (0, 1) that sum to 1, got {priors!r}")
        if alpha != 0 and not (is_positive(alpha) and alpha <= 1):
            raise ParameterError(f"HKR: alpha lies in [0, 1], got {alpha!r}")
        self.priors = tuple(float(p) / sum(priors) for p in priors)
        self.alpha = float(alpha)
        self.margin = check_positive("margin", margin)
        forms = (True, False) if len(priors) == 2 else (False,)  # one logit or C: the larger constant serves both
        self.lipschitz = max(self._norm(y, single=single) for y in range(len(priors)) for single in forms)

    def knows(self, logits: Tensor, target: Tensor) -> Tensor:
        single = logits.dim() < 2 or logits.shape[1] == 1  # then a label's sign counts
        return LipschitzLoss.knows(self, logits, target) if single else super().knows(logits, target)

    def _norm(self, y: int, *, single: bool) -> float:
        """‖∂ℓ/∂z‖ where every hinge is active: its slope has the sign of the KR term's, entry by entry."""
        entry = [(1 - self.alpha) / (p if j == y else 1 - p) + self.alpha for j, p in enumerate(self.priors)]
        return entry[y] if single else math.hypot(*entry) / len(entry)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        count = logits.shape[1] if logits.dim() == 2 else 1
        priors = self.priors[-count:]
        if count == 1 and len(self.priors) == 2:
            logits = logits.reshape(-1, 1)
            positive = (target.reshape(-1, 1) > 0).to(logits.dtype)
        elif count == len(self.priors):
            positive = one_hot_labels(logits, target, count)
        else:
            raise LossError(f"HKR has {len(self.priors)} priors but the model has {count} outputs")
        own, other = logits.new_tensor([[1 / p, 1 / (1 - p)] for p in priors]).T  # in float64, then rounded
        kr = -(positive * own - (1 - positive) * other) * logits
        hinge = F.relu(self.margin / 2 - (2 * positive - 1) * logits)
        return ((1 - self.alpha) * kr + self.alpha * hinge).mean(1)
