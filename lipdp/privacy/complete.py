"""What a call of `make_private` left out, filled in."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lipdp.accounting.plan import PrivacyPlan
from lipdp.distributed.collectives import World
from lipdp.distributed.wrappers import plan_together
from lipdp.noise.allocation import Allocation
from lipdp.privacy.gate import FixedGate, QuantileGate
from lipdp.suggestion.choose import budget, suggest
from lipdp.suggestion.joints import Joint
from lipdp.suggestion.settings import Settings


def complete(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    *,
    input_shape: tuple[int, ...],
    expected_batch_size: int | None,
    steps: int | None,
    epochs: float | None,
    criterion: nn.Module | None,
    gate: float | FixedGate | QuantileGate | None,
    allocation: str | Allocation | None,
    joints: tuple[Joint, ...] | None,
    world: World,
    **account: Any,
) -> tuple[PrivacyPlan, dict[str, Any], Settings | None]:
    """What is given, and what is not: suggested together where optimiser or criterion is left out, else B and passes.

    Args:
        model: inside its wrappers.
        account: N, sampling, bands, truncated_batch_size, unit, σ or (ε, δ), accountant.

    Returns:
        The plan, further arguments of `make_private_with_plan`, and the settings that were suggested together.
    """
    if optimizer is None or criterion is None:
        settings = suggest(
            model,
            input_shape=input_shape,
            expected_batch_size=expected_batch_size,
            steps=steps,
            epochs=epochs,
            criterion=criterion,
            gate=float(gate.start().bound) if isinstance(gate, (FixedGate, QuantileGate)) else gate,
            allocation=allocation,
            joints=joints,
            world=world,
            **account,
        )
        settings = replace(settings, own_optimizer=optimizer is not None)
        found = {
            "optimizer": settings.optimizer(model) if optimizer is None else optimizer,
            "criterion": settings.criterion,
            "gate": settings.gate if gate is None else gate,
            "allocation": settings.allocation,
            "joints": settings.joints,
        }
        return settings.plan, found, settings
    batch, passes = budget(account["dataset_size"], expected_batch_size, steps=steps, epochs=epochs)
    plan = plan_together(world, expected_batch_size=batch, steps=steps, epochs=passes, **account)
    found = {
        "optimizer": optimizer,
        "criterion": criterion,
        "gate": gate,
        "allocation": "per_layer" if allocation is None else allocation,
        "joints": joints or (),
    }
    return plan, found, None
