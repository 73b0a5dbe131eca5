"""Per parameter: the sensitivity, the noise, and the share of the budget."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from lipdp.errors import CheckpointError, LipdpError
from lipdp.noise.allocation import get_allocation
from lipdp.report.reading import Run
from lipdp.training.checkpoint import RunFolder


@dataclass(frozen=True)
class ParameterRow:
    """One trainable parameter, at the weights of the last checkpoint.

    Attributes:
        name: of the parameter. size: number of weights d, where it is known.
        delta: Δ, the bound on one record's gradient.
        std: s, of the noise on every entry of the summed gradient.
        share: part of the budget 1/σ² that the parameter takes.
        signal: the most that B records can weigh over the noise, B Δ / (s √d). A bound, no figure of the data.
    """

    name: str
    size: int | None
    delta: float
    std: float | None
    share: float | None
    signal: float | None


def parameter_rows(run: Run) -> tuple[tuple[ParameterRow, ...], str]:
    """A row per parameter, and why some columns are empty ("" if none is)."""
    account = run.account
    names = list(account.sensitivity)
    deltas = torch.tensor([account.sensitivity[n] for n in names], dtype=torch.float64)
    reason = ""
    sizes: Mapping[str, int] = {}
    stds: list[float | None] = [None] * len(names)
    try:
        sizes = _sizes(run)
        missing = [n for n in names if n not in sizes]
        if missing:
            raise CheckpointError(f"the checkpoint has no {', '.join(missing[:3])}")
        moved = deltas * account.relation.sensitivity_factor
        counts = torch.tensor([sizes[n] for n in names])
        stds = get_allocation(account.allocation).stds(moved, counts, account.noise_multiplier).tolist()
    except LipdpError as error:
        reason = f"The noise is not shown: {error}."
    spent = [(d / s) ** 2 if s else 0.0 for d, s in zip(deltas.tolist(), stds, strict=True)]
    total = sum(spent) or 1.0
    rows = []
    for name, delta, std, part in zip(names, deltas.tolist(), stds, spent, strict=True):
        size = sizes.get(name)
        signal = account.expected_batch_size * delta / (std * math.sqrt(size)) if std and size else None
        rows.append(ParameterRow(name, size, delta, std, part / total if std else None, signal))
    return tuple(rows), reason


def _sizes(run: Run) -> dict[str, int]:
    weights = RunFolder(run.folder).load()["model"]
    return {name: value.numel() for name, value in weights.items() if isinstance(value, torch.Tensor)}
