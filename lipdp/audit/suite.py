"""Several audits of one claim, their report and their picture: what the command runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch

from lipdp.accounting.plan import whole
from lipdp.audit.experiments import gradient_canaries, input_canaries, worst_case
from lipdp.audit.observe import Progress, check_seed
from lipdp.audit.run import AuditResult, many_runs, one_run
from lipdp.errors import ParameterError, UnknownNameError
from lipdp.files import write_figure, write_json

__all__ = ["METHODS", "Suite", "SuiteResult", "draw", "write"]


@dataclass(frozen=True)
class Suite:
    """What to audit and how hard; see `many_runs` and `one_run`.

    `confidence` is that of all lower bounds together: of k audits each has 1 − (1 − confidence)/k. With bands, the one
    run of gradient canaries uses each several times, so that noise that cancels too well between uses shows.
    """

    epsilon: Annotated[float, "the claim to audit: the engine's noise is calibrated to it"]
    delta: float = 1e-5
    confidence: Annotated[float, "of all lower bounds together"] = 0.95
    methods: Annotated[Sequence[str], "the audits to run", "--method"] = (
        "many-runs",
        "sampled-runs",
        "gradient-canaries",
        "input-canaries",
    )
    runs: Annotated[int, "of each audit by many runs"] = 3000
    canaries: Annotated[int, "gradient canaries in one run"] = 32_768
    input_canaries: Annotated[int, "records in one run on the digits"] = 250
    allocation: str = "per_layer"
    accountant: str = "prv"
    bands: int = 1
    seed: Annotated[int | None, "repeat the audit exactly"] = None

    def __post_init__(self) -> None:
        unknown = [name for name in self.methods if name not in METHODS]
        if unknown:
            raise UnknownNameError("audit method", unknown[0], METHODS)
        if not self.methods or len(set(self.methods)) < len(self.methods):
            raise ParameterError(f"methods={self.methods}: one or more of {', '.join(METHODS)}, each once")
        if not 0.0 < self.confidence < 1.0:
            raise ParameterError(f"confidence={self.confidence}: a probability in (0, 1) is needed, 0.95 say")
        whole("bands", self.bands)
        if not self.possible:
            raise ParameterError(f"bands={self.bands}: {self.left_out}")
        check_seed(self.seed)

    @property
    def possible(self) -> Sequence[str]:
        """The methods that these bands allow."""
        return [name for name in self.methods if self.bands == 1 or name != "sampled-runs"]

    @property
    def left_out(self) -> str:
        """Which method is left out and why; empty if none is."""
        why = "the other records are dealt to groups once, so with bands the runs are not independent"
        return "" if len(self.possible) == len(self.methods) else f"sampled-runs is left out: {why}"

    def run(self, progress: Callable[[str, int, int], None] = lambda name, done, total: None) -> SuiteResult:
        """Every audit in turn; `progress` is told of each step: in which audit, how many are taken, of how many."""
        results = []
        with torch.random.fork_rng(devices=[]):  # the models' weights are drawn from torch's generator
            torch.manual_seed(torch.seed() if self.seed is None else self.seed)
            for name in self.possible:
                results.append(METHODS[name](self, partial(progress, name)))
        return SuiteResult(tuple(results), self.confidence, self.left_out)

    @property
    def options(self) -> dict[str, Any]:
        """Of each audit."""
        each = 1.0 - (1.0 - self.confidence) / len(self.possible)
        names = ("epsilon", "delta", "allocation", "accountant", "seed", "bands")
        return {**{name: getattr(self, name) for name in names}, "confidence": each}


METHODS: dict[str, Callable[[Suite, Progress], AuditResult]] = {
    "many-runs": lambda suite, bar: many_runs(runs=suite.runs, progress=bar, **suite.options),
    "sampled-runs": lambda suite, bar: many_runs(
        worst_case(sampling_rate=0.25, records=16, opposed=True), runs=suite.runs, progress=bar, **suite.options
    ),
    "gradient-canaries": lambda suite, bar: one_run(
        gradient_canaries(suite.canaries, steps=1 if suite.bands == 1 else 4), progress=bar, **suite.options
    ),
    "input-canaries": lambda suite, shown: one_run(
        input_canaries(suite.input_canaries), progress=shown, **suite.options
    ),
}


@dataclass(frozen=True)
class SuiteResult:
    """The audits, and the strongest among them: the one with the largest lower bound over its claim."""

    results: tuple[AuditResult, ...]
    confidence: float
    left_out: str = ""

    @property
    def strongest(self) -> AuditResult:
        """Of which the summary speaks."""
        return max(self.results, key=lambda result: result.ratio)

    @property
    def violated(self) -> bool:
        """Some lower bound is above its claim."""
        return any(result.violated for result in self.results)

    def as_dict(self) -> dict[str, Any]:
        """For `audit.json`: the strongest audit's figures, then all."""
        best = self.strongest
        names = ("claimed_epsilon", "lower_bound", "delta", "method", "experiment", "trials")
        return {
            **{name: getattr(best, name) for name in names},
            "confidence": self.confidence,
            "left_out": self.left_out,
            "violated": self.violated,
            "verdict": best.verdict,
            "audits": [result.as_dict() for result in self.results],
        }


def write(result: SuiteResult, folder: Path) -> tuple[Path, Path]:
    """`audit.json` and `audit.png` in the folder, each whole or not at all; the two paths."""
    report, picture = folder / "audit.json", folder / "audit.png"
    write_json(report, result.as_dict())
    write_figure(draw(result.results), picture, dpi=120)
    return report, picture


def draw(results: Sequence[AuditResult]) -> Any:
    """The distributions of the scores, canary in and out, one panel an audit: a `matplotlib.figure.Figure`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 2.6 * len(results)), layout="constrained")
    panels = figure.subplots(len(results), 1, squeeze=False)[:, 0]
    for panel, result in zip(panels, results, strict=True):
        both = np.concatenate([result.scores_in, result.scores_out])
        edges = np.linspace(float(np.quantile(both, 0.001)), float(np.quantile(both, 0.999)), 61)
        for scores, label in ((result.scores_out, "canary out"), (result.scores_in, "canary in")):
            panel.hist(scores, bins=edges, histtype="stepfilled", alpha=0.5, density=True, label=label)
        panel.set_title(
            f"{result.method}, {result.experiment}: ε ≥ {result.lower_bound:.2f} at {result.confidence:.4g},"
            f" claimed {result.claimed_epsilon:.2f}",
            fontsize=9,
        )
        panel.set_xlabel(f"score ({result.score})", fontsize=8)
        panel.set_yticks([])
        panel.legend(fontsize=8, frameon=False)
    return figure
