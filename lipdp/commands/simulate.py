"""`lipdp plan simulate`: hyper-parameters of a private run, searched at a fraction of its compute."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lipdp.commands.options import parse_options, with_settings
from lipdp.errors import ParameterError

if TYPE_CHECKING:
    from rich.console import Console

    from lipdp.planning.search import Found
    from lipdp.planning.space import Dimension

EPILOG = """[bold]Examples[/bold]

[green]lipdp plan simulate --search lr=0.05:5:log --search tau=8,16,32 --out SEARCH[/green]  (digits)

[green]lipdp plan simulate --dataset mnist --model linear --features scattering --epsilon 1 --batch-size 4096
--steps 586 --scale 16 --search lr=0.05:5:log --trials 20 --jobs 2 --out SEARCH --run[/green]

[green]lipdp plan simulate --out SEARCH[/green]  (goes on where it was)

[green]lipdp plan simulate --out SEARCH --confirm RUN[/green]  (predicted against achieved)

Every simulated run is [bold]NOT private[/bold] and says so in its files. SEARCH holds simulation.json, study.db
(Optuna), trials/NUMBER.json, result.json; with --run also full/, the private run, and confirmation.json."""


@with_settings(
    "dataset", "data_dir", "schema", "features", "model", "epsilon", "delta", "batch_size", "steps", "epochs"
)
def simulate(
    given: dict[str, Any],
    out: Annotated[Path, typer.Option(help="the search's folder; an interrupted search goes on there")],
    search: Annotated[
        list[str] | None,
        typer.Option(
            help="name=low:high[:log] or name=a,b,c; a setting of lipdp train, tau, or e.g. model_options.width"
        ),
    ] = None,
    scale: Annotated[float | None, typer.Option(help="k: runs at B/k and σ/k, in [1, 128] (default 16)")] = None,
    trials: Annotated[int, typer.Option(help="how many runs in all")] = 20,
    jobs: Annotated[int, typer.Option(help="runs at once, each a process")] = 1,
    validation: Annotated[
        float | None, typer.Option(help="share of the training records held out (default 0.1)")
    ] = None,
    search_seed: Annotated[int | None, typer.Option(help="of the draws and the simulated runs (default 0)")] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(help="any other setting of lipdp train, name=value, e.g. momentum=0.95, gate=0.2"),
    ] = None,
    run: Annotated[bool, typer.Option("--run", help="then train the full private run in SEARCH/full")] = False,
    confirm: Annotated[Path | None, typer.Option(help="compare with this full run")] = None,
) -> None:
    """Search hyper-parameters by runs at B/k and σ/k (not private).

    The one private run that follows is named at the end.
    """
    given |= parse_options("--option", option) or {}
    options = {"scale": scale, "validation": validation, "seed": search_seed}
    given_options = {name: value for name, value in options.items() if value is not None}
    settings, space, search_options = _stored(out, given, search, given_options)

    from lipdp.commands.console import plain_console
    from lipdp.planning.search import simulate as go
    from lipdp.planning.simulation import LABEL

    console = plain_console()
    console.print(f"[yellow]{LABEL}[/yellow]")

    def progress(number: int, record: Mapping[str, Any], found: Found) -> None:
        console.print(_line(number, record, found), soft_wrap=True)

    try:
        found = go(settings, space, out=out, trials=trials, jobs=jobs, progress=progress, **search_options)
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt(
            f"interrupted; go on with: lipdp plan simulate --out {out} --trials {trials}"
        ) from interrupt
    _show(console, found, out)
    if run and confirm is not None:
        raise ParameterError("--run trains the full run, --confirm names one: give one of them")
    if run:
        _train(console, found, out / "full")
    if run or confirm is not None:
        _confirm(console, found, out, confirm or out / "full")


def _stored(
    out: Path, given: dict[str, Any], search: list[str] | None, options: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Dimension], dict[str, Any]]:
    """What was given, or if that is nothing but the folder, what lies there."""
    from lipdp.files import read_json
    from lipdp.planning.space import Choice, Range, parse_space

    path = out / "simulation.json"
    if given or search or options or not path.exists():
        return given, parse_space(search or []), options
    stored = read_json(path)
    space: dict[str, Dimension] = {
        name: Choice(tuple(one["values"])) if "values" in one else Range(**one) for name, one in stored["space"].items()
    }
    return stored["settings"], space, {name: stored[name] for name in ("scale", "validation", "seed")}


def _line(number: int, record: Mapping[str, Any], found: Found) -> str:
    drawn = "  ".join(
        f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}"
        for name, value in record["drawn"].items()
    )
    if record["value"] is None:
        return f"run {number:>3} [yellow]not private[/yellow]  {drawn}  diverged"
    metric = f"validation {found.simulation.metric} {record['value']:.2%} (best {found.best['value']:.2%})"
    return f"run {number:>3} [yellow]not private[/yellow]  {drawn}  {metric}  {record['seconds']:.1f} s"


def _show(console: Console, found: Found, out: Path) -> None:
    given, result = found.simulation, found.as_dict(out=str(out / "full"))
    compute = result["compute"]
    console.print(
        f"full run: {given.plan.summary}\nsimulated at B = {given.simulated.expected_batch_size},"
        f" σ = {given.simulated.noise_multiplier:.4g} (not private)"
    )
    console.print(
        f"{result['trials']} runs of 1/{compute['ratio']:.3g} the compute each: {compute['samples_searched']:,}"
        f" {given.plan.unit}s processed, {compute['samples_saved']:,} saved"
    )
    console.print(
        f"predicted {given.metric}: [bold]{result[f'predicted_{given.metric}']:.2%}[/bold] (best of the simulated runs,"
        " on validation records; the choice looks at private records, which ε does not cover)"
    )
    console.print(f"[bold]{result['command']}[/bold]", soft_wrap=True)


def _train(console: Console, found: Found, folder: Path) -> None:
    """The full run, or what is left of it."""
    from lipdp.commands.display import Screen, show_result
    from lipdp.errors import FinishedError
    from lipdp.training import Trainer, configure

    monitor = Screen(console)
    with monitor:
        if (folder / "config.json").exists():
            try:
                trainer = Trainer.resume(folder, monitor=monitor)
            except FinishedError:
                return
        else:
            config = configure(**found.simulation.full_settings(found.best["drawn"]))
            trainer = Trainer(config, out=folder, monitor=monitor)
        result = trainer.run()
    show_result(console, result)


def _confirm(console: Console, found: Found, out: Path, folder: Path) -> None:
    from lipdp.files import write_json
    from lipdp.planning.search import confirm

    outcome, metric = confirm(found, folder), found.simulation.metric
    write_json(out / "confirmation.json", outcome)
    console.print(
        f"{metric} predicted {outcome[f'predicted_{metric}']:.2%}, achieved"
        f" [bold]{outcome[f'achieved_{metric}']:.2%}[/bold] at ε = {outcome['epsilon']:.4g}; the search took"
        f" {outcome['seconds_searched']:.0f} s, the full run {outcome['seconds_of_the_full_run']:.0f} s"
    )
