"""`lipdp plan scale`: what a private run costs in time and memory on W devices."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated, Any

import typer

from lipdp.commands.options import parse_shape, with_settings

EPILOG = """[bold]Examples[/bold]

[green]lipdp plan scale --model cnn --batch-sizes 1024 4096 --steps 2000 --devices 1 2 4[/green]

Private steps on none, a quarter and all of a micro-batch are measured here; the rest is arithmetic."""


@with_settings(model="cnn", model_options=None, microbatch=512, device="auto", threads=None)
def scale(
    given: dict[str, Any],
    input_shape: Annotated[list[str] | None, typer.Option(help="of a record; default 1 28 28")] = None,
    num_classes: Annotated[int, typer.Option(help="number of classes")] = 10,
    batch_sizes: Annotated[list[int] | None, typer.Option(help="B, of all devices together; default 4096")] = None,
    steps: Annotated[int, typer.Option(help="T")] = 1000,
    devices: Annotated[list[int] | None, typer.Option(help="W, each like this one; default 1 8 64")] = None,
    repeat: Annotated[int, typer.Option(help="interleaved repetitions")] = 7,
    memory: Annotated[bool, typer.Option("--memory/--no-memory", help="measure peak memory too")] = True,
    bandwidth_gb: Annotated[float, typer.Option(help="GB/s over the slowest link: your assumption")] = 25.0,
    latency_us: Annotated[float, typer.Option(help="µs of a message: your assumption")] = 20.0,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of a table")] = False,
) -> None:
    """Predict what a private run costs in time and memory on W devices, from a short measurement here."""
    import torch

    from lipdp.planning.cost import Scale, Workload, measure_cost
    from lipdp.training.runtime import choose_device

    network = {"bandwidth": bandwidth_gb * 1e9, "latency": latency_us * 1e-6}
    asked = [
        Scale(batch_size=size, steps=steps, devices=count, **network)
        for size in batch_sizes or [4096]
        for count in devices or [count for count in (1, 8, 64) if count <= max(size, 1)]
    ]
    if "threads" in given:
        torch.set_num_threads(given["threads"])
    workload = Workload(
        model=given["model"], model_options=given.get("model_options", {}), num_classes=num_classes,
        input_shape=parse_shape(input_shape or ["1x28x28"]), device=str(choose_device(given["device"])),
    )  # fmt: skip
    cost = measure_cost(workload, given["microbatch"], repeat=repeat, memory=memory)
    found = [asdict(cost.predict(scale)) for scale in asked]
    if as_json:
        typer.echo(json.dumps({"workload": asdict(workload), "cost": asdict(cost), "predictions": found}, indent=2))
        return
    typer.echo(
        f"{workload.model}, {cost.parameters:,} weights, on {workload.device}, {torch.get_num_threads()} threads"
    )
    _show(found)


def _show(found: list[dict[str, Any]]) -> None:
    from lipdp.commands.console import plain_console, plain_table

    table = plain_table("B", "W", "step, s", "quartiles", "empty", "all-reduce", "run, h", "MiB each", left=0)
    for p in found:
        step, (low, high), peak = p["step_seconds"], p["step_quartiles"], p["peak_bytes"]
        shares = (f"{p[name] / step:.0%}" for name in ("fixed_seconds", "reduce_seconds"))
        counts = (f"{p['scale'][name]:,}" for name in ("batch_size", "devices"))
        hours, held = f"{p['run_seconds'] / 3600:.3g}", "" if peak is None else f"{peak / 2**20:,.0f}"
        table.add_row(*counts, f"{step:.3g}", f"{low:.3g}–{high:.3g}", *shares, hours, held)
    plain_console().print(table)
    typer.echo("Assumed: bandwidth and latency. Left out: waiting for data, evaluation, checkpoints.")
