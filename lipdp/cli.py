"""The `lipdp` command: exit code 0 done, 1 an audit refutes the claim, 2 refused with a message, 130 interrupted."""

from __future__ import annotations

import codecs
import io
import logging
import sys
import warnings
from collections.abc import Sequence
from typing import Annotated

import typer

from lipdp.commands.lazily import Entry, lazily
from lipdp.errors import CannotLearnWarning, LipdpError, PeerError

DONE, REFUSED, INTERRUPTED = 0, 2, 130

_COMMANDS = lazily(
    train=Entry("train", "train", "Train a model with differential privacy; report ε and the test accuracy."),
    schema=Entry("schema", "schema", "A schema to fill in, from the names of a table's columns alone."),
    sensitivity=Entry("sensitivity", "sensitivity", "What each parameter of a model costs: Δ, its noise, its share."),
    epsilon=Entry("account", "epsilon", "ε of a run, from its noise, by every accountant.", "EPSILON_EPILOG"),
    calibrate=Entry("account", "calibrate", "The least noise for a target ε, by every accountant.", "CALIBRATE_EPILOG"),
    plan=Entry("plan", "app", "Plan a private run: batch size, noise and steps for a budget, and what they cost."),
    compare=Entry("compare", "app", "The same models under clipping-based DP-SGD: speed, memory, utility, robustness."),
    certify=Entry("certify", "certify", "Certified L2 robustness of a run's model: a radius per test record."),
    audit=Entry("audit", "audit", "Attack the engine as it is installed here, and bound ε from below."),
    export=Entry("use", "export", "Write a trained model for use elsewhere, its input map folded in.", "EXPORT_EPILOG"),
    predict=Entry("use", "predict", "Labels and probabilities of the records in a file, as CSV.", "PREDICT_EPILOG"),
    report=Entry("report", "report", "One page on one run or several: what is private, by how much, and what it cost."),
)  # fmt: skip

app = typer.Typer(
    name="lipdp",
    cls=_COMMANDS,
    help="Differentially private training of Lipschitz networks, without clipping.",
    epilog="Start with: [bold]lipdp train[/bold] (digits, no file needed). Each command has --help with examples.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)


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
    """Warnings of the library as notes on stderr, but for one that a run's header shows."""
    warnings.simplefilter("ignore", CannotLearnWarning)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("note: %(message)s"))
    handler.addFilter(_Once())
    logging.getLogger("lipdp").handlers = [handler]


_SPELLED = {"σ": "sigma", "ε": "epsilon", "δ": "delta", "Δ": "Delta", "√": "sqrt", "≤": "<=", "≥": ">=", "±": "+-"}
_SPELLED |= {"Σ": "sum", "λ": "lambda", "τ": "tau", "·": "*", "×": "x", "→": "->", "–": "-", "…": "...", "‖": "|"}


def _spell(error: UnicodeError) -> tuple[str, int]:
    """Letters that an output lacks (Greek ones in Windows' code pages, all but ASCII in the C locale), in its own."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(_SPELLED.get(c, "?") for c in error.object[error.start : error.end]), error.end


def _spell_output() -> None:
    codecs.register_error("lipdp.spelled", _spell)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="lipdp.spelled")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code. Everything a user can get wrong ends in one message on stderr."""
    _spell_output()
    _speak_up()
    try:
        app(sys.argv[1:] if arguments is None else list(arguments), prog_name="lipdp")
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
