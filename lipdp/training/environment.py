"""Where and by which command a run was started: what a reader needs to repeat it. ε does not depend on it."""

from __future__ import annotations

import platform
import shlex
import sys
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_PACKAGES = ("lipdp", "torch", "numpy", "prv-accountant", "dp-accounting")


def environment() -> dict[str, str]:
    """The command line of this process, the time, and the versions of what it computes with.

    >>> sorted(environment())[:3]
    ['command', 'dp-accounting', 'lipdp']
    """
    return {
        "command": command_line(sys.argv),
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{name: _version(name) for name in _PACKAGES},
    }


def command_line(arguments: list[str]) -> str:
    """The process's arguments as one would type them.

    >>> command_line(["/usr/bin/lipdp", "train", "--out", "my run"]), command_line(["/x/lipdp/__main__.py", "train"])
    ("lipdp train --out 'my run'", 'python -m lipdp train')
    >>> command_line(["train_mnist.py"])
    'python train_mnist.py'
    """
    program, *rest = arguments or [""]
    path = Path(program)
    if path.name == "__main__.py":
        start = ["python", "-m", path.parent.name]
    elif path.suffix == ".py":
        start = ["python", program]
    else:
        start = [path.name]
    return shlex.join([*start, *rest])


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
