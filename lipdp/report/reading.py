"""What a run's folder says, read with suspicion: each field is checked, and file and field named where one is wrong."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from lipdp.accounting.digest import digest
from lipdp.accounting.relation import Relation
from lipdp.errors import CheckpointError, ParameterError

try:
    from msgspec import Meta, ValidationError, convert
except ImportError as error:
    raise ParameterError(f'a report needs msgspec ({error}): pip install "lipdp[report]"') from error

MAX_BYTES = 64 * 2**20
"""Of one file; a run's are a thousand times smaller."""

T = TypeVar("T")
Real = Annotated[float, Meta(ge=-sys.float_info.max)]  # no NaN: it is not greater than anything
Positive = Annotated[float, Meta(ge=0.0)]
Share = Annotated[float, Meta(ge=0.0, le=1.0)]
Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]


@dataclass(frozen=True)
class Measured:
    """A sum over all records that was released once beside the steps, and its σ."""

    name: str
    noise_multiplier: Positive


@dataclass(frozen=True)
class Account:
    """`privacy.json`.

    Attributes:
        epsilon, delta: spent so far. relation: what a neighbour is. accountant, accountant_note: who says so.
        steps: T so far; steps_counted_again: those that were taken twice. planned_steps: T of the whole run.
        sensitivity: parameter → Δ, at the weights as they are.
        noise_stds: parameter → s, as the last step drew it; empty before the first.
        seeded: the noise can be repeated. secure: it comes from a cipher. bands: steps over which it is correlated.
        truncated_batch_size: the most records of a batch.
        measurements: what was released beside the steps, in the same ε.
        digest: of the file. intact: whether it agrees, found when read (None: there is none).
    """

    epsilon: Positive
    delta: Share
    relation: Relation
    accountant: str
    accountant_note: str
    noise_multiplier: Positive
    sampling_rate: Share
    steps: Count
    expected_batch_size: Count
    dataset_size: Count
    steps_counted_again: Count
    planned_steps: Count
    sampling: str
    allocation: str
    gate: str
    sensitivity: Mapping[str, Positive]
    noise_stds: Mapping[str, Positive]
    seeded: bool
    secure: bool
    unit: Literal["record", "owner"]
    measurements: tuple[Measured, ...] = ()
    bands: Count = 1
    truncated_batch_size: Count | None = None
    digest: str | None = None
    intact: bool | None = None

    @property
    def finished(self) -> bool:
        """All planned steps are taken."""
        return self.steps - self.steps_counted_again >= self.planned_steps


@dataclass(frozen=True)
class Record:
    """A line of `metrics.jsonl`."""

    step: Count
    epsilon: Positive
    train_loss_not_private: Real | None = None
    seconds: Positive | None = None
    test_accuracy: Share | None = None
    test_accuracy_ema: Share | None = None
    test_auroc: Share | None = None
    test_auroc_ema: Share | None = None
    test_base_rate: Share | None = None
    test_average_precision: Share | None = None
    test_average_precision_ema: Share | None = None

    def score(self, metric: str, *, averaged: bool = False) -> float | None:
        """On the test records, of the last or of the averaged weights; metric: "accuracy", "auroc", or
        "average_precision"."""
        value: float | None = getattr(self, f"test_{metric}" + ("_ema" if averaged else ""))
        return value


@dataclass(frozen=True)
class Roc:
    """The ROC curve of two classes, a point for each threshold."""

    false_positive: tuple[Share, ...]
    true_positive: tuple[Share, ...]

    def __post_init__(self) -> None:
        if len(self.false_positive) != len(self.true_positive):
            raise ValueError("a ROC curve has as many rates of either kind")


@dataclass(frozen=True)
class Answers:
    """What some weights answer on the test records: counts, a row for each true class, and the ROC curve."""

    confusion: tuple[tuple[Count, ...], ...] | None = None
    roc: Roc | None = None

    def __post_init__(self) -> None:
        if any(len(row) != len(self.confusion or ()) for row in self.confusion or ()):
            raise ValueError("a confusion matrix has as many columns as rows")


@dataclass(frozen=True)
class Evaluation:
    """`evaluation.json`: after the last step, of the last and of the averaged weights."""

    step: Count
    model: Answers = Answers()
    ema: Answers = Answers()


@dataclass(frozen=True)
class Curve:
    """Certified accuracy at many radii, for a figure."""

    radii: tuple[Positive, ...]
    certified_accuracy: tuple[Share, ...]


@dataclass(frozen=True)
class Attack:
    """Records attacked at their own certified radius, and those that gave way."""

    attacked_at_own_radius: Count
    broken_at_own_radius: Count


@dataclass(frozen=True)
class Robustness:
    """`certificate.json`: certified accuracy at radii in a `unit`, and what an attack leaves."""

    samples: Count
    accuracy: Share
    radii: tuple[Positive, ...]
    certified_accuracy: tuple[Share, ...]
    lipschitz: Positive
    method: str
    weights: str
    step: Count
    curve: Curve
    unit: str = ""
    attacked_accuracy: tuple[Share, ...] | None = None
    certified_auroc: tuple[Share, ...] | None = None
    attack: Attack | None = None

    def __post_init__(self) -> None:
        values = [self.certified_accuracy, self.attacked_accuracy, self.certified_auroc]
        if any(v is not None and len(v) != len(self.radii) for v in values):
            raise ValueError(f"{len(self.radii)} radii need as many values")
        if len(self.curve.radii) != len(self.curve.certified_accuracy):
            raise ValueError("the curve has as many radii as accuracies")


@dataclass(frozen=True, kw_only=True)
class _Bounded:
    """An empirical lower bound on ε beside the claim."""

    claimed_epsilon: Positive
    lower_bound: Positive

    @property
    def violated(self) -> bool:
        """The lower bound is above the claim."""
        return self.lower_bound > self.claimed_epsilon


@dataclass(frozen=True, kw_only=True)
class AuditRow(_Bounded):
    """One audit among those of `audit.json`."""

    method: str
    experiment: str
    trials: Count = 0


@dataclass(frozen=True, kw_only=True)
class Audit(_Bounded):
    """`audit.json`: the strongest audit's bound, and all."""

    confidence: Share
    delta: Share | None = None
    audits: tuple[AuditRow, ...] = ()


@dataclass(frozen=True)
class _Configured:
    """What the title needs of `config.json`."""

    dataset: str | None = None
    model: str | None = None
    features: str | None = None

    def __str__(self) -> str:
        on = f" on {self.features}" if self.features else ""
        return f"{self.dataset or 'data'}, {self.model or 'model'}{on}"


@dataclass(frozen=True)
class RecordedRun:
    """Everything a run's folder says.

    Attributes:
        name: the folder's last part. title: data and model.
        sessions: `environment.json`: where and by which command the run was started and resumed.
        evaluation: `evaluation.json`, where the run is finished.
        robustness, audit: of `lipdp certify` and `lipdp audit`, if they are there.
    """

    folder: Path
    name: str
    title: str
    config: Mapping[str, Any]
    account: Account
    metrics: tuple[Record, ...]
    sessions: tuple[Mapping[str, str], ...] = ()
    evaluation: Evaluation | None = None
    robustness: Robustness | None = None
    audit: Audit | None = None

    @property
    def metric(self) -> str:
        """What the test records were scored by: "auroc" or "accuracy"."""
        return "auroc" if self.metrics and self.metrics[-1].test_auroc is not None else "accuracy"

    @property
    def is_averaged(self) -> bool:
        """Whether the run's model is its averaged weights, as `TrainConfig.weights` says."""
        return self.config.get("tail") is not None

    @property
    def other_weights(self) -> str:
        """In a word, those that are not the run's model."""
        return "last" if self.is_averaged else "averaged"

    def score(self, *, averaged: bool | None = None) -> float | None:
        """The last one, of the last or of the averaged weights; by default of those that are the run's model."""
        averaged = self.is_averaged if averaged is None else averaged
        return self.metrics[-1].score(self.metric, averaged=averaged) if self.metrics else None


def read_run(folder: str | os.PathLike[str]) -> RecordedRun:
    """A run's folder."""
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a folder; give the folder that lipdp train wrote (its --out)")
    config = read(path / "config.json", dict[str, Any])
    metrics, sessions = path / "metrics.jsonl", path / "environment.json"
    evaluation, robustness, audit = (path / f"{name}.json" for name in ("evaluation", "certificate", "audit"))
    return RecordedRun(
        folder=path,
        name=path.resolve().name,
        title=str(checked(config, _Configured, path / "config.json")),
        config=config,
        account=_account(path / "privacy.json"),
        metrics=_metrics(metrics) if metrics.exists() else (),
        sessions=read(sessions, tuple[dict[str, str], ...]) if sessions.exists() else (),
        evaluation=read(evaluation, Evaluation) if evaluation.exists() else None,
        robustness=read(robustness, Robustness) if robustness.exists() else None,
        audit=read(audit, Audit) if audit.exists() else None,
    )


def read(path: Path, kind: type[T]) -> T:
    """A JSON file as an object of that kind."""
    return parsed(_text(path), kind, path)


def parsed(text: str, kind: type[T], where: str | os.PathLike[str]) -> T:
    """JSON as an object of that kind; CheckpointError says where it is damaged.

    >>> parsed('{"step": 3, "epsilon": "x"}', Record, "metrics.jsonl, line 3")
    Traceback (most recent call last):
    lipdp.errors.CheckpointError: metrics.jsonl, line 3 is damaged: Expected `float`, got `str` - at `$.epsilon`
    """
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is damaged: {error}") from error
    return checked(values, kind, where)


def checked(values: Any, kind: type[T], where: str | os.PathLike[str]) -> T:
    """Plain values as an object of that kind; CheckpointError names the field that is wrong."""
    try:
        return convert(values, kind)
    except (ValidationError, UnicodeError, RecursionError) as error:  # of the last two: half a surrogate pair, [[[[…
        reason = str(error)
        reason = reason if len(reason) <= 200 else f"{reason[:100]} … {reason[-100:]}"
        raise CheckpointError(f"{where} is damaged: {reason}") from error


def _text(path: Path) -> str:
    """A text file of a sane size."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise CheckpointError(f"{path} is larger than {MAX_BYTES >> 20} MiB: no run writes such a file")
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path.parent} has no {path.name}: give the folder that lipdp wrote (its --out), after its first step"
        ) from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise CheckpointError(f"{path} cannot be read ({reason})") from error


def _account(path: Path) -> Account:
    values = read(path, dict[str, Any])
    account = checked(values, Account, path)
    return replace(account, intact=None if account.digest is None else account.digest == digest(values))


def _metrics(path: Path) -> tuple[Record, ...]:
    lines = enumerate(_text(path).splitlines(), start=1)
    return tuple(parsed(line, Record, f"{path}, line {number}") for number, line in lines)
