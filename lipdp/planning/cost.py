r"""What a private run costs in time and memory on W devices like the one at hand, from steps measured there.

Measured are seconds t(n) and peak memory M(n) of steps on no sample (an empty batch has bounds, noise, optimiser,
projection and checks), on m/4 and on m, a micro-batch. The model interpolates, and beyond m it adds micro-batches:

    t(n) = ⌊n/m⌋ · (t(m) − t(0)) + t(n mod m),   M(n) = M(min(n, m)) + record · max(0, n − m)

W devices take n = ⌈B/W⌉ samples each and add up the gradients of P parameters once, in a ring, bucket after bucket:

    T(W) = t(⌈B/W⌉) + 2 (W−1) · (4P/W / bandwidth + ⌈4P/32 MiB⌉ · latency)
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from lipdp.errors import CannotLearnWarning, ParameterError
from lipdp.privacy.engine import PrivacyEngine
from lipdp.processes import peak_bytes
from lipdp.training.choices import make_loss, make_model, make_optimizer
from lipdp.training.ema import Ema

_BUCKET = 4 << 23  # bytes of one reduction: as in `lipdp.distributed.collectives`
_WARM_UP = 2  # rounds


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The model whose steps are measured, as `lipdp.training.make_model` takes it, and the device."""

    model: str = "cnn"
    model_options: Mapping[str, Any] = field(default_factory=dict)
    input_shape: tuple[int, ...] = (1, 28, 28)
    num_classes: int = 10
    device: str = "cpu"

    def build(self) -> nn.Module:
        """A new model, on the device."""
        options = dict(self.model_options)
        return make_model(self.model, self.input_shape, self.num_classes, options).to(self.device).train()


@dataclass(frozen=True, kw_only=True)
class Scale:
    """T steps at batch size B on W devices; bytes/s and seconds a message of their slowest link are assumptions."""

    batch_size: int
    steps: int = 1000
    devices: int = 1
    bandwidth: float = 25e9
    latency: float = 20e-6

    def __post_init__(self) -> None:
        network = self.bandwidth > 0 and 0 <= self.latency < math.inf
        if not (network and self.steps >= 1 and 1 <= self.devices <= self.batch_size):
            given = ", ".join(f"{name}={value:g}" for name, value in asdict(self).items())
            raise ParameterError(f"{given}: positive numbers, and devices ≤ batch_size, are needed")


@dataclass(frozen=True)
class Prediction:
    """Of a step (median, quartiles over the measured rounds), an empty step, the reduction, all steps; of a device."""

    scale: Scale
    step_seconds: float
    step_quartiles: tuple[float, float]
    fixed_seconds: float
    reduce_seconds: float
    run_seconds: float
    peak_bytes: int | None


@dataclass(frozen=True)
class Cost:
    """Measured costs: seconds and peak bytes at each number of samples, bytes of a record, weights P."""

    parameters: int
    record: int
    sizes: tuple[int, ...]
    seconds: tuple[tuple[float, ...], ...]
    peaks: tuple[int, ...] | None = None

    def predict(self, scale: Scale) -> Prediction:
        """The cost of a run; ParameterError where a step on m samples took no longer than an empty one.

        >>> cost = Cost(10**6, 1, (0, 64, 128), ((0.1, 0.2, 0.3),) * 3)
        >>> round(cost.predict(Scale(batch_size=1024, steps=10)).run_seconds, 6)
        17.0
        """
        rounds, m, samples = np.array(self.seconds), self.sizes[-1], math.ceil(scale.batch_size / scale.devices)
        piece = rounds[:, -1] - rounds[:, 0]
        if not np.median(piece) > 0:
            raise ParameterError(f"steps on {m} samples took no longer than empty ones: raise --repeat or --microbatch")
        size = 4 * self.parameters
        message = size / scale.devices / scale.bandwidth + math.ceil(size / _BUCKET) * scale.latency
        reduce = 2 * (scale.devices - 1) * message
        rest = np.array([np.interp(samples % m, self.sizes, row) for row in rounds])
        low, step, high = np.quantile(samples // m * piece + rest + reduce, (0.25, 0.5, 0.75)).tolist()
        held = None if self.peaks is None else float(np.interp(min(samples, m), self.sizes, self.peaks))
        peak = None if held is None else round(held + self.record * max(0, samples - m))
        fixed = float(np.median(rounds[:, 0]))
        return Prediction(scale, step, (low, high), fixed, reduce, scale.steps * step, peak)


def measure_cost(
    workload: Workload, m: int, *, repeat: int = 7, memory: bool = True, clock: Callable[[], float] = time.perf_counter
) -> Cost:
    """`repeat` interleaved steps on 0, m/4 and m samples, after two to warm up; peak memory in a process for each.

    `clock=time.process_time` leaves out what other processes take from this one's core. ParameterError where m or
    `repeat` is too small or m samples do not fit in memory.
    """
    if m < 1 or repeat < 3:
        raise ParameterError(f"--microbatch {m} --repeat {repeat}: 1 sample and 3 repetitions at least are needed")
    parameters = sum(p.numel() for p in workload.build().parameters())
    sizes = tuple(sorted({0, math.ceil(m / 4), m}))
    steps = [private_step(workload, n, m) for n in sizes]
    rounds = [tuple(_seconds(step, workload.device, clock) for step in steps) for _ in range(repeat + _WARM_UP)]
    peaks = [peak_bytes(private_step, workload, n, m, device=workload.device) for n in sizes if memory]
    if None in peaks:
        raise ParameterError(
            f"{workload.model}: steps on {m} samples do not fit in memory; take a smaller --microbatch"
        )
    record = 4 * math.prod(workload.input_shape) + 8  # an input in float32 and its label
    return Cost(parameters, record, sizes, tuple(rounds[_WARM_UP:]), tuple(p for p in peaks if p) or None)


class _Alike(Dataset[Any]):
    """Any number of records in the memory of one."""

    def __init__(self, x: Tensor, count: int) -> None:
        self._x, self._count = x, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self._x[0], 0

    def read_batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        picked = torch.zeros(len(indices), dtype=torch.int64, device=self._x.device)
        return self._x.index_select(0, picked), picked


def private_step(workload: Workload, samples: int, microbatch: int) -> Callable[[], None]:
    """Draws a batch (of 0 records: an empty Poisson batch) of one random record; takes the step of `lipdp train`."""
    torch.manual_seed(0)
    model, size = workload.build(), max(samples, 1)
    x = torch.rand(1, *workload.input_shape, device=workload.device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CannotLearnWarning)  # its time is measured; nobody wants this model to learn
        module, optimizer, loader, criterion = PrivacyEngine().make_private(
            module=model,
            optimizer=make_optimizer("sgd", model.parameters(), lr=0.01, momentum=0.9),
            criterion=make_loss("cross-entropy", workload.num_classes, {"tau": 32.0})[0],
            dataset=_Alike(x, 2 * size),
            expected_batch_size=size,
            steps=10**6,  # more than are taken
            noise_multiplier=2.0,
            **({"sampling": "fixed_size"} if samples else {"dataset_size": 10**15}),  # q so small: all are empty
        )
    average, batches = Ema(module, 0.95), iter(loader)

    def step() -> None:
        inputs, targets = next(batches)
        optimizer.zero_grad()
        for xb, yb in zip(inputs.split(microbatch), targets.split(microbatch), strict=True):
            if len(xb):
                criterion(module(xb.float()), yb).backward()
        optimizer.step()
        average.update()

    return step


def _seconds(step: Callable[[], None], device: str, clock: Callable[[], float]) -> float:
    begin = clock()
    step()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return clock() - begin
