"""A key that only goes forward: one fresh 256-bit secret per training step, and no way back to an earlier one."""

from __future__ import annotations

import hashlib
import operator
import os
import secrets
from typing import Any

import numpy as np

from lipdp.errors import CheckpointError, EngineError, ParameterError

_KEY_BYTES = 32


class Ratchet:
    """A chain of 256-bit step secrets `o_1, o_2, …` from a key that is hashed forward.

    The maths: `k_0 = H(purpose, entropy)`, then `o_t = H("out", k_{t-1})` and `k_t = H("next", k_{t-1})`, H = BLAKE2b.
    The state is `k_t` alone, so
    - *exact resume*: `k_t` determines every later `o`, with no generator state to carry, the same on every device;
    - *forward secrecy*: finding `o_1 … o_t` from `k_t` means inverting BLAKE2b. The usual generators (Mersenne twister,
      PCG, Philox) can be stepped backwards: with their state in a checkpoint, whoever reads it subtracts the noise of
      every past step. What `k_t` does give away is the *future*: a checkpoint is as secret as the data until the run it
      belongs to is over, and must be continued once only (two continuations share their noise: it cancels).
    - *separation*: two purposes under one seed (sampling and noise) give unrelated chains.

    Args:
        purpose: 1 to 16 ASCII characters.
        seed: a non-negative integer that makes the chain reproducible, hence **not private**; None draws 256 bits from
            the operating system.

    >>> a, b = Ratchet("noise", seed=7), Ratchet("noise", seed=7)
    >>> first = a.advance()
    >>> b.load_state_dict(a.state_dict())
    >>> a.advance() == b.advance() != first
    True

    Source: Bellare & Yee (2003), "Forward-security in private-key cryptography".
    """

    def __init__(self, purpose: str, seed: int | None = None) -> None:
        self.purpose = purpose
        self.seeded = seed is not None
        entropy = secrets.token_bytes(_KEY_BYTES) if seed is None else str(_natural(seed)).encode()
        self._key = hashlib.blake2b(entropy, digest_size=_KEY_BYTES, person=purpose.encode()).digest()
        self._process = os.getpid()

    def advance(self) -> int:
        """The next step's secret, an integer below 2²⁵⁶; the key that made it is forgotten.

        EngineError in a forked process: it and its siblings would draw the same noise, which cancels in a difference.
        """
        if os.getpid() != self._process and not self.seeded:
            raise EngineError(
                f"the key of the {self.purpose} was made before this process was forked: both processes would draw the"
                " same. Call make_private in the process that trains"
            )
        out = hashlib.blake2b(self._key, digest_size=_KEY_BYTES, person=b"lipdp.out").digest()
        self._key = hashlib.blake2b(self._key, digest_size=_KEY_BYTES, person=b"lipdp.next").digest()
        return int.from_bytes(out, "little")

    def generator(self) -> np.random.Generator:
        """A numpy generator for the next step, seeded from its secret (about 40 µs); SFC64 is numpy's fastest."""
        return np.random.Generator(np.random.SFC64(np.random.SeedSequence(self.advance(), pool_size=8)))

    def state_dict(self) -> dict[str, Any]:
        """The key after the last step: strings and a bool, so JSON and `torch.load(weights_only=True)` take it."""
        return {"purpose": self.purpose, "key": self._key.hex(), "seeded": self.seeded}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken. Raises CheckpointError for a state that is not one of this purpose."""
        try:
            key, seeded, purpose = bytes.fromhex(state["key"]), bool(state["seeded"]), state["purpose"]
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"a {self.purpose} state needs 'purpose', 'key' (hex) and 'seeded': {error!r}"
            ) from error
        if purpose != self.purpose or len(key) != _KEY_BYTES:
            raise CheckpointError(
                f"expected a {self.purpose} state with a key of {_KEY_BYTES} bytes, got {purpose!r} with {len(key)}"
            )
        self._key, self.seeded = key, seeded


def _natural(seed: int) -> int:
    try:
        value = operator.index(seed)
    except TypeError:
        value = -1
    if value < 0:
        raise ParameterError(f"seed is {seed!r}; give an integer of 0 or more, or None for a private run")
    return value
