"""`lipdp plan`: from N, δ, ε and a compute limit to (B, σ, T)."""

from __future__ import annotations

import json
import shlex
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lipdp.commands.lazily import Entry, lazily
from lipdp.errors import ParameterError

if TYPE_CHECKING:
    from lipdp.planning.budget import Budget, Plan, Point
    from lipdp.planning.repetitions import Repetitions

EPILOG = """[bold]Examples[/bold]

[green]lipdp plan --records 50000 --epsilon 8 --delta 1e-5[/green]

[green]lipdp plan --records 60000 --epsilon 1 --delta 1e-5 --max-epochs 40 --dataset mnist --out PLAN[/green]

[green]lipdp plan --records 50000 --epsilon 8 --delta 1e-5 --steps 2500 --beside 4096,3,2500[/green]

[green]lipdp plan --records 50000 --epsilon 8 --delta 1e-5 --private-search geometric --repetitions 10[/green]

[green]lipdp plan simulate --help[/green]  (search hyper-parameters at a fraction of the compute)

[green]lipdp plan scale --help[/green]  (what a run costs in time and memory on W devices)

With --out DIR it writes plan.json, epsilon-against-noise.png and .svg, batch-against-compute.png and .svg."""

_COMMANDS = lazily(
    simulate=Entry("simulate", "simulate", "Search hyper-parameters by runs at B/k and σ/k (not private)."),
    scale=Entry(
        "scale",
        "scale",
        "Predict what a private run costs in time and memory on W devices, from a short measurement here.",
    ),
)
app = typer.Typer(cls=_COMMANDS, add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)


@app.callback(invoke_without_command=True, epilog=EPILOG)
def plan(
    context: typer.Context,
    records: Annotated[int | None, typer.Option(help="N, a public constant")] = None,
    epsilon: Annotated[float | None, typer.Option(help="the budget ε")] = None,
    delta: Annotated[float | None, typer.Option(help="δ (default 1e-5, or the power of ten below 1/N)")] = None,
    steps: Annotated[int | None, typer.Option(help="T (default at most 2500)")] = None,
    max_epochs: Annotated[float | None, typer.Option(help="compute limit, in passes over the data")] = None,
    max_samples: Annotated[int | None, typer.Option(help="compute limit B·T, in records processed")] = None,
    beside: Annotated[list[str] | None, typer.Option(help="B,σ,T to compare with; may be repeated")] = None,
    accountant: Annotated[str, typer.Option(help="what bounds ε: prv, pld, rdp")] = "prv",
    truncated_batch_size: Annotated[
        int | None, typer.Option(help="most records of a batch; every batch has so many rows, one shape for --compile")
    ] = None,
    private_search: Annotated[
        str | None, typer.Option(help="account for a private search: geometric, logarithmic, poisson, or a shape ≥ 0")
    ] = None,
    repetitions: Annotated[float | None, typer.Option(help="its mean number of runs")] = None,
    dataset: Annotated[str | None, typer.Option(help="named in the command that follows")] = None,
    out: Annotated[Path | None, typer.Option(help="write plan.json and the pictures there")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of tables")] = False,
) -> None:
    """Plan a private run: batch size, noise and steps for a budget, and what they cost."""
    if context.invoked_subcommand is not None:
        return
    if records is None or epsilon is None:
        raise ParameterError("give --records N and --epsilon ε (and --delta, --max-epochs or --max-samples)")

    from lipdp.accounting.plan import default_delta
    from lipdp.planning.budget import Budget
    from lipdp.planning.budget import plan as make

    search = _search(private_search, repetitions)
    budget = Budget(
        records, epsilon, default_delta(records) if delta is None else delta, accountant, truncated_batch_size
    )
    found = make(
        budget,
        steps=steps,
        max_samples=_limit(records, max_epochs, max_samples),
        beside=[_setting(b) for b in beside or ()],
    )
    appended: dict[str, Any] = {"command": train_command(found.chosen, budget, dataset)}
    if search is not None:
        appended["private_search"] = _search_cost(search, found)
    if out is not None:
        _write(out, found, found.as_dict() | appended)
    if as_json:
        typer.echo(json.dumps(found.as_dict() | appended, indent=2))
        return
    _show(found, appended, out)


def train_command(point: Point, budget: Budget, dataset: str | None) -> str:
    """The run of a point; σ follows there from ε, B and T."""
    epsilon, delta = (f"{x:g}" if float(f"{x:g}") == x else repr(x) for x in (budget.epsilon, point.delta))
    return (
        f"lipdp train --dataset {shlex.quote(dataset or 'DATASET')} --epsilon {epsilon} --delta {delta} "
        f"--batch-size {point.expected_batch_size} --steps {point.steps}"
        + ("" if budget.accountant == "prv" else f" --accountant {budget.accountant}")
        + ("" if point.truncated_batch_size is None else f" --truncated-batch-size {point.truncated_batch_size}")
    )


def _limit(records: int, max_epochs: float | None, max_samples: int | None) -> int | None:
    if max_epochs is None:
        return max_samples
    if max_samples is not None:
        raise ParameterError("--max-epochs and --max-samples were both given: one follows from the other; give one")
    if not 0 < max_epochs < 1e9:
        raise ParameterError(f"--max-epochs {max_epochs}: a number > 0 is needed")
    return max(1, int(max_epochs * records))


def _setting(text: str) -> tuple[int, float, int]:
    try:
        batch, sigma, steps = text.split(",")
        return int(batch), float(sigma), int(steps)
    except ValueError as error:
        raise ParameterError(f"--beside {text!r}: B,σ,T is needed, e.g. --beside 4096,3,2500") from error


def _search(law: str | None, repetitions: float | None) -> Repetitions | None:
    if law is None:
        if repetitions is not None:
            raise ParameterError("--repetitions goes with --private-search LAW, e.g. --private-search geometric")
        return None

    from lipdp.planning.repetitions import Repetitions

    shape: str | float = law
    with suppress(ValueError):
        shape = float(law)
    return Repetitions(shape, 10.0 if repetitions is None else repetitions)


def _search_cost(search: Repetitions, found: Plan) -> dict[str, Any]:
    chosen = found.chosen
    cost = search.epsilon(chosen.event, chosen.delta)
    sigma = search.calibrate(
        target_epsilon=found.budget.epsilon, sampling_rate=chosen.sampling_rate, steps=chosen.steps, delta=chosen.delta
    )
    return {
        "law": search.law,
        "mean": search.mean,
        "epsilon_at_plan": cost,
        "noise_multiplier_within_budget": sigma,
        "delta": chosen.delta,
        "source": "Papernot & Steinke 2022",
    }


def _write(out: Path, found: Plan, written: dict[str, Any]) -> None:
    from lipdp.files import write_json, write_pictures
    from lipdp.planning.pictures import batch_against_compute, epsilon_against_noise

    write_json(out / "plan.json", written)
    write_pictures(epsilon_against_noise(found), out / "epsilon-against-noise")
    write_pictures(batch_against_compute(found), out / "batch-against-compute")


def _show(found: Plan, appended: dict[str, Any], out: Path | None) -> None:
    from lipdp.accounting.plan import in_bands
    from lipdp.commands.console import plain_console, plain_table

    console, chosen, budget = plain_console(), found.chosen, found.budget
    limit = "" if found.max_samples is None else f", at most {found.max_samples:,} records processed"
    console.print(
        f"N = {budget.records:,}, ε ≤ {budget.epsilon:g} at δ = {budget.delta:g} (add or remove one record){limit}"
        f"{in_bands(1, budget.truncated_batch_size)}"
    )
    table = plain_table("", "B", "σ", "T", "η", "ε exact", "ε_TAN", "B/σ", "B·T", "epochs")
    for point in found.iso_budget:
        plan_here = point.expected_batch_size == chosen.expected_batch_size
        table.add_row("plan" if plan_here else "", *_cells(point), style="bold" if plan_here else None)
    for point in found.beside:
        table.add_row("beside", *_cells(point), style="dim")
    console.print(table)
    console.print(f"σ = {chosen.noise_multiplier:.3g}: {chosen.move.reason}")
    for sigma, epsilon in found.wall:
        batch = max(1, round(chosen.expected_batch_size * sigma / chosen.noise_multiplier))
        console.print(f"the same total noise at σ = {sigma:g} (B = {batch:,}) would cost ε = {epsilon:.3g}")
    if "private_search" in appended:
        search = appended["private_search"]
        console.print(
            f"a private search of {search['mean']:g} runs on average ({search['law']}):"
            f" ε = {search['epsilon_at_plan']:.4g} as a whole at this σ; within the budget"
            f" with σ = {search['noise_multiplier_within_budget']:.4g}"
        )
    console.print(f"[bold]{appended['command']}[/bold]", soft_wrap=True)
    if out is not None:
        console.print(f"[dim]written to {out}[/dim]", soft_wrap=True)


def _cells(point: Point) -> list[str]:
    return [
        f"{point.expected_batch_size}",
        f"{point.noise_multiplier:.3g}",
        f"{point.steps}",
        f"{point.eta:.3f}",
        f"{point.epsilon:.3g}",
        f"{point.tan_epsilon:.3g}",
        f"{point.expected_batch_size / point.noise_multiplier:.0f}",
        _count(point.samples),
        f"{point.epochs:.0f}" if point.epochs >= 100 else f"{point.epochs:.3g}",
    ]


def _count(records: int) -> str:
    """`590 M`, `1.51 G`: three digits.

    >>> _count(589_824_000), _count(640)
    ('590 M', '640')
    """
    for size, unit in ((10**9, " G"), (10**6, " M"), (10**3, " k")):
        if records >= size:
            return f"{records / size:.3g}{unit}"
    return str(records)
