"""What an optimiser must be to step privately, and what may not step beside it."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from lipdp.errors import EngineError, OptimizerError
from lipdp.passes.forward import PrivateForward
from lipdp.passes.step import StepInProgress


def matched_parameters(module: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[list[str], list[nn.Parameter]]:
    """Names and parameters, once the optimiser is found to hold exactly the model's trainable parameters.

    It may hold frozen ones too. A gradient left on a frozen one, from before it was frozen, is dropped.
    """
    held = {id(p): p for group in optimizer.param_groups for p in group["params"]}
    trainable = {n: p for n, p in module.named_parameters() if p.requires_grad}
    foreign = set(held) - {id(p) for p in module.parameters()}
    missing = [n for n, p in trainable.items() if id(p) not in held]
    if foreign:
        raise OptimizerError(
            f"the optimiser holds {len(foreign)} parameter(s) that the model lacks: they would be updated without a"
            " bound. Build it with model.parameters()"
        )
    if missing:
        raise OptimizerError(
            f"the optimiser lacks the trainable parameter(s) {', '.join(missing)}: freeze them with"
            " requires_grad_(False), or build it with model.parameters()"
        )
    if not trainable:
        raise OptimizerError("the model has no trainable parameter")
    for parameter in module.parameters():
        if not parameter.requires_grad:
            parameter.grad = None
    return list(trainable), list(trainable.values())


def refuse_unsuitable(model: nn.Module, optimizer: torch.optim.Optimizer, before_step: Callable[..., Any]) -> None:
    """Refuse what is private already (`before_step` is the hook of a private step), or would step without noise."""
    if not hasattr(optimizer, "_optimizer_step_pre_hooks"):
        raise OptimizerError(f"optimizer={optimizer!r}: one of torch.optim over model.parameters() is needed, or none")
    hooks = optimizer._optimizer_step_pre_hooks.values()
    if any(getattr(hook, "__func__", None) is before_step for hook in hooks):
        raise OptimizerError("this optimiser is already private; detach() the engine that holds it first")
    if hooks:
        raise OptimizerError(
            "the optimiser has a step pre-hook: it would run before the noise is added and could change gradients."
            " Register it after make_private, so that it sees the noisy ones"
        )
    if isinstance(vars(model).get("forward"), PrivateForward):
        raise EngineError("this model is already private under another engine; detach() that one first")
    inner = [n for n, value in vars(optimizer).items() if isinstance(value, torch.optim.Optimizer)]
    if inner:
        raise OptimizerError(
            f"{type(optimizer).__name__} holds another optimiser ({', '.join(inner)}), which would step without noise,"
            " as SAM and Lookahead do; take SGD, Adam or another that takes one gradient a step"
        )


class Guard:
    """Refuses a step of any other optimiser over these weights while a private gradient waits for its noise.

    It watches all optimisers of the process and keeps nothing of the run alive. With the model it goes, and the
    gradients that wait go with it: a part of the model may live on.
    """

    _all: ClassVar[dict[int, Guard]] = {}
    _hooked: ClassVar[bool] = False

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, step: StepInProgress) -> None:
        self._model, self._optimizer, self._step = weakref.ref(model), weakref.ref(optimizer), weakref.ref(step)
        self._all[id(self)] = self
        self._end = weakref.finalize(model, _end, id(self), step.waiting)
        if not Guard._hooked:  # one hook for all, for good: torch may be going over its hooks when a model is freed
            register_optimizer_step_pre_hook(_look)
            Guard._hooked = True

    def look(self, stepping: torch.optim.Optimizer) -> None:
        """OptimizerError where this step would move private weights by gradients without noise."""
        model, step = self._model(), self._step()
        if model is None or stepping is self._optimizer() or (step is not None and not step.without_noise):
            return
        weights = {id(p) for p in model.parameters()}
        if any(id(p) in weights for group in stepping.param_groups for p in group["params"]):
            raise OptimizerError(
                f"this {type(stepping).__name__} would move the private weights without noise: call step() of the"
                " optimiser that make_private returned"
            )

    def remove(self) -> None:
        """The engine is detached; it has dropped what had no noise."""
        self._all.pop(id(self), None)
        self._end.detach()


def _look(stepping: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for guard in list(Guard._all.values()):
        guard.look(stepping)


def _end(key: int, waiting: dict[nn.Parameter, None]) -> None:
    Guard._all.pop(key, None)
    for parameter in waiting:
        parameter.grad = None


def closure_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[], Any] | None:
    """The closure among the arguments of a step, of which the first is the optimiser."""
    optimizer, *given = args
    if "grad_scaler" in kwargs or getattr(optimizer, "found_inf", None) is not None:
        raise OptimizerError(
            "a GradScaler (fp16 mixed precision) controls this step. The gate would cut the scaled loss, and the scaler"
            " leaves out steps depending on the records. Use bf16 (forward_dtype=torch.bfloat16,"
            " precision='bf16-mixed'), which needs no scaler"
        )
    given += [value for name, value in kwargs.items() if name == "closure"]
    foreign = [name for name in kwargs if name != "closure"]
    if foreign or len(given) > 1 or not all(value is None or callable(value) for value in given):
        raise OptimizerError(
            f"a private step takes a closure or nothing, got {', '.join([*foreign, *map(repr, given)])}"
        )
    return given[0] if given else None


def refuse_reevaluating(optimizer: torch.optim.Optimizer) -> None:
    """OptimizerError where it can't step without a closure: it evaluates it again within the step, without noise."""
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise OptimizerError(
            f"{type(optimizer).__name__} evaluates the gradient several times a step, each of which would need noise"
            " and a batch of its own; take SGD, Adam or another that takes one gradient a step"
        )


class Evaluated:
    """Stands for a closure that was evaluated before the noise: returns its value, once.

    >>> closure = Evaluated(0.5)
    >>> closure()
    0.5
    >>> closure()
    Traceback (most recent call last):
    lipdp.errors.OptimizerError: the optimiser evaluates its closure more than once a step...
    """

    def __init__(self, value: Any) -> None:
        self._value = value
        self._used = False

    def __call__(self) -> Any:
        if self._used:
            raise OptimizerError(
                "the optimiser evaluates its closure more than once a step: the further gradients would have no noise."
                " Take SGD, Adam or another that takes one gradient a step"
            )
        self._used = True
        return self._value
