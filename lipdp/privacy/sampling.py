"""Which records each step sees: Poisson and fixed-size samplers, and a loader that feeds their batches."""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator
from numbers import Real
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, default_collate

from lipdp.errors import CheckpointError, DataError, EngineError, ParameterError, ResumeError
from lipdp.privacy.ratchet import Ratchet
from lipdp.privacy.secure import keystream
from lipdp.relation import Relation


@runtime_checkable
class Sampler(Protocol):
    """Draws the logical batches of one run, each independent of the others.

    Iterating yields the batches from `position` to `steps`, each a sorted (n,) int64 tensor of distinct indices into
    `population` records; a sampler that has reached `steps` yields nothing more, since `steps` is what ε was computed
    for. `len` is `steps`, whatever the position.

    Guarantees: `state_dict` taken after any batch makes the following ones bit-identical. `sampling_rate` is the
    probability that a given record is in a given batch and `relation` the neighbouring relation of its account.
    """

    population: int
    steps: int
    position: int
    sampling_rate: float
    relation: ClassVar[Relation]

    @property
    def seeded(self) -> bool: ...

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Tensor]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class _IndependentBatches(ABC):
    """What the two samplers share: a key per step, a position, and a state that names the facts it belongs to."""

    relation: ClassVar[Relation]

    def __init__(
        self, population: int, steps: int, sampling_rate: float, seed: int | None, secure: bool = False
    ) -> None:
        self.population = _positive("population", population)
        self.steps = _positive("steps", steps)
        self.sampling_rate = sampling_rate
        self.position = 0
        self.secure = secure
        self._ratchet = Ratchet("secure sampling" if secure else "sampling", seed)
        if secure:
            keystream(0, 1)  # refuses here what it would refuse at the first step

    @property
    def seeded(self) -> bool:
        """True when the batches can be reproduced by whoever knows a seed: not private."""
        return self._ratchet.seeded

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Tensor]:
        while self.position < self.steps:
            if self.secure:
                indices = self._secure_draw(keystream(self._ratchet.advance(), self.population))
            else:
                indices = self._draw(self._ratchet.generator())
            self.position += 1
            yield torch.from_numpy(np.sort(indices))

    @abstractmethod
    def _draw(self, generator: np.random.Generator) -> np.ndarray:
        """(n,) int64, distinct."""

    @abstractmethod
    def _secure_draw(self, words: np.ndarray) -> np.ndarray:
        """The same law, from one uniform 64-bit word a record."""

    def _subset(self, generator: np.random.Generator, size: int) -> np.ndarray:
        """A uniform `size`-subset. numpy runs Floyd's algorithm up to a twentieth of the population and a partial
        Fisher–Yates shuffle beyond, so time and memory are O(size): no list of all records for a small batch."""
        return generator.choice(self.population, size, replace=False, shuffle=False)

    def _facts(self) -> dict[str, int | float | str]:
        return {
            "sampler": type(self).__name__,
            "population": self.population,
            "sampling_rate": self.sampling_rate,
            "steps": self.steps,
        }

    def state_dict(self) -> dict[str, Any]:
        """The position, the key and the facts they belong to. Secret while the run goes on: see `Ratchet`."""
        return {**self._facts(), "position": self.position, "ratchet": self._ratchet.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue bit-identically.

        Raises:
            ResumeError: the state is of another kind of sampler, population, rate or number of steps.
            CheckpointError: the state is damaged.
        """
        for fact, value in self._facts().items():
            if state.get(fact) != value:
                raise ResumeError(f"{fact} was {state.get(fact)!r} in the saved sampler and is {value!r} now")
        position, ratchet = state.get("position"), state.get("ratchet")
        if not isinstance(position, int) or not 0 <= position <= self.steps or not isinstance(ratchet, dict):
            raise CheckpointError(
                f"sampler state has position {position!r}, ratchet {ratchet!r}; expected 0..{self.steps}, a dict"
            )
        self._ratchet.load_state_dict(ratchet)
        self.position = position


class PoissonSampler(_IndependentBatches):
    """Each record is in each batch with probability q, independently of everything else.

    The maths: `P(batch = S) = q^|S| (1−q)^(N−|S|)` depends on S through |S| only. So |S| is Binomial(N, q) and, given
    its size, S is uniform among the subsets of that size: draw the size, then the subset, in O(q N) time and memory
    whatever N. An empty batch is a batch like any other and is yielded.

    Guarantees: the relation is *add or remove one record*. (numpy's binomial draws agree with the law to about 1e-13.)

    Each step has a generator of its own, seeded with the next secret of a `Ratchet`. With `secure`, every record has a
    word of ChaCha20 keystream instead, and is in the batch where the word is below ⌊q 2⁶⁴⌋: O(N), 4 ns a record.

    Args:
        population: N ≥ 1, the number of records present.
        sampling_rate: q in (0, 1], a public constant; not `batch_size / len(dataset)` of a secret dataset.
        steps: T ≥ 1, the number of batches in all.
        seed: reproducible batches, **not private**; None seeds from the operating system.
        secure: draw from a cipher; needs the extra "secure".

    Raises:
        ParameterError: an argument outside its range.

    >>> sampler = PoissonSampler(1000, sampling_rate=0.005, steps=3, seed=0)
    >>> batches = list(sampler)
    >>> len(batches), batches[0].dtype, sampler.position, list(sampler)
    (3, torch.int64, 3, [])

    Source: Abadi et al. (2016); Floyd's subset algorithm: Bentley & Floyd (1987).
    """

    relation: ClassVar[Relation] = Relation.ADD_OR_REMOVE_ONE

    def __init__(
        self, population: int, *, sampling_rate: float, steps: int, seed: int | None = None, secure: bool = False
    ) -> None:
        if not (isinstance(sampling_rate, Real) and 0.0 < sampling_rate <= 1.0):
            raise ParameterError(f"sampling_rate is {sampling_rate}; it must be in (0, 1]")
        super().__init__(population, steps, float(sampling_rate), seed, secure)

    def _draw(self, generator: np.random.Generator) -> np.ndarray:
        return self._subset(generator, int(generator.binomial(self.population, self.sampling_rate)))

    def _secure_draw(self, words: np.ndarray) -> np.ndarray:
        below = int(self.sampling_rate * 2**64)  # exact: q is a binary fraction
        return np.flatnonzero(words < below) if below < 2**64 else np.arange(self.population)


class FixedSizeSampler(_IndependentBatches):
    """Each batch is a uniform subset of exactly B records, drawn afresh at every step.

    Not a shuffled epoch: batches of one epoch are disjoint, hence dependent, and no amplification theorem covers them.

    Guarantees: the relation is *replace one record*: N and B are public, and a sum over the batch moves by up to 2Δ
    (`relation.sensitivity_factor`). `sampling_rate` is B/N, every record's probability of being in a batch.

    Args:
        population: N ≥ 1, the number of records; public under this relation.
        batch_size: B, 1 ≤ B ≤ N.
        steps: T ≥ 1, the number of batches in all.
        seed: reproducible batches, **not private**; None seeds from the operating system.
        secure: the records with the B smallest words of a cipher's keystream; needs the extra "secure".

    Raises:
        ParameterError: an argument outside its range.

    >>> sampler = FixedSizeSampler(10, batch_size=4, steps=2, seed=0)
    >>> [len(set(batch.tolist())) for batch in sampler], sampler.sampling_rate
    ([4, 4], 0.4)

    Source: Balle, Barthe & Gaboardi (2018), "Privacy amplification by subsampling".
    """

    relation: ClassVar[Relation] = Relation.REPLACE_ONE

    def __init__(
        self, population: int, *, batch_size: int, steps: int, seed: int | None = None, secure: bool = False
    ) -> None:
        self.batch_size = _positive("batch_size", batch_size)
        if self.batch_size > _positive("population", population):
            raise ParameterError(f"batch_size is {batch_size}, more than the {population} records; draw at most all")
        super().__init__(population, steps, self.batch_size / population, seed, secure)

    def _draw(self, generator: np.random.Generator) -> np.ndarray:
        return self._subset(generator, self.batch_size)

    def _secure_draw(self, words: np.ndarray) -> np.ndarray:
        return np.argpartition(words, self.batch_size - 1)[: self.batch_size]


class BatchLoader:
    """Feeds a dataset's records to the training loop in the batches that a sampler draws.

    Iterating yields `(x, y)` (whatever the dataset's records are made of, collated by torch's `default_collate`) for
    each batch not yet consumed; an empty batch comes as tensors of shape `(0, *features)`. Resuming, breaking out and
    iterating again all continue after the last batch that was *yielded*; after `steps` batches nothing more comes, for
    `steps` is the privacy budget. Only the newest iteration is live: going on with an older one is an error, since it
    would hand out the same draw twice. There is no `collate_fn`: a collation that mixes records (mix-up) would break
    the per-record sensitivity.

    A `TensorDataset` is indexed directly, in this process and on its own device. Any other map-style dataset goes
    through torch's `DataLoader`. Workers run ahead of the consumer, but `state_dict` describes the consumer. Index
    draws are bit-identical on resume; random augmentation inside workers is torch's and is not. torch's global
    generator is left alone.

    Args:
        dataset: map-style, with `__len__` (equal to the sampler's population) and `__getitem__`.
        sampler: owned by the loader from here on; save and load it through the loader.
        num_workers: processes that read records, for a dataset that is not a `TensorDataset`.
        pin_memory: page-locked batches, where CUDA is available.

    Raises:
        EngineError: an `IterableDataset`, or one without a length: it can't be sampled.
        ParameterError: a length that is not the sampler's population, or a negative `num_workers`.

    >>> dataset = TensorDataset(torch.zeros(100, 3), torch.zeros(100, dtype=torch.int64))
    >>> loader = BatchLoader(dataset, PoissonSampler(100, sampling_rate=0.05, steps=2, seed=0))
    >>> for x, y in loader:
    ...     print(x.shape == (loader.last_batch_size, 3), len(x) == len(y))
    True True
    True True
    >>> len(loader), loader.position, list(loader)
    (2, 2, [])
    """

    def __init__(
        self, dataset: Dataset[Any], sampler: Sampler, *, num_workers: int = 0, pin_memory: bool = False
    ) -> None:
        _require_map_style(dataset, sampler.population)
        if num_workers < 0:
            raise ParameterError(f"num_workers is {num_workers}; it must be 0 or more")
        self.dataset = dataset
        self.sampler = sampler
        self.last_batch_size: int | None = None
        """Number of records in the last batch yielded; None before the first."""
        self.last_batch: Any = None
        """The last batch yielded, for checks of the records in it."""
        self._records: Dataset[Any]
        if type(dataset) is TensorDataset:  # a subclass may have its own __getitem__
            self._records, self._num_workers = _TensorRecords(dataset), 0
        else:
            self._records, self._num_workers = _MapStyleRecords(dataset), num_workers
        self._pin_memory = pin_memory and torch.cuda.is_available()
        self._consumed = sampler.state_dict()
        self._iteration = 0

    def __len__(self) -> int:
        return self.sampler.steps

    @property
    def position(self) -> int:
        """Number of batches yielded so far, over all iterations and resumptions."""
        return int(self._consumed["position"])

    def __iter__(self) -> Iterator[Any]:
        self._iteration += 1
        iteration = self._iteration
        self.sampler.load_state_dict(self._consumed)  # take back what an abandoned iteration had drawn ahead
        ahead: deque[tuple[int, dict[str, Any]]] = deque()
        batches = DataLoader(
            self._records,
            batch_size=None,
            sampler=self._draws(iteration, ahead),
            num_workers=self._num_workers,
            collate_fn=_unchanged,
            pin_memory=self._pin_memory,
            generator=torch.Generator(),
        )
        for batch in batches:
            self._require_newest(iteration)
            self.last_batch_size, self._consumed = ahead.popleft()
            self.last_batch = tuple(batch) if isinstance(batch, list) else batch
            del batch
            yield self.last_batch

    def _draws(self, iteration: int, ahead: deque[tuple[int, dict[str, Any]]]) -> Iterator[np.ndarray]:
        """The indices of each batch; notes its size and the state after it for when the batch will be consumed."""
        draws = iter(self.sampler)
        while True:
            self._require_newest(iteration)
            indices = next(draws, None)
            if indices is None:
                return
            ahead.append((indices.numel(), self.sampler.state_dict()))
            yield indices.numpy()

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
        self.last_batch_size = self.last_batch = None


class _TensorRecords(Dataset[Any]):
    """Whole batches of a `TensorDataset`, one gather per tensor, where the tensors are."""

    def __init__(self, dataset: TensorDataset) -> None:
        self._tensors = dataset.tensors

    def __getitem__(self, indices: np.ndarray) -> tuple[Tensor, ...]:
        picked = torch.from_numpy(indices)
        return tuple(tensor.index_select(0, picked.to(tensor.device)) for tensor in self._tensors)


class _MapStyleRecords(Dataset[Any]):
    """Whole batches of any map-style dataset, collated; the empty batch is an empty slice of record 0."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self._dataset = dataset

    def __getitem__(self, indices: np.ndarray) -> Any:
        if indices.size == 0:
            return _emptied(default_collate([self._dataset[0]]))
        many = getattr(self._dataset, "__getitems__", None)
        picked = indices.tolist()
        return default_collate(many(picked) if callable(many) else [self._dataset[index] for index in picked])


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


def _require_map_style(dataset: Dataset[Any], population: int) -> None:
    kind = type(dataset).__name__
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise EngineError(
            f"{kind} can't be sampled: every record must be drawn independently, by its index. "
            "Give a map-style dataset, with __len__ and __getitem__ (a TensorDataset, say)"
        )
    if len(dataset) != population:
        raise ParameterError(f"{kind} has {len(dataset)} records but the sampler draws from {population}")


def _positive(name: str, value: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = 0
    if not 0 < number < 2**53:
        raise ParameterError(f"{name} is {value!r}; it must be an integer of at least 1, below 2**53")
    return number
