"""The criterion a private run is trained with: the loss, summed over the batch, behind the gate at the logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.autograd.function import once_differentiable

from lipdp.batches.row_rules import Rows
from lipdp.batches.rows import BatchTensor, known_rows, plain
from lipdp.bounds import BoundGraph
from lipdp.errors import EngineError, LossError
from lipdp.losses import LipschitzLoss
from lipdp.passes.step import OVERWRITTEN, WRITTEN, StepInProgress, logits_call, overwritten_by_batches
from lipdp.passes.sums import ModelCall, is_wanted
from lipdp.privacy.gate import GateState
from lipdp.privacy.loss_check import coupled, is_apart


class _OwnBackward(torch.autograd.Function):
    """The value of the loss; backwards the engine's own gradients, whatever cotangent arrives (which must be 1)."""

    @staticmethod
    def forward(
        ctx: Any, value: Tensor, call: ModelCall, add_pass: Callable[[Tensor], Any], gated: Tensor, *inputs: Tensor
    ) -> Tensor:
        ctx.call, ctx.add_pass, ctx.gated = call, add_pass, gated
        ctx.edges = [torch.autograd.graph.get_gradient_edge(t).node if t.requires_grad else None for t in inputs]
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        call: ModelCall = ctx.call
        if call.sharded:  # the pass itself goes on to the parameters, from the logits
            ctx.add_pass(grads[0])
            return None, None, None, None, ctx.gated
        wanted = [edge is not None and is_wanted(edge) for edge in ctx.edges]
        if not any(wanted[1:]):  # an attack on the inputs: nothing reaches the weights
            return None, None, None, None, call.gradient_of_input(), *[None] * len(wanted[1:])
        return None, None, None, None, *ctx.add_pass(grads[0])


class PrivateCriterion(nn.Module):
    r"""`criterion(model(x), target)`: reads as the mean of ℓ(z_i, y_i); its gradients are the engine's own, of the sum.

    The value is for people and is not private. `backward()` adds up Σ_i ∇ℓ_i, whatever the value reads, because the
    noise is calibrated to a sum; the engine divides by the public batch size after the noise. The cotangent of every
    sample is computed here and shortened to the gate; when the value is back-propagated, the engine pulls them back to
    the parameters (passes/step.py proves what that guarantees).

    Where records are grouped by owner, `criterion(model(x), target, weight)` is the mean with these weights, its
    gradient that of Σ_i w_i ℓ_i, and row i is gated at w_i times the constant; the weights used are the loader's own.
    The weights of an owner add up to 1 at most, so ‖Σ_i w_i ∇ℓ_i‖ ≤ Σ_i w_i Δ ≤ Δ: the bound of one record holds for
    the owner. Of K views of a record each counts as a row of its own; the engine divides their sum by K. Rows that fill
    a batch up (`truncated_batch_size`) have weight 0, whatever their labels are, and are 0 in the mean.

    Attributes:
        loss: the per-sample loss.

    Raises:
        EngineError: with gradients on, logits that are not what the model returned, or that were given before; weights
            that are missing or not of these rows. LossError: not one value per sample.
    """

    def __init__(self, loss: LipschitzLoss, graph: BoundGraph, gate: GateState, step: StepInProgress) -> None:
        super().__init__()
        self.loss = loss
        self._graph, self._gate, self._step = graph, gate, step

    def forward(self, logits: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
        rows, public = known_rows(target), not any(isinstance(t, BatchTensor) for t in (logits, target))
        weights, target, logits = self._weights(logits, weight, rows), plain(target), plain(logits)
        if torch.is_grad_enabled() and logits.requires_grad:
            value = self._private(logits, target, weights, rows)
        else:
            value = _mean(self._value(logits, target, weights), logits, weights if self._step.grouped else None)
        return value if public or torch.compiler.is_compiling() else BatchTensor.of(value, None)

    @_disable_dynamo
    def _private(self, logits: Tensor, target: Tensor, weights: Tensor | None, rows: Rows | None) -> Tensor:
        call = logits_call(logits)
        if call is None:
            raise EngineError(
                "the criterion needs the output of the private model, unchanged but for casts and views of the same"
                " rows. A temperature, sum, mask or statistic belongs in the model or the loss. These logits were"
                f" changed, or {self._step.reason}"
            )
        if call.given:
            raise EngineError("these logits were given to the criterion before: a record would count more than once")
        self._check(call.out, logits.dtype)
        if overwritten_by_batches(self.loss):
            raise EngineError(WRITTEN.format("the loss"))
        call.given = True
        apart = call.out.detach().to(logits.dtype).reshape(logits.shape).clone().requires_grad_()
        if logits.dtype is call.out.dtype:
            same = (logits.detach() == apart.detach()) | apart.detach().isnan()
            call.claims.append((same.all(), OVERWRITTEN))
        value = self._value(apart, target, weights)
        if self._step.looked_at is not None and len(apart) > 1:
            alone = is_apart(self.loss, apart, target, seed=self._step.looked_at)
            call.claims.append((alone, coupled(self.loss, "leaving half of the batch out", "loss or gradient")))
        (cotangent,) = torch.autograd.grad(value, apart, allow_unused=True)
        cotangent = torch.zeros_like(apart) if cotangent is None else cotangent
        gated = self._gate.limit(cotangent, self.constant(), weights)
        call.cotangent = gated.to(call.out.dtype).reshape(call.out.shape)
        call.rows = call.rows if rows == call.rows else None

        def add_pass(upstream: Tensor) -> list[Tensor | None]:
            found = self._step.add_pass(call, upstream)
            self._gate.count(cotangent, weights)
            return found

        inputs = [logits] if call.sharded else call.inputs
        mean = _mean(value.detach(), logits, weights if self._step.grouped else None)
        result: Tensor = _OwnBackward.apply(mean, call, add_pass, gated, *inputs)
        return result

    def _value(self, logits: Tensor, target: Tensor, weights: Tensor | None) -> Tensor:
        """Their sum, of which the cotangents are taken."""
        values = self.loss(logits, target)
        if values.shape != (len(logits),):
            raise LossError(
                f"{type(self.loss).__name__} returned shape {tuple(values.shape)} for {len(logits)} samples; it must"
                " return one value per sample, without reduction"
            )
        return values.sum() if weights is None else (values * weights).sum()

    def _weights(self, logits: Tensor, weight: Tensor | None, known: Rows | None) -> Tensor | None:
        """(n,) of every row, the loader's own; None where all are 1.

        Labels of unknown rows, or of another batch, have none: no step follows from them.
        """
        drawn = self._step.drawn
        if not self._step.grouped and weight is not None:
            raise EngineError(
                "every record counts alike; leave the weight out (pass group= to make_private for owners)"
            )
        if not self._step.grouped:
            if drawn is None or drawn.weights is None or known is None or known.batch is not drawn.key:
                return None
            return drawn.weights[known.start : known.stop].to(logits.device, non_blocking=True)
        if weight is None or weight.shape != logits.shape[:1]:
            given = "none" if weight is None else f"weights of shape {tuple(weight.shape)}"
            raise EngineError(
                "the records are grouped by owner: the loader yields (x, y, weight), and criterion(model(x), y,"
                f" weight) needs one weight a row, got {given} for {len(logits)} rows"
            )
        rows = None if weight is None else known_rows(weight)
        if rows is None or drawn is None or drawn.weights is None or rows.batch is not drawn.key:
            raise EngineError(
                "the weights are not those that the loader yielded with these rows: an owner could count more than"
                " once. Pass them on as they are, whole or in the pieces of engine.microbatches"
            )
        return drawn.weights[rows.start : rows.stop].to(logits.device, non_blocking=True)

    def __reduce__(self) -> Any:
        return MeanLoss, (self.loss,)

    def constant(self) -> float | Tensor:
        """The loss's constant, at the current weights where it depends on the bound of the logits."""
        if self.loss.lipschitz < float("inf"):
            return float(self.loss.lipschitz)
        constant = self.loss.constant(self._graph.output_bound())
        return float(constant) if not isinstance(constant, Tensor) else constant

    def _check(self, out: Tensor, dtype: torch.dtype) -> None:
        kind = out.device.type
        outer = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else dtype
        dtypes = {outer, dtype, *_computed_in(out)}
        lowest = min(dtypes, key=lambda dtype: dtype.itemsize)
        if torch.float16 in dtypes:
            raise EngineError(
                "the forward pass runs in float16 (precision='16-mixed', mixed_precision='fp16'), which needs a scaled"
                " loss: the gate at the logits would cut the scaled gradients of all records to the bound, and steps"
                " would be left out depending on the records. Use bfloat16 with forward_dtype=torch.bfloat16"
            )
        if lowest.itemsize < self._graph.dtype.itemsize:
            raise EngineError(
                f"the forward pass runs in {lowest} but the bounds were computed for {self._graph.dtype}: pass"
                f" forward_dtype={lowest} to make_private, so that the bounds include its rounding"
            )


class MeanLoss(nn.Module):
    """What a copy or a pickle of the criterion is: the mean of the loss, for evaluation, without batch and engine."""

    def __init__(self, loss: LipschitzLoss) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, logits: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
        values = self.loss(logits, target)
        return _mean(values.sum() if weight is None else (values * weight).sum(), logits, weight)


def _mean(total: Tensor, logits: Tensor, weights: Tensor | None) -> Tensor:
    """The value for people: per row, or per unit of weight; 0 for an empty batch."""
    if weights is None:
        return total / max(len(logits), 1)
    return total / weights.sum().clamp_min(torch.finfo(weights.dtype).tiny)


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
