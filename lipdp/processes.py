"""Work done in a process of its own, so that its peak memory is its own."""

from __future__ import annotations

import multiprocessing
import resource
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch


class ProcessEnded(Exception):
    """The process ended without an answer: the kernel, or an allocation that failed in C++, took it."""


def in_own_process(work: Callable[..., Any], *arguments: Any, memory_limit: int | None = None) -> Any:
    """What `work(*arguments)` returns, in a new process.

    The process is forked from a server that has imported the module of `work` and nothing else, so that all start alike.
    An allocation beyond the limit fails in it; nothing else on the machine is killed.

    Args:
        work: a function at the top level of a module; it and what it takes and returns can be pickled.
        memory_limit: bytes of data that the process may hold; None sets no limit (memory of a GPU is not data here).

    Raises:
        ProcessEnded: it gave no answer.

    >>> in_own_process(sum, [1, 2])
    3
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([work.__module__])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(sender, work, arguments, memory_limit, torch.get_num_threads()))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError as error:
        raise ProcessEnded(f"{work.__qualname__} ended without an answer") from error
    finally:
        process.join()


def _run(
    sender: Connection, work: Callable[..., Any], arguments: tuple[Any, ...], limit: int | None, threads: int
) -> None:
    torch.set_num_threads(threads)
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    sender.send(work(*arguments))


def peak_bytes(device: str = "cpu") -> int:
    """The most this process has held: its resident set, or what torch allocated on a GPU since its count was reset."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def available() -> int:
    """Bytes that can still be allocated here, as Linux reckons."""
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch, on any device, says that there is no memory left."""
    text = str(error)
    return isinstance(error, MemoryError) or "out of memory" in text or "allocate memory" in text
