"""What the sweeps pass over and give: the prepared operations of a graph, and their bounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, fx, nn

from lipdp.bounds.rounding import Rounding
from lipdp.bounds.rules import Call, Input, Local, Number, Rule, times
from lipdp.bounds.trace import NodeInfo
from lipdp.errors import UnboundedError, UnsupportedLayerError, UnsupportedOperationError

N = TypeVar("N", covariant=True)


@dataclass(frozen=True)
class NodeBound(Generic[N]):
    """One operation of the model: bounds X on its output and G on the cotangent there, and its parameters."""

    name: str
    kind: str
    value: N
    cotangent: N
    parameters: tuple[str, ...]


@dataclass(frozen=True)
class Sweep:
    """Result of both sweeps, as float64 tensors on the model's device (nothing was read on the host).

    Attributes:
        parameters: trainable parameter name → Δ.
        lipschitz: Lipschitz constant of the output in the input.
        output: bound on the norm of the output.
        rows: per operation, in the order of the forward pass.
    """

    parameters: Mapping[str, Tensor]
    lipschitz: Tensor
    output: Tensor
    rows: tuple[NodeBound[Number], ...]


def as_tensor(number: Number, device: torch.device) -> Tensor:
    """The number as a 0-dim float64 tensor."""
    if isinstance(number, Tensor):
        return number.to(torch.float64)
    return torch.full((), number, dtype=torch.float64, device=device)


class Slot(int):
    """In the arguments of a prepared call: the place of a tensor among its inputs."""


def filled(template: Any, inputs: tuple[Input, ...]) -> Any:
    """The template with its slots filled."""
    if isinstance(template, Slot):
        return inputs[template]
    if isinstance(template, (tuple, list)):
        return tuple(filled(t, inputs) for t in template)
    if isinstance(template, dict):
        return {k: filled(v, inputs) for k, v in template.items()}
    return template


@dataclass(frozen=True)
class Step:
    """One operation of the graph, prepared once for every sweep.

    Attributes:
        index: of its value among the values of a sweep.
        sources: indices of its tensor inputs, with repetitions (x + x has two).
        source_info: what these inputs are.
        args, kwargs: its arguments, tensors replaced by slots.
    """

    index: int
    name: str
    kind: str
    module: nn.Module | None
    rule: Rule
    sources: tuple[int, ...]
    source_info: tuple[NodeInfo, ...]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output_shape: tuple[int, ...]

    def combine(self, local: Local, norms: Sequence[Number]) -> Number:
        """The norm at the output for these norms at the inputs, offsets aside: Σ L_j N_j, or √Σ (L_j N_j)²."""
        if len(local.gains) != len(norms):
            raise UnsupportedOperationError(
                f"the rule of '{self.name}' ({self.kind}) gives {len(local.gains)} gains for {len(norms)} tensor"
                " inputs; give one for each"
            )
        terms = [times(gain, norm) for gain, norm in zip(local.gains, norms, strict=True)]
        return sum(t * t for t in terms) ** 0.5 if local.orthogonal else sum(terms)


@dataclass(frozen=True)
class ForwardSweep:
    """The bounds of the forward sweep. The backward sweep starts from them.

    Attributes:
        rounding: slack of the forward pass's dtype.
        values, lipschitz: X and K of every node, by index.
        calls: per step the call, its rule's answer, and the slack for rounding.
        constants: the values of the nodes that do not depend on the sample.
    """

    rounding: Rounding
    values: list[Number]
    lipschitz: list[Number]
    calls: list[tuple[Step, Call, Local, Number]]
    constants: Mapping[fx.Node, Tensor]


def check_sums(name: str, kind: str, dtype: torch.dtype) -> None:
    """A parameter's gradient must be summed over the batch in float32 or better."""
    if dtype.itemsize < 4:
        raise UnsupportedLayerError(
            f"'{name}' ({kind}) sums its gradient over the batch in {dtype} under autocast. Rounding then lets one"
            " record move the sum by more than its own gradient. Use layers of lipdp.nn that sum in float32"
            " (SpectralLinear, SpectralConv2d, LayerNorm, GroupNorm), freeze the parameter, or train in float32. If a"
            " layer of your own sums in float32, say so in its rule: Local(..., sums_in=torch.float32)"
        )


def module_parameters(step: Step, local: Local, trainable: Mapping[int, str]) -> dict[str, str]:
    """Local → model-wide name of the module's trainable parameters; all must be covered by the rule."""
    if step.module is None:
        return {}
    names: dict[str, str] = {}
    for key, parameter in step.module.named_parameters(remove_duplicate=False):  # a bias that is the weight: twice
        name = trainable.get(id(parameter))
        if name is None:
            continue
        if key not in local.parameters:
            raise UnboundedError(
                f"the rule of '{step.name}' ({step.kind}) gives no bound for its trainable parameter"
                f" '{key}'. Add parameters={{{key!r}: ...}} to its Local, or freeze it with requires_grad_(False)"
            )
        names[key] = name
    return names
