"""Whether a private run can learn at all: what its steps can add up to, over the noise that they add up."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping

from torch import Tensor

from lipdp.accounting.plan import PrivacyPlan
from lipdp.errors import CannotLearnWarning
from lipdp.noise.banded import accumulation

GROWTH = 10.0
"""How much larger Δ may become during a run before it is said."""

LEAST = 2.0
"""Signal over noise below which a block learns nothing that the noise does not drown."""


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
        " criterion, gate and joints of lipdp.suggest, which you get when you leave out the optimizer"
    )


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
