"""How a run looks: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import shlex
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from lipdp import __version__
from lipdp.accounting.plan import PrivacyPlan, in_bands
from lipdp.commands.console import LEGEND, number, parameter_table, plain_table
from lipdp.data import DataSplit, Schema, SignedLog, number_of_units
from lipdp.report.parameters import parameter_rows
from lipdp.training import TrainConfig, Trainer
from lipdp.training.assembly import bounding_of, plan_of
from lipdp.training.config import SETTINGS
from lipdp.training.monitor import Monitor, Result

_SAMPLINGS = {"poisson": "Poisson batches", "fixed_size": "fixed-size batches"}


class Screen(Monitor):
    """What is decided before the first step, then a line a record; on a terminal also a bar, with the time left."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._shown = False
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=18),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(compact=True),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task: TaskID | None = None

    def __enter__(self) -> Screen:
        return self

    def __exit__(self, *ended: object) -> None:
        """Take the bar down."""
        self._bar.stop()

    def opened(self, config: TrainConfig, split: DataSplit) -> None:
        """Where features are to be computed, which takes time: what the run will spend."""
        if config.features is not None:
            config = config.resolve(number_of_units(split), binary=split.task == "binary")
            show_plan(self.console, config, split, plan_of(config, split))
            self._shown = True

    def features(self, done: int, total: int) -> None:
        """A bar of their own, or a line when they are there."""
        if self._task is None:
            self._bar.start()
            self._task = self._bar.add_task("features", total=total, figures="")
        self._bar.update(self._task, completed=done)
        if done == total:
            self._bar.remove_task(self._task)
            self._task = None
            if not self.console.is_terminal:
                self.console.print(f"features of {total:,} records ready")

    def begin(self, trainer: Trainer) -> None:
        """Relation, q, T, B, σ, predicted ε, the table of parameters, and the bar."""
        self._bar.stop()
        if not self._shown:
            show_plan(self.console, trainer.config, trainer.split, trainer.engine.plan)
        show_parameters(self.console, trainer)
        self._bar.start()
        self._task = self._bar.add_task("step", total=trainer.total_steps, completed=trainer.step, figures="")

    def step(self, step: int, loss: float, epsilon: float) -> None:
        """Move the bar."""
        if self._task is not None:
            bound = math.ceil(1000 * epsilon) / 1000
            self._bar.update(self._task, completed=step, figures=f"loss* {loss:.4f}  ε ≤ {bound:.3f}")

    def record(self, record: dict[str, Any]) -> None:
        """One line."""
        self.console.print(describe(record))


def show_plan(console: Console, config: TrainConfig, split: DataSplit, plan: PrivacyPlan) -> None:
    """What is known of a run as soon as its data are open: whom it protects, and what it will spend."""
    features = f" on {config.features} features" if config.features else ""
    _show_lines(
        console,
        {
            f"lipdp {__version__}": f"{config.dataset}, {config.model}{features}",
            "inputs": _inputs(config, split),
            "protects": f"each of {plan.dataset_size:,} {plan.unit}s ({plan.relation.words} {plan.unit})",
            "batches": f"T = {plan.steps} steps, B = {plan.expected_batch_size}, q = {plan.sampling_rate:.4g}"
            f"{in_bands(plan.bands, plan.truncated_batch_size)} ({_SAMPLINGS[plan.sampling]})",
            **_measurements(plan),
            "budget": f"ε = {plan.predicted.epsilon:.4g} at δ = {plan.predicted.delta:g} after all steps"
            f" ({plan.predicted.accountant})",
        },
    )
    if config.schema is not None:
        console.print(schema_table(Schema.of(config.schema)))


def show_parameters(console: Console, trainer: Trainer) -> None:
    """On what the run will spend its budget, before its first step."""
    plan = trainer.engine.plan
    sizes = {name: p.numel() for name, p in trainer.model.named_parameters() if p.requires_grad}
    bounds, stds = trainer.engine.sensitivity(), trainer.engine.noise_stds()
    rows = parameter_rows(bounds, stds, sizes, batch_size=trainer.batch_size, nodes=bounds.nodes)
    lines = {
        "model": f"{sum(sizes.values()):,} weights, {trainer.device}",
        "noise": f"σ = {plan.noise_multiplier:.4g} ({plan.allocation}); {trainer.criterion.loss}, {_gate(trainer)}",
    }
    if signals := trainer.engine.signals:
        weakest = min(signals, key=lambda name: signals[name])
        lines["learning"] = f"all steps' signal over their noise: {number(signals[weakest])} or more ({weakest})"
    _show_lines(console, lines)
    if trainer.engine.advice:
        console.print(f"[yellow]{trainer.engine.advice}[/yellow]")
    if plan.seeded:
        console.print("[yellow]seeded: the noise can be repeated, so this run is NOT private[/yellow]")
    console.print()
    console.print(parameter_table(rows))
    console.print(f"[dim]{LEGEND}[/dim]\n")
    if trainer.step:
        console.print(f"resumed after step {trainer.step}")


def _inputs(config: TrainConfig, split: DataSplit) -> str:
    """The public map of the inputs, and what would be better where the columns' ranges are not known."""
    if config.schema is not None:
        schema = Schema.of(config.schema)
        bounded = "in [−1, 1] by public ranges" if schema.is_bounded else "ranges measured privately"
        return f"{len(schema.inputs)} numbers of {len(schema.columns)} columns, {bounded}"
    bounding = bounding_of(config, split)
    text = f"{'×'.join(map(str, split.input_shape))}, mapped by {bounding}"
    if isinstance(bounding, SignedLog):
        text += "; if you know the columns' ranges: --bounding rescale --bounding-option lower=... upper=..."
    return text


_COLUMNS = 40
"""Columns of a schema that are shown."""


def schema_table(schema: Schema) -> Table:
    """The map of the columns."""
    table = plain_table("column", "is", "inputs", left=2)
    lines = schema.lines()
    for name, text, inputs in lines[:_COLUMNS]:
        table.add_row(escape(name), escape(text), str(inputs or ""))
    if len(lines) > _COLUMNS:
        table.add_row("…", f"{len(lines) - _COLUMNS} further columns", "")
    return table


def _measurements(plan: PrivacyPlan) -> dict[str, str]:
    """What is released beside the steps, if anything is."""
    measured = ", ".join(f"{m.name} at σ = {m.noise_multiplier:.4g}" for m in plan.measurements)
    return {"measures": f"{measured}, of all records, in the same ε"} if measured else {}


def show_settings(console: Console, config: TrainConfig) -> None:
    """Every setting that has a value, a line for each panel of the help."""
    panels: dict[str, list[str]] = {}
    for name, value in {**config.as_dict(), "schema": "see above" if config.schema else None}.items():
        if value not in (None, {}, False):
            panels.setdefault(SETTINGS[name].panel, []).append(f"{name} = {value}")
    for panel, values in panels.items():
        console.print(f"[bold]{panel}[/bold]: {', '.join(values)}")


def _show_lines(console: Console, lines: dict[str, str]) -> None:
    for name, text in lines.items():
        console.print(f"[bold]{name:<11}[/bold] {text}")


def _gate(trainer: Trainer) -> str:
    config = trainer.config
    bound = number(config.gate or trainer.criterion.loss.lipschitz)
    return f"gate {bound}" if config.gate_quantile is None else f"gate from {bound} to quantile {config.gate_quantile}"


def show_profile(console: Console, table: dict[str, Any]) -> None:
    """The parts of a step, the longest first."""
    first, last = table["steps"]
    processor = "processor_seconds" in table["parts"]["other"]
    rows = plain_table(f"steps {first} to {last}", "ms", "share", *(["cpu ms"] if processor else []))
    for name, part in sorted(table["parts"].items(), key=lambda item: -item[1]["seconds"]):
        own = [f"{1e3 * part['processor_seconds']:.2f}"] if processor else []
        rows.add_row(name, f"{1e3 * part['seconds']:.2f}", f"{part['share']:.1%}", *own)
    total = sum(part.get("processor_seconds", 0.0) for part in table["parts"].values())
    rows.add_row(
        "step", f"{1e3 * table['step_seconds']:.2f}", "", f"{1e3 * total:.2f}" if processor else None, style="bold"
    )
    load = "" if table["load"] is None else f", load {table['load'][0]:.1f}"
    console.print()
    console.print(rows)
    console.print(f"[dim]{table['device']}, {table['threads']} threads{load}[/dim]")


def describe(record: dict[str, Any]) -> str:
    """One line of metrics."""
    name = "auroc" if "test_auroc" in record else "accuracy"
    raw, averaged = (share(record[f"test_{name}{suffix}"]) for suffix in ("", "_ema"))
    loss = record["train_loss_not_private"]
    return (
        f"step {record['step']:>5}  ε {record['epsilon']:.3f}  test {name} {raw:>6}, averaged {averaged:>6}"
        f"  loss* {'none' if loss is None else f'{loss:.4f}'}"
    )


def share(value: float | None) -> str:
    """A metric in percent; a metric may be null.

    >>> share(0.51234), share(None)
    ('51.23%', 'none')
    """
    return "none" if value is None else f"{value:.2%}"


def _balance(metrics: dict[str, Any]) -> str:
    """What accuracy hides where one class is rare, of the averaged weights."""
    names = ("accuracy", "base_rate", "average_precision", "recall", "specificity")
    found = {name: metrics[f"test_{name}_ema"] for name in names}
    base = found["base_rate"]
    return (
        f"{share(base)} of the test records are positive: one answer for all is right for"
        f" {share(None if base is None else max(base, 1 - base))}, the model for {share(found['accuracy'])};"
        f" average precision {share(found['average_precision'])}. It finds {share(found['recall'])} of the positive"
        f" records and lets {share(found['specificity'])} of the negative ones pass"
    )


def show_result(console: Console, result: Result) -> None:
    """The last lines: what was spent, what was reached, where it is."""
    metrics = result.metrics
    name = "auroc" if "test_auroc" in metrics else "accuracy"
    console.print(
        f"\n[bold]ε = {result.epsilon:.4g}[/bold] at δ = {result.delta:g} after {result.steps} steps;"
        f" test {name} [bold]{share(metrics[f'test_{name}'])}[/bold],"
        f" averaged weights [bold]{share(metrics[f'test_{name}_ema'])}[/bold]"
    )
    if "test_base_rate" in metrics:
        console.print(_balance(metrics))
    console.print(f"[dim]* training loss is not covered by ε; {number(metrics['seconds'])} s[/dim]")
    if result.folder is not None:
        console.print(f"[dim]written to {result.folder}[/dim]", soft_wrap=True)
        console.print(f"next: lipdp report {shlex.quote(str(result.folder))}", soft_wrap=True)
