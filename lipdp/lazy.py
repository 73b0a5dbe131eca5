"""Façades: a room names its public names and where they are defined; each is imported on its first use."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def facade(room: str, names: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """`__getattr__`, `__dir__` and `__all__` of the package `room`, for names → the modules that define them.

    A name that maps to itself with a leading dot is a module of the room. Heavy imports and extras wait until someone
    asks for them.

    >>> get, _, names = facade("lipdp", {"epsilon": "lipdp.accounting.accountants", "errors": ".errors"})
    >>> names, get("errors").__name__
    (['epsilon', 'errors'], 'lipdp.errors')
    """

    def get(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module '{room}' has no attribute {name!r}")
        module = importlib.import_module(names[name], room)
        return module if names[name] == f".{name}" else getattr(module, name)

    return get, lambda: sorted(names), sorted(names)
