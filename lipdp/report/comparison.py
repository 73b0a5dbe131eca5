"""What `lipdp compare` found, from its `results.json`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median, stdev

from lipdp.errors import CheckpointError
from lipdp.report.reading import Fields, parse, read_text


@dataclass(frozen=True)
class ComparisonRow:
    """A trainer on a model: mean and spread of a score over seeds at one budget, or the time of a step.

    Attributes:
        dataset, model, trainer: of the cells.
        epsilon: the budget; None without privacy, and where time was measured.
        metric: "accuracy" or "auroc"; None where time was measured.
        mean, spread, runs: of the score over seeds; the spread is the standard deviation (n − 1).
        batch_size, seconds, peak_bytes: of a step, median over the cells.
    """

    dataset: str
    model: str
    trainer: str
    epsilon: float | None = None
    metric: str | None = None
    mean: float | None = None
    spread: float | None = None
    runs: int = 0
    batch_size: int | None = None
    seconds: float | None = None
    peak_bytes: float | None = None


def read_comparison(folder: str | os.PathLike[str]) -> tuple[ComparisonRow, ...]:
    """The rows of a comparison's folder, those with scores by data set, budget and score.

    Raises:
        CheckpointError: it holds no comparison, or a damaged one.
    """
    path = Path(folder).expanduser() / "results.json"
    if not path.exists():
        raise CheckpointError(f"{folder} has no results.json: give the folder that lipdp compare wrote (its --out)")
    cells = parse(read_text(path), path)
    if not isinstance(cells, list):
        raise CheckpointError(f"{path} is damaged: a list is needed")
    groups: dict[tuple[str, str, str, float | None, str | None, int | None], list[Fields]] = {}
    for number, cell in enumerate(cells, start=1):
        fields = Fields(f"{path}, cell {number}", cell)
        metric = next((name for name in ("auroc", "accuracy") if fields.get(name) is not None), None)
        budget = fields.number("target_epsilon", fields.number("epsilon", None)) if metric else None
        batch = None if metric else fields.count("batch_size", None)
        key = (fields.text("dataset", ""), fields.text("model"), fields.text("trainer"), budget, metric, batch)
        groups.setdefault(key, []).append(fields)
    return tuple(sorted((_row(key, group) for key, group in groups.items()), key=_order))


def _row(key: tuple[str, str, str, float | None, str | None, int | None], cells: list[Fields]) -> ComparisonRow:
    dataset, model, trainer, epsilon, metric, batch = key
    if metric:
        scores = [cell.number(metric, high=1.0) for cell in cells]
        spread = stdev(scores) if len(scores) > 1 else None
        return ComparisonRow(dataset, model, trainer, epsilon, metric, fmean(scores), spread, len(scores))
    seconds, peaks = ([cell.number(n, None) for cell in cells] for n in ("step_seconds", "peak_bytes"))
    return ComparisonRow(dataset, model, trainer, batch_size=batch, seconds=_median(seconds), peak_bytes=_median(peaks))


def _median(values: list[float | None]) -> float | None:
    measured = [value for value in values if value is not None]
    return median(measured) if measured else None


def _order(row: ComparisonRow) -> tuple[str, bool, float, float, int, float]:
    epsilon = float("inf") if row.epsilon is None else row.epsilon
    return (
        row.dataset,
        row.metric is None,
        epsilon,
        -(row.mean or 0.0),
        row.batch_size or 0,
        row.seconds or 0.0,
    )
