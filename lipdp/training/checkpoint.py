"""A run's folder: what a run writes, every file whole or not at all, the previous checkpoint kept."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lipdp.accounting.digest import check_digest
from lipdp.accounting.events import Ledger
from lipdp.errors import CheckpointError, LipdpError, ParameterError, ResumeError
from lipdp.files import write_bytes, write_json, written_whole
from lipdp.privacy.step_count import STEPS_TAKEN

_log = logging.getLogger(__name__)
_CHECKPOINT, _PREVIOUS = "checkpoint.pt", "checkpoint.previous.pt"
_NAMES = ("config.json", "environment.json", "privacy.json", "metrics.jsonl", "evaluation.json", _CHECKPOINT, _PREVIOUS)
_KEYS = {"model": dict, "step": int, "config": dict}
_STATED_AS = {"steps": "planned_steps", "accountant": "accountant_requested"}  # in privacy.json, of the plan


class RunFolder:
    """The folder of a run: `config.json`, `environment.json`, `privacy.json`, `metrics.jsonl`, two checkpoints,
    and at the end `evaluation.json`.

    Files are readable by their owner alone: the metrics hold a training loss that ε does not cover, and while a run is
    unfinished its checkpoints hold the keys of the noise to come (under `resume`). Whoever reads one can subtract that
    noise from later releases. `drop_keys` takes the keys out, also those in what a killed process left half written.

    Guarantee: kill the process at any moment, and every file is the old one or the new one. A checkpoint is read only
    if the checksums in it agree (torch does not look at them: it loads a flipped bit as a weight), else the previous
    one is.

    Source: Bellare & Yee (2003) for what the keys of a past step do not give away.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).expanduser()
        self._fell_back = False

    def __str__(self) -> str:
        return str(self.path)

    def require_free(self) -> None:
        """ParameterError where a run lies already."""
        taken = [n for n in ("config.json", _CHECKPOINT, _PREVIOUS, "privacy.json") if (self.path / n).exists()]
        if taken:
            raise ParameterError(
                f"{self} holds a run already ({', '.join(taken)}): go on with it by --resume {self}, or give another"
                " --out"
            )

    def start(self, config: Mapping[str, Any]) -> None:
        """Make the folder and write `config.json`; refused where a run lies already."""
        self.require_free()
        write_json(self.path / "config.json", config)

    def config(self) -> dict[str, Any]:
        """What `start` wrote; CheckpointError if it cannot be read."""
        path = self.path / "config.json"
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            reason = getattr(error, "strerror", None) or error  # without the path, which is said already
            raise CheckpointError(f"{path} cannot be read ({reason}): is {self} the folder of a run?") from error
        if not isinstance(config, dict):
            raise CheckpointError(f"{path} is not the configuration of a run")
        return config

    def add_session(self, session: Mapping[str, str]) -> None:
        """Add to `environment.json` where and by which command the run was started or resumed; no ε depends on it."""
        before = _parsed(self._text("environment.json"), list)
        write_json(self.path / "environment.json", [*before, session])

    def write_privacy(self, report: Mapping[str, Any]) -> None:
        """Write `privacy.json`."""
        write_json(self.path / "privacy.json", report)

    def write_evaluation(self, evaluation: Mapping[str, Any]) -> None:
        """Write `evaluation.json`: confusion matrix and ROC curve of the test records after the last step."""
        write_json(self.path / "evaluation.json", evaluation)

    def write_metrics(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Write `metrics.jsonl`, one JSON object a line."""
        write_bytes(self.path / "metrics.jsonl", "".join(json.dumps(record) + "\n" for record in records).encode())

    def save(self, checkpoint: Mapping[str, Any]) -> None:
        """Write a new `checkpoint.pt`; that there becomes `checkpoint.previous.pt`, unless `load` found it damaged."""
        self._save(self.path / _CHECKPOINT, checkpoint, keep=not self._fell_back)
        self._fell_back = False

    def load(self) -> dict[str, Any]:
        """The newest checkpoint that can be read; a damaged one is noted in the log."""
        failures = []
        for path in (self.path / _CHECKPOINT, self.path / _PREVIOUS):
            try:
                checkpoint = _read(path)
            except CheckpointError as error:
                failures.append(str(error))
                continue
            self._fell_back = bool(failures)
            if failures:
                _log.warning("%s: going on from %s, of step %s", failures[0], path.name, checkpoint["step"])
            return checkpoint
        raise CheckpointError(f"no checkpoint to go on from: {'; '.join(failures)}")

    def is_unstarted(self) -> bool:
        """Whether the process ended after `config.json` and before the first checkpoint: nothing was released."""
        later = (_CHECKPOINT, _PREVIOUS, "metrics.jsonl")
        return (self.path / "config.json").exists() and not any((self.path / name).exists() for name in later)

    def released_steps(self, checkpoint: Mapping[str, Any], *, every: int) -> int:
        """The last step that somebody may have seen something of, where `checkpoint` is what `load` returned.

        Metrics are written after the checkpoint of their step, so this is the checkpoint's own step unless the newest
        one was damaged, or an older one put in its place: then it is no newer than the previous one, or that is gone,
        or `privacy.json`, which is written first, is more than one save ahead. The steps that the latter counts and the
        checkpoint does not are lost then; it alone going further by one save is a save that was cut short.

        Args:
            every: steps from one save to the next, at most.
        """
        step, stated = int(checkpoint["step"]), self._text("privacy.json")
        ahead = _number("steps", stated) - _counted(checkpoint)
        previous = self._previous_step()
        gone = previous < 0 < step
        shown = _number("step", *self._text("metrics.jsonl").splitlines()[-1:])
        replaced = self._fell_back or gone or previous >= step or shown > step or ahead > every
        return max(step, shown, step + ahead if replaced else 0)

    def _previous_step(self) -> int:
        try:
            return int(_read(self.path / _PREVIOUS)["step"])
        except CheckpointError:
            return -1

    def check_privacy(self, plan: Mapping[str, Any]) -> None:
        """Refuse `privacy.json` where it was edited, or states another plan than this; a lost one is written again."""
        report = _parsed(self._text("privacy.json"))
        if "digest" not in report:
            return
        check_digest(report, str(self.path / "privacy.json"))
        stated = {name: report.get(_STATED_AS.get(name, name)) for name in plan}
        if stated != dict(plan):
            raise ResumeError(f"privacy.json in {self} has another privacy plan than the checkpoint; restore both")

    def drop_keys(self) -> None:
        """Take out of the checkpoints what only a resume needs: the run is over, and its keys tell the noise."""
        self.sweep()
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

    def sweep(self) -> None:
        """Remove what a killed process left half written; it may hold keys."""
        for name in _NAMES:
            for stale in self.path.glob(f"{name}.*.tmp"):
                stale.unlink(missing_ok=True)

    # -- writing -------------------------------------------------------------------------------------------------------

    def _save(self, path: Path, checkpoint: Mapping[str, Any], *, keep: bool = False) -> None:
        try:
            with written_whole(path) as stream:
                torch.save(dict(checkpoint), stream)
                if keep and path.exists():  # the new one is written, and takes its place at the end of the block
                    _link(path, self.path / _PREVIOUS)
        except (
            OSError,
            RuntimeError,
        ) as error:  # torch reports a full disk as a RuntimeError, and the reason behind it
            reason = error.__context__ if isinstance(error.__context__, OSError) else error
            raise CheckpointError(
                f"{path} cannot be written ({reason}); the previous checkpoint is untouched"
            ) from error

    def _text(self, name: str) -> str:
        try:
            return (self.path / name).read_text()
        except (OSError, ValueError):
            return ""


def _parsed(text: str, kind: type = dict) -> Any:
    """A JSON value of a kind, an empty one where it cannot be read."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return kind()
    return value if isinstance(value, kind) else kind()


def _number(key: str, text: str = "") -> int:
    value = _parsed(text).get(key)
    return value if isinstance(value, int) else 0


def _counted(checkpoint: Mapping[str, Any]) -> int:
    """Steps in the checkpoint's account, those counted again among them."""
    try:
        engine = checkpoint["resume"]["engine"]
        return Ledger.from_state(engine["ledger"]).steps - len(engine["measured"])
    except (LipdpError, LookupError, TypeError, ValueError):  # `restore` says what is wrong with it
        return int(checkpoint["step"])


def _link(path: Path, to: Path) -> None:
    """Make `to` the file that `path` is; at no time is either missing."""
    temporary = to.with_name(f"{to.name}.link.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)
    except OSError:  # a file system without hard links
        shutil.copyfile(path, temporary)
    os.replace(temporary, to)


def _read(path: Path) -> dict[str, Any]:
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise CheckpointError(f"{path} is damaged (the checksum of {damaged} does not agree)")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist") from error
    except Exception as error:  # a damaged file makes torch and pickle raise almost anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path} is damaged ({reason[:120]})") from error
    if not isinstance(checkpoint, dict) or not all(isinstance(checkpoint.get(k), kind) for k, kind in _KEYS.items()):
        raise CheckpointError(f"{path} is not a checkpoint of lipdp")
    try:
        json.dumps([checkpoint["config"], checkpoint.get("plan")])
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is not a checkpoint of lipdp ({error})") from error
    return checkpoint


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """`optimizer.load_state_dict`, which looks at next to nothing, after a look at what it is given."""
    own, saved = optimizer.state_dict()["param_groups"], state["param_groups"]
    if [_settings(group) for group in own] != [_settings(group) for group in saved]:
        raise ResumeError("the checkpoint's optimizer has other settings than this run's")
    shapes = [p.shape for group in optimizer.param_groups for p in group["params"]]
    for index, values in state["state"].items():
        for name, value in values.items():
            fits = isinstance(value, torch.Tensor) and value.shape == (() if name == "step" else shapes[index])
            if value is not None and not (fits and bool(torch.isfinite(value).all())):
                raise ResumeError(f"the checkpoint's optimizer has a {name} that does not fit the weights")
    optimizer.load_state_dict(dict(state))


_MOVING = {"lr": 0.0, STEPS_TAKEN: 0}  # with a schedule; with every step


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    moving = {name: type(plain_number(group.get(name, default))) for name, default in _MOVING.items()}
    return {**group, **moving}


def plain_number(value: Any) -> Any:
    """An int or a finite float as it is; TypeError for anything else."""
    if type(value) not in (int, float) or not math.isfinite(value):
        raise TypeError(f"{value!r} is no number")
    return value
