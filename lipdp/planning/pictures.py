"""The two pictures of a plan, and those of a simulation; figures that belong to no window."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from lipdp.planning.tan import SWEET_SPOT, WALL

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from lipdp.planning.budget import Plan


def epsilon_against_noise(plan: Plan) -> Figure:
    """Exact ε against σ at the plan's η and T: flat in the sweet spot, exploding behind the wall; ε_TAN beside it."""
    figure, axes = _axes()
    noises, epsilons = zip(*plan.constant_eta, strict=True)
    chosen = plan.chosen
    axes.axvspan(min(noises) / 1.1, WALL, color="C3", alpha=0.12, label=f"noise wall, σ < {WALL:g}")
    axes.axvspan(*SWEET_SPOT, color="C2", alpha=0.12, label=f"sweet spot, {SWEET_SPOT[0]:g} ≤ σ ≤ {SWEET_SPOT[1]:g}")
    axes.plot(noises, epsilons, "o-", color="C0", markersize=4, label="exact ε")
    axes.axhline(chosen.tan_epsilon, color="C1", linestyle="--", label="ε_TAN = η² + 2η√ln(1/δ)")
    axes.plot([chosen.noise_multiplier], [chosen.epsilon], "*", color="black", markersize=12, label="the plan")
    axes.set(
        xscale="log",
        yscale="log",
        xlim=(min(noises) / 1.1, max(max(noises), chosen.noise_multiplier) * 1.1),
        xlabel="noise multiplier σ (batch B ∝ σ)",
        ylabel=f"ε at δ = {chosen.delta:g}",
        title=f"ε at constant η = {chosen.eta:.3f}, T = {chosen.steps:,}",
    )
    _plain_ticks(axes)
    axes.legend(fontsize="small")
    return figure


def batch_against_compute(plan: Plan) -> Figure:
    """B against B·T at constant ε: the points accounted exactly at the plan's T, and what other T cost at a given σ.

    At given σ, with the exact η there, B = 2 N² η² σ² / (BT).
    """
    figure, axes = _axes()
    points = plan.iso_budget
    compute, batches = [p.samples for p in points], [p.expected_batch_size for p in points]
    axes.plot(compute, batches, "o-", color="C0", markersize=4, label=f"T = {plan.chosen.steps:,}")
    for point in points:
        text, at = f"σ = {point.noise_multiplier:.2g}", (point.samples, point.expected_batch_size)
        axes.annotate(text, at, textcoords="offset points", xytext=(5, -9), fontsize="x-small")
        strength = 2.0 * (point.dataset_size * point.eta * point.noise_multiplier) ** 2
        line = [c for c in np.geomspace(compute[0] / 2.0, compute[-1] * 2.0, 60) if strength / c <= point.dataset_size]
        axes.plot(line, [strength / c for c in line], color="C7", linewidth=0.8, alpha=0.7)
    axes.plot([], [], color="C7", linewidth=0.8, label="other T, σ as at the crossing")
    chosen = plan.chosen
    axes.plot([chosen.samples], [chosen.expected_batch_size], "*", color="black", markersize=12, label="the plan")
    if plan.max_samples is not None:
        axes.axvline(plan.max_samples, color="C3", linestyle=":", label="compute limit")
    axes.set(
        xscale="log",
        yscale="log",
        ylim=(points[0].expected_batch_size / 2.0, chosen.dataset_size * 1.1),
        xlabel="compute B·T, records processed",
        ylabel="expected batch size B",
        title=f"ε ≤ {plan.budget.epsilon:g} at δ = {chosen.delta:g}, N = {chosen.dataset_size:,}",
    )
    axes.legend(fontsize="small", loc="lower right")
    return figure


def loss_curves(curves: Mapping[str, Sequence[tuple[int, float]]], *, title: str) -> Figure:
    """Draw training loss against step, a line per name. The losses are not private."""
    figure, axes = _axes()
    for name, curve in curves.items():
        axes.plot(*zip(*curve, strict=True), label=name, linewidth=1.2)
    axes.set(xlabel="step", ylabel="training loss (not private)", title=title)
    axes.legend(fontsize="small")
    return figure


def accuracy_against_rate(curves: Mapping[str, Sequence[tuple[float, float]]], *, title: str) -> Figure:
    """Draw accuracy against learning rate, a line per name."""
    figure, axes = _axes()
    for name, curve in curves.items():
        axes.plot(*zip(*sorted(curve), strict=True), "o-", label=name, linewidth=1.2, markersize=4)
    axes.set(xscale="log", xlabel="learning rate", ylabel="accuracy", title=title)
    axes.legend(fontsize="small")
    return figure


def _axes() -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.4), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.grid(alpha=0.3)
    return figure, axes


def _plain_ticks(axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axes.set_xticks([0.3, 0.5, 1, 2, 3, 4, 8])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
