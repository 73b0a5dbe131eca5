"""Whole batches of records, read here or in torch's worker processes."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lipdp.batches.coins import coins
from lipdp.batches.inputs import InputKind
from lipdp.batches.records import finite_inputs, pattern, read_mapped
from lipdp.errors import DataError, LipdpError

Drawn: TypeAlias = tuple[np.ndarray, int]
"""The records of a batch, and the secret of the coins that the dataset throws while it reads them."""


def in_order(dataset: Dataset[Any], size: int, *, num_workers: int = 0) -> Iterator[Any]:
    """All records of a data set, at most `size` at a time, in order: for evaluation.

    >>> [len(x) for x, in in_order(TensorDataset(torch.zeros(5, 2)), 2)]
    [2, 2, 1]
    """
    count = len(dataset)  # type: ignore[arg-type]
    starts = range(0, count, size)
    draws = [(np.arange(start, min(start + size, count)), 0) for start in starts]
    yield from read(MapStyleRecords(dataset, None), draws, num_workers=num_workers)


class TensorRecords(Dataset[Any]):
    """Whole batches of a `TensorDataset`, one gather per tensor, where the tensors are."""

    def __init__(self, dataset: TensorDataset, kind: InputKind | None) -> None:
        self._tensors, self._kind = dataset.tensors, kind

    def __getitem__(self, drawn: Drawn) -> tuple[Tensor, ...]:
        picked = torch.from_numpy(drawn[0])
        batch = tuple(tensor.index_select(0, picked.to(tensor.device)) for tensor in self._tensors)
        return _prepared(batch, self._kind)


class MapStyleRecords(Dataset[Any]):
    """Whole batches of any map-style dataset, collated; the empty batch is an empty slice of one record."""

    def __init__(self, dataset: Dataset[Any], empty: Any, kind: InputKind | None = None) -> None:
        self._dataset, self._empty, self._kind = dataset, empty, kind

    def __getitem__(self, drawn: Drawn) -> Any:
        indices, secret = drawn
        with coins(secret):
            try:
                if indices.size == 0:
                    batch = _emptied(pattern(self._dataset) if self._empty is None else self._empty)
                else:
                    batch = read_mapped(self._dataset, indices.tolist(), self._empty)
                return _prepared(batch, self._kind)
            except LipdpError as error:
                return _Refusal(error)


def _prepared(batch: Any, kind: InputKind | None) -> Any:
    """Inputs that are finite, and of the kind that the model takes."""
    batch = finite_inputs(batch)
    return batch if kind is None else kind.of(batch)


@dataclass(frozen=True)
class _Refusal:
    """An error of this library on its way out of a worker; torch would send its traceback as the message."""

    error: LipdpError


def read(
    records: Dataset[Any], draws: Iterable[Drawn], *, num_workers: int = 0, pin_memory: bool = False
) -> Iterator[Any]:
    """The batches that are drawn; what kept one from being read is raised here, and nowhere else."""
    batches: DataLoader[Any] = DataLoader(
        records,
        batch_size=None,
        sampler=draws,
        num_workers=num_workers,
        collate_fn=_unchanged,
        pin_memory=pin_memory,
        generator=torch.Generator(),
        worker_init_fn=_ignore_interrupts,
    )
    try:
        for batch in _without_alarm(batches):
            if isinstance(batch, _Refusal):
                raise batch.error
            yield batch
            del batch
    except (RuntimeError, OSError, EOFError) as error:
        ended = str(error).startswith("DataLoader worker")
        cut_off = num_workers > 0 and not isinstance(error, RuntimeError) and not str(error).startswith("Caught")
        if not ended and not cut_off:
            raise
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise DataError(
            f"a process that reads records ended ({reason}). It was killed, or it lacked memory or shared memory. Try"
            " fewer workers, or none (--num-workers 0)"
        ) from error


def _without_alarm(batches: DataLoader[Any]) -> Iterator[Any]:
    """Its iterator, without torch's handler, which raises wherever the main thread is when a worker dies.

    Without it the iterator notices within five seconds of waiting for that worker's batch.
    """
    alarm = getattr(signal, "SIGCHLD", None)  # not on every system
    before = None if alarm is None else signal.getsignal(alarm)
    iterator = iter(batches)
    if (
        alarm is not None
        and before is not None
        and batches.num_workers
        and threading.current_thread() is threading.main_thread()
    ):
        signal.signal(alarm, before)
    return iterator


def _ignore_interrupts(worker: int) -> None:
    """Ctrl-C reaches all processes of a terminal: the one that trains takes a checkpoint, then ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _emptied(batch: Any) -> Any:
    if isinstance(batch, Tensor):
        return batch[:0]
    if isinstance(batch, dict):
        return {key: _emptied(value) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        return [_emptied(value) for value in batch]
    raise DataError(
        f"a record holds a {type(batch).__name__}; records must be tensors, arrays or numbers to be trained on"
    )


def _unchanged(batch: Any) -> Any:
    return batch
