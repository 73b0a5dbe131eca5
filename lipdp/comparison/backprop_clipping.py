"""Backpropagation clipping: any plain torch model, bounded by value clips and cotangent gates around its layers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx, nn

from lipdp.bounds.trace import trace
from lipdp.errors import ParameterError, UnsupportedLayerError
from lipdp.nn import GradientGate, ValueClip

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d)


def with_backprop_clipping(
    model: nn.Module, input_bound: float | Sequence[float], cotangent_bound: float | Sequence[float]
) -> fx.GraphModule:
    r"""The model with the input of every trainable layer clipped to norm X, and the cotangent of its output to norm C.

    A dense layer then has Δ_W = X C, a convolution √m X C (its windows overlap m-fold), a bias
    √positions · C, whatever the weights and whatever lies between the layers: nothing need be constrained. The
    propagation of `lipdp.sensitivity` finds these bounds by itself, and one step of `lipdp.PrivacyEngine` is one
    Gaussian mechanism on one Poisson batch for all layers together.

    (Bounding the cotangent of a convolution by its L1 norm over positions, as the paper does, saves the √m; but the L1
    norm over L positions is up to √L times the L2 norm, and L is larger than m.)

    Args:
        model: any model that torch.fx traces, of nn.Linear, nn.Conv1d, nn.Conv2d and layers without parameters. It
            shares its parameters, under the same names, with the model returned, and is otherwise left alone.
        input_bound: X > 0, one number, or one for each trainable layer in the order of their calls.
        cotangent_bound: C > 0, likewise, in units of the loss summed over the batch.

    Returns:
        A module with clips that act in training and in evaluation.

    Raises:
        UnsupportedLayerError: a trainable layer of another kind. ParameterError: bounds ≤ 0, or the wrong number of
            them.
        UnsupportedOperationError: torch.fx cannot trace the model.

    >>> layers = torch.nn.Linear(4, 8, bias=False), torch.nn.ReLU(), torch.nn.Linear(8, 3, bias=False)
    >>> plain = torch.nn.Sequential(*layers)
    >>> clipped = lipdp.comparison.with_backprop_clipping(plain, 3.0, 0.5)
    >>> s = lipdp.sensitivity(clipped, lipdp.losses.TauCrossEntropy(), input_shape=(4,))
    >>> s["0.weight"] < 1.501, round(s["2.weight"], 2)
    (True, 1.5)

    Source: Stevens et al. (2022), "Backpropagation clipping for deep learning with differential privacy"; the account
    there counts one subsample for each layer, this one a single joint one.
    """
    graph_module = trace(model)[0]
    if graph_module.meta["prefix"]:
        graph_module = trace(nn.Sequential(model))[0]
    calls = [node for node in graph_module.graph.nodes if _is_trainable(graph_module, node)]
    _check_covered(model, graph_module, calls)
    inputs = _per_layer("input_bound", input_bound, len(calls))
    cotangents = _per_layer("cotangent_bound", cotangent_bound, len(calls))
    for number, (node, x, c) in enumerate(zip(calls, inputs, cotangents, strict=True)):
        clip, gate = f"clip_{number}", f"gate_{number}"
        graph_module.add_submodule(clip, ValueClip(x))
        graph_module.add_submodule(gate, GradientGate(c))
        source = node.args[0] if node.args else node.kwargs["input"]
        with graph_module.graph.inserting_before(node):
            clipped = graph_module.graph.call_module(clip, (source,))
        with graph_module.graph.inserting_after(node):
            gated = graph_module.graph.call_module(gate, (node,))
        node.replace_all_uses_with(gated, delete_user_cb=lambda user, gated=gated: user is not gated)
        node.args, node.kwargs = (clipped,), {}
    graph_module.recompile()
    return graph_module.train(model.training)


def _is_trainable(root: nn.Module, node: fx.Node) -> bool:
    if node.op != "call_module":
        return False
    module = root.get_submodule(str(node.target))
    return any(p.requires_grad for p in module.parameters())


def _check_covered(model: nn.Module, root: nn.Module, calls: Sequence[fx.Node]) -> None:
    modules = {str(node.target): root.get_submodule(str(node.target)) for node in calls}
    for name, module in modules.items():
        if not isinstance(module, _LAYERS):
            raise UnsupportedLayerError(
                f"'{name}' ({type(module).__name__}) is trainable and neither nn.Linear, nn.Conv1d nor nn.Conv2d: clips"
                " around it do not bound its gradient. Freeze it, or leave it out"
            )
    covered = {id(p) for module in modules.values() for p in module.parameters()}
    left = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in covered]
    if left:
        raise UnsupportedLayerError(
            f"no layer is called with {', '.join(left)}: they are plain tensors, so there is no layer to put a clip"
            " around. Use modules, or freeze them"
        )


def _per_layer(name: str, bound: float | Sequence[float], layers: int) -> list[float]:
    bounds = [float(bound)] * layers if isinstance(bound, (int, float)) else [float(b) for b in bound]
    if len(bounds) != layers:
        raise ParameterError(f"{name}: {len(bounds)} bounds for {layers} trainable layers; give one, or {layers}")
    return bounds
