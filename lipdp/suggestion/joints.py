"""Clips and gates at the layers of a model: where they can stand, and how they get there."""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

from torch import fx, nn

from lipdp.errors import ParameterError
from lipdp.nn.constrained import Constrained
from lipdp.nn.gates import GradientGate, InputBound, ValueClip

_PLACED = "_joint_weight_gate"  # what marks a weight gate that was placed, as names mark the others


@dataclass(frozen=True)
class Joint:
    """What stands at a layer: a `ValueClip` and a `GradientGate` in front of it, a gate at its weight. ∞: none.

    Attributes:
        layer: its name in the model.
        clip: the radius that values are projected on.
        gate: the norm that cotangents are shortened to on their way to the layers in front.
        weight: the norm that a sample's gradient of the weight is shortened to.
    """

    layer: str
    clip: float = math.inf
    gate: float = math.inf
    weight: float = math.inf

    @property
    def summary(self) -> str:
        """For tables.

        >>> Joint("2", clip=0.5, gate=0.1).summary
        'values clipped to 0.5, gradients to 0.1'
        """
        parts = {"values clipped to": self.clip, "gradients to": self.gate, "weight's gradient clipped to": self.weight}
        return ", ".join(f"{words} {bound:.3g}" for words, bound in parts.items() if bound < math.inf)

    def modules(self) -> dict[str, nn.Module]:
        """What stands in front, by name."""
        name = self.layer.rpartition(".")[2]
        there: dict[str, nn.Module] = {}
        if self.clip < math.inf:
            there[f"{name}_clip"] = ValueClip(self.clip)
        if self.gate < math.inf:
            there[f"{name}_gate"] = GradientGate(self.gate)
        return there


def joint_layers(model: nn.Module) -> list[str]:
    """The layers in front of which a joint can stand: those with weights, in a chain or a traced graph, but the first.

    None where the model has clips or gates of its own.

    >>> joint_layers(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)))
    ['2']
    """
    if _has_own(model):
        return []
    if isinstance(model, fx.GraphModule):
        nodes = [n for n in model.graph.nodes if n.op == "call_module" and _has_weight(model, str(n.target))]
        sources: dict[fx.Node, str] = {}
        for node in nodes[1:]:
            if len(node.all_input_nodes) == 1 and node.all_input_nodes[0] not in nodes[0].all_input_nodes:
                sources.setdefault(node.all_input_nodes[0], str(node.target))
        return list(sources.values())
    paths = [name for name, _ in model.named_modules() if _has_weight(model, name)]
    chained = [name for name in paths[1:] if type(model.get_submodule(name.rpartition(".")[0])) is nn.Sequential]
    return [name for name in chained if _is_single(model, name)]


def place_joints(model: nn.Module, joints: Iterable[Joint]) -> None:
    """Put joints at their layers, in place; the names of all parameters stay as they are.

    Raises:
        ParameterError: no such layer, one with a joint in front that is neither in an `nn.Sequential` nor in a traced
            graph, or one with a gate at its weight that is not of `lipdp.nn`.

    >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    >>> place_joints(model, [Joint("1", clip=0.5, gate=0.1)])
    >>> list(dict(model.named_children()))
    ['0', '1_clip', '1_gate', '1']
    """
    for joint in joints:
        if joint.weight < math.inf:
            _place_at_weight(model, joint)
        if not joint.modules():
            continue
        if isinstance(model, fx.GraphModule):
            _place_in_graph(model, joint)
        else:
            _place_in_chain(model, joint)


def without_joints(model: nn.Module) -> nn.Module:
    """A copy in which joints that were placed are the identity, or gone."""
    copied = copy.deepcopy(model)
    for path, module in list(copied.named_modules()):
        if vars(module).pop(_PLACED, False):
            module.weight_gate = None
        kind = path.rpartition("_")[2]
        placed = {"clip": ValueClip, "gate": GradientGate}.get(kind)
        if placed is not None and type(module) is placed:
            owner, _, name = path.rpartition(".")
            setattr(copied.get_submodule(owner), name, nn.Identity())
    return copied


def gateable(model: nn.Module) -> dict[str, str]:
    """Names of weights at which a gate can be placed, and of their layers: of `lipdp.nn`, trained, without a gate.

    None where the model has clips or gates of its own.

    >>> gateable(nn.Sequential(lipdp.nn.SpectralLinear(4, 4), nn.Linear(4, 3)))
    {'0.weight': '0'}
    """
    if _has_own(model):
        return {}
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, Constrained) and m.weight_gate is None]
    return {f"{name}.weight": name for name, layer in layers if name and layer.weight.requires_grad}


def _has_own(model: nn.Module) -> bool:
    return any(isinstance(m, (ValueClip, GradientGate)) and not isinstance(m, InputBound) for m in model.modules())


def _has_weight(model: nn.Module, name: str) -> bool:
    layer = model.get_submodule(name)
    weight = vars(layer).get("_parameters", {}).get("weight")
    return weight is not None and weight.dim() > 1


def _is_single(model: nn.Module, name: str) -> bool:
    """Whether the layer, and the chain it is in, are in one place only."""
    layer, chain = model.get_submodule(name), model.get_submodule(name.rpartition(".")[0])
    places = [module for _, module in model.named_modules(remove_duplicate=False)]
    return sum(m is layer for m in places) == 1 and sum(m is chain for m in places) == 1


def _place_at_weight(model: nn.Module, joint: Joint) -> None:
    layer = dict(model.named_modules()).get(joint.layer)
    if not isinstance(layer, Constrained):
        raise ParameterError(f"no gate can be placed at the weight of {joint.layer!r}: name a layer of lipdp.nn")
    layer.weight_gate = joint.weight
    setattr(layer, _PLACED, True)


def _place_in_chain(model: nn.Module, joint: Joint) -> None:
    owner, _, name = joint.layer.rpartition(".")
    try:
        chain = model.get_submodule(owner)
    except AttributeError as error:
        raise _no_place(model, joint) from error
    if type(chain) is not nn.Sequential or name not in chain._modules:
        raise _no_place(model, joint)
    layers = OrderedDict(chain._modules)
    chain._modules.clear()
    for key, layer in layers.items():
        if key == name:
            chain._modules.update(joint.modules())  # a joint that is there already keeps its place
        chain._modules[key] = layer


def _place_in_graph(model: fx.GraphModule, joint: Joint) -> None:
    node = next((n for n in model.graph.nodes if n.op == "call_module" and n.target == joint.layer), None)
    if node is None or len(node.all_input_nodes) != 1:
        raise _no_place(model, joint)
    source = last = node.all_input_nodes[0]
    added: list[fx.Node] = []
    for key, module in joint.modules().items():
        name = f"{joint.layer.replace('.', '_')}_{key.rpartition('_')[2]}"
        there = name in dict(model.named_children())
        model.add_submodule(name, module)
        if there:
            continue
        with model.graph.inserting_after(last):
            last = model.graph.call_module(name, (last,))
        added.append(last)
    if added:
        source.replace_all_uses_with(last, delete_user_cb=lambda user: user is not added[0])
    model.graph.lint()
    model.recompile()


def _no_place(model: nn.Module, joint: Joint) -> ParameterError:
    return ParameterError(
        f"no joint can be placed in front of {joint.layer!r} of {type(model).__name__}: name a layer of an"
        " nn.Sequential, or of what lipdp.nn.from_torch returned"
    )
