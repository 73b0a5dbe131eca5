r"""The two sweeps: values forwards, cotangents backwards, over the traced graph of a model.

Forward, in topological order:   X_v = min(cap, offset + Σ_j L_j X_j)      (√Σ L_j² X_j² for a concatenation)
and, without caps and offsets,   K_v = Σ_j L_j K_j, K_input = 1            (the Lipschitz constant of v in the input)
Backward:                        G_j += L_j · min(G_v, cap)                (cotangents of several users add)
                                 Δ_θ += P_θ · min(G_v, cap)                (several uses of a parameter add)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn

from lipdp.bounds.probe import check_faithful, check_samples_apart, probe_input, untouched
from lipdp.bounds.rounding import Rounding
from lipdp.bounds.rules import Call, Input, Local, Number, Rule, function_rule, least, module_rule, times
from lipdp.bounds.trace import Node, check_modules, inspect_nodes, trace
from lipdp.constraints import vector_norm
from lipdp.errors import UnboundedError, UnsupportedLayerError, UnsupportedOperationError
from lipdp.nn.compiled import eager, original
from lipdp.nn.sharded import is_sharded, unsharded, whole


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
    """

    parameters: Mapping[str, Tensor]
    lipschitz: Tensor
    output: Tensor
    _trail: tuple[tuple[str, str, Number, Number, tuple[str, ...]], ...]

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        """Per node, in the order of the forward pass."""
        device = self.output.device
        return tuple(
            Row(name, kind, _tensor(value, device), _tensor(cotangent, device), parameters)
            for name, kind, value, cotangent, parameters in self._trail
        )


def _tensor(number: Number, device: torch.device) -> Tensor:
    if isinstance(number, Tensor):
        return number.to(torch.float64)
    return torch.full((), number, dtype=torch.float64, device=device)


class _Slot(int):
    """In the arguments of a prepared call: the place of a tensor among its inputs."""


def _fill(template: Any, inputs: tuple[Input, ...]) -> Any:
    """The template with its slots filled."""
    if isinstance(template, _Slot):
        return inputs[template]
    if isinstance(template, (tuple, list)):
        return tuple(_fill(t, inputs) for t in template)
    if isinstance(template, dict):
        return {k: _fill(v, inputs) for k, v in template.items()}
    return template


@dataclass(frozen=True)
class Step:
    """One operation of the graph, prepared once for every sweep.

    Attributes:
        index: of its value among the values of a sweep.
        sources: indices of its tensor inputs, with repetitions (x + x has two).
        facts: what these inputs are.
        args, kwargs: its arguments, tensors replaced by slots.
    """

    index: int
    name: str
    kind: str
    module: nn.Module | None
    rule: Rule
    sources: tuple[int, ...]
    facts: tuple[Node, ...]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output_shape: tuple[int, ...]


@dataclass(frozen=True)
class _Forward:
    """What the forward sweep leaves for the backward one, by index of the node."""

    rounding: Rounding
    values: list[Number]
    lipschitz: list[Number]
    calls: list[tuple[Step, Call, Local, Number]]


class BoundGraph:
    """A model traced once, for sweeps at whatever weights it has then.

    The work of a sweep does not depend on the batch size, and no value is read on the host.

    Args:
        model: any module torch.fx can trace.
        input_shape: of one sample.
        dtype: what the forward pass computes in; the model's own dtype by default, `torch.bfloat16` for autocast.
        input_bound: a public bound on the input norm, for a model without `InputBound`.
        gated: whether gates inside the model bound the cotangents. They do for one sample of full weight; where a unit is
            several samples of weights w_i, a gate lets c through for each, not w_i c, and the bound must do without it.

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
        gated: bool = True,
    ) -> None:
        self.model = model = original(model)
        self.gated = gated
        self.input_shape = tuple(input_shape)
        self.input_bound = float(input_bound)
        self._dtype = dtype
        with eager(model):  # each look at it would be compiled
            self._trace(model)

    # -- construction --------------------------------------------------------------------------------------------------

    def _trace(self, model: nn.Module) -> None:
        plain = unsharded(model)
        check_modules(plain)
        self.module = trace(plain)
        x = probe_input(plain, self.input_shape)
        with untouched(plain):
            self._facts = inspect_nodes(self.module, x)
        self._output = self._find_output()
        self._modules = dict(self.module.named_modules())
        tensors = [n for n, fact in self._facts.items() if fact.kind != "plain"]
        self.index = {node: i for i, node in enumerate(tensors)}
        self.constants = [n for n in tensors if self._facts[n].kind == "constant"]
        self.steps = [self._step(n) for n in tensors if self._facts[n].kind != "constant" and n.op != "placeholder"]
        self.sweep(1.0)  # every rule once: what they refuse is refused here
        check_samples_apart(plain, x)
        self._check_coverage(check_faithful(plain, self.module, x))
        if plain is not model:  # let go of the gathered parameters
            for parameter in plain.parameters():
                parameter.data = parameter.data.new_empty(0)

    def _find_output(self) -> fx.Node:
        outputs = [n.args[0] for n in self.module.graph.nodes if n.op == "output"]
        if len(outputs) != 1 or not isinstance(outputs[0], fx.Node) or self._facts[outputs[0]].kind != "sample":
            raise UnsupportedOperationError(
                "the model must return one tensor that depends on its input, the logits (N, C)"
            )
        return outputs[0]

    def _step(self, node: fx.Node) -> Step:
        sources: list[fx.Node] = []

        def slot(argument: fx.Node) -> Any:
            fact = self._facts[argument]
            if fact.kind == "plain":
                return argument if fact.value is None else fact.value
            sources.append(argument)
            return _Slot(len(sources) - 1)

        args, kwargs = fx.map_arg(node.args, slot), fx.map_arg(node.kwargs, slot)
        if node.op == "call_module":
            path, plain = str(node.target), self._modules[str(node.target)]
            prefix: str = self.module.meta["prefix"]
            name = path[len(prefix) :] or type(plain).__name__
            rule, kind = module_rule(name, plain), type(plain).__name__
            module = self._own(path, plain)
        else:
            name, module, rule = node.name, None, function_rule(node.name, node.target)
            kind = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
        return Step(
            index=self.index[node],
            name=name,
            kind=kind,
            module=module,
            rule=rule,
            sources=tuple(self.index[s] for s in sources),
            facts=tuple(self._facts[s] for s in sources),
            args=args,
            kwargs=kwargs,
            output_shape=self._facts[node].shape,
        )

    def _own(self, path: str, plain: nn.Module) -> nn.Module:
        """The model's own module that the traced one stands for; they are two where parameters are spread."""
        if not is_sharded(self.model):
            return plain
        prefix: str = self.module.meta["prefix"]
        return self.model.get_submodule(path[len(prefix) :])

    def _check_coverage(self, trained: set[str]) -> None:
        """Every parameter that gets a gradient must be met by a rule."""
        names = self._names()
        met = {names.get(id(self._attribute(n))) for n in self.constants if n.op == "get_attr"}
        for step in self.steps:
            met |= {names.get(id(p)) for p in step.module.parameters()} if step.module is not None else set()
        if trained - met:
            raise UnboundedError(
                f"{', '.join(sorted(trained - met))}: the forward pass uses the parameter where torch.fx does not see it;"
                " use it as an attribute of its module (self.weight)"
            )

    # -- the model as it is now ----------------------------------------------------------------------------------------

    @property
    def num_outputs(self) -> int:
        """Entries of one sample's output: the number of logits."""
        return math.prod(self._facts[self._output].shape)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next((p.device for p in self.model.parameters()), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        """What the forward pass computes in: as given, else the least precise dtype among the parameters."""
        own = {p.dtype for p in self.model.parameters() if p.is_floating_point()} or {torch.get_default_dtype()}
        return self._dtype or min(own, key=lambda dtype: dtype.itemsize)

    def _names(self) -> dict[int, str]:
        """Trainable parameters by identity: looked up at every sweep, so that freezing and replacing is noticed."""
        return {id(p): name for name, p in self.model.named_parameters() if p.requires_grad}

    def _attribute(self, node: fx.Node) -> Tensor:
        """The tensor as the model holds it now (the traced module keeps its own reference)."""
        prefix: str = self.module.meta["prefix"]
        for root, path in ((self.model, str(node.target)[len(prefix) :]), (self.module, str(node.target))):
            value: Any = root
            for part in path.split("."):
                value = getattr(value, part, None)
            if isinstance(value, Tensor):
                return value
        raise UnsupportedOperationError(f"the model has lost its tensor '{node.target}' since it was traced")

    def _constant(self, node: fx.Node) -> Tensor:
        """The value of a node that does not depend on the sample."""
        if node.op == "get_attr":
            return whole(self._attribute(node))

        def load(argument: fx.Node) -> Any:
            fact = self._facts[argument]
            return self._constant(argument).detach() if fact.kind == "constant" else fact.value

        path = str(node.target)
        module = unsharded(self._own(path, self._modules[path])) if node.op == "call_module" else None
        sources = [self._constant(s) for s in node.all_input_nodes if self._facts[s].kind == "constant"]
        if any(t.requires_grad for t in (*sources, *(module.parameters() if module is not None else ()))):
            raise UnsupportedOperationError(
                f"node '{node.name}' computes with trainable parameters before they meet the input; no rule bounds their"
                " gradients through that. Store the result as the parameter, or register a rule for the module around it"
            )
        args, kwargs = fx.map_arg(node.args, load), fx.map_arg(node.kwargs, load)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        target: Any = module or node.target
        return target(*args, **kwargs)

    # -- forward -------------------------------------------------------------------------------------------------------

    def _forward(self) -> _Forward:
        rounding = Rounding(self.dtype, self.device)
        values: list[Number] = [self.input_bound] * len(self.index)
        lipschitz: list[Number] = [1.0] * len(self.index)
        constants: dict[int, Tensor] = {}
        for node in self.constants:
            i = self.index[node]
            constants[i] = self._constant(node)
            values[i], lipschitz[i] = vector_norm(constants[i].detach()), 0.0
        calls: list[tuple[Step, Call, Local, Number]] = []
        for step in self.steps:
            inputs = tuple(
                Input(fact.shape, values[i], constants.get(i), fact.kind == "parts")
                for i, fact in zip(step.sources, step.facts, strict=True)
            )
            args, kwargs = _fill(step.args, inputs), _fill(step.kwargs, inputs)
            module = None if step.module is None else unsharded(step.module)  # gathered for this rule alone
            call = Call(step.name, module, inputs, step.output_shape, args, kwargs, rounding.dtype)
            local = step.rule(call)
            slack = 1.0 if local.exact else rounding.slack(local.fan_in)
            norms = _combine(step, local, [values[i] for i in step.sources])
            values[step.index] = times(least(norms + local.offset, local.value_cap), slack)
            lipschitz[step.index] = times(_combine(step, local, [lipschitz[i] for i in step.sources]), slack)
            calls.append((step, call if module is step.module else replace(call, module=step.module), local, slack))
        return _Forward(rounding, values, lipschitz, calls)

    # -- the public sweeps ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def lipschitz(self) -> Tensor:
        """The network's Lipschitz constant in its input, as a float64 tensor."""
        return _tensor(self._forward().lipschitz[self.index[self._output]], self.device)

    @torch.no_grad()
    def output_bound(self) -> Tensor:
        """A bound on the norm of the output, as a float64 tensor."""
        return _tensor(self._forward().values[self.index[self._output]], self.device)

    @torch.no_grad()
    def sweep(self, loss_constant: Number | Callable[[Tensor], Number]) -> Sweep:
        """Both sweeps, from a per-sample cotangent of norm ≤ `loss_constant` at the output.

        Args:
            loss_constant: a number, or a function of the output bound (squared error).
        """
        device, forward, end = self.device, self._forward(), self.index[self._output]
        output = _tensor(forward.values[end], device)
        cotangents: list[Number] = [0.0] * len(self.index)
        start = loss_constant(output) if callable(loss_constant) else loss_constant
        cotangents[end] = times(start, forward.rounding.cast)
        names = self._names()
        deltas: dict[str, Number] = dict.fromkeys(names.values(), 0.0)
        trail: list[tuple[str, str, Number, Number, tuple[str, ...]]] = []
        for step, _, local, slack in reversed(forward.calls):
            g = cotangents[step.index]
            inner = times(least(g, local.cotangent_cap if self.gated else math.inf), slack)
            for i, gain in zip(step.sources, local.gains, strict=True):
                cotangents[i] = cotangents[i] + times(gain, inner)
            own = _module_parameters(step, local, names)
            if own:
                _check_sums(step.name, step.kind, local.sums_in or forward.rounding.dtype)
            for key, name in own.items():
                deltas[name] = deltas[name] + times(local.parameters[key], inner)
            trail.append((step.name, step.kind, forward.values[step.index], g, tuple(own.values())))
        for node in self.constants:
            own_name = names.get(id(self._attribute(node))) if node.op == "get_attr" else None
            if own_name is not None:
                _check_sums(own_name, "a parameter met outside a layer", forward.rounding.dtype)
                deltas[own_name] = deltas[own_name] + cotangents[self.index[node]]
        lipschitz = _tensor(forward.lipschitz[end], device)
        bounds = {name: _tensor(delta, device) for name, delta in deltas.items()}
        return Sweep(bounds, lipschitz, output, tuple(reversed(trail)))


def _combine(step: Step, local: Local, norms: list[Number]) -> Number:
    """Σ L_j N_j, or √Σ (L_j N_j)²."""
    if len(local.gains) != len(norms):
        raise UnsupportedOperationError(
            f"the rule of '{step.name}' ({step.kind}) gives {len(local.gains)} gains for {len(norms)} tensor inputs; one each"
        )
    terms = [times(gain, norm) for gain, norm in zip(local.gains, norms, strict=True)]
    return sum(t * t for t in terms) ** 0.5 if local.orthogonal else sum(terms)


def _check_sums(name: str, kind: str, dtype: torch.dtype) -> None:
    """A parameter's gradient must be summed over the batch in float32 or better."""
    if dtype.itemsize < 4:
        raise UnsupportedLayerError(
            f"'{name}' ({kind}) under autocast sums its gradient over the batch in {dtype}, where one record moves the"
            " rounded sum by more than its own gradient. Use layers of lipdp.nn that sum in float32 (SpectralLinear,"
            " SpectralConv2d, LayerNorm, GroupNorm), freeze the parameter, or train in float32; the rule of a layer of your"
            " own that sums in float32 says Local(..., sums_in=torch.float32)"
        )


def _module_parameters(step: Step, local: Local, trainable: Mapping[int, str]) -> dict[str, str]:
    """Local → model-wide name of the module's trainable parameters; all must be covered by the rule."""
    if step.module is None:
        return {}
    names: dict[str, str] = {}
    for key, parameter in step.module.named_parameters():
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
