"""`lipdp compare`: the same models under other private trainers."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from lipdp.commands.bars import Pace
from lipdp.commands.certify import parse_radius
from lipdp.commands.options import Command, with_config
from lipdp.comparison.configs import RobustnessConfig, SpeedConfig, TablesConfig, UtilityConfig
from lipdp.errors import ParameterError
from lipdp.files import write_pictures

app = typer.Typer(
    name="compare",
    add_completion=False,
    help="The same models under clipping-based DP-SGD: speed, memory, utility, robustness.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)

SPEED_EPILOG = """[bold]Examples[/bold]

[green]lipdp compare speed --dataset mnist --model cnn --batch-sizes 256 1024 4096 --out DIR[/green]

[green]lipdp compare speed --dataset cifar10 --model vgg --trainers non_private clipless opacus_ghost --out DIR[/green]

[green]lipdp compare speed --views 1 4 16 --batch-sizes 64[/green]  (clipping needs the gradient of every view)

Random images of the data set's shape. DIR then holds results.json, speed.png/.svg, memory.png/.svg; the same command
goes on where it was stopped."""

UTILITY_EPILOG = """[bold]Examples[/bold]

[green]lipdp compare utility --out DIR[/green]  (digits, ε = 1 and 3, every trainer, 3 seeds)

[green]lipdp compare utility --datasets mnist --model mlp --epsilons 0.1 1 3 --tune-scale 8 --jobs 2 --out DIR[/green]

DIR then holds results.json, tuning.json and a picture for each data set; the same command goes on where it was killed.
Runs are seeded and tuned on the data: they compare trainers, they are not private releases."""

TABLES_EPILOG = """[bold]Examples[/bold]

[green]lipdp compare tables --tables adbench/22_magic.gamma my.npz --out DIR[/green]  (ε = 1, 5 seeds)

[green]lipdp compare tables --tables my.npz --epsilons 1 3 --trainers lipdp ebm --json[/green]

DIR then holds results.json; the same command goes on where it was stopped. Runs are seeded: they compare, they are not
private releases."""

ROBUSTNESS_EPILOG = """[bold]Examples[/bold]

[green]lipdp compare robustness --out DIR[/green]  (digits, ε = 3)

[green]lipdp compare robustness --dataset mnist --epsilon 2 --taus 2 8 32 128 --radii 36/255 72/255 --out DIR[/green]

DIR then holds results.json and a picture per radius; the same command goes on where it was killed. Runs are seeded:
they compare trainers, they are not private releases."""


@with_config(SpeedConfig, "model", "model_options", "device", "threads")
def speed(
    config: SpeedConfig,
    out: Annotated[Path | None, typer.Option(help="folder for results.json and pictures")] = None,
) -> None:
    """Step time and peak memory against the batch size, and their ratios to a non-private step."""
    _require_extra()
    import torch

    from lipdp.comparison.plots import memory_figure, speed_figure
    from lipdp.comparison.speed import speed as compared
    from lipdp.comparison.speed import table
    from lipdp.comparison.trainers import legend

    if config.threads is not None:
        torch.set_num_threads(config.threads)
    results = compared(config, out=_text(out), progress=lambda message: typer.echo(message, err=True))
    if out is not None:
        write_pictures(speed_figure(results), out / "speed")
        if config.memory:
            write_pictures(memory_figure(results), out / "memory")
    typer.echo(
        f"{config.model} on {config.dataset}, {config.device}, {torch.get_num_threads()} threads:"
        " step time (× non-private)"
    )
    typer.echo(f"{table(results)}\n\n{legend(cell['trainer'] for cell in results.cells)}")


@with_config(UtilityConfig, "data_dir", "schema", "model", "model_options", "features", "delta", "batch_size", "epochs")
def utility(
    config: UtilityConfig,
    jobs: Annotated[int, typer.Option(help="processes")] = 1,
    out: Annotated[Path | None, typer.Option(help="folder for results.json, tuning.json and pictures")] = None,
) -> None:
    """Accuracy or AUROC at given budgets, every trainer tuned by the same number of trials."""
    _require_extra()
    from lipdp.comparison.plots import utility_figure
    from lipdp.comparison.trainers import legend
    from lipdp.comparison.utility import summary, table
    from lipdp.comparison.utility import utility as compared

    if jobs < 1:
        raise ParameterError(f"--jobs {jobs}: at least 1 is needed")
    cells = summary(compared(config, out=_text(out), jobs=jobs, progress=partial(_tell, Pace())))
    for dataset in dict.fromkeys(cell["dataset"] for cell in cells):
        here = [cell for cell in cells if cell["dataset"] == dataset]
        if out is not None and any(cell["target_epsilon"] is not None for cell in here):
            write_pictures(utility_figure(here), out / f"utility-{dataset.replace('/', '-')}")
    typer.echo(f"{table(cells)}\n\n{legend(cell['trainer'] for cell in cells)}")


@with_config(TablesConfig, "data_dir", "delta")
def tables(
    config: TablesConfig,
    out: Annotated[Path | None, typer.Option(help="folder for results.json")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of the table")] = False,
) -> None:
    """AUROC or accuracy on tables at given budgets, under the private learners that people use."""
    _require_extra()
    from lipdp.comparison.tables import LEARNERS, table
    from lipdp.comparison.tables import tables as compared
    from lipdp.comparison.trainers import legend
    from lipdp.comparison.utility import summary

    results = compared(config, out=_text(out), progress=partial(_tell, Pace()))
    if as_json:
        typer.echo(json.dumps(summary(results), indent=2))
    else:
        described = legend((cell["trainer"] for cell in results.cells), LEARNERS)
        typer.echo(f"{table(results)}\n\n{described}")


_SHARED = (
    "dataset",
    "data_dir",
    "schema",
    "model",
    "model_options",
    "features",
    "epsilon",
    "delta",
    "batch_size",
    "epochs",
    "lr",
)


@with_config(RobustnessConfig, *_SHARED, radii=parse_radius)
def robustness(
    config: RobustnessConfig,
    out: Annotated[Path | None, typer.Option(help="folder for results.json and pictures")] = None,
) -> None:
    """Certified accuracy against accuracy along the temperature, private and not, with the Pareto front."""
    _require_extra()
    from lipdp.comparison.plots import robustness_figure
    from lipdp.comparison.robustness import robustness as compared
    from lipdp.comparison.robustness import table
    from lipdp.comparison.trainers import legend

    results = compared(config, out=_text(out), progress=partial(_tell, Pace()))
    if out is not None:
        for number, radius in enumerate(config.radii):
            write_pictures(robustness_figure(results, number), out / f"robustness-{radius:.3g}")
    typer.echo(f"{table(results)}\n\n{legend(cell['trainer'] for cell in results.cells)}")


def _tell(pace: Pace, cell: dict[str, Any], done: int, total: int) -> None:
    score = cell.get("score", cell.get("auroc", cell.get("accuracy", 0.0)))
    what = "trial" if "score" in cell else "run"
    budget = cell.get("target_epsilon", cell["epsilon"])
    known = [cell["dataset"], "no privacy" if budget is None else f"ε {budget:g}"]
    known += [f"{name} {cell[name]}" for name in ("settings", "tau", "seed") if name in cell]
    certified = "".join(f", certified {share:.4f}" for share in cell.get("certified_accuracy", ()))
    typer.echo(
        f"{pace(done, total)}: {what}, {cell['trainer']} on {cell['model']}, {', '.join(known)}:"
        f" {score:.4f}{certified} ({cell['seconds']:.0f} s)",
        err=True,
    )


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _require_extra() -> None:
    try:
        import opacus  # noqa: F401
    except ImportError as error:
        raise ParameterError(f'lipdp compare needs Opacus ({error}): pip install "lipdp[comparison]"') from error


app.command(cls=Command, epilog=SPEED_EPILOG)(speed)
app.command(cls=Command, epilog=UTILITY_EPILOG)(utility)
app.command(cls=Command, epilog=TABLES_EPILOG)(tables)
app.command(cls=Command, epilog=ROBUSTNESS_EPILOG)(robustness)
