"""The loader: feeds a dataset's records to the training loop in the batches that a sampler draws."""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections import deque
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any, TypeAlias

import torch
from torch import Tensor, distributed
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from lipdp.batches.coins import set_coins
from lipdp.batches.copies import Origins
from lipdp.batches.inputs import InputKind
from lipdp.batches.owners import EveryNth, Owners, Partition, flattened_views
from lipdp.batches.reading import Drawn, MapStyleRecords, TensorRecords, read
from lipdp.batches.records import filled_up
from lipdp.batches.row_rules import Rows
from lipdp.batches.rows import BatchTensor
from lipdp.batches.samplers import Sampler
from lipdp.errors import BudgetSpentWarning, EngineError, ParameterError
from lipdp.timing import Clock


@dataclass(eq=False)
class Draw:
    """One batch, as it was handed out.

    Attributes:
        units: how many records (or owners) it holds. rows: how many rows the model is to be given.
        batch: (x, y), or (x, y, weight), or the piece of it that was read last; None once the next one is asked for.
        weights: (rows,) of every row, where owners are drawn or rows are left empty: the engine's own copy.
        key: by which rows know their batch. The tensors don't hold the draw itself: in a circle a batch would live
            until Python looks for circles, and full batches of a gigabyte fill a machine before that.
    """

    units: int
    rows: int
    batch: Any
    weights: Tensor | None = None
    key: object = field(default_factory=object)


_Ahead: TypeAlias = tuple[Draw, int, dict[str, Any]]
"""A batch that was drawn, in how many pieces it is read, the sampler's state afterwards."""


class Listener:
    """Is told of every batch that a loader hands out; this one takes no notice."""

    def before_draw(self) -> None:
        """A batch is about to be handed out; what is raised here keeps it back."""

    def after_draw(self, drawn: Draw | None) -> None:
        """This batch is handed out now; None: whatever was handed out belongs to another run."""


class BatchLoader:
    """Feeds a dataset's records to the training loop in the batches that a sampler draws.

    Iterating yields `(x, y)` (whatever the dataset's records are made of, collated by torch's `default_collate`) for
    each batch not yet consumed (with `passes`, up to the end of a pass), as tensors that know which of its rows they
    hold; an empty batch comes as tensors of shape `(0, *features)`. Resuming, breaking out and
    iterating again all continue after the last batch that was *yielded*; after `steps` batches nothing more comes, for
    `steps` is the privacy budget (`BudgetSpentWarning`). Only the newest iteration is live: going on with an older one
    is an error, since it would hand out the same draw twice. There is no `collate_fn`: a collation that mixes records
    (mix-up) would break the per-record sensitivity.

    A `TensorDataset` is indexed directly, in this process and on its own device. Any other map-style dataset goes
    through torch's `DataLoader`. Workers run ahead of the consumer, but `state_dict` describes the consumer.

    The coins of a private run are secret, whatever the script has seeded: with every batch the
    global generators of torch, numpy and Python are set from the step's key, and so they are while a dataset reads a
    batch. So random crops, dropout and the like are fresh at every step, and the same on resume and with any number of
    workers. Under a seeded sampler, which is not private, the generators are left alone but while a dataset reads.
    Those draws do not touch the account: see `lipdp.data.augment`.

    No record stops the loader: entries of an input that are not finite are 0, and a record that can't be read is the
    zero record without a label, uncounted.

    With `owners` the sampler draws owners, and a batch is `(x, y, weight)`: all records of the owners drawn, with the
    weight of each, for the criterion. With `views` = K > 1 the inputs of a record are K views of it, (K, *features),
    and a batch has K rows for each.

    With `piece` a batch comes as an iterator of (x, y), at most so many records each, that are read when they are asked
    for: a batch of 32,768 is never held at once. Its pieces know which rows of the whole batch they hold, so a step on
    some of them is refused like one on a part of a batch. The draws and the account are those of whole batches.

    Args:
        dataset: map-style, with `__len__` (equal to the sampler's population) and `__getitem__`; if it has
            `__getitems__(indices)` or `read_batch(indices)`, a whole batch is read by that.
        sampler: owned by the loader from here on; save and load it through the loader.
        part: which of the units drawn are read here, where several processes share the work; by default all.
        records: how many the data set must hold; by default the sampler's population.
        empty: a batch of the shapes and dtypes that every batch has; by default of the first record that can be read.
        kind: of the inputs that the model takes; by default they stay as they are read.
        num_workers: processes that read records, for a dataset that is not a `TensorDataset`.
        pin_memory: page-locked batches, where CUDA is available and they are not there already.
        listener: is told of every batch that is handed out.
        clock: names the part of a step in which batches are drawn.
        passes: one iteration ends after about steps/passes batches, a pass over the data, so that a loop over epochs
            works; by default it is the whole training.
        piece: records that are read at a time; by default the whole batch.
        rows: up to how many records every batch is filled, by zero records without a label; the sampler draws no more.
            The engine gives them weight 0, whatever becomes of their labels.

    Attributes:
        drawn: the batch handed out last; None before the first.

    Raises:
        EngineError: an `IterableDataset`, or one without a length: it can't be sampled.
        ParameterError: a length that is not the sampler's population, or a negative `num_workers`.

    >>> from lipdp.batches import PoissonSampler
    >>> dataset = TensorDataset(torch.zeros(100, 3), torch.zeros(100, dtype=torch.int64))
    >>> loader = BatchLoader(dataset, PoissonSampler(100, sampling_rate=0.05, steps=2, seed=0))
    >>> for x, y in loader:
    ...     print(x.shape == (loader.drawn.rows, 3), len(x) == len(y))
    True True
    True True
    >>> len(loader), loader.position
    (2, 2)
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        sampler: Sampler,
        *,
        part: Partition | None = None,
        owners: Owners | None = None,
        views: int = 1,
        records: int | None = None,
        empty: Any = None,
        kind: InputKind | None = None,
        num_workers: int = 0,
        pin_memory: bool = False,
        listener: Listener | None = None,
        clock: Clock | None = None,
        passes: float | None = None,
        piece: int | None = None,
        rows: int | None = None,
    ) -> None:
        expected = owners.total if owners is not None else sampler.population
        _require_map_style(dataset, expected if records is None else records)
        if num_workers < 0:
            raise ParameterError(f"num_workers is {num_workers}; it must be 0 or more")
        if piece is not None and piece < 1:
            raise ParameterError(f"a piece of a batch has at least one record, got {piece}")
        self.dataset = dataset
        self.sampler = sampler
        self.part: Partition = part or EveryNth()
        self.owners, self.views, self.piece, self.rows = owners, views, piece, rows
        self.drawn: Draw | None = None
        self._listener, self._clock = listener or Listener(), clock or Clock()
        self._records: Dataset[Any]
        if type(dataset) is TensorDataset:  # a subclass may have its own __getitem__
            self._records, self._num_workers = TensorRecords(dataset, kind), 0
        else:
            self._records, self._num_workers = MapStyleRecords(dataset, empty, kind), num_workers
        on_device = type(dataset) is TensorDataset and not all(tensor.is_cpu for tensor in dataset.tensors)
        self._pin_memory = pin_memory and torch.cuda.is_available() and not on_device
        self._origins = Origins(dataset) if Origins.knows(dataset) else None
        self._consumed = sampler.state_dict()
        self._iteration, self._said_spent = 0, False
        self._per_pass = float(sampler.steps) if passes is None else sampler.steps / passes

    def __len__(self) -> int:
        """Batches of a pass, the longest; of the whole training where there is one pass."""
        return min(math.ceil(self._per_pass), self.sampler.steps)

    def _end_of_pass(self) -> int:
        """The position at which the pass that goes on, or begins, ends: ends lie evenly, and the last one is T."""
        number = 1
        while (end := min(round(number * self._per_pass), self.sampler.steps)) <= self.position < self.sampler.steps:
            number += 1
        return end

    @property
    def position(self) -> int:
        """Number of batches yielded so far, over all iterations and resumptions."""
        return int(self._consumed["position"])

    def __iter__(self) -> Generator[Any, None, None]:
        self._iteration += 1
        iteration = self._iteration
        end = self._end_of_pass()
        if self.position == self.sampler.steps and not self._said_spent:
            self._said_spent = True
            warnings.warn(
                f"this loader has yielded all {self.sampler.steps} batches of its budget and has none left. For a loop"
                " over epochs, give make_private epochs=; without it, one iteration is the whole training. For a longer"
                " run, give more steps or epochs",
                BudgetSpentWarning,
                stacklevel=2,
            )
        self.sampler.load_state_dict(self._consumed)  # take back what an abandoned iteration had drawn ahead
        ahead: deque[_Ahead] = deque()
        draws = self._draws(iteration, ahead, end - self.position)
        arriving = read(self._records, draws, num_workers=self._num_workers, pin_memory=self._pin_memory)
        while True:
            self._require_newest(iteration)
            self._listener.before_draw()
            if self.drawn is not None:
                self.drawn.batch = None  # a batch of all records is most of the memory: not two at a time
            batch = next(arriving, None)
            self._require_newest(iteration)
            if batch is None:
                return
            self.drawn, count, self._consumed = ahead.popleft()
            rest = islice(arriving, count - 1)
            pieces = self._arranged(chain([batch], rest), self.drawn)
            del batch
            if not self.sampler.seeded:
                set_coins(_secret_of(self._consumed, "step"))
            if self.piece is None:
                next(pieces)
                del pieces, rest  # which hold the batch
                self._listener.after_draw(self.drawn)
                yield self.drawn.batch
            else:
                self._listener.after_draw(self.drawn)
                yield pieces
                deque(rest, 0)  # what the script did not ask for

    def _arranged(self, read: Iterator[Any], drawn: Draw) -> Iterator[Any]:
        """The pieces of a batch as they are handed out, one after the other."""
        start = 0
        for batch in read:
            if self.drawn is not drawn:
                raise EngineError("these are pieces of a batch that was given up: the loader has handed out another")
            parts = tuple(batch) if isinstance(batch, list) else batch
            stop = min(start + (self.piece or drawn.rows) * self.views, drawn.rows)
            if self.rows is not None:
                parts = filled_up(parts, (stop - start) // self.views)
            if self.views > 1:
                parts = flattened_views(parts, self.views)
            if self.owners is not None and drawn.weights is not None:
                parts = (*parts, drawn.weights[start:stop].clone().to(parts[0].device, non_blocking=True))
            drawn.batch = _labelled(parts, Rows(drawn.key, start, stop))
            start = stop
            del batch, parts
            yield drawn.batch

    def _draws(self, iteration: int, ahead: deque[_Ahead], batches: int) -> Iterator[Drawn]:
        """The records of `batches` batches, in pieces; notes their sizes and the states after them."""
        draws = iter(self.sampler)
        for _ in range(batches):
            self._require_newest(iteration)
            with self._clock("sampler"):
                indices = next(draws, None)
            if indices is None:
                return
            units = self.part.take(indices.numpy())
            records, weights = units, None
            if self.owners is not None:
                records, shares = self.owners.records(units)
                weights = torch.from_numpy(shares).repeat_interleave(self.views)
            count = len(records)
            if self.rows is not None:
                weights = (torch.arange(self.rows) < count).float().repeat_interleave(self.views)
                count = self.rows
            state = self.sampler.state_dict()
            size = self.piece or max(count, 1)
            starts = range(0, max(count, 1), size)
            ahead.append((Draw(len(units), count * self.views, None, weights), len(starts), state))
            for start in starts:
                if self._origins is not None:
                    self._origins.check(records[start : start + size])
                yield records[start : start + size], _secret_of(state, start)

    def _require_newest(self, iteration: int) -> None:
        if iteration != self._iteration:
            raise EngineError("this loader has been iterated again since; go on with the newest iteration only")

    def state_dict(self) -> dict[str, Any]:
        """The sampler's state after the last batch yielded, whatever workers have drawn ahead."""
        return self._consumed

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the batch at which `state` was taken; errors as the sampler's. Ends running iterations."""
        self.sampler.load_state_dict(state)
        self._consumed = self.sampler.state_dict()
        self._iteration += 1
        self.drawn = None
        self._listener.after_draw(None)


def _secret_of(state: dict[str, Any], use: int | str) -> int:
    """Of the coins with which a piece is read, by its first row, or of the step: a hash of the sampler's secret key."""
    rank = distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0
    text = json.dumps([state, rank, use], sort_keys=True)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=32, person=b"lipdp.coins").digest(), "little")


def _labelled(batch: Any, rows: Rows) -> Any:
    """Every tensor of a batch, with its rows."""
    if isinstance(batch, Tensor):
        return BatchTensor.of(batch, rows)
    if isinstance(batch, dict):
        return {key: _labelled(value, rows) for key, value in batch.items()}
    return type(batch)(_labelled(value, rows) for value in batch) if type(batch) in (list, tuple) else batch


def _require_map_style(dataset: Dataset[Any], population: int) -> None:
    kind = type(dataset).__name__
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise EngineError(
            f"{kind} can't be sampled: every record must be drawn independently, by its index. "
            "Give a map-style dataset, with __len__ and __getitem__ (a TensorDataset, say)"
        )
    if len(dataset) != population:
        raise ParameterError(f"{kind} has {len(dataset)} records, but the sampler draws from {population}")
