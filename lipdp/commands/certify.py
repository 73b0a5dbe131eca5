"""`lipdp certify`: certified accuracy of a run's model against the radius, beside what an attack leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lipdp.commands.options import option

if TYPE_CHECKING:
    from lipdp.certify.run import LoadedRun, Robustness

EPILOG = """[bold]Examples[/bold]

[green]lipdp certify RUN[/green]  (images: 36/255 to 1 in pixels; tables: a tenth to one column's spread)

[green]lipdp certify RUN --attack --samples 1000[/green]

[green]lipdp certify RUN --radii 0.1 0.25 0.5 --weights ema --json[/green]

RUN then also holds certificate.json, certificate.png and certificate.svg."""


def certify(
    run: Annotated[Path, typer.Argument(help="the folder of a run of lipdp train", metavar="RUN", show_default=False)],
    radii: Annotated[
        list[str] | None,
        typer.Option(help="L2, in units of the raw input; fractions such as 36/255 too", show_default=False),
    ] = None,
    attack: Annotated[bool, typer.Option("--attack", help="also run L2 PGD (foolbox) at every radius")] = False,
    samples: Annotated[
        int | None, typer.Option(help="test records, the first N; default: all", show_default=False)
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(help="model (the last ones) or ema (averaged); default: as the run says", show_default=False),
    ] = None,
    convolution: Annotated[str, typer.Option(help="bound of convolutions: fourier or reshaped")] = "fourier",
    steps: Annotated[int, typer.Option(help="of the attack")] = 40,
    restarts: Annotated[int, typer.Option(help="of the attack")] = 2,
    data_dir: Annotated[str | None, option("data_dir", default="as the run, or $LIPDP_DATA")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of a table")] = False,
) -> None:
    """Certified L2 robustness of a run's model: a radius per test record.

    No input within the radius changes the answer.
    """
    from lipdp.certify import IMAGE_RADII, table_radii
    from lipdp.certify.run import assess, draw, load_run
    from lipdp.errors import ParameterError
    from lipdp.files import read_json, write_json, write_pictures

    if samples is not None and samples < 1:
        raise ParameterError(f"--samples {samples}: at least 1")
    loaded = load_run(run, weights=weights, data_dir=data_dir)
    account = read_json(run / "privacy.json") if (run / "privacy.json").exists() else {}
    default = IMAGE_RADII if loaded.x.dim() > 2 else table_radii(loaded.x)
    asked = [parse_radius(text) for text in radii] if radii else list(default)
    result = assess(
        loaded.model, loaded.x[:samples], loaded.y[:samples], radii=asked, maps=loaded.maps, attack=attack,
        convolution=convolution, steps=steps, restarts=restarts,
    )  # fmt: skip
    certificate = {
        "run": str(run),
        "dataset": loaded.config.dataset,
        "weights": loaded.weights,
        "step": loaded.step,
        **{name: account[name] for name in ("epsilon", "delta") if name in account},
        "unit": _unit(loaded),
        **result.as_dict(),
    }
    figure = draw({"": result}, title=f"{loaded.config.dataset}, {loaded.config.model}", unit=_unit(loaded))
    write_json(run / "certificate.json", certificate)
    write_pictures(figure, run / "certificate")
    if as_json:
        typer.echo(json.dumps(certificate, indent=2))
    else:
        _show(result, loaded, run)


def parse_radius(text: str) -> float:
    """A number, or a fraction.

    >>> parse_radius("51/255"), parse_radius("0.5")
    (0.2, 0.5)
    """
    from lipdp.errors import ParameterError

    above, slash, below = text.partition("/")
    try:
        return float(above) / (float(below) if slash else 1.0)
    except (ValueError, ZeroDivisionError) as error:
        raise ParameterError(
            f"--radii {text!r}: a number such as 0.25, or a fraction such as 36/255, is needed"
        ) from error


def _unit(loaded: LoadedRun) -> str:
    return "L2 radius, pixels in [0, 1]" if loaded.x.dim() > 2 else "L2 radius, units of the table"


def _show(result: Robustness, loaded: LoadedRun, run: Path) -> None:
    from lipdp.commands.console import number, plain_console, plain_table

    certificate = result.certificate
    console = plain_console()
    console.print(
        f"[bold]{loaded.config.dataset}, {loaded.config.model}[/bold]: accuracy {certificate.accuracy():.2%} on"
        f" {len(certificate):,} test records; network {number(certificate.lipschitz)}-Lipschitz"
    )
    shown = {"under PGD": result.attacked is not None, "certified AUROC": result.is_binary}
    table = plain_table(_unit(loaded), "certified", *(heading for heading, wanted in shown.items() if wanted))
    for i, (radius, certified) in enumerate(zip(result.radii, result.certified, strict=True)):
        cells = [number(radius), f"{certified:.2%}"]
        cells += [] if result.attacked is None else [f"{result.attacked[i]:.2%}"]
        cells += [f"{certificate.auroc(radius):.2%}"] if result.is_binary else []
        table.add_row(*cells)
    console.print(table)
    if certificate.accuracy() > 0 and max(result.certified) == 0:
        console.print(
            f"No record is certified this far: the largest radius is {number(float(certificate.radii.max()))}. The"
            f" network may turn a change of length 1 into one of {number(certificate.lipschitz)}. For radii, train"
            " tables with --model linear and images with --certified"
        )
    if result.attacked is not None:
        console.print(
            f"PGD inside certified radii: {result.broken_inside} of {result.attacked_inside:,} samples gave way"
        )
    console.print(f"[dim]{number(certificate.seconds_per_10_000)} s per 10,000 samples; {certificate.method}[/dim]")
    console.print(f"[dim]written to {run / 'certificate.json'}, .png and .svg[/dim]", soft_wrap=True)
