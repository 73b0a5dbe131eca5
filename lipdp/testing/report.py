"""What an attack found: one finding per bound, the worst of them, and how often it looked."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lipdp.errors import BoundViolation

_TOLERANCE = {torch.float64: 1e-9}


def default_tolerance(dtype: torch.dtype) -> float:
    """How far above 1 a ratio may be: the rounding of the measurement itself (the bound has its own slack)."""
    return _TOLERANCE.get(dtype, 1e-5)


@dataclass(frozen=True)
class Finding:
    """The largest value of one quantity that was found, beside its bound.

    Attributes:
        quantity: "gradient of 1.weight", "Lipschitz constant", "value of 2", "cotangent at 2", …
        measured: the largest norm found (NaN counts as infinite).
        how: the weights, the starting point and the number of steps that led there.
        input, target: the sample, without batch axis.
    """

    quantity: str
    measured: float
    bound: float
    how: str
    input: Tensor | None = None
    target: Tensor | None = None

    @property
    def ratio(self) -> float:
        """measured / bound; 0/0 counts as 0."""
        if math.isnan(self.measured):
            return math.inf
        return self.measured / self.bound if self.bound > 0 else (math.inf if self.measured > 0 else 0.0)

    def __str__(self) -> str:
        return f"{self.quantity}: {self.measured:.6g} is {self.ratio:.6g} times its bound {self.bound:.6g} ({self.how})"


def largest(norms: Tensor) -> int:
    """The index of the largest norm; a NaN counts as infinite."""
    return int(torch.where(norms.isnan(), torch.inf, norms).argmax())


def worst_of(findings: Iterable[Finding]) -> dict[str, Finding]:
    """Of every quantity the finding with the largest ratio, the first of equal ones."""
    worst: dict[str, Finding] = {}
    for finding in findings:
        known = worst.get(finding.quantity)
        if known is None or finding.ratio > known.ratio:
            worst[finding.quantity] = finding
    return worst


@dataclass(frozen=True)
class Report:
    """The findings of one attack, one per quantity.

    Attributes:
        findings: quantity → the worst found.
        evaluations: number of per-sample gradients computed.
        tolerance: a ratio up to 1 + tolerance is no violation.

    >>> report = Report({"a": Finding("a", 1.0, 2.0, "by hand")}, evaluations=1, tolerance=0.0)
    >>> report.worst, report.violations
    (0.5, ())
    """

    findings: Mapping[str, Finding]
    evaluations: int
    tolerance: float

    @property
    def ratios(self) -> dict[str, float]:
        """Parameter name → worst ratio of its per-sample gradient norm over its bound."""
        prefix = "gradient of "
        return {q[len(prefix) :]: f.ratio for q, f in self.findings.items() if q.startswith(prefix)}

    @property
    def worst_finding(self) -> Finding:
        """The finding with the largest ratio."""
        return max(self.findings.values(), key=lambda finding: finding.ratio)

    @property
    def worst(self) -> float:
        """The largest ratio; above 1 a bound is wrong."""
        return self.worst_finding.ratio

    @property
    def worst_input(self) -> Tensor | None:
        """The sample of the worst finding."""
        return self.worst_finding.input

    @property
    def violations(self) -> tuple[Finding, ...]:
        """What exceeds its bound, worst first."""
        found = [f for f in self.findings.values() if f.ratio > 1 + self.tolerance]
        return tuple(sorted(found, key=lambda finding: -finding.ratio))

    def raise_violations(self) -> Report:
        """The report itself, or a `BoundViolation` that names every quantity beyond its bound."""
        if self.violations:
            raise BoundViolation("a bound is wrong:\n" + "\n".join(f"  {finding}" for finding in self.violations))
        return self

    def merged(self, other: Report) -> Report:
        """Of each quantity the worse of both findings."""
        findings = worst_of([*self.findings.values(), *other.findings.values()])
        return Report(findings, self.evaluations + other.evaluations, self.tolerance)

    def __str__(self) -> str:
        lines = [f"{self.evaluations} gradient evaluations; worst ratio {self.worst:.6f}"]
        return "\n".join(lines + [f"  {f.ratio:.6f}  {f.quantity}  ({f.how})" for f in self.findings.values()])
