"""Per-sample losses that state their Lipschitz constant in the logits.

Every loss maps logits (N, C) and targets to N values, one a sample; no sample sees another, and there is no
`reduction`: the engine sums and divides by its public batch size. `lipschitz` bounds ‖∂ℓ/∂z‖₂ for every logit vector
and target. A target that is none of the loss's, such as NaN or a label out of range, gives 0 and the gradient 0: one
record can't stop a run, which would tell that it is there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lipdp.constraints import is_positive
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


class OfLabels(LipschitzLoss):
    """A loss of class labels 0 … C − 1, and of `ignore_index`, if it has one: the label of samples without one."""

    ignore_index: int | None = None

    def knows(self, logits: Tensor, target: Tensor) -> Tensor:
        if target.dim() == 1 and not target.is_floating_point() and logits.dim() == 2:
            labels = target.long()
            known = (labels >= 0) & (labels < logits.shape[1])
            return known if self.ignore_index is None else known | (labels == self.ignore_index)
        return super().knows(logits, target)  # targets of another kind, or none, which `forward` refuses


def class_labels(logits: Tensor, target: Tensor, *, at_least: int = 1) -> Tensor:
    """One integer label a sample, for logits (N, C); the constants do not hold for soft labels."""
    labels = target.dim() == 1 and not target.is_floating_point()
    if not labels or logits.dim() != 2 or logits.shape[1] < at_least or len(logits) != len(target):
        logits_shape, shape = (", ".join(["N", *map(str, t.shape[1:])]) for t in (logits, target))
        raise LossError(
            f"the loss takes logits (N, C) with C ≥ {at_least} and integer labels (N,), got ({logits_shape}) and"
            f" ({shape}) {target.dtype}{_hint(logits, target)}"
        )
    return target.long()


def _hint(logits: Tensor, target: Tensor) -> str:
    if target.dim() == 1 and target.is_floating_point():
        return ": make them whole numbers, y.long()"
    if target.shape[1:] == (1,):
        return ": take the axis of size 1 away, y.squeeze(1)"
    if target.shape == logits.shape:
        return ": for probabilities there is SoftCrossEntropy" if target.is_floating_point() else ": take y.argmax(1)"
    return ""


def one_hot_labels(logits: Tensor, target: Tensor, num_classes: int) -> Tensor:
    target = class_labels(logits, target)
    if logits.shape[1] != num_classes:
        raise LossError(f"the loss has {num_classes} classes but the logits have shape {tuple(logits.shape)}")
    return F.one_hot(target, num_classes).to(logits.dtype)


def as_columns(logits: Tensor, target: Tensor, num_outputs: int) -> tuple[Tensor, Tensor]:
    """Both as (N, C); the constant is stated for exactly C outputs."""
    logits = logits.unsqueeze(1) if logits.dim() == 1 else logits.flatten(1)
    target = target.unsqueeze(1) if target.dim() == 1 else target.flatten(1)
    if logits.shape[1] != num_outputs or target.shape != logits.shape:
        raise LossError(
            f"the loss has num_outputs={num_outputs}, got logits of shape {tuple(logits.shape)} and targets of shape"
            f" {tuple(target.shape)}"
        )
    return logits, target.to(logits.dtype)


def public_weights(name: str, weights: Tensor | Sequence[float]) -> tuple[float, ...]:
    """Constant weights as numbers, none negative and one positive; they are public, so never counts of the data.

    >>> public_weights("weight", torch.tensor([1.0, 0.5]))
    (1.0, 0.5)
    """
    values = weights.detach().flatten().tolist() if isinstance(weights, Tensor) else weights
    numbers = isinstance(values, Sequence) and len(values) > 0 and all(w == 0 or is_positive(w) for w in values)
    if not numbers or not any(values):
        raise ParameterError(f"{name}: numbers of at least 0 are needed, one of them positive, got {weights!r}")
    return tuple(map(float, values))
