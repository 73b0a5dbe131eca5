"""The model's own forward pass while it trains privately: the graph that was bounded, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.autograd.function import once_differentiable
from torch.nn.modules import module as hooks

from lipdp.batches.rows import BatchTensor, known_rows, labelled, overwrite, plain, version_of
from lipdp.bounds import BoundGraph
from lipdp.errors import EngineError
from lipdp.nn.compiled import is_compiled
from lipdp.passes.snapshot import Snapshot
from lipdp.passes.step import WRITTEN, StepInProgress, overwritten_by_batches, tensors_of
from lipdp.passes.sums import OTHER_TERMS, ModelCall, is_wanted


class _Logits(torch.autograd.Function):
    """The logits, cut off from the graph behind them, which the script can't reach; the node remembers the call.

    Backwards it refuses a second use of logits that the criterion was given, and else pulls back for an attack.
    """

    @staticmethod
    def forward(ctx: Any, out: Tensor, call: ModelCall, step: StepInProgress, *inputs: Tensor) -> Tensor:
        ctx.call, ctx.step = call, step
        ctx.edges = [torch.autograd.graph.get_gradient_edge(t).node if t.requires_grad else None for t in inputs]
        return out.clone()  # nor can it reach the memory that the criterion and the pull-back read

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        call: ModelCall = ctx.call
        if call.sharded and call.cotangent is not None:  # the criterion's, whatever else was added on the way
            call.claims.append(((grads[0] == call.cotangent).all(), OTHER_TERMS))
            return call.cotangent, None, None
        if call.given:
            raise EngineError(
                "the loss has a second term that uses the same logits as the criterion (z-loss, distillation, penalty"
                " on logits). Gradients may reach the weights through the criterion's value alone. Leave the term out,"
                " put it into the loss, or compute it under torch.no_grad()"
            )
        if call.private:
            ctx.step.outside(call)
        if call.sharded:
            return grads[0], None, None
        wanted = [t for t, e in zip(call.inputs, ctx.edges, strict=True) if e is not None and is_wanted(e)]
        pairs = zip(wanted, torch.autograd.grad(call.out, wanted, grads[0], allow_unused=True), strict=True)
        found = {id(t): g for t, g in pairs}
        return None, None, None, *(found.get(id(t)) for t in call.inputs)


class PrivateForward:
    """Stands in for `model.forward` from make_private to detach.

    With gradients off it is the model's own forward pass. With gradients on it runs the graph that was traced when the
    bounds were derived: with the constants, branches and globals of then, the modules of now, and no hook. A
    call that can't be private (another shape, further arguments, a model that has changed) runs as written, and the
    criterion refuses its output with the reason. Copies and pickles of the model have the forward pass of its class.

    Args:
        sharded: under `fully_shard`, which exchanges parameters while it runs: then the forward pass is run as written.
        outer: the model as the script calls it; what `torch.compile` made of it is called from within.
        first: called before the first private call on a batch.
    """

    def __init__(
        self, model: nn.Module, graph: BoundGraph, step: StepInProgress, *, sharded: bool, outer: nn.Module,
        first: Callable[[], None],
    ) -> None:  # fmt: skip
        self._model, self._graph, self._step, self._sharded, self._outer = model, graph, step, sharded, outer
        self._first = first
        self._batch: object = None  # the key of the one that was called on last
        self._within = False
        self._parameters = list(model.parameters())  # `fully_shard` exchanges them while the model runs
        # a call under torch.compile goes on as written: tensors of a batch are not for its tracer (torch 2.4 has no
        # such list, and leaves them out by itself)
        untraced: set[type[Tensor]] = getattr(torch._dynamo.config, "nontraceable_tensor_subclasses", set())
        untraced.add(BatchTensor)
        model.forward = self
        if outer is not model and is_compiled(outer):
            outer.forward = CompiledCall(outer.forward, self)
        elif model._compiled_call_impl is not None:
            model._compiled_call_impl = CompiledCall(model._compiled_call_impl, self)
        self._snapshot = None if sharded else Snapshot(model, "the model")

    def remove(self) -> None:
        """Give the model its own forward pass back."""
        del self._model.forward
        if isinstance(vars(self._outer).get("forward"), CompiledCall):
            self._outer.forward = vars(self._outer)["forward"].compiled
        if isinstance(self._model._compiled_call_impl, CompiledCall):
            self._model._compiled_call_impl = self._model._compiled_call_impl.compiled

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._within:  # compiled code of a private call
            return self._compute(*args)
        return self.call(args, kwargs, self._compute)

    def _compute(self, x: Tensor) -> Tensor:
        return self._as_written(x) if self._sharded else self._graph.forward_pass(x)

    @_disable_dynamo
    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any], compute: Callable[[Tensor], Tensor]) -> Any:
        """One call of the model, by `compute` where it is private."""
        if not torch.is_grad_enabled():
            return self._as_written(*args, **kwargs)
        reason = self._why_not(args, kwargs)
        if reason:
            self._step.reason = reason
            return self._as_written(*args, **kwargs)
        drawn = self._step.drawn
        if drawn is not None and drawn.key is not self._batch:
            self._batch = drawn.key
            self._first()
        x, versions = plain(args[0]), tensors_of(self._model, *(() if self._sharded else self._graph.held()))
        self._within, before = compute is not self._compute, self._within
        try:
            out = compute(x)
        finally:
            self._within = before
        return self._noted(args[0], x, out, versions)

    def _as_written(self, *args: Any, **kwargs: Any) -> Any:
        return self.answered(args, kwargs, lambda *a, **k: type(self._model).forward(self._model, *a, **k))

    def answered(self, args: tuple[Any, ...], kwargs: dict[str, Any], compute: Callable[..., Any]) -> Any:
        """What a call on plain tensors gives; of a batch, with its rows only by the function that was bounded."""
        own = [plain(a) if isinstance(a, Tensor) else a for a in args]
        named = {k: plain(a) if isinstance(a, Tensor) else a for k, a in kwargs.items()}
        if self._sharded or not any(isinstance(a, BatchTensor) for a in (*args, *kwargs.values())):
            return compute(*own, **named)
        one = not self._why_not(args, kwargs)
        before = [(t, version_of(t)) for t, _ in tensors_of(self._model)]
        out = compute(*own, **named)
        for tensor, version in before:
            if version_of(tensor) != version and not isinstance(tensor, nn.Parameter):
                overwrite(tensor, None)
        alike = one and isinstance(out, Tensor) and out.dim() > 0 and len(out) == len(args[0])
        return labelled(out, known_rows(args[0]) if alike else None)

    def _why_not(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        expected = self._graph.input_shape
        if kwargs or len(args) != 1 or not isinstance(args[0], Tensor):
            return "the model was called with other arguments than one tensor, as which it was bounded"
        if tuple(args[0].shape[1:]) != expected:
            return (
                f"the model was called on samples of shape {tuple(args[0].shape[1:])}, and was bounded for {expected}:"
                " bounds grow with the number of positions. Give every record the shape of record 0, or pass"
                " input_shape="
            )
        if any((hooks._global_forward_hooks, hooks._global_forward_pre_hooks, hooks._global_backward_hooks)):
            return "a global module hook is registered, which can change values where no rule sees it; remove it"
        if _tensors_saved_by_the_script():
            return "saved_tensors_hooks of the script would hand the backward pass other tensors; torch's own may stay"
        try:
            if self._snapshot is not None:
                self._snapshot.check(mode=False)
        except EngineError as error:
            return str(error)
        if not self._sharded and overwritten_by_batches(*self._graph.called(), held=self._graph.held()):
            return WRITTEN.format("the model")
        return ""

    def _noted(self, given: Tensor, x: Tensor, out: Tensor, versions: list[tuple[Tensor, int]]) -> Tensor:
        rows = known_rows(given)
        if not out.requires_grad:
            return BatchTensor.of(out, rows) if isinstance(given, BatchTensor) else out
        trained = [p for p in self._parameters if p.requires_grad]
        call = ModelCall(out, x, rows, trained, versions, sharded=self._sharded, private=isinstance(given, BatchTensor))
        shown, inputs = (out, []) if self._sharded else (out.detach(), call.inputs)
        logits: Tensor = _Logits.apply(shown, call, self._step, *inputs)
        return BatchTensor.of(logits, rows) if call.private and not self._sharded else logits

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = memo.get(id(self._model), self._model)
        return _bound_forward(copied)

    def __reduce__(self) -> Any:
        return _bound_forward, (self._model,)


def _tensors_saved_by_the_script() -> bool:
    """Whether hooks other than torch's pack what is saved for the backward pass; torch 2.4 only tells of any."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    if top is not None:
        return any(not str(getattr(hook, "__module__", "")).startswith("torch.") for hook in top(False) or ())
    node: Any = torch.ones(1, requires_grad=True).exp().grad_fn
    try:
        node._raw_saved_result.register_hooks(lambda x: x, lambda x: x)
    except RuntimeError:  # it has hooks already
        return True
    return False


def _bound_forward(model: nn.Module) -> Any:
    """What a pickled model has in the place of its private forward pass."""
    return MethodType(type(model).forward, model)


class CompiledCall:
    """Stands around compiled code of the model: the private call is outside, what is compiled sees plain tensors."""

    def __init__(self, compiled: Callable[..., Any], private: PrivateForward) -> None:
        self.compiled, self._private = compiled, private

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            return self._private.call(args, kwargs, self.compiled)
        return self._private.answered(args, kwargs, self.compiled)
