"""Closures given to `optimizer.step`: evaluated once, before the noise."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from lipdp.errors import OptimizerError


def closure_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[], Any] | None:
    """The closure among the arguments of a step, of which the first is the optimiser.

    Raises:
        OptimizerError: something else is among them, or a GradScaler drives the step.

    >>> closure_of((None,), {"closure": None}) is None
    True
    """
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
    """An optimiser that can't step without a closure evaluates it again within the step, without noise.

    Raises:
        OptimizerError: this is one.

    >>> refuse_reevaluating(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0))
    """
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
