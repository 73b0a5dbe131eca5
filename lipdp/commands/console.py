"""The tables and numbers that the subcommands print, for 80 columns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from lipdp.report.parameters import ParameterRow


def plain_console(**options: Any) -> Console:
    """One that colours nothing by itself."""
    return Console(highlight=False, **options)


def plain_table(*headings: str, left: int = 1) -> Table:
    """A table without a frame: the first columns to the left, figures to the right."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="left" if i < left else "right")
    return table


def number(value: float | None) -> str:
    """Three significant digits, as short as they get.

    >>> number(0.30012), number(1234.5), number(1e-7), number(float("inf")), number(None)
    ('0.3', '1230', '1e-07', '∞', '-')
    """
    if value is None:
        return "-"
    if math.isinf(value):
        return "∞"
    return f"{value:.3g}" if not 1000 <= abs(value) < 1e6 else f"{float(f'{value:.3g}'):.0f}"


def parameter_table(rows: Sequence[ParameterRow]) -> Table:
    """The rows as a table of 80 columns."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("parameter", no_wrap=True, max_width=24)
    for heading in ("weights", "values", "grads", "Δ", "noise", "budget", "ratio"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        cells = [number(x) for x in (row.value or None, row.cotangent, row.delta, row.std)]
        size = "-" if row.size is None else f"{row.size:,}"
        share = "-" if row.share is None else f"{row.share:.0%}"
        table.add_row(row.name, size, *cells, share, number(row.signal))
    return table


LEGEND = """\
values  how long the layer's output can be, for any record; - at weights of 0
grads   how long the gradient there can be, for any record
Δ       how long the parameter's gradient can be, for any record
noise   its standard deviation, on the sum of a batch
budget  the part of the noise budget that the parameter uses
ratio   the most that B records can weigh, divided by the noise"""
