"""The processes that train one model together, and the few things they say to each other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lipdp.errors import EngineError, PeerError

T = TypeVar("T")
_BUCKET = 1 << 23  # numbers that one reduction sends: 32 MiB of float32


class World(Protocol):
    """The processes of a run. Every method but `check` is collective: all processes call it, in the same order."""

    rank: int
    size: int

    def check(self) -> None:
        """Whether these are still all the processes there are."""
        ...

    def all_reduce_(self, tensors: Sequence[Tensor]) -> None:
        """Replace every tensor by its sum over the processes, the same bits on each."""
        ...

    def broadcast_(self, tensors: Sequence[Tensor]) -> None:
        """Replace every tensor by the first process's."""
        ...

    def all_reduce_max(self, values: Tensor) -> Tensor:
        """Element by element, over the processes."""
        ...

    def any(self, flag: bool) -> bool:
        """Whether a process says so. Never waits for an accelerator."""
        ...

    def all_equal(self, number: int) -> bool:
        """Whether all have the same number, below 2⁶³ in size. Never waits for an accelerator."""
        ...

    def broadcast(self, value: T) -> T:
        """What the first process has."""
        ...

    def gather(self, value: T) -> list[T]:
        """What each has, in the order of ranks."""
        ...

    def fail_together(self) -> AbstractContextManager[None]:
        """A block with nothing collective in it, in which what one process refuses is refused by all."""
        ...


class Alone:
    """One process.

    Args:
        chosen: also where torch.distributed has more: each then trains a model of its own, on its own account.

    >>> Alone().any(True), Alone().broadcast("x"), Alone().gather(3)
    (True, 'x', [3])
    """

    rank, size = 0, 1

    def __init__(self, *, chosen: bool = False) -> None:
        self._chosen = chosen

    def check(self) -> None:
        """See `World.check`.

        Raises:
            EngineError: torch.distributed was started since.
        """
        if not self._chosen and world_size() > 1:
            raise EngineError(
                f"torch.distributed has {world_size()} processes now and had one at make_private: each would draw"
                " batches and noise of its own, and the account would be wrong. Call make_private after"
                " init_process_group, or after the framework's launch; for separate runs side by side,"
                " PrivacyEngine(world=lipdp.distributed.Alone(chosen=True))"
            )

    def all_reduce_(self, tensors: Sequence[Tensor]) -> None:
        """See `World.all_reduce_`."""

    def broadcast_(self, tensors: Sequence[Tensor]) -> None:
        """See `World.broadcast_`."""

    def all_reduce_max(self, values: Tensor) -> Tensor:
        """See `World.all_reduce_max`."""
        return values

    def any(self, flag: bool) -> bool:
        """See `World.any`."""
        return flag

    def all_equal(self, number: int) -> bool:
        """See `World.all_equal`."""
        return True

    def broadcast(self, value: T) -> T:
        """See `World.broadcast`."""
        return value

    def gather(self, value: T) -> list[T]:
        """See `World.gather`."""
        return [value]

    def fail_together(self) -> AbstractContextManager[None]:
        """See `World.fail_together`."""
        return nullcontext()


class DefaultGroup:
    """The processes of torch's default group.

    Tensors go through that group (NCCL for those on a GPU); flags and plain values through a gloo group of its own, so
    that an accelerator is never waited for.

    Args:
        timeout: after which a silent peer counts as lost; gloo's by default, 30 minutes.

    Raises:
        EngineError: at any call, where a peer is gone or silent for longer than the group's timeout.
    """

    def __init__(self, *, timeout: timedelta | None = None) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        with self._reachable():
            self._control = dist.new_group(backend="gloo", timeout=timeout)

    def check(self) -> None:
        """See `World.check`.

        Raises:
            EngineError: the group is gone, or another.
        """
        if world_size() != self.size:
            raise EngineError(f"make_private found {self.size} processes, and now there are {world_size()}")

    def all_reduce_(self, tensors: Sequence[Tensor]) -> None:
        """See `World.all_reduce_`; a bucket of tensors at a time."""
        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            with self._reachable():
                dist.all_reduce(flat)
            parts = flat.split([tensor.numel() for tensor in bucket])
            torch._foreach_copy_(list(bucket), [p.view(t.shape) for p, t in zip(parts, bucket, strict=True)])

    @torch.no_grad()
    def broadcast_(self, tensors: Sequence[Tensor]) -> None:
        """See `World.broadcast_`."""
        for tensor in tensors:
            with self._reachable():
                dist.broadcast(tensor, src=0)

    def all_reduce_max(self, values: Tensor) -> Tensor:
        """See `World.all_reduce_max`."""
        result = values.clone()
        with self._reachable():
            dist.all_reduce(result, dist.ReduceOp.MAX)
        return result

    def any(self, flag: bool) -> bool:
        """See `World.any`."""
        found = torch.tensor([flag], dtype=torch.int32)
        with self._reachable():
            dist.all_reduce(found, dist.ReduceOp.MAX, group=self._control)
        return bool(found)

    def all_equal(self, number: int) -> bool:
        """See `World.all_equal`."""
        most = torch.tensor([number, -number])
        with self._reachable():
            dist.all_reduce(most, dist.ReduceOp.MAX, group=self._control)
        return int(most[0]) == -int(most[1])

    def broadcast(self, value: T) -> T:
        """See `World.broadcast`."""
        box = [value]
        with self._reachable():
            dist.broadcast_object_list(box, src=0, group=self._control)
        return box[0]

    def gather(self, value: T) -> list[T]:
        """See `World.gather`."""
        boxes: list[Any] = [None] * self.size
        with self._reachable():
            dist.all_gather_object(boxes, value, group=self._control)
        return boxes

    @contextmanager
    def fail_together(self) -> Iterator[None]:
        """See `World.fail_together`. The first process that refuses raises its error, the others `PeerError`."""
        refusal: Exception | None = None
        try:
            yield
        except Exception as error:
            refusal = error
        if not self.any(refusal is not None):
            return
        said = self.gather(None if refusal is None else str(refusal))
        first = next(rank for rank, text in enumerate(said) if text is not None)
        if refusal is not None and first == self.rank:
            raise refusal
        raise PeerError(f"process {first} of {self.size} refused: {said[first]}") from refusal

    @contextmanager
    def _reachable(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise EngineError(
                f"process {self.rank} of {self.size} cannot reach the other processes ({str(error).splitlines()[0]}):"
                " one of them ended or hangs. Nothing of this step was released. Start all processes again from the"
                " last checkpoint"
            ) from error


def current_world() -> World:
    """The processes of torch.distributed's default group, or `Alone` if there is none.

    >>> current_world().size
    1
    """
    return DefaultGroup() if world_size() > 1 else Alone()


def world_size() -> int:
    """The number of processes in torch.distributed's default group; 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one dtype and device that are sent as one; a large one alone."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        kind = (tensor.dtype, tensor.device)
        full = sum(t.numel() for t in bucket) + tensor.numel() > _BUCKET
        if bucket and (full or kind != (bucket[0].dtype, bucket[0].device)):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket
