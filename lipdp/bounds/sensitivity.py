"""From a model and a loss to the sensitivity of every parameter's summed gradient."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import nn

from lipdp.accounting.relation import Relation
from lipdp.bounds.probe import sample_shape
from lipdp.bounds.propagate import BoundGraph
from lipdp.bounds.steps import NodeBound, Sweep, as_tensor
from lipdp.constraints import is_positive
from lipdp.errors import NonFiniteError, ParameterError, UnboundedError
from lipdp.losses import as_lipschitz

HOW_TO_BOUND = (
    "Begin a model of lipdp's layers with lipdp.nn.InputBound(c), c public; port a plain torch model with"
    " lipdp.nn.from_torch(model, input_shape=...), or with lipdp.nn.constrain(model)"
)


@dataclass(frozen=True)
class Sensitivity(Mapping[str, float]):
    """Δ per trainable parameter: ‖∇_θ ℓ(x, y)‖ ≤ Δ_θ for every record, at the weights it was computed from.

    `print(sensitivity)` shows the table.

    Attributes:
        parameters: parameter name → Δ, a float; also by indexing.
        lipschitz: the network's Lipschitz constant in its input.
        loss_constant: the cotangent norm the backward sweep started from.
        output_bound: bound on the norm of the logits.
        nodes: X and G of every operation.
        relation: what a neighbour is; under `replace_one` a sum moves by 2Δ.
    """

    parameters: Mapping[str, float]
    lipschitz: float
    loss_constant: float
    output_bound: float
    nodes: tuple[NodeBound[float], ...]
    relation: Relation = Relation.ADD_OR_REMOVE_ONE

    def __getitem__(self, name: str) -> float:
        return self.parameters[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.parameters)

    def __len__(self) -> int:
        return len(self.parameters)

    @property
    def total(self) -> float:
        """√Σ Δ²: bound on the norm of the whole per-sample gradient."""
        return math.sqrt(sum(delta**2 for delta in self.parameters.values()))

    def __str__(self) -> str:
        """The table: per parameter Δ, its share of the total, and X and G at its layer's output."""
        rows: list[tuple[str, ...]] = [("parameter", "X", "G", "Δ", "share")]
        for name, delta in self.parameters.items():
            uses = [node for node in self.nodes if name in node.parameters]
            value = max((node.value for node in uses), default=math.nan)
            cotangent = max((node.cotangent for node in uses), default=math.nan)
            share = (delta / self.total) ** 2 if self.total else 0.0
            rows.append((name, f"{value:.3g}", f"{cotangent:.3g}", f"{delta:.3g}", f"{share:.0%}"))
        rows.append(("total", "", "", f"{self.total:.3g}", ""))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows)
        return "\n".join("  ".join(line).rstrip() for line in lines)


def read_sweep(sweep: Sweep, loss_constant: float, relation: Relation) -> Sensitivity:
    """A sweep's tensors as floats, in one transfer; refuses what is not finite."""
    names = list(sweep.parameters)
    columns = [*sweep.parameters.values(), sweep.lipschitz, sweep.output]
    for row in sweep.rows:
        columns += [as_tensor(number, sweep.output.device) for number in (row.value, row.cotangent)]
    numbers: list[float] = torch.stack(columns).tolist()
    deltas = dict(zip(names, numbers, strict=False))
    lipschitz, output, *rest = numbers[len(names) :]
    if any(math.isnan(d) for d in deltas.values()) or math.isnan(lipschitz):
        bad = ", ".join(n for n, d in deltas.items() if math.isnan(d)) or "the network's Lipschitz constant"
        raise NonFiniteError(f"NaN in the bound of {bad}: a weight is NaN or infinite")
    unbounded = [n for n, d in deltas.items() if math.isinf(d)]
    if unbounded:
        raise UnboundedError(
            f"no finite sensitivity for {', '.join(unbounded)}: nothing bounds the values that reach them, or the"
            f" gradient of the loss. {HOW_TO_BOUND}"
        )
    nodes = tuple(
        NodeBound(row.name, row.kind, rest[2 * i], rest[2 * i + 1], row.parameters) for i, row in enumerate(sweep.rows)
    )
    return Sensitivity(MappingProxyType(deltas), lipschitz, loss_constant, output, nodes, relation)


def sensitivity(
    model: nn.Module,
    loss: nn.Module,
    input_shape: tuple[int, ...],
    *,
    gate: float = math.inf,
    relation: Relation | str = Relation.ADD_OR_REMOVE_ONE,
    forward_dtype: torch.dtype | None = None,
) -> Sensitivity:
    r"""Certified bound on the per-sample gradient norm of every trainable parameter, at the weights as they are.

    Values are bounded forwards from `InputBound`, cotangents backwards from the loss's constant, and each parameter by
    its layer's rule: Δ_θ = P_θ(X) · G.

    Args:
        model: a module torch.fx can trace, with plain `lipdp.nn` or `torch.nn` layers.
        loss: a `lipdp.losses` loss (or a torch criterion with a known constant).
        input_shape: of one sample, without the batch axis.
        gate: cotangent gate at the logits, if lower than the loss's constant.
        relation: recorded in the result.
        forward_dtype: `torch.bfloat16` when the forward pass runs under autocast.

    Returns:
        `Sensitivity`: `s["1.weight"]`, `s.total`, `s.lipschitz`, …

    Raises:
        UnsupportedOperationError, UnsupportedLayerError, MixesSamplesError, UnboundedError, LossError.

    >>> model = torch.nn.Sequential(lipdp.nn.InputBound(1.0), lipdp.nn.SpectralLinear(4, 3))
    >>> s = lipdp.sensitivity(model, lipdp.losses.TauCrossEntropy(), input_shape=(4,))
    >>> round(s["1.weight"], 4)
    1.4142

    Source: Béthune et al. (2024), algorithm 1 and theorem 1.
    """
    if not (gate == math.inf or is_positive(gate)):
        raise ParameterError(f"gate={gate!r}: a number > 0 is needed")
    graph = BoundGraph(model, sample_shape(input_shape), dtype=forward_dtype)
    constant = as_lipschitz(loss, graph.output_shape).constant
    start = float(constant(float(graph.output_bound())))
    if not min(start, gate) < math.inf:
        raise UnboundedError(
            f"{type(loss).__name__} has no finite constant here: its gradient grows with the logits, whose norm is"
            f" unbounded. {HOW_TO_BOUND}"
        )
    start = min(start, gate)
    return read_sweep(graph.sweep(start), start, Relation(relation))


def lipschitz_constant(
    model: nn.Module, input_shape: tuple[int, ...], *, forward_dtype: torch.dtype | None = None
) -> float:
    r"""Certified upper bound of the network's L2 Lipschitz constant, ‖f(x) − f(x')‖ ≤ K ‖x − x'‖.

    Args:
        model: a module torch.fx can trace.
        input_shape: of one sample.

    Raises:
        UnsupportedOperationError, UnsupportedLayerError, MixesSamplesError; NonFiniteError for NaN weights.

    >>> 1.0 <= lipdp.lipschitz_constant(lipdp.nn.SpectralLinear(4, 3), input_shape=(4,)) < 1.0001
    True
    """
    constant = float(BoundGraph(model, sample_shape(input_shape), dtype=forward_dtype).lipschitz())
    if math.isnan(constant):
        raise NonFiniteError("NaN in the Lipschitz constant: a weight is NaN or infinite")
    return constant
