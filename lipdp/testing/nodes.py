"""Bounds inside the network: the value X and the cotangent G of every operation, and samples in a batch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call

from lipdp.bounds import BoundGraph
from lipdp.bounds.sensitivity import Sensitivity
from lipdp.bounds.trace import mode
from lipdp.testing.report import Finding, largest, worst_of


class _Observer(fx.Interpreter):
    """Runs the graph and keeps, per operation, every sample's norm of the value and of the cotangent."""

    def __init__(self, graph: BoundGraph) -> None:
        super().__init__(graph.module)
        self.values: dict[int, Tensor] = {}
        self.cotangents: dict[int, Tensor] = {}
        self._index = {node: i for node, i in graph.index.items() if node not in graph.constants}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        i = self._index.get(n)
        if i is not None and isinstance(result, Tensor):
            result = result.view_as(result)  # an identity returns its argument, which other branches may share
            self.values[i] = _norms(result)
            if result.requires_grad:
                note = self.cotangents.__setitem__  # not `self`, which holds the result: torch would free neither
                result.register_hook(lambda g: note(i, _norms(g)))
        return result


def _norms(x: Tensor) -> Tensor:
    wide = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    return torch.linalg.vector_norm(wide.reshape(len(x), -1), dim=1)


def node_findings(
    graph: BoundGraph, loss: nn.Module, declared: Sensitivity, x: Tensor, y: Tensor, how: list[str]
) -> dict[str, Finding]:
    """The largest value and cotangent of every operation over a batch, beside X and G."""
    observer = _Observer(graph)
    with torch.enable_grad():
        x = x.detach().clone().requires_grad_(x.is_floating_point())
        wanted = [t for t in (x, *graph.model.parameters()) if t.requires_grad]
        total = loss(observer.run(x), y).sum()
        if wanted and total.requires_grad:
            torch.autograd.grad(total, wanted, allow_unused=True)
    x = x.detach()
    found: list[Finding] = []
    for step, node in zip(graph.steps, declared.nodes, strict=True):
        sides = (("value of", observer.values, node.value), ("cotangent at", observer.cotangents, node.cotangent))
        for side, norms, bound in sides:
            if step.index in norms and bound < float("inf"):
                i = largest(norms[step.index])
                found.append(Finding(f"{side} {node.name}", float(norms[step.index][i]), bound, how[i], x[i], y[i]))
    return worst_of(found)


def pair_findings(model: nn.Module, lipschitz: float, x: Tensor, radius: float) -> dict[str, Finding]:
    """‖f(a) − f(b)‖ / ‖a − b‖ over near, far and opposite pairs, beside the Lipschitz constant.

    Below float64 only pairs that are far apart: between near ones there is little but rounding. Tokens are paired with
    those of other inputs, at one place and at all.
    """
    if x.is_floating_point():
        near = x + 1e-3 * radius * torch.randn_like(x) / max(x[0].numel(), 1) ** 0.5
        first, second = torch.cat([x, x, x]), torch.cat([near, x.flip(0), -x])
    else:
        one = x.clone()
        one.view(len(x), -1)[:, 0] = one.view(len(x), -1)[:, 0].flip(0)
        first, second = torch.cat([x, x]), torch.cat([one, x.flip(0)])
    with torch.no_grad(), _without_noise(model, x):
        moved = _norms(model(first) - model(second))
    distance = _norms(first - second)
    apart = distance > (0.5 if x.dtype == torch.float32 else 1e-6) * radius
    ratios = torch.where(apart, moved / torch.where(apart, distance, 1.0), 0.0)
    i = largest(ratios)
    quantity = "Lipschitz constant (pairs of inputs)"
    return {quantity: Finding(quantity, float(ratios[i]), lipschitz, "pairs of inputs", first[i])}


def batch_findings(
    model: nn.Module, loss: nn.Module, declared: Sensitivity, worst: dict[str, Finding], x: Tensor, y: Tensor
) -> dict[str, Finding]:
    """The definition itself: the summed gradient of a batch with and without one sample must differ by at most Δ.

    Unlike a gradient computed on one sample alone this sees samples that influence each other, and sums that are
    rounded to a low precision. The samples of the `worst` findings are added, one after the other, to (x, y) with
    copies of them.
    """
    own = dict(model.named_parameters())
    found: list[Finding] = []

    def gradients(x: Tensor, y: Tensor) -> dict[str, Tensor]:
        wrt = {name: own[name].detach().requires_grad_() for name in declared}
        total = loss(functional_call(model, wrt, (x.detach().requires_grad_(x.is_floating_point()),)), y).sum()
        grads = torch.autograd.grad(total, list(wrt.values()), allow_unused=True)
        return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(wrt.items(), grads, strict=True)}

    samples = [(f.input, f.target, f.how) for f in worst.values() if f.input is not None and f.target is not None]
    for sample, target, how in samples:
        with _without_noise(model, x):
            copies = torch.cat([x, *[sample.unsqueeze(0)] * 57]), torch.cat([y, *[target.unsqueeze(0)] * 57])
            with_all, without = gradients(*copies), gradients(copies[0][:-1], copies[1][:-1])
        for name, bound in declared.items():
            rounding = 1e2 * torch.finfo(with_all[name].dtype).eps * float(with_all[name].norm())
            difference = max(float((with_all[name] - without[name]).norm()) - rounding, 0.0)
            quantity = f"batch gradient of {name} with and without one sample"
            found.append(Finding(quantity, difference, bound, how, sample, target))
    return worst_of(found)


@contextlib.contextmanager
def _without_noise(model: nn.Module, x: Tensor) -> Iterator[None]:
    """The model in evaluation mode where it draws random numbers (dropout): two runs of it cannot be compared."""
    with torch.no_grad():
        random = not torch.equal(model(x), model(x))
    with mode(model, model.training and not random):
        yield


def autocast(device: torch.device, dtype: torch.dtype | None) -> contextlib.AbstractContextManager[Any]:
    """`torch.autocast` to the dtype, or nothing."""
    return torch.autocast(device.type, dtype) if dtype is not None else contextlib.nullcontext()
