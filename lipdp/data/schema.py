"""What is public of a table in a file: of each column its kind, its range or list, and what a missing value counts as.

[columns]
age = {kind = "number", lower = 0, upper = 120}
work = {kind = "category", categories = ["private", "state"], other = true}
income = {kind = "label", classes = ["<=50K", ">50K"]}
id = {kind = "ignore"}
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lipdp.data.columns import Category, Column, Number
from lipdp.data.listed import Listed, listing
from lipdp.errors import DataError, ParameterError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

KINDS: dict[str, tuple[type[Column] | None, tuple[str, ...]]] = {
    "number": (Number, tuple(field.name for field in fields(Number))[1:]),
    "category": (Category, tuple(field.name for field in fields(Category))[1:]),
    "label": (None, ("classes",)),
    "ignore": (None, ()),
}
"""Kind → what it is made to, and the options it takes."""


@dataclass(frozen=True)
class Schema:
    """The public map of a table: its columns in the order in which they are the model's inputs, and the classes.

    Guarantees: nothing is learnt. A record changes its own row alone and raises no error.

    Attributes:
        columns: that are inputs. label: the column of the label; None where a table has none.
        classes: its public list; a label's number is its place there. ignored: columns of no use.

    >>> schema = Schema.of({"columns": {"age": {"kind": "number", "lower": 0, "upper": 120},
    ...                                 "sick": {"kind": "label", "classes": ["no", "yes"]}}})
    >>> schema.rows({"age": [30, None], "sick": ["no", "yes"]}).tolist(), schema.classes
    ([[-0.5], [0.0]], ('no', 'yes'))
    """

    columns: tuple[Column, ...]
    label: str
    classes: tuple[Any, ...]
    ignored: tuple[str, ...] = ()

    @classmethod
    def of(cls, plain: Any, where: str = "the schema") -> Schema:
        """From what a schema file holds.

        Raises:
            ParameterError: not a schema; one line says where, what was given and what would be right.
        """
        columns = plain.get("columns") if isinstance(plain, Mapping) and set(plain) <= {"columns"} else None
        if not isinstance(columns, Mapping) or not columns:
            raise ParameterError(f"{where}: a table [columns] alone is needed, with lines such as {_EXAMPLE}")
        inputs, labels, ignored = [], [], []
        for name, given in columns.items():
            at = f"{where}: the column {name!r}"
            if not isinstance(given, Mapping) or given.get("kind") not in KINDS:
                raise ParameterError(f"{at} is {given!r}: {{kind = {' | '.join(map(repr, KINDS))}, …}} is needed")
            made = _column(at, name, given)
            if isinstance(made, Listed):
                labels.append((name, made.values))
            elif made is None:
                ignored.append(name)
            else:
                inputs.append(made)
        if len(labels) != 1:
            raise ParameterError(
                f"{where}: {len(labels)} columns of kind 'label', one is needed, such as"
                ' sick = {kind = "label", classes = ["no", "yes"]}'
            )
        if not inputs:
            raise ParameterError(f"{where}: no column is a number or a category, such as {_EXAMPLE}")
        return cls(tuple(inputs), *labels[0], tuple(ignored))

    @property
    def names(self) -> tuple[str, ...]:
        """Of all columns that are inputs."""
        return tuple(column.name for column in self.columns)

    @property
    def inputs(self) -> tuple[str, ...]:
        """Of the inputs that the model sees."""
        return tuple(name for column in self.columns for name in column.inputs)

    @property
    def is_bounded(self) -> bool:
        """Whether every number has a public range, so that all inputs lie in [−1, 1]."""
        return all(column.is_bounded for column in self.columns)

    def rows(self, table: Any) -> npt.NDArray[np.float32]:
        """(n, inputs) of a table: a mapping from names to columns, a DataFrame, or a structured array.

        Raises:
            DataError: a column is missing.
        """
        held = _held(table)
        absent = [name for name in self.names if name not in held]
        if absent:
            raise DataError(f"the table lacks the columns {listing(absent)} of its schema")
        parts = [column.encode(_cells(table[column.name])) for column in self.columns]
        return np.concatenate(parts, axis=1).astype(np.float32)

    def lines(self) -> list[tuple[str, str, int]]:
        """Of every column its name, what is made of it, and how many inputs that is."""
        inputs = [(column.name, column.text, len(column.inputs)) for column in self.columns]
        label = (self.label, f"label, {listing(self.classes)}", 0)
        return [*inputs, label, *((name, "ignored", 0) for name in self.ignored)]


_EXAMPLE = 'age = {kind = "number", lower = 0, upper = 120}'


def _column(at: str, name: str, given: Mapping[str, Any]) -> Column | Listed | None:
    """The column as it is declared; of a label its list, of one that is ignored None."""
    kind, options = given["kind"], {key: value for key, value in given.items() if key != "kind"}
    make, known = KINDS[kind]
    odd = next((key for key in options if key not in known), None)
    if odd is not None:
        raise ParameterError(f"{at} has {odd!r}; a column of kind {kind!r} takes {', '.join(known) or 'nothing else'}")
    try:
        if kind == "label":
            listed = Listed(options.get("classes"), "classes")  # type: ignore[arg-type]
            if len(listed.values) < 2:
                raise ParameterError(f"classes = {options['classes']!r}: two or more are needed")
            return listed
        return None if make is None else make(name, **options)
    except ParameterError as error:
        raise ParameterError(f"{at}: {error}") from error


def _held(table: Any) -> Sequence[str] | Mapping[str, Any]:
    columns = getattr(table, "columns", None)
    if columns is not None:
        return list(columns)
    if isinstance(table, np.ndarray) and table.dtype.names:
        return list(table.dtype.names)
    if isinstance(table, Mapping):
        return table
    raise DataError(
        f"{type(table).__name__}: the model was trained on a table with a schema; give a DataFrame, or a mapping from"
        " its columns' names to their values"
    )


def _cells(column: Any) -> Sequence[Any]:
    """The values of a column; those that pandas says to be missing are None."""
    absent = getattr(column, "isna", None)
    if callable(absent):
        return [None if none else value for value, none in zip(column.tolist(), absent().tolist(), strict=True)]
    return column.tolist() if isinstance(column, np.ndarray) else column


def plain_schema(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a schema file, `.toml`, holds, as plain values; checked.

    Raises:
        DataError: no such file. ParameterError: not a schema.
    """
    path = Path(path)
    try:
        plain = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(
            f"{path}: {error.strerror}; --schema takes a .toml file that says what the columns are"
        ) from error
    except ValueError as error:
        raise ParameterError(f"{path} is no TOML ({error}); a column is a line such as {_EXAMPLE}") from error
    Schema.of(plain, str(path))
    return plain


_TEMPLATE = """\
# What is public of the columns of {name}: `lipdp train --dataset {name} --schema THIS_FILE`.
# Made from the names of the columns alone. Write ranges and lists from what you know without looking at the records:
# a minimum or a list of values read off the data is not covered by ε.
#
#   {{kind = "number", lower = 0, upper = 120}}         values outside count as the nearer end
#   {{kind = "number"}}                                 no range known: it is measured privately
#   {{kind = "category", categories = ["a", "b"]}}      others are 0 in all inputs; other = true gives them one
#   {{kind = "label", classes = ["no", "yes"]}}         exactly one column
#   {{kind = "ignore"}}
#
# missing = VALUE says what a missing value counts as; indicator = true adds an input that says that it is missing.

[columns]
"""


def template(name: str, columns: Sequence[str]) -> str:
    """A schema to fill in, in which every column is ignored.

    >>> print(template("a.csv", ["age", "zip code"]).partition("[columns]")[2].strip())
    "age" = {kind = "ignore"}
    "zip code" = {kind = "ignore"}
    """
    keys = [json.dumps(column, ensure_ascii=False) for column in columns]
    return _TEMPLATE.format(name=name) + "".join(f'{key} = {{kind = "ignore"}}\n' for key in keys)
