"""A digest beside plain values, which shows that they were edited since."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from lipdp.errors import ResumeError


def digest(values: Mapping[str, Any]) -> str:
    """SHA-256 of plain values as canonical JSON: sorted keys, no spaces; an entry `digest` is left out.

    It shows edits, not forgeries: whoever edits can compute it again.

    >>> digest({"b": 1.5, "a": None}) == digest({"a": None, "b": 1.5}) != digest({"a": None, "b": 1.25})
    True
    """
    plain = {name: value for name, value in values.items() if name != "digest"}
    return hashlib.sha256(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def with_digest(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values and, as `digest`, their digest.

    >>> with_digest({"a": 1})["digest"][:8]
    '015abd7f'
    """
    return {**values, "digest": digest(values)}


def check_digest(values: Mapping[str, Any], what: str) -> None:
    """Refuse values that are not what `with_digest` was given."""
    if values.get("digest") != digest(values):
        raise ResumeError(
            f"{what} was changed after it was written: its digest differs. ε or the noise would be wrong. Continue from"
            " untouched files, or start a new run"
        )
