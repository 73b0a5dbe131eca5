"""Modules that torch.nn lacks, in plain torch: they trace, script and export, and need nothing else of lipdp."""

from __future__ import annotations

import torch
import torch.fx
from torch import Tensor, nn
from torch.nn import functional as F


class Scale(nn.Module):
    """Multiply by a constant: |factor|-Lipschitz.

    Args:
        factor: any finite number.

    >>> lipdp.nn.Scale(0.5)(torch.tensor([[4.0]]))
    tensor([[2.]])
    """

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = float(factor)

    def forward(self, input: Tensor) -> Tensor:
        return input * self.factor

    def extra_repr(self) -> str:
        return f"factor={self.factor}"


class SortPairs(nn.Module):
    """What `GroupSort2` computes, in operations that every exporter knows: sort channel j with channel j + C/2.

    >>> SortPairs()(torch.tensor([[1.0, 5.0, 3.0, 2.0]]))
    tensor([[3., 5., 1., 2.]])
    """

    def __init__(self, dim: int = 1) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, input: Tensor) -> Tensor:
        first, second = torch.chunk(input, 2, dim=self.dim)
        return torch.cat([torch.maximum(first, second), torch.minimum(first, second)], dim=self.dim)

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


class Ball(nn.Module):
    """What `ValueClip` computes, in operations that every exporter knows: r x / max(‖x‖, c).

    >>> Ball(1.0, 2.0)(torch.tensor([[3.0, 4.0], [0.3, 0.4]]))
    tensor([[1.2000, 1.6000],
            [0.6000, 0.8000]])
    """

    def __init__(self, bound: float, radius: float) -> None:
        super().__init__()
        self.bound, self.radius = bound, radius

    def forward(self, input: Tensor) -> Tensor:
        return (F.normalize(input.flatten(1), dim=1, eps=self.bound) * self.radius).reshape(input.shape)


class SortGroups(nn.Module):
    """What `GroupSort` computes, in operations that every exporter knows.

    >>> SortGroups(2, 1.0)(torch.tensor([[5.0, 1.0, 2.0, 3.0]]))
    tensor([[1., 5., 2., 3.]])
    """

    def __init__(self, group_size: int | None, factor: float) -> None:
        super().__init__()
        self.group_size, self.factor = group_size, factor

    def forward(self, input: Tensor) -> Tensor:
        if self.group_size is None:
            return torch.sort(input, dim=1)[0] * self.factor
        groups = input.unflatten(1, (-1, self.group_size))
        return torch.sort(groups, dim=2)[0].flatten(1, 2) * self.factor


class Centred(nn.Module):
    """What `LayerCentering` computes. Args: `dim`, axes of the mean; `bias`, one number a channel, or None."""

    def __init__(self, dim: tuple[int, ...], bias: nn.Parameter | None) -> None:
        super().__init__()
        self.dim, self.bias = dim, bias

    def forward(self, input: Tensor) -> Tensor:
        centred = input - input.mean(self.dim, keepdim=True)
        return centred if self.bias is None else (centred.movedim(1, -1) + self.bias).movedim(-1, 1)


class BothSigns(nn.Module):
    """What `MaxMin` computes: max(x, 0) and max(−x, 0) side by side, times a factor."""

    def __init__(self, dim: int, factor: float) -> None:
        super().__init__()
        self.dim, self.factor = dim, factor

    def forward(self, input: Tensor) -> Tensor:
        return torch.cat([torch.relu(input), torch.relu(-input)], dim=self.dim) * self.factor


class Reflect(nn.Module):
    """What `HouseHolder` computes: pairs of channels, reflected on one side of a line through 0 at the angle θ/2."""

    def __init__(self, theta: nn.Parameter) -> None:
        super().__init__()
        self.theta = theta

    def forward(self, input: Tensor) -> Tensor:
        x, y = torch.chunk(input.movedim(1, -1), 2, dim=-1)
        sine, cosine = torch.sin(self.theta), torch.cos(self.theta)
        kept = x * torch.sin(0.5 * self.theta) - y * torch.cos(0.5 * self.theta) <= 0
        first = torch.where(kept, x, x * cosine + y * sine)
        second = torch.where(kept, y, x * sine - y * cosine)
        return torch.cat([first, second], dim=-1).movedim(-1, 1)


class _Tracer(torch.fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not any(map(is_ours, m.modules()))


def is_ours(module: nn.Module) -> bool:
    """Whether its code lies in lipdp or deel-torchlip."""
    return type(module).__module__.partition(".")[0] in ("lipdp", "deel")


def inlined(module: nn.Module) -> nn.Module:
    """The module with everything in it whose code lies in lipdp or deel-torchlip as graphs of torch's own operations.

    A module whose forward can't be traced stays as it is.

    >>> type(inlined(SortPairs())).__name__
    'SortPairs'
    >>> is_ours(inlined(SortPairs()))
    False
    """
    if is_ours(module):
        graph = _traced(module)
        if graph is not None:
            made = torch.fx.GraphModule(module, graph, class_name=type(module).__name__)
            for part in made.modules():
                if type(part) in (nn.Module, type(made)):  # what only holds others starts in training mode
                    part.training = module.training
            return made
    for name, child in module._modules.items():
        if child is not None:
            module._modules[name] = inlined(child)
    return module


def _traced(module: nn.Module) -> torch.fx.Graph | None:
    try:
        graph = _Tracer().trace(module)
    except Exception:  # tracing runs the module's own code, which may branch on values
        return None
    for node in graph.nodes:
        node.type = None  # annotations are text here, which TorchScript doesn't know
    return graph
