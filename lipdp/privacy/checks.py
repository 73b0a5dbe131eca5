"""What a run checks: gradients are finite and possible, projections land, records keep to their bounds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lipdp.bounds import BoundGraph
from lipdp.bounds.probe import untouched
from lipdp.errors import BoundViolation, ConstraintError, EngineError, LossError, NonFiniteError, ParameterError
from lipdp.losses import LipschitzLoss
from lipdp.nn.compiled import eager, is_compiled, original
from lipdp.nn.constrained import Constrained
from lipdp.nn.sharded import unsharded
from lipdp.passes.sums import Claim
from lipdp.privacy.deferred import DeferredRead

_SLACK = 1.001  # of a sum in the precision of the weights
_SHARE = 0.003  # of a step that each of the two checks may cost, on average


class StepCheck:
    """At every step, before anything is added: is all finite, and no sum longer than the bounds of its units allow?

    A gradient with Δ_l = 0 gets no noise, so one that is not 0 would be released as it is.

    At once, the host reads the answer and raises before the step changes anything. `deferred`, the device goes on, and
    the answer is read at the next step, or before (`PrivacyEngine.settle`). Nothing is released in between: where the
    answer is no, `scale` is NaN, and every gradient of the step with it, so that what it leaves behind tells nothing of
    the records but the answer, which the error tells as well.
    """

    def __init__(self, *, deferred: bool) -> None:
        self.deferred = deferred
        self._pending: tuple[DeferredRead, int, list[str], Tensor, Tensor, list[Claim]] | None = None

    def look(
        self,
        names: Sequence[str],
        gradients: Sequence[Tensor],
        deltas: Tensor,
        *,
        step: int,
        records: int = 0,
        claims: Sequence[Claim] = (),
        combine: Callable[[Tensor], Tensor] = lambda norms: norms,
    ) -> Tensor:
        """Whether the step may be taken: () bool on the device of the gradients; read here unless deferred.

        Args:
            deltas: (D,) Δ_l of the D parameters named.
            records: that the batch holds; a sum is no longer than so many bounds.
            claims: what else must be true.
            combine: the norms of this process's parts of gradients → those of the gradients.
        """
        wide = [g if g.dtype == torch.float64 else g.float() for g in gradients]
        norms = combine(torch.stack([torch.linalg.vector_norm(g).double() for g in wide]))
        finite = torch.isfinite(norms + deltas)
        possible = norms <= records * deltas * _SLACK
        sound = (finite & possible).all()
        for claim, _ in claims:
            sound = sound & claim
        self._pending = DeferredRead(sound), step, list(names), finite, possible, list(claims)
        if not self.deferred:
            self.read()
        return sound

    def scale(self, sound: Tensor, factor: float, dtype: torch.dtype) -> float | Tensor:
        """What noisy sums of that dtype are multiplied by: `factor`; deferred, NaN where the step is refused."""
        if not self.deferred:
            return factor
        return torch.where(sound, torch.full((), factor, dtype=dtype, device=sound.device), math.nan)

    def read(self) -> None:
        """Raise what the last look found wrong, once."""
        pending, self._pending = self._pending, None
        if pending is None or bool(pending[0].read()):
            return
        _, step, names, finite, possible, claims = pending
        lost = (
            "this was found after the step, whose weights are lost (NaN; nothing was released): go on from a"
            f" checkpoint of step {step - 1} or before"
            if self.deferred
            else "nothing was released or changed"
        )
        bad = [n for n, ok in zip(names, finite.tolist(), strict=True) if not ok]
        if bad:
            raise NonFiniteError(
                f"step {step}: NaN or infinity in the gradient or the bound of {', '.join(bad)}; {lost}. Look for NaN"
                " in the inputs, or lower the learning rate and resume from the last checkpoint"
            )
        for claim, wrong in claims:
            if not bool(claim):
                error = LossError if isinstance(wrong, LossError) else EngineError
                raise error(f"step {step}: {wrong}; {lost}")
        bad = [n for n, ok in zip(names, possible.tolist(), strict=True) if not ok]
        raise EngineError(
            f"step {step}: the gradient of {', '.join(bad)} is longer than the bounds of all records of the batch"
            f" together: the model computes something else than make_private traced; {lost}"
        )


class ProjectionCheck:
    """Every so many steps: did the projection bring every weight within its constraint, as `cannot_certify` sees it?

    The noise follows the norms as they are, so ε does not hang on this; the layers' Lipschitz constants do.

    Cost, in multiply-adds and counting the float64 ones twice: a layer's Gram matrix takes 2 m d for d weights and m
    the smaller side, its passes 3 B p d for p positions. Where the first come to 0.3 % of the second at most, as in
    convolution nets, every projection is looked at; else every ceil(333 · ratio)-th and the last of T = `steps`. The
    answer is read at once, or `deferred` to the next step; None: at once on a CPU.
    """

    def __init__(self, graph: BoundGraph, *, batch_size: int, steps: int, deferred: bool | None = None) -> None:
        names = {id(m): path for path, m in graph.model.named_modules()}
        self._layers = {names[id(s.module)]: s.module for s in graph.steps if isinstance(s.module, Constrained)}
        checks = sum(2 * min(m.weight_matrix().shape[-2:]) * m.weight.numel() for m in self._layers.values())
        passes = sum(
            3 * s.module.weight.numel() * math.prod(s.output_shape) / s.module.weight.shape[0]
            for s in graph.steps
            if isinstance(s.module, Constrained)
        )
        self.every = max(1, math.ceil(checks / (_SHARE * batch_size * max(passes, 1))))
        self._at_once, self._steps = graph.device.type == "cpu" if deferred is None else not deferred, steps
        self._found: tuple[list[str], DeferredRead] | None = None

    def look(self, step: int) -> None:
        """After projection number `step`, counted from 1."""
        last = step == self._steps
        if last or step % self.every == 0:
            found = {
                f"{path}.{name}" if path else name: answer
                for path, layer in self._layers.items()
                for name, answer in unsharded(layer).uncertified().items()
            }
            self._found = (list(found), DeferredRead(torch.stack(list(found.values())))) if found else None
            if self._at_once or last:
                self.read()

    def read(self) -> None:
        """Raise what the last look found wrong, once."""
        found, self._found = self._found, None
        if found is None:
            return
        bad = [name for name, answer in zip(found[0], found[1].read().tolist(), strict=True) if answer]
        layers = [self._layers[name.rpartition(".")[0]] for name in bad]
        bad = [n for n, m in zip(bad, layers, strict=True) if bool(getattr(m, n.rpartition(".")[2]).isfinite().all())]
        if bad:
            raise ConstraintError(
                f"{', '.join(bad)} came out of the projection with a norm above the radius of its constraint (1 where"
                " it has no `radius`): its project() is wrong, or failed numerically. ε holds, because the noise was"
                " calibrated to the actual norms. The stated Lipschitz constants of the layers do not hold"
            )


class GradientCheck:
    """Every so many steps: are the gradients of a few records of the batch within Δ, parameter by parameter?

    The record's own cotangent at the logits is lengthened to the gate's bound, the longest that the guarantee allows,
    and pulled back alone through the model as it is. What comes out must have norm ≤ Δ. A model that is not what the
    rules take it for (a wrong rule of a user's layer, a patched operation) shows here, while it trains.

    Guarantees: no effect on the run: gradients are taken beside `.grad`; buffers and torch's generators are put back.
    The norms are private and leave this object only in the error that ends the run. It is evidence, not proof.

    Cost: one record's passes cost at most what a whole step does, and with B in the batch, on a CPU, about 80/B of it
    at most (measured: 4/B for a convolution net to 76/B for an MLP). `every=None` looks at `records` of them every
    `ceil(333 · records · min(1, 80/B))` steps on a CPU, every `333 · records` elsewhere: 0.3 % of a long run; 0:
    never. The first step is always looked at. A compiled model is looked at as compiled, the record beside a copy of
    itself that has no cotangent, because a batch of one has code of its own.
    """

    TOLERANCE = 1e-6  # relative

    def __init__(
        self,
        model: nn.Module,
        graph: BoundGraph,
        loss: LipschitzLoss,
        *,
        batch_size: int,
        every: int | None = None,
        records: int = 2,
    ) -> None:
        if every is not None and (isinstance(every, bool) or not isinstance(every, int) or every < 0):
            raise ParameterError(f"check_every={every!r}: a whole number of steps, 0 for never, or None")
        share = min(1.0, 80 / batch_size) if graph.device.type == "cpu" else 1.0
        self.every = math.ceil(records * share / _SHARE) if every is None else every
        self._model, self._graph, self._loss, self._records = model, graph, loss, records
        self._found: tuple[tuple[int, list[int]], Tensor, Tensor] | None = None

    def due(self, step: int) -> bool:
        """Whether step number `step`, counted from 0, is one to look at."""
        return self.every > 0 and step % self.every == 0

    def look(self, batch: Any, limit: float | Tensor, parameters: list[nn.Parameter], *, step: int) -> None:
        """Take the norms of a few records; `check` compares them.

        Before the batch's own forward pass there is room: no activation is held, and a parameter's gradient goes as
        soon as its norm is known.

        Args:
            batch: (x, y) as the loader yielded it, not empty.
            limit: the longest cotangent at the logits. (At another one gates let through another share of it.)
            step: number of this step, counted from 0; also says which records.
        """
        x, y = batch
        count = min(self._records, len(x))
        rows = [(step * 7919 + i * (len(x) // count)) % len(x) for i in range(count)]
        limit = torch.as_tensor(limit, dtype=torch.float64, device=self._graph.device)
        at = step, [p._version for p in parameters]  # the limit follows from the weights and the gate of the step
        with self._beside():
            inputs, targets = self._inputs(x[rows]), y[rows].to(self._graph.device)
            alike = self._is_traced(inputs, step)
            norms = [self._norms(inputs[i : i + 1], targets[i : i + 1], limit, parameters) for i in range(count)]
        self._found = at, alike, torch.stack(norms).amax(0)

    def check(
        self, batch: Any, limit: float | Tensor, bounds: dict[str, Tensor], parameters: list[nn.Parameter], *, step: int
    ) -> None:
        """Look at a few records; BoundViolation where a gradient is longer than its bound.

        Args:
            batch: (x, y), measured now unless `look` did so at these weights.
            limit: the longest cotangent at the logits.
            bounds: parameter name → Δ for one record, in the order of `parameters`.
            step: number of this step, counted from 0.
        """
        if self._found is None or self._found[0] != (step, [p._version for p in parameters]):
            self.look(batch, limit, parameters, step=step)
        (_, alike, norms), self._found = self._found, None  # type: ignore[misc]
        deltas = torch.stack(list(bounds.values()))
        over = norms > deltas * (1 + self.TOLERANCE)
        if not bool(alike & ~over.any()):
            if not bool(alike):
                raise EngineError(
                    f"step {step + 1}: the model's forward pass is not the one that make_private traced; perhaps it"
                    " reads a setting or a global that changed. Nothing was released. Call detach() and make_private"
                    " again"
                )
            self._refuse(bounds, norms.tolist(), over.tolist(), step)

    def _is_traced(self, x: Tensor, step: int) -> Tensor:
        """() bool: the forward pass as it is written now and the graph that is trained give the same logits."""
        model = original(self._model)
        with torch.no_grad(), eager(model):
            torch.manual_seed(step)  # of dropout; put back by `untouched`
            written = type(model).forward(model, x)
            torch.manual_seed(step)
            traced = self._graph.forward_pass(x)
        apart = (written - traced).abs().max()
        return (apart <= 1e-3 * traced.abs().max()) | apart.isnan()  # NaN is named elsewhere

    @contextmanager
    def _beside(self) -> Iterator[None]:
        """Gradients on, in the precision of the run, without a trace."""
        kind, dtype = self._graph.device.type, self._graph.dtype
        precision = torch.autocast(kind, dtype=dtype) if dtype.itemsize < 4 else nullcontext()
        with untouched(self._model), torch.enable_grad(), precision:
            yield

    def _inputs(self, x: Tensor) -> Tensor:
        """The records as the model takes them; random ones where the loop must have turned them into another shape."""
        like = self._graph.probe(batch=len(x))
        return x.to(like).reshape(like.shape) if x.numel() == like.numel() else like

    def _norms(self, x: Tensor, y: Tensor, limit: Tensor, parameters: list[nn.Parameter]) -> Tensor:
        """(D,) norms of one record's gradients, at a cotangent of norm `limit`."""
        copies = 2 if is_compiled(self._model) else 1
        logits = self._model(x.repeat_interleave(copies, 0))[:1]
        apart = logits.detach().requires_grad_()
        (cotangent,) = torch.autograd.grad(self._loss(apart, y).sum(), apart)
        length = torch.linalg.vector_norm(cotangent.double())
        cotangent = (cotangent.double() * torch.where(length > 0, limit / length, 0.0)).to(cotangent.dtype)
        norms: dict[int, Tensor] = {}

        def note(index: int, gradient: Tensor | None) -> Tensor | None:
            """What the pass goes on with holds no memory."""
            if gradient is None:
                return None
            if index not in norms:
                parts = gradient.reshape(-1).split(1 << 20)
                norms[index] = torch.stack([torch.linalg.vector_norm(p.double()) for p in parts]).norm()
            return gradient.new_zeros(()).expand_as(gradient)

        handles = [p.register_hook(partial(note, i)) for i, p in enumerate(parameters)]
        try:
            torch.autograd.grad(logits, parameters, cotangent, allow_unused=True)
        finally:
            for handle in handles:
                handle.remove()
        zero = torch.zeros((), dtype=torch.float64, device=logits.device)
        return torch.stack([norms.get(i, zero) for i in range(len(parameters))])

    def _refuse(self, bounds: dict[str, Tensor], norms: list[float], over: list[bool], step: int) -> None:
        found = [
            f"{name}: {norm:.6g} > {float(delta):.6g}"
            for (name, delta), norm, bad in zip(bounds.items(), norms, over, strict=True)
            if bad
        ]
        raise BoundViolation(
            f"step {step + 1}: one record's gradient is longer than the bound that the noise is calibrated to"
            f" ({'; '.join(found)}), so what was released so far is not covered by ε. A rule or a layer is wrong:"
            " lipdp.testing.falsify finds out which. (The norm is private: do not publish this message)"
        )
