"""`lipdp compare robustness`: temperature as the dial between accuracy and certified accuracy, at one ε."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from lipdp.commands.bars import Pace
from lipdp.commands.certify import parse_radius
from lipdp.commands.options import interruptible, with_settings

EPILOG = """[bold]Examples[/bold]

[green]lipdp compare robustness --out DIR[/green]  (digits, ε = 3)

[green]lipdp compare robustness --dataset mnist --epsilon 2 --taus 2 8 32 128 --radii 36/255 72/255 --out DIR[/green]

DIR then holds results.json and a picture per radius; the same command goes on where it was killed. Runs are seeded:
they compare trainers, they are not private releases."""


def _list(help: str) -> Any:
    return typer.Option(help=help + " (several values in a row)", show_default=False)


@with_settings(
    "data_dir",
    "model",
    "model_options",
    "features",
    "delta",
    "batch_size",
    "epochs",
    "lr",
    dataset="digits",
    epsilon=3.0,
)
@interruptible
def robustness(
    given: dict[str, Any],
    trainers: Annotated[list[str] | None, _list("default clipless opacus_hooks non_private")] = None,
    taus: Annotated[list[float] | None, _list("temperatures; default 2 8 32 128")] = None,
    radii: Annotated[list[str] | None, _list("L2, raw input; default 36/255 72/255 108/255 255/255")] = None,
    seeds: Annotated[int, typer.Option(help="runs of each cell")] = 1,
    twin_lr: Annotated[float, typer.Option(help="of the unconstrained twin")] = 0.1,
    max_grad_norm: Annotated[float, typer.Option(help="C, of trainers that clip")] = 0.3,
    samples: Annotated[int | None, typer.Option(help="test records certified, the first N")] = None,
    attack: Annotated[bool, typer.Option("--attack", help="run L2 PGD (foolbox) as well")] = False,
    out: Annotated[Path | None, typer.Option(help="folder for results.json and pictures")] = None,
) -> None:
    """Certified accuracy against accuracy along the temperature, private and not, with the Pareto front."""
    from lipdp.comparison.plots import save
    from lipdp.comparison.robustness import RobustnessConfig, robustness_figure, table
    from lipdp.comparison.robustness import robustness as measure
    from lipdp.comparison.trainers import legend

    lists: dict[str, Any] = {"trainers": trainers, "taus": taus, "radii": radii and [parse_radius(r) for r in radii]}
    given |= {name: tuple(value) for name, value in lists.items() if value is not None}
    config = RobustnessConfig(
        **given,
        seeds=seeds,
        twin_lr=twin_lr,
        max_grad_norm=max_grad_norm,
        samples=samples,
        attack=attack,
    )
    results = measure(config, out=None if out is None else str(out), progress=partial(_tell, Pace()))
    if out is not None:
        for number, radius in enumerate(config.radii):
            save(robustness_figure(results, number), out, f"robustness-{radius:.3g}")
    typer.echo(table(results))
    typer.echo(f"\n{legend(cell['trainer'] for cell in results.cells)}")


def _tell(pace: Pace, cell: dict[str, Any], done: int, total: int) -> None:
    certified = " ".join(f"{score:.1%}" for score in cell["certified_accuracy"])
    typer.echo(
        f"{pace(done, total)}: {cell['trainer']} on {cell['model']}, τ = {cell['tau']:g}, seed {cell['seed']}:"
        f" accuracy {cell['accuracy']:.1%}, certified {certified} ({cell['seconds']:.0f} s)",
        err=True,
    )
