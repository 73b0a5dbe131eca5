"""The tables and numbers that the subcommands print, for 80 columns."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from rich import box
from rich.table import Table
from torch import nn

from lipdp.sensitivity import Sensitivity


@dataclass(frozen=True)
class ParameterRow:
    """What is known of one parameter before any data are touched.

    Attributes:
        name, size: of the parameter.
        value, cotangent: X and G, bounds on the norm of its layer's output and of the gradient there, per record.
        delta: Δ, the bound on a record's gradient.
        std: of the noise on the parameter's summed gradient.
        share: part of the privacy budget 1/σ² that it takes.
        signal: largest possible norm of the summed gradient of B records over the noise's, B Δ / (s √d).
    """

    name: str
    size: int
    value: float
    cotangent: float
    delta: float
    std: float
    share: float
    signal: float


def parameter_rows(
    model: nn.Module, bounds: Sensitivity, stds: Mapping[str, float], *, batch_size: float
) -> list[ParameterRow]:
    """One row per trainable parameter; a shared one has the largest X and G of its uses."""
    sizes = {n: p.numel() for n, p in model.named_parameters()}
    spent = {n: (bounds[n] / stds[n]) ** 2 if stds[n] else 0.0 for n in bounds}
    total = sum(spent.values()) or 1.0
    rows = []
    for name in bounds:
        nodes = [node for node in bounds.nodes if name in node.parameters]
        noise = stds[name] * math.sqrt(sizes[name])
        rows.append(
            ParameterRow(
                name=name,
                size=sizes[name],
                value=max((node.value for node in nodes), default=math.nan),
                cotangent=max((node.cotangent for node in nodes), default=math.nan),
                delta=bounds[name],
                std=stds[name],
                share=spent[name] / total,
                signal=batch_size * bounds[name] / noise if noise else math.inf,
            )
        )
    return rows


def number(value: float) -> str:
    """Three significant digits, as short as they get.

    >>> number(0.30012), number(1234.5), number(1e-7), number(float("inf"))
    ('0.3', '1230', '1e-07', '∞')
    """
    if math.isinf(value):
        return "∞"
    if math.isnan(value):
        return "-"
    return f"{value:.3g}" if not 1000 <= abs(value) < 1e6 else f"{float(f'{value:.3g}'):.0f}"


def parameter_table(rows: list[ParameterRow]) -> Table:
    """The rows as a table of 80 columns."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("parameter", no_wrap=True, max_width=24)
    for heading in ("weights", "X", "G", "Δ", "noise", "share", "signal"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        cells = [number(x) for x in (row.value, row.cotangent, row.delta, row.std)]
        table.add_row(row.name, f"{row.size:,}", *cells, f"{row.share:.0%}", number(row.signal))
    return table


LEGEND = (
    "X, G: bounds on a layer's output and on the gradient there, per record; Δ: on a\n"
    "parameter's gradient. noise: std on the sum of a batch; share: of the budget;\n"
    "signal: the most that B records can weigh, over the noise (no private figure)."
)
