"""Simulated runs one after the other, or in several processes that end with the one that started them."""

from __future__ import annotations

import multiprocessing
import os
import signal
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from lipdp.data import Split
from lipdp.errors import LipdpError, ParameterError
from lipdp.planning.simulation import Runner, Simulation, simulation
from lipdp.planning.space import Scalar
from lipdp.training import Interrupted

Drawn = Mapping[str, Scalar]


class Workers(ABC):
    """Takes runs and gives back records, in the order in which they end."""

    @property
    @abstractmethod
    def free(self) -> int:
        """How many runs could be started now."""

    @abstractmethod
    def submit(self, number: int, drawn: Drawn) -> None:
        """Start run `number`, while `free` allows."""

    @abstractmethod
    def result(self) -> tuple[int, dict[str, Any]]:
        """Wait for a run to end: its number and what `Runner` returns.

        Raises:
            ParameterError: the run was refused; the message says with which settings.
        """


class Inline(Workers):
    """In this process."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._waiting: list[tuple[int, Drawn]] = []

    @property
    def free(self) -> int:
        """See `Workers`."""
        return 1 - len(self._waiting)

    def submit(self, number: int, drawn: Drawn) -> None:
        """See `Workers`."""
        self._waiting.append((number, drawn))

    def result(self) -> tuple[int, dict[str, Any]]:
        """See `Workers`."""
        number, drawn = self._waiting.pop()
        try:
            return number, self._runner(drawn)
        except LipdpError as error:
            raise _refused(drawn, str(error)) from error


class Processes(Workers):
    """In `jobs` processes, each with its share of the cores. They read requests from a pipe, whose end is theirs."""

    def __init__(self, given: Simulation, jobs: int) -> None:
        context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
        threads = max(1, (os.cpu_count() or jobs) // jobs)
        self._idle: list[Connection] = []
        self._busy: dict[Connection, tuple[int, Drawn]] = {}
        self._processes = []
        for _ in range(jobs):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, given, threads), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._idle.append(ours)

    @property
    def free(self) -> int:
        """See `Workers`."""
        return len(self._idle)

    def submit(self, number: int, drawn: Drawn) -> None:
        """See `Workers`."""
        connection = self._idle.pop()
        connection.send(dict(drawn))
        self._busy[connection] = (number, drawn)

    def result(self) -> tuple[int, dict[str, Any]]:
        """See `Workers`."""
        connection: Any = wait(list(self._busy))[0]
        number, drawn = self._busy.pop(connection)
        try:
            refusal, record = connection.recv()
        except EOFError:
            raise _refused(drawn, "its process ended (out of memory? fewer --jobs may help)") from None
        self._idle.append(connection)
        if refusal:
            raise _refused(drawn, refusal)
        return number, record

    def close(self) -> None:
        """End them, whatever they do."""
        for connection in (*self._idle, *self._busy):
            connection.close()
        for process in self._processes:
            process.terminate()
            process.join()


@contextmanager
def workers(given: Simulation, split: Split, input_bound: float | None, *, jobs: int) -> Iterator[Workers]:
    """One process more than this one for each of several jobs; this one alone for a single job."""
    if jobs == 1:
        yield Inline(Runner(given, split, input_bound))
        return
    pool = Processes(given, jobs)
    try:
        yield pool
    finally:
        pool.close()


def _serve(connection: Connection, given: Simulation, threads: int) -> None:
    """Answer requests until the other end closes, which it also does when its process is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the one that started this one decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(threads)
    settings = {**given.settings, "noise_multiplier": given.plan.noise_multiplier}
    settings.pop("epsilon", None)  # σ is known: nothing to calibrate again
    _, split, input_bound = simulation(settings, scale=given.scale, validation=given.validation, seed=given.seed)
    runner = Runner(given, split, input_bound)
    with suppress(EOFError, OSError, Interrupted):
        while True:
            drawn = connection.recv()
            try:
                answer: tuple[str, dict[str, Any]] = ("", runner(drawn))
            except LipdpError as error:
                answer = (str(error) or type(error).__name__, {})
            connection.send(answer)


def _refused(drawn: Drawn, reason: str) -> ParameterError:
    listed = ", ".join(f"{name}={value}" for name, value in drawn.items())
    return ParameterError(f"the simulated run with {listed} was refused: {reason}")
