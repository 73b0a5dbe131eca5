"""Where attacks start: inputs that are the worst of some layer, targets of every loss, adversarial weights."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor, nn

from lipdp import losses
from lipdp.nn.constrained import Constrained, project_
from lipdp.nn.gates import ValueClip

# --- inputs ----------------------------------------------------------------------------------------------------------


def input_radius(model: nn.Module) -> float:
    """The radius of the first projection in the model, or 1."""
    return next((float(m.bound) for m in model.modules() if isinstance(m, ValueClip)), 1.0)


def _unit(x: Tensor) -> Tensor:
    return x / torch.linalg.vector_norm(x.flatten()).clamp_min(1e-300)


def starting_inputs(
    shape: tuple[int, ...], radius: float, *, random: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """Name → input of norm `radius` (float64): patterns, `random` Gaussian ones, and three of other norms.

    Constant inputs are the worst of averaging and convolutions, checkerboards of differences and centering, borders and
    single pixels of padding and pooling.
    """
    ones = torch.ones(shape, dtype=torch.float64)
    last = torch.arange(shape[-1]) if shape else torch.zeros(())
    sign = 1.0 - 2.0 * (last % 2)
    points = {"constant": ones, "negative constant": -ones, "alternating": ones * sign}
    if len(shape) > 1:
        rows = (1.0 - 2.0 * (torch.arange(shape[-2]) % 2)).unsqueeze(-1)
        points |= {"checkerboard": ones * sign * rows, "stripes": ones * rows}
        border = ones.clone()
        border[..., 1:-1, 1:-1] = 0
        points |= {"border": border, "interior": ones - border}
        channels = ones.clone()
        channels[1:] = 0
        points["one channel"] = channels
    for name, index in (("first entry", 0), ("middle entry", ones.numel() // 2), ("last entry", -1)):
        point = torch.zeros_like(ones)
        point.view(-1)[index] = 1
        points[name] = point
    ramp = torch.linspace(-1, 1, ones.numel(), dtype=torch.float64).reshape(shape)
    points |= {"ramp": ramp, "sparse": ramp * (torch.rand(shape, generator=generator, dtype=torch.float64) < 0.2)}
    for i in range(random):
        points[f"Gaussian {i}"] = torch.randn(shape, generator=generator, dtype=torch.float64)
    points = {name: radius * _unit(x) for name, x in points.items()}
    gaussian = torch.randn(shape, generator=generator, dtype=torch.float64)
    points |= {"zero": 0 * ones, "tiny": 1e-9 * radius * gaussian, "huge": 1e6 * radius * gaussian}
    return points


def starting_tokens(
    shape: tuple[int, ...], vocabulary: int, *, random: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """Name → tokens: one alone, in which all gradients of a table meet, one after the other, and `random` ones."""
    count = math.prod(shape)
    alone = {f"token {t}": torch.full(shape, t) for t in range(min(vocabulary, 8))}
    orders = {"in turn": torch.arange(count) % vocabulary, "backwards": (-1 - torch.arange(count)) % vocabulary}
    drawn = {f"random {i}": torch.randint(vocabulary, shape, generator=generator) for i in range(max(random, 1))}
    return alone | {name: t.reshape(shape) for name, t in orders.items()} | drawn


# --- targets ---------------------------------------------------------------------------------------------------------


def _corners(num_outputs: int) -> Tensor:
    """Zeros, ones, every one-hot vector, and an alternating one: (n, C)."""
    rows = torch.arange(num_outputs) % 2
    both = torch.stack([torch.zeros(num_outputs), torch.ones(num_outputs), rows, 1 - rows])
    return torch.cat([both, torch.eye(num_outputs)]).double()


_MADE_OF_CORNERS: dict[Any, Callable[[Any, Tensor], Tensor]] = {
    losses.TauBCEWithLogits: lambda loss, c: c,
    losses.SoftMargin: lambda loss, c: 2 * c - 1,
    losses.SoftCrossEntropy: lambda loss, c: torch.cat([c, 100 * c, -c, c / c.shape[1]]),
    (losses.MeanAbsoluteError, losses.Huber, losses.SmoothL1): lambda loss, c: torch.cat([10 * c, -10 * c]),
    losses.MeanSquaredError: lambda loss, c: loss.target_bound * torch.cat([c, -c, 100 * c]),
    losses.CosineSimilarity: lambda loss, c: torch.cat([c, -c, 100 * c]),
}


@singledispatch
def example_targets(loss: nn.Module, num_outputs: int) -> Tensor:
    """Targets worth trying with a loss, one a row: every label, unless a loss registers something else.

    >>> example_targets(losses.TauCrossEntropy(), 3)
    tensor([0, 1, 2])
    """
    for kind, made in _MADE_OF_CORNERS.items():
        if isinstance(loss, kind):
            return made(loss, _corners(num_outputs))
    return torch.arange(num_outputs)


def targets_for(loss: nn.Module, shape: tuple[int, ...]) -> Tensor:
    """`example_targets` for outputs of one sample of this shape: of every position alike, and of all in turn."""
    if not isinstance(loss, losses.PerPixel):
        return example_targets(loss, math.prod(shape))
    labels = example_targets(loss.loss, shape[0])
    alike = labels.view(-1, *[1] * (len(shape) - 1)).expand(len(labels), *shape[1:])
    in_turn = labels[torch.arange(loss.positions) % len(labels)].reshape(1, *shape[1:])
    return torch.cat([alike, in_turn])


@example_targets.register
def _(loss: losses.HKR, num_outputs: int) -> Tensor:
    return torch.arange(len(loss.priors))


class ProbeLoss(losses.LipschitzLoss):
    """⟨u, z⟩ with the target u projected on the unit ball: constant 1, and any cotangent of norm ≤ 1.

    What `falsify_layer` puts behind a layer: the attack chooses the cotangent as freely as the input.

    >>> ProbeLoss()(torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 1.0]]))
    tensor([4.])
    """

    lipschitz = 1.0

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(target, dim=1, keepdim=True)
        return (logits.flatten(1) * target / norm.clamp_min(1.0)).sum(1)


@example_targets.register
def _(loss: ProbeLoss, num_outputs: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    ones = torch.ones(1, num_outputs, dtype=torch.float64)
    sign = 1.0 - 2.0 * (torch.arange(num_outputs) % 2)
    gaussian = torch.randn(6, num_outputs, generator=generator, dtype=torch.float64)
    rows = torch.cat([ones, -ones, ones * sign, gaussian, torch.eye(num_outputs, dtype=torch.float64)[:2]])
    return rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True) * (1 - 1e-9)


# --- weights ---------------------------------------------------------------------------------------------------------

Fill = Callable[[tuple[int, ...], torch.Generator], Tensor]


def _gaussian(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _constant(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.ones(shape, dtype=torch.float64)


def _rank_one(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return _gaussian((*shape[:-1], 1), generator) * _gaussian((*shape[:-2], 1, shape[-1]), generator)


def _fill_weights(model: nn.Module, fill: Fill, generator: torch.Generator) -> None:
    """Every weight matrix what `fill` makes, scaled to norm 1; vectors Gaussian, in their ball where they have one."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if name == "weight" and isinstance(module, Constrained):
                matrix = module.weight_matrix()
            elif parameter.dim() > 1:
                matrix = parameter.view(parameter.shape[0], -1)
            else:
                parameter.copy_(_gaussian(tuple(parameter.shape), generator))
                continue
            values = fill(tuple(matrix.shape), generator)
            matrix.copy_(values / torch.linalg.matrix_norm(values, 2, keepdim=True))
        if isinstance(module, Constrained) and module.bias is not None:
            module.bias.mul_(module.bias_radius / module.bias.norm().clamp_min(1e-30))


def _noisy_steps(model: nn.Module, generator: torch.Generator) -> None:
    for _ in range(50):
        for parameter in model.parameters():
            parameter.add_(0.3 * _gaussian(tuple(parameter.shape), generator).to(parameter.dtype))
        project_(model)


def _scaled(model: nn.Module, generator: torch.Generator) -> None:
    for parameter in model.parameters():
        parameter.mul_(3.0)


def _sampled(model: nn.Module, generator: torch.Generator) -> None:
    _fill_weights(model, _gaussian, generator)
    for module in model.modules():
        if isinstance(module, Constrained):
            matrix = module.weight_matrix()
            matrix.copy_(module.constraint.sample(*matrix.shape, generator=generator, dtype=matrix.dtype))


WEIGHTS: dict[str, Callable[[nn.Module, torch.Generator], None]] = {
    "given": lambda model, generator: None,
    "sampled": _sampled,
    "noisy steps": _noisy_steps,
    "constant": lambda model, generator: _fill_weights(model, _constant, generator),
    "rank one": lambda model, generator: _fill_weights(model, _rank_one, generator),
    "scaled": _scaled,
}
"""Name → what to do with the weights before an attack. "given" leaves them; all but "scaled" keep the constraints."""


def weight_settings(model: nn.Module, names: tuple[str, ...], generator: torch.Generator) -> Iterator[str]:
    """Put the model's trainable parameters in each setting in turn; in the end they are as they were."""
    tensors = list(itertools.chain(model.parameters(), model.buffers()))
    saved = [t.detach().clone() for t in tensors]
    try:
        for name in names:
            with torch.no_grad():
                for tensor, value in zip(tensors, saved, strict=True):
                    tensor.copy_(value)
                WEIGHTS[name](model, generator)
            yield name
    finally:
        with torch.no_grad():
            for tensor, value in zip(tensors, saved, strict=True):
                tensor.copy_(value)
