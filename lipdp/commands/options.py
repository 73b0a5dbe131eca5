"""What the subcommands share: options that take `key=value`, and a shape."""

from __future__ import annotations

import ast
import functools
import json
import signal
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import typer

from lipdp.errors import ParameterError

INTERRUPTED = 130


def interruptible(function: Callable[..., None]) -> Callable[..., None]:
    """A subcommand that ends with exit code 130 at SIGINT and SIGTERM, whatever typer's version makes of them."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        main = threading.current_thread() is threading.main_thread()
        before = signal.signal(signal.SIGTERM, signal.default_int_handler) if main else None
        try:
            function(*args, **kwargs)
        except KeyboardInterrupt as interrupt:
            typer.echo(str(interrupt) or "interrupted", err=True)
            raise typer.Exit(INTERRUPTED) from interrupt
        finally:
            if main:
                signal.signal(signal.SIGTERM, before)

    return wrapped


def parse_options(name: str, pairs: Iterable[str] | None) -> dict[str, Any] | None:
    """`["width=32", "gates=[null, 0.1]"]` as a dict; values are JSON or Python literals, else plain text.

    >>> parse_options("--model-option", ["width=32", "gates=[null, 0.1]", "kind=deep"])
    {'width': 32, 'gates': [None, 0.1], 'kind': 'deep'}
    """
    if not pairs:
        return None
    found = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key.isidentifier():
            raise ParameterError(f"{name} {pair!r}: key=value is needed, e.g. {name} width=32")
        found[key] = _value(text)
    return found


def _value(text: str) -> Any:
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return text


def parse_shape(sizes: Sequence[str]) -> tuple[int, ...]:
    """`["1", "28", "28"]`, or `["1x28x28"]`, as a tuple.

    >>> parse_shape(["1x28x28"])
    (1, 28, 28)
    """
    try:
        shape = tuple(int(size) for item in sizes for size in item.replace(",", "x").split("x"))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise ParameterError(f"--input-shape {' '.join(sizes)}: sizes of one sample are needed, e.g. 1 28 28, or 30")
    return shape


def parse_gate(text: str | None) -> float | str | None:
    """A number, or "off"."""
    if text is None or text == "off":
        return text
    try:
        return float(text)
    except ValueError as error:
        raise ParameterError(f"--gate {text!r}: a number > 0 is needed, or off") from error
