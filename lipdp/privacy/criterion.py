"""The criterion a private run is trained with: the loss, summed over the batch, behind the gate at the logits."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lipdp.bounds import BoundGraph
from lipdp.errors import EngineError, LossError
from lipdp.losses import LipschitzLoss
from lipdp.privacy.gate import GateState


class PrivateCriterion(nn.Module):
    """`criterion(logits, target)`: Σ_i ℓ(z_i, y_i), with every sample's cotangent gated.

    A sum, because the noise is calibrated to a sum; the engine divides by the public batch size after the noise. It
    counts the samples it has seen since the last step, so that the engine can refuse a step in which a record was used
    twice.

    Attributes:
        loss: the per-sample loss.
        samples: samples seen with gradients since the last step.
    """

    def __init__(self, loss: LipschitzLoss, graph: BoundGraph, gate: GateState) -> None:
        super().__init__()
        self.loss = loss
        self.samples = 0
        self._graph = graph
        self._gate = gate

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        if torch.is_grad_enabled() and logits.requires_grad:
            self._check(logits)
            self.samples += len(logits)
            logits = self._gate.apply(logits, self.constant())
        values = self.loss(logits, target)
        if values.shape != (len(logits),):
            raise LossError(
                f"{type(self.loss).__name__} returned shape {tuple(values.shape)} for {len(logits)} samples; it must return one"
                " value per sample, without reduction"
            )
        return values.sum()

    def constant(self) -> float | Tensor:
        """The loss's constant, at the current weights where it depends on the bound of the logits."""
        if self.loss.lipschitz < float("inf"):
            return float(self.loss.lipschitz)
        constant = self.loss.constant(self._graph.output_bound())
        return float(constant) if not isinstance(constant, Tensor) else constant

    def _check(self, logits: Tensor) -> None:
        if logits.dtype.itemsize < self._graph.dtype.itemsize:
            raise EngineError(
                f"the logits are {logits.dtype} but the bounds were computed for {self._graph.dtype}: pass"
                f" forward_dtype={logits.dtype} to make_private, so that the bounds include its rounding"
            )


@torch.no_grad()
def check_loss(loss: LipschitzLoss, targets: Tensor, num_outputs: int) -> None:
    """Perturb one sample's logits: no other sample's loss may change, and there must be one value per sample."""
    logits = torch.linspace(-1.0, 1.0, len(targets) * num_outputs, device=targets.device).reshape(
        len(targets), num_outputs
    )
    moved = logits.clone()
    moved[0] = moved[0].flip(0) * 3.0 + 1.0
    before, after = loss(logits, targets), loss(moved, targets)
    if before.shape != (len(targets),):
        raise LossError(
            f"{type(loss).__name__} returned shape {tuple(before.shape)} for {len(targets)} samples; it must return one value"
            " per sample, without reduction"
        )
    if not torch.allclose(before[1:], after[1:], equal_nan=True):
        raise LossError(
            f"{type(loss).__name__} couples the samples of a batch: changing one sample's logits changed another's loss, so no"
            " per-sample bound exists"
        )
