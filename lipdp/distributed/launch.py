"""The processes that `torchrun` started, as one world."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from lipdp.distributed.collectives import Alone, DefaultGroup, World
from lipdp.errors import ParameterError

TIMEOUT = 30.0
"""Minutes after which a silent process counts as lost."""


@contextmanager
def launched(*, timeout: float = TIMEOUT) -> Iterator[World]:
    """Join the processes that `torchrun` started, one GPU each if there are GPUs.

    Args:
        timeout: minutes to wait for a process before it counts as lost. One that ends is noticed at once.

    Raises:
        ParameterError: the environment is not torchrun's, or the processes do not meet.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield Alone()
        return
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=timedelta(minutes=timeout)))
        # torchrun keeps its store through restarts: without a prefix, gloo finds the addresses of processes that are
        # gone
        attempt = dist.PrefixStore(f"lipdp/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        dist.init_process_group(backend, store=attempt, rank=rank, world_size=size, timeout=timedelta(minutes=timeout))
    except (ValueError, RuntimeError) as error:
        raise ParameterError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but the processes did not meet ({str(error).splitlines()[0]});"
            " start them with torchrun --nproc-per-node=W -m lipdp train ..."
        ) from error
    try:
        yield DefaultGroup(timeout=timedelta(minutes=timeout))
    finally:
        dist.destroy_process_group()


def resumed_folder(out: Path | None) -> Path | None:
    """`out`, where `torchrun --max-restarts` starts the command again and its run is there: then it is gone on with."""
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0 and out is None:
        raise ParameterError("torchrun --max-restarts goes on with a run in its folder: give --out DIR")
    again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    return out if again and out is not None and (out / "config.json").exists() else None
