"""What `lipdp compare` found, from its `results.json`."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median, stdev

from lipdp.report.reading import Count, Positive, Share, read


@dataclass(frozen=True)
class ComparisonRow:
    """A trainer on a model: mean and spread of a score over seeds at one budget, or the time of a step.

    Attributes:
        epsilon: the budget; None without privacy, and where time was measured.
        metric: "accuracy" or "auroc"; None where time was measured.
        spread: the standard deviation over `runs` seeds (n − 1).
        seconds, peak_bytes: of a step, median over the cells.
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


@dataclass(frozen=True)
class _Cell:
    """One measurement."""

    model: str
    trainer: str
    dataset: str = ""
    target_epsilon: Positive | None = None
    epsilon: Positive | None = None
    accuracy: Share | None = None
    auroc: Share | None = None
    batch_size: Count | None = None
    views: Count = 1
    step_seconds: Positive | None = None
    peak_bytes: Positive | None = None

    @property
    def score(self) -> float | None:
        return self.accuracy if self.auroc is None else self.auroc

    def row(self) -> ComparisonRow:
        """Without its figures: equal for the cells that belong together."""
        if self.score is None:
            trainer = f"{self.trainer}, {self.views} views" if self.views > 1 else self.trainer
            return ComparisonRow(self.dataset, self.model, trainer, batch_size=self.batch_size)
        metric = "accuracy" if self.auroc is None else "auroc"
        budget = self.epsilon if self.target_epsilon is None else self.target_epsilon
        return ComparisonRow(self.dataset, self.model, self.trainer, budget, metric)


def read_comparison(folder: str | os.PathLike[str]) -> tuple[ComparisonRow, ...]:
    """The rows of a comparison's folder, those with scores by data set, budget and score."""
    groups: dict[ComparisonRow, list[_Cell]] = {}
    for cell in read(Path(folder).expanduser() / "results.json", tuple[_Cell, ...]):
        groups.setdefault(cell.row(), []).append(cell)
    return tuple(sorted((_measured(row, cells) for row, cells in groups.items()), key=_order))


def _measured(row: ComparisonRow, cells: list[_Cell]) -> ComparisonRow:
    scores = [cell.score for cell in cells if cell.score is not None]
    if scores:
        spread = stdev(scores) if len(scores) > 1 else None
        return replace(row, mean=fmean(scores), spread=spread, runs=len(scores))
    seconds, peaks = _median(cell.step_seconds for cell in cells), _median(cell.peak_bytes for cell in cells)
    return replace(row, seconds=seconds, peak_bytes=peaks)


def _median(values: Iterable[float | None]) -> float | None:
    measured = [value for value in values if value is not None]
    return median(measured) if measured else None


def _order(row: ComparisonRow) -> tuple[str, bool, float, float, int, float]:
    epsilon = float("inf") if row.epsilon is None else row.epsilon
    return (row.dataset, row.metric is None, epsilon, -(row.mean or 0.0), row.batch_size or 0, row.seconds or 0.0)
