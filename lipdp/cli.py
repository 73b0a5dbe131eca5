"""The `lipdp` command: exit code 0 done, 1 an audit refutes the claim, 2 refused with one readable message, 130 interrupted."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from lipdp.commands import account, audit, certify, compare, plan, report, sensitivity, train
from lipdp.errors import LipdpError, PeerError

DONE, REFUSED, INTERRUPTED = 0, 2, 130
_LISTS = (
    "--input-shape",
    "--batch-sizes",
    "--trainers",
    "--kinds",
    "--datasets",
    "--epsilons",
    "--radii",
    "--taus",
    "--devices",
    "--sizes",
)  # options that take several values in a row

app = typer.Typer(
    name="lipdp",
    help="Differentially private training of Lipschitz networks, without clipping.",
    epilog="Start with: [bold]lipdp train[/bold] (digits, no file needed). Each command has --help with examples.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
app.command(epilog=train.EPILOG)(train.train)
app.command(epilog=sensitivity.EPILOG)(sensitivity.sensitivity)
app.command(epilog=account.EPSILON_EPILOG)(account.epsilon)
app.command(epilog=account.CALIBRATE_EPILOG)(account.calibrate)
app.command(epilog=audit.EPILOG)(audit.audit)
app.command(epilog=certify.EPILOG)(certify.certify)
app.command(epilog=report.EPILOG)(report.report)
app.add_typer(plan.app, name="plan")
app.add_typer(compare.app)


def _show_version(wanted: bool) -> None:
    if wanted:
        from lipdp import __version__

        typer.echo(f"lipdp {__version__}")
        raise typer.Exit(DONE)


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Differentially private training of Lipschitz networks, without clipping."""


def expand_lists(arguments: Sequence[str]) -> list[str]:
    """`--input-shape 1 28 28` as typer wants it, the option before every value.

    >>> expand_lists(["--input-shape", "1", "28", "--json"])
    ['--input-shape', '1', '--input-shape', '28', '--json']
    """
    expanded: list[str] = []
    current, fresh = "", False
    for argument in arguments:
        if argument in _LISTS:
            current, fresh = argument, True
        elif current and not argument.startswith("-"):
            expanded += [] if fresh else [current]
            fresh = False
        else:
            current = ""
        expanded.append(argument)
    return expanded


class _Once(logging.Filter):
    """Lets the first of several messages of one kind through; a search repeats them by the dozen."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether this kind is new."""
        new = record.msg not in self._seen
        self._seen.add(str(record.msg))
        return new


def _speak_up() -> None:
    """Warnings of the library as notes on stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("note: %(message)s"))
    handler.addFilter(_Once())
    logging.getLogger("lipdp").handlers = [handler]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code. Everything a user can get wrong ends in one message on stderr."""
    _speak_up()
    try:
        app(expand_lists(sys.argv[1:] if arguments is None else arguments), prog_name="lipdp")
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else DONE if ended.code is None else 1
    except PeerError:  # the process that refused says why
        return REFUSED
    except LipdpError as error:
        return _refuse(str(error))
    except KeyboardInterrupt as interrupt:
        typer.echo(str(interrupt) or "interrupted", err=True)
        return INTERRUPTED
    except OSError as error:
        return _refuse(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except MemoryError:
        return _refuse("out of memory; try --microbatch 256, or a smaller --batch-size")
    except RuntimeError as error:
        if not any(sign in str(error) for sign in ("out of memory", "allocate memory")):
            raise
        return _refuse(f"out of memory ({str(error).splitlines()[0]}); try --microbatch 256, or --device cpu")
    return DONE


def _refuse(message: str) -> int:
    typer.echo(f"error: {message}", err=True)
    return REFUSED
