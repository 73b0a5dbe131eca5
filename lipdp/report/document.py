"""A report of training runs for somebody who did not train: `lipdp report RUN...`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any

from lipdp import __version__
from lipdp.comparison.calibration import Calibration
from lipdp.errors import ParameterError, UnknownNameError
from lipdp.report.comparison import ComparisonRow, read_comparison
from lipdp.report.evaluation import run_calibration
from lipdp.report.parameters import ParameterRow, rows_of_run
from lipdp.report.reading import RecordedRun, read_run
from lipdp.report.statement import Attack, Notice, attack, lead, nist, notices, paragraphs, recomputed_epsilon

FORMATS = ("html", "json", "md")
MOST_RUNS = 12


@dataclass(frozen=True)
class RunReport:
    """One run, with everything the report says about it.

    Attributes:
        label: its letter among several runs, "" if there is one.
        notices: what a reader must not miss, the alarms first.
        lead: two sentences for anybody: what is protected, and how good the model is.
        statement: the guarantee in words, a paragraph each; nist: under the headings of NIST SP 800-226.
        attack: what any attack can reach; None where the account gives none.
        recomputed: ε from σ, q, T and δ, by this program.
        parameters_note, calibration_note: why something is missing.
    """

    label: str
    run: RecordedRun
    notices: tuple[Notice, ...]
    lead: tuple[str, str]
    statement: tuple[str, ...]
    attack: Attack | None
    nist: tuple[tuple[str, str], ...]
    recomputed: float | None
    parameters: tuple[ParameterRow, ...]
    parameters_note: str
    calibration: Calibration | None
    calibration_note: str

    @property
    def alarming(self) -> bool:
        """The guarantee does not hold, or cannot be relied on."""
        return any(notice.alarm for notice in self.notices)


@dataclass(frozen=True)
class Report:
    """Runs side by side, with the rows of a comparison and the date."""

    runs: tuple[RunReport, ...]
    comparison: tuple[ComparisonRow, ...]
    made: str
    version: str

    @property
    def labelled(self) -> list[tuple[str, RecordedRun]]:
        """The runs with their letters."""
        return [(one.label, one.run) for one in self.runs]

    def differences(self) -> list[tuple[str, list[Any]]]:
        """The settings that are not the same in all runs: name, and the value in each."""
        names = dict.fromkeys(name for one in self.runs for name in one.run.config)
        table = [(name, [one.run.config.get(name) for one in self.runs]) for name in names]
        return [(name, values) for name, values in table if any(value != values[0] for value in values)]


def gather(
    runs: Sequence[str | os.PathLike[str]],
    *,
    comparison: str | os.PathLike[str] | None = None,
    data_dir: str | os.PathLike[str] | None = None,
    calibrate: bool = True,
    run_code: bool = False,
    made: str | None = None,
) -> Report:
    """Read run folders. They are not trusted: no code in them runs unless `run_code` allows it.

    Args:
        runs: folders of `lipdp train`, one to twelve.
        comparison: a folder of `lipdp compare`.
        data_dir: where the data are, if not where the runs read them.
        calibrate: read the test records and evaluate the model on them.
        run_code: build models given as module:function too.
        made: the date to state; today's.

    Raises:
        CheckpointError: a folder is none, or damaged; the message names the file and the field.
        ParameterError: no run, or too many to read side by side.

    >>> gather([])
    Traceback (most recent call last):
    lipdp.errors.ParameterError: 0 runs: give one to 12 folders of lipdp train
    """
    if not 1 <= len(runs) <= MOST_RUNS:
        raise ParameterError(f"{len(runs)} runs: give one to {MOST_RUNS} folders of lipdp train")
    read = [read_run(folder) for folder in runs]
    rows = () if comparison is None else read_comparison(comparison)
    labels = [chr(ord("A") + i) for i in range(len(read))] if len(read) > 1 else [""]
    reports = []
    for label, run in zip(labels, read, strict=True):
        recomputed = recomputed_epsilon(run.account)
        calibration, why = None, "Not asked for: leave --no-calibration out."
        if calibrate:
            calibration, why = run_calibration(run, data_dir=data_dir, run_code=run_code)
        found = notices(run, recomputed)
        first = lead(run, holds=not any(notice.alarm for notice in found))
        content = found, first, paragraphs(run.account), attack(run.account), nist(run.account), recomputed
        reports.append(RunReport(label, run, *content, *rows_of_run(run), calibration, why))
    return Report(tuple(reports), rows, made or date.today().isoformat(), __version__)


def render(report: Report, format: str = "html") -> str:
    """The report as one self-contained HTML page, as JSON, or as a section of a model card in markdown.

    Raises:
        UnknownNameError: another format. ParameterError: Jinja2 is not installed (JSON does not need it).
    """
    from lipdp.report.pages import as_html, as_json, as_markdown

    makers = dict(zip(FORMATS, (as_html, as_json, as_markdown), strict=True))
    if format not in makers:
        raise UnknownNameError("format", format, makers)
    return makers[format](report)
