"""What a run takes from the machine: its device, torch's generators, and the signals that stop it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType

import torch
from torch import Tensor

from lipdp.batches.coins import others_kept
from lipdp.errors import ParameterError


def choose_device(name: str) -> torch.device:
    """A device by name; "auto" is the first GPU, if there is one.

    >>> choose_device("cpu")
    device(type='cpu')
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:  # torch lists twenty kinds, most of them of no machine
        raise ParameterError(f"device={name!r}: cpu, cuda, cuda:1, … or auto is needed") from error
    try:
        probe = torch.zeros(1, device=device)
        probe.item()  # a device that holds no values (meta) refuses
        return probe.device
    except (AssertionError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ParameterError(f"device={name!r} cannot be used here ({reason}); try cpu, or auto") from error


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The state of torch's generators that a run on `device` draws from."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


@contextmanager
def own_random_state(device: torch.device, state: Mapping[str, Tensor] | None = None) -> Iterator[None]:
    """Draw from `state` on; afterwards the global generators are as they were."""
    with others_kept(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        if state is not None:
            torch.set_rng_state(state["cpu"])
            if device.type == "cuda" and "cuda" in state:
                torch.cuda.set_rng_state(state["cuda"], device)
        yield


@contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set; a second signal acts as it did before. Only in the main thread."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def request(number: int, frame: FrameType | None) -> None:
        stop.set()
        restore()

    for number in before:
        signal.signal(number, request)
    try:
        yield stop
    finally:
        restore()
