"""Per-sample losses that state their Lipschitz constant in the logits.

Every loss maps logits (N, C) and targets to N values, one a sample; no sample sees another, and there is no
`reduction`: the engine sums and divides by its public batch size. `lipschitz` bounds ‖∂ℓ/∂z‖₂ for every logit vector
and target. A target that is none of the loss's, such as NaN or a label out of range, gives 0 and the gradient 0: one
record can't stop a run, which would tell that it is there.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lipdp.constraints import check_positive, check_size, is_positive
from lipdp.errors import LossError, ParameterError


class LipschitzLoss(nn.Module, ABC):
    """Base of the losses: `forward(logits, target) -> (N,)` and `lipschitz`, a bound on ‖∂ℓ/∂logits‖ per sample.

    A loss of your own states its constant and returns one value a sample; `lipdp.testing.falsify_loss` tries to break
    it.

    Guarantees: where `knows` says no, the value is 0 and the gradient exactly 0, whatever `forward` does there: it is
    given 0 as the target. So `forward` sees the targets alone that `knows` admits, and 0; override it with yours.
    """

    lipschitz: float

    def __call__(self, logits: Tensor, target: Tensor) -> Tensor:
        """`forward`, and 0 where the target is none."""
        if not target.dim() or logits.shape[:1] != target.shape[:1]:
            return super().__call__(logits, target)
        unknown = ~self.knows(logits, target)
        rows = unknown.view(-1, *[1] * (target.dim() - 1))
        values: Tensor = super().__call__(logits, target.masked_fill(rows, 0))
        return values.masked_fill(unknown, 0.0) if values.shape == unknown.shape else values

    def knows(self, logits: Tensor, target: Tensor) -> Tensor:
        """(N,) bool: whose target is one of this loss. By default any number but NaN, infinity and the lowest integer.

        >>> lipdp.losses.MeanAbsoluteError().knows(torch.zeros(3), torch.tensor([2.5, float("nan"), -1e300]))
        tensor([ True, False, False])
        """
        if target.is_floating_point():
            good = target.to(logits.dtype).isfinite()
        elif target.dtype is torch.bool or target.is_complex() or not torch.iinfo(target.dtype).min:
            good = torch.ones_like(target, dtype=torch.bool)
        else:
            good = target != torch.iinfo(target.dtype).min
        return good.flatten(1).all(1) if good.dim() > 1 else good

    @abstractmethod
    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """One value per sample."""

    def constant(self, output_bound: float | Tensor) -> float | Tensor:
        """The constant for logits of norm ≤ `output_bound`; only the squared error looks at it."""
        return self.lipschitz


class _OfLabels(LipschitzLoss):
    """A loss of class labels 0 … C − 1."""

    def knows(self, logits: Tensor, target: Tensor) -> Tensor:
        if target.dim() == 1 and not target.is_floating_point() and logits.dim() == 2:
            labels = target.long()
            return (labels >= 0) & (labels < logits.shape[1])
        return super().knows(logits, target)  # targets of another kind, or none, which `forward` refuses


class TauCrossEntropy(_OfLabels):
    """Cross-entropy at temperature: CE(τz, y)/τ; constant √2.

    ∇_z = p − e_y with p = softmax(τz), and ‖p − e_y‖² = (1 − p_y)² + Σ_{j≠y} p_j² ≤ 2 (1 − p_y)² ≤ 2.
    A large τ sharpens the loss of a network whose logits are small because it is 1-Lipschitz.

    Args:
        tau: τ > 0.
    Shapes:
        logits (N, C), target (N,) int64.

    >>> lipdp.losses.TauCrossEntropy(tau=32.0).lipschitz == 2 ** 0.5
    True

    Source: Béthune et al. (2022), "Pay attention to your loss", section 4; deel-torchlip's `TauCrossEntropyLoss`.
    """

    def __init__(self, tau: float = 1.0) -> None:
        super().__init__()
        self.tau = check_positive("tau", tau)
        self.lipschitz = math.sqrt(2)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(logits * self.tau, _labels(logits, target), reduction="none") / self.tau

    def extra_repr(self) -> str:
        return f"tau={self.tau}"


class TauBCEWithLogits(LipschitzLoss):
    """Binary cross-entropy at temperature, mean over the C logits of a sample; constant 1/√C (1 for one logit).

    ∂ℓ/∂z_c = (σ(τz_c) − y_c)/C lies in [−1/C, 1/C].

    Args:
        tau: τ > 0.
        num_outputs: C.
    Shapes:
        logits (N, C) or (N,) for C = 1; target the same, in [0, 1] (others are clamped to it).

    >>> lipdp.losses.TauBCEWithLogits(num_outputs=4).lipschitz
    0.5
    """

    def __init__(self, tau: float = 1.0, num_outputs: int = 1) -> None:
        super().__init__()
        self.tau = check_positive("tau", tau)
        check_size("num_outputs", num_outputs)
        self.num_outputs = int(num_outputs)
        self.lipschitz = 1 / math.sqrt(self.num_outputs)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        logits, target = _columns(logits, target, self.num_outputs)
        target = target.to(logits.dtype).clamp(0, 1)
        return F.binary_cross_entropy_with_logits(logits * self.tau, target, reduction="none").mean(1) / self.tau

    def extra_repr(self) -> str:
        return f"tau={self.tau}, num_outputs={self.num_outputs}"


class CategoricalHinge(_OfLabels):
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
        target = _labels(logits, target, at_least=2).unsqueeze(1)
        true = logits.gather(1, target).squeeze(1)
        other = logits.scatter(1, target, -math.inf).amax(1)
        return F.relu(self.margin - (true - other))


class MulticlassHinge(_OfLabels):
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
        one_hot = _one_hot(logits, target, self.num_classes)
        sign = 2 * one_hot - 1
        weight = 1 + (self.num_classes - 2) * one_hot
        return (weight * F.relu(self.margin / 2 - sign * logits)).mean(1)


class CosineSimilarity(_OfLabels):
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
            direction = _one_hot(logits, target, logits.shape[-1])
        elif target.shape == logits.shape:
            direction = target / torch.linalg.vector_norm(target, dim=1, keepdim=True).clamp_min(1.0)
        else:
            raise LossError(
                f"CosineSimilarity: logits of shape {tuple(logits.shape)} need targets (N,) or of the same shape, got"
                f" {tuple(target.shape)}"
            )
        norm = torch.linalg.vector_norm(logits, dim=1).clamp_min(self.floor)
        return -(direction * logits).sum(1) / norm


class MeanAbsoluteError(LipschitzLoss):
    """(1/C) Σ_c |z_c − y_c|; constant 1/√C.

    Args:
        num_outputs: C.
    Shapes:
        logits and target (N, C), or (N,) for C = 1.

    >>> lipdp.losses.MeanAbsoluteError(4).lipschitz
    0.5
    """

    def __init__(self, num_outputs: int = 1) -> None:
        super().__init__()
        check_size("num_outputs", num_outputs)
        self.num_outputs = int(num_outputs)
        self.lipschitz = 1 / math.sqrt(self.num_outputs)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        logits, target = _columns(logits, target, self.num_outputs)
        return (logits - target).abs().mean(1)


class MeanSquaredError(LipschitzLoss):
    """(1/C) ‖z − y‖² with the target projected on a ball; constant 2(X_out + ‖y‖_max)/C.

    The gradient 2(z − y)/C is bounded only because the logits are: X_out comes from the propagation. Without it
    `lipschitz` is infinite.

    Args:
        target_bound: ‖y‖_max, a public constant; larger targets are projected.
        num_outputs: C.

    >>> lipdp.losses.MeanSquaredError(target_bound=1.0).constant(3.0)
    8.0
    """

    def __init__(self, target_bound: float, num_outputs: int = 1) -> None:
        super().__init__()
        self.target_bound = check_positive("target_bound", target_bound)
        check_size("num_outputs", num_outputs)
        self.num_outputs = int(num_outputs)
        self.lipschitz = math.inf

    def constant(self, output_bound: float | Tensor) -> float | Tensor:
        return 2 * (output_bound + self.target_bound) / self.num_outputs

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        logits, target = _columns(logits, target, self.num_outputs)
        norm = torch.linalg.vector_norm(target, dim=1, keepdim=True).clamp_min(self.target_bound)
        return (logits - target * (self.target_bound / norm)).square().mean(1)


class HKR(_OfLabels):
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
            positive = _one_hot(logits, target, count)
        else:
            raise LossError(f"HKR has {len(self.priors)} priors but the model has {count} outputs")
        own, other = logits.new_tensor([[1 / p, 1 / (1 - p)] for p in priors]).T  # in float64, then rounded
        kr = -(positive * own - (1 - positive) * other) * logits
        hinge = F.relu(self.margin / 2 - (2 * positive - 1) * logits)
        return ((1 - self.alpha) * kr + self.alpha * hinge).mean(1)


def _labels(logits: Tensor, target: Tensor, *, at_least: int = 1) -> Tensor:
    """One integer label a sample, for logits (N, C); the constants do not hold for soft labels."""
    labels = target.dim() == 1 and not target.is_floating_point()
    if not labels or logits.dim() != 2 or logits.shape[1] < at_least or len(logits) != len(target):
        raise LossError(
            f"the loss takes logits (N, C) with C ≥ {at_least} and integer labels (N,), got {tuple(logits.shape)} and"
            f" {tuple(target.shape)} {target.dtype}"
        )
    return target.long()


def _one_hot(logits: Tensor, target: Tensor, num_classes: int) -> Tensor:
    target = _labels(logits, target)
    if logits.shape[1] != num_classes:
        raise LossError(f"the loss has {num_classes} classes but the logits have shape {tuple(logits.shape)}")
    return F.one_hot(target, num_classes).to(logits.dtype)


def _columns(logits: Tensor, target: Tensor, num_outputs: int) -> tuple[Tensor, Tensor]:
    """Both as (N, C); the constant is stated for exactly C outputs."""
    logits = logits.unsqueeze(1) if logits.dim() == 1 else logits.flatten(1)
    target = target.unsqueeze(1) if target.dim() == 1 else target.flatten(1)
    if logits.shape[1] != num_outputs or target.shape != logits.shape:
        raise LossError(
            f"the loss has num_outputs={num_outputs}, got logits of shape {tuple(logits.shape)} and targets of shape"
            f" {tuple(target.shape)}"
        )
    return logits, target.to(logits.dtype)


_KNOWN = (nn.CrossEntropyLoss, nn.BCEWithLogitsLoss, nn.L1Loss)


def as_lipschitz(criterion: nn.Module) -> LipschitzLoss:
    """The criterion itself, or the lipdp loss that computes the same per sample as a torch criterion.

    Raises:
        LossError: no constant is known, or the criterion couples samples (class weights or `ignore_index` with a mean,
            KR and HKR losses that weight by batch counts).

    >>> lipdp.losses.as_lipschitz(torch.nn.CrossEntropyLoss())
    TauCrossEntropy(tau=1.0)
    """
    if isinstance(criterion, LipschitzLoss):
        return criterion
    name = type(criterion).__name__
    kind = next((t for t in _KNOWN if getattr(type(criterion), "forward", None) is t.forward), None)
    if kind is nn.CrossEntropyLoss:
        if criterion.weight is not None or criterion.ignore_index != -100 or criterion.label_smoothing:
            raise LossError(
                "CrossEntropyLoss with class weights, ignore_index or label_smoothing: a weighted mean divides by the"
                " weights of the batch, so samples are coupled. Use lipdp.losses.TauCrossEntropy(tau)"
            )
        return TauCrossEntropy(1.0)
    if kind is nn.BCEWithLogitsLoss and criterion.weight is None and criterion.pos_weight is None:
        return TauBCEWithLogits(1.0)
    if kind is nn.L1Loss:
        return MeanAbsoluteError()
    if "KR" in name:
        raise LossError(
            f"{name} weights each sample by the class counts of its batch, so one record changes the gradients of"
            " others (measured: up to 200 times the bound). Use lipdp.losses.HKR(priors=...) with public class priors"
        )
    raise LossError(
        f"{name} has no known Lipschitz constant in the logits. Use a loss of lipdp.losses, or subclass"
        " lipdp.losses.LipschitzLoss: set self.lipschitz and return one value per sample"
    )
