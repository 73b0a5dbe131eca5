"""Short measurements of a model's private step: seconds and peak memory against the number of samples, and a reduction's."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from torch.utils.flop_counter import FlopCounterMode

from lipdp.errors import ParameterError
from lipdp.planning.cost import Cost, Memory, Network, Timing, fit_memory, fit_times
from lipdp.privacy.engine import PrivacyEngine
from lipdp.processes import ProcessEnded, available, in_own_process, is_out_of_memory, peak_bytes
from lipdp.training.choices import make_loss, make_model, make_optimizer
from lipdp.training.ema import Ema

_WARM_UP = 2  # rounds
_MANY = 10**6
_PATIENCE = timedelta(minutes=2)  # of a process that waits for the other
_EMPTY = 10**15  # a public N so large that every batch of one expected record is empty


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The step that is measured: what `lipdp train` does between two batches, on random records.

    Attributes:
        model, model_options, input_shape, num_classes: as `lipdp.training.choices.make_model` takes them.
        optimizer: "sgd" (with momentum) or "adam".
        microbatch: samples of a piece, None for a step in one piece.
        average: keep the moving average of the weights, as `lipdp train` does.
        device: "cpu" or a CUDA device.
    """

    model: str = "cnn"
    model_options: Mapping[str, Any] = field(default_factory=dict)
    input_shape: tuple[int, ...] = (1, 28, 28)
    num_classes: int = 10
    optimizer: str = "sgd"
    microbatch: int | None = 512
    average: bool = True
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.microbatch is not None and self.microbatch < 1:
            raise ParameterError(f"microbatch={self.microbatch}: a piece has at least one sample")

    def build(self) -> nn.Module:
        """A new model, on the device."""
        torch.manual_seed(0)
        options = dict(self.model_options)
        return make_model(self.model, self.input_shape, self.num_classes, options).to(self.device).train()

    @property
    def record_bytes(self) -> int:
        """Of an input in float32 and its label."""
        return 4 * math.prod(self.input_shape) + 8


def private_step(
    workload: Workload, samples: int, *, check_every: int | None = None
) -> tuple[nn.Module, Callable[[], None]]:
    """The model, and a function that draws a batch of `samples` records (0: an empty Poisson batch) and takes its step.

    The records are one random record repeated, without memory of their own. `check_every` is the engine's.
    """
    model = workload.build()
    size = max(samples, 1)
    x = torch.rand(1, *workload.input_shape, device=workload.device).expand(2 * size, *workload.input_shape)
    y = torch.zeros(1, dtype=torch.int64, device=workload.device).expand(2 * size)
    module, optimizer, loader, criterion = PrivacyEngine(check_every=check_every).make_private(
        module=model,
        optimizer=make_optimizer(workload.optimizer, model.parameters(), lr=0.01, momentum=0.9),
        criterion=make_loss("cross-entropy", workload.num_classes, {"tau": 32.0})[0],
        dataset=TensorDataset(x, y),
        expected_batch_size=size,
        steps=_MANY,
        noise_multiplier=2.0,
        **({"sampling": "fixed_size"} if samples else {"dataset_size": _EMPTY}),
    )
    average = _average(workload, module)
    batches: Iterator[tuple[Tensor, Tensor]] = iter(loader)
    piece = workload.microbatch or size

    def step() -> None:
        inputs, targets = next(batches)
        optimizer.zero_grad()
        for xb, yb in zip(inputs.split(piece), targets.split(piece), strict=True):
            if len(xb):
                criterion(module(xb.float()), yb).backward()
        optimizer.step()
        average()

    return module, step


def plain_step(workload: Workload, samples: int) -> tuple[nn.Module, Callable[[], None]]:
    """The same model's step without privacy: no noise, no bound, no projection; for ratios."""
    model = workload.build()
    x = torch.rand(1, *workload.input_shape, device=workload.device).expand(2 * samples, *workload.input_shape)
    y = torch.zeros(2 * samples, dtype=torch.int64, device=workload.device)
    optimizer = make_optimizer(workload.optimizer, model.parameters(), lr=0.01, momentum=0.9)
    loss = make_loss("cross-entropy", workload.num_classes, {"tau": 32.0})[0]
    average = _average(workload, model)
    piece = workload.microbatch or samples

    def step() -> None:
        chosen = torch.randperm(2 * samples, device=workload.device)[:samples]
        inputs, targets = x.index_select(0, chosen), y.index_select(0, chosen)
        optimizer.zero_grad()
        for xb, yb in zip(inputs.split(piece), targets.split(piece), strict=True):
            (loss(model(xb.float()), yb).sum() / samples).backward()
        optimizer.step()
        average()

    return model, step


def _average(workload: Workload, model: nn.Module) -> Callable[[], None]:
    return Ema(model, 0.95).update if workload.average else lambda: None


STEPS: dict[str, Callable[[Workload, int], tuple[nn.Module, Callable[[], None]]]] = {
    "private": partial(private_step, check_every=1),
    "private_unchecked": partial(private_step, check_every=0),
    "non_private": plain_step,
}
"""The kinds of step that `peak` takes; the private one with and without its occasional look at a few records' gradients."""


def times(
    workload: Workload, sizes: Sequence[int], *, repeat: int = 7, clock: Callable[[], float] = time.perf_counter
) -> list[Timing]:
    """Seconds of private steps on each number of samples, and on none; interleaved, after two rounds to warm up.

    Args:
        workload: the step.
        sizes: numbers of samples.
        repeat: rounds.
        clock: `time.process_time` leaves out what other processes take from this one's cores.
    """
    steps = {samples: private_step(workload, samples)[1] for samples in dict.fromkeys((0, *sizes))}
    seconds: dict[int, list[float]] = {samples: [] for samples in steps}
    for number in range(repeat + _WARM_UP):
        for samples, step in steps.items():
            _wait(workload.device)
            begin = clock()
            step()
            _wait(workload.device)
            if number >= _WARM_UP:
                seconds[samples].append(clock() - begin)
    return [Timing(samples, tuple(values)) for samples, values in seconds.items()]


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def peak(
    workload: Workload, samples: int, *, kind: str = "private", steps: int = 3, memory_limit: int | None = None
) -> int:
    """Peak bytes of a process of its own that takes a few steps on so many samples, of a kind in `STEPS`.

    Raises:
        ParameterError: there is not that much memory.
    """
    limit = (memory_limit or int(0.8 * available())) if workload.device == "cpu" else None
    try:
        found = in_own_process(_peak, workload, samples, kind, steps, memory_limit=limit)
    except ProcessEnded:
        found = None
    if found is None:
        raise ParameterError(
            f"{workload.model}: a step on {samples} samples does not fit in memory; measure smaller --sizes"
        )
    return int(found)


def _peak(workload: Workload, samples: int, kind: str, steps: int) -> int | None:
    """None where there is no memory left."""
    try:
        if workload.device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats(workload.device)
        _, step = STEPS[kind](workload, samples)
        for _ in range(steps):
            step()
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return None
    return peak_bytes(workload.device)


def memory(workload: Workload, sizes: Sequence[int]) -> Memory:
    """The line through the peaks of steps in one piece, above that of a process which trains five weights."""
    process = peak(replace(workload, model="linear", model_options={}, input_shape=(5,), num_classes=2), 1)
    peaks = [(samples, peak(workload, samples)) for samples in sizes]
    return fit_memory(process, peaks, workload.record_bytes)


def flops(workload: Workload) -> int:
    """Floating-point operations of a sample's forward and backward pass, as torch counts them: matrix products only."""
    model = workload.build()
    counter = FlopCounterMode(display=False)
    with counter:
        model(torch.rand(1, *workload.input_shape, device=workload.device)).sum().backward()
    return int(counter.get_total_flops())


def default_sizes(workload: Workload, share: int) -> tuple[int, ...]:
    """Three numbers of samples, up to a piece and to a device's share of the batch.

    >>> default_sizes(Workload(microbatch=512), 4096)
    (128, 256, 512)
    """
    largest = max(4, min(workload.microbatch or 512, share))
    return tuple(max(1, largest // part) for part in (4, 2, 1))


def measure(
    workload: Workload,
    sizes: Sequence[int],
    *,
    repeat: int = 7,
    with_memory: bool = True,
    clock: Callable[[], float] = time.perf_counter,
    progress: Callable[[str], None] = lambda message: None,
) -> tuple[Cost, list[Timing]]:
    """Everything that `lipdp.planning.cost.predict` needs, and the times it was fitted to.

    Args:
        workload: the step.
        sizes: two numbers of samples at least, none above the micro-batch.
        repeat: interleaved rounds.
        with_memory: also peak memory, in a process for each size.
        clock: see `times`.
        progress: is told what is being measured.

    Raises:
        ParameterError: sizes that are not enough or above the micro-batch, no memory for them, or noise that hides them.
    """
    above = [n for n in sizes if n < 1 or n > (workload.microbatch or n)]
    if above or len(set(sizes)) < 2 or repeat < 3:
        raise ParameterError(
            f"sizes {list(sizes)}, {repeat} repetitions: two sizes at least in 1 … {workload.microbatch or 'B'} (a"
            " micro-batch) and 3 repetitions are needed"
        )
    parameters = sum(p.numel() for p in workload.build().parameters())
    progress(
        f"{workload.model}, {parameters:,} weights: {repeat} interleaved steps on 0, {', '.join(map(str, sizes))} samples"
    )
    timings = times(workload, sizes, repeat=repeat, clock=clock)
    fitted = fit_times(timings, workload.microbatch or max(sizes))
    held = None
    if with_memory:
        progress("peak memory, a process each")
        held = memory(workload, sorted(set(sizes)))
    return Cost(parameters, fitted, held, workload.microbatch), timings


def measure_reduce(parameters: int, folder: Path, *, repeat: int = 7) -> Network:
    """Bandwidth and latency of an all-reduce over gloo between two processes on this machine.

    Args:
        parameters: P, of which the gradients are added up in float32.
        folder: an empty one that both processes see, for their rendezvous.
        repeat: all-reduces of each of two lengths, one number and all P.
    """
    context = torch.multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    arguments = (str(folder / "rendezvous"), parameters, repeat, queue)
    torch.multiprocessing.spawn(_reduce, args=arguments, nprocs=2)
    short, whole = queue.get()
    bandwidth = 4 * parameters / max(whole - short, whole / 2)  # of a short vector the latency is most
    return Network(bandwidth=bandwidth, internode_bandwidth=bandwidth, latency=short / 2, per_node=2)


def _reduce(rank: int, rendezvous: str, parameters: int, repeat: int, queue: Any) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2, timeout=_PATIENCE)
    found = []
    for length in (1, parameters):
        vector, seconds = torch.zeros(length), []
        for _ in range(repeat + _WARM_UP):
            dist.barrier()
            begin = time.perf_counter()
            dist.all_reduce(vector)
            seconds.append(time.perf_counter() - begin)
        found.append(statistics.median(seconds[_WARM_UP:]))
    if rank == 0:
        queue.put(tuple(found))
    dist.destroy_process_group()
