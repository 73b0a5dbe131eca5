"""The two sweeps: values forwards, cotangents backwards, over the traced graph of a model.

Forward, in topological order:   X_v = min(cap, offset + Σ_j L_j X_j)      (√Σ L_j² X_j² for a concatenation)
and, without caps and offsets,   K_v = Σ_j L_j K_j, K_input = 1            (the Lipschitz constant of v in the input)
Backward:                        G_j += L_j · min(G_v, cap)                (cotangents of several users add)
                                 Δ_θ += min(P_θ · min(G_v, cap), C_θ)      (several uses of a parameter add)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from lipdp.bounds.probe import check_faithful, check_samples_apart, probe_input, untouched, vocabulary_of
from lipdp.bounds.rounding import Rounding
from lipdp.bounds.rules import Call, Input, Local, Number, function_rule, least, module_rule, times
from lipdp.bounds.steps import (
    ForwardSweep,
    NodeBound,
    Slot,
    Step,
    Sweep,
    as_tensor,
    check_sums,
    filled,
    module_parameters,
)
from lipdp.bounds.trace import check_modules, inspect_nodes, trace
from lipdp.bounds.weights import gains_of, most_alike
from lipdp.errors import UnboundedError, UnsupportedOperationError
from lipdp.nn.compiled import eager, original
from lipdp.nn.sharded import full_tensor, is_sharded, unsharded
from lipdp.norms import vector_norm


class BoundGraph:
    """A model traced once, to compute bounds at its present weights as often as needed.

    The work of a sweep does not depend on the batch size, and no value is read on the host.

    Args:
        model: any module torch.fx can trace.
        input_shape: of one sample.
        dtype: what the forward pass computes in; the model's own dtype by default, `torch.bfloat16` for autocast.
        input_bound: a public bound on the input norm, for a model without `InputBound`.
        gated: whether gates inside the model bound the cotangents. They do for one sample of full weight; where a unit
            is several samples of weights w_i, a gate lets c through for each, not w_i c, and the bound must not use it.

    Attributes:
        vocabulary: how many tokens it knows, where it looks its inputs up (`nn.Embedding`); None for numbers.

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
        gathered = unsharded(model)
        check_modules(gathered)
        self.vocabulary = vocabulary_of(gathered, probe_input(gathered, self.input_shape))
        x = self.probe(gathered)
        with untouched(gathered):
            self.module, other = trace(gathered, x)
            self._by_mode = {model.training: self.module, not model.training: other}
            self._info = inspect_nodes(self.module, x)
        output = self._find_output()
        self._modules = dict(self.module.named_modules())
        tensors = [n for n, info in self._info.items() if info.kind != "plain"]
        self.index = {node: i for i, node in enumerate(tensors)}
        self.output_index, self.output_shape = self.index[output], self._info[output].shape
        self.num_outputs = math.prod(self.output_shape)
        self.constants = [n for n in tensors if self._info[n].kind == "constant"]
        self.steps = [self._step(n) for n in tensors if self._info[n].kind != "constant" and n.op != "placeholder"]
        self.sweep(1.0)  # every rule once: what they refuse is refused here
        check_samples_apart(gathered, x)
        self._check_coverage(check_faithful(gathered, self.module, x))
        if gathered is not model:  # free the gathered parameters
            for parameter in gathered.parameters():
                parameter.data = parameter.data.new_empty(0)

    def probe(self, model: nn.Module | None = None, *, batch: int | None = None) -> Tensor:
        """A batch of random inputs of the kind that the model takes: numbers in its dtype, or tokens."""
        options = {} if batch is None else {"batch": batch}
        return probe_input(model or self.model, self.input_shape, vocabulary=self.vocabulary, **options)

    def _find_output(self) -> fx.Node:
        outputs = [n.args[0] for n in self.module.graph.nodes if n.op == "output"]
        if len(outputs) != 1 or not isinstance(outputs[0], fx.Node) or self._info[outputs[0]].kind != "sample":
            raise UnsupportedOperationError(
                "the model must return one tensor that depends on its input, the logits (N, C)"
            )
        return outputs[0]

    def _step(self, node: fx.Node) -> Step:
        sources: list[fx.Node] = []

        def slot(argument: fx.Node) -> Any:
            info = self._info[argument]
            if info.kind == "plain":
                return argument if info.value is None else info.value
            sources.append(argument)
            return Slot(len(sources) - 1)

        args, kwargs = fx.map_arg(node.args, slot), fx.map_arg(node.kwargs, slot)
        if node.op == "call_module":
            path, traced = str(node.target), self._modules[str(node.target)]
            name = path[len(self._prefix) :] or type(traced).__name__
            rule, kind = module_rule(name, traced), type(traced).__name__
            module = self._own(path, traced)
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
            source_info=tuple(self._info[s] for s in sources),
            args=args,
            kwargs=kwargs,
            output_shape=self._info[node].shape,
        )

    @property
    def _prefix(self) -> str:
        """What the names of the traced modules have in front of the model's own."""
        return str(self.module.meta["prefix"])

    def _own(self, path: str, traced: nn.Module) -> nn.Module:
        """The model's own module that the traced one stands for; they are two where parameters are sharded."""
        return self.model.get_submodule(path[len(self._prefix) :]) if is_sharded(self.model) else traced

    def _check_coverage(self, trained: set[str]) -> None:
        """Every parameter that gets a gradient must be met by a rule."""
        names = self._names()
        met = {names.get(id(p)) for n in self.constants for p in self._held(n)}
        for step in self.steps:
            met |= {names.get(id(p)) for p in step.module.parameters()} if step.module is not None else set()
        if trained - met:
            raise UnboundedError(
                f"{', '.join(sorted(trained - met))}: the forward pass uses the parameter where torch.fx does not see"
                " it; use it as an attribute of its module (self.weight)"
            )

    def forward_pass(self, x: Tensor) -> Tensor:
        """The forward pass that was bounded, in the model's mode: its graph, with the modules as they are."""
        if self.module.meta["prefix"]:  # a single layer, of which the class's forward is the operation
            return type(self.model).forward(self.model, x)
        return self._by_mode[self.model.training].forward(x)

    # -- the model as it is now ----------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next((p.device for p in self.model.parameters()), torch.device("cpu"))

    @property
    def own_dtype(self) -> torch.dtype:
        """The least precise dtype among the parameters, in which the model takes numbers."""
        own = {p.dtype for p in self.model.parameters() if p.is_floating_point()} or {torch.get_default_dtype()}
        return min(own, key=lambda dtype: dtype.itemsize)

    @property
    def dtype(self) -> torch.dtype:
        """What the forward pass computes in: as given, else the model's own dtype."""
        return self._dtype or self.own_dtype

    def _names(self) -> dict[int, str]:
        """Trainable parameters by identity: looked up at every sweep, so that freezing and replacing is noticed."""
        return {id(p): name for name, p in self.model.named_parameters() if p.requires_grad}

    def _attribute(self, node: fx.Node) -> Tensor:
        """The tensor as the model holds it now (the traced module keeps its own reference)."""
        for root, path in ((self.model, str(node.target)[len(self._prefix) :]), (self.module, str(node.target))):
            value: Any = root
            for name in path.split("."):
                value = getattr(value, name, None)
            if isinstance(value, Tensor):
                return value
        raise UnsupportedOperationError(f"the model has lost its tensor '{node.target}' since it was traced")

    def held(self) -> list[Tensor]:
        """The tensors of the graph's own nodes: those of the model, and those that its code keeps elsewhere."""
        return [self._attribute(n) for n in self.constants if n.op == "get_attr"]

    def called(self) -> list[nn.Module]:
        """The modules whose own code the graph calls."""
        return [self._modules[str(n.target)] for n in self.index if n.op == "call_module"]

    def _held(self, node: fx.Node) -> list[Tensor]:
        """The model's own tensors in a node that does not depend on the sample."""
        if node.op == "get_attr":
            return [self._attribute(node)]
        path = str(node.target)
        return list(self._own(path, self._modules[path]).parameters()) if node.op == "call_module" else []

    def _constant(self, node: fx.Node, known: Mapping[fx.Node, Tensor]) -> Tensor:
        """The value of a node that does not depend on the sample; `known` are those in front of it."""
        if node.op == "get_attr":
            return full_tensor(self._attribute(node)).detach()
        args, kwargs = self._loaded(node, known)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        path = str(node.target)
        module = unsharded(self._own(path, self._modules[path])) if node.op == "call_module" else None
        target: Any = module or node.target
        return target(*args, **kwargs)

    def _loaded(self, node: fx.Node, known: Mapping[fx.Node, Tensor]) -> tuple[Any, dict[str, Any]]:
        def load(argument: fx.Node) -> Any:
            info = self._info[argument]
            return known[argument] if info.kind == "constant" else info.value

        return fx.map_arg(node.args, load), fx.map_arg(node.kwargs, load)

    def _weight_gains(
        self, node: fx.Node, known: Mapping[fx.Node, Tensor], trained: set[fx.Node], names: Mapping[int, str]
    ) -> dict[Any, Number]:
        """What is trained in front of a constant node → the gain of the node in it: nodes, or a parameter's name."""
        held = {id(p): names[id(p)] for p in self._held(node) if id(p) in names}
        sources = [s for s in node.all_input_nodes if s in known]
        if node.op == "get_attr" or not (held or trained.intersection(sources)):
            return dict.fromkeys(held.values(), 1.0)
        args, kwargs = self._loaded(node, known)
        module = self._modules.get(str(node.target)) if node.op == "call_module" else None
        if type(module) is nn.Embedding and not module.scale_grad_by_freq and not module.sparse and not kwargs:
            return {name: most_alike(args[0]).sqrt() for name in held.values()}
        order = [argument for argument in node.args if argument in sources]
        found: dict[Any, Number] = {}
        for source, gain in zip(order, gains_of(node, args, known[node]), strict=True):
            found[source] = found.get(source, 0.0) + gain
        return found

    # -- the sweeps ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def forward_sweep(self) -> ForwardSweep:
        """Bounds on the values of every node and their Lipschitz constants, at the weights as they are."""
        rounding = Rounding(self.dtype, self.device)
        values: list[Number] = [self.input_bound] * len(self.index)
        lipschitz: list[Number] = [1.0] * len(self.index)
        constants: dict[int, Tensor] = {}
        known: dict[fx.Node, Tensor] = {}
        for node in self.constants:
            i = self.index[node]
            constants[i] = known[node] = self._constant(node, known)
            values[i], lipschitz[i] = vector_norm(constants[i]), 0.0
        calls: list[tuple[Step, Call, Local, Number]] = []
        for step in self.steps:
            inputs = tuple(
                Input(info.shape, values[i], constants.get(i), info.kind == "tuple")
                for i, info in zip(step.sources, step.source_info, strict=True)
            )
            args, kwargs = filled(step.args, inputs), filled(step.kwargs, inputs)
            module = None if step.module is None else unsharded(step.module)  # gathered for this rule alone
            call = Call(step.name, module, inputs, step.output_shape, args, kwargs, rounding.dtype)
            local = step.rule(call)
            slack = 1.0 if local.exact else rounding.slack(local.fan_in)
            norms = step.combine(local, [values[i] for i in step.sources])
            values[step.index] = times(least(norms + local.offset, local.value_cap), slack)
            lipschitz[step.index] = times(step.combine(local, [lipschitz[i] for i in step.sources]), slack)
            calls.append((step, call if module is step.module else replace(call, module=step.module), local, slack))
        return ForwardSweep(rounding, values, lipschitz, calls, known)

    def lipschitz(self) -> Tensor:
        """The network's Lipschitz constant in its input, as a float64 tensor."""
        return as_tensor(self.forward_sweep().lipschitz[self.output_index], self.device)

    def output_bound(self) -> Tensor:
        """A bound on the norm of the output, as a float64 tensor."""
        return as_tensor(self.forward_sweep().values[self.output_index], self.device)

    @torch.no_grad()
    def sweep(self, loss_constant: Number | Callable[[Tensor], Number]) -> Sweep:
        """Both sweeps, from a per-sample cotangent of norm ≤ `loss_constant` at the output.

        Args:
            loss_constant: a number, or a function of the output bound (squared error).
        """
        device, forward, end = self.device, self.forward_sweep(), self.output_index
        output = as_tensor(forward.values[end], device)
        cotangents: list[Number] = [0.0] * len(self.index)
        start = loss_constant(output) if callable(loss_constant) else loss_constant
        cotangents[end] = times(start, forward.rounding.cast)
        names = self._names()
        deltas: dict[str, Number] = dict.fromkeys(names.values(), 0.0)
        rows: list[NodeBound[Number]] = []
        for step, _, local, slack in reversed(forward.calls):
            g = cotangents[step.index]
            inner = times(least(g, local.cotangent_cap if self.gated else math.inf), slack)
            for i, gain in zip(step.sources, local.gains, strict=True):
                cotangents[i] = cotangents[i] + times(gain, inner)
            own = module_parameters(step, local, names)
            if own:
                check_sums(step.name, step.kind, local.sums_in or forward.rounding.dtype)
            for key, name in own.items():
                cap = local.parameter_caps.get(key, math.inf) if self.gated else math.inf
                deltas[name] = deltas[name] + least(times(local.parameters[key], inner), times(cap, slack))
            rows.append(NodeBound(step.name, step.kind, forward.values[step.index], g, tuple(own.values())))
        self._pull_to_weights(forward, cotangents, deltas, names)
        lipschitz = as_tensor(forward.lipschitz[end], device)
        bounds = {name: as_tensor(delta, device) for name, delta in deltas.items()}
        return Sweep(bounds, lipschitz, output, tuple(reversed(rows)))

    def _pull_to_weights(
        self, forward: ForwardSweep, cotangents: list[Number], deltas: dict[str, Number], names: Mapping[int, str]
    ) -> None:
        """The cotangents of constants, on to the parameters that they are computed from: Δ_θ += L G."""
        trained: set[fx.Node] = set()
        gains: dict[fx.Node, dict[Any, Number]] = {}
        for node in self.constants:
            gains[node] = self._weight_gains(node, forward.constants, trained, names)
            if gains[node]:
                trained.add(node)
        for node in reversed(self.constants):
            width = max(forward.constants[node].shape, default=1)
            g = cotangents[self.index[node]]
            for source, gain in gains[node].items():
                if isinstance(source, str):
                    check_sums(source, "a parameter met outside a layer", forward.rounding.dtype)
                    deltas[source] = deltas[source] + times(gain, g)
                    continue
                through = times(times(gain, g), forward.rounding.slack(2 * width))
                cotangents[self.index[source]] = cotangents[self.index[source]] + through
