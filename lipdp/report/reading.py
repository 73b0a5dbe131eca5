"""What a run's folder says, read with suspicion: every field checked, and the file and the field named where one is wrong."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lipdp.accounting.facts import check_digest
from lipdp.accounting.relation import Relation
from lipdp.errors import CheckpointError, ResumeError

MAX_BYTES = 64 * 2**20
"""Of one file; a run's are a thousand times smaller."""

_INFINITY = math.inf


class Fields(Mapping[str, Any]):
    """A JSON object of a file, with typed access to its fields; CheckpointError says what is wrong, and where.

    >>> fields = Fields("privacy.json", {"epsilon": 1.5, "seeded": False})
    >>> fields.number("epsilon"), fields.flag("seeded"), fields.number("delta", None)
    (1.5, False, None)
    """

    def __init__(self, where: str | os.PathLike[str], values: Any) -> None:
        if not isinstance(values, dict):
            raise CheckpointError(f"{where} is damaged: an object is needed, got {_short(values)}")
        self.where, self._values = str(where), values

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def __iter__(self) -> Any:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def number(self, name: str, *default: Any, low: float = 0.0, high: float = _INFINITY) -> Any:
        """A number in [low, high]."""
        value = self._get(name, default)
        if value is None and default:
            return default[0]
        if not _is_number(value) or not low <= value <= high:
            raise self._wrong(name, f"a number from {low:g} to {high:g}")
        return value

    def count(self, name: str, *default: Any) -> Any:
        """A whole number of at least 0."""
        value = self.number(name, *default, high=2**63)
        if value is not None and type(value) is not int:
            raise self._wrong(name, "a whole number")
        return value

    def text(self, name: str, *default: Any) -> Any:
        """A string."""
        value = self._get(name, default)
        if value is None and default:
            return default[0]
        if not isinstance(value, str):
            raise self._wrong(name, "a text")
        return value

    def flag(self, name: str, *default: Any) -> Any:
        """True or false."""
        value = self._get(name, default)
        if value is None and default:
            return default[0]
        if not isinstance(value, bool):
            raise self._wrong(name, "true or false")
        return value

    def numbers(self, name: str, *default: Any, low: float = 0.0, high: float = _INFINITY) -> Any:
        """A list of numbers in [low, high], as a tuple."""
        value = self._get(name, default)
        if value is None and default:
            return default[0]
        if not isinstance(value, list) or not all(_is_number(v) and low <= v <= high for v in value):
            raise self._wrong(name, f"a list of numbers from {low:g} to {high:g}")
        return tuple(value)

    def inner(self, name: str, *default: Any) -> Any:
        """An object inside this one."""
        value = self._get(name, default)
        if value is None and default:
            return default[0]
        return Fields(f"{self.where}: {name}", value)

    def _get(self, name: str, default: Sequence[Any]) -> Any:
        if name not in self._values and not default:
            raise CheckpointError(f"{self.where} is damaged: it has no {name}")
        return self._values.get(name)

    def _wrong(self, name: str, needed: str) -> CheckpointError:
        return CheckpointError(f"{self.where} is damaged: {name} is {_short(self._values[name])}, {needed} is needed")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and not math.isnan(value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


@dataclass(frozen=True)
class Account:
    """`privacy.json`.

    Attributes:
        epsilon, delta: spent so far. relation: what a neighbour is. accountant, note: who says so.
        noise_multiplier, sampling_rate, steps, expected_batch_size, dataset_size: σ, q, T so far, B, N.
        counted_again: steps among T that were taken twice. planned_steps: T of the whole run.
        sampling, allocation, gate: as the run was given them.
        sensitivity: parameter → Δ.
        seeded: the noise can be repeated. secure: it comes from a cipher (None: not recorded).
        intact: whether the file is as it was written (None: it has no digest).
        unit: what is protected, a "record" or an "owner" with all records.
    """

    epsilon: float
    delta: float
    relation: Relation
    accountant: str
    note: str
    noise_multiplier: float
    sampling_rate: float
    steps: int
    expected_batch_size: int
    dataset_size: int | None
    counted_again: int
    planned_steps: int | None
    sampling: str
    allocation: str
    gate: str
    sensitivity: Mapping[str, float]
    seeded: bool
    secure: bool | None
    intact: bool | None
    unit: str = "record"

    @property
    def finished(self) -> bool:
        """All planned steps are taken."""
        return self.planned_steps is None or self.steps - self.counted_again >= self.planned_steps


@dataclass(frozen=True)
class Robustness:
    """`certificate.json`: certified accuracy at radii in units of the raw input, and what an attack leaves."""

    samples: int
    accuracy: float
    radii: tuple[float, ...]
    certified: tuple[float, ...]
    attacked: tuple[float, ...] | None
    certified_auroc: tuple[float, ...] | None
    attacked_inside: int | None
    broken_inside: int | None
    lipschitz: float
    method: str
    weights: str
    step: int | None
    curve: tuple[tuple[float, ...], tuple[float, ...]]


@dataclass(frozen=True)
class AuditRow:
    """One audit among those of `audit.json`."""

    method: str
    experiment: str
    trials: int
    lower_bound: float
    claimed_epsilon: float
    violated: bool


@dataclass(frozen=True)
class Audit:
    """`audit.json`: an empirical lower bound on ε beside the claim."""

    claimed_epsilon: float
    lower_bound: float
    confidence: float
    delta: float | None
    violated: bool
    rows: tuple[AuditRow, ...]


@dataclass(frozen=True)
class Run:
    """Everything a run's folder says.

    Attributes:
        folder: its path. name: its last part.
        config: `config.json`. account: `privacy.json`. metrics: `metrics.jsonl`, in order of the steps.
        sessions: `environment.json`: where and by which command the run was started and resumed.
        robustness, audit: of `lipdp certify` and `lipdp audit`, if they are there.
    """

    folder: Path
    name: str
    config: Fields
    account: Account
    metrics: tuple[Mapping[str, Any], ...]
    sessions: tuple[Mapping[str, str], ...] = ()
    robustness: Robustness | None = None
    audit: Audit | None = None
    title: str = field(default="")

    @property
    def metric(self) -> str:
        """What the test records were scored by: "auroc" or "accuracy"."""
        return "auroc" if self.metrics and "test_auroc" in self.metrics[-1] else "accuracy"

    def score(self, *, averaged: bool = False) -> float | None:
        """The last one, of the last or of the averaged weights."""
        if not self.metrics:
            return None
        value: float | None = self.metrics[-1].get(f"test_{self.metric}" + ("_ema" if averaged else ""))
        return value


def read_run(folder: str | os.PathLike[str]) -> Run:
    """A run's folder.

    Raises:
        CheckpointError: it is none, nothing was released yet, or a file is damaged; the message says which.
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a folder; give the folder that lipdp train wrote (its --out)")
    config = Fields(path / "config.json", _json(path / "config.json", path))
    if not (path / "privacy.json").exists():
        raise CheckpointError(f"{path} has no privacy.json: is it a run of lipdp train that took a step?")
    certificate, audit = path / "certificate.json", path / "audit.json"
    model, dataset = config.text("model", "model"), config.text("dataset", "data")
    return Run(
        folder=path,
        name=path.resolve().name,
        config=config,
        account=_account(Fields(path / "privacy.json", _json(path / "privacy.json", path))),
        metrics=_metrics(path / "metrics.jsonl"),
        sessions=_sessions(path / "environment.json"),
        robustness=_robustness(Fields(certificate, _json(certificate, path))) if certificate.exists() else None,
        audit=_audit(Fields(audit, _json(audit, path))) if audit.exists() else None,
        title=f"{dataset}, {model}" + (f" on {config['features']}" if config.text("features", None) else ""),
    )


def read_text(path: Path) -> str:
    """A text file of a sane size; CheckpointError if it cannot be read."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise CheckpointError(f"{path} is larger than {MAX_BYTES >> 20} MiB: no run writes such a file")
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise CheckpointError(f"{path} cannot be read ({reason})") from error


def parse(text: str, where: str | os.PathLike[str]) -> Any:
    """JSON; CheckpointError says where it is damaged."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is damaged ({error})") from error


def _json(path: Path, folder: Path) -> Any:
    if not path.exists():
        raise CheckpointError(f"{folder} has no {path.name}: give the folder that lipdp train wrote (its --out)")
    return parse(read_text(path), path)


def _account(fields: Fields) -> Account:
    relation = fields.text("relation")
    if relation not in [r.value for r in Relation]:
        raise CheckpointError(
            f"{fields.where} is damaged: relation is {_short(relation)}, one of {', '.join(r.value for r in Relation)}"
        )
    unit = fields.text("unit", "record")
    if unit not in ("record", "owner"):
        raise CheckpointError(f"{fields.where} is damaged: unit is {_short(unit)}, one of record, owner")
    deltas = fields.inner("sensitivity")
    intact = None
    if "digest" in fields:
        try:
            check_digest(fields, fields.where)
            intact = True
        except ResumeError:
            intact = False
    return Account(
        epsilon=fields.number("epsilon"),
        delta=fields.number("delta", high=1.0),
        relation=Relation(relation),
        accountant=fields.text("accountant"),
        note=fields.text("accountant_note", ""),
        noise_multiplier=fields.number("noise_multiplier"),
        sampling_rate=fields.number("sampling_rate", high=1.0),
        steps=fields.count("steps"),
        expected_batch_size=fields.count("expected_batch_size"),
        dataset_size=fields.count("dataset_size", None),
        counted_again=fields.count("steps_counted_again", 0),
        planned_steps=fields.count("planned_steps", None),
        sampling=fields.text("sampling", "poisson" if relation == Relation.ADD_OR_REMOVE_ONE.value else "fixed_size"),
        allocation=fields.text("allocation"),
        gate=fields.text("gate", "not recorded"),
        unit=unit,
        sensitivity={name: deltas.number(name) for name in deltas},
        seeded=fields.flag("seeded"),
        secure=fields.flag("secure", None),
        intact=intact,
    )


def _metrics(path: Path) -> tuple[Mapping[str, Any], ...]:
    if not path.exists():
        return ()
    records = []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        where = f"{path}, line {number}"
        fields = Fields(where, parse(line, where))
        record: dict[str, Any] = {"step": fields.count("step"), "epsilon": fields.number("epsilon")}
        for name in fields:
            if name.startswith("test_"):
                record[name] = fields.number(name, None, high=1.0)
        record["train_loss_not_private"] = fields.number("train_loss_not_private", None, low=-_INFINITY)
        record["seconds"] = fields.number("seconds", None)
        records.append(record)
    return tuple(records)


def _sessions(path: Path) -> tuple[Mapping[str, str], ...]:
    if not path.exists():
        return ()
    sessions = parse(read_text(path), path)
    if not isinstance(sessions, list):
        raise CheckpointError(f"{path} is damaged: a list is needed, got {_short(sessions)}")
    return tuple({name: str(value) for name, value in Fields(path, session).items()} for session in sessions)


def _robustness(fields: Fields) -> Robustness:
    radii, certified = fields.numbers("radii"), fields.numbers("certified_accuracy", high=1.0)
    curve, attack = fields.inner("curve", None), fields.inner("attack", None)
    points = ((0.0, *radii), (fields.number("accuracy"), *certified))
    if curve is not None:
        points = (curve.numbers("radii"), curve.numbers("certified_accuracy", high=1.0))
    found = Robustness(
        samples=fields.count("samples"),
        accuracy=fields.number("accuracy", high=1.0),
        radii=radii,
        certified=certified,
        attacked=fields.numbers("attacked_accuracy", None, high=1.0),
        certified_auroc=fields.numbers("certified_auroc", None, high=1.0),
        attacked_inside=None if attack is None else attack.count("attacked_at_own_radius", None),
        broken_inside=None if attack is None else attack.count("broken_at_own_radius", None),
        lipschitz=fields.number("lipschitz"),
        method=fields.text("method", ""),
        weights=fields.text("weights", "model"),
        step=fields.count("step", None),
        curve=points,
    )
    for name in ("certified", "attacked", "certified_auroc"):
        values = getattr(found, name)
        if values is not None and len(values) != len(radii):
            raise CheckpointError(f"{fields.where} is damaged: {len(radii)} radii, and {len(values)} values of {name}")
    if len(points[0]) != len(points[1]):
        raise CheckpointError(f"{fields.where} is damaged: its curve has as many radii as accuracies")
    return found


def _audit(fields: Fields) -> Audit:
    rows = fields["audits"] if isinstance(fields.get("audits"), list) else []
    return Audit(
        claimed_epsilon=fields.number("claimed_epsilon"),
        lower_bound=fields.number("lower_bound"),
        confidence=fields.number("confidence", high=1.0),
        delta=fields.number("delta", None, high=1.0),
        violated=fields.number("lower_bound") > fields.number("claimed_epsilon"),
        rows=tuple(_audit_row(Fields(f"{fields.where}: audits", row)) for row in rows),
    )


def _audit_row(fields: Fields) -> AuditRow:
    lower, claimed = fields.number("lower_bound"), fields.number("claimed_epsilon")
    return AuditRow(
        method=fields.text("method", ""),
        experiment=fields.text("experiment", ""),
        trials=fields.count("trials", 0),
        lower_bound=lower,
        claimed_epsilon=claimed,
        violated=lower > claimed,
    )
