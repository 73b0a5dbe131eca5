"""`lipdp plan --scale`: what a private run costs in time and memory on W devices."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from lipdp.commands.options import interruptible, parse_options, parse_shape
from lipdp.errors import CheckpointError, ParameterError, UnknownNameError

if TYPE_CHECKING:
    from rich.console import Console

    from lipdp.planning.cost import Cost, Network, Prediction

SHAPES = {
    "digits": (1, 8, 8),
    "mnist": (1, 28, 28),
    "fashion-mnist": (1, 28, 28),
    "cifar10": (3, 32, 32),
    "imagenet": (3, 224, 224),
}
"""Data set → shape of a record; the records measured are random."""

EPILOG = """[bold]Examples[/bold]

[green]lipdp plan --scale --model cnn --dataset mnist --batch-size 4096 --steps 2000 --devices 1 2 4[/green]

[green]lipdp plan --scale --model resnet --dataset imagenet --num-classes 1000 --batch-size 32768 --steps 18000 --devices 8 64
--microbatch 8 --out COST[/green]

[green]lipdp plan --scale --measured COST --batch-size 16384 --devices 8 64 --speedup 400[/green]

Private steps are measured here, at a few small batches and at an empty one; the rest is arithmetic
([bold]lipdp.planning.cost[/bold]). Times for other devices than this one are this one's over --speedup, an assumption. With --out DIR it
writes DIR/cost.json."""


class PlanGroup(TyperGroup):
    """A group in which `plan --scale …` is `plan scale …`, wherever `--scale` stands among the options."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the subcommand in front where the flag asks for it and no other subcommand comes first."""
        named = bool(args) and args[0] in self.commands
        if "--scale" in args and not named:
            at = args.index("--scale")
            args = ["scale", *args[:at], *args[at + 1 :]]
        return super().parse_args(ctx, args)


def _option(help: str, panel: str) -> Any:
    return typer.Option(help=help, rich_help_panel=panel)


@interruptible
def scale(
    model: Annotated[
        str, _option("linear, mlp, cnn, vgg, resnet, mixer, tabular, or module:function", "The run")
    ] = "cnn",
    model_option: Annotated[list[str] | None, _option("key=value, e.g. width=32", "The run")] = None,
    dataset: Annotated[str, _option(f"whose shape: {', '.join(SHAPES)}", "The run")] = "mnist",
    input_shape: Annotated[list[str] | None, _option("of one record instead, e.g. 3 64 64", "The run")] = None,
    num_classes: Annotated[int, _option("number of classes", "The run")] = 10,
    optimizer: Annotated[str, _option("sgd, adam", "The run")] = "sgd",
    batch_size: Annotated[int, _option("B, of all devices together", "The run")] = 4096,
    steps: Annotated[int, _option("T", "The run")] = 1000,
    devices: Annotated[
        list[int] | None, _option("W, GPUs or processes (several in a row; default 1 8 64)", "The run")
    ] = None,
    microbatch: Annotated[int, _option("samples of a forward pass", "The run")] = 512,
    sizes: Annotated[
        list[int] | None, _option("samples a step, several in a row (default: up to 512)", "Measurement")
    ] = None,
    repeat: Annotated[int, _option("interleaved repetitions", "Measurement")] = 7,
    memory: Annotated[
        bool, typer.Option("--memory/--no-memory", help="peak memory too", rich_help_panel="Measurement")
    ] = True,
    device: Annotated[str, _option("auto (a GPU if there is one), cpu, cuda, …", "Measurement")] = "auto",
    threads: Annotated[int | None, _option("of torch on the CPU", "Measurement")] = None,
    cpu_time: Annotated[
        bool,
        typer.Option(
            "--cpu-time",
            help="count CPU time of one thread, on a machine busy with others",
            rich_help_panel="Measurement",
        ),
    ] = False,
    measured: Annotated[
        Path | None, _option("a cost.json: predict from what it measured, of its model and micro-batch", "Measurement")
    ] = None,
    speedup: Annotated[
        float, _option("how much faster than this one each device is: your assumption", "Assumptions")
    ] = 1.0,
    devices_per_node: Annotated[int, _option("devices joined by --bandwidth-gb", "Assumptions")] = 8,
    bandwidth_gb: Annotated[float, _option("GB/s a device sends within a node", "Assumptions")] = 100.0,
    internode_bandwidth_gb: Annotated[float, _option("GB/s a node sends to the next", "Assumptions")] = 25.0,
    latency_us: Annotated[float, _option("µs of a message", "Assumptions")] = 20.0,
    measure_reduce: Annotated[
        bool,
        typer.Option("--measure-reduce", help="measure those by gloo, 2 processes here", rich_help_panel="Assumptions"),
    ] = False,
    out: Annotated[Path | None, typer.Option(help="write cost.json there")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of a table")] = False,
) -> None:
    """Predict step time, memory a device and total time of a private run, from a short measurement here."""
    from lipdp.planning.cost import Network, predictions

    counts = devices or [count for count in (1, 8, 64) if count <= max(batch_size, 1)]
    network = Network(
        bandwidth=bandwidth_gb * 1e9,
        internode_bandwidth=internode_bandwidth_gb * 1e9,
        latency=latency_us * 1e-6,
        per_node=devices_per_node,
    )
    settings: dict[str, Any] = {"batch_size": batch_size, "steps": steps, "speedup": speedup}
    _check(settings, counts)
    if measured is not None:
        taken = _read(measured)
    else:
        chosen = {
            "model": model,
            "model_options": parse_options("--model-option", model_option) or {},
            "input_shape": _shape(dataset, input_shape),
            "num_classes": num_classes,
            "optimizer": optimizer,
            "microbatch": microbatch,
        }
        share = math.ceil(batch_size / min(counts))
        options: dict[str, Any] = {"repeat": repeat, "with_memory": memory, "cpu_time": cpu_time}
        taken = _measure(chosen, device, threads, sizes, share=share, **options)
    cost = _cost(taken)
    if measure_reduce:
        network = _measured_network(cost)
    found = predictions(cost, counts, network=network, **settings)
    facts = taken | {
        "settings": settings,
        "network": asdict(network) | {"measured": measure_reduce},
        "step": asdict(cost.times.fit),
        "predictions": [prediction.as_dict() for prediction in found],
    }
    if out is not None:
        from lipdp.files import write_json

        write_json(out / "cost.json", facts)
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    _show(facts, found, out)


def _check(settings: dict[str, Any], counts: list[int]) -> None:
    """Refuse before the measurement what the prediction would refuse after it."""
    from lipdp.planning.cost import Cost, StepTime, StepTimes, predictions

    nothing = StepTime(1.0, 0.0, 1.0)
    predictions(Cost(1, StepTimes(nothing, (nothing,)), None, None), counts, **settings)


def _shape(dataset: str, given: list[str] | None) -> tuple[int, ...]:
    if given is not None:
        return parse_shape(given)
    if dataset not in SHAPES:
        raise UnknownNameError("data set", dataset, SHAPES)
    return SHAPES[dataset]


def _measure(
    chosen: dict[str, Any],
    device: str,
    threads: int | None,
    sizes: list[int] | None,
    *,
    share: int,
    repeat: int,
    with_memory: bool,
    cpu_time: bool,
) -> dict[str, Any]:
    """What was measured, as `cost.json` holds it."""
    import time

    import torch

    from lipdp.planning.measure import Workload, default_sizes, flops, measure
    from lipdp.training.runtime import choose_device

    if threads is not None:
        torch.set_num_threads(threads)
    workload = Workload(**chosen, device=str(choose_device(device)))
    if cpu_time and (workload.device != "cpu" or torch.get_num_threads() > 1):
        raise ParameterError(
            f"--cpu-time on {workload.device} with {torch.get_num_threads()} threads: only one thread's CPU time is the time of a"
            " step; add --device cpu --threads 1"
        )
    load = os.getloadavg()[0]
    cost, timings = measure(
        workload,
        sizes or default_sizes(workload, share),
        repeat=repeat,
        with_memory=with_memory,
        clock=time.process_time if cpu_time else time.perf_counter,
        progress=_tell,
    )
    return {
        "workload": asdict(workload),
        "parameters": cost.parameters,
        "timings": [asdict(timing) for timing in timings],
        "memory": None if cost.memory is None else asdict(cost.memory),
        "flops_per_sample": flops(workload),
        "threads": torch.get_num_threads(),
        "load": load,
        "cpu_time": cpu_time,
    }


def _read(path: Path) -> dict[str, Any]:
    """The measurement in a `cost.json`, or in the folder that holds one."""
    from lipdp.files import read_json

    file = path / "cost.json" if path.is_dir() else path
    facts = read_json(file)
    names = ("workload", "parameters", "timings", "memory", "flops_per_sample", "threads", "load", "cpu_time")
    try:
        taken = {name: facts[name] for name in names}
        _cost(taken)
    except (LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file} is not what lipdp plan --scale --out writes ({error!r})") from error
    return taken


def _cost(taken: dict[str, Any]) -> Cost:
    from lipdp.planning.cost import Cost, Memory, Timing, fit_times

    timings = [Timing(timing["samples"], tuple(timing["seconds"])) for timing in taken["timings"]]
    microbatch = taken["workload"]["microbatch"]
    times = fit_times(timings, microbatch or max(timing.samples for timing in timings))
    memory = None if taken["memory"] is None else Memory(**taken["memory"])
    return Cost(int(taken["parameters"]), times, memory, microbatch)


def _measured_network(cost: Cost) -> Network:
    from lipdp.planning.measure import measure_reduce

    _tell("all-reduce over gloo, two processes")
    with TemporaryDirectory() as folder:
        return measure_reduce(cost.parameters, Path(folder))


def _tell(message: str) -> None:
    typer.echo(message, err=True)


def _show(facts: dict[str, Any], found: list[Prediction], out: Path | None) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console()
    _show_measured(console, facts)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
    for name in ("W", "samples", "step", "90 %", "fixed", "reduce", "run", "W·hours", "memory"):
        table.add_column(name, justify="right", no_wrap=True)
    for p in found:
        table.add_row(
            str(p.devices),
            f"{p.samples:,}",
            _seconds(p.step_seconds),
            _range(p.step_seconds_low, p.step_seconds_high),
            f"{p.fixed_share:.0%}",
            f"{p.reduce_seconds / p.step_seconds:.0%}",
            _seconds(p.run_seconds),
            f"{p.as_dict()['device_hours']:.3g}",
            "" if p.peak_bytes is None else f"{p.peak_bytes / 2**20:,.0f} MiB",
        )
    console.print(table)
    settings = facts["settings"]
    console.print(
        f"B = {settings['batch_size']:,}, T = {settings['steps']:,}; samples and memory of each device. 90 %: of refits to other"
        " repetitions; it holds what varied while it was measured, not the assumptions. Not included: waiting for data,"
        " evaluation, checkpoints.",
        highlight=False,
    )
    if settings["speedup"] != 1:
        console.print(
            f"[yellow]ASSUMED, not measured: each device is {settings['speedup']:g} times as fast as this one at every part of"
            " a step; its memory is this one's.[/yellow]",
            highlight=False,
        )
    if out is not None:
        console.print(f"[dim]written to {out}[/dim]", highlight=False, soft_wrap=True)


def _show_measured(console: Console, facts: dict[str, Any]) -> None:
    workload, network, step, operations = (facts[n] for n in ("workload", "network", "step", "flops_per_sample"))
    console.print(
        f"{workload['model']} on {'x'.join(map(str, workload['input_shape']))}, measured on {workload['device']}, {facts['threads']}"
        f" threads{' (CPU time)' if facts['cpu_time'] else ''}, load {facts['load']:.1f}:"
        f" {_seconds(step['fixed'])} a step + {_seconds(step['piece'])} a piece of ≤ {workload['microbatch']}"
        f" + {_seconds(step['sample'])} a sample ({operations / 1e9:.3g} GFLOP at {operations / step['sample'] / 1e9:,.3g} GFLOP/s)",
        highlight=False,
    )
    held = facts["memory"]
    if held is not None:
        console.print(
            f"memory: {held['process'] / 2**20:,.0f} MiB of the process + {held['state'] / 2**20:,.0f} MiB with the"
            f" {facts['parameters']:,} weights + {held['sample'] / 2**10:,.0f} KiB a sample of a piece",
            highlight=False,
        )
    console.print(
        f"all-reduce {'measured (gloo, 2 processes)' if network['measured'] else 'assumed'}: a ring,"
        f" {network['bandwidth'] / 1e9:.3g} GB/s"
        + (
            ""
            if network["measured"]
            else f" within {network['per_node']} devices, {network['internode_bandwidth'] / 1e9:.3g} GB/s between nodes"
        )
        + f", {network['latency'] * 1e6:.3g} µs a message",
        highlight=False,
    )


_UNITS = ((172800, 86400, "d"), (3600, 3600, "h"), (120, 60, "min"), (1, 1, "s"), (1e-3, 1e-3, "ms"), (0, 1e-6, "µs"))


def _seconds(value: float) -> str:
    """Three digits and a unit.

    >>> _seconds(0.000487), _seconds(2.002), _seconds(5400), _seconds(400_000)
    ('487 µs', '2 s', '1.5 h', '4.63 d')
    """
    size, unit = next((size, unit) for least, size, unit in _UNITS if value >= least)
    return f"{value / size:.3g} {unit}"


def _range(low: float, high: float) -> str:
    """
    >>> _range(0.419, 1.2)
    '0.419–1.2 s'
    """
    size, unit = next((size, unit) for least, size, unit in _UNITS if high >= least)
    return f"{low / size:.3g}–{high / size:.3g} {unit}"
