"""The pictures of a comparison: step time, peak memory, and accuracy against ε, each as PNG and SVG."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lipdp.comparison.results import Cell, Results
from lipdp.files import write_figure

_MARKERS = "osD^vP*X<>h"


def save(figure: Figure, folder: Path, name: str) -> list[Path]:
    """`name.png` and `name.svg`, each written whole."""
    paths = [folder / f"{name}.{kind}" for kind in ("png", "svg")]
    for path in paths:
        write_figure(figure, path)
    return paths


def speed_figure(results: Results) -> Figure:
    """Seconds per step against the expected batch size, a line for each trainer and model."""
    figure, axes = _axes("expected batch size B", "seconds per step")
    _lines(axes, results, "batch_size", lambda cell: cell.get("step_seconds"))
    return _finished(figure, axes, "Time of one step (median of interleaved repetitions)")


def memory_figure(results: Results) -> Figure:
    """Peak memory against the expected batch size; a line ends where its trainer runs out."""
    figure, axes = _axes("expected batch size B", "peak memory, GiB")
    _lines(axes, results, "batch_size", lambda cell: cell["peak_bytes"] / 2**30 if "peak_bytes" in cell else None)
    return _finished(figure, axes, "Peak memory of the process")


def utility_figure(summary: Sequence[Cell]) -> Figure:
    """Mean and spread of the score against ε; dashed: without privacy. The thick line is the Pareto front."""
    metric = summary[0]["metric"]
    figure, axes = _axes("ε", f"test {metric}", linear=True)
    axes.set_xscale("log")
    keys = dict.fromkeys((cell["trainer"], cell["model"]) for cell in summary)
    for number, (trainer, model) in enumerate(keys):
        cells = [c for c in summary if (c["trainer"], c["model"]) == (trainer, model)]
        color, label = f"C{number % 10}", f"{trainer}, {model}"
        if cells[0]["target_epsilon"] is None:
            axes.axhline(cells[0]["mean"], linestyle="--", linewidth=1, color=color, label=label)
            continue
        cells.sort(key=lambda cell: cell["target_epsilon"])
        xs, ys = [c["target_epsilon"] for c in cells], [c["mean"] for c in cells]
        spread = [c["spread"] or 0.0 for c in cells]
        marker = _MARKERS[number % len(_MARKERS)]
        axes.errorbar(xs, ys, spread, marker=marker, linewidth=1, capsize=2, color=color, label=label)
    front = pareto([(c["target_epsilon"], c["mean"]) for c in summary if c["target_epsilon"] is not None])
    axes.plot(*zip(*front, strict=True), color="black", linewidth=3, alpha=0.25, zorder=0, label="Pareto front")
    return _finished(figure, axes, f"Privacy and utility: {summary[0]['dataset']}")


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other beats: no larger score at the same or a smaller ε.

    >>> pareto([(1.0, 0.7), (1.0, 0.9), (2.0, 0.8), (3.0, 0.95)])
    [(1.0, 0.9), (3.0, 0.95)]
    """
    front: list[tuple[float, float]] = []
    for epsilon, score in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or score > front[-1][1]:
            front.append((epsilon, score))
    return front


def _axes(x: str, y: str, *, linear: bool = False) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(8, 5))
    axes = figure.subplots()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if not linear:
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
    axes.grid(alpha=0.3)
    return figure, axes


def _lines(axes: Axes, results: Results, x: str, y: Callable[[Cell], float | None]) -> None:
    keys = dict.fromkeys((cell["trainer"], cell["model"], cell["views"]) for cell in results.cells)
    for number, (trainer, model, views) in enumerate(keys):
        points = [(cell[x], y(cell)) for cell in results.find(trainer=trainer, model=model, views=views)]
        measured = sorted((a, b) for a, b in points if b is not None)
        if measured:
            marker = _MARKERS[number % len(_MARKERS)]
            style = "--" if model.endswith("-twin") else "-"
            label = f"{trainer}, {model}" + (f", {views} views" if views > 1 else "")
            axes.plot(*zip(*measured, strict=True), marker=marker, linestyle=style, label=label)


def _finished(figure: Figure, axes: Axes, title: str) -> Figure:
    axes.set_title(title)
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure
