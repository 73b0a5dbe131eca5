"""Random words from a cipher stream, ChaCha20, keyed from the operating system."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from lipdp.errors import ParameterError
from lipdp.noise.gaussian import RatchetSource


def keystream(key: int, count: int) -> np.ndarray:
    """(count,) uint64: the ChaCha20 keystream of a 256-bit key.

    >>> keystream(0, 1).item() == int.from_bytes(bytes.fromhex("76b8e0ada0f13d90"), "little")
    True

    Source: Bernstein (2008), "ChaCha, a variant of Salsa20"; RFC 8439 (the first of its test vectors is the example).
    """
    return next(keystream_blocks(key, count, block=max(count, 1)), np.empty(0, np.uint64))


def keystream_blocks(key: int, count: int, *, block: int = 1 << 17) -> Iterator[np.ndarray]:
    """The words of `keystream(key, count)` in order, at most `block` of them at a time and in memory.

    >>> [len(words) for words in keystream_blocks(0, 5, block=2)]
    [2, 2, 1]
    """
    try:
        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
    except ImportError as error:
        raise ParameterError(f'secure=True needs cryptography ({error}): pip install "lipdp[secure]"') from error
    cipher = Cipher(algorithms.ChaCha20(key.to_bytes(32, "little"), bytes(16)), mode=None).encryptor()
    for start in range(0, count, block):
        raw = bytearray(8 * min(block, count - start))
        cipher.update_into(raw, raw)
        yield np.frombuffer(raw, np.uint64)


class ChaChaSource(RatchetSource):
    """A `NoiseSource` whose words are ChaCha20 keystreams, each under the next secret of a `Ratchet`.

    Guarantees: to tell the words from uniform ones, or to find one call's from another's, means breaking ChaCha20 or
    BLAKE2b. From a state the words of calls before it cannot be recomputed, those after it can: see `Ratchet`.

    Args:
        seed: reproducible words, **not private**; None draws 256 bits from the operating system.
        device: where the words are wanted; they are made on the CPU.

    >>> ChaChaSource(seed=0).words(3).dtype
    torch.int64
    """

    purpose: ClassVar[str] = "secure noise"

    def __init__(self, seed: int | None = None, *, device: torch.device | str = "cpu") -> None:
        super().__init__(seed, device=device)
        keystream(0, 1)  # refuses here what it would refuse at the first step

    def words(self, count: int) -> Tensor:
        """(count,) int64: fresh independent uniform 64-bit words."""
        return torch.from_numpy(keystream(self.secret(), count).view(np.int64)).to(self.device)
