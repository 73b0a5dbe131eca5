"""From a module to a graph of leaf calls with the shapes of one sample; refuses what lets samples meet."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from lipdp.bounds.rules import find_module_rule
from lipdp.errors import LipdpError, MixesSamplesError, UnsupportedOperationError

_BATCH = 5  # an unusual batch size, so that a hard-coded one shows


class _Tracer(fx.Tracer):
    """Stops at every module that has a rule; looks inside the others, torch's leaves excepted."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, (nn.Sequential, nn.ModuleList)):
            return False
        return find_module_rule(m) is not None or super().is_leaf_module(m, module_qualified_name)


class _Shapes(fx.Interpreter):
    """Runs the graph once and keeps every node's output shape and the inputs' constants."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.shapes: dict[fx.Node, torch.Size] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.shapes[n] = result.shape
        return result


def trace(model: nn.Module) -> fx.GraphModule:
    """The model's graph; an `UnsupportedOperationError` where torch.fx cannot follow the code."""
    tracer = _Tracer()
    if find_module_rule(model) is not None or not list(model.children()):
        model = nn.Sequential(model)  # a single layer is a graph with one leaf
        prefix = True
    else:
        prefix = False
    try:
        graph = tracer.trace(model)
    except LipdpError:
        raise
    except Exception as error:  # torch.fx raises whatever the traced code raises
        raise UnsupportedOperationError(
            f"torch.fx cannot trace {type(model).__name__}: {error}. Avoid Python branches on tensor values, or register a"
            " rule for the submodule that contains them (lipdp.bounds.rule)"
        ) from error
    module = fx.GraphModule(model, graph)
    module.meta["prefix"] = "0." if prefix else ""
    return module


def probe_input(model: nn.Module, input_shape: tuple[int, ...], *, batch: int = _BATCH) -> Tensor:
    """A batch of random samples in the dtype and on the device of the model's parameters."""
    reference = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, *input_shape, generator=generator)
    return x.to(device=reference.device, dtype=reference.dtype)


@torch.no_grad()
def sample_shapes(graph: fx.GraphModule, x: Tensor) -> dict[fx.Node, tuple[int, ...]]:
    """Per node the shape of one sample (of the whole tensor for a constant)."""
    interpreter = _Shapes(graph)
    try:
        interpreter.run(x)
    except LipdpError:
        raise
    except Exception as error:  # a shape the model does not accept raises whatever torch raises
        raise UnsupportedOperationError(
            f"the model does not accept inputs of shape (N, *{tuple(x.shape[1:])}): {error}"
        ) from error
    shapes: dict[fx.Node, tuple[int, ...]] = {}
    for node, shape in interpreter.shapes.items():
        if node.op == "get_attr":
            shapes[node] = tuple(shape)
        elif not shape or shape[0] != len(x):
            raise MixesSamplesError(
                f"node '{node.name}' turns a batch of {len(x)} samples into a tensor of shape {tuple(shape)}: the first"
                " axis must stay the batch, one entry a sample"
            )
        else:
            shapes[node] = tuple(shape[1:])
    return shapes


def check_samples_apart(model: nn.Module, x: Tensor) -> None:
    """Perturb one sample and look at the others' outputs: they must not change at all.

    A dynamic check beside the rules: it catches what hides inside a module with a (wrong) user rule.
    """
    was_training = model.training
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        model.eval()  # dropout draws per batch; whatever mixes in evaluation mode mixes in training mode too
        try:
            base, moved = x.clone(), x.clone()
            moved[0] = moved[0] + torch.rand_like(moved[0]) + 1.0
            before, after = model(base), model(moved)
        finally:
            model.train(was_training)
    if not torch.allclose(before[1:], after[1:], rtol=1e-5, atol=1e-6, equal_nan=True):
        raise MixesSamplesError(
            f"changing one sample changed the output of others by up to {(before[1:] - after[1:]).abs().max().item():.3g}:"
            f" {type(model).__name__} mixes the samples of a batch, so no per-sample bound exists"
        )
