"""A comparison's folder: `config.json`, and cells in `results.json`, written whole after every cell."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from lipdp.errors import ResumeError
from lipdp.files import read_json, write_json

Cell = dict[str, Any]
Progress = Callable[[Cell, int, int], None]
"""Is given every cell, how many there are then, and how many there will be."""
Job = TypeVar("Job")


class Results:
    """The cells measured so far, in a file `name` if there is a folder.

    A comparison that was killed goes on where it was: what is in the file is not measured again. A folder that holds
    another `config` is refused.

    Raises:
        ResumeError: the folder holds another comparison. CheckpointError: a file cannot be read or written.
    """

    def __init__(
        self, folder: str | os.PathLike[str] | None, *, config: Mapping[str, Any], name: str = "results.json"
    ) -> None:
        self.folder = None if folder is None else Path(folder).expanduser()
        self.cells: list[Cell] = []
        self._name = name
        if self.folder is None:
            return
        plain = json.loads(json.dumps(dict(config)))
        if (self.folder / "config.json").exists():
            self._check_same(read_json(self.folder / "config.json"), plain)
        else:
            write_json(self.folder / "config.json", plain)
        if (self.folder / name).exists():
            self.cells = read_json(self.folder / name, list)

    def add(self, cell: Mapping[str, Any]) -> None:
        """One more cell; the file is whole before and after."""
        self.cells.append(dict(cell))
        if self.folder is not None:
            write_json(self.folder / self._name, self.cells)

    def find(self, **key: Any) -> list[Cell]:
        """The cells with these values, in the order they came."""
        return [cell for cell in self.cells if all(cell.get(name) == value for name, value in key.items())]

    def fill(
        self,
        asked: Iterable[Job],
        *,
        key: Callable[[Job], Cell],
        run: Callable[[Job], Cell],
        progress: Progress,
        total: int,
        beside: int = 0,
        jobs: int = 1,
    ) -> None:
        """Add what `run` finds for every job whose `key` is not there yet; several processes have a thread each.

        `progress` is told of `total` cells, of which `beside` are in another file.
        """
        left = [job for job in asked if not self.find(**key(job))]
        for cell in map(partial(_freed, run), left) if jobs == 1 else _in_processes(run, left, jobs):
            self.add(cell)
            progress(cell, beside + len(self.cells), total)

    def _check_same(self, before: Mapping[str, Any], config: Mapping[str, Any]) -> None:
        names = sorted(n for n in {*before, *config} if before.get(n) != config.get(n))
        if names:
            changes = "; ".join(f"{n} was {before.get(n)!r}, is now {config.get(n)!r}" for n in names)
            raise ResumeError(
                f"{self.folder} holds another comparison ({changes}); give another --out, or the same options"
            )


def _freed(run: Callable[[Job], Cell], job: Job) -> Cell:
    """A run, without what it leaves: its records lie in cycles, and those of twenty runs would be in memory at once."""
    try:
        return run(job)
    finally:
        gc.collect()


def _in_processes(run: Callable[[Job], Cell], left: Sequence[Job], jobs: int) -> Iterator[Cell]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([getattr(run, "func", run).__module__])
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        waiting = [pool.submit(_freed, run, job) for job in left]
        try:
            for done in as_completed(waiting):
                yield done.result()
        finally:
            pool.shutdown(cancel_futures=True)


def markdown(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table in GitHub's markdown.

    >>> print(markdown(["a", "b"], [["1", "2"]]))
    | a | b |
    |---|---|
    | 1 | 2 |
    """
    titles, *body = ["| " + " | ".join(row) + " |" for row in (list(header), *rows)]
    return "\n".join([titles, "|" + "---|" * (titles.count("|") - 1), *body])
