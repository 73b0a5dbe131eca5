"""What is drawn, a record or an owner of records, and which of the records drawn this process reads."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lipdp.accounting.plan import whole
from lipdp.errors import ParameterError

Indices = npt.NDArray[np.int64]


class Partition(Protocol):
    """Which of the units drawn by all processes are this one's. Every unit drawn is one process's, and of one only."""

    def take(self, drawn: Indices) -> Indices:
        """Sorted indices of units in; of those that are in this process's data set, as numbered there, out."""
        ...


@dataclass(frozen=True)
class EveryNth:
    """Every process has the whole data set, and reads the drawn units number `rank`, `rank + size`, …: equal shares."""

    rank: int = 0
    size: int = 1

    def take(self, drawn: Indices) -> Indices:
        """See `Partition`."""
        return drawn[self.rank :: self.size]


@dataclass(frozen=True)
class OwnUnits:
    """Every process has units of its own, number `start` up to `stop` of all; it reads those of them that were drawn.

    The restriction of a Poisson batch of all units to those of a process is a Poisson batch of those, with the same q.
    """

    start: int
    stop: int

    def take(self, drawn: Indices) -> Indices:
        """See `Partition`."""
        low, high = np.searchsorted(drawn, [self.start, self.stop])
        return drawn[low:high] - self.start


class Owners:
    """Records grouped by owner. A batch holds the records of its owners, each with weight 1/(records of its owner).

    With n records of owner o, each of gradient norm ≤ Δ, ‖Σ_{i∈o} ∇ℓ_i / n‖ ≤ Δ: the owner, with all records, moves
    the sum over a batch of owners by Δ at most, however many they are. Nothing is clipped.

    Guarantees: the weights of an owner's records add up to 1 at most, also as float32 (they are rounded down).

    Attributes:
        total: N.
        digest: of who owns which record.

    Args:
        owner_of: (N,) the owner of every record: whole numbers, in any order.

    Raises:
        ParameterError: no records, or ids that are not whole numbers.

    >>> owners = Owners([7, 7, 3, 7])
    >>> len(owners), [part.tolist() for part in owners.records(np.array([0, 1]))]
    (2, [[2, 0, 1, 3], [1.0, 0.3333333134651184, 0.3333333134651184, 0.3333333134651184]])

    Source: McMahan et al. (2018), "Learning differentially private recurrent language models", section 2.
    """

    def __init__(self, owner_of: Sequence[int] | Tensor | npt.NDArray[Any]) -> None:
        ids = np.asarray(owner_of.cpu() if isinstance(owner_of, Tensor) else owner_of)
        if ids.ndim != 1 or not len(ids) or ids.dtype.kind not in "iu":
            raise ParameterError(
                f"group: one whole number a record, its owner, is needed; got {ids.dtype} of shape {ids.shape}"
            )
        _, number, counts = np.unique(ids, return_inverse=True, return_counts=True)
        self.total = len(ids)
        self.digest = hashlib.blake2b(number.tobytes(), digest_size=16).hexdigest()
        self._order = np.argsort(number, kind="stable")
        self._ends = np.cumsum(counts)
        self._counts = counts
        self._weights = _rounded_down(1.0 / counts)

    def __len__(self) -> int:
        return len(self._counts)

    def records(self, owners: Indices) -> tuple[Indices, npt.NDArray[np.float32]]:
        """The records of these owners and the weight of each."""
        counts = self._counts[owners]
        first = np.repeat(self._ends[owners] - counts, counts)
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return self._order[first + within], np.repeat(self._weights[owners], counts)


def bounded_contributions(owners: Iterable[Iterable[Hashable]], *, contributions: int = 1) -> Indices:
    r"""Records of which nobody owns more than k: a record joins if all of its owners have contributions left.

    For records with several owners, a message with its sender and receivers say, to train on
    `Subset(dataset, bounded_contributions(owners))`; where each has one, `Owners` leaves nobody out. Records with few
    owners come first, then those that stand first. None of the records left out could be added.

    Guarantees, where it is public who owns which record: which records join depends on that alone, not on what they
    hold. So at most k of them change if all that one owner owns is left out of the training (or, with batches of a
    fixed size, replaced). If (ε, δ) holds for one record, then for an owner, with everything they own, holds

    - (ε, δ) too for k = 1: no two records that join share an owner;
    - (kε, δ (e^{kε} − 1)/(e^ε − 1)) for k > 1: k changes of one record, one after the other.

    Who owns what is not protected: without an owner's links others would have contributions left, and other records
    could join in many places.

    Args:
        owners: those of every record; a record without any joins.
        contributions: k ≥ 1.

    Returns:
        (n,) int64, sorted.

    Raises:
        ParameterError: k is no whole number of at least 1, or a record's owners are one text, tensors or NaN.

    >>> bounded_contributions([["ann", "bob"], ["bob"], ["cy", "ann"], ["dan", "bob"]]).tolist()
    [1, 2]

    Source: Ganesh et al. (2025), "It's my data too: private ML for datasets with multi-user training examples"; group
    privacy: Vadhan (2017), lemma 2.2.
    """
    most = whole("contributions", contributions)
    owned = [_owners_of(each) for each in owners]
    used: Counter[Hashable] = Counter()
    joined = []
    for record in sorted(range(len(owned)), key=lambda i: len(owned[i])):
        if all(used[owner] < most for owner in owned[record]):
            used.update(owned[record])
            joined.append(record)
    return np.array(sorted(joined), dtype=np.int64)


def _owners_of(record: Iterable[Hashable]) -> set[Hashable]:
    """Read once; refused are owners of whom no two are equal, so that nobody's records would be found together."""
    if isinstance(record, (str, bytes)):
        raise ParameterError("owners: a text where the owners of a record are needed; give a list of them")
    own = set(record)
    if any(isinstance(owner, Tensor) or owner != owner for owner in own):
        raise ParameterError("owners: tensors and NaN are equal to no other; give numbers (tensor.tolist()) or texts")
    return own


def _rounded_down(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    narrow = values.astype(np.float32)
    return np.where(narrow > values, np.nextafter(narrow, np.float32(0)), narrow).astype(np.float32)


def flattened_views(batch: tuple[Any, ...], views: int) -> tuple[Any, ...]:
    """(x of (n, K, *), y of (n, …)) as (x of (nK, *), y with every row K times).

    Raises:
        ParameterError: x does not hold K views of every record.
    """
    x, *others = batch
    if not isinstance(x, Tensor) or x.ndim < 2 or x.shape[1] != views:
        shape = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ParameterError(f"views={views} takes records of shape ({views}, ...), got a batch of {shape}")
    return x.flatten(0, 1), *(torch.repeat_interleave(other, views, dim=0) for other in others)
