"""Who can be drawn: the records, or the owners of records, of all processes, and which of them are this one's."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lipdp.batches.copies import Group, check_copies, length, roots
from lipdp.batches.inputs import describe
from lipdp.batches.owners import EveryNth, Owners, OwnUnits, Partition
from lipdp.batches.records import look, looked_at, read_mapped
from lipdp.distributed.collectives import World
from lipdp.errors import EngineError, ParameterError


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
    views, and at inputs and targets of own records. Own records that are parts of one data set are compared by index.
    """
    if world.size == 1:
        return
    with world.fail_together():
        own = glance(dataset, inputs=own_records)
        parts = _parts(dataset) if own_records else []
    glances, held = world.gather(own), set[str]()
    for rank, other in enumerate(glances):
        if own_records and other in held:
            raise EngineError(
                f"own_records=True, but process {glances.index(other)} and process {rank} hold the same records: each"
                " would count more than once. Leave it out where every process has the whole data set"
            )
        held.update({other} - {""})
        if not own_records and other != own:
            raise EngineError(
                f"the data sets of process {world.rank} and process {rank} hold different records at the same places."
                " One record could be used twice in a step. Give every process the same records in the same order, or"
                " pass own_records=True if each process has its own records"
            )
    if own_records:
        _check_apart(world.gather(parts))


def _parts(dataset: Any) -> list[tuple[str, np.ndarray]]:
    """By data set behind this one: its digest, and a bit for each of its records, 1 where it is here."""
    found = []
    for root, indices in roots(dataset):
        here = np.zeros(len(root), dtype=bool)
        here[indices] = True
        found.append((glance(root, inputs=True), np.packbits(here)))
    return found


def _check_apart(parts: list[list[tuple[str, np.ndarray]]]) -> None:
    """No record is in the parts of two processes."""
    held: dict[str, np.ndarray] = {}
    for rank, own in enumerate(parts):
        for digest, here in own:
            twice = int(np.unpackbits(here & held[digest]).sum()) if digest in held else 0
            if twice:
                raise EngineError(
                    f"own_records=True, but {twice} records of process {rank} are records of a process before it too:"
                    " each would count more than once. DistributedSampler repeats records to make parts of one size:"
                    " give parts that do not meet, such as Subset(dataset, range(rank, len(dataset), world_size))"
                )
        for digest, here in own:
            held[digest] = held.get(digest, 0) | here


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
