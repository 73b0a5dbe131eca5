"""A privacy plan as a table for people: what was decided, and why."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lipdp.accounting.plan import PrivacyPlan

Row = tuple[str, str, str]
HEADER: Row = ("setting", "value", "why")


def plan_rows(plan: PrivacyPlan) -> list[Row]:
    """(setting, value, why) of everything that ε depends on."""
    units = f"{plan.unit}s"
    budget = plan.target_epsilon is not None and plan.target_delta is not None
    sampled = "each by itself with probability q" if plan.sampling == "poisson" else "B different ones, at random"
    rows = [
        ("dataset_size", f"{plan.dataset_size:,} {units}", "N, a public constant"),
        ("expected_batch_size", f"{plan.expected_batch_size:,}", f"B = q N; q = {plan.sampling_rate:.4g}"),
        ("steps", f"{plan.steps:,}", f"T; {plan.steps * plan.sampling_rate:.3g} passes over the data"),
        ("sampling", plan.sampling, f"{units} of a batch: {sampled}; so neighbours {plan.relation.words} {plan.unit}"),
        (
            "noise_multiplier",
            f"{plan.noise_multiplier:.4g}",
            f"σ: ε ≤ {plan.target_epsilon:g} at δ = {plan.target_delta:g} after all steps" if budget else "σ, as given",
        ),
        *(
            [("bands", str(plan.bands), "noise correlated over b steps; every record in 1/b of them")]
            * (plan.bands > 1)
        ),
        *(
            [("truncated_batch_size", f"{plan.truncated_batch_size:,}", "rows of a batch, the rest of them left empty")]
            if plan.truncated_batch_size is not None
            else []
        ),
        *((m.name, f"σ = {m.noise_multiplier:.4g}", "measured once, beside the steps") for m in plan.measurements),
    ]
    if plan.gate:
        rows.append(("gate", plan.gate, "of each record's gradient at the logits"))
    if plan.seeded:
        rows.append(("seeded", "yes", "whoever knows the seed can repeat the noise: NOT private"))
    return rows


def aligned(rows: Iterable[Sequence[str]]) -> str:
    """Rows as lines, columns aligned to the left.

    >>> print(aligned([("a", "1", "x"), ("long", "2", "")]))
    a     1  x
    long  2
    """
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)
