"""Which records each step sees: Poisson and fixed-size samplers."""

from __future__ import annotations

import math
import operator
from abc import ABC, abstractmethod
from collections.abc import Iterator
from numbers import Real
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from lipdp.accounting.plan import SAMPLINGS
from lipdp.accounting.relation import Relation
from lipdp.errors import CheckpointError, ParameterError, ResumeError
from lipdp.noise.cipher import keystream, keystream_blocks
from lipdp.noise.ratchet import Ratchet

_MANY, _SPARSE = 1 << 20, 0.05  # more records than this, at no higher a rate: see `PoissonSampler`


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
                indices = self._secure_draw(keystream_blocks(self._ratchet.advance(), self.population))
            else:
                indices = self._draw(self._ratchet.generator())
            self.position += 1
            yield torch.from_numpy(np.sort(indices))

    @abstractmethod
    def _draw(self, generator: np.random.Generator) -> np.ndarray:
        """(n,) int64, distinct."""

    @abstractmethod
    def _secure_draw(self, blocks: Iterator[np.ndarray]) -> np.ndarray:
        """The same law, from one uniform 64-bit word a record; they come in blocks, in the order of the records."""

    def _subset(self, generator: np.random.Generator, size: int) -> np.ndarray:
        """A uniform `size`-subset. numpy runs Floyd's algorithm up to a twentieth of the population and a partial
        Fisher–Yates shuffle beyond, so time and memory are O(size): no list of all records for a small batch."""
        return generator.choice(self.population, size, replace=False, shuffle=False)

    def _settings(self) -> dict[str, int | float | str]:
        return {
            "sampler": type(self).__name__,
            "population": self.population,
            "sampling_rate": self.sampling_rate,
            "steps": self.steps,
        }

    def state_dict(self) -> dict[str, Any]:
        """The position, the key and the settings they belong to. Secret while the run goes on: see `Ratchet`."""
        return {**self._settings(), "position": self.position, "ratchet": self._ratchet.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue bit for bit; refuse the state of another sampler, population, rate or number of steps."""
        for name, value in self._settings().items():
            if state.get(name) != value:
                raise ResumeError(f"{name} was {state.get(name)!r} in the saved sampler and is {value!r} now")
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

    In float64, numpy's binomial draw of mean 4096 follows its law up to a factor of 1 ± 1e-16 N: 1e-10 at N = 10⁶, but
    1e-7 at 10⁹, and T steps can turn that into 2e-7 T of ε. So beyond N = 2²⁰, where q ≤ 1/20, the same law is drawn in
    another way: M ~ Poisson(−N ln(1−q)) arrivals, each at a uniform record. Then every record has Poisson(−ln(1−q)) of
    them, independently of the others, so at least one with probability q; rounding is of the order of 1e-16 M ln M.

    Guarantees: the relation is *add or remove one record*.

    Each step has a generator of its own, seeded with the next secret of a `Ratchet`. With `secure`, every record has a
    word of ChaCha20 keystream instead, and is in the batch where the word is below ⌊q 2⁶⁴⌋: O(N) time, drawn in blocks.

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

    Source: Abadi et al. (2016); Floyd's subset algorithm: Bentley & Floyd (1987); Kingman (1993), "Poisson Processes",
    for the splitting of arrivals.
    """

    relation: ClassVar[Relation] = SAMPLINGS["poisson"]

    def __init__(
        self, population: int, *, sampling_rate: float, steps: int, seed: int | None = None, secure: bool = False
    ) -> None:
        if not (isinstance(sampling_rate, Real) and 0.0 < sampling_rate <= 1.0):
            raise ParameterError(f"sampling_rate is {sampling_rate}; it must be in (0, 1]")
        super().__init__(population, steps, float(sampling_rate), seed, secure)

    def _draw(self, generator: np.random.Generator) -> np.ndarray:
        if self.population > _MANY and self._rate <= _SPARSE:
            arrivals = int(generator.poisson(-math.log1p(-self._rate) * self.population))
            records = np.sort(generator.integers(self.population, size=arrivals))
            return records[np.diff(records, prepend=-1) > 0]  # faster than np.unique, which hashes first
        return self._subset(generator, int(generator.binomial(self.population, self._rate)))

    @property
    def _rate(self) -> float:
        """The probability of every record to be drawn."""
        return self.sampling_rate

    def _secure_draw(self, blocks: Iterator[np.ndarray]) -> np.ndarray:
        return np.arange(self.population) if self._rate == 1 else self._below(blocks)[0]

    def _below(self, blocks: Iterator[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """The records whose words are below ⌊q 2⁶⁴⌋, and these words."""
        last = int(self._rate * 2**64) - 1  # exact: q is a binary fraction
        found, kept, start = [], [], 0
        for words in blocks:
            here = np.flatnonzero(words <= last)
            found.append(start + here)
            kept.append(words[here])
            start += len(words)
        return np.concatenate(found), np.concatenate(kept)


class CyclicPoissonSampler(PoissonSampler):
    """Every record is dealt to one of b groups, once; batch t takes records of group t mod b alone, each at rate b q.

    So a record is in one of b consecutive batches at most, which noise over b steps needs, and in each with
    probability q over dealing and draw. For a given dealing the draws are those of a `PoissonSampler` of rate b q, of
    which the other groups are left out.

    Guarantees: the relation is *add or remove one record*: a record's group is a die of its own, neither the data nor
    the number of records has a part in it, and with or without the record all others have the same law. (Groups of
    equal size would not do.) The dealing is kept with the state, so that it outlives every resume. It may be known:
    the account holds for every dealing; the draws may not.

    Args:
        population, sampling_rate, steps, seed, secure: see `PoissonSampler`; the rate is q, over the dealing too.
        bands: b ≥ 1 with b q ≤ 1.

    Attributes:
        groups: (population,) int16, of every record.

    >>> sampler = CyclicPoissonSampler(1000, sampling_rate=0.25, steps=3, bands=2, seed=0)
    >>> first, second, third = (set(batch.tolist()) for batch in sampler)
    >>> len(first & second), len(first & third) > 0
    (0, True)

    Source: Choquette-Choo et al. (2023), "(Amplified) Banded Matrix Factorization", algorithm 2; there groups have one
    size.
    """

    def __init__(
        self, population: int, *, sampling_rate: float, steps: int, bands: int, seed: int | None = None,
        secure: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(population, sampling_rate=sampling_rate, steps=steps, seed=seed, secure=secure)
        self.bands = _positive("bands", bands)
        if self.bands * self.sampling_rate > 1 + 1e-9 or self.bands >= 2**15:
            raise ParameterError(f"bands is {bands} at rate {sampling_rate}; b q must be at most 1, and b below 2**15")
        self._deal(f"{self._ratchet.advance():064x}")

    def _deal(self, key: str) -> None:
        self._dealing = key
        generator = np.random.Generator(np.random.SFC64(np.random.SeedSequence(int(key, 16), pool_size=8)))
        self.groups = generator.integers(self.bands, size=self.population, dtype=np.int16)

    @property
    def _rate(self) -> float:
        return min(1.0, self.bands * self.sampling_rate)

    def _own(self, drawn: np.ndarray) -> np.ndarray:
        return drawn[self.groups[drawn] == self.position % self.bands]

    def _draw(self, generator: np.random.Generator) -> np.ndarray:
        return self._own(super()._draw(generator))

    def _secure_draw(self, blocks: Iterator[np.ndarray]) -> np.ndarray:
        return self._own(super()._secure_draw(blocks))

    def _settings(self) -> dict[str, int | float | str]:
        return {**super()._settings(), "bands": self.bands}

    def state_dict(self) -> dict[str, Any]:
        """The state of a `PoissonSampler`, and the key of the dealing."""
        return {**super().state_dict(), "dealing": self._dealing}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue bit-identically, with the groups of the state; errors as for a `PoissonSampler`."""
        dealing = state.get("dealing")
        try:
            fits = isinstance(dealing, str) and 0 <= int(dealing, 16) < 2**256
        except ValueError:
            fits = False
        if not fits and state.get("sampler") == type(self).__name__:
            raise CheckpointError(f"sampler state has dealing {dealing!r}; expected 64 hex digits")
        super().load_state_dict(state)
        if dealing != self._dealing:  # the loader loads its own state at every pass
            self._deal(str(dealing))


class TruncatedPoissonSampler(PoissonSampler):
    """Poisson batches, of which at most C records take part: where more are drawn, C of them, uniformly at random.

    The maths: given its size, a Poisson batch is a uniform subset, and so is a uniform part of it: draw
    min(C, Binomial(N, q)), then a uniform subset of that size. `BatchLoader` fills every batch up to C rows.

    Guarantees: the relation is *add or remove one record*. A record that is drawn may take the place of another, so the
    sum may move by 2Δ where the others fill the batch: accounting/privacy_loss.py proves what that costs.
    `sampling_rate` is q, before the cut.

    Args:
        population, sampling_rate, steps, seed, secure: see `PoissonSampler`. With `secure`, of the words below ⌊q 2⁶⁴⌋
            the C smallest.
        truncated_batch_size: C ≥ 1.

    Raises:
        ParameterError: an argument outside its range.

    >>> sampler = TruncatedPoissonSampler(1000, sampling_rate=0.01, truncated_batch_size=12, steps=200, seed=0)
    >>> max(len(batch) for batch in sampler)
    12

    Source: Poisson sampling with a cap as in jax-privacy; the account: dp-accounting, arXiv:2508.15089.
    """

    def __init__(
        self, population: int, *, sampling_rate: float, truncated_batch_size: int, steps: int, seed: int | None = None,
        secure: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(population, sampling_rate=sampling_rate, steps=steps, seed=seed, secure=secure)
        self.truncated_batch_size = _positive("truncated_batch_size", truncated_batch_size)

    def _draw(self, generator: np.random.Generator) -> np.ndarray:
        drawn = super()._draw(generator)
        if len(drawn) <= self.truncated_batch_size:
            return drawn
        return generator.choice(drawn, self.truncated_batch_size, replace=False, shuffle=False)

    def _secure_draw(self, blocks: Iterator[np.ndarray]) -> np.ndarray:
        drawn, words = self._below(blocks)
        return drawn[np.argsort(words, kind="stable")[: self.truncated_batch_size]]

    def _settings(self) -> dict[str, int | float | str]:
        return {**super()._settings(), "truncated_batch_size": self.truncated_batch_size}


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

    relation: ClassVar[Relation] = SAMPLINGS["fixed_size"]

    def __init__(
        self, population: int, *, batch_size: int, steps: int, seed: int | None = None, secure: bool = False
    ) -> None:
        self.batch_size = _positive("batch_size", batch_size)
        if self.batch_size > _positive("population", population):
            raise ParameterError(f"batch_size is {batch_size}, more than the {population} records; draw at most all")
        super().__init__(population, steps, self.batch_size / population, seed, secure)

    def _draw(self, generator: np.random.Generator) -> np.ndarray:
        return self._subset(generator, self.batch_size)

    def _secure_draw(self, blocks: Iterator[np.ndarray]) -> np.ndarray:
        words, indices, start = np.empty(0, np.uint64), np.empty(0, np.int64), 0
        for block in blocks:  # of the words so far, the B smallest; a larger one than all of those is never among them
            full = len(words) == self.batch_size
            new = np.flatnonzero(block < words.max()) if full else np.arange(len(block))
            words, indices = np.concatenate([words, block[new]]), np.concatenate([indices, start + new])
            if len(words) > self.batch_size:
                smallest = np.argpartition(words, self.batch_size - 1)[: self.batch_size]
                words, indices = words[smallest], indices[smallest]
            start += len(block)
        return indices


def _positive(name: str, value: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = 0
    if not 0 < number < 2**53:
        raise ParameterError(f"{name} is {value!r}; it must be an integer of at least 1, below 2**53")
    return number
