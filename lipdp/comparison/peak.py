"""The peak memory of one trainer, measured in a process of its own."""

from __future__ import annotations

import multiprocessing
import resource
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from lipdp.comparison.results import Cell
from lipdp.comparison.rows import Row
from lipdp.comparison.speed import MEASURED, OUT_OF_MEMORY, REFUSED, SpeedConfig, is_out_of_memory, start
from lipdp.errors import LipdpError

_STEPS = 3


def peak(config: SpeedConfig, row: Row, batch_size: int) -> Cell:
    """A cell with the highest resident set of a process that takes three steps, or what the device held at most.

    The process is forked from a server that has imported the package and nothing else, so that all start alike. On a CPU
    an allocation beyond the limit fails in it; nothing else on the machine is killed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(sender, config, row, batch_size, torch.get_num_threads()))
    process.start()
    sender.close()
    try:
        cell: Cell = receiver.recv()
    except EOFError:  # the kernel or a failed allocation in C++ ended it
        cell = {"status": OUT_OF_MEMORY}
    process.join()
    return cell


def _run(sender: Connection, config: SpeedConfig, row: Row, batch_size: int, threads: int) -> None:
    torch.set_num_threads(threads)
    if config.device == "cpu":
        limit = config.memory_limit or int(0.8 * available())
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    sender.send(measure(config, row, batch_size))


def measure(config: SpeedConfig, row: Row, batch_size: int) -> Cell:
    """Three steps, and the peak memory of this process."""
    cuda = config.device.startswith("cuda")
    try:
        session = start(config, row, batch_size)
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        for _, batch in zip(range(_STEPS), session.loader, strict=False):
            session.step(*batch)
    except LipdpError as error:
        return {"status": REFUSED, "reason": str(error)}
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return {"status": OUT_OF_MEMORY}
    used = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"status": MEASURED, "peak_bytes": used}


def available() -> int:
    """Bytes that can still be allocated here, as Linux reckons."""
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024
