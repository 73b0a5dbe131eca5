r"""What a private run costs in time and memory on W devices, from a short measurement on one.

The model. A step on n samples in pieces of m (micro-batches) takes

    t(n) = fixed + piece · ⌈n/m⌉ + sample · n

`fixed` is what an empty batch costs: bounds, noise, optimiser, projection, checks. W data-parallel devices take n = ⌈B/W⌉
samples each; the fixed part is done on every one of them, and the gradients of P parameters are added up once:

    T(W) = t(⌈B/W⌉) / speedup + reduce(W),   reduce(W) = 2 (W−1)/W · 4P / bandwidth + ⌈4P/32 MiB⌉ · 2 (W−1) · latency

for a ring, in the buckets that the engine sends one after the other. A device holds

    M(n) = process + state + sample · min(n, m) + record · n

`state` goes with the parameters (weights, gradients, optimiser, average, noise), `sample` is what a sample leaves for the
backward pass, `record` its bytes in the batch.

All functions here are pure; `lipdp.planning.measure` measures.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.optimize import nnls

from lipdp.errors import ParameterError

_BUCKET = 4 << 23  # bytes of one reduction: as in `lipdp.distributed.collectives`
_DRAWS = 200  # of the bootstrap
_LEVEL = 0.9
_WIDEST = 0.5  # of the interval of a sample's cost, over that cost


@dataclass(frozen=True)
class Timing:
    """Steps on one number of samples: their seconds, in the order of the interleaved repetitions."""

    samples: int
    seconds: tuple[float, ...]


@dataclass(frozen=True)
class StepTime:
    """Seconds: `fixed` a step, `piece` a micro-batch, `sample` a sample.

    >>> StepTime(0.1, 0.01, 0.001).seconds(1000, 512)
    1.12
    """

    fixed: float
    piece: float
    sample: float

    def seconds(self, samples: int, microbatch: int) -> float:
        """A step on so many samples, in pieces."""
        return self.fixed + self.piece * math.ceil(samples / microbatch) + self.sample * samples


@dataclass(frozen=True)
class StepTimes:
    """A fit and what it would have been had other repetitions been seen: the spread is the prediction's interval.

    Attributes:
        fit: through the medians.
        draws: through the medians of repetitions drawn with replacement.
    """

    fit: StepTime
    draws: tuple[StepTime, ...]

    def interval(self, samples: int, microbatch: int) -> tuple[float, float]:
        """Where 90 % of the refits put a step. It holds what varied within the measurement, and nothing else."""
        return _interval([draw.seconds(samples, microbatch) for draw in self.draws])


def fit_times(timings: Sequence[Timing], microbatch: int) -> StepTimes:
    r"""Least squares for t(n), relative to t and with no negative part.

    Args:
        timings: two numbers of samples at least above 0; with 0 among them `fixed` is measured and not extrapolated. The
            same number of repetitions each, a round over all sizes at a time, so that a slow second strikes all.
        microbatch: the pieces that were measured.

    Raises:
        ParameterError: fewer sizes or repetitions, or times so noisy that the cost of a sample is unknown: its interval is
            wider than half of it.

    >>> exact = [Timing(n, (0.1 + 0.01 * (n > 0) + 0.001 * n,) * 3) for n in (0, 64, 128)]
    >>> fit = fit_times(exact, 128).fit
    >>> round(fit.fixed, 6), round(fit.piece, 6), round(fit.sample, 6)
    (0.1, 0.01, 0.001)
    """
    sizes = sorted({timing.samples for timing in timings})
    rounds = {len(timing.seconds) for timing in timings}
    if len(sizes) != len(timings) or len([n for n in sizes if n > 0]) < 2 or rounds != {max(rounds)} or max(rounds) < 3:
        raise ParameterError(
            f"measured were {', '.join(f'{len(t.seconds)} steps on {t.samples} samples' for t in timings)}: at least two"
            " sizes above 0 and as many repetitions of each, 3 or more, are needed"
        )
    seconds = np.array([timing.seconds for timing in timings])
    samples = np.array([timing.samples for timing in timings])
    design = np.stack([np.ones(len(samples)), np.ceil(samples / microbatch), samples], axis=1)
    if 0 not in samples:  # what an empty step costs cannot be told from what a piece costs
        design[:, 1] = 0.0
    rng = np.random.default_rng(0)
    count = seconds.shape[1]
    draws = tuple(_solve(design, seconds[:, rng.integers(count, size=count)]) for _ in range(_DRAWS))
    times = StepTimes(_solve(design, seconds), draws)
    low, high = _interval([draw.sample for draw in draws])
    if not high - low <= _WIDEST * times.fit.sample:
        raise ParameterError(
            f"a sample costs between {low * 1e3:.3g} and {high * 1e3:.3g} ms by {count} repetitions at {sizes} samples: too"
            " noisy to predict from. Measure with --repeat 15, larger --sizes, or when the machine is quiet"
        )
    return times


def _solve(design: np.ndarray, seconds: np.ndarray) -> StepTime:
    medians = np.median(seconds, axis=1)
    scale = np.abs(design).max(axis=0)
    scale[scale == 0] = 1.0
    found, _ = nnls(design / scale / medians[:, None], np.ones(len(medians)))
    return StepTime(*(found / scale).tolist())


def _interval(values: Sequence[float]) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return float(low), float(high)


@dataclass(frozen=True)
class Memory:
    """Bytes: of the process with next to no model, of what goes with the parameters, per sample of a piece, per record.

    >>> Memory(process=300, state=100, sample=2.0, record=1.0).bytes(1000, 64)
    1528
    """

    process: int
    state: int
    sample: float
    record: float

    def bytes(self, samples: int, microbatch: int) -> int:
        """The peak of a device with so many samples a step."""
        return round(self.process + self.state + self.sample * min(samples, microbatch) + self.record * samples)


def fit_memory(process: int, peaks: Sequence[tuple[int, int]], record: float) -> Memory:
    """The line through measured peaks, each of a step in one piece.

    Args:
        process: the peak of a process that has loaded the same modules and trains next to nothing, in bytes.
        peaks: (samples, bytes), two numbers of samples at least.
        record: bytes of one record in the batch.

    Raises:
        ParameterError: fewer than two numbers of samples.

    >>> fit_memory(300, [(10, 420), (20, 450)], 1.0)
    Memory(process=300, state=90, sample=2.0, record=1.0)
    """
    if len({samples for samples, _ in peaks}) < 2:
        raise ParameterError(f"peaks at {[samples for samples, _ in peaks]} samples: two sizes at least are needed")
    slope, intercept = statistics.linear_regression([n for n, _ in peaks], [b for _, b in peaks])
    return Memory(process, max(0, round(intercept) - process), max(0.0, slope - record), record)


@dataclass(frozen=True, kw_only=True)
class Network:
    """What joins the devices. The defaults are assumptions, not measurements.

    Attributes:
        bandwidth: bytes a second that a device sends within a node while it receives as many.
        internode_bandwidth: bytes a second that a node sends to another, all its devices together.
        latency: seconds of one message.
        per_node: devices in a node.
    """

    bandwidth: float = 100e9
    internode_bandwidth: float = 25e9
    latency: float = 20e-6
    per_node: int = 8

    def __post_init__(self) -> None:
        if not (min(self.bandwidth, self.internode_bandwidth) > 0 and 0 <= self.latency < 60 and self.per_node >= 1):
            raise ParameterError(
                f"bandwidths {self.bandwidth:g} and {self.internode_bandwidth:g} B/s, latency {self.latency:g} s,"
                f" {self.per_node} devices a node: positive bandwidths, a latency below a minute and 1 device are needed"
            )

    def all_reduce(self, size: int, devices: int) -> float:
        """Seconds of a ring: 2 (W−1) messages of a W-th of every bucket, over the slowest link on the way.

        >>> Network(bandwidth=1e9, internode_bandwidth=1e8, latency=0.001, per_node=2).all_reduce(10**6, 2)
        0.003
        >>> round(Network(bandwidth=1e9, internode_bandwidth=1e8, latency=0.001, per_node=2).all_reduce(10**6, 4), 6)
        0.021
        """
        link = self.bandwidth if devices <= self.per_node else min(self.bandwidth, self.internode_bandwidth)
        return 2 * (devices - 1) * (size / devices / link + math.ceil(size / _BUCKET) * self.latency)


@dataclass(frozen=True)
class Cost:
    """What was measured of one model.

    Attributes:
        parameters: P.
        times, memory: the fits; `memory` None where it was not measured.
        microbatch: m, samples of a piece; None for a step in one piece.
    """

    parameters: int
    times: StepTimes
    memory: Memory | None
    microbatch: int | None


@dataclass(frozen=True)
class Prediction:
    """A step and a run on `devices`.

    Attributes:
        samples: a device's share of a batch, rounded up.
        compute_seconds, reduce_seconds: the two parts of `step_seconds`; its interval is that of the measured part.
        fixed_share: of the step, what does not shrink with more devices and is not the reduction.
        run_seconds: of all steps; without evaluation, checkpoints and waiting for data.
        peak_bytes: of a device, or None.
    """

    devices: int
    samples: int
    compute_seconds: float
    reduce_seconds: float
    step_seconds: float
    step_seconds_low: float
    step_seconds_high: float
    fixed_share: float
    steps: int
    run_seconds: float
    peak_bytes: int | None

    def as_dict(self) -> dict[str, Any]:
        """Plain values, with the device hours."""
        return {**asdict(self), "device_hours": self.devices * self.run_seconds / 3600}


def predict(
    cost: Cost,
    *,
    batch_size: int,
    steps: int,
    devices: int = 1,
    network: Network | None = None,
    speedup: float = 1.0,
) -> Prediction:
    """A run of T steps at batch size B on W devices.

    Args:
        cost: what was measured.
        batch_size, steps, devices: B, T and W, W ≤ B.
        network: for the reduction; None for the default.
        speedup: how many times faster each device is than the one that was measured, at all parts of a step. An assumption.

    Raises:
        ParameterError: one of them is out of range.

    >>> times = StepTimes(StepTime(0.01, 0.0, 0.001), (StepTime(0.01, 0.0, 0.001),))
    >>> round(predict(Cost(10**6, times, None, 512), batch_size=1000, steps=10).run_seconds, 6)
    10.1
    """
    if not (1 <= devices <= batch_size and steps >= 1 and 0 < speedup < math.inf):
        raise ParameterError(
            f"batch_size={batch_size}, steps={steps}, devices={devices}, speedup={speedup:g}: steps ≥ 1, 1 ≤ devices ≤"
            " batch_size and a speedup > 0 are needed"
        )
    samples = math.ceil(batch_size / devices)
    microbatch = min(cost.microbatch or samples, samples)
    compute = cost.times.fit.seconds(samples, microbatch) / speedup
    low, high = (bound / speedup for bound in cost.times.interval(samples, microbatch))
    reduce = (network or Network()).all_reduce(4 * cost.parameters, devices)
    step = compute + reduce
    return Prediction(
        devices=devices,
        samples=samples,
        compute_seconds=compute,
        reduce_seconds=reduce,
        step_seconds=step,
        step_seconds_low=low + reduce,
        step_seconds_high=high + reduce,
        fixed_share=cost.times.fit.fixed / speedup / step,
        steps=steps,
        run_seconds=steps * step,
        peak_bytes=None if cost.memory is None else cost.memory.bytes(samples, microbatch),
    )


def predictions(cost: Cost, devices: Iterable[int], **settings: Any) -> list[Prediction]:
    """`predict` for several numbers of devices."""
    return [predict(cost, devices=count, **settings) for count in devices]
