"""Rewriting a traced torch model: every operation gets its counterpart, and what has none is named."""

from __future__ import annotations

import math
import operator
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils import parametrize

from lipdp.constraints import check_positive
from lipdp.errors import UnsupportedOperationError
from lipdp.nn.activation import GroupSort2
from lipdp.nn.counterparts import NoCounterpartError, Site, as_module, choose, constrained
from lipdp.nn.gates import InputBound, default_input_bound
from lipdp.nn.normalization import LayerCentering
from lipdp.nn.pooling import ScaledL2NormPool2d
from lipdp.nn.tracing import BATCH, checked_shape, is_own, note_shapes, traced
from lipdp.nn.walk import Table, refuse, replaced

_WEIGHTS = (nn.Linear, nn.Conv1d, nn.Conv2d)
_RESHAPING = {torch.flatten, torch.reshape, "flatten", "view", "reshape"}
_MOVING = {  # entries keep their values: nothing to port
    *(torch.squeeze, torch.unsqueeze, torch.permute, torch.transpose, torch.movedim, torch.chunk, torch.split),
    *("squeeze", "unsqueeze", "permute", "transpose", "movedim", "chunk", "split", "contiguous", "unflatten"),
    *("size", "dim", "clone", operator.getitem, getattr, len, torch.neg, operator.neg, operator.floordiv),
}
_SUMS: dict[Any, Any] = {
    **dict.fromkeys((operator.add, operator.iadd, torch.add, "add", "add_"), operator.add),
    **dict.fromkeys((operator.sub, operator.isub, torch.sub, "sub", "sub_"), operator.sub),
}
_PRODUCTS = {operator.mul, operator.imul, torch.mul, "mul", "mul_", operator.truediv, torch.div, "div", "div_"}
_MANY = 32  # entries of a row from which on its mean is one direction of many
_JOINS = {torch.cat, torch.concat, torch.concatenate}


@dataclass(frozen=True)
class PortedLayer:
    """One row of the table: the layer's name in the model, what it was, what stands for it now, and why."""

    name: str
    was: str
    becomes: str
    why: str


@dataclass(frozen=True)
class PortingTable:
    """What became what, in the order of the forward pass; `str()` is the table."""

    rows: tuple[PortedLayer, ...]

    def __str__(self) -> str:
        cells = [("layer", "was", "becomes", "why"), *((r.name, r.was, r.becomes, r.why) for r in self.rows)]
        widths = [max(len(row[i]) for row in cells) for i in range(3)]
        return "\n".join("  ".join([*(c.ljust(w) for c, w in zip(r, widths, strict=False)), r[3]]) for r in cells)


def _spectral(name: str, old: Any) -> nn.Module:
    if parametrize.is_parametrized(old):
        refuse(name, old, "its weight is reparametrised; call torch.nn.utils.parametrize.remove_parametrizations first")
    if getattr(old, "padding_mode", "zeros") not in ("zeros", "circular"):
        refuse(name, old, f"padding_mode={old.padding_mode!r} repeats border entries; use 'zeros' or 'circular'")
    return constrained(old, bias=True)


SPECTRAL: Table = dict.fromkeys(_WEIGHTS, _spectral)


@dataclass
class Port:
    """One model on its way: the graph, what was decided, and what has no counterpart."""

    model: nn.Module
    input_shape: tuple[int, ...]
    input_bound: float | None
    bias: bool
    keep: tuple[type[nn.Module], ...]
    centre: bool | None = None
    rows: list[PortedLayer] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    above: dict[fx.Node, type[nn.Module] | None] = field(default_factory=dict)  # the class of the nearest weights
    sorts: dict[fx.Node, int] = field(default_factory=dict)  # activations, and their rows
    placed: dict[str, list[str]] = field(default_factory=dict)  # a layer's name → where its counterparts are

    def run(self) -> tuple[nn.Module, PortingTable]:
        shape = checked_shape(self.input_shape)
        self.module = traced(self.model, self.keep)
        self.graph = self.module.graph
        self.layers = dict(self.module.named_modules(remove_duplicate=False))
        note_shapes(self.module, shape)
        nodes = list(self.graph.nodes)
        inputs = [n for n in nodes if n.op == "placeholder"]
        if len(inputs) != 1:
            raise UnsupportedOperationError(f"the model takes {len(inputs)} inputs; a record has one")
        self._bound(inputs[0], shape)
        for node in nodes:
            self._visit(node)
        if self.missing:
            listed = "\n".join(f"  {line}" for line in self.missing)
            raise UnsupportedOperationError(
                f"from_torch finds no counterpart for\n{listed}\nReplace them, or put them into a module, register a"
                " rule for its class (lipdp.bounds.rule) and pass keep=[the class]"
            )
        for node, row in self.sorts.items():
            self._thin(node, row)
        self.graph.eliminate_dead_code()
        self.module.delete_all_unused_submodules()
        self.graph.lint()
        self.module.recompile()
        return _chain(self.module).train(self.model.training), PortingTable(tuple(self.rows))

    def _bound(self, node: fx.Node, shape: tuple[int, ...]) -> None:
        """`InputBound` behind the input, of wide rows two around the centering, unless the model has one there."""
        users = list(node.users)
        if len(users) == 1 and isinstance(self.layers.get(str(users[0].target)), InputBound):
            return
        size = math.prod(shape)
        wide = len(shape) == 1 and size >= _MANY and self.input_bound is None
        centred = wide if self.centre is None else self.centre
        if self.input_bound is not None:
            c = check_positive("input_bound", self.input_bound)
        else:
            c = math.sqrt(size) / 4 if centred else default_input_bound(shape)
        modules: list[tuple[str, nn.Module, str]] = []
        if centred:
            most = max(c, math.sqrt(size))
            axes = tuple(range(1, len(shape) + 1))
            modules += [
                ("input_range", InputBound(most), f"norm at most {most:g}, that of entries in [-1, 1]"),
                ("input_centering", LayerCentering(dim=axes), "the mean of a sample takes norm and tells little"),
            ]
        why = f"shortens inputs longer than {c:g}, then divides by {c:g}"
        modules.append(("input_bound", InputBound(c, radius=1.0), why))
        last, users = node, list(node.users)
        for name, module, why in modules:
            with self.graph.inserting_after(last):
                last = self.graph.call_module(self._place(name, module), (last,))
            last.meta["shape"] = node.meta["shape"]
            self.rows.append(PortedLayer(name, "-", type(module).__name__, why))
        for user in users:
            user.replace_input_with(node, last)

    def _visit(self, node: fx.Node) -> None:
        self.above[node] = next((kind for n in node.all_input_nodes if (kind := self.above.get(n))), None)
        label = str(node.target) if node.op == "call_module" else node.name
        try:
            if node.op == "call_module":
                self._layer(node, label)
            elif node.op == "get_attr":
                self._attribute(label, str(node.target))
            elif node.op in ("call_function", "call_method"):
                self._function(node, label)
        except NoCounterpartError as error:
            self.missing.append(f"'{label}' ({self._was(node)}): {error}")

    # -- layers --------------------------------------------------------------------------------------------------------

    def _layer(self, node: fx.Node, label: str) -> None:
        layer = self.layers[label]
        if isinstance(layer, self.keep):
            self._note(node, label, "kept", "as you said; its rule bounds it")
        elif is_own(layer):
            self.module.add_submodule(label, replaced(layer, SPECTRAL, label, {}))
            self._note(node, label, "kept", "constrained already")
        elif label in self.placed and isinstance(layer, _WEIGHTS):
            node.target = self.placed[label][0]
        else:
            self._put(node, label, layer)
        if node in self.above and isinstance(layer, _WEIGHTS):
            self.above[node] = type(layer)

    def _put(self, node: fx.Node, label: str, layer: nn.Module, *behind: nn.Module) -> None:
        """The counterpart of a layer, and what comes `behind` it, in the node's place."""
        source, above = node.all_input_nodes[0], self.above[node]
        if source.meta.get("shape") is None or node.meta["shape"] is None:
            raise NoCounterpartError("it takes or returns something else than one tensor")
        site = Site(
            layer,
            source.meta["shape"][1:],
            node.meta["shape"][1:],
            channels_last=above is not None and issubclass(above, nn.Linear),
            first=above is None,
            last=all(user.op == "output" for user in node.users),
            bias=self.bias,
        )
        choice = choose(site)
        self._note(node, label, " + ".join(type(m).__name__ for m in choice.modules) or "left out", choice.why)
        if isinstance(layer, _WEIGHTS):
            self.above[node] = type(layer)
        self._insert(node, label, (*choice.modules, *behind))

    def _insert(self, node: fx.Node, label: str, modules: Sequence[nn.Module]) -> None:
        """Modules in the node's place, one behind the other."""
        last = node.all_input_nodes[0]
        for i, new in enumerate(modules):
            path = self._place(f"{label}_{type(new).__name__.lower()}" if i else label, new)
            with self.graph.inserting_before(node):
                last = self.graph.call_module(path, (last,))
            last.meta["shape"], self.above[last] = node.meta["shape"], self.above[node]
            if isinstance(new, (GroupSort2, nn.ReLU)):
                self.sorts[last] = len(self.rows) - 1
        node.replace_all_uses_with(last)
        self.graph.erase_node(node)
        del self.above[node]

    def _thin(self, node: fx.Node, row: int) -> None:
        """Leave out an activation beside a norm pooling: a window's norm is not linear and keeps more norm alone."""

        def pool_from(start: fx.Node, step: Callable[[fx.Node], Iterable[fx.Node]]) -> bool:
            found = list(step(start))
            if len(found) != 1 or found[0].op != "call_module":
                return False
            layer = self.module.get_submodule(str(found[0].target))
            if isinstance(layer, (LayerCentering, nn.Flatten, nn.Unflatten)):
                return pool_from(found[0], step)
            return isinstance(layer, ScaledL2NormPool2d)

        if pool_from(node, lambda n: n.users) or pool_from(node, lambda n: n.all_input_nodes):
            node.replace_all_uses_with(node.all_input_nodes[0])
            self.graph.erase_node(node)
            self.rows[row] = replace(self.rows[row], becomes="left out", why="the norm pooling beside it is non-linear")

    def _place(self, label: str, new: nn.Module) -> str:
        """Add a module under its layer's name, or with a number behind it where another one is there."""
        paths = self.placed.setdefault(label, [])
        path, i = label, 0
        while path in paths or (path in self.layers and (paths or not _is_leaf(self.layers[path]))):
            i += 1
            path = f"{label}_{i}"
        paths.append(path)
        self.module.add_submodule(path, new)
        return path

    # -- functions and attributes --------------------------------------------------------------------------------------

    def _attribute(self, label: str, path: str) -> None:
        owner, _, name = path.rpartition(".")
        if isinstance(getattr(self.module.get_submodule(owner), name), nn.Parameter):
            self.rows.append(PortedLayer(path, "Parameter", "kept", "nothing projects it: its norm may grow"))

    def _function(self, node: fx.Node, label: str) -> None:
        target, shape = node.target, node.meta["shape"]
        tensors = [n for n in node.all_input_nodes if n.meta.get("shape") is not None]
        layer = as_module(target, node.args[1:], node.kwargs)
        if layer is not None:
            self._put(node, label, layer)
        elif target in (torch.mean, "mean"):
            self._mean(node, label, tensors[0].meta["shape"])
        elif target in _RESHAPING and _is_flat(shape) and len(tensors[0].meta["shape"]) > 2:
            self._insert(node, label, [nn.Flatten()])  # which an empty batch passes too
        elif target in _SUMS and sum(n.op != "get_attr" for n in tensors) == 2:
            if node.kwargs or tensors[0].meta["shape"] != tensors[1].meta["shape"]:
                raise NoCounterpartError("only sums of two tensors of one shape are averaged")
            node.op, node.target = "call_function", _SUMS[target]
            self._scale(node, label, 0.5, "averaged: a sum would double the bound")
        elif target in _JOINS:
            self._scale(node, label, 1 / math.sqrt(len(tensors)), "over the root of the number of parts")
        elif target in _PRODUCTS and shape is not None:
            self._note(node, label, "kept", "the network's constant may exceed 1/c")
        elif target not in _MOVING | _RESHAPING | _PRODUCTS | _SUMS.keys():
            raise NoCounterpartError("no constrained operation stands for it")

    def _mean(self, node: fx.Node, label: str, shape: tuple[int, ...]) -> None:
        """Over all positions of a map: global average pooling; over other axes of a sample: times √n."""
        dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        dims = [dims] if isinstance(dims, int) else dims
        if not isinstance(dims, (list, tuple)) or 0 in (axes := sorted(d % len(shape) for d in dims)):
            raise NoCounterpartError("a mean over the batch; name axes of one sample")
        if len(shape) in (3, 4) and axes == list(range(2, len(shape))) and not self._is_of_tokens(node):
            keep = node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim", False)
            pool = nn.AdaptiveAvgPool2d(1) if len(axes) == 2 else nn.AdaptiveAvgPool1d(1)
            shape_kept = (*shape[:2], *[1] * len(axes))
            node.meta["shape"] = shape_kept
            self._put(node, label, pool, *([] if keep else [nn.Flatten()]))
            return
        entries = math.prod(shape[a] for a in axes)
        self._scale(node, label, math.sqrt(entries), f"times √{entries}: 1-Lipschitz")

    def _is_of_tokens(self, node: fx.Node) -> bool:
        above = self.above[node]
        return above is not None and issubclass(above, nn.Linear)

    def _scale(self, node: fx.Node, label: str, factor: float, why: str) -> None:
        with self.graph.inserting_after(node):
            new = self.graph.call_function(operator.mul, (node, factor))
        node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
        new.meta["shape"], self.above[new] = node.meta["shape"], self.above[node]
        self._note(node, label, f"{self._was(node)}, times {factor:.3g}", why)

    def _was(self, node: fx.Node) -> str:
        if node.op == "call_module":
            return type(self.layers[str(node.target)]).__name__
        return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))

    def _note(self, node: fx.Node, label: str, becomes: str, why: str) -> None:
        self.rows.append(PortedLayer(label, self._was(node), becomes, why))


def _is_flat(shape: tuple[int, ...] | None) -> bool:
    return shape is not None and len(shape) == 2 and shape[0] == BATCH


def _is_leaf(layer: nn.Module) -> bool:
    return not list(layer.children())


def _chain(module: fx.GraphModule) -> nn.Module:
    """A model that is one layer behind the other as an `nn.Sequential`; another one as it is."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    *nodes, output = module.graph.nodes
    last = nodes[0]
    for node in nodes[1:]:
        if node.op != "call_module" or node.args != (last,) or node.kwargs:
            return module
        layers[str(node.target).replace(".", "_")] = module.get_submodule(str(node.target))
        last = node
    chained = output.args == (last,) and len(layers) == len(nodes) - 1
    return nn.Sequential(layers) if chained else module
