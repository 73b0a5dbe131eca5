"""Step time and peak memory of every trainer against the batch size."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch.utils.data import TensorDataset

from lipdp.accounting.plan import PrivacyPlan
from lipdp.comparison.configs import SpeedConfig
from lipdp.comparison.contenders import Contender, contenders
from lipdp.comparison.protocol import Session, Task
from lipdp.comparison.results import Cell, Results, markdown
from lipdp.errors import LipdpError
from lipdp.processes import is_out_of_memory, peak_bytes

_MANY = 10**6  # steps: more than a benchmark takes
OUT_OF_MEMORY, REFUSED, FAILED, MEASURED = "out of memory", "refused", "failed", "measured"
Entry = tuple[Contender, int]
"""A contender, and how many views of each record it is given."""


def speed(
    config: SpeedConfig, *, out: str | None = None, progress: Callable[[str], None] = lambda message: None
) -> Results:
    """Measure, batch size by batch size; a folder that holds some of the cells is completed.

    The time of a step is the median over interleaved repetitions; its ratio to the non-private step of the same model,
    and of the twin, is the median of the ratios within a repetition, so that a slow second of the machine strikes both.
    Peak memory is that of three steps: the resident set of a process of their own on a CPU, what torch allocates for
    them on CUDA. A trainer that runs out of memory has a cell that says so, and is not tried at larger batches.

    Returns:
        Cells with trainer, model, dataset, batch_size, views, status and, where it was measured, step_seconds,
        step_seconds_iqr, peak_bytes and the ratios ratio_to_non_private and ratio_to_plain_non_private, at the same
        number of views, and ratio_to_one_view, of the same trainer.
    """
    entered = [(c, views) for views in sorted(config.views) for c in contenders(config.trainers, config.kinds)]
    config.setup.build(entered[0][0])  # a model that cannot be built is refused here; in a cell it would be a status
    asked = {**asdict(config), "what": "speed", "threads": torch.get_num_threads()}
    asked.pop("batch_sizes")
    results = Results(out, config=asked)
    for number, batch_size in enumerate(sorted(config.batch_sizes), start=1):
        where = f"B = {batch_size} ({number} of {len(config.batch_sizes)})"
        if results.find(batch_size=batch_size):
            continue
        left = [entry for entry in entered if not _ran_out(results, entry, config)]
        peaks: dict[Entry, Cell] = {}
        for contender, views in left if config.memory else ():
            what = f"{contender.trainer.name} on {contender.model_name(config.model)}"
            progress(f"{where}: memory of {what}" + (f", {views} views" if views > 1 else ""))
            peaks[contender, views] = peak(config, contender, batch_size, views=views)
        progress(f"{where}: {config.repeat} interleaved repetitions")
        alive = [entry for entry in left if peaks.get(entry, {}).get("status", MEASURED) == MEASURED]
        times = _times(config, alive, batch_size)
        for entry in entered:
            found = peaks.get(entry, {"status": OUT_OF_MEMORY})  # or it ran out at a smaller batch
            found = {**found, **times.get(entry, {})}
            results.add({**_key(config, entry), "batch_size": batch_size, "device": config.device, **found})
    return results


def _key(config: SpeedConfig, entry: Entry) -> Cell:
    contender, views = entry
    names = {"trainer": contender.trainer.name, "model": contender.model_name(config.model)}
    return {**names, "dataset": config.dataset, "views": views}


def _ran_out(results: Results, entry: Entry, config: SpeedConfig) -> bool:
    return bool(results.find(**_key(config, entry), status=OUT_OF_MEMORY))


def images(config: SpeedConfig, batch_size: int) -> TensorDataset:
    """Random images and classes, twice as many as a batch holds."""
    drawn: Any = {"generator": torch.Generator(config.device).manual_seed(0), "device": config.device}
    x = torch.rand(2 * batch_size, *config.setup.input_shape, **drawn)
    y = torch.randint(config.setup.num_classes, (2 * batch_size,), **drawn)
    return TensorDataset(x, y)


def start(
    config: SpeedConfig, contender: Contender, batch_size: int, *, views: int = 1, dataset: TensorDataset | None = None
) -> Session:
    """A session on random images, every batch about `batch_size` of them. All views of a record are the same."""
    torch.manual_seed(0)
    setup = config.setup
    model = setup.build(contender).to(config.device)
    x, y = (dataset or images(config, batch_size)).tensors
    task = Task(
        dataset=TensorDataset(x if views == 1 else x.unsqueeze(1).expand(-1, views, *x.shape[1:]), y),
        loss=setup.loss_for(contender),
        plan=PrivacyPlan(dataset_size=len(x), expected_batch_size=batch_size, steps=_MANY, noise_multiplier=2.0),
        optimizer=partial(torch.optim.SGD, lr=0.01, momentum=0.9),
        views=views,
        seed=0,  # the same batches for every trainer
    )
    session = contender.trainer.start(model, task)
    session.model.train()
    return session


def prepare(config: SpeedConfig, contender: Contender, batch_size: int, views: int = 1) -> Callable[[], None]:
    """A session's steps, a batch each."""
    session = start(config, contender, batch_size, views=views)
    batches = iter(session.loader)
    return lambda: session.step(*next(batches))


def peak(config: SpeedConfig, contender: Contender, batch_size: int, *, views: int = 1) -> Cell:
    """A cell with the peak memory of three steps."""
    limit = None if config.memory_limit is None else int(config.memory_limit * 2**30)
    try:
        found = peak_bytes(prepare, config, contender, batch_size, views, device=config.device, memory_limit=limit)
    except (LipdpError, RuntimeError) as error:
        return _trouble(error)
    return {"status": OUT_OF_MEMORY} if found is None else {"status": MEASURED, "peak_bytes": found}


def _trouble(error: Exception) -> Cell:
    """What a cell says where there is no measurement."""
    if is_out_of_memory(error):
        return {"status": OUT_OF_MEMORY}
    if isinstance(error, LipdpError):
        return {"status": REFUSED, "reason": str(error)}
    return {"status": FAILED, "reason": f"{type(error).__name__}: {error}"}


def _times(config: SpeedConfig, asked: Sequence[Entry], batch_size: int) -> dict[Entry, Cell]:
    """Cells with times and ratios."""
    seconds: dict[Entry, list[float]] = {entry: [] for entry in asked}
    cells: dict[Entry, Cell] = {}
    sessions: dict[Entry, Session] = {}
    dataset = images(config, batch_size)
    for entry in asked:
        try:
            sessions[entry] = start(config, entry[0], batch_size, views=entry[1], dataset=dataset)
        except (LipdpError, MemoryError, RuntimeError) as error:
            cells[entry] = _trouble(error)
    batches = {entry: iter(session.loader) for entry, session in sessions.items()}
    for repetition in range(config.repeat + 2):  # two to warm up
        for entry in list(sessions):
            try:
                taken = _timed(sessions[entry], next(batches[entry]), config.device)
            except (MemoryError, RuntimeError) as error:
                cells[entry] = _trouble(error)
                sessions.pop(entry).close()
                continue
            seconds[entry] += [taken] if repetition >= 2 else []
    for entry, session in sessions.items():
        session.close()
        bases = {name: base for name, base in _bases(entry, sessions).items() if base is not None}
        ratios = {
            name: statistics.median(a / b for a, b in zip(seconds[entry], seconds[base], strict=True))
            for name, base in bases.items()
        }
        cells[entry] = {"status": MEASURED, **_summary(seconds[entry]), **ratios}
    gc.collect()
    return cells


def _bases(entry: Entry, measured: Collection[Entry]) -> dict[str, Entry | None]:
    """Ratio → what an entry's times are divided by, if that was measured."""
    contender, views = entry
    non_private = {c.plain: (c, k) for c, k in measured if not c.trainer.private and k == views}
    return {
        "ratio_to_non_private": non_private.get(contender.plain),
        "ratio_to_plain_non_private": non_private.get(True),
        "ratio_to_one_view": (contender, 1) if views > 1 and (contender, 1) in measured else None,
    }


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
    """Time (its ratios to non-private and to one view) and memory, a row a trainer and model, a column a batch size."""
    columns = sorted({(cell["batch_size"], cell["views"]) for cell in results.cells})
    keys = dict.fromkeys((cell["model"], cell["trainer"]) for cell in results.cells)
    body = []
    for model, trainer in keys:
        cells = [next(iter(results.find(model=model, trainer=trainer, batch_size=b, views=k)), {}) for b, k in columns]
        body.append([model, trainer, *map(_text, cells)])
    titles = [f"B = {b}" + (f", {k} views" if k > 1 else "") for b, k in columns]
    return markdown(["model", "trainer", *titles], body)


def _text(cell: Cell) -> str:
    if "step_seconds" not in cell:
        return str(cell.get("status", ""))
    ratios = [f"{cell['ratio_to_non_private']:.2f}×"] if "ratio_to_non_private" in cell else []
    ratios += [f"{cell['ratio_to_one_view']:.1f} × one view"] if "ratio_to_one_view" in cell else []
    ratio = f" ({', '.join(ratios)})" if ratios else ""
    memory = f", {cell['peak_bytes'] / 2**20:,.0f} MiB" if "peak_bytes" in cell else ""
    return f"{cell['step_seconds'] * 1e3:,.0f} ms{ratio}{memory}"
