"""`lipdp train`: from data to a private model."""

from __future__ import annotations

import re
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lipdp.commands.options import with_settings

if TYPE_CHECKING:
    from lipdp.distributed.collectives import World
    from lipdp.training import Monitor

EPILOG = """[bold]Examples[/bold]

[green]lipdp train[/green]  (digits, ε = 3, no file needed)

[green]lipdp train --dataset cifar10 --data-dir DIR --epsilon 1 --out RUN[/green]  (a head on fixed features)

[green]lipdp train --dataset mnist --model cnn --epsilon 1[/green]  (from pixels)

[green]lipdp train --model mlp --model-option width=64 --gate off --allocation global[/green]

[green]lipdp train --dataset mnist --epsilon 1 --dry-run[/green]  (what it would do and spend; no step is taken)

[green]lipdp train --resume RUN[/green]  (bit for bit where it was interrupted)

[green]torchrun --nproc-per-node=4 -m lipdp train --out RUN[/green]  (four processes, the same account)

RUN then holds config.json, environment.json, privacy.json, metrics.jsonl and checkpoint.pt; lipdp report RUN shows
it."""


_run_option = partial(typer.Option, rich_help_panel="Run", show_default=False)


@with_settings()
def train(
    given: dict[str, Any],
    out: Annotated[Path | None, _run_option(help="the run's folder; default: runs/DATASET-MODEL-TIME")] = None,
    resume: Annotated[Path | None, _run_option(help="go on with the run in this folder")] = None,
    tensorboard: Annotated[bool, _run_option("--tensorboard", help="also write curves to RUN/tensorboard")] = False,
    profile: Annotated[
        bool, _run_option("--profile", help="where a step's time goes: RUN/profile.json, trace.json")
    ] = False,
    dry_run: Annotated[
        bool, _run_option("--dry-run", help="show the plan and every setting; take no step, write no file")
    ] = False,
    peer_timeout: Annotated[
        float | None,
        typer.Option(help="minutes to wait for a silent process", rich_help_panel="Run", show_default="30", min=0.01),
    ] = None,
) -> None:
    """Train a model with differential privacy; report ε and the test accuracy."""
    if resume is not None and out is not None:
        raise typer.BadParameter("--resume goes on in its own folder; leave --out out", param_hint="--out")

    if dry_run:
        if resume is not None:
            raise typer.BadParameter("a resumed run keeps its plan; leave --resume out", param_hint="--dry-run")
        _dry_run(given)
        return

    from lipdp.distributed.launch import TIMEOUT, launched

    with launched(timeout=peer_timeout or TIMEOUT) as world:
        _run(given, out, resume, world, tensorboard=tensorboard, profile=profile)


def _dry_run(given: dict[str, Any]) -> None:
    """All that is decided before the first step."""
    from lipdp.commands.console import plain_console
    from lipdp.commands.display import Screen, show_settings
    from lipdp.training import Trainer, configure

    console = plain_console()
    with Screen(console) as screen:
        trainer = Trainer(configure(**given), monitor=screen)
        screen.begin(trainer)
    show_settings(console, trainer.config)
    console.print("[bold]dry run[/bold]: no step was taken, nothing was written")


def _run(
    given: dict[str, Any], out: Path | None, resume: Path | None, world: World, *, tensorboard: bool, profile: bool
) -> None:
    """One process's part; the first one speaks."""
    from lipdp.commands.console import plain_console
    from lipdp.commands.display import Screen, show_profile, show_result
    from lipdp.distributed.launch import resumed_folder
    from lipdp.training import Monitor, Trainer, configure
    from lipdp.training.profile import StepProfile

    first = world.rank == 0
    console = plain_console(quiet=not first)
    screen = Screen(console)
    resume = resume or resumed_folder(out)
    config = configure(**given) if resume is None else None
    folder = world.broadcast(resume or out or (_default_folder(config.dataset, config.model) if config else Path()))
    monitor = _also_to_tensorboard(screen, folder, tensorboard) if first else Monitor()
    profiled = StepProfile(folder) if profile and first else None
    with screen:
        if config is None:
            trainer = Trainer.resume(folder, monitor=monitor, profile=profiled, world=world, **given)
        else:
            trainer = Trainer(config, out=folder, monitor=monitor, profile=profiled, world=world)
        result = trainer.run()
    if profiled is not None and profiled.table is not None:
        show_profile(console, profiled.table)
    if first:
        show_result(console, result)


def _also_to_tensorboard(monitor: Monitor, folder: Path, tensorboard: bool) -> Monitor:
    if not tensorboard:
        return monitor
    from lipdp.report.tensorboard import Monitors, TensorBoard

    return Monitors((monitor, TensorBoard(folder)))


def _default_folder(dataset: str, model: str) -> Path:
    """`runs/DATASET-MODEL-TIME`, and a number where that is taken."""
    name = "-".join(re.sub(r"[^\w.]+", "-", Path(part).stem).strip("-") for part in (dataset, model))
    folder = Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
    return next(f for f in (folder, *(Path(f"{folder}-{i}") for i in range(2, 1000))) if not f.exists())
