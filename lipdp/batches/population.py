"""Who can be drawn: the records, or the owners of records, of all processes, and which of them are this one's."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lipdp.batches.owners import EveryNth, Owners, Part, Shard
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
    part: Part
    owners: Owners | None = None

    @classmethod
    def of(cls, dataset: Any, world: World, *, group: Group | None = None, shards: bool = False) -> Population:
        """The population of a data set.

        Args:
            dataset: this process's: all records, or with `shards` some that no other process has.
            world: the processes.
            group: the owner of every record.
            shards: see `dataset`.

        Raises:
            EngineError: no length, or data sets that differ in it. ParameterError: a group of another length, or of
                shards.
        """
        with world.fail_together():
            records = length(dataset)
            owners = None if group is None else Owners(group)
            if owners is not None and (owners.total != records or shards):
                raise ParameterError(
                    f"group: {owners.total} owners were given for {records} records; give one a record"
                    if not shards
                    else "group= and shards=True: one owner could be in two shards; give every process all records"
                )
        if len(set(world.gather(None if owners is None else owners.digest))) > 1:
            raise EngineError(
                "group: the processes number the owners differently, so that one owner could count more than once in a"
                " step. Give all the same ids (Python's hash() of texts, and the order of a set, differ between"
                " processes)"
            )
        counts = world.gather(records)
        part: Part
        if shards:
            start = sum(counts[: world.rank])
            present, part = sum(counts), Shard(start, start + records)
        else:
            if len(set(counts)) > 1:
                raise EngineError(
                    f"the processes' data sets have {', '.join(map(str, counts))} records: give each the same, whole"
                    " one, or pass shards=True if each has records of its own"
                )
            present, part = records if owners is None else len(owners), EveryNth(world.rank, world.size)
        return cls(present, records, part, owners)

    @property
    def unit(self) -> str:
        """What the sampler numbers: a "record", or an "owner" with all records."""
        return "record" if self.owners is None else "owner"


def check_records(dataset: Any, world: World, *, shards: bool) -> None:
    """Refuse data sets in which a record could be read by two processes in one step: in different orders, or twice.

    Looks at up to 16 records over the whole: at the targets of whole data sets, since inputs may differ by random
    views, and at inputs and targets of shards.

    Raises:
        EngineError: whole data sets that differ, or shards that do not.
    """
    if world.size == 1:
        return
    with world.fail_together():
        count = len(dataset)
        picked = sorted({i * (count - 1) // 15 for i in range(16)}) if count else []
        records = [[torch.as_tensor(part).tolist() for part in dataset[i]] for i in picked]
        targets = [record[1] for record in records]
        own = hashlib.blake2b(repr([count, records if shards else targets]).encode()).hexdigest() if count else ""
    for rank, other in enumerate(world.gather(own)):
        if shards and rank != world.rank and own and other == own:
            raise EngineError(
                f"shards=True, but process {world.rank} and process {rank} hold the same records: each would count more"
                " than once. Leave it out where every process has the whole data set"
            )
        if not shards and other != own:
            raise EngineError(
                f"the data sets of process {world.rank} and process {rank} hold other records at the same places, so"
                " that one record could be used twice in a step: give every process the same records in the same order,"
                " or pass shards=True if each has records of its own"
            )


def length(dataset: Any) -> int:
    """Of a map-style data set.

    Raises:
        EngineError: it has none.
    """
    if not hasattr(dataset, "__len__"):
        raise EngineError(
            f"{type(dataset).__name__} has no length: sampling needs a map-style dataset (e.g. a TensorDataset)"
        )
    return len(dataset)


def first_records(dataset: Any, world: World, *, shards: bool = False) -> tuple[Tensor, Tensor]:
    """Up to four records, for shapes and for the check that the loss keeps samples apart; of a shard that has some.

    Raises:
        EngineError: no records, or not (input, target) pairs.
    """
    with world.fail_together():
        own = [dataset[i] for i in range(min(4, len(dataset)))]
    records = next((some for some in world.gather(own) if some), []) if shards else own
    if not records or any(not isinstance(r, (tuple, list)) or len(r) != 2 for r in records):
        raise EngineError("the dataset must hold (input, target) pairs, and at least one")
    inputs, targets = zip(*records, strict=True)
    return torch.stack([torch.as_tensor(x) for x in inputs]), torch.stack([torch.as_tensor(y) for y in targets])
