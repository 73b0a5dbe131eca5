"""Asks the server for killed commands, and looks at what they leave behind."""

from __future__ import annotations

import json
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import torch

import lipdp
from faults.server import answer


class Commands:
    """`lipdp` commands as processes of their own, at the price of a fork."""

    def __init__(self, forks: BaseContext) -> None:
        self._line, there = forks.Pipe()
        self._process = forks.Process(target=answer, args=(there,))
        self._process.start()
        there.close()

    def __call__(self, *arguments: object, **request: Any) -> dict[str, Any]:
        self._line.send({"arguments": [str(a) for a in arguments], **request})
        return self._line.recv()

    def close(self) -> None:
        self._line.send(None)
        self._process.join(30)


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
