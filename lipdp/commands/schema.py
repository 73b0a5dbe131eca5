"""`lipdp schema`: a file to fill in, which says what is public of a table's columns."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

EPILOG = """[bold]Examples[/bold]

[green]lipdp schema people.csv --out columns.toml[/green]  (then say what each column is)

[green]lipdp train --dataset people.csv --schema columns.toml --epsilon 1 --dry-run[/green]"""


def schema(
    file: Annotated[Path, typer.Argument(help=".csv, .tsv or .parquet", metavar="FILE")],
    out: Annotated[Path | None, typer.Option(help="a new file; default: standard output", show_default=False)] = None,
) -> None:
    """A schema to fill in, from the names of a table's columns alone."""
    from lipdp.data import schema_template
    from lipdp.errors import ParameterError
    from lipdp.files import write_bytes

    text = schema_template(file)
    if out is None:
        typer.echo(text, nl=False)
    elif out.exists():
        raise ParameterError(f"{out} exists: give another name")
    else:
        write_bytes(out, text.encode())
        typer.echo(f"written to {out}: say what each column is", err=True)
