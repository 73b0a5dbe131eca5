"""A value on its way from the device to the host."""

from __future__ import annotations

import torch
from torch import Tensor


class DeferredRead:
    """A small tensor that the host will read later: on CUDA a copy to pinned memory is queued and nothing waits.

    `read` waits for that copy alone, not for what was queued behind it. The value is not to be changed in place before.
    """

    def __init__(self, value: Tensor) -> None:
        self._value = value.detach()
        self._arrival: torch.cuda.Event | None = None
        if value.is_cuda:
            self._value = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
            self._value.copy_(value.detach(), non_blocking=True)
            self._arrival = torch.cuda.Event()
            self._arrival.record(torch.cuda.current_stream(value.device))

    def read(self) -> Tensor:
        """The value, on the CPU."""
        if self._arrival is not None:
            self._arrival.synchronize()
        return self._value.cpu()
