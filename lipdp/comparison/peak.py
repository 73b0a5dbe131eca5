"""The peak memory of one trainer, measured in a process of its own."""

from __future__ import annotations

import torch

from lipdp.comparison.results import Cell
from lipdp.comparison.rows import Row
from lipdp.comparison.speed import MEASURED, OUT_OF_MEMORY, REFUSED, SpeedConfig, start
from lipdp.errors import LipdpError
from lipdp.processes import ProcessEnded, available, in_own_process, is_out_of_memory, peak_bytes

_STEPS = 3


def peak(config: SpeedConfig, row: Row, batch_size: int) -> Cell:
    """A cell with the highest resident set of a process that takes three steps, or what the device held at most."""
    limit = (config.memory_limit or int(0.8 * available())) if config.device == "cpu" else None
    try:
        cell: Cell = in_own_process(measure, config, row, batch_size, memory_limit=limit)
    except ProcessEnded:
        cell = {"status": OUT_OF_MEMORY}
    return cell


def measure(config: SpeedConfig, row: Row, batch_size: int) -> Cell:
    """Three steps, and the peak memory of this process."""
    try:
        session = start(config, row, batch_size)
        if config.device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats()
        for _, batch in zip(range(_STEPS), session.loader, strict=False):
            session.step(*batch)
    except LipdpError as error:
        return {"status": REFUSED, "reason": str(error)}
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return {"status": OUT_OF_MEMORY}
    return {"status": MEASURED, "peak_bytes": peak_bytes(config.device)}
