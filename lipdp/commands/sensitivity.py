"""`lipdp sensitivity`: what a model costs, layer by layer, before any data are touched."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import Annotated, Any

import typer

from lipdp.commands.options import interruptible, parse_shape, with_settings

EPILOG = """[bold]Examples[/bold]

[green]lipdp sensitivity --model cnn --input-shape 1 28 28[/green]

[green]lipdp sensitivity --model mlp --input-shape 30 --num-classes 2 --allocation min_variance --gate 0.3[/green]

[green]lipdp sensitivity --model mynet:build --input-shape 3 32 32 --json[/green]"""


@with_settings(
    model=...,
    model_options=None,
    loss="cross-entropy",
    loss_options=None,
    tau=None,
    gate=None,
    noise_multiplier=1.0,
    batch_size=256,
    allocation="per_layer",
)
@interruptible
def sensitivity(
    given: dict[str, Any],
    input_shape: Annotated[list[str], typer.Option(help="of one sample, e.g. 1 28 28, or 30")],
    num_classes: Annotated[int, typer.Option(help="number of classes")] = 10,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of a table")] = False,
) -> None:
    """What each parameter of a model costs: Δ, its noise, its share."""
    import torch
    from rich.console import Console

    from lipdp import sensitivity as bound
    from lipdp.commands.tables import LEGEND, number, parameter_table
    from lipdp.noise.allocation import get_allocation
    from lipdp.report.parameters import parameter_rows
    from lipdp.training.choices import make_loss, make_model

    shape = parse_shape(input_shape)
    options = given.get("loss_options", {}) | ({"tau": given["tau"]} if "tau" in given else {})
    criterion, outputs = make_loss(given["loss"], num_classes, options)
    net = make_model(given["model"], shape, outputs, given.get("model_options", {}))
    limit = given.get("gate")
    bounds = bound(net, criterion, shape, gate=limit if isinstance(limit, float) else math.inf)
    sizes = {name: parameter.numel() for name, parameter in net.named_parameters()}
    stds = get_allocation(given["allocation"]).stds(
        torch.tensor([bounds[name] for name in bounds], dtype=torch.float64),
        torch.tensor([sizes[name] for name in bounds], dtype=torch.float64),
        given["noise_multiplier"],
    )
    noise = dict(zip(bounds, stds.tolist(), strict=True))
    rows = parameter_rows(bounds, noise, sizes, batch_size=given["batch_size"], nodes=bounds.nodes)
    if as_json:
        summary = {"total": bounds.total, "lipschitz": bounds.lipschitz, "loss_constant": bounds.loss_constant}
        typer.echo(
            json.dumps(
                {**summary, "relation": bounds.relation.value, "parameters": [asdict(row) for row in rows]}, indent=2
            )
        )
        return
    console = Console()
    console.print(parameter_table(rows))
    console.print(
        f"\n{sum(sizes[name] for name in bounds):,} weights; Δ of all {number(bounds.total)};"
        f" network {number(bounds.lipschitz)}-Lipschitz; {criterion},"
        f" gradient at the logits ≤ {number(bounds.loss_constant)}\n",
        highlight=False,
    )
    console.print(f"[dim]{LEGEND}[/dim]", highlight=False)
