"""`lipdp audit`: a lower bound on ε from attacks on the engine, beside what it claims."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from lipdp.audit.suite import Suite, write
from lipdp.commands.options import with_config
from lipdp.errors import ParameterError

VIOLATED = 1

EPILOG = """[bold]Examples[/bold]

[green]lipdp audit --epsilon 4 --out DIR[/green]

[green]lipdp audit --epsilon 1 --method gradient-canaries --canaries 65536[/green]  (seconds)

[green]lipdp audit --epsilon 1 --method gradient-canaries --bands 4[/green]  (correlated noise)

[green]lipdp audit --epsilon 8 --method many-runs --runs 20000 --confidence 0.99[/green]

Exit code: 0 consistent, 1 a lower bound is above the claim, 2 refused.
DIR then holds audit.json and audit.png."""


@with_config(Suite, "delta", "allocation", "accountant", "bands")
def audit(
    suite: Suite,
    out: Annotated[Path | None, typer.Option(help="folder for audit.json and audit.png")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of a table")] = False,
) -> None:
    """Attack the engine as it is installed here, and bound ε from below.

    The better the attacks guess who took part, the larger the bound.
    """
    from lipdp.commands.bars import step_bar
    from lipdp.commands.console import plain_console, plain_table

    if out is not None and out.exists() and not out.is_dir():
        raise ParameterError(f"--out {out} is not a folder; give one, or a path where nothing is")
    with step_bar(plain_console(stderr=True)) as progress:
        result = suite.run(progress)
    paths = write(result, out) if out is not None else ()
    if as_json:
        typer.echo(json.dumps(result.as_dict(), indent=2))
    else:
        console = plain_console()
        table = plain_table("audit", "trials", "right", "claimed", "ε at least", "conf.", "verdict")
        for one in result.results:
            table.add_row(
                one.experiment,
                f"{one.trials}",
                f"{one.correct}/{one.guesses}",
                f"{one.claimed_epsilon:.2f}",
                f"{one.lower_bound:.2f}",
                f"{one.confidence:.3f}",
                "VIOLATED" if one.violated else "consistent",
            )
        console.print(table)
        best = result.strongest
        console.print(
            f"ε ≥ {best.lower_bound:.3f} at δ = {suite.delta:g} with confidence {suite.confidence:g} (all audits"
            f" together); claimed {best.claimed_epsilon:.3f}: [bold]{best.verdict}[/bold]"
        )
        if result.left_out:
            console.print(result.left_out)
        for path in paths:
            console.print(f"[dim]written to {path}[/dim]", soft_wrap=True)
    if result.violated:
        raise typer.Exit(VIOLATED)
