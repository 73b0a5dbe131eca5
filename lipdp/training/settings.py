"""What is declared of a setting of a run, once. From it follow the options of the commands, the checks, what a search
or a resume may change, and the table of the documentation."""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from types import GenericAlias
from typing import Any

from lipdp.errors import ParameterError, UnknownNameError

MAX_THREADS = 1024
"""More of them than any machine's cores are a mistake."""


class Role(Enum):
    """What a setting decides. A search may change the method alone, a resume the machine alone."""

    DATA = "data"
    """Which records there are, and what the model sees of them."""

    ACCOUNT = "account"
    """What ε follows from."""

    METHOD = "method"
    """How the model learns; ε is the same whatever it is."""

    MACHINE = "machine"
    """Where and how it is computed. ε is the same: it follows from q, T and σ; σ is relative to Δ, and Δ is computed at
    every step for the precision that the forward pass has then. Where one of these changes at a resume, the run goes on
    with other roundings, so that it does not end with the bits of one that was not interrupted."""


@dataclass(frozen=True)
class Kind:
    """The values of a setting: the type of its option, whether a value is one of them, and what a refusal asks for."""

    option: type | GenericAlias
    accepts: Callable[[Any], bool]
    needed: str


FLAG = Kind(bool, lambda value: isinstance(value, bool), "true or false")
NAME = Kind(str, lambda value: isinstance(value, str), "a name")


def read_value(text: str) -> Any:
    """A value as it is typed: JSON or a Python literal, else plain text."""
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return text


def _is_plain(value: Any) -> bool:
    return type(value) in (str, int, float, bool)


LIST = Kind(
    str,
    lambda value: isinstance(value, (list, tuple)) and len(value) > 1 and all(map(_is_plain, value)),
    "a list of two or more texts or numbers",
)
"""Its option takes them with commas between."""
SCHEMA = Kind(str, lambda value: isinstance(value, Mapping), "the path of a .toml file")
"""Its option takes a path; the value is what the file holds, so that a run's folder says all of it."""
OPTIONS = Kind(list[str], lambda value: isinstance(value, Mapping), "a mapping of options")
SIZE = Kind(
    tuple[int, int],
    lambda value: isinstance(value, (tuple, list)) and len(value) == 2 and all(map(whole(1, 2**15).accepts, value)),
    "a height and a width in pixels",
)


def whole(least: int = 1, most: int = sys.maxsize) -> Kind:
    """Whole numbers from `least` to `most`.

    >>> whole(0, 9).needed, whole().accepts(True)
    ('a whole number from 0 to 9', False)
    """
    limits = f"of at least {least}" if most == sys.maxsize else f"from {least} to {most}"
    return Kind(int, lambda value: type(value) is int and least <= value <= most, f"a whole number {limits}")


def number(below: float | None = None, *, zero: bool = False, option: type = float) -> Kind:
    """Finite numbers above 0, or from 0 on; with `below`, less than that.

    >>> number(1.0, zero=True).needed, number().accepts(float("nan"))
    ('a number in [0, 1)', False)
    """
    needed = "a finite number > 0" if below is None else f"a number in {'[' if zero else '('}0, {below:g})"
    most = sys.float_info.max if below is None else below

    def accepts(value: Any) -> bool:
        return type(value) in (int, float) and (0 < value < most or (zero and value == 0))

    return Kind(option, accepts, needed)


GATE = number(option=str)
"""Its option also takes "off"."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A setting of a run as it is declared.

    Attributes:
        name: of the field; its option is `--name`, without the plural where it is given as key=value pairs.
        help: one line.
        panel: of the help of `lipdp train`.
        kind, choices: its values; `choices` if they are names that are all known.
        role: what it decides.
        default: in words.
        metavar: of its option.
        required: whether None is no value.
    """

    name: str = ""
    help: str
    panel: str
    kind: Kind
    role: Role
    default: str = ""
    choices: Collection[str] = ()
    metavar: str | None = None
    required: bool = False

    @property
    def flag(self) -> str:
        """Its option."""
        name = self.name.removesuffix("s") if self.kind is OPTIONS else self.name
        return f"--{name.replace('_', '-')}"

    @property
    def description(self) -> str:
        """The help, with the names there are."""
        return ": ".join(part for part in (self.help, ", ".join(self.choices)) if part)

    def check(self, value: Any) -> None:
        """Refuse a value that is none: ParameterError, or UnknownNameError where it is not among the choices."""
        if value is None and not self.required:
            return
        if not self.kind.accepts(value):
            raise ParameterError(f"{self.name}={value!r}: {self.kind.needed} is needed")
        if self.choices and value not in self.choices:
            raise UnknownNameError(self.name, value, self.choices)


def setting(
    kind: Kind, role: Role, help: str, value: Any = None, *, panel: str, words: str = "", **declared: Any
) -> Any:
    """A field of a dataclass of settings."""
    declared.setdefault("required", value is not None)
    shown = words or ("" if value is None or value is False or kind is OPTIONS else str(value))
    made = Setting(kind=kind, help=help, panel=panel, role=role, default=shown, **declared)
    if kind is OPTIONS:
        return field(default_factory=dict, metadata={"setting": made})
    return field(default=value, metadata={"setting": made})


def declared(cls: type) -> dict[str, Setting]:
    """The settings of a dataclass, by name."""
    return {f.name: replace(f.metadata["setting"], name=f.name) for f in fields(cls)}


def table(settings: Mapping[str, Setting]) -> str:
    """The settings as a table in Markdown."""
    rows = [
        "| setting | option | meaning | default | may change at a resume | may be searched |",
        "|---|---|---|---|---|---|",
    ]
    for name, one in settings.items():
        may = [("yes" if one.role is role else "") for role in (Role.MACHINE, Role.METHOD)]
        rows.append(" | ".join([f"| `{name}`", f"`{one.flag}`", one.description, one.default, *may]) + " |")
    return "\n".join(rows) + "\n"
