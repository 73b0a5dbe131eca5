"""A run's folder: what a run writes, every file whole or not at all, the previous checkpoint kept."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lipdp.data.files import written_whole
from lipdp.errors import CheckpointError, ParameterError

_CHECKPOINT, _PREVIOUS = "checkpoint.pt", "checkpoint.previous.pt"
_KEYS = {"model", "step", "config"}


class RunFolder:
    """`config.json`, `privacy.json`, `metrics.jsonl`, `checkpoint.pt` and `checkpoint.previous.pt` in one folder.

    Files are readable by their owner alone: the metrics hold a training loss that ε does not cover, and while a run is
    unfinished its checkpoints hold the keys of the noise to come (under `resume`). Whoever reads one can subtract that
    noise from later releases. `seal` takes the keys out.

    Args:
        path: the folder; made when first written to.

    Source: Bellare & Yee (2003) for what the keys of a past step do not give away.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).expanduser()

    def __str__(self) -> str:
        return str(self.path)

    def require_free(self) -> None:
        """ParameterError where a run lies already."""
        taken = [n for n in ("config.json", _CHECKPOINT, _PREVIOUS, "privacy.json") if (self.path / n).exists()]
        if taken:
            raise ParameterError(
                f"{self} holds a run already ({', '.join(taken)}): go on with it by --resume {self}, or give another --out"
            )

    def start(self, config: Mapping[str, Any]) -> None:
        """Make the folder and write `config.json`; refused where a run lies already."""
        self.require_free()
        self._write_json("config.json", config)

    def config(self) -> dict[str, Any]:
        """What `start` wrote; CheckpointError if it cannot be read."""
        path = self.path / "config.json"
        try:
            config = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read ({error}): is {self} the folder of a run?") from error
        if not isinstance(config, dict):
            raise CheckpointError(f"{path} is not the configuration of a run")
        return config

    def write_privacy(self, facts: Mapping[str, Any]) -> None:
        """Write `privacy.json`."""
        self._write_json("privacy.json", facts)

    def write_metrics(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Write `metrics.jsonl`, one JSON object a line."""
        self._write("metrics.jsonl", "".join(json.dumps(record) + "\n" for record in records).encode())

    def save(self, checkpoint: Mapping[str, Any]) -> None:
        """Write a new `checkpoint.pt`; the one there becomes `checkpoint.previous.pt`."""
        current, previous = self.path / _CHECKPOINT, self.path / _PREVIOUS
        if current.exists():
            link = previous.with_suffix(".link")
            link.unlink(missing_ok=True)
            try:
                os.link(current, link)  # so that at no time checkpoint.pt is missing
                os.replace(link, previous)
            except OSError:  # a file system without hard links
                os.replace(current, previous)
        self._save(current, checkpoint)

    def load(self) -> dict[str, Any]:
        """The newest checkpoint that can be read.

        Raises:
            CheckpointError: neither can; the message says why.
        """
        failures = []
        for path in (self.path / _CHECKPOINT, self.path / _PREVIOUS):
            try:
                return _read(path)
            except CheckpointError as error:
                failures.append(str(error))
        raise CheckpointError(f"no checkpoint to go on from: {'; '.join(failures)}")

    def seal(self) -> None:
        """Take out of the checkpoints what only a resume needs: the run is over, and its keys tell the noise."""
        for path in (self.path / _CHECKPOINT, self.path / _PREVIOUS):
            if not path.exists():
                continue
            try:
                checkpoint = _read(path)
            except CheckpointError:  # unreadable: it goes, since a part of it may hold keys
                path.unlink()
                continue
            if checkpoint.pop("resume", None) is not None:
                self._save(path, checkpoint)

    def _save(self, path: Path, checkpoint: Mapping[str, Any]) -> None:
        try:
            with written_whole(path) as stream:
                torch.save(dict(checkpoint), stream)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            raise CheckpointError(
                f"{path} cannot be written ({error}); the previous checkpoint is untouched"
            ) from error

    def _write_json(self, name: str, value: Mapping[str, Any]) -> None:
        self._write(name, (json.dumps(value, indent=2) + "\n").encode())

    def _write(self, name: str, content: bytes) -> None:
        path = self.path / name
        try:
            with written_whole(path) as stream:
                stream.write(content)
        except OSError as error:
            raise CheckpointError(
                f"{path} cannot be written ({error.strerror or error}): give another --out, or free some space"
            ) from error


def _read(path: Path) -> dict[str, Any]:
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist") from error
    except Exception as error:  # a damaged file makes torch and pickle raise almost anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path} is damaged ({reason[:120]})") from error
    if not isinstance(checkpoint, dict) or not set(checkpoint) >= _KEYS:
        raise CheckpointError(f"{path} is not a checkpoint of lipdp")
    return checkpoint
