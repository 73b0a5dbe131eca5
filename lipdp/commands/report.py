"""`lipdp report`: runs on one page, for somebody who did not train them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lipdp.commands.options import option

EPILOG = """[bold]Examples[/bold]

[green]lipdp report RUN[/green]  (writes RUN/report.html)

[green]lipdp report RUN1 RUN2 --out both.html[/green]  (side by side)

[green]lipdp report RUN --comparison DIR[/green]  (with what lipdp compare wrote to DIR)

[green]lipdp report RUN --format md[/green]  (a section of a model card, on the terminal)

It shows what lipdp certify RUN and lipdp audit --out RUN left in the folder too."""


def report(
    runs: Annotated[
        list[Path], typer.Argument(help="folders of runs of lipdp train", metavar="RUN...", show_default=False)
    ],
    format: Annotated[str, typer.Option(help="html, json, or md (a section of a model card)")] = "html",
    out: Annotated[
        Path | None,
        typer.Option(help="default: RUN/report.html, report.html for several; the terminal", show_default=False),
    ] = None,
    comparison: Annotated[Path | None, typer.Option(help="the folder of a lipdp compare", show_default=False)] = None,
    data_dir: Annotated[str | None, option("data_dir", default="as the run, or $LIPDP_DATA")] = None,
    calibrate: Annotated[
        bool, typer.Option("--calibration/--no-calibration", help="evaluate the model on its test records")
    ] = True,
    run_code: Annotated[
        bool, typer.Option("--run-code", help="build models given as module:function, which runs their code")
    ] = False,
) -> None:
    """One page on one run or several: what is private, by how much, and what it cost."""
    from lipdp.errors import ParameterError, UnknownNameError
    from lipdp.files import written_whole
    from lipdp.report import FORMATS, gather, render

    if format not in FORMATS:
        raise UnknownNameError("format", format, FORMATS)
    if out is not None and out.is_dir():
        raise ParameterError(f"--out {out} is a folder: give the name of a file, e.g. {out / f'report.{format}'}")
    made = gather(runs, comparison=comparison, data_dir=data_dir, calibrate=calibrate, run_code=run_code)
    text = render(made, format)
    if out is None and format != "html":
        typer.echo(text, nl=False)
        return
    path = out or (runs[0] / "report.html" if len(runs) == 1 else Path("report.html"))
    with written_whole(path) as stream:
        stream.write(text.encode(errors="replace"))
    for one in made.runs:
        for notice in one.notices:
            typer.echo(f"{'warning' if notice.alarm else 'note'}: {one.run.name}: {notice.title}", err=True)
    typer.echo(f"written to {path}")
