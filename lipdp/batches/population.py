"""Who can be drawn: the records, or the owners of records, of all processes, and which of them are this one's."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, StackDataset, Subset, TensorDataset

from lipdp.batches.inputs import Records, describe
from lipdp.batches.owners import EveryNth, Owners, OwnUnits, Partition
from lipdp.batches.records import look, looked_at, read_mapped
from lipdp.distributed.collectives import World
from lipdp.errors import EngineError, ParameterError

Group = Sequence[int] | Tensor | np.ndarray


@dataclass(frozen=True)
class Population:
    """What batches are drawn from.

    Attributes:
        present: the units (records, or owners) of all processes, which the sampler numbers.
        records: those of this process's data set.
        part: which of the units drawn are this process's.
        owners: the records of each owner, where owners are the units.
    """

    present: int
    records: int
    part: Partition
    owners: Owners | None = None

    @classmethod
    def of(cls, dataset: Any, world: World, *, group: Group | None = None, own_records: bool = False) -> Population:
        """The population of a data set.

        Args:
            dataset: this process's: all records, or with `own_records` some that no other process has.
            world: the processes.
            group: the owner of every record.
            own_records: see `dataset`.

        Raises:
            EngineError: no length, data sets that differ in it, or copies of a record (`check_copies`). ParameterError:
                a group of another length, or beside `own_records`.
        """
        with world.fail_together():
            records = length(dataset)
            owners = None if group is None else Owners(group)
            if owners is not None and (owners.total != records or own_records):
                raise ParameterError(
                    f"group: {owners.total} owners were given for {records} records; give one a record"
                    if not own_records
                    else "group= and own_records=True: one owner could have records in two processes; give all to each"
                )
            check_copies(dataset, group)
        if len(set(world.gather(None if owners is None else owners.digest))) > 1:
            raise EngineError(
                "group: the processes number the owners differently, so that one owner could count more than once in a"
                " step. Give all the same ids (Python's hash() of texts, and the order of a set, differ between"
                " processes)"
            )
        counts = world.gather(records)
        part: Partition
        if own_records:
            start = sum(counts[: world.rank])
            present, part = sum(counts), OwnUnits(start, start + records)
        else:
            if len(set(counts)) > 1:
                raise EngineError(
                    f"the processes' data sets have {', '.join(map(str, counts))} records: give every process the same"
                    " whole data set, or pass own_records=True if each process has its own records"
                )
            present, part = records if owners is None else len(owners), EveryNth(world.rank, world.size)
        return cls(present, records, part, owners)

    @property
    def unit(self) -> str:
        """What the sampler numbers: a "record", or an "owner" with all records."""
        return "record" if self.owners is None else "owner"

    @property
    def protected(self) -> str:
        """The unit, and of owners who owns what."""
        return self.unit if self.owners is None else f"owner {self.owners.digest}"


def check_records(dataset: Any, world: World, *, own_records: bool) -> None:
    """Refuse data sets in which a record could be read by two processes in one step: in different orders, or twice.

    Looks at up to 16 records over the whole: at the targets of whole data sets, since inputs may differ by random
    views, and at inputs and targets of own records.
    """
    if world.size == 1:
        return
    with world.fail_together():
        own = glance(dataset, inputs=own_records)
    for rank, other in enumerate(world.gather(own)):
        if own_records and rank != world.rank and own and other == own:
            raise EngineError(
                f"own_records=True, but process {world.rank} and process {rank} hold the same records: each would count"
                " more than once. Leave it out where every process has the whole data set"
            )
        if not own_records and other != own:
            raise EngineError(
                f"the data sets of process {world.rank} and process {rank} hold different records at the same places."
                " One record could be used twice in a step. Give every process the same records in the same order, or"
                " pass own_records=True if each process has its own records"
            )


def glance(dataset: Any, *, inputs: bool = False) -> str:
    """A digest of the number of records, and of up to 16 of them: their targets, or all of them; "" where none is.

    Views drawn from torch's generator are the same each time.
    """
    count = len(dataset)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        batches = [read_mapped(dataset, [i]) for i in looked_at(count)]
    records = [[torch.as_tensor(part).tolist() for part in batch] for batch in batches]
    known = records if inputs else [record[1] for record in records]
    return hashlib.blake2b(repr([count, known]).encode()).hexdigest() if count else ""


def length(dataset: Any) -> int:
    """Of a map-style data set."""
    if not hasattr(dataset, "__len__"):
        raise EngineError(
            f"{type(dataset).__name__} has no length: sampling needs a map-style dataset (e.g. a TensorDataset)"
        )
    return len(dataset)


def first_records(dataset: Any, world: World, *, own_records: bool = False) -> tuple[Tensor, Tensor]:
    """The records looked at before the first step (`look`), for shapes and checks of the loss; some process's."""
    with world.fail_together():
        own = look(dataset) if len(dataset) else []
    records = next((some for some in world.gather(own[:4]) if some), []) if own_records else own
    pairs = all(isinstance(r, (tuple, list)) and len(r) == 2 and all(isinstance(p, Tensor) for p in r) for r in records)
    if not records or not pairs:
        found = f"; record 0 is {describe(dataset[0])}" if len(dataset) else ", and at least one"
        raise EngineError(f"the dataset must hold (input, target) pairs of tensors, arrays or numbers{found}")
    inputs, targets = zip(*records, strict=True)
    return torch.cat(inputs), torch.cat(targets)


def check_copies(dataset: Any, group: Group | None = None) -> None:
    """Refuse a data set that holds a record several times: ε would be that of one copy, k copies have k ε.

    Looks through `Subset`, `ConcatDataset`, `StackDataset`, lists and expanded tensors, by identity and index; copies
    in memory of their own can't be told from records that are alike.

    >>> check_copies(torch.utils.data.Subset(TensorDataset(torch.zeros(5, 2), torch.zeros(5)), [0, 1, 1]))
    Traceback (most recent call last):
    lipdp.errors.EngineError: the data set holds one record at 1 and at 2: ε would be that of one copy. Give...
    """
    known = (Subset, ConcatDataset, StackDataset, Records, list, tuple)
    if not isinstance(dataset, known) and not _is_expanded(dataset):
        return
    origins = _origins(dataset, np.arange(length(dataset)), {})
    order = np.lexsort(origins.T)
    again = (origins[order[1:]] == origins[order[:-1]]).all(axis=1)
    if group is not None:
        ids = np.asarray(group.cpu() if isinstance(group, Tensor) else group)[order]
        again &= ids[1:] != ids[:-1]
    if again.any():
        place = int(again.argmax())
        raise EngineError(
            f"the data set holds one record at {order[place]} and at {order[place + 1]}: ε would be that of one copy."
            " Give each record once, or pass group= with one owner for all copies of a record"
        )


def _origins(dataset: Any, indices: np.ndarray, known: dict[int, int]) -> np.ndarray:
    """(n, k) numbers of the records at `indices`: the same row where two are one record of one object."""
    own = known.setdefault(id(dataset), len(known))
    if isinstance(dataset, Subset):
        inner = np.asarray(dataset.indices)[indices]
        if inner.dtype.kind in "iu":
            return _origins(dataset.dataset, np.where(inner < 0, inner + length(dataset.dataset), inner), known)
        return np.stack([np.full(len(indices), own), np.unique(inner, return_inverse=True)[1].reshape(-1)], axis=1)
    if isinstance(dataset, ConcatDataset):
        ends = np.asarray(dataset.cumulative_sizes)
        part = np.searchsorted(ends, indices, side="right")
        starts = np.concatenate([[0], ends[:-1]])
        pieces = [_origins(d, indices[part == i] - starts[i], known) for i, d in enumerate(dataset.datasets)]
        rows = np.full((len(indices), max(p.shape[1] for p in pieces)), -1)
        for i, piece in enumerate(pieces):
            rows[part == i, : piece.shape[1]] = piece
        return rows
    if isinstance(dataset, Records):
        return _origins(dataset.dataset, indices, known)
    if isinstance(dataset, StackDataset):
        parts = dataset.datasets
        columns = parts.values() if isinstance(parts, dict) else parts
        return np.concatenate([_origins(column, indices, known) for column in columns], axis=1)
    if isinstance(dataset, (list, tuple)):
        own, indices = -1, np.asarray([known.setdefault(id(dataset[i]), len(known)) for i in indices])
    elif _is_expanded(dataset):
        indices = np.zeros_like(indices)
    return np.stack([np.full(len(indices), own), indices], axis=1)


def _is_expanded(dataset: Any) -> bool:
    """Whether all records lie at one place in memory."""
    return type(dataset) is TensorDataset and all(tensor.stride(0) == 0 for tensor in dataset.tensors)
