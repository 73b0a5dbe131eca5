"""Tracing a torch model for its port: down to the layers of torch, with the shape of every result."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from lipdp.constraints import is_size
from lipdp.errors import ParameterError, UnsupportedOperationError
from lipdp.nn.walk import check_hooks, refuse

BATCH = 3
"""Samples that the shapes are read with."""


def is_own(layer: nn.Module) -> bool:
    """Whether it is a layer of lipdp or deel-torchlip."""
    return type(layer).__module__.startswith(("lipdp.nn.", "deel."))


def checked_shape(input_shape: object) -> tuple[int, ...]:
    """The shape of one sample as a tuple."""
    if not isinstance(input_shape, Sequence) or not input_shape or not all(map(is_size, input_shape)):
        raise ParameterError(f"input_shape={input_shape!r}: the sizes of one sample, e.g. (1, 28, 28) or (30,)")
    return tuple(input_shape)


class _Tracer(fx.Tracer):
    """Stops at layers of torch, deel-torchlip and lipdp and at what is kept; looks into all other modules.

    Without `keep` it stops at every module: unpickling a graph traces its calls again.
    """

    def __init__(self, keep: tuple[type[nn.Module], ...] | None = None) -> None:
        super().__init__()
        self.keep = keep
        self.inside: list[str] = []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if self.keep is None:
            return True
        own = is_own(m) and not isinstance(m, nn.Sequential)
        return own or isinstance(m, self.keep) or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        self.inside.append(f"'{self.path_of_module(m)}' ({type(m).__name__})")
        result = super().call_module(m, forward, args, kwargs)
        self.inside.pop()  # not where an error passes: the innermost module is the last
        return result


def traced(model: nn.Module, keep: tuple[type[nn.Module], ...]) -> fx.GraphModule:
    """The graph of a copy of the model."""
    for name, module in model.named_modules():
        check_hooks(name, module)
        if parametrize.is_parametrized(module):
            refuse(name, module, "it is reparametrised; call torch.nn.utils.parametrize.remove_parametrizations first")
    tracer = _Tracer(keep)
    root = copy.deepcopy(model)
    if tracer.is_leaf_module(root, ""):
        root = nn.Sequential(root)
    try:
        return fx.GraphModule(root, tracer.trace(root), type(model).__name__)
    except Exception as error:  # torch.fx raises whatever the traced code raises
        where = tracer.inside[-1] if tracer.inside else type(model).__name__
        raise UnsupportedOperationError(
            f"torch.fx cannot trace {where}: {error}. Avoid Python branches on tensor values, or register a rule for"
            " its class (lipdp.bounds.rule) and pass from_torch(..., keep=[the class])"
        ) from error


class _Shapes(fx.Interpreter):
    """Runs the graph and notes the shape of every tensor."""

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        n.meta["shape"] = tuple(result.shape) if isinstance(result, Tensor) else None
        return result


@torch.no_grad()
def note_shapes(graph: fx.GraphModule, input_shape: tuple[int, ...]) -> None:
    """Run the graph in evaluation mode; leaves the shape of every tensor in its node's `meta`."""
    like = next((p for p in graph.parameters() if p.is_floating_point()), torch.empty(0))
    graph.eval()
    runner = _Shapes(graph)
    runner.extra_traceback = False
    try:
        runner.run(torch.zeros(BATCH, *input_shape, dtype=like.dtype, device=like.device))
    except Exception as error:  # whatever the model raises at a shape it isn't made for
        what = f"inputs of shape {input_shape}, which is that of one sample without the batch"
        raise ParameterError(f"the model does not take {what}: {error}") from error
