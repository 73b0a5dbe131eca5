"""What a traced value depends on, and branches on shapes: `if x.shape[1] > 4`, `assert x.dim() == 2`."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from lipdp.errors import UnsupportedOperationError

_Kind = Literal["constant", "sample", "varying", "shape", "count", "batch"]
_OF_ONE_SAMPLE = {"dim", "ndimension", "is_floating_point", "get_device"}
REPEATS = frozenset({"expand", "expand_as", "repeat"})
"""What may repeat a tensor of the model for every sample: a class token."""
_ATTRIBUTES_OF_ONE = {"ndim", "dtype", "device", "is_cuda"}


class Question(Exception):
    """The traced code asks whether a node is true."""

    def __init__(self, node: fx.Node) -> None:
        super().__init__("it branches on a traced value")
        self.node = node


@torch.no_grad()
def answer(root: nn.Module, node: fx.Node, x: Tensor) -> bool:
    """Whether the node is true, for batches of every size.

    The graph holds one of the two branches and is bounded with that one alone. So what decides must be the same for
    every input of this shape: the sizes and dtypes of one sample, not the entries and not the number of samples, which
    tells how many records a batch drew.
    """
    nodes = [n for n in node.graph.nodes if n in _ancestors(node)]
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    for n in nodes:
        copies[n] = graph.node_copy(n, lambda source: copies[source])
    graph.output(copies[node])
    runner = fx.Interpreter(fx.GraphModule(root, graph), garbage_collect_values=False)
    runner.extra_traceback = False
    runner.run(*[x] if any(n.op == "placeholder" for n in nodes) else [])
    values = {n: runner.env[copy] for n, copy in copies.items()}
    kinds = kinds_of(nodes, values)
    if kinds[node] != "constant" or isinstance(values[node], Tensor):
        raise UnsupportedOperationError(
            f"torch.fx cannot trace {type(root).__name__}: it branches on the entries of a tensor or on the number of"
            f" samples (node '{node.name}'), so that a bound of one branch would be no bound of the other. Branch on"
            " the sizes of one sample, or register a rule for the submodule that contains the branch"
            " (lipdp.bounds.rule)"
        )
    return bool(values[node])


def _ancestors(node: fx.Node) -> set[fx.Node]:
    found, waiting = {node}, [node]
    while waiting:
        new = set(waiting.pop().all_input_nodes) - found
        found |= new
        waiting += new
    return found


def kinds_of(nodes: Iterable[fx.Node], values: Mapping[fx.Node, Any]) -> dict[fx.Node, _Kind]:
    """What the nodes depend on, in the order of the graph.

    Returns:
        "constant": nothing that varies; "sample": a tensor of samples; "varying": one that the number of samples may
        change otherwise; "shape": a shape with the number of samples in front; "count": this number; "batch": another
        value that it may change.
    """
    kinds: dict[fx.Node, _Kind] = {}
    for node in nodes:
        kinds[node] = _kind(node, kinds, values)
    return kinds


def _kind(node: fx.Node, kinds: Mapping[fx.Node, _Kind], values: Mapping[fx.Node, Any]) -> _Kind:
    if node.op == "placeholder":
        return "sample"
    sources = {kinds[s] for s in node.all_input_nodes}
    if sources <= {"constant"}:
        return "constant"
    first = kinds.get(node.args[0]) if node.args and isinstance(node.args[0], fx.Node) else None
    if first == "sample" and node.target is getattr and node.args[1] in ({"shape"} | _ATTRIBUTES_OF_ONE):
        return "shape" if node.args[1] == "shape" else "constant"
    if first == "sample" and node.op == "call_method" and node.target in _OF_ONE_SAMPLE:
        return "constant"
    if first == "sample" and node.op == "call_method" and node.target == "size":
        axis = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        return "shape" if axis is None else _of_axes(axis, values[node.args[0]].dim())  # type: ignore[index]
    if first == "shape" and node.target is len:
        return "constant"
    if first == "shape" and node.target is operator.getitem:
        return _of_axes(node.args[1], len(values[node.args[0]]))  # type: ignore[index]
    if first == "shape" and node.target is operator.add and sources == {"shape"}:
        return "shape"  # x.shape[:1] + (3,)
    value = values[node]
    tensors = value if isinstance(value, (tuple, list)) and value else [value]
    if not all(isinstance(t, Tensor) for t in tensors):
        return "batch"
    if not sources & {"sample", "varying"} and not (node.target in REPEATS and _keeps_batch(node, kinds)):
        return "batch"
    return "sample" if sources <= {"constant", "sample"} or _keeps_batch(node, kinds) else "varying"


def _keeps_batch(node: fx.Node, kinds: Mapping[fx.Node, _Kind]) -> bool:
    """Whether it is x.view(n, …) of a sample, or the like, n the number of samples and the rest constant.

    Or n copies of a constant: `c.expand(n, …)`.
    """
    if node.target not in {"view", "reshape", torch.reshape} | REPEATS:
        return False
    sizes = node.args[1] if len(node.args) == 2 and isinstance(node.args[1], tuple) else node.args[1:]
    given = [kinds[s] if isinstance(s, fx.Node) else "constant" for s in (node.args[0], *sizes)]
    whole = given[0] == "sample" or (given[0] == "constant" and node.target in REPEATS)
    if given[1:2] == ["sample"] and node.target == "expand_as":
        return whole
    return whole and given[1:2] in (["count"], ["shape"]) and set(given[2:]) <= {"constant"}


def _of_axes(index: Any, rank: int) -> _Kind:
    """One size of a shape with the batch in front, or a slice of it."""
    if isinstance(index, int):
        return "constant" if index % rank else "count"
    if isinstance(index, slice) and all(i is None or isinstance(i, int) for i in (index.start, index.stop, index.step)):
        axes = range(*index.indices(rank))
        if 0 not in axes:
            return "constant"
        return "shape" if axes[0] == 0 and axes.step == 1 else "batch"
    return "batch"
