"""Files that are written whole or not at all: bytes, JSON, pictures."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, cast

from lipdp.errors import CheckpointError


@contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """Write `path` whole or not at all: a temporary file beside it, flushed, synced, then renamed over it.

    The folder is synced too, so that of two files written one after the other the second is never there without the
    first.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    stream = tempfile.NamedTemporaryFile(dir=path.parent, prefix=f"{path.name}.", suffix=".tmp", delete=False)  # noqa: SIM115
    try:
        with stream:
            yield cast(BinaryIO, stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(stream.name, path)  # closed: Windows renames no open file
    except BaseException:
        Path(stream.name).unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    with suppress(OSError):  # Windows opens no folder, and some file systems sync none
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_bytes(path: Path, content: bytes) -> None:
    """Write it whole; CheckpointError, which names the file, where that is impossible."""
    try:
        with written_whole(path) as stream:
            stream.write(content)
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be written ({error.strerror or error}): give another folder, or free some space"
        ) from error


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON for people to read; see `write_bytes`."""
    write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def read_json(path: Path, kind: type = dict) -> Any:
    """What `write_json` wrote, an object by default; CheckpointError otherwise."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read ({error})") from error
    if not isinstance(value, kind):
        raise CheckpointError(f"{path} does not hold a JSON {'object' if kind is dict else kind.__name__}")
    return value


def write_figure(figure: Any, path: Path, *, dpi: int = 150) -> None:
    """Write a matplotlib figure as PNG, SVG, …, by the file's name."""
    with written_whole(path) as stream:
        figure.savefig(stream, format=path.suffix.removeprefix("."), dpi=dpi, bbox_inches="tight")


def write_pictures(figure: Any, path: Path) -> None:
    """`path.png` and `path.svg`."""
    for kind in ("png", "svg"):
        write_figure(figure, path.with_name(f"{path.name}.{kind}"))
