"""`lipdp train`: from data to a private model."""

from __future__ import annotations

import re
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lipdp.commands.options import interruptible, parse_gate, parse_options

if TYPE_CHECKING:
    from lipdp.distributed.collectives import World
    from lipdp.training import Monitor

EPILOG = """[bold]Examples[/bold]

[green]lipdp train[/green]  (digits, ε = 3, no file needed)

[green]lipdp train --dataset mnist --data-dir DIR --model cnn --epsilon 1 --out RUN[/green]

[green]lipdp train --dataset mnist --features scattering --model linear --epsilon 1[/green]

[green]lipdp train --model mlp --model-option width=64 --gate off --allocation global[/green]

[green]lipdp train --resume RUN[/green]  (bit for bit where it was interrupted)

[green]torchrun --nproc-per-node=4 -m lipdp train --out RUN[/green]  (four processes, the same account)

RUN then holds config.json, environment.json, privacy.json, metrics.jsonl and checkpoint.pt; lipdp report RUN shows it."""


def _option(help: str, panel: str, **settings: Any) -> Any:
    return typer.Option(help=help, rich_help_panel=panel, show_default=False, **settings)


@interruptible
def train(
    dataset: Annotated[
        str | None,
        _option(
            "digits (default), mnist, fashion-mnist, cifar10, adbench/NAME, an .npz file, or a folder of .npy files or of"
            " Hugging Face datasets, read batch by batch",
            "Data",
        ),
    ] = None,
    data_dir: Annotated[str | None, _option("where the files are; default: $LIPDP_DATA", "Data")] = None,
    download: Annotated[
        bool, typer.Option("--download", help="fetch what is not there", rich_help_panel="Data")
    ] = False,
    input_column: Annotated[str | None, _option("of a datasets folder, if not its only image column", "Data")] = None,
    label_column: Annotated[str | None, _option("of a datasets folder, if not its only class column", "Data")] = None,
    owner_column: Annotated[
        str | None, _option("array or column of owners: batches of owners, ε for an owner with all records", "Data")
    ] = None,
    image_size: Annotated[
        tuple[int, int] | None, _option("bring images to this height and width", "Data", metavar="H W")
    ] = None,
    augment: Annotated[str | None, _option("random views of images: crop, flip, crop-flip", "Data")] = None,
    augment_multiplicity: Annotated[int | None, _option("views of each record in one gradient", "Data")] = None,
    num_workers: Annotated[int | None, _option("processes that read records (default 0)", "Data")] = None,
    pin_memory: Annotated[
        bool, typer.Option("--pin-memory", help="page-locked batches for a GPU", rich_help_panel="Data")
    ] = False,
    features: Annotated[str | None, _option("a fixed feature map: scattering, dct", "Data")] = None,
    feature_option: Annotated[list[str] | None, _option("key=value, e.g. J=2, group_norm=27", "Data")] = None,
    bounding: Annotated[
        str | None, _option("public map of the inputs: clip, rescale, tanh, signed-log, standardise", "Data")
    ] = None,
    bounding_option: Annotated[list[str] | None, _option("key=value, e.g. upper=120", "Data")] = None,
    model: Annotated[
        str | None, _option("linear, mlp, cnn, vgg, resnet, mixer, tabular, or module:function", "Model")
    ] = None,
    model_option: Annotated[list[str] | None, _option("key=value, e.g. width=32", "Model")] = None,
    loss: Annotated[str | None, _option("cross-entropy, bce, hinge, multiclass-hinge, cosine, hkr", "Model")] = None,
    tau: Annotated[float | None, _option("temperature of cross-entropy and bce", "Model")] = None,
    loss_option: Annotated[list[str] | None, _option("key=value, e.g. margin=0.5", "Model")] = None,
    epsilon: Annotated[float | None, _option("the budget ε (default 3)", "Privacy")] = None,
    delta: Annotated[
        float | None, _option("δ (default 1e-5, or the power of ten below 1/N if smaller)", "Privacy")
    ] = None,
    noise_multiplier: Annotated[float | None, _option("σ, instead of ε", "Privacy")] = None,
    accountant: Annotated[str | None, _option("prv (default), pld, rdp", "Privacy")] = None,
    sampling: Annotated[
        str | None, _option("poisson (default; add or remove one) or fixed_size (replace one)", "Privacy")
    ] = None,
    allocation: Annotated[str | None, _option("of the noise: per_layer, global, min_variance", "Privacy")] = None,
    gate: Annotated[
        str | None, _option("bound on every record's gradient at the logits, or off (the loss's own)", "Privacy")
    ] = None,
    gate_quantile: Annotated[float | None, _option("let the gate follow this quantile, privately", "Privacy")] = None,
    secure: Annotated[
        bool, typer.Option("--secure", help="noise and batches from a cipher", rich_help_panel="Privacy")
    ] = False,
    batch_size: Annotated[int | None, _option("expected batch size B", "Optimisation")] = None,
    epochs: Annotated[float | None, _option("passes over the data, T = epochs · N / B", "Optimisation")] = None,
    steps: Annotated[int | None, _option("T, instead of epochs", "Optimisation")] = None,
    optimizer: Annotated[str | None, _option("sgd, adam", "Optimisation")] = None,
    lr: Annotated[float | None, _option("learning rate", "Optimisation")] = None,
    momentum: Annotated[float | None, _option("momentum; Adam's first β", "Optimisation")] = None,
    schedule: Annotated[str | None, _option("constant, cosine, linear", "Optimisation")] = None,
    ema: Annotated[float | None, _option("decay of the averaged weights", "Optimisation")] = None,
    microbatch: Annotated[
        int | None, _option("samples per forward pass, to save memory (one noise draw all the same)", "Optimisation")
    ] = None,
    out: Annotated[Path | None, _option("the run's folder; default: runs/DATASET-MODEL-TIME", "Run")] = None,
    resume: Annotated[Path | None, _option("go on with the run in this folder", "Run")] = None,
    check_every: Annotated[
        int | None, _option("steps between looks at the gradients of a few records; 0 never (default: by cost)", "Run")
    ] = None,
    checkpoint_every: Annotated[int | None, _option("steps between checkpoints (default T/10)", "Run")] = None,
    log_every: Annotated[int | None, _option("steps between lines of metrics (default T/20)", "Run")] = None,
    device: Annotated[str | None, _option("auto (default), cpu, cuda, cuda:1, …", "Run")] = None,
    threads: Annotated[int | None, _option("of torch on the CPU", "Run")] = None,
    compile: Annotated[
        bool | None, typer.Option("--compile/--no-compile", help="torch.compile the model", rich_help_panel="Run")
    ] = None,
    channels_last: Annotated[
        bool | None,
        typer.Option(
            "--channels-last/--no-channels-last", help="memory format of images (same values)", rich_help_panel="Run"
        ),
    ] = None,
    autocast: Annotated[
        str | None, _option("precision of the forward pass, bf16 or off: Δ allows for its rounding", "Run")
    ] = None,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="also write curves to RUN/tensorboard", rich_help_panel="Run")
    ] = False,
    profile: Annotated[
        bool,
        typer.Option("--profile", help="where a step's time goes: RUN/profile.json, trace.json", rich_help_panel="Run"),
    ] = False,
    peer_timeout: Annotated[
        float | None,
        typer.Option(help="minutes to wait for a silent process", rich_help_panel="Run", show_default="30", min=0.01),
    ] = None,
    seed: Annotated[int | None, _option("repeat the run exactly, for tests: NOT private", "Run")] = None,
) -> None:
    """Train a model with differential privacy; report ε and the accuracy on held-out records."""
    given = {
        name: value
        for name, value in locals().items()
        if value is not None and name not in ("out", "resume", "tensorboard", "profile", "peer_timeout")
    }
    for name in ("download", "secure", "pin_memory"):
        if not given[name]:
            del given[name]
    for name in ("model_option", "loss_option", "feature_option", "bounding_option"):
        if name in given:
            given[f"{name}s"] = parse_options(f"--{name.replace('_', '-')}", given.pop(name))
    if gate is not None:
        given["gate"] = parse_gate(gate)
    if resume is not None and out is not None:
        raise typer.BadParameter("--resume goes on in its own folder; leave --out out", param_hint="--out")

    from lipdp.distributed.launch import TIMEOUT, launched

    with launched(timeout=peer_timeout or TIMEOUT) as world:
        _run(given, out, resume, world, tensorboard=tensorboard, profile=profile)


def _run(
    given: dict[str, Any], out: Path | None, resume: Path | None, world: World, *, tensorboard: bool, profile: bool
) -> None:
    """One process's part; the first one speaks."""
    from rich.console import Console

    from lipdp.commands.display import show_profile, show_result, terminal_monitor
    from lipdp.distributed.launch import resumed_folder
    from lipdp.training import Monitor, Trainer, configure
    from lipdp.training.profile import StepProfile

    first = world.rank == 0
    console = Console(quiet=not first)
    screen = terminal_monitor(console)
    resume = resume or resumed_folder(out)
    config = configure(**given) if resume is None else None
    folder = world.broadcast(resume or out or (_default_folder(config.dataset, config.model) if config else Path()))
    monitor = _told(screen, folder, tensorboard) if first else Monitor()
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


def _told(monitor: Monitor, folder: Path, tensorboard: bool) -> Monitor:
    if not tensorboard:
        return monitor
    from lipdp.report.tensorboard import Monitors, TensorBoard

    return Monitors((monitor, TensorBoard(folder)))


def _default_folder(dataset: str, model: str) -> Path:
    """`runs/DATASET-MODEL-TIME`, and a number where that is taken."""
    name = "-".join(re.sub(r"[^\w.]+", "-", Path(part).stem).strip("-") for part in (dataset, model))
    folder = Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
    return next(f for f in (folder, *(Path(f"{folder}-{i}") for i in range(2, 1000))) if not f.exists())
