"""Step time and peak memory of every trainer against the batch size."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch.utils.data import TensorDataset

from lipdp.accounting.plan import PrivacyPlan
from lipdp.comparison.contenders import Contender, Setup, contenders
from lipdp.comparison.protocol import Session, Task
from lipdp.comparison.results import Cell, Results, markdown
from lipdp.errors import LipdpError, ParameterError
from lipdp.processes import is_out_of_memory, peak_bytes
from lipdp.training.recipes import recipe

SHAPES: Mapping[str, tuple[int, ...]] = {
    "mnist": (1, 28, 28),
    "fashion-mnist": (1, 28, 28),
    "cifar10": (3, 32, 32),
    "digits": (1, 8, 8),
}
DISTINCT = ("non_private", "clipless", "backprop_clipping", "opacus_hooks", "opacus_functorch", "opacus_ghost")
"""Trainers whose steps cost differently; the other ways of clipping cost what Opacus' hooks cost."""

_MANY = 10**6  # steps: more than a benchmark takes
OUT_OF_MEMORY, REFUSED, MEASURED = "out of memory", "refused", "measured"


@dataclass(frozen=True, kw_only=True)
class SpeedConfig:
    """What is measured.

    Attributes:
        dataset: gives the shape of the images, which are random: a step takes as long on them as on real ones.
        model, model_options: of the zoo; None takes the options of the data set's recipe.
        batch_sizes: expected batch sizes B, in the order they are measured.
        trainers, kinds: of `lipdp compare`: names of `TRAINERS`, and "lipschitz", "plain"; none given, all.
        repeat: interleaved repetitions: every trainer takes one step on the same batch, then the next round begins.
        device: "cpu" or a CUDA device.
        memory_limit: bytes that one process may allocate on a CPU; None takes 80 % of what is available.
        memory: measure the peak memory too, each cell in a process of its own.
    """

    dataset: str = "mnist"
    model: str = "cnn"
    model_options: Mapping[str, Any] | None = None
    batch_sizes: Sequence[int] = (64, 256, 1024, 4096, 8192)
    trainers: Sequence[str] = DISTINCT
    kinds: Sequence[str] = ("lipschitz", "plain")
    repeat: int = 7
    device: str = "cpu"
    memory_limit: int | None = None
    memory: bool = True
    setup: Setup = field(init=False)

    def __post_init__(self) -> None:
        if self.dataset not in SHAPES:
            raise ParameterError(f"dataset {self.dataset!r}: speed is measured on shapes of {', '.join(SHAPES)}")
        if not self.batch_sizes or min(self.batch_sizes) < 1 or self.repeat < 1:
            raise ParameterError(f"batch_sizes={list(self.batch_sizes)}, repeat={self.repeat}: at least 1 is needed")
        recommended = recipe(self.dataset, self.model).get("model_options", {})
        options = recommended if self.model_options is None else self.model_options
        setup = Setup(
            model=self.model,
            model_options=dict(options),
            input_shape=SHAPES[self.dataset],
            num_classes=10,
            loss="cross-entropy",
            loss_options={"tau": 32.0},
        )
        object.__setattr__(self, "setup", setup)


def speed(
    config: SpeedConfig,
    *,
    out: str | None = None,
    progress: Callable[[str], None] = lambda message: None,
) -> Results:
    """Measure, batch size by batch size; a folder that holds some of the cells is completed.

    The time of a step is the median over interleaved repetitions; its ratio to the non-private step of the same model,
    and of the twin, is the median of the ratios within a repetition, so that a slow second of the machine strikes both.
    Peak memory is that of a process which takes three steps: its resident set on a CPU, `max_memory_allocated` on CUDA.
    A trainer that runs out of memory has a cell that says so, and is not tried at larger batches.

    Args:
        config: what is measured.
        out: the folder, with `results.json`.
        progress: is told what is being measured.

    Returns:
        Cells with trainer, model, dataset, batch_size, status and, where it was measured, step_seconds,
        step_seconds_iqr, ratio_to_non_private, ratio_to_plain_non_private, peak_bytes.
    """
    asked = {**asdict(config), "what": "speed", "threads": torch.get_num_threads()}
    results = Results(out, config={k: v for k, v in asked.items() if k not in ("setup", "batch_sizes")})
    entered = contenders(config.trainers, config.kinds)
    for number, batch_size in enumerate(sorted(config.batch_sizes), start=1):
        where = f"B = {batch_size} ({number} of {len(config.batch_sizes)})"
        if results.find(batch_size=batch_size):
            continue
        left = [r for r in entered if not _ran_out(results, r, config)]
        peaks: dict[Contender, Cell] = {}
        for contender in left if config.memory else ():
            progress(f"{where}: memory of {contender.trainer.name} on {contender.model_name(config.model)}")
            peaks[contender] = peak(config, contender, batch_size)
        progress(f"{where}: {config.repeat} interleaved repetitions")
        alive = [r for r in left if peaks.get(r, {}).get("status", MEASURED) == MEASURED]
        times = _times(config, alive, batch_size)
        for contender in entered:
            measured = times.get(contender, {"status": OUT_OF_MEMORY})
            cell = (
                {**measured, **peaks.get(contender, {})}
                if measured["status"] == MEASURED
                else {**peaks.get(contender, {}), **measured}
            )
            results.add({**_key(config, contender, batch_size), **cell})
    return results


def _key(config: SpeedConfig, contender: Contender, batch_size: int) -> Cell:
    return {
        "trainer": contender.trainer.name,
        "model": contender.model_name(config.model),
        "dataset": config.dataset,
        "batch_size": batch_size,
        "device": config.device,
    }


def _ran_out(results: Results, contender: Contender, config: SpeedConfig) -> bool:
    return bool(
        results.find(trainer=contender.trainer.name, model=contender.model_name(config.model), status=OUT_OF_MEMORY)
    )


def start(config: SpeedConfig, contender: Contender, batch_size: int) -> Session:
    """A session on random images, every batch about `batch_size` of twice as many records."""
    torch.manual_seed(0)
    setup = config.setup
    model = setup.build(contender).to(config.device)
    x = torch.rand(2 * batch_size, *setup.input_shape, device=config.device)
    y = torch.randint(setup.num_classes, (2 * batch_size,), device=config.device)
    task = Task(
        dataset=TensorDataset(x, y),
        loss=setup.loss_for(contender),
        plan=PrivacyPlan(dataset_size=len(x), expected_batch_size=batch_size, steps=_MANY, noise_multiplier=2.0),
        optimizer=partial(torch.optim.SGD, lr=0.01, momentum=0.9),
        seed=0,  # the same batches for every trainer
    )
    session = contender.trainer.start(model, task)
    session.model.train()
    return session


def prepare(config: SpeedConfig, contender: Contender, batch_size: int) -> Callable[[], None]:
    """A session's steps, a batch each."""
    session = start(config, contender, batch_size)
    batches = iter(session.loader)
    return lambda: session.step(*next(batches))


def peak(config: SpeedConfig, contender: Contender, batch_size: int) -> Cell:
    """A cell with the peak memory of a process that takes three steps."""
    limits: dict[str, Any] = {"device": config.device, "memory_limit": config.memory_limit}
    try:
        found = peak_bytes(prepare, config, contender, batch_size, **limits)
    except LipdpError as error:
        return {"status": REFUSED, "reason": str(error)}
    return {"status": OUT_OF_MEMORY} if found is None else {"status": MEASURED, "peak_bytes": found}


def _times(config: SpeedConfig, asked: Sequence[Contender], batch_size: int) -> dict[Contender, Cell]:
    """Cells with times and ratios."""
    seconds: dict[Contender, list[float]] = {contender: [] for contender in asked}
    cells: dict[Contender, Cell] = {}
    sessions: dict[Contender, Session] = {}
    for contender in asked:
        try:
            sessions[contender] = start(config, contender, batch_size)
        except LipdpError as error:
            cells[contender] = {"status": REFUSED, "reason": str(error)}
    batches = {contender: iter(session.loader) for contender, session in sessions.items()}
    for repetition in range(config.repeat + 2):  # two to warm up
        for contender in list(sessions):
            try:
                taken = _timed(sessions[contender], next(batches[contender]), config.device)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                cells[contender] = {"status": OUT_OF_MEMORY}
                sessions.pop(contender).close()
                continue
            seconds[contender] += [taken] if repetition >= 2 else []
    for contender, session in sessions.items():
        session.close()
        cells[contender] = {"status": MEASURED, **_summary(seconds[contender])}
        for name, yardstick in (("ratio_to_non_private", contender.plain), ("ratio_to_plain_non_private", True)):
            base = next((r for r in sessions if not r.trainer.private and r.plain is yardstick), None)
            if base is not None:
                cells[contender][name] = statistics.median(
                    a / b for a, b in zip(seconds[contender], seconds[base], strict=True)
                )
    gc.collect()
    return cells


def _timed(session: Session, batch: Any, device: str) -> float:
    begin = time.perf_counter()
    session.step(*batch)
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def _summary(seconds: Sequence[float]) -> Cell:
    low, _, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else (seconds[0],) * 3
    return {"step_seconds": statistics.median(seconds), "step_seconds_iqr": high - low, "repetitions": len(seconds)}


def table(results: Results) -> str:
    """Time (and its ratio to non-private) and memory, a row per trainer and model, a column per batch size."""
    sizes = sorted({cell["batch_size"] for cell in results.cells})
    keys = dict.fromkeys((cell["model"], cell["trainer"]) for cell in results.cells)
    body = []
    for model, trainer in keys:
        cells = [next(iter(results.find(model=model, trainer=trainer, batch_size=b)), {}) for b in sizes]
        body.append([model, trainer, *map(_text, cells)])
    return markdown(["model", "trainer", *(f"B = {b}" for b in sizes)], body)


def _text(cell: Cell) -> str:
    if "step_seconds" not in cell:
        return str(cell.get("status", ""))
    ratio = f" ({cell['ratio_to_non_private']:.2f}×)" if "ratio_to_non_private" in cell else ""
    memory = f", {cell['peak_bytes'] / 2**20:,.0f} MiB" if "peak_bytes" in cell else ""
    return f"{cell['step_seconds'] * 1e3:,.0f} ms{ratio}{memory}"
