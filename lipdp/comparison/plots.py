"""The pictures of a comparison: step time, peak memory, accuracy against ε, and robustness against accuracy."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lipdp.comparison.results import Cell, Results

_MARKERS = "osD^vP*X<>h"


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
    _mark_front(axes, pareto([(c["target_epsilon"], c["mean"]) for c in summary if c["target_epsilon"] is not None]))
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


def front(cells: Sequence[Cell], number: int = 0) -> list[Cell]:
    """The cells no other beats in accuracy and in certified accuracy at radius `number`, from accurate to robust."""
    points = pareto([(-cell["accuracy"], cell["certified_accuracy"][number]) for cell in cells])
    return [next(c for c in cells if (-c["accuracy"], c["certified_accuracy"][number]) == point) for point in points]


def robustness_figure(results: Results, number: int = 0) -> Figure:
    """Certified accuracy at radius `number` against accuracy, a line per trainer and model along τ.

    Thick: the Pareto front of the private cells (of all, where none is).
    """
    cells = results.cells
    radius = cells[0]["radii"][number]
    figure, axes = _axes("test accuracy", f"certified accuracy at radius {radius:.3g}", linear=True)
    for i, (trainer, model) in enumerate(dict.fromkeys((c["trainer"], c["model"]) for c in cells)):
        mine = sorted(results.find(trainer=trainer, model=model), key=lambda cell: cell["tau"])
        xs, ys = [c["accuracy"] for c in mine], [c["certified_accuracy"][number] for c in mine]
        budget = "no privacy" if mine[0]["epsilon"] is None else f"ε = {mine[0]['epsilon']:.3g}"
        axes.plot(xs, ys, marker=_MARKERS[i % len(_MARKERS)], linewidth=1, label=f"{trainer}, {model}, {budget}")
        for cell, x, y in zip(mine, xs, ys, strict=True):
            axes.annotate(f"τ={cell['tau']:g}", (x, y), textcoords="offset points", xytext=(4, 4), fontsize=7)
    best = front([cell for cell in cells if cell["epsilon"] is not None] or cells, number)
    _mark_front(axes, [(c["accuracy"], c["certified_accuracy"][number]) for c in best])
    return _finished(figure, axes, f"Robustness and accuracy: {cells[0]['dataset']}, along the temperature τ")


def _mark_front(axes: Axes, points: Sequence[tuple[float, float]]) -> None:
    axes.plot(*zip(*points, strict=True), color="black", linewidth=3, alpha=0.25, zorder=0, label="Pareto front")


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
