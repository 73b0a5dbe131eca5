"""`lipdp compare`: the same models under other private trainers."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from lipdp.commands.bars import Pace
from lipdp.commands.options import Command, interruptible, with_settings
from lipdp.commands.robustness import EPILOG as ROBUSTNESS_EPILOG
from lipdp.commands.robustness import robustness
from lipdp.errors import ParameterError

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


def _list(help: str) -> Any:
    return typer.Option(help=help + " (several values in a row)", show_default=False)


@with_settings("model_options", model="cnn", threads=None, device="cpu")
@interruptible
def speed(
    given: dict[str, Any],
    dataset: Annotated[
        str, typer.Option(help="whose shape: mnist, fashion-mnist, cifar10, digits, tiny-imagenet")
    ] = "mnist",
    batch_sizes: Annotated[list[int] | None, _list("expected batch sizes; default 64 256 1024 4096 8192")] = None,
    views: Annotated[list[int] | None, _list("of each record, averaged in its gradient; default 1")] = None,
    trainers: Annotated[list[str] | None, _list("default: those that cost differently; `all`")] = None,
    kinds: Annotated[list[str] | None, _list("of model: lipschitz, plain (the unconstrained twin)")] = None,
    repeat: Annotated[int, typer.Option(help="interleaved repetitions")] = 7,
    memory: Annotated[bool, typer.Option("--memory/--no-memory", help="measure peak memory too")] = True,
    memory_limit: Annotated[float | None, typer.Option(help="GiB a process may take on a CPU")] = None,
    out: Annotated[Path | None, typer.Option(help="folder for results.json and pictures")] = None,
) -> None:
    """Step time and peak memory against the batch size, and their ratios to a non-private step."""
    _require_extra()
    import torch

    from lipdp.comparison.plots import memory_figure, save, speed_figure
    from lipdp.comparison.speed import SpeedConfig, table
    from lipdp.comparison.speed import speed as measure
    from lipdp.comparison.trainers import legend

    if threads := given.pop("threads", None):
        torch.set_num_threads(threads)
    chosen = () if trainers == ["all"] else trainers
    lists: dict[str, Any] = {"batch_sizes": batch_sizes, "views": views, "trainers": chosen, "kinds": kinds}
    limit = None if memory_limit is None else int(memory_limit * 2**30)
    config = SpeedConfig(dataset=dataset, repeat=repeat, memory=memory, memory_limit=limit, **given, **_tuples(lists))
    results = measure(config, out=_text(out), progress=lambda message: typer.echo(message, err=True))
    if out is not None:
        save(speed_figure(results), out, "speed")
        if memory:
            save(memory_figure(results), out, "memory")
    typer.echo(
        f"{config.model} on {config.dataset}, {config.device}, {torch.get_num_threads()} threads:"
        " step time (× non-private)"
    )
    typer.echo(table(results))
    typer.echo(f"\n{legend(cell['trainer'] for cell in results.cells)}")


@with_settings("data_dir", "model", "model_options", "features", "delta", "batch_size", "epochs")
@interruptible
def utility(
    given: dict[str, Any],
    datasets: Annotated[list[str] | None, _list("as for lipdp train; default digits")] = None,
    epsilons: Annotated[list[float] | None, _list("budgets; default 1 3")] = None,
    trainers: Annotated[list[str] | None, _list("default: all")] = None,
    kinds: Annotated[list[str] | None, _list("of model: lipschitz, plain (the unconstrained twin)")] = None,
    seeds: Annotated[int, typer.Option(help="runs of each trainer at each budget")] = 3,
    trials: Annotated[int, typer.Option(help="tuning trials of each trainer at each budget, 1 to 4")] = 4,
    tune_scale: Annotated[int, typer.Option(help="k: trials at B/k and σ/k, a k-th of the cost")] = 1,
    jobs: Annotated[int, typer.Option(help="processes")] = 1,
    out: Annotated[Path | None, typer.Option(help="folder for results.json, tuning.json and pictures")] = None,
) -> None:
    """Accuracy or AUROC at given budgets, every trainer tuned by the same number of trials."""
    _require_extra()
    from lipdp.comparison.plots import save, utility_figure
    from lipdp.comparison.trainers import legend
    from lipdp.comparison.utility import UtilityConfig, summary, table
    from lipdp.comparison.utility import utility as measure

    if jobs < 1:
        raise ParameterError(f"--jobs {jobs}: at least 1 is needed")
    lists: dict[str, Any] = {"datasets": datasets, "epsilons": epsilons, "trainers": trainers, "kinds": kinds}
    config = UtilityConfig(**given, seeds=seeds, trials=trials, tune_scale=tune_scale, **_tuples(lists))
    results = measure(config, out=_text(out), jobs=jobs, progress=partial(_tell, Pace()))
    cells = summary(results)
    for dataset in dict.fromkeys(cell["dataset"] for cell in cells):
        here = [cell for cell in cells if cell["dataset"] == dataset]
        if out is not None and any(cell["target_epsilon"] is not None for cell in here):
            save(utility_figure(here), out, f"utility-{dataset.replace('/', '-')}")
    typer.echo(table(cells))
    typer.echo(f"\n{legend(cell['trainer'] for cell in cells)}")


@with_settings("data_dir", "delta")
@interruptible
def tables(
    given: dict[str, Any],
    tables: Annotated[list[str], _list("data sets, as for lipdp train")],
    epsilons: Annotated[list[float] | None, _list("budgets; default 1")] = None,
    trainers: Annotated[
        list[str] | None, _list("lipdp, opacus_mlp, ebm, logistic_regression, diffprivlib; default: all but the last")
    ] = None,
    seeds: Annotated[int, typer.Option(help="runs of each trainer, each on its own random split")] = 5,
    records: Annotated[int, typer.Option(help="of a table, at most, drawn at random")] = 30_000,
    out: Annotated[Path | None, typer.Option(help="folder for results.json")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of the table")] = False,
) -> None:
    """AUROC or accuracy on tables at given budgets, under the private learners that people use."""
    _require_extra()
    from lipdp.comparison.tables import TablesConfig, legend, table
    from lipdp.comparison.tables import tables as measure
    from lipdp.comparison.utility import summary

    lists: dict[str, Any] = {"tables": tables, "epsilons": epsilons, "trainers": trainers}
    config = TablesConfig(**given, seeds=seeds, records=records, **_tuples(lists))
    results = measure(config, out=_text(out), progress=partial(_tell, Pace()))
    if as_json:
        typer.echo(json.dumps(summary(results), indent=2))
        return
    typer.echo(table(results))
    typer.echo(f"\n{legend(results)}")


def _tuples(given: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) for name, value in given.items() if value is not None}


def _tell(pace: Pace, cell: dict[str, Any], done: int, total: int) -> None:
    score = cell.get("score", cell.get("auroc", cell.get("accuracy", 0.0)))
    what = "trial" if "score" in cell else "run"
    budget = "no privacy" if cell["target_epsilon"] is None else f"ε {cell['target_epsilon']:g}"
    typer.echo(
        f"{pace(done, total)}: {what}, {cell['trainer']} on {cell['model']}, {cell['dataset']}, {budget},"
        f" {cell['settings']}: {score:.4f} ({cell['seconds']:.0f} s)",
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
