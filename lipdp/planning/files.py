"""Writing and reading the small files of a plan."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lipdp.data.files import written_whole
from lipdp.errors import CheckpointError


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write it whole or not at all; CheckpointError where that is impossible."""
    try:
        with written_whole(path) as stream:
            stream.write((json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written ({error.strerror or error}): give another folder") from error


def read_json(path: Path) -> dict[str, Any]:
    """What `write_json` wrote; CheckpointError otherwise."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} does not hold a JSON object")
    return value
