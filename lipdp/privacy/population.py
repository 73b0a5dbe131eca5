"""Who can be drawn: the records, or the owners of records, of all processes, and which of them are this one's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lipdp.errors import EngineError, ParameterError
from lipdp.privacy.units import EveryNth, Owners, Part, Shard
from lipdp.privacy.world import World

Group = Sequence[int] | Tensor | np.ndarray


@dataclass(frozen=True)
class Population:
    """What batches are drawn from.

    Attributes:
        present: the units (records, or owners) of all processes, which the sampler numbers.
        size: N, a public constant; `present` where none was given.
        records: those of this process's data set.
        part: which of the units drawn are this process's.
        owners: the records of each owner, where owners are the units.
    """

    present: int
    size: int
    records: int
    part: Part
    owners: Owners | None = None

    @classmethod
    def of(
        cls, dataset: Any, world: World, *, size: int | None = None, group: Group | None = None, shards: bool = False
    ) -> Population:
        """The population of a data set.

        Args:
            dataset: this process's: all records, or with `shards` some that no other process has.
            world: the processes.
            size: N, if it is not to be counted.
            group: the owner of every record.
            shards: see `dataset`.

        Raises:
            EngineError: no length, or data sets that differ in it. ParameterError: a group of another length, or of shards.
        """
        with world.together():
            records = length(dataset)
            owners = None if group is None else Owners(group)
            if owners is not None and (owners.total != records or shards):
                raise ParameterError(
                    f"group: {owners.total} owners were given for {records} records; give one a record"
                    if not shards
                    else "group= and shards=True: an owner's records could lie in two shards; give every process all records"
                )
        counts = world.gather(records)
        part: Part
        if shards:
            start = sum(counts[: world.rank])
            present, part = sum(counts), Shard(start, start + records)
        else:
            if len(set(counts)) > 1:
                raise EngineError(
                    f"the processes' data sets have {', '.join(map(str, counts))} records: give each the same, whole one, or pass"
                    " shards=True if each has records of its own"
                )
            present, part = records if owners is None else len(owners), EveryNth(world.rank, world.size)
        return cls(present, present if size is None else size, records, part, owners)

    def rate(self, expected_batch_size: int) -> float:
        """q = B/N.

        Raises:
            ParameterError: B outside 1 … N.
        """
        if not 0 < expected_batch_size <= self.size:
            raise ParameterError(f"expected_batch_size lies in 1 … N = {self.size}, got {expected_batch_size}")
        return expected_batch_size / self.size


def check_same_records(dataset: Any, world: World) -> None:
    """Refuse data sets that the processes hold in different orders: a record could then be read by two of them in one step.

    Looks at the targets of up to 16 records over the whole; inputs may differ by random views.

    Raises:
        EngineError: they differ.
    """
    if world.size == 1:
        return
    with world.together():
        count = len(dataset)
        picked = sorted({i * (count - 1) // 15 for i in range(16)}) if count else []
        targets = [torch.as_tensor(dataset[i][1]).tolist() for i in picked]
    for rank, others in enumerate(world.gather(targets)):
        if others != targets:
            raise EngineError(
                f"the data sets of process {world.rank} and process {rank} hold other records at the same places, so that one record"
                " could be used twice in a step: give every process the same records in the same order, or pass shards=True if"
                " each has records of its own"
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
    with world.together():
        own = [dataset[i] for i in range(min(4, len(dataset)))]
    records = next((some for some in world.gather(own) if some), []) if shards else own
    if not records or any(not isinstance(r, (tuple, list)) or len(r) != 2 for r in records):
        raise EngineError("the dataset must hold (input, target) pairs, and at least one")
    inputs, targets = zip(*records, strict=True)
    return torch.stack([torch.as_tensor(x) for x in inputs]), torch.stack([torch.as_tensor(y) for y in targets])
