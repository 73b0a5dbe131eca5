"""`lipdp sensitivity`: what a model costs, layer by layer, before any data are touched."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import Annotated

import typer

from lipdp.commands.options import interruptible, parse_gate, parse_options, parse_shape

EPILOG = """[bold]Examples[/bold]

[green]lipdp sensitivity --model cnn --input-shape 1 28 28[/green]

[green]lipdp sensitivity --model mlp --input-shape 30 --num-classes 2 --allocation min_variance --gate 0.3[/green]

[green]lipdp sensitivity --model mynet:build --input-shape 3 32 32 --json[/green]"""


@interruptible
def sensitivity(
    model: Annotated[str, typer.Option(help="linear, mlp, cnn, vgg, resnet, mixer, tabular, or module:function")],
    input_shape: Annotated[list[str], typer.Option(help="of one sample, e.g. 1 28 28, or 30")],
    num_classes: Annotated[int, typer.Option(help="number of classes")] = 10,
    loss: Annotated[
        str, typer.Option(help="cross-entropy, bce, hinge, multiclass-hinge, cosine, hkr")
    ] = "cross-entropy",
    tau: Annotated[float | None, typer.Option(help="temperature of cross-entropy and bce")] = None,
    loss_option: Annotated[list[str] | None, typer.Option(help="key=value")] = None,
    gate: Annotated[str | None, typer.Option(help="bound on every record's gradient at the logits")] = None,
    model_option: Annotated[list[str] | None, typer.Option(help="key=value, e.g. width=32")] = None,
    noise_multiplier: Annotated[float, typer.Option(help="σ, joint over all parameters")] = 1.0,
    batch_size: Annotated[int, typer.Option(help="B, for the signal")] = 256,
    allocation: Annotated[str, typer.Option(help="per_layer, global, min_variance")] = "per_layer",
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of a table")] = False,
) -> None:
    """Per parameter: X, G, the bound Δ on a record's gradient, the noise, its share of the budget."""
    import torch
    from rich.console import Console

    from lipdp import sensitivity as bound
    from lipdp.commands.tables import LEGEND, number, parameter_table
    from lipdp.noise.allocation import get_allocation
    from lipdp.report.parameters import parameter_rows
    from lipdp.training.choices import make_loss, make_model

    shape = parse_shape(input_shape)
    options = {**(parse_options("--loss-option", loss_option) or {}), **({} if tau is None else {"tau": tau})}
    criterion, outputs = make_loss(loss, num_classes, options)
    net = make_model(model, shape, outputs, parse_options("--model-option", model_option) or {})
    limit = parse_gate(gate)
    bounds = bound(net, criterion, shape, gate=limit if isinstance(limit, float) else math.inf)
    sizes = {name: parameter.numel() for name, parameter in net.named_parameters()}
    stds = get_allocation(allocation).stds(
        torch.tensor([bounds[name] for name in bounds], dtype=torch.float64),
        torch.tensor([sizes[name] for name in bounds], dtype=torch.float64),
        noise_multiplier,
    )
    drawn = dict(zip(bounds, stds.tolist(), strict=True))
    rows = parameter_rows(bounds, drawn, sizes, batch_size=batch_size, nodes=bounds.nodes)
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
        f"\n{sum(sizes[name] for name in bounds):,} weights; Δ of all {number(bounds.total)}; network"
        f" {number(bounds.lipschitz)}-Lipschitz; {criterion}, gradient at the logits ≤ {number(bounds.loss_constant)}\n",
        highlight=False,
    )
    console.print(f"[dim]{LEGEND}[/dim]", highlight=False)
