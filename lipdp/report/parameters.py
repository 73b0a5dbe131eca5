"""Per parameter: the sensitivity, the noise, and the share of the budget."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lipdp.bounds import NodeBound
from lipdp.errors import LipdpError
from lipdp.training.checkpoint import RunFolder

if TYPE_CHECKING:
    from lipdp.report.reading import RecordedRun


@dataclass(frozen=True)
class ParameterRow:
    """What is known of one trainable parameter; None where something is not.

    Attributes:
        name: of the parameter. size: number of weights d.
        value, cotangent: X and G, bounds on the norm of its layer's output and of the gradient there, per record.
        delta: Δ, the bound on one record's gradient.
        std: s, of the noise on every entry of the summed gradient.
        share: part of the budget 1/σ² that the parameter takes.
        signal: the most that B records can weigh over the noise, B Δ / (s √d). A bound, no figure of the data. None
            where there is no noise.
    """

    name: str
    size: int | None
    value: float | None
    cotangent: float | None
    delta: float
    std: float | None
    share: float | None
    signal: float | None


def parameter_rows(
    deltas: Mapping[str, float],
    stds: Mapping[str, float],
    sizes: Mapping[str, int],
    *,
    batch_size: float,
    nodes: Sequence[NodeBound] = (),
) -> tuple[ParameterRow, ...]:
    """A row per parameter.

    Args:
        deltas, stds, sizes: parameter name → Δ, s and d; of the last two some may be missing.
        nodes: those of a `Sensitivity`, for X and G; a shared parameter has the largest of its uses.
    """
    spent = {name: (delta / stds[name]) ** 2 if stds.get(name) else 0.0 for name, delta in deltas.items()}
    total = sum(spent.values()) or 1.0
    rows = []
    for name, delta in deltas.items():
        size, std, uses = sizes.get(name), stds.get(name), [node for node in nodes if name in node.parameters]
        rows.append(
            ParameterRow(
                name=name,
                size=size,
                value=max((node.value for node in uses), default=None),
                cotangent=max((node.cotangent for node in uses), default=None),
                delta=delta,
                std=std,
                share=None if std is None else spent[name] / total,
                signal=batch_size * delta / (std * math.sqrt(size)) if std and size else None,
            )
        )
    return tuple(rows)


def rows_of_run(run: RecordedRun) -> tuple[tuple[ParameterRow, ...], str]:
    """The noise as it was drawn, and why some columns are empty ("" if none is)."""
    account, sizes, reasons = run.account, {}, []
    if not set(account.sensitivity) <= set(account.noise_stds):
        reasons.append("The noise is not shown: privacy.json tells of none that was drawn.")
    try:
        weights = RunFolder(run.folder).load()["model"]
        sizes = {name: value.numel() for name, value in weights.items() if isinstance(value, torch.Tensor)}
    except LipdpError as error:
        reasons.append(f"The numbers of weights are not shown: {error}.")
    rows = parameter_rows(account.sensitivity, account.noise_stds, sizes, batch_size=account.expected_batch_size)
    return rows, " ".join(reasons)
