"""Tables in files, CSV and Parquet, as the schema of their columns says: read once, a piece at a time."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lipdp.batches.records import NO_LABEL
from lipdp.data.files import parsing
from lipdp.data.labels import owner_ids
from lipdp.data.listed import Listed, is_missing, listing
from lipdp.data.schema import Schema, template
from lipdp.data.source import OwnSource
from lipdp.data.split import Split, Task, split_off
from lipdp.errors import DataError, ParameterError

SUFFIXES = (".csv", ".tsv", ".parquet")
Piece = Mapping[str, Sequence[Any]]

_ROWS = 1 << 14  # at a time
_HEAD = 64  # records looked at for what is wrong with a whole column
_ONE = 2  # lines that one record may make, with a line break between quotes
_DELIMITERS = ",;\t|"


@dataclass(frozen=True)
class _Csv:
    """Text with a header line; separated by whichever of , ; tab | parts the header into most names.

    A line is a record, whatever is in it: a quote that a record opens ends with its line, and reaches into no other.
    """

    path: Path

    @property
    def names(self) -> list[str]:
        """Of the columns, from the header alone."""
        return self._header()[1]

    def _header(self) -> tuple[str, list[str]]:
        made: dict[str, list[str]] = {}
        with parsing(self.path, "write it as CSV with a header line"):
            for mark in _DELIMITERS:
                with self._open() as stream:
                    made[mark] = _cells(stream.readline(), mark)
        mark = max(_DELIMITERS, key=lambda one: len(made[one]))
        return mark, [name.strip() for name in made[mark]]

    def _open(self) -> Any:
        return self.path.open(encoding="utf-8-sig", errors="replace", newline="\n")

    def pieces(self, columns: Sequence[str]) -> Iterator[Piece]:
        """The columns named, some rows at a time: one that is too short has missing cells, and what is too many in one
        is left out."""
        mark, names = self._header()
        places = [names.index(name) for name in columns]
        most = max(places, default=0)
        with parsing(self.path, "write it as CSV with a header line"), self._open() as stream:
            stream.readline()
            rows = (_cells(line, mark) for line in stream)
            first = True
            while piece := list(islice(rows, _ROWS)):
                kept = [row for row in piece if row]  # an empty line is no record
                if first and sum(len(row) != len(names) for row in kept[:_HEAD]) > _ONE:
                    raise DataError(
                        f"{self.path}: three or more of the first {_HEAD} lines have another number of cells than the"
                        f" header's {len(names)}"
                    )
                first = False
                full = [row if len(row) > most else row + [""] * (most + 1 - len(row)) for row in kept]
                yield {name: [row[place] for row in full] for name, place in zip(columns, places, strict=True)}


def _cells(line: str, mark: str) -> list[str]:
    """Of one line.

    >>> _cells('a,"b, c",d', ","), _cells('a,"b, c', ",")
    (['a', 'b, c', 'd'], ['a', 'b, c'])
    """
    text = line.rstrip("\r\n").replace("\r", " ")
    try:
        return next(csv.reader([text], delimiter=mark), [])
    except csv.Error:  # a cell longer than the module reads
        return text.split(mark)


@dataclass(frozen=True)
class _Parquet:
    """Needs pyarrow."""

    path: Path

    def _file(self) -> Any:
        try:
            from pyarrow import parquet
        except ImportError as error:
            raise ParameterError(f'{self.path} needs pyarrow ({error}): pip install "lipdp[parquet]"') from error
        return parquet.ParquetFile(self.path)

    @property
    def names(self) -> list[str]:
        with parsing(self.path, "write it as Parquet"):
            return list(self._file().schema_arrow.names)

    def pieces(self, columns: Sequence[str]) -> Iterator[Piece]:
        with parsing(self.path, "write it as Parquet"):
            for batch in self._file().iter_batches(batch_size=_ROWS, columns=list(columns)):
                yield {name: batch.column(name).to_pylist() for name in columns}


def reader(path: Path) -> _Parquet | _Csv:
    """Of a file by its ending."""
    return _Parquet(path) if path.suffix == ".parquet" else _Csv(path)


@dataclass(frozen=True)
class TableFile(OwnSource):
    """A table in one file, of which about a fifth is for test; or in two files of a folder, train.csv and test.csv."""

    schema: Schema | None
    owner: str | None = None

    def read(self, root: Path) -> Split:
        path = root / self.path
        if not path.exists():
            raise DataError(f"{path} does not exist")
        if self.schema is None:
            raise ParameterError(
                f"{self.path} needs --schema FILE.toml (schema=), which says what the columns are; `lipdp schema"
                f" {self.path} --out columns.toml` writes one to fill in"
            )
        if path.is_dir():
            x, y, owner = _arrays(part_of(path, "train"), self.schema, self.owner)
            test_x, test_y, _ = _arrays(part_of(path, "test"), self.schema, None)
        else:
            whole_x, whole_y, owner = _arrays(path, self.schema, self.owner)
            train, test = split_off(path, whole_x, whole_y, owner)
            x, y, test_x, test_y = whole_x[train], whole_y[train], whole_x[test], whole_y[test]
            owner = None if owner is None else owner[train]
        if not len(x) or not len(test_x):
            raise DataError(f"{path}: train has {len(x)} records and test {len(test_x)}; both must have some")
        if (lost := int((test_y == NO_LABEL).sum())) > 0:
            raise DataError(
                f"{path}: {lost} of {len(test_y)} test records have no label of {listing(self.schema.classes)} in"
                f" {self.schema.label!r}; drop them, or complete the classes"
            )
        train_x, train_y, held_x, held_y = map(torch.from_numpy, (x, y, test_x, test_y))
        classes = len(self.schema.classes)
        task: Task = "binary" if classes == 2 else "multiclass"
        ids = None if owner is None else owner_ids(path / str(self.owner), owner, count=len(owner))
        return Split(str(self.path), train_x, train_y, held_x, held_y, classes, task, train_owner=ids)


def _arrays(path: Path, schema: Schema, owner: str | None) -> tuple[Any, Any, Any]:
    """Inputs, labels and the names of the owners of one file."""
    _check_names(path, reader(path).names, schema, owner)
    columns = [*schema.names, schema.label, *([] if owner is None or owner in schema.names else [owner])]
    x, y = [np.zeros((0, len(schema.inputs)), np.float32)], [np.zeros(0, np.int64)]
    owners: list[Any] = []
    known = Listed(schema.classes)
    for number, piece in enumerate(reader(path).pieces(columns)):
        places = known(piece[schema.label])
        if number == 0:
            check_head(path, piece, schema)
            if int((places[:_HEAD] < 0).sum()) > _ONE:
                raise DataError(
                    f"{path}: three or more of the first {_HEAD} labels in {schema.label!r} are none of the classes"
                    f" {listing(schema.classes)}"
                )
        x.append(schema.rows(piece))
        y.append(np.where(places < 0, NO_LABEL, places))
        owners += [] if owner is None else piece[owner]
    if any(map(is_missing, owners)):
        raise DataError(f"records of {path} have no {owner!r}; fill it in, or drop them")
    return np.concatenate(x), np.concatenate(y), None if owner is None else np.array(owners).astype(str)


def part_of(folder: Path, part: str) -> Path:
    """The file of a part in a folder; DataError where there is none."""
    found = [folder / f"{part}{suffix}" for suffix in SUFFIXES if (folder / f"{part}{suffix}").is_file()]
    if len(found) != 1:
        raise DataError(f"{folder}: one file {part}.csv or {part}.parquet is needed, there are {len(found)}")
    return found[0]


def read_columns(path: Path, schema: Schema) -> dict[str, list[Any]]:
    """The columns of a file that are inputs, whole; further ones are left out.

    Raises:
        DataError: a column is missing, or of another kind.
    """
    _require(path, reader(path).names, schema.names)
    whole: dict[str, list[Any]] = {name: [] for name in schema.names}
    for number, piece in enumerate(reader(path).pieces(schema.names)):
        if number == 0:
            check_head(path, piece, schema)
        for name in schema.names:
            whole[name] += piece[name]
    return whole


def check_head(path: Path, piece: Piece, schema: Schema) -> None:
    """Refuse a column that is of another kind in all of the first records; what one record holds stops nothing."""
    for column in schema.columns:
        fault = column.check(piece[column.name][:_HEAD])
        if fault is not None:
            raise DataError(f"{path}: in the first {_HEAD} records the column {column.name!r} {fault}")


def schema_template(path: Path) -> str:
    """A schema to fill in, from the names of a file's columns alone."""
    names = reader(path).names
    if not names:
        raise DataError(f"{path} names no columns: its first line must be a header")
    if any(character < " " or character == "\ufffd" for character in "".join(names)):
        raise DataError(f"{path} is not text in UTF-8: give a .csv or .tsv file with a header line, or a .parquet file")
    return template(path.name, names)


def _require(path: Path, names: Sequence[str], needed: Sequence[str]) -> None:
    absent = [name for name in needed if names.count(name) != 1]
    if len(absent) == len(needed):  # the first line may be a record: it is not shown
        raise DataError(f"{path} has no header that names the columns {listing(needed)}; write one")
    if absent:
        raise DataError(f"{path}: the header must name {listing(absent)} once; it has {listing(names, 30)}")


def _check_names(path: Path, names: Sequence[str], schema: Schema, owner: str | None) -> None:
    _require(path, names, [*schema.names, schema.label])
    if owner is not None and owner not in names:
        raise DataError(f"{path} has no column {owner!r}; it has {listing(names, 30)}")
    said = {*schema.names, schema.label, *schema.ignored, *([] if owner is None else [owner])}
    further = [name for name in names if name not in said]
    if further:
        raise DataError(
            f"{path} has the columns {listing(further)}, of which the schema says nothing: add a line such as"
            f' {further[0]!r} = {{kind = "ignore"}}'
        )
