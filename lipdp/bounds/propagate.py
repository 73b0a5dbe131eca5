r"""The two sweeps: values forwards, cotangents backwards, over the traced graph of a model.

Forward, in topological order:   X_v = min(cap, offset + Σ_j L_j X_j)      (√Σ L_j² X_j² for a concatenation)
and, without caps and offsets,   K_v = Σ_j L_j K_j, K_input = 1            (the Lipschitz constant of v in the input)
Backward:                        G_j += L_j · min(G_v, cap)                (cotangents of several users add)
                                 Δ_θ += P_θ · min(G_v, cap)                (several uses of a parameter add)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from lipdp.bounds.rules import Call, Input, Local, Number, function_rule, module_rule
from lipdp.bounds.trace import check_samples_apart, probe_input, sample_shapes, trace
from lipdp.constraints import vector_norm
from lipdp.errors import UnboundedError, UnsupportedOperationError


@dataclass(frozen=True)
class Row:
    """One node of the graph after a sweep: its name, what it is, X after it, and G at its output."""

    name: str
    kind: str
    value: Tensor
    cotangent: Tensor
    parameters: tuple[str, ...]


@dataclass(frozen=True)
class Sweep:
    """Result of both sweeps, as float64 tensors on the model's device (nothing was read on the host).

    Attributes:
        parameters: trainable parameter name → Δ.
        lipschitz: Lipschitz constant of the output in the input.
        output: bound on the norm of the output.
        rows: per node, in the order of the forward pass.
    """

    parameters: Mapping[str, Tensor]
    lipschitz: Tensor
    output: Tensor
    rows: tuple[Row, ...]


class BoundGraph:
    """A model traced once, for sweeps at whatever weights it has then.

    The work of a sweep does not depend on the batch size, and no value is read on the host.

    Args:
        model: any module torch.fx can trace.
        input_shape: of one sample.
        dtype: what the forward pass computes in; the model's own dtype by default, `torch.bfloat16` for autocast.
        input_bound: a public bound on the input norm, for a model without `InputBound`.

    Raises:
        UnsupportedOperationError, UnsupportedLayerError: an operation without a sound rule.
        MixesSamplesError: an operation that lets samples meet, by its rule or found by perturbing a sample.
        UnboundedError: a trainable parameter that no rule covers.

    Source: Béthune et al. (2024), algorithm 1 ("backpropagation for bounds"), for graphs.
    """

    def __init__(
        self,
        model: nn.Module,
        input_shape: tuple[int, ...],
        *,
        dtype: torch.dtype | None = None,
        input_bound: float = math.inf,
    ) -> None:
        self.model = model
        self.input_shape = tuple(input_shape)
        self.input_bound = input_bound
        x = probe_input(model, self.input_shape)
        self.device = x.device
        self.dtype = dtype or x.dtype
        module = trace(model)
        self._prefix: str = module.meta["prefix"]
        self._root: nn.Module = module
        self._shapes = sample_shapes(module, x)
        self._nodes = [n for n in module.graph.nodes if n in self._shapes and n.op != "output"]
        outputs = [n.args[0] for n in module.graph.nodes if n.op == "output"]
        if len(outputs) != 1 or not isinstance(outputs[0], fx.Node) or outputs[0] not in self._shapes:
            raise UnsupportedOperationError("the model must return one tensor, the logits (N, C)")
        self._output = outputs[0]
        placeholders = [n for n in self._nodes if n.op == "placeholder"]
        if len(placeholders) != 1:
            raise UnsupportedOperationError(f"the model must take one tensor, it takes {len(placeholders)}")
        self._modules = dict(module.named_modules())
        self._names = {id(p): name for name, p in model.named_parameters()}
        self._rules = {n: self._find_rule(n) for n in self._nodes if n.op not in ("placeholder", "get_attr")}
        check_samples_apart(model, x)

    # -- construction --------------------------------------------------------------------------------------------------

    def _find_rule(self, node: fx.Node) -> Any:
        if node.op == "call_module":
            return module_rule(self._display(node), self._modules[str(node.target)])
        return function_rule(node.name, node.target)

    def _display(self, node: fx.Node) -> str:
        if node.op == "call_module":
            target = str(node.target)
            name = target[len(self._prefix) :] if target.startswith(self._prefix) else target
            return name or type(self._modules[target]).__name__
        return node.name

    def _attribute(self, node: fx.Node) -> Tensor:
        value: Any = self._root
        for part in str(node.target).split("."):
            value = getattr(value, part)
        return value

    def _parameter_name(self, parameter: Tensor) -> str | None:
        return self._names.get(id(parameter)) if parameter.requires_grad else None

    # -- forward -------------------------------------------------------------------------------------------------------

    def _scalar(self, value: Number) -> Tensor:
        if isinstance(value, Tensor):
            return value.to(torch.float64)
        return torch.full((), value, dtype=torch.float64, device=self.device)

    def _call(self, node: fx.Node, values: Mapping[fx.Node, Tensor]) -> Call:
        inputs: list[Input] = []

        def wrap(argument: fx.Node) -> Any:
            if argument not in values:
                return argument
            constant = self._attribute(argument) if argument.op == "get_attr" else None
            inputs.append(Input(self._shapes[argument], values[argument], constant))
            return inputs[-1]

        args = fx.map_arg(node.args, wrap)
        kwargs = fx.map_arg(node.kwargs, wrap)
        return Call(
            name=self._display(node),
            module=self._modules[str(node.target)] if node.op == "call_module" else None,
            inputs=tuple(inputs),
            output_shape=self._shapes[node],
            args=args,
            kwargs=kwargs,
            dtype=self.dtype,
        )

    def _slack(self, local: Local) -> float:
        """1 + relative rounding error: 8 n ε of the accumulation, plus 4 ε of a lower forward dtype."""
        if local.exact:
            return 1.0
        accumulation = torch.float64 if self.dtype == torch.float64 else torch.float32
        slack = 8 * local.fan_in * torch.finfo(accumulation).eps
        if self.dtype.itemsize < accumulation.itemsize:
            slack += 4 * torch.finfo(self.dtype).eps
        return 1.0 + slack

    def _forward(self) -> tuple[dict[fx.Node, Tensor], dict[fx.Node, Tensor], dict[fx.Node, tuple[Call, Local]]]:
        values: dict[fx.Node, Tensor] = {}
        lipschitz: dict[fx.Node, Tensor] = {}
        locals_: dict[fx.Node, tuple[Call, Local]] = {}
        for node in self._nodes:
            if node.op == "placeholder":
                values[node], lipschitz[node] = self._scalar(self.input_bound), self._scalar(1.0)
                continue
            if node.op == "get_attr":
                values[node], lipschitz[node] = vector_norm(self._attribute(node).detach()), self._scalar(0.0)
                continue
            call = self._call(node, values)
            local: Local = self._rules[node](call)
            locals_[node] = call, local
            sources = self._sources(node, values)
            slack = self._slack(local)
            values[node] = self._combine(local, [values[s] for s in sources], slack, capped=True)
            lipschitz[node] = self._combine(local, [lipschitz[s] for s in sources], slack, capped=False)
        return values, lipschitz, locals_

    @staticmethod
    def _sources(node: fx.Node, values: Mapping[fx.Node, Tensor]) -> list[fx.Node]:
        """The tensor arguments in order, with repetitions (x + x has two)."""
        found: list[fx.Node] = []

        def visit(argument: fx.Node) -> fx.Node:
            if argument in values:
                found.append(argument)
            return argument

        fx.map_arg((node.args, node.kwargs), visit)
        return found

    def _combine(self, local: Local, norms: list[Tensor], slack: float, *, capped: bool) -> Tensor:
        terms = [self._scalar(g) * n for g, n in zip(local.gains, norms, strict=True)]
        if local.orthogonal:
            total = torch.linalg.vector_norm(torch.stack(terms))
        else:
            total = torch.stack(terms).sum() if len(terms) > 1 else terms[0]
        if not capped:
            return total * slack
        return torch.minimum(total + local.offset, self._scalar(local.value_cap)) * slack

    @property
    def num_outputs(self) -> int:
        """Entries of one sample's output: the number of logits."""
        return math.prod(self._shapes[self._output])

    # -- the two public sweeps -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def lipschitz(self) -> Tensor:
        """The network's Lipschitz constant in its input, as a float64 tensor."""
        return self._forward()[1][self._output]

    @torch.no_grad()
    def output_bound(self) -> Tensor:
        """A bound on the norm of the output, as a float64 tensor."""
        return self._forward()[0][self._output]

    @torch.no_grad()
    def sweep(self, loss_constant: Number | Any) -> Sweep:
        """Both sweeps, from a per-sample cotangent of norm ≤ `loss_constant` at the output.

        Args:
            loss_constant: a number, or a function of the output bound (squared error).
        """
        values, lipschitz, locals_ = self._forward()
        start = loss_constant(values[self._output]) if callable(loss_constant) else loss_constant
        cotangents: dict[fx.Node, Tensor] = {self._output: self._scalar(start)}
        deltas: dict[str, Tensor] = {}

        def add(name: str | None, delta: Tensor) -> None:
            if name is not None:
                deltas[name] = deltas[name] + delta if name in deltas else delta

        rows: list[Row] = []
        zero = self._scalar(0.0)
        for node in reversed(self._nodes):
            g = cotangents.get(node, zero)
            if node.op == "get_attr":
                add(self._parameter_name(self._attribute(node)), g)
            elif node in locals_:
                call, local = locals_[node]
                slack = self._slack(local)
                inner = torch.minimum(g, self._scalar(local.cotangent_cap)) * slack
                for source, gain in zip(self._sources(node, values), local.gains, strict=True):
                    cotangents[source] = cotangents.get(source, zero) + self._scalar(gain) * inner
                names = self._module_parameters(call, local)
                for key, name in names.items():
                    add(name, self._scalar(local.parameters[key]) * inner)
                rows.append(Row(call.name, _kind(node, call), values[node], g, tuple(names.values())))
        ordered = {name: deltas.get(name, zero) for name, p in self.model.named_parameters() if p.requires_grad}
        return Sweep(ordered, lipschitz[self._output], values[self._output], tuple(reversed(rows)))

    def _module_parameters(self, call: Call, local: Local) -> dict[str, str]:
        """Local → model-wide name of the module's trainable parameters; all must be covered by the rule."""
        if call.module is None:
            return {}
        names: dict[str, str] = {}
        for key, parameter in call.module.named_parameters():
            name = self._parameter_name(parameter)
            if name is None:
                continue
            if key not in local.parameters:
                raise UnboundedError(
                    f"the rule of '{call.name}' ({type(call.module).__name__}) gives no bound for its trainable parameter"
                    f" '{key}'. Add parameters={{{key!r}: ...}} to its Local, or freeze it with requires_grad_(False)"
                )
            names[key] = name
        return names


def _kind(node: fx.Node, call: Call) -> str:
    if call.module is not None:
        return type(call.module).__name__
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
