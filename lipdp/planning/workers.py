"""Simulated runs one after the other, or in several processes that end with the one that started them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import torch

from lipdp.data import Split
from lipdp.errors import LipdpError, ParameterError
from lipdp.planning.simulation import Runner, Simulation, simulation
from lipdp.planning.space import Scalar

Drawn = Mapping[str, Scalar]
Record = dict[str, Any]

_runners: list[Runner] = []  # that of a process of the pool


@contextmanager
def workers(
    given: Simulation, split: Split, input_bound: float | None, *, jobs: int
) -> Iterator[Callable[[Drawn], Future[Record]]]:
    """A function that starts a run: in one of several processes that share the cores, or here for one job.

    The processes end when the block does, and when the process that started them does, whatever they are doing.
    """
    if jobs == 1:
        yield partial(_at_once, Runner(given, split, input_bound))
        return
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    theirs, ours = context.Pipe(duplex=False)
    settings = (given, max(1, (os.cpu_count() or jobs) // jobs), theirs)
    with theirs, ProcessPoolExecutor(jobs, mp_context=context, initializer=_prepare, initargs=settings) as pool, ours:
        yield lambda drawn: pool.submit(_run, drawn)


def outcome(future: Future[Record], drawn: Drawn) -> Record:
    """What `Runner` returned of a run that ended; ParameterError, with its settings, where it was refused."""
    try:
        return future.result()
    except BrokenProcessPool:
        reason = "its process ended (out of memory? fewer --jobs may help)"
    except LipdpError as error:
        reason = str(error) or type(error).__name__
    listed = ", ".join(f"{name}={value}" for name, value in drawn.items())
    raise ParameterError(f"the simulated run with {listed} was refused: {reason}")


def _at_once(runner: Runner, drawn: Drawn) -> Future[Record]:
    future: Future[Record] = Future()
    try:
        future.set_result(runner(drawn))
    except LipdpError as error:
        future.set_exception(error)
    return future


def _prepare(given: Simulation, threads: int, lifeline: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the one that started this one decides
    threading.Thread(target=_end_with, args=(lifeline,), daemon=True).start()
    torch.set_num_threads(threads)
    settings = {**given.settings, "noise_multiplier": given.plan.noise_multiplier}
    settings.pop("epsilon", None)  # σ is known: nothing to calibrate again
    _, split, input_bound = simulation(settings, scale=given.scale, validation=given.validation, seed=given.seed)
    _runners.append(Runner(given, split, input_bound))


def _run(drawn: Drawn) -> Record:
    return _runners[0](drawn)


def _end_with(lifeline: Connection) -> None:
    """The other end closes when the search is over, and when its process is killed."""
    with suppress(EOFError, OSError):
        lifeline.recv()
    os._exit(1)
