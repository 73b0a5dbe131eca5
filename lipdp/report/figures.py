"""The figures of a report: matplotlib's, as SVG that takes its colours and its letters from the page.

Colours are drawn as markers that become CSS variables, so that the page's light and dark colours, and those of a
printer, hold in the figures. Texts stay texts. Nothing that comes out of a run's folder is read as mathematics by
matplotlib.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
from cycler import cycler
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from lipdp.comparison.calibration import Calibration, reliability_diagram
from lipdp.report.comparison import ComparisonRow
from lipdp.report.reading import RecordedRun

_SERIES = [f"#0a00{i:02x}" for i in range(8)]
_MARKS = {"#0b0001": "ink", "#0b0002": "line", "#000000": "ink", "#ffffff": "paper"} | {
    colour: f"series-{i}" for i, colour in enumerate(_SERIES)
}
_INK, _LINE = "#0b0001", "#0b0002"
_STYLES = ("-", "--", "-.", ":")
_MARKERS = "os^Dv"
_RC: Any = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 12,
    "axes.titlesize": 12,
    "legend.fontsize": 11,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _LINE,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor"), _INK),
    "axes.prop_cycle": cycler(color=_SERIES),
}
_SIZE = (4.8, 3.1)
_MOST_BARS = 24

Labelled = Sequence[tuple[str, RecordedRun]]


def budget(runs: Labelled) -> Markup | None:
    """ε spent against the step; None where no run has a record."""
    lines = [
        (label, [(0.0, 0.0), *((record.step, record.epsilon) for record in run.metrics)])
        for label, run in runs
        if run.metrics
    ]
    if not lines:
        return None
    ends = "; ".join(f"{_of(label)}{points[-1][1]:.3g} after {points[-1][0]} steps" for label, points in lines)
    return _lines(lines, "step", "ε spent", key="budget", text=f"ε spent against the training step: {ends}.")


def score(runs: Labelled) -> Markup | None:
    """Score on the test records against the step, of the last and of the averaged weights."""
    lines = []
    for label, run in runs:
        for averaged, what in ((False, "last weights"), (True, "averaged weights")):
            scores = [(record.step, record.score(run.metric, averaged=averaged)) for record in run.metrics]
            points = [(step, 100 * score) for step, score in scores if score is not None]
            if points:
                lines.append((_of(label) + what, points))
    if not lines:
        return None
    metric = runs[0][1].metric.replace("auroc", "AUROC")
    ends = "; ".join(f"{label} {points[-1][1]:.1f} %" for label, points in lines)
    return _lines(
        lines, "step", f"test {metric}, %", key="score", text=f"Test {metric} against the step, at the end: {ends}."
    )


def roc(run: RecordedRun, *, key: str) -> Markup | None:
    """True-positive against false-positive rate on the test records, of the last and of the averaged weights."""
    found = run.evaluation
    curves = [] if found is None else [("last weights", found.model.roc), ("averaged weights", found.ema.roc)]
    known = [(what, one) for what, one in curves if one is not None and one.false_positive]
    if not known:
        return None
    with _drawn():
        figure, axes = _axes("false positives, % of the negative records", "true positives, % of the positive")
        for i, (what, one) in enumerate(known):
            xs, ys = ([100 * rate for rate in rates] for rates in (one.false_positive, one.true_positive))
            axes.plot(xs, ys, linestyle=_STYLES[i], label=what, color=_SERIES[i])
        axes.plot([0, 100], [0, 100], color=_LINE, linewidth=1.0, label="a coin")
        axes.set_xlim(0, 100)
        axes.set_ylim(0, 100)
        axes.legend(loc="lower right")
        text = "ROC curve: records of the positive class found against false alarms, at every threshold."
        return _inline(figure, key=key, text=text)


def reliability(found: Calibration, *, key: str) -> Markup:
    """`reliability_diagram`."""
    with _drawn():
        figure = reliability_diagram(found)
        figure.axes[0].set_title("")
        figure.set_size_inches(4.8, 5.2)
        text = (
            f"Reliability diagram: accuracy against confidence in {len(found.bins)} bins. Mean confidence"
            f" {found.confidence:.1%}, accuracy {found.accuracy:.1%}, expected calibration error {found.ece:.3f}."
        )
        return _inline(figure, key=key, text=text)


def robustness(runs: Labelled) -> Markup | None:
    """Certified accuracy against the radius, and what an attack leaves."""
    found = [(label, run.robustness) for label, run in runs if run.robustness is not None]
    if not found:
        return None
    with _drawn():
        figure, axes = _axes(found[0][1].unit or "L2 radius, units of the raw input", "accuracy, %")
        for i, (label, one) in enumerate(found):
            prefix, colour = _of(label), _SERIES[i % len(_SERIES)]
            accuracies = [100 * a for a in one.curve.certified_accuracy]
            axes.plot(one.curve.radii, accuracies, color=colour, label=f"{prefix}certified")
            if one.attacked_accuracy is not None:
                points = sorted([(0.0, one.accuracy), *zip(one.radii, one.attacked_accuracy, strict=True)])
                xs, ys = zip(*points, strict=True)
                axes.plot(xs, [100 * y for y in ys], "--", marker="o", color=colour, label=f"{prefix}under attack")
        axes.set_ylim(0, 100)
        axes.set_xlim(left=0)
        axes.legend()
        ends = "; ".join(
            f"{_of(label)}{100 * a:.1f} % at radius {r:.3g}"
            for label, one in found
            for r, a in zip(one.radii, one.certified_accuracy, strict=True)
        )
        return _inline(figure, key="robustness", text=f"Certified accuracy against the radius: {ends}.")


def signal(names: Sequence[str], values: Sequence[float], *, key: str) -> Markup | None:
    """The largest possible gradient-to-noise ratio of every parameter, as bars."""
    if not names or len(names) > _MOST_BARS or min(values) <= 0:
        return None
    with _drawn():
        figure = Figure(figsize=(4.8, 0.8 + 0.3 * len(names)), layout="constrained")
        axes = figure.subplots()
        axes.barh(range(len(names)), values)
        axes.set_yticks(range(len(names)), [_plain(name, 22) for name in names])
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("largest possible gradient / noise")
        listed = "; ".join(f"{name} {value:.3g}" for name, value in zip(names, values, strict=True))
        return _inline(figure, key=key, text=f"Largest possible gradient-to-noise ratio: {listed}.")


def utility(rows: Sequence[ComparisonRow]) -> Markup | None:
    """Score against the budget, a line for each trainer and model."""
    scored = [row for row in rows if row.mean is not None and row.epsilon is not None]
    series: dict[str, list[tuple[float, float]]] = {}
    for row in scored:
        label = _plain(f"{row.trainer}, {row.model}", 40)
        series.setdefault(label, []).append((row.epsilon or 0.0, 100 * (row.mean or 0.0)))
    if not series or len({row.dataset for row in scored}) > 1 or len(series) > 16:
        return None

    def finish(axes: Axes) -> None:
        if min(x for points in series.values() for x, _ in points) > 0:
            axes.set_xscale("log")
            axes.xaxis.set_minor_locator(NullLocator())
            budgets = sorted({x for points in series.values() for x, _ in points})
            axes.set_xticks(budgets, [f"{x:g}" for x in budgets])  # the default labels would be mathematics
        axes.legend(
            fontsize=10.5,
            loc="upper center",
            bbox_to_anchor=(0.5, -0.18),
            ncols=1 if len(series) < 5 else 2,
            columnspacing=1.0,
            handlelength=1.5,
        )

    best = max(scored, key=lambda row: row.mean or 0.0)
    text = f"Test {best.metric} against ε for {len(series)} trainers; the best is {best.trainer} with {best.mean:.1%}."
    lines = [(label, sorted(points)) for label, points in series.items()]
    return _lines(lines, "ε", f"test {best.metric}, %", key="utility", text=text, finish=finish, size=(4.8, 4.6))


def _lines(
    lines: Sequence[tuple[str, Sequence[tuple[float, float]]]],
    x: str,
    y: str,
    *,
    key: str,
    text: str,
    finish: Callable[[Axes], None] | None = None,
    size: tuple[float, float] = _SIZE,
) -> Markup:
    with _drawn():
        figure, axes = _axes(x, y, size=size)
        for i, (label, points) in enumerate(lines):
            style, marker = _STYLES[i % len(_STYLES)], _MARKERS[i % len(_MARKERS)]
            xs, ys = zip(*points, strict=True)
            axes.plot(xs, ys, linestyle=style, marker=marker, label=label or "_", color=_SERIES[i % len(_SERIES)])
        if finish is not None:
            finish(axes)
        elif len(lines) > 1:
            axes.legend()
        return _inline(figure, key=key, text=text)


def _axes(x: str, y: str, *, size: tuple[float, float] = _SIZE) -> tuple[Figure, Axes]:
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    return figure, axes


@contextmanager
def _drawn() -> Iterator[None]:
    with matplotlib.rc_context(_RC):
        yield


def _inline(figure: Figure, *, key: str, text: str) -> Markup:
    """The figure as an SVG element for the page, described by `text`; `key` keeps its ids apart from other figures'."""
    stream = io.StringIO()
    figure.savefig(
        stream, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
    )
    svg = stream.getvalue()
    head, body = re.match(r"(?s).*?<svg([^>]*)>(.*)", svg).groups()  # type: ignore[union-attr]
    box = re.search(r'viewBox="([\d. ]+)"', head).group(1)  # type: ignore[union-attr]
    body = re.sub(r"(?s)<style[^>]*>.*?</style>", "", body)
    body = re.sub(r'(\sid="|href="#|url\(#)', rf"\g<1>{key}-", body)
    body = re.sub(r"#[0-9a-f]{6}\b", lambda found: _colour(found.group()), body)
    body = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", body)
    return Markup('<svg role="img" aria-label="{}" viewBox="{}">').format(text, box) + Markup(body)


def _colour(colour: str) -> str:
    return f"var(--{_MARKS[colour]})" if colour in _MARKS else colour


def _of(label: str) -> str:
    return f"{label}: " if label else ""


def _plain(text: str, longest: int) -> str:
    """Text that every font has letters for, and that fits."""
    kept = text.encode("ascii", "replace").decode()
    kept = "".join(letter if letter.isprintable() else "?" for letter in kept)
    return kept if len(kept) <= longest else f"{kept[: longest - 3]}..."
