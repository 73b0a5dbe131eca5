"""A private run in one file: weights, optimiser and account."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import torch

from lipdp.errors import CheckpointError
from lipdp.files import write_bytes


def write_state(path: str | os.PathLike[str], state: dict[str, Any]) -> None:
    """Write it whole, for `read_state`.

    Raises:
        CheckpointError: the file cannot be written.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_bytes(Path(path), buffer.getvalue())


def read_state(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What `write_state` wrote: tensors and plain values, nothing that runs.

    Raises:
        CheckpointError: no such file, or another one.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever the broken file makes it raise
        raise CheckpointError(f"{path} cannot be read as a checkpoint ({type(error).__name__})") from error
    if not isinstance(state, dict) or {"model", "optimizer", "engine"} - set(state):
        raise CheckpointError(f"{path} is no checkpoint of a private run: engine.save_checkpoint writes them")
    return state
