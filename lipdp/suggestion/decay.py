"""A learning rate that falls by itself: for loops without a scheduler."""

from __future__ import annotations

from typing import Any

import torch

_TAKEN = "lipdp_decay"


def decaying(optimizer: torch.optim.Optimizer, *, steps: int) -> torch.optim.Optimizer:
    """The optimiser, whose learning rates fall linearly from what they are to 0 at step T, by a hook behind its step.

    How many steps were taken is part of its state, so that a restored one goes on where it was.

    >>> weight = torch.nn.Parameter(torch.zeros(1))
    >>> sgd = decaying(torch.optim.SGD([weight], lr=1.0), steps=4)
    >>> weight.grad = torch.ones(1)
    >>> for _ in range(3): sgd.step()
    >>> sgd.param_groups[0]["lr"]
    0.25
    """
    for group in optimizer.param_groups:
        group["initial_lr"], group[_TAKEN] = group["lr"], 0

    def fall(stepped: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for group in stepped.param_groups:
            group[_TAKEN] += 1
            group["lr"] = group["initial_lr"] * max(0.0, 1 - group[_TAKEN] / steps)

    optimizer.register_step_post_hook(fall)
    return optimizer
