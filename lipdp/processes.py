"""The peak memory of some steps; on a CPU taken in a process of their own."""

from __future__ import annotations

import gc
import importlib
import multiprocessing
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch

_STEPS = 3
_SHARE = 0.8  # of the memory that is available


def peak_bytes(
    prepare: Callable[..., Callable[[], Any]], *arguments: Any, device: str = "cpu", memory_limit: int | None = None
) -> int | None:
    """The most memory that three of the steps take which `prepare(*arguments)` returns, model and records included.

    On a CPU it is that of a process which takes them, forked from a server that has imported the module of `prepare`
    and nothing else, so that all start alike. An allocation beyond the limit fails in it; nothing else on the machine
    is killed. On CUDA torch counts what it allocates, so they are taken in this process.

    Args:
        prepare: a function at the top level of a module; it and its arguments can be pickled.
        device: of the steps.
        memory_limit: bytes of data that the process may hold on a CPU; None takes 80 % of what is available.

    Returns:
        Bytes: the process's resident set, or the most that torch allocated on the GPU beyond what was there before.
        None where they do not fit, or the process was killed.
    """
    if device.startswith("cuda"):
        return _peak_on_cuda(prepare, arguments, device)
    limit = memory_limit or int(_SHARE * _available()) or None
    forks = "forkserver" in multiprocessing.get_all_start_methods()  # not on Windows
    context = multiprocessing.get_context("forkserver" if forks else "spawn")
    if forks:
        context.set_forkserver_preload([prepare.__module__])
    settings = (torch.get_num_threads(), limit)
    with ProcessPoolExecutor(1, mp_context=context, initializer=_start, initargs=settings) as pool:
        try:
            return pool.submit(_peak, prepare, arguments).result()
        except BrokenProcessPool:  # the kernel, or an allocation that failed in C++, took it
            return None


def _start(threads: int, limit: int | None) -> None:
    torch.set_num_threads(threads)
    resource = _resource()
    if limit is not None and resource is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def _peak(prepare: Callable[..., Callable[[], Any]], arguments: tuple[Any, ...]) -> int | None:
    resource = _resource()
    if resource is None:
        raise OSError("this system does not tell how much memory a process took at most; measure on Linux or macOS")
    unit = 1 if sys.platform == "darwin" else 1024
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * unit if _fit(prepare, arguments) else None


def _peak_on_cuda(prepare: Callable[..., Callable[[], Any]], arguments: tuple[Any, ...], device: str) -> int | None:
    gc.collect()
    torch.cuda.empty_cache()
    torch.ones(8, 8, device=device).mm(torch.ones(8, 8, device=device))  # cuBLAS takes its workspace once
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    try:
        return torch.cuda.max_memory_allocated(device) - before if _fit(prepare, arguments) else None
    finally:
        gc.collect()
        torch.cuda.empty_cache()


def _fit(prepare: Callable[..., Callable[[], Any]], arguments: tuple[Any, ...]) -> bool:
    """Whether there is memory for three steps."""
    try:
        step = prepare(*arguments)
        for _ in range(_STEPS):
            step()
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return False
    return True


def _resource() -> Any:
    """The module of that name, which Windows has not."""
    try:
        return importlib.import_module("resource")
    except ImportError:
        return None


def _available() -> int:
    """Bytes that can still be allocated here, as Linux reckons; 0 on other systems."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return 0
    lines = dict(line.split(":") for line in meminfo.read_text(encoding="ascii").splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch, on any device, says that there is no memory left."""
    text = str(error)
    signs = ("out of memory", "allocate memory", "ALLOC_FAILED")  # the last is of cuBLAS and cuDNN
    return isinstance(error, MemoryError) or any(sign in text for sign in signs)
