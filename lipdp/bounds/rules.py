"""The registry: one rule per operation, each a function from a `Call` to the `Local` bounds of that operation.

A rule states, for y = f(x₁, …, x_k; θ) on ONE sample and Euclidean norms:
    gains       L_j with ‖∂f/∂x_j‖₂ ≤ L_j      so cotangents obey  G_j = L_j · G
    offset      ‖f(0)‖                          so values obey      X = Σ L_j X_j + offset
    parameters  P_θ with ‖(∂f/∂θ)ᵀ g‖ ≤ P_θ ‖g‖  so sensitivities   Δ_θ = P_θ · G
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from lipdp.errors import MixesSamplesError, UnsupportedOperationError

Number: TypeAlias = "float | Tensor"


@dataclass(frozen=True)
class Local:
    """What one operation does to norms. Numbers are floats or 0-dim float64 tensors (never read on the host).

    What is unbounded is the float ∞; a number computed from weights is a tensor.

    Attributes:
        gains: Lipschitz constant in each tensor input, in the order of `Call.inputs`.
        offset: norm of the output at zero input (biases, f(0) ≠ 0).
        parameters: local parameter name → bound of the operator norm of ∂y/∂θ.
        value_cap: a bound on the output norm that holds whatever the input (clips, sigmoids).
        cotangent_cap: the backward pass scales each sample's cotangent to at most this norm (gates).
        parameter_caps: local parameter name → a norm that a sample's gradient of it is scaled to at most, in each use
            (weight gates).
        orthogonal: the inputs land in orthogonal coordinates of the output (concatenation), so that norms add as
            √Σ L_j² X_j² instead of Σ L_j X_j.
        sums_in: the dtype in which the backward pass sums the gradients of `parameters` over the batch; None, what the
            forward pass computes in. Below float32 it is refused where they are trained: a rounded sum moves by more
            than one record's gradient. Say `torch.float32` only of a layer that makes sure of it under autocast.
        fan_in: number of terms summed into one output entry; sets the slack for floating-point rounding.
        exact: the operation only moves numbers around, so it rounds nothing.
    """

    gains: tuple[Number, ...] = (1.0,)
    offset: Number = 0.0
    parameters: Mapping[str, Number] = field(default_factory=dict)
    sums_in: torch.dtype | None = None
    value_cap: Number = math.inf
    cotangent_cap: Number = math.inf
    parameter_caps: Mapping[str, Number] = field(default_factory=dict)
    orthogonal: bool = False
    fan_in: Number = 1
    exact: bool = False


def times(first: Number, second: Number) -> Number:
    """The product of two norms; a float 0 or ∞ wins, so that an unbounded value never turns into NaN.

    >>> times(0.0, math.inf), times(math.inf, torch.tensor(0.0))
    (0.0, inf)
    """
    plain = [number for number in (first, second) if not isinstance(number, Tensor)]
    if 0 in plain:
        return 0.0
    return math.inf if math.inf in plain else first * second


def least(first: Number, second: Number) -> Number:
    """The smaller of two norms.

    >>> least(2.0, torch.tensor(3.0))
    tensor(2.)
    """
    if not isinstance(first, Tensor):
        if not isinstance(second, Tensor):
            return min(first, second)
        first, second = second, first
    if isinstance(second, Tensor):
        return torch.minimum(first, second)
    return first if second == math.inf else first.clamp(max=second)


@dataclass(frozen=True)
class Input:
    """One tensor input of a call.

    Attributes:
        shape: of one sample (no batch axis); for a constant, its own shape.
        value: X, a bound on its norm.
        constant: the tensor itself where it does not depend on the sample (a parameter, a buffer), else None.
        is_tuple: a tuple of tensors (the result of `chunk`); `shape` then counts all their entries.
    """

    shape: tuple[int, ...]
    value: Number
    constant: Tensor | None = None
    is_tuple: bool = False

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Call:
    """One node of the traced model, as a rule sees it.

    Attributes:
        name: the node's name in the graph.
        module: the module called, or None for a function or method.
        inputs: the tensor inputs.
        output_shape: of one sample.
        args, kwargs: the call's arguments; every tensor is replaced by its `Input`, every number computed from shapes
            by its value, unless it depends on the batch size.
        dtype: what the forward pass computes in (float32, float64, or bfloat16 under autocast).
    """

    name: str
    module: nn.Module | None
    inputs: tuple[Input, ...]
    output_shape: tuple[int, ...]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    dtype: torch.dtype

    @property
    def x(self) -> Input:
        """The first tensor input."""
        return self.inputs[0]

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """An argument given by position or by name."""
        return self.args[position] if len(self.args) > position else self.kwargs.get(name, default)

    def setting(self, position: int, name: str, default: Any = None) -> Any:
        """The module's attribute of that name; where a function is called, its `argument`."""
        return self.argument(position, name, default) if self.module is None else getattr(self.module, name)

    def used(self, weight: Tensor) -> Tensor:
        """The weight as the forward pass uses it: rounded to the autocast dtype."""
        weight = weight.detach()
        return weight.to(self.dtype) if self.dtype.itemsize < weight.dtype.itemsize else weight


def own_axes(call: Call, source: Input, dims: Sequence[int]) -> list[int]:
    """Axes of a tensor, made positive; refuses the batch axis and what is no axis."""
    ndim = len(source.shape) + 1
    if not all(isinstance(d, int) and -ndim <= d < ndim for d in dims):
        raise UnsupportedOperationError(
            f"'{call.name}' works on the axes {tuple(dims)} of a {ndim}-D tensor; name axes of one sample, 1 to"
            f" {ndim - 1}"
        )
    axes = [d % ndim for d in dims]
    if 0 in axes:
        raise MixesSamplesError(
            f"'{call.name}' reduces, splits or reorders the batch axis: samples would influence each other"
        )
    return axes


Rule: TypeAlias = Callable[[Call], Local]
_RULES: dict[Hashable, Rule] = {}


def rule(*targets: Hashable) -> Callable[[Rule], Rule]:
    """Register a rule for module classes, functions, or (as strings) tensor methods.

    A module's rule also serves subclasses that override nothing of it (but `__init__` and the like), no others.
    Registering a target again replaces its rule.

    Args:
        targets: e.g. `MyLayer`, `torch.relu`, `"relu"`.

    >>> class Halve(torch.nn.Module):
    ...     def forward(self, x):
    ...         return x / 2
    >>> @lipdp.bounds.rule(Halve)
    ... def halve(call):
    ...     return lipdp.bounds.Local(gains=(0.5,))
    >>> lipdp.lipschitz_constant(Halve(), input_shape=(3,)) < 0.5001
    True
    """

    def register(function: Rule) -> Rule:
        for target in targets:
            _RULES[target] = function
        return function

    return register


HOW_TO_REGISTER = (
    "Register one with\n    @lipdp.bounds.rule({target})\n    def my_rule(call):\n"
    "        return lipdp.bounds.Local(gains=(L,))   # L: its Lipschitz constant; see README, 'Add a layer'"
)


_HARMLESS = {"extra_repr", "reset_parameters", "project_", "weight_matrix"}  # what a subclass may override


def find_module_rule(module: nn.Module) -> Rule | None:
    """The rule of a module's class, or of a base class of which it overrides nothing that the forward pass may use."""
    kind = type(module)
    for base in kind.__mro__:
        if base in _RULES:
            subclasses = kind.__mro__[: kind.__mro__.index(base)]
            changed = any(_changes(name, base, module) for sub in subclasses for name in vars(sub))
            return None if changed else _RULES[base]
    return None


def _changes(name: str, base: type, module: nn.Module) -> bool:
    """Whether an attribute of a subclass stands for one of its base, or for a tensor (a property named `weight`)."""
    special = name.startswith("__") and name not in ("__call__", "__getattr__", "__getattribute__")
    shown = hasattr(base, name) or name in module._parameters or name in module._buffers
    return not special and name not in _HARMLESS and shown


def module_rule(name: str, module: nn.Module) -> Rule:
    """The rule of a leaf module."""
    found = find_module_rule(module)
    if found is None:
        raise UnsupportedOperationError(
            f"no rule bounds the module '{name}' of type {type(module).__qualname__}. "
            + HOW_TO_REGISTER.format(target=type(module).__name__)
        )
    return found


def function_rule(name: str, target: Hashable) -> Rule:
    """The rule of a function or a tensor method."""
    found = _RULES.get(target)
    if found is None:
        label = repr(target) if isinstance(target, str) else getattr(target, "__name__", repr(target))
        kind = "method" if isinstance(target, str) else "function"
        raise UnsupportedOperationError(
            f"no rule bounds node '{name}', a call of the {kind} {label}. " + HOW_TO_REGISTER.format(target=label)
        )
    return found
