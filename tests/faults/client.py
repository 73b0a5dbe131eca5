"""Asks the server for killed commands, and looks at what they leave behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import lipdp

SERVER = Path(__file__).with_name("server.py")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "80", "NO_COLOR": "1"}


class Commands:
    """`lipdp` commands as processes of their own, at the price of a fork."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(SERVER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT
        )

    def __call__(self, *arguments: object, **request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"arguments": [str(a) for a in arguments], **request}) + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)
        self._process.stdout.close()


def records(folder: Path) -> list[dict[str, Any]]:
    """The metrics, without the clock."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def saved(folder: Path) -> dict[str, Any] | None:
    """The newest checkpoint."""
    path = folder / "checkpoint.pt"
    return torch.load(path, weights_only=True) if path.exists() else None


def released_and_counted(folder: Path) -> tuple[int, int]:
    """The last step that a reader of the folder sees anything of, and the steps that `privacy.json` counts.

    Checks on the way that every file that is there is whole.
    """
    checkpoint, shown = saved(folder), records(folder)
    privacy = json.loads((folder / "privacy.json").read_text()) if (folder / "privacy.json").exists() else None
    if (folder / "config.json").exists():
        assert isinstance(json.loads((folder / "config.json").read_text()), dict)
    if privacy is None:
        assert checkpoint is None
        assert not shown
        return 0, 0
    released = max(checkpoint["step"] if checkpoint else 0, shown[-1]["step"] if shown else 0)
    if shown:
        assert checkpoint is not None
        assert shown[-1]["step"] <= checkpoint["step"], "metrics of a step that no checkpoint holds"
    if privacy["steps"]:
        facts = {"noise_multiplier": privacy["noise_multiplier"], "sampling_rate": privacy["sampling_rate"]}
        spent = lipdp.epsilon(**facts, steps=released, delta=privacy["delta"], accountant=privacy["accountant"])
        assert privacy["epsilon"] >= spent * (1 - 1e-9)
    return released, privacy["steps"]


def assert_same(one: Path, other: Path) -> None:
    """Two finished runs, bit for bit, with nothing left over and no key in either."""
    first, second = saved(one), saved(other)
    assert first is not None
    assert second is not None
    assert first["step"] == second["step"]
    for weights in ("model", "ema"):
        assert all(torch.equal(first[weights][name], second[weights][name]) for name in first[weights])
    assert records(one) == records(other)
    for name in ("privacy.json", "evaluation.json"):
        assert (one / name).read_text() == (other / name).read_text()
    names = {
        "config.json",
        "environment.json",
        "privacy.json",
        "metrics.jsonl",
        "checkpoint.pt",
        "checkpoint.previous.pt",
        "evaluation.json",
    }
    for folder in (one, other):
        assert {path.name for path in folder.iterdir()} == names
        assert not any(b"ratchet" in path.read_bytes() for path in folder.glob("*.pt"))
