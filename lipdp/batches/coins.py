"""Coins that nobody outside knows: the generators of torch, numpy and Python, set from a secret.

Dropout, random views and noise on inputs throw one coin after the other, along the rows of a batch. Take one record
away, and all rows behind it get other coins. Where coins are secret and fresh this changes nothing: record by record
they have the same distribution, so neighbouring data sets can be thought of with the same coins for the records that
they share, and the sum of gradients moves by one term. Where they are known (`torch.manual_seed(0)` at the head of a
script) every later term moves. A secret of 256 bits is no number that can be tried out; `torch.manual_seed` on a CPU
has 32.

Source: ours.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

_HEAD, _WORDS, _BYTES = 24, 624, 5056  # of torch's state on a CPU: seed, left, seeded, next; Mersenne twister; normals


def set_coins(secret: int, *, on_gpus: bool = True) -> None:
    """Set the global generators from a secret below 2²⁵⁶ (of which a GPU's takes 64 bits): the same coins (0.1 ms).

    >>> set_coins(1 << 200)
    >>> first = torch.rand(3), np.random.rand(), random.random()
    >>> set_coins(1 << 200)
    >>> bool((first[0] == torch.rand(3)).all()), first[1:] == (np.random.rand(), random.random())
    (True, True)
    """
    drawn = np.frombuffer(hashlib.shake_256(secret.to_bytes(32, "little")).digest(4 * (_WORDS + 18)), np.uint32)
    words, for_numpy, for_python, for_cuda = np.split(drawn.copy(), [_WORDS, _WORDS + 8, _WORDS + 16])
    words[0] |= 0x80000000  # never all zero
    torch.set_rng_state(_twister(words))
    np.random.seed(for_numpy)  # noqa: NPY002 - the generator of a user's transforms, whichever they use
    random.seed(for_python.tobytes())
    if on_gpus and torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(int(for_cuda.view(np.uint64)[0]))


@contextmanager
def coins(secret: int) -> Iterator[None]:
    """A block with coins from a secret on the CPU; afterwards the global generators are where they were."""
    with torch.random.fork_rng(devices=[]), others_kept():
        set_coins(secret, on_gpus=False)
        yield


@contextmanager
def others_kept() -> Iterator[None]:
    """A block after which the generators of numpy and Python are where they were."""
    before = np.random.get_state(), random.getstate()  # noqa: NPY002
    try:
        yield
    finally:
        np.random.set_state(before[0])  # noqa: NPY002
        random.setstate(before[1])


def _twister(words: np.ndarray) -> torch.Tensor:
    """torch's state of a CPU's generator that goes on from these 624 words."""
    state = np.zeros(_BYTES, np.uint8)
    state[8:16].view(np.int32)[:] = 1  # a new block of numbers is due; seeded
    state[_HEAD : _HEAD + 8 * _WORDS].view(np.uint64)[:] = words
    return torch.from_numpy(state)
