"""Where a step's time goes: a table of its parts, and a trace of a few steps, of the run as it goes on."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, record_function

from lipdp.files import write_bytes, write_json
from lipdp.timing import UNTIMED, Timer

PARTS = {
    "sampler": "which records",
    "data": "fetching them",
    "model": "forward pass",
    "loss": "and the gate at the logits",
    "backward": "backward pass",
    "exchange": "summing the gradients of all processes",
    "bound": "Δ and the noise's std, from the weights as they are",
    "noise": "drawn and added",
    "optimiser": "with its schedule and the average of the weights",
    "projection": "back in the constraints",
    "checks": "of order, gradients and projections",
    "other": "the rest: zeroing gradients, freeing the graph, ε at a record",
}
"""The parts of a step and what they are."""
WARM, TIMED, TRACED = 2, 10, 3


class PartsTimer:
    """The time of each part of a step, without that of the parts within it, so that all parts add up to the step.

    On a CPU by the clock, and by the processor time of all threads, which other processes do not lengthen. On CUDA an
    event is queued at every change from one part to another, and read when all is over: the device's own time line is
    cut in pieces, and nothing waits for it.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device if device.type == "cuda" else None
        self._open: list[str] = []
        self._steps: list[list[tuple[str, Any]]] = []

    @contextmanager
    def step(self) -> Iterator[None]:
        """All that happens inside is one step."""
        self._steps.append([])
        with self("other"):
            yield

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """All that happens inside is this part."""
        self._open.append(part)
        self._mark(part)
        try:
            yield
        finally:
            self._open.pop()
            self._mark(self._open[-1] if self._open else "")

    def _mark(self, part: str) -> None:
        if self._cuda is None:
            now: Any = time.perf_counter(), time.process_time()
        else:
            now = torch.cuda.Event(enable_timing=True)
            now.record(torch.cuda.current_stream(self._cuda))
        self._steps[-1].append((part, now))

    def read(self, *, processor: bool = False) -> list[dict[str, float]]:
        """Per step: part → seconds, on a CPU of processor time if so wished."""
        if self._cuda is not None:
            torch.cuda.synchronize(self._cuda)
        found = []
        for marks in self._steps:
            parts: dict[str, float] = {}
            for (part, start), (_, end) in pairwise(marks):
                seconds = end[processor] - start[processor] if self._cuda is None else start.elapsed_time(end) / 1000.0
                parts[part] = parts.get(part, 0.0) + seconds
            found.append(parts)
        return found


def _labelled(part: str) -> AbstractContextManager[Any]:
    """A part of a step as a trace shows it."""
    return record_function(f"lipdp: {part}")


class StepProfile:
    """Times the parts of some steps of a run, then traces some more; the run computes what it would have computed.

    After two steps to get warm ten are timed by `PartsTimer`, without torch's profiler, which would make small
    operations look slower, and three are traced by it. A run with fewer steps left has fewer of each.

    Attributes:
        table: what `profile.json` holds, once the steps are over: mean seconds per part; they add up to `step_seconds`.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self.table: dict[str, Any] | None = None
        self._timed, self._traced = range(0), range(0)
        self._timer: PartsTimer | None = None
        self._tracer: torch.profiler.profile | None = None

    @contextmanager
    def step(self, done: int, total: int, device: torch.device) -> Iterator[Timer]:
        """A step of the run, drawing its batch included; what comes is to be told of its parts."""
        if self._timer is None:
            self._timer = PartsTimer(device)
            self._timed, self._traced = _windows(done, total)
        if done in self._timed:
            with self._timer.step():
                yield self._timer
            if done + 1 == self._timed.stop:
                self._tabulate(device)
        elif done in self._traced:
            with self._tracing(device, start=done == self._traced.start, stop=done + 1 == self._traced.stop):
                yield _labelled
        else:
            yield UNTIMED

    @contextmanager
    def _tracing(self, device: torch.device, *, start: bool, stop: bool) -> Iterator[None]:
        if start:
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
            self._tracer = torch.profiler.profile(activities=activities)
            self._tracer.start()
        try:
            with _labelled("step"):
                yield
        except BaseException:
            stop = True
            raise
        finally:
            if stop and self._tracer is not None:
                self._tracer.stop()
        if stop and self._tracer is not None and self.folder is not None:
            with tempfile.TemporaryDirectory() as scratch:
                trace = Path(scratch, "trace.json")
                self._tracer.export_chrome_trace(str(trace))
                write_bytes(self.folder / "trace.json", trace.read_bytes())

    def _tabulate(self, device: torch.device) -> None:
        if self._timer is None:
            return
        processor = self._timer.read(processor=True) if device.type == "cpu" else None
        self.table = summary(self._timer.read(), first=self._timed.start + 1, device=device, processor=processor)
        if self.folder is not None:
            write_json(self.folder / "profile.json", self.table)


def _windows(done: int, total: int) -> tuple[range, range]:
    """Which steps, counted from 0, are timed and which are traced.

    >>> _windows(0, 100), _windows(4, 8), _windows(9, 10)
    ((range(2, 12), range(12, 15)), (range(6, 7), range(7, 8)), (range(9, 10), range(10, 10)))
    """
    left = total - done
    warm = min(WARM, max(left - 2, 0))
    traced = min(TRACED, (left - warm) // 2)
    timed = min(TIMED, left - warm - traced)
    start = done + warm
    return range(start, start + timed), range(start + timed, start + timed + traced)


def summary(
    steps: Sequence[dict[str, float]],
    *,
    first: int,
    device: torch.device,
    processor: Sequence[dict[str, float]] | None = None,
) -> dict[str, Any]:
    """Mean seconds of each part over the steps, of processor time too, and under what circumstances they were taken.

    >>> table = summary([{"noise": 1.0, "other": 2.0}, {"noise": 3.0}], first=3, device=torch.device("cpu"))
    >>> table["step_seconds"], table["parts"]["noise"], table["steps"]
    (3.0, {'seconds': 2.0, 'share': 0.6666666666666666}, [3, 4])
    """
    totals = [sum(parts.values()) for parts in steps]
    mean = sum(totals) / len(totals)
    table = {part: {"seconds": s, "share": s / mean if mean else 0.0} for part, s in _means(steps).items()}
    for part, seconds in _means(processor or []).items():
        table[part]["processor_seconds"] = seconds
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {
        "steps": [first, first + len(steps) - 1],
        "step_seconds": mean,
        "fastest_step_seconds": min(totals),
        "parts": table,
        "device": name,
        "threads": torch.get_num_threads(),
        "not_covered": "times: they depend on the sizes of the batches, which are secret",
        "load": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
    }


def _means(steps: Sequence[dict[str, float]]) -> dict[str, float]:
    return {part: sum(parts.get(part, 0.0) for parts in steps) / len(steps) for part in PARTS if steps}
