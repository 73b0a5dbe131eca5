"""The criterion a private run is trained with: the loss, summed over the batch, behind the gate at the logits."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lipdp.batches.loader import BatchLoader
from lipdp.bounds import BoundGraph
from lipdp.errors import EngineError, LossError
from lipdp.losses import LipschitzLoss
from lipdp.privacy.gate import GateState


class PrivateCriterion(nn.Module):
    r"""`criterion(logits, target)`: Σ_i ℓ(z_i, y_i), with every sample's cotangent gated.

    A sum, because the noise is calibrated to a sum; the engine divides by the public batch size after the noise. The
    gate counts the samples of every backward pass, so that the engine can refuse a step in which a record was used
    twice. Whatever multiplies the value returned, each sample's cotangent at the logits stays within the constant.

    Where records are grouped by owner, `criterion(logits, target, weight)` is :math:`\sum_i w_i \ell_i` and row i is gated at
    :math:`w_i` times the constant. The weights of an owner add up to 1 at most, so
    :math:`\|\sum_i w_i \nabla\ell_i\| \le \sum_i w_i \Delta \le \Delta`: the bound of one record holds for the owner. Of K views of a
    record each counts as a row of its own; the engine divides their sum by K.

    Not seen: rows that are not the batch's, such as one of its records several times, or in another order than the weights.

    Attributes:
        loss: the per-sample loss.
    """

    def __init__(self, loss: LipschitzLoss, graph: BoundGraph, gate: GateState, loader: BatchLoader) -> None:
        super().__init__()
        self.loss = loss
        self._graph = graph
        self._gate = gate
        self._loader = loader

    def forward(self, logits: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
        weights = self._weights(logits, weight)
        if torch.is_grad_enabled() and logits.requires_grad:
            self._check(logits)
            logits = self._gate.apply(logits, self.constant(), self._loader.position, weights)
        values = self.loss(logits, target)
        if values.shape != (len(logits),):
            raise LossError(
                f"{type(self.loss).__name__} returned shape {tuple(values.shape)} for {len(logits)} samples; it must return one"
                " value per sample, without reduction"
            )
        return values.sum() if weights is None else (values * weights).sum()

    def _weights(self, logits: Tensor, weight: Tensor | None) -> Tensor | None:
        """(n,) of every row, or None where all are 1."""
        if self._loader.owners is not None and (weight is None or weight.shape != logits.shape[:1]):
            given = "none" if weight is None else f"weights of shape {tuple(weight.shape)}"
            raise EngineError(
                f"the records are grouped by owner: the loader yields (x, y, weight), and criterion(model(x), y, weight) needs"
                f" one weight a row, got {given} for {len(logits)} rows"
            )
        if self._loader.owners is None and weight is not None:
            raise EngineError(
                "every record counts alike; leave the weight out (pass group= to make_private for owners)"
            )
        if weight is not None and not self._is_the_loaders(weight):
            raise EngineError(
                "the weights are not those that the loader yielded with these rows: an owner could count more than once. Pass them on"
                " as they are, whole or in the pieces of engine.microbatches"
            )
        return weight

    def _is_the_loaders(self, weight: Tensor) -> bool:
        """Whether it is a view of the batch's weights (which reads no value), or looks like a copy on another device."""
        issued: Tensor = self._loader.last_batch[2]
        if weight.dtype is not issued.dtype:
            return False
        same = weight.untyped_storage().data_ptr() == issued.untyped_storage().data_ptr()
        return same or weight.device != issued.device or not len(weight)

    def constant(self) -> float | Tensor:
        """The loss's constant, at the current weights where it depends on the bound of the logits."""
        if self.loss.lipschitz < float("inf"):
            return float(self.loss.lipschitz)
        constant = self.loss.constant(self._graph.output_bound())
        return float(constant) if not isinstance(constant, Tensor) else constant

    def _check(self, logits: Tensor) -> None:
        kind = logits.device.type
        outer = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else logits.dtype
        dtypes = {outer, *_computed_in(logits)}
        lowest = min(dtypes, key=lambda dtype: dtype.itemsize)
        if torch.float16 in dtypes:
            raise EngineError(
                "the forward pass runs in float16 (precision='16-mixed', mixed_precision='fp16'), which needs a scaled loss: the gate"
                " at the logits would cut the scaled gradients of all records to the bound, and steps would be left out depending"
                " on the records. Use bfloat16 with forward_dtype=torch.bfloat16"
            )
        if lowest.itemsize < self._graph.dtype.itemsize:
            raise EngineError(
                f"the forward pass runs in {lowest} but the bounds were computed for {self._graph.dtype}: pass"
                f" forward_dtype={lowest} to make_private, so that the bounds include its rounding"
            )


_HALF = frozenset({torch.bfloat16, torch.float16})


def _computed_in(logits: Tensor) -> set[torch.dtype]:
    """The dtype of the logits and the half-precision ones on the way to them, which trainers cast back out of sight."""
    found = {logits.dtype}
    if torch.compiler.is_compiling():
        return found
    waiting, seen = [logits.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if not hasattr(node, "variable"):  # a weight, in whatever dtype it is kept
            found.update(_HALF.intersection(m.dtype for m in getattr(node, "_input_metadata", ()) if m is not None))
        waiting.extend(source for source, _ in node.next_functions)
    return found
