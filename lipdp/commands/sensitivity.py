"""`lipdp sensitivity`: what a model costs, layer by layer, before any data are touched."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lipdp.commands.options import parse_shape, with_settings
from lipdp.errors import ParameterError

if TYPE_CHECKING:
    from torch import nn

    from lipdp.bounds.sensitivity import Sensitivity

EPILOG = """[bold]Examples[/bold]

[green]lipdp sensitivity --model cnn --input-shape 1 28 28[/green]

[green]lipdp sensitivity --dataset mnist[/green]  (the run that lipdp train --dataset mnist would begin)

[green]lipdp sensitivity --model mlp --input-shape 30 --num-classes 2 --allocation min_variance --gate 0.3[/green]

[green]lipdp sensitivity --model mynet:build --input-shape 3 32 32 --json[/green]"""

_ALONE = {"loss": "cross-entropy", "noise_multiplier": 1.0, "batch_size": 256, "allocation": "per_layer"}


@dataclass(frozen=True)
class _Bounded:
    """A model with the bounds and the noise of its parameters."""

    model: nn.Module
    criterion: Any
    bounds: Sensitivity
    noise: dict[str, float]
    batch_size: int


@with_settings(
    "dataset", "data_dir", "model", "model_options", "features", "feature_options", "loss", "loss_options", "tau",
    "gate",
    "epsilon", "delta", "noise_multiplier", "batch_size", "epochs", "steps", "allocation",
)  # fmt: skip
def sensitivity(
    given: dict[str, Any],
    input_shape: Annotated[
        list[str] | None, typer.Option(help="of one sample, e.g. 1 28 28, or 30; without --dataset")
    ] = None,
    num_classes: Annotated[int, typer.Option(help="number of classes, with --input-shape")] = 10,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of a table")] = False,
) -> None:
    """What each parameter of a model costs: Δ, its noise, its share.

    With --dataset: of the run that lipdp train would begin. With --model and --input-shape: of the model alone, under
    cross-entropy, noise multiplier 1, batches of 256 and a share for each layer, where nothing else is given.
    """
    from lipdp.commands.console import LEGEND, number, parameter_table, plain_console
    from lipdp.report.parameters import parameter_rows

    if ("dataset" in given) == (input_shape is not None):
        raise ParameterError("give --dataset, as for lipdp train, or --model and --input-shape")
    found = _of_a_run(given) if input_shape is None else _of_a_model(given, parse_shape(input_shape), num_classes)
    bounds, criterion = found.bounds, found.criterion
    sizes = {name: parameter.numel() for name, parameter in found.model.named_parameters()}
    rows = parameter_rows(bounds, found.noise, sizes, batch_size=found.batch_size, nodes=bounds.nodes)
    if as_json:
        summary = {"total": bounds.total, "lipschitz": bounds.lipschitz, "loss_constant": bounds.loss_constant}
        typer.echo(
            json.dumps(
                {**summary, "relation": bounds.relation.value, "parameters": [asdict(row) for row in rows]}, indent=2
            )
        )
        return
    console = plain_console()
    console.print(parameter_table(rows))
    console.print(
        f"\n{sum(sizes[name] for name in bounds):,} weights; Δ of all {number(bounds.total)};"
        f" network {number(bounds.lipschitz)}-Lipschitz; {criterion},"
        f" gradient at the logits ≤ {number(bounds.loss_constant)}\n"
    )
    console.print(f"[dim]{LEGEND}[/dim]")


def _of_a_run(given: dict[str, Any]) -> _Bounded:
    """As `lipdp train` would begin it."""
    from lipdp.training import Trainer, configure

    run = Trainer(configure(**given))
    noise = run.engine.noise_stds()
    return _Bounded(run.model, run.criterion.loss, run.engine.sensitivity(), noise, run.batch_size)


def _of_a_model(given: dict[str, Any], shape: tuple[int, ...], num_classes: int) -> _Bounded:
    """The model alone, without data."""
    import torch

    from lipdp import sensitivity as bound
    from lipdp.noise.allocation import get_allocation
    from lipdp.training.choices import make_loss, make_model

    if "model" not in given:
        raise ParameterError("--input-shape needs a --model")
    given = {**_ALONE, **given}
    options = given.get("loss_options", {}) | ({"tau": given["tau"]} if "tau" in given else {})
    criterion, outputs = make_loss(given["loss"], num_classes, options)
    net = make_model(given["model"], shape, outputs, given.get("model_options", {}))
    limit = given.get("gate")
    bounds = bound(net, criterion, shape, gate=limit if isinstance(limit, float) else math.inf)
    sizes = dict(net.named_parameters())
    stds = get_allocation(given["allocation"]).stds(
        torch.tensor([bounds[name] for name in bounds], dtype=torch.float64),
        torch.tensor([sizes[name].numel() for name in bounds], dtype=torch.float64),
        given["noise_multiplier"],
    )
    return _Bounded(net, criterion, bounds, dict(zip(bounds, stds.tolist(), strict=True)), given["batch_size"])
