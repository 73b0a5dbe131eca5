"""From a module to a graph of leaf calls with the shapes of one sample; refuses what lets samples meet."""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from deel import torchlip
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from lipdp.bounds.branches import REPEATS, Question, answer, kinds_of
from lipdp.bounds.refused import nothing_random, refuse_without_bound
from lipdp.bounds.rules import find_module_rule
from lipdp.bounds.steady import steadied
from lipdp.errors import LipdpError, MixesSamplesError, UnsupportedLayerError, UnsupportedOperationError
from lipdp.nn.compiled import original

_SHAPE_QUERIES = {"size", "dim", "ndimension", "numel", "stride", "is_floating_point", "get_device", len, torch.numel}
_SHAPE_ATTRIBUTES = {"shape", "ndim", "dtype", "device", "is_cuda"}
_BY_NAME = ("input", "weight", "other", "mat2", "bias")


_COMPUTED = (
    "a tensor computed from trainable parameters outside the forward pass. No rule sees the gradients that reach them"
    " through it: compute it in the forward pass, from attributes of the module (self.weight.t())"
)


class _Tracer(fx.Tracer):
    """Stops at every module that has a rule; looks inside the others, torch's leaves excepted."""

    proxy_buffer_attributes = True  # what is computed from a buffer stays in the graph and follows its value

    def __init__(self, answers: Sequence[bool]) -> None:
        super().__init__()
        self._answers = iter(answers)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        """One input; other arguments have their defaults, as in every call of the model that is private."""
        parameters = list(inspect.signature(root_fn).parameters.values())[1:]
        missing = [
            p.name for p in parameters[1:] if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        ]
        if missing:
            raise UnsupportedOperationError(
                f"the forward of {type(self.root).__name__} takes more than one input ({', '.join(missing)} have no"
                " default): a record is one tensor. Join them into one tensor, and split it in the forward"
            )
        name = parameters[0].name if parameters else "x"
        return root_fn, [self.root, self.create_proxy("placeholder", name, (), {})]

    def create_node(
        self, kind: str, target: Any, args: Any, kwargs: dict[str, Any], *rest: Any, **more: Any
    ) -> fx.Node:
        """What is given by name in the order of the signature, in which rules state their gains."""
        kind, target, kwargs = steadied(kind, target, args, kwargs)
        function = self.root.get_submodule(target).forward if kind == "call_module" else target
        try:
            names = tuple(inspect.signature(function).parameters)
        except (TypeError, ValueError):  # a method, or a function of torch's core
            names = _BY_NAME
        order = sorted(kwargs, key=lambda name: names.index(name) if name in names else len(names))
        return super().create_node(kind, target, args, {name: kwargs[name] for name in order}, *rest, **more)

    def to_bool(self, obj: fx.Proxy) -> bool:
        """The answer to the branch; a `Question` where there is none yet."""
        for known in self._answers:
            return known
        raise Question(obj.node)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return find_module_rule(m) is not None or super().is_leaf_module(m, module_qualified_name)


# --- what cannot be traced -------------------------------------------------------------------------------------------


def check_modules(model: nn.Module) -> None:
    """Refuse what mixes samples, and what changes values or gradients behind the rules' back: hooks, patches, …"""
    for path, module in model.named_modules():
        name = f"'{path or 'the model'}' ({type(module).__name__})"
        if isinstance(module, (nn.modules.batchnorm._BatchNorm, torchlip.BatchLipNorm)):
            raise MixesSamplesError(
                f"{name} uses or keeps statistics of the batch: one record changes the outputs of others, so no"
                " per-sample bound exists. lipdp.nn.from_torch(model, input_shape=...) ports the whole model; by hand,"
                " put lipdp.nn.LayerCentering in its place"
            )
        if find_module_rule(module) is None:
            refuse_without_bound(name, module)
        if original(module) is not module:
            raise UnsupportedLayerError(
                f"{name} was made by torch.compile within the model: compile the whole model, torch.compile(model), or"
                " the submodule in place, submodule.compile()"
            )
        if parametrize.is_parametrized(module):
            raise UnsupportedLayerError(
                f"{name} is reparametrised: the gradient of the raw weight behind a spectral-norm or Björck"
                " parametrisation is not bounded. Use the layers of lipdp.nn, or lipdp.nn.from_torchlip(model)"
            )
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
            raise UnsupportedLayerError(
                f"{name} carries forward or backward hooks, which can change values or gradients where no rule sees it;"
                " remove them before computing a sensitivity"
            )
        computed = [k for k, v in {**vars(module), **module._buffers}.items() if isinstance(v, Tensor) and v.grad_fn]
        if computed:
            raise UnsupportedLayerError(f"{name} holds '{computed[0]}', {_COMPUTED}")
        if "forward" in vars(module) and path:
            raise UnsupportedLayerError(f"{name} has a `forward` patched onto the instance; subclass it instead")
    for path, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype.itemsize < 4:
            raise UnsupportedLayerError(
                f"the parameter '{path}' is {parameter.dtype}, so its gradient is summed over the batch in that"
                " precision. Rounding then lets one record move the sum by more than its own gradient. Keep parameters"
                " in float32 and run the forward pass under torch.autocast (forward_dtype=torch.bfloat16)"
            )
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
            raise UnsupportedLayerError(
                f"the parameter '{path}' carries gradient hooks, which can scale its gradient beyond the bound; remove"
                " them"
            )


def trace(model: nn.Module, x: Tensor | None = None) -> tuple[fx.GraphModule, fx.GraphModule]:
    """The model's graphs, in the mode it is in and in the other; an error where torch.fx cannot follow the code.

    Args:
        x: a batch, whose shape answers branches on the shape of a sample; without one there may be none.
    """
    root = model
    if find_module_rule(model) is not None or not list(model.children()):
        root = nn.Sequential(model)  # a single layer is a graph with one leaf
    traced = _trace(root, x)
    with mode(model, not model.training):
        other = _trace(root, x)
    if _script(traced.graph) != _script(other.graph):
        raise UnsupportedOperationError(
            f"the forward of {type(model).__name__} differs between training and evaluation mode, so a bound of one is"
            " not a bound of the other. Move that code into a module and register a rule for both"
        )
    traced.meta["prefix"] = "" if root is model else "0."
    return traced, other


def _trace(root: nn.Module, x: Tensor | None) -> fx.GraphModule:
    attributes = set(vars(root))
    answers: list[bool] = []
    try:
        while True:  # once more for every branch: nothing can be run while the tracer holds torch's modules
            try:
                with nothing_random(type(root).__name__):
                    graph = _Tracer(answers).trace(root)
                    _check_one_tensor(root, graph)
                    return fx.GraphModule(root, graph)
            except Question as question:
                if x is None:
                    raise
                answers.append(answer(root, question.node, x))
    except LipdpError:
        raise
    except Exception as error:  # torch.fx raises whatever the traced code raises
        raise UnsupportedOperationError(
            f"torch.fx cannot trace {type(root).__name__}: {error}. Avoid Python branches on tensor values, or register"
            " a rule for the submodule that contains them (lipdp.bounds.rule)"
        ) from error
    finally:  # the tracer leaves the constants it met on the model
        for name in set(vars(root)) - attributes:
            delattr(root, name)


def _check_one_tensor(root: nn.Module, graph: fx.Graph) -> None:
    """Refuse a forward that takes a tuple or a dict: of a tensor, `x[0]` is the first sample."""
    for node in graph.nodes:
        first, key = node.args[:2] if node.target is operator.getitem else (None, None)
        if isinstance(first, fx.Node) and first.op == "placeholder" and isinstance(key, (int, str)):
            raise UnsupportedOperationError(
                f"the forward of {type(root).__name__} takes its input apart as {first.name}[{key!r}]: a record is one"
                " tensor. Join the parts into one tensor in the data set, and split it in the forward, x[:, :3]"
            )


def _script(graph: fx.Graph) -> list[str]:
    """The calls of a graph, but for the argument `training` (dropout's rule covers both modes)."""
    return [
        f"{n.op} {n.target} {n.args} { {k: v for k, v in n.kwargs.items() if k != 'training'} }" for n in graph.nodes
    ]


@contextmanager
def mode(model: nn.Module, training: bool) -> Iterator[None]:
    """The model in training or evaluation mode; afterwards every module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.train(training)
        yield
    finally:
        for module, mode in modes:
            module.training = mode


# --- shapes ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NodeInfo:
    """What a run showed of one node.

    Attributes:
        kind: a tensor with one entry a sample, a tuple of such tensors, a tensor without samples, or a plain value.
        shape: of one sample (of the tensor itself for a constant; of all entries together for a tuple).
        value: the plain value; `None` where it depends on the batch size.
    """

    kind: Literal["sample", "tuple", "constant", "plain"]
    shape: tuple[int, ...] = ()
    value: Any = None


class _Recorder(fx.Interpreter):
    """Runs the graph and keeps every result; refuses to read what was overwritten in place."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.extra_traceback = False
        self._versions: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        for source in n.all_input_nodes:
            if _version(self.env[source]) != self._versions[source]:
                raise UnsupportedOperationError(
                    f"node '{n.name}' reads '{source.name}' after it was overwritten in place, so the bound is wrong."
                    " Use the out-of-place form (x = x + y, inplace=False)"
                )
        result = super().run_node(n)
        for source in n.all_input_nodes:
            if source.op == "get_attr" and _version(self.env[source]) != self._versions[source]:
                raise UnsupportedOperationError(f"node '{n.name}' overwrites '{source.target}', a tensor of the model")
        self._versions[n] = _version(result)
        return result


def _version(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value._version
    return [v._version for v in value] if _is_tuple(value) else None


def _is_tuple(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and bool(value) and all(isinstance(v, Tensor) for v in value)


@torch.no_grad()
def inspect_nodes(graph: fx.GraphModule, x: Tensor) -> dict[fx.Node, NodeInfo]:
    """Run the graph on the batch and on its first sample, and say what every node is."""
    many, one = _run(graph, x), _run(graph, x[:1])
    kinds = kinds_of((n for n in graph.graph.nodes if n.op != "output"), many)
    nodes: dict[fx.Node, NodeInfo] = {}
    for node in graph.graph.nodes:
        if node.op == "output":
            continue
        pair = many[node], one[node]
        sources = [nodes[s].kind for s in node.all_input_nodes]
        from_sample = node.op == "placeholder" or "sample" in sources or "tuple" in sources
        if kinds[node] == "varying":
            raise UnsupportedOperationError(
                f"node '{node.name}' computes with the number of samples of a batch, which one record changes. It"
                " may be the first size of a view only, as in x.view(x.shape[0], -1)"
            )
        if isinstance(pair[0], Tensor):
            _check_tensor(node, pair[0], [many[s] for s in node.all_input_nodes], x)
            repeated = node.target in REPEATS and tuple(pair[1].shape) == (1, *pair[0].shape[1:])
            by_sample = from_sample or (repeated and len(pair[0]) == len(x))
            nodes[node] = _sample_node(node, pair, len(x)) if by_sample else _constant_node(node, pair)
        elif _is_tuple(pair[0]):
            items = [_sample_node(node, p, len(x)) for p in zip(*pair, strict=True)]
            nodes[node] = NodeInfo("tuple", (sum(math.prod(item.shape) for item in items),))
        else:
            _check_query(node, from_sample)
            same = kinds[node] == "constant" and type(pair[0]) is type(pair[1]) and pair[0] == pair[1]
            nodes[node] = NodeInfo("plain", value=pair[0] if same else None)
    return nodes


def _run(graph: fx.GraphModule, x: Tensor) -> dict[fx.Node, Any]:
    recorder = _Recorder(graph)
    try:
        recorder.run(x)
    except LipdpError:
        raise
    except Exception as error:  # a shape the model does not accept raises whatever torch raises
        raise UnsupportedOperationError(
            f"the model does not accept a batch of {len(x)} inputs of shape {tuple(x.shape[1:])}: {error}"
        ) from error
    return recorder.env


def _check_tensor(node: fx.Node, value: Tensor, sources: list[Any], x: Tensor) -> None:
    """Refuse what rounds activations to a narrower dtype, and constants that lead to parameters."""
    if node.op == "get_attr" and value.grad_fn is not None:
        raise UnsupportedOperationError(f"node '{node.name}' reads {_COMPUTED}")
    wide = max((s.dtype.itemsize for s in sources if isinstance(s, Tensor) and s.is_floating_point()), default=0)
    least = min(wide, max(4, x.dtype.itemsize if x.is_floating_point() else 4))
    given = (*sources, *node.args, *node.kwargs.values())
    cast = node.target in ("to", "type_as") or any(isinstance(argument, torch.dtype) for argument in given)
    if cast and wide and (not value.is_floating_point() or value.dtype.itemsize < least):
        raise UnsupportedOperationError(
            f"node '{node.name}' casts to the dtype {value.dtype}; leave the cast out, or use torch.autocast for less"
            " than float32"
        )


def _sample_node(node: fx.Node, pair: tuple[Tensor, Tensor], count: int) -> NodeInfo:
    many, one = (tuple(t.shape) for t in pair)
    for shape, size in ((many, count), (one, 1)):
        if not shape or shape[0] != size:
            raise MixesSamplesError(
                f"node '{node.name}' turns a batch of {size} samples into a tensor of shape {shape}: the first axis"
                " must stay the batch, one entry a sample"
            )
    if many[1:] != one[1:]:
        raise MixesSamplesError(
            f"the shape of node '{node.name}' depends on the batch size: {many[1:]} for {count} samples, {one[1:]} for"
            " one"
        )
    return NodeInfo("sample", many[1:])


def _constant_node(node: fx.Node, pair: tuple[Tensor, Tensor]) -> NodeInfo:
    if pair[0].shape != pair[1].shape or not torch.equal(pair[0], pair[1]):
        raise UnsupportedOperationError(
            f"node '{node.name}' makes a tensor that is random or depends on the batch size; only constants have a"
            " bound"
        )
    return NodeInfo("constant", tuple(pair[0].shape))


def _check_query(node: fx.Node, from_sample: bool) -> None:
    """A plain value taken from a sample may be its shape, never its entries."""
    is_attribute = node.target is getattr and node.args[1] in _SHAPE_ATTRIBUTES
    if from_sample and not is_attribute and node.target not in _SHAPE_QUERIES and node.target is not operator.getitem:
        raise UnsupportedOperationError(
            f"node '{node.name}' reads numbers out of a tensor of samples; a bound needs tensors all the way"
        )
