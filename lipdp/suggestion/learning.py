"""Whether a private run can learn at all: what its steps can add up to, over the noise that they add up."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping

from lipdp.errors import CannotLearnWarning

LEAST = 1.0
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


def warn_if_drowned(signals: Mapping[str, float]) -> None:
    """Say in plain words that the noise drowns the signal of most blocks, and which lever there is."""
    weak = {name: value for name, value in signals.items() if value < LEAST}
    if not signals or 2 * len(weak) < len(signals):
        return
    worst = min(weak, key=lambda name: weak[name])
    warnings.warn(
        f"this run can hardly learn: for {len(weak)} of {len(signals)} parameters the noise of all steps is larger than"
        f" anything that the gradients can add up to ({worst!r}: signal over noise {weak[worst]:.2g}). Take a larger"
        " batch or a larger ε, an InputBound near the norm of the inputs, constrained layers (lipdp.nn.from_torch), or"
        " a gate at the logits",
        CannotLearnWarning,
        stacklevel=4,
    )
