"""Whether a private run can learn at all: what its steps can add up to, over the noise that they add up."""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lipdp.accounting.plan import PrivacyPlan
from lipdp.errors import CannotLearnWarning
from lipdp.noise.banded import accumulation

GROWTH = 10.0
"""How much larger Δ may become during a run before it is said."""

LEAST = 2.0
"""Signal over noise below which a block learns nothing that the noise does not drown."""

NEAR, FAR = 1.0, 100.0
"""How far a run moves a weight, in units of its size: the gradients of all steps at least NEAR, the noise at most FAR.

Found on digits with Adam (docs/port.md). The best rate let the gradients move a weight by about 10 NEAR.
"""

_ENTRYWISE = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RMSprop
_STEPS, _ENTRIES = 64, 256  # how many steps, and entries of each weight, the trial in `noise_moves` takes


def signal_over_noise(*, norm: float, std: float, size: int, batch_size: int, steps: int) -> float:
    """√T B u / (s √d): T aligned sums of B gradients of norm u, over the norm of the noise that T steps add up.

    An upper bound on what the block can learn from, if u bounds the root mean square of the gradients' norms.

    Args:
        norm: u. std: s, of the noise on a sum. size: d, the number of weights.

    >>> signal_over_noise(norm=0.5, std=2.0, size=16, batch_size=100, steps=4)
    12.5
    """
    if not std or not size:
        return math.inf
    return math.sqrt(steps) * batch_size * norm / (std * math.sqrt(size))


def signals(
    stds: Mapping[str, float], norms: Mapping[str, float], parameters: Mapping[str, Tensor], plan: PrivacyPlan
) -> dict[str, float]:
    """`signal_over_noise` of every parameter whose typical gradient is known; bands cancel a part of the noise."""
    return {
        name: signal_over_noise(
            norm=norms[name],
            std=std * accumulation(plan.bands),
            size=parameters[name].numel(),
            batch_size=plan.expected_batch_size,
            steps=plan.steps,
        )
        for name, std in stds.items()
        if name in norms
    }


def drowned(signals: Mapping[str, float]) -> str:
    """In plain words that the noise drowns the signal of most parameters, and which levers there are; "" if it doesn't.

    >>> drowned({"weight": 20.0})
    ''
    """
    weak = {name: value for name, value in signals.items() if value < LEAST}
    if not weak or 2 * len(weak) < len(signals):
        return ""
    worst = min(weak, key=lambda name: weak[name])
    return (
        f"this run can hardly learn: in {len(weak)} of {len(signals)} parameters, the gradients of all steps can add up"
        f" to less than twice the noise ({worst!r}: signal over noise {weak[worst]:.2g}). What helps: a larger batch,"
        " a larger ε, an InputBound near the norm of the inputs, constrained layers (lipdp.nn.from_torch), and the"
        " criterion, gate and joints of lipdp.suggest, which you get when you leave out optimizer or criterion"
    )


def noise_moves(
    optimizer: torch.optim.Optimizer, stds: Mapping[str, float], parameters: Mapping[str, Tensor], plan: PrivacyPlan
) -> dict[str, float]:
    """How far the noise of all steps alone moves a parameter, over its size (root mean squares); public.

    The optimiser is run on noise, over a few entries that stand for all: its rule is the same for each. T steps of
    independent noise move √(T/t) as far as t do. A scheduler is not seen; its base rate is taken.

    Returns:
        by parameter; none that is 0 at the start, and none for an optimiser whose rule is not known.
    """
    if type(optimizer) not in _ENTRYWISE:
        return {}
    names = {id(parameter): name for name, parameter in parameters.items()}
    held = [[names.get(id(p), "") for p in group["params"]] for group in optimizer.param_groups]
    samples = [nn.Parameter(torch.zeros(len(group), _ENTRIES, device="cpu")) for group in held]
    scale = accumulation(plan.bands) / plan.expected_batch_size
    noise = [scale * torch.tensor([stds.get(name, 0.0) for name in group], device="cpu").view(-1, 1) for group in held]
    generator = torch.Generator("cpu").manual_seed(0)
    rule: Any = type(optimizer)
    trial = rule([_trial_group(*each) for each in zip(optimizer.param_groups, samples, strict=True)])
    steps = min(plan.steps, _STEPS)
    for _ in range(steps):
        for sample, std in zip(samples, noise, strict=True):
            sample.grad = std * torch.randn(sample.shape, generator=generator, device="cpu")
        trial.step()
    far = math.sqrt(plan.steps / steps)
    moved = {
        name: _rms(row)
        for group, rows in zip(held, samples, strict=True)
        for name, row in zip(group, rows, strict=True)
    }
    sizes = {name: _rms(parameters[name]) for name in moved if name in parameters}
    return {name: far * moved[name] / size for name, size in sizes.items() if size > 0}


def _trial_group(group: Mapping[str, Any], sample: nn.Parameter) -> dict[str, Any]:
    """A group of the optimiser over the sample, at the highest rate that a scheduler noted there."""
    left_out = ("params", "param_names", "fused", "foreach", "capturable", "differentiable")
    rate = max(float(group[key]) for key in ("lr", "initial_lr", "max_lr") if key in group)
    return {k: v for k, v in group.items() if k not in left_out} | {"params": [sample], "lr": rate}


def _rms(parameter: Tensor) -> float:
    values = parameter.detach()
    return float(values.norm()) / math.sqrt(values.numel() or 1)


def misfit(
    optimizer: torch.optim.Optimizer, moves: Mapping[str, float], signals: Mapping[str, float], steps: int
) -> str:
    """In plain words that the learning rates are far from what the run asks for; "" if they aren't, or it isn't known.

    Gradients can carry a weight `signal_over_noise` times as far as noise does; but at most √T times as far where each
    step is scaled to the same length, as by Adam.
    """
    most = math.inf if isinstance(optimizer, torch.optim.SGD) else math.sqrt(steps)
    known = [(move, move * min(signals[name], most)) for name, move in moves.items() if name in signals]
    if not known:
        return ""
    noise, reach = (statistics.median(values) for values in zip(*known, strict=True))
    if 0 < reach < NEAR:
        return (
            "this learning rate is far too small for the run: if the gradients of all steps pointed the same way, they"
            f" would still move a weight by only {_about(reach)} times its size. A rate about"
            f" {_about(10 * NEAR / reach)} times as large suits most runs"
        )
    if FAR < noise < math.inf:
        return (
            "this learning rate is far too large for the run: the noise of all steps moves a weight by"
            f" {_about(noise)} times its size. A rate about {_about(noise)} times smaller suits most runs"
        )
    return ""


def _about(value: float) -> str:
    """One digit, and no power of ten above 1: 20, not 2e+01."""
    return f"{float(f'{value:.1g}'):,.0f}" if value >= 1 else f"{value:.1g}"


class GrowthWatch:
    """Warns once when Δ has grown tenfold since the first step: weights that nothing constrains have grown.

    Looks at the first step and then at every power of two, so that a device is seldom waited for.
    """

    def __init__(self) -> None:
        self._looks, self._next, self._first, self._said = 0, 1, 0.0, False

    def look(self, deltas: Tensor) -> None:
        """Take notice of the Δ_l of a step.

        >>> watch = GrowthWatch()
        >>> watch.look(torch.tensor([1.0, 2.0]))
        """
        self._looks += 1
        if self._said or self._looks < self._next:
            return
        self._next *= 2
        total = float(deltas.square().sum().sqrt())
        if self._looks == 1:
            self._first = total
        elif total > GROWTH * self._first > 0:
            self._said = True
            warnings.warn(
                f"the sensitivity has grown {total / self._first:.3g} times since the first step, and the noise with"
                " it: unconstrained weights have grown, and they multiply the bounds of other layers. Use constrained"
                " layers (lipdp.nn.from_torch or lipdp.nn.constrain), or a smaller learning rate",
                CannotLearnWarning,
                stacklevel=3,
            )
