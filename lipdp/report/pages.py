"""A report on a page: HTML and markdown by Jinja2, with every value escaped, and JSON."""

from __future__ import annotations

import json
import math
import re
from dataclasses import fields, is_dataclass
from decimal import ROUND_CEILING, Context
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lipdp.accounting.plan import in_bands, protected
from lipdp.accounting.relation import Relation
from lipdp.errors import ParameterError
from lipdp.report.statement import NOT_COVERED, PUBLIC, one_in

if TYPE_CHECKING:
    import jinja2

    from lipdp.report.document import Report, RunReport

_ACCOUNTANTS = {
    "prv": "PRV (numerical composition of privacy loss random variables, Gopi et al. 2021)",
    "pld": "PLD (privacy loss distributions, dp-accounting)",
    "rdp": "RDP (Rényi differential privacy)",
}
_LONGEST = 400
_MARKDOWN = re.compile(r"([\\`*_{}\[\]()#+\-!|~$])")


def as_html(report: Report) -> str:
    """One page that needs nothing else: styles and figures are in it, and its policy forbids scripts and requests."""
    from lipdp.report import figures

    drawn = {
        "budget": figures.budget(report.labelled),
        "score": figures.score(report.labelled),
        "robustness": figures.robustness(report.labelled),
        "utility": figures.utility(report.comparison),
    }
    for i, one in enumerate(report.runs):
        drawn[f"roc{i}"] = figures.roc(one.run, key=f"roc{i}")
        if one.calibration is not None:
            drawn[f"reliability{i}"] = figures.reliability(one.calibration, key=f"reliability{i}")
        shown = [(row.name, row.signal) for row in one.parameters if row.signal is not None]
        drawn[f"signal{i}"] = figures.signal([n for n, _ in shown], [s for _, s in shown], key=f"signal{i}")
    environment = _environment()
    style = (files("lipdp.report") / "templates" / "report.css").read_text(encoding="utf-8")
    page = environment.get_template("report.html.jinja")
    return page.render(report=report, figures=drawn, style=_trusted(style), **_WORDS)


def as_markdown(report: Report) -> str:
    """A section for a model card; what comes out of a folder is escaped for markdown as well as for HTML."""
    environment = _environment(finalize=_escape_markdown)
    text = environment.get_template("report.md.jinja").render(report=report, **_WORDS)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def as_json(report: Report) -> str:
    """All of the report but the figures; what is not a finite number is null."""
    plain: dict[str, Any] = _plain(report)
    for one, values in zip(report.runs, plain["runs"], strict=True):
        values["private"] = not one.alarming
    plain |= {"public": list(PUBLIC), "not_covered": list(NOT_COVERED)}
    plain["differences"] = {name: _plain(values) for name, values in report.differences()}
    return json.dumps(plain, indent=2, allow_nan=False) + "\n"


def number(value: Any, digits: int = 4) -> str:
    """A number for people.

    >>> number(2.99338), number(1437), number(1e-5), number(None), number(float("inf"))
    ('2.993', '1,437', '1e-05', 'not known', '∞')
    """
    if value is None:
        return "not known"
    if isinstance(value, int):
        return f"{value:,}"
    return "∞" if math.isinf(value) else f"{value:.{digits}g}"


def at_most(value: float, digits: int = 4) -> str:
    """An upper bound for people, rounded up.

    >>> at_most(0.99845, 3), at_most(2.5), at_most(float("inf"))
    ('0.999', '2.5', '∞')
    """
    up = Context(prec=digits, rounding=ROUND_CEILING)
    return number(float(up.create_decimal_from_float(value)) if math.isfinite(value) else value, digits)


def percent(value: float | None) -> str:
    r"""A share in percent, with a space that does not break.

    >>> percent(0.8861) == "88.6\u00a0%", percent(None)
    (True, 'not known')
    """
    return "not known" if value is None else f"{100 * value:.1f}\u00a0%"


def setting(value: Any) -> str:
    """A setting as text, cut where it is too long to read.

    >>> setting(None), setting(True), setting({"tau": 32.0}), setting("mnist")
    ('not set', 'yes', '{"tau": 32.0}', 'mnist')
    """
    if value is None or value == {}:
        return "not set"
    if isinstance(value, bool):
        return "yes" if value else "no"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def account_rows(one: RunReport) -> list[tuple[str, str]]:
    """The account of a run: name and value, in order."""
    account = one.run.account
    again = f", {account.steps_counted_again} of them taken again" if account.steps_counted_again else ""
    planned = "" if account.finished else f" of {account.planned_steps} planned"
    batches = {"poisson": "Poisson", "fixed_size": "fixed size"}.get(account.sampling, account.sampling)
    source = (
        "a cipher" if account.secure else "a fast generator that is no cipher (numpy's on a CPU, torch's elsewhere)"
    )
    source = "a fixed seed: repeatable" if account.seeded else f"{source}, seeded by the operating system"
    size = f"B = {number(account.expected_batch_size)}"
    correlated = in_bands(account.bands, account.truncated_batch_size)
    rate = f"{number(account.sampling_rate)} ({batches} batches of {size}){correlated}"
    checked = {True: "as written: its digest agrees", False: "changed since it was written", None: "it has no digest"}
    return [
        ("Protected", protected(account.unit, account.dataset_size)),
        ("Neighbouring data sets", f"{account.relation.words} {account.unit}"),
        ("ε", f"{at_most(account.epsilon)} (an upper bound)"),
        ("δ", f"{number(account.delta)}{one_in(account.delta)}"),
        ("Accountant", _ACCOUNTANTS.get(account.accountant, account.accountant)),
        ("ε computed again for this report", number(one.recomputed)),
        ("Noise multiplier σ", number(account.noise_multiplier)),
        ("Sampling rate q", rate),
        ("Steps T", f"{number(account.steps)}{planned}{again}"),
        ("Noise shared among parameters", account.allocation.replace("_", " ")),
        ("Gate on every record’s gradient at the outputs", account.gate),
        ("Source of the noise", source),
        ("privacy.json", checked[account.intact]),
    ]


_WORDS = {
    "PUBLIC": PUBLIC,
    "NOT_COVERED": NOT_COVERED,
    "account_rows": account_rows,
}


@cache
def _environment(**options: Any) -> jinja2.Environment:
    try:
        import jinja2
    except ImportError as error:
        raise ParameterError(
            f'a report needs Jinja2 ({error}): pip install "lipdp[report]", or use --format json'
        ) from error
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("lipdp.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        **options,
    )
    filters: dict[str, Any] = {
        "number": number,
        "at_most": at_most,
        "in_bands": in_bands,
        "percent": percent,
        "setting": setting,
        "verbatim": _verbatim,
    }
    environment.filters |= filters
    return environment


def _trusted(text: str) -> Any:
    from markupsafe import Markup

    return Markup(text)


def _verbatim(text: str) -> Any:
    """One line inside a fenced block of markdown, where nothing is markup: no control characters, no fence."""
    return _trusted("".join(c if c.isprintable() else "?" for c in text).replace("```", "'''"))


def _escape_markdown(value: Any) -> Any:
    """Text on one line in which no character has a meaning for markdown; HTML is left to the autoescape."""
    if not isinstance(value, str) or hasattr(value, "__html__"):
        return value
    return _MARKDOWN.sub(r"\\\1", " ".join(value.split()))


def _plain(value: Any) -> Any:
    """JSON values; what is not a finite number is None."""
    if is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, (str, int, type(None))):
        return value.value if isinstance(value, Relation) else value
    if hasattr(value, "items"):
        return {str(name): _plain(inner) for name, inner in value.items()}
    return [_plain(inner) for inner in value]
