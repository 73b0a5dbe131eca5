"""`lipdp export` and `lipdp predict`: a trained model in use."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

EXPORT_EPILOG = """[bold]Examples[/bold]

[green]lipdp export RUN model.onnx[/green]  (raw inputs in, probabilities out; no lipdp needed to use it)

[green]lipdp export RUN model.pt2[/green]  (torch.export)

[green]lipdp export RUN FOLDER[/green]  (safetensors, configuration, privacy statement and model card)"""

PREDICT_EPILOG = """[bold]Examples[/bold]

[green]lipdp predict RUN records.npy[/green]  (or .npz with an array X, or .csv)

[green]lipdp predict RUN records.csv --out predictions.csv[/green]"""

_Run = Annotated[Path, typer.Argument(help="of lipdp train, or what lipdp export wrote", metavar="RUN")]
_Weights = Annotated[
    str | None, typer.Option(help="model (the last ones) or ema (averaged); default: the run's", show_default=False)
]
_Code = Annotated[bool, typer.Option("--run-code", help="run a module:function that the run names")]


def export(
    run: _Run,
    path: Annotated[Path, typer.Argument(help="FILE.onnx, FILE.pt2 or a folder", metavar="PATH")],
    weights: _Weights = None,
    run_code: _Code = False,
) -> None:
    """Write a trained model for use elsewhere, its input map folded in."""
    from lipdp.serving import load

    written = load(run, weights=weights, run_code=run_code).export(path)
    typer.echo(f"written to {written}", err=True)


def predict(
    run: _Run,
    file: Annotated[Path, typer.Argument(help="raw records: .npy, .npz (X), .csv or .parquet", metavar="FILE")],
    weights: _Weights = None,
    run_code: _Code = False,
    out: Annotated[Path | None, typer.Option(help="a CSV file; default: standard output", show_default=False)] = None,
) -> None:
    """Labels and probabilities of the records in a file, as CSV."""
    from lipdp.files import write_bytes
    from lipdp.serving import load, read_records
    from lipdp.serving.files import predictions_csv

    model = load(run, weights=weights, run_code=run_code)
    text = predictions_csv(model, read_records(file, model.schema))
    if out is None:
        typer.echo(text, nl=False)
    else:
        write_bytes(out, text.encode())
