"""How Gaussian noise is drawn: words from a secret key, normals from words."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from lipdp.errors import EngineError, ParameterError
from lipdp.noise.ratchet import Ratchet

Draw = Callable[[int, torch.dtype], Tensor]
"""(count,) numbers of that dtype."""


class NoiseSource(Protocol):
    """Where the random bits come from; a cryptographic generator is one more class with these members.

    `words(count)` returns `count` fresh independent uniform 64-bit words as an int64 tensor on `device`, which the
    caller may overwrite. `seeded` is true when the words can be reproduced by whoever knows a seed (not private).
    `state_dict`/`load_state_dict` make the following words bit-identical.
    """

    device: torch.device

    @property
    def seeded(self) -> bool: ...

    def words(self, count: int) -> Tensor: ...

    def secret(self) -> int: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class RatchetSource:
    """The default source: each call seeds a fast generator with the next secret of a `Ratchet`.

    On the CPU numpy's SFC64 (3 to 4 ns a word, a third of torch's Mersenne twister); elsewhere torch's own
    generator of that device, seeded with 64 bits of the secret. Neither is cryptographic: see `GaussianNoise`.
    """

    purpose: ClassVar[str] = "noise"

    def __init__(self, seed: int | None = None, *, device: torch.device | str = "cpu") -> None:
        self.device = torch.empty(0, device=device).device  # "cuda" becomes "cuda:0"
        self._ratchet = Ratchet(self.purpose, seed)

    @property
    def seeded(self) -> bool:
        """Whether the words are reproducible by whoever knows a seed."""
        return self._ratchet.seeded

    def words(self, count: int) -> Tensor:
        """(count,) int64: fresh independent uniform 64-bit words."""
        if self.device.type == "cpu":
            raw = self._ratchet.generator().integers(0, 2**64, size=count, dtype=np.uint64)
            return torch.from_numpy(raw.view(np.int64))
        generator = torch.Generator(self.device).manual_seed(self._ratchet.advance() % 2**64)
        return torch.empty(count, dtype=torch.int64, device=self.device).random_(-(2**63), None, generator=generator)

    def secret(self) -> int:
        """One 256-bit secret, for what is derived from it."""
        return self._ratchet.advance()

    def state_dict(self) -> dict[str, Any]:
        """The ratchet's state; the same on every device."""
        return self._ratchet.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue bit-identically after the state was taken."""
        self._ratchet.load_state_dict(state)


class GaussianNoise:
    """Adds `N(0, s_l² I)` to each parameter block, in one draw for all blocks and without a device sync.

    The maths: Box–Muller. With R² = −2 ln u and θ uniform on the circle, `(R cos θ, R sin θ)` are two independent
    normals. For float32 one 64-bit word makes a pair, 40 bits for u and 24 for θ; ln u is computed in float64, so
    neither the tail nor the centre is rounded away. For float64 two words make a pair, 52 and 53 bits.

    More than 4 M weights are drawn in chunks, each from words of its own, so that no vector of all of them is made.

    Guarantees: the std used is never below the one asked for (its conversion to float32 is rounded up); half-precision
    blocks get their sum in float32, rounded once. A pair's radius ends at r = 7.54 (8.57 in float64), where e^(−r²/2)
    is 2⁻⁴¹. A record that moves the pairs by `a_j`, Σ a_j² ≤ 1/σ² in units of the std, pushes a mass of about
    `Σ_j a_j·2⁻⁴¹·r/π ≤ 2⁻⁴¹·(r/π)·sqrt(d/2)/σ` out of the discs: 1e-9 of δ per step that sees the record, for 1.6
    million weights at σ = 1. (torch's float32 `normal_` on the CPU has 24-bit uniforms and ends at 5.77: by the same
    reckoning 1e-4 per step, more than a usual δ for the whole run.)

    Not defended: floating-point numbers are not reals. The sum of gradient and noise lies on a lattice that depends on
    both, so one who sees every bit of a released sum can in principle tell neighbours apart (Mironov 2012); that
    everything is rounded again afterwards makes it hard, not impossible. The default source is not cryptographic: one
    who recovers a step's generator from its output recovers that step's noise (not another's: see `Ratchet`). Both
    attacks need bit-exact access to single steps; where that is in the threat model, take `SecureGaussianNoise`.

    Args:
        seed: reproducible noise, **not private**; None seeds from the operating system (256 bits).
        device: where the tensors live. float64 must be supported there.
        source: random bits from elsewhere, on its own device; excludes `seed`.

    >>> noise, gradient = GaussianNoise(seed=0), torch.zeros(3)
    >>> noise.add_([gradient], torch.tensor([0.5]))
    >>> bool((gradient != 0).all()), noise.seeded
    (True, True)

    Source: Box & Muller (1958); Mironov, "On significance of the least significant bits for differential privacy"
    (2012).
    """

    def __init__(
        self, seed: int | None = None, *, device: torch.device | str = "cpu", source: NoiseSource | None = None
    ) -> None:
        if source is not None and seed is not None:
            raise ParameterError(f"both a source and seed={seed} were given; seed the source itself")
        self.source: NoiseSource = RatchetSource(seed, device=device) if source is None else source

    @property
    def seeded(self) -> bool:
        """True when the noise can be reproduced by whoever knows a seed: not private."""
        return self.source.seeded

    @torch.no_grad()
    def add_(self, tensors: Sequence[Tensor], stds: Tensor, *, draw: Draw | None = None) -> None:
        """Add noise of std `stds[l]` to `tensors[l]` in place, for all l with one draw, or one for each 4 M normals.

        Args:
            tensors: D dense floating-point tensors on the noise's device, of any shape, layout and float dtype.
            stds: (D,) finite, ≥ 0, on any device (on the tensors' own device nothing syncs).
            draw: of (count, dtype), what is scaled and added; by default `normal`. It is called for all entries of
                the tensors in order, each once.

        Raises:
            EngineError: another number of stds, or a tensor that is sparse, not floating-point or elsewhere. Nothing
                has been changed then.
        """
        if stds.shape != (len(tensors),):
            raise EngineError(f"{len(tensors)} tensors need stds of shape ({len(tensors)},), got {tuple(stds.shape)}")
        for index, tensor in enumerate(tensors):
            _require_dense_float(index, tensor, self.source.device)
        if not tensors:
            return
        self._add(tensors, stds.to(self.source.device, torch.float64), self.normal if draw is None else draw)

    def _add(self, tensors: Sequence[Tensor], stds: Tensor, draw: Draw) -> None:
        double = any(tensor.dtype == torch.float64 for tensor in tensors)
        dtype = torch.float64 if double else torch.float32
        # Rounding to float32 loses at most a relative 2**-24; the factor makes sure that it never rounds below.
        scales = (stds * (1.0 if double else 1.0 + 2.0**-23)).to(dtype).unbind()
        for group in groups(tensors):
            sizes = [chunk.numel() for _, chunk in group]
            draws = draw(sum(sizes), dtype).split(sizes)
            for (index, chunk), drawn in zip(group, draws, strict=True):
                chunk.addcmul_(drawn.view(chunk.shape), scales[index])

    def normal(self, count: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """(count,) fresh standard normals, float32 or float64."""
        pairs = (count + 1) // 2
        words = self.source.words(2 * pairs if dtype == torch.float64 else pairs)
        return normals_from_words_(words, dtype=dtype)[:count]

    def lane(self, number: int) -> GaussianNoise:
        """Noise for one shard of the parameters at this step: independent of other numbers', equal for the same.

        Its key is a hash of the next secret of this noise, which moves on by one, whatever is drawn from the lane.
        """
        text = f"{self.source.secret()} lane {number}".encode()
        return type(self)(
            int.from_bytes(hashlib.blake2b(text, digest_size=32).digest(), "little"), device=self.source.device
        )

    def state_dict(self) -> dict[str, Any]:
        """The source's state. Secret while the run goes on, and to be continued once: see `Ratchet`."""
        return self.source.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue bit-identically from a state."""
        self.source.load_state_dict(state)


DRAW = 1 << 22  # normals at a time


def groups(tensors: Sequence[Tensor]) -> Iterator[list[tuple[int, Tensor]]]:
    """All entries of the tensors once, as (index, chunk of the tensor), in groups of at most `DRAW` entries.

    That bounds the memory of a draw. A chunk is complete rows, one at least, so that it is a view in any layout.
    """
    group: list[tuple[int, Tensor]] = []
    room = DRAW
    for index, tensor in enumerate(tensors):
        rows = max(1, DRAW * len(tensor) // tensor.numel()) if tensor.numel() > DRAW else 0
        for chunk in tensor.split(rows) if rows else (tensor,):
            if chunk.numel() > room and group:
                yield group
                group, room = [], DRAW
            group.append((index, chunk))
            room -= chunk.numel()
    yield group


_BITS = {torch.float32: (24, 40), torch.float64: (53, 52)}  # of the angle, of the radius
_CPU_BLOCK, _BLOCK = 1 << 14, 1 << 22  # words at a time: what a core's cache holds; what keeps kernel launches few


def normals_from_words_(words: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normals made of uniform 64-bit words by Box–Muller, in the words' own memory.

    The top bits of a word give the angle `θ = π (2a + 1)/2^b`, a signed of b bits; the low bits `u = (k + ½)/2^c`, the
    radius `R = sqrt(−2 ln u)`. Both are midpoints, so neither 0 nor 1 is reached: R ≤ sqrt(2 (c + 1) ln 2).

    On the CPU numpy does it in one thread, block by block in the cache. On two cores by torch it is hardly faster on a
    quiet machine and several times slower on a busy one, each small operation waiting for both.

    Args:
        words: (n,) int64, overwritten; an even n for float64.
        dtype: float32 (b, c = 24, 40 of one word: 2n normals) or float64 (b, c = 53, 52 of two words: n normals).

    >>> normals_from_words_(torch.zeros(1, dtype=torch.int64)).norm()  # the largest radius
    tensor(7.5391)
    """
    if words.is_cpu:
        _box_muller_numpy(words.numpy(), dtype)
    else:
        for block in words.split(_BLOCK):
            _box_muller_torch(block, dtype)
    return words.view(dtype)


def _box_muller_numpy(words: np.ndarray, dtype: torch.dtype) -> None:
    real, step = (np.float64, 2) if dtype == torch.float64 else (np.float32, 1)
    angle_bits, radius_bits = _BITS[dtype]
    scratch = np.empty(_CPU_BLOCK, np.int64), np.empty(_CPU_BLOCK), np.empty((2, _CPU_BLOCK), real)
    for start in range(0, len(words), _CPU_BLOCK):
        block = words[start : start + _CPU_BLOCK]
        half = len(block) // step
        bits, uniform, (angle, radius) = scratch[0][:half], scratch[1][:half], scratch[2][:, :half]
        angle[...] = np.right_shift(block[:half], 64 - angle_bits, out=bits)
        angle += real(0.5)
        angle *= real(2 * math.pi / 2**angle_bits)
        np.add(np.bitwise_and(block[-half:], 2**radius_bits - 1, out=bits), 0.5, out=uniform)
        uniform *= 2.0**-radius_bits
        radius[...] = np.log(uniform, out=uniform)
        radius *= real(-2.0)
        np.sqrt(radius, out=radius)
        out = block.view(real)
        np.multiply(np.cos(angle, out=out[:half]), radius, out=out[:half])
        np.multiply(np.sin(angle, out=out[half:]), radius, out=out[half:])


def _box_muller_torch(words: Tensor, dtype: torch.dtype) -> None:
    """The same, for any device that has float64."""
    angle_bits, radius_bits = _BITS[dtype]
    half = words.numel() // 2 if dtype == torch.float64 else words.numel()
    angle = (words[:half] >> (64 - angle_bits)).to(dtype).add_(0.5).mul_(2 * math.pi / 2**angle_bits)
    uniform = (words[-half:] & (2**radius_bits - 1)).to(torch.float64).add_(0.5).mul_(2.0**-radius_bits)
    radius = uniform.log_().to(dtype).mul_(-2.0).sqrt_()
    out = words.view(dtype)
    torch.cos(angle, out=out[:half]).mul_(radius)
    torch.sin(angle, out=out[half:]).mul_(radius)


def _require_dense_float(index: int, tensor: Tensor, device: torch.device) -> None:
    if tensor.layout != torch.strided or not tensor.is_floating_point():
        raise EngineError(
            f"tensor {index} is {tensor.layout} of {tensor.dtype}; noise needs a dense floating-point tensor"
        )
    if tensor.device != device:
        raise EngineError(
            f"tensor {index} is on {tensor.device}, the noise on {device}; draw it where the gradients are"
        )
