"""What the subcommands share: the settings of a run as options, options with several values, and what texts mean.

The declarations, which need torch for the names that they list, are imported by those commands that take them.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import MISSING, dataclass, fields
from functools import partial
from types import GenericAlias
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer
from typer.core import TyperCommand

from lipdp.commands.lazily import Invoked
from lipdp.errors import ParameterError
from lipdp.training.settings import GATE, LIST, OPTIONS, SCHEMA, Setting, read_value

Subcommand = Callable[..., None]


class Command(Invoked, TyperCommand):
    """A command whose options that may be repeated take several values in a row as well: `--input-shape 1 28 28`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As `--input-shape 1 --input-shape 28 …`."""
        repeated = {flag for one in self.params if getattr(one, "multiple", False) for flag in one.opts}
        return super().parse_args(ctx, repeat_options(args, repeated))


def repeat_options(arguments: Sequence[str], repeated: Collection[str]) -> list[str]:
    """The arguments with the option before every value of those of its values that stand in a row."""
    expanded: list[str] = []
    current, fresh = "", False
    for argument in arguments:
        if argument in repeated:
            current, fresh = argument, True
        elif current and not argument.startswith("-"):
            expanded += [] if fresh else [current]
            fresh = False
        else:
            current = ""
        expanded.append(argument)
    return expanded


def option(name: str, *, default: str | None = None, panel: str | None = None) -> Any:
    """The option of a setting of a run as it is declared; `default`, in words, where this command's is another."""
    from lipdp.training.config import SETTINGS

    one = SETTINGS[name]
    words = one.default if default is None else default
    help = f"{one.description} (default: {words})" if words else one.description
    flag = [one.flag] if one.kind is OPTIONS else []
    return typer.Option(*flag, help=help, show_default=False, metavar=one.metavar, rich_help_panel=panel)


@dataclass(frozen=True)
class _Option:
    """An option made of a declaration: of a setting of a run, or of a field of a configuration."""

    name: str
    parameter: inspect.Parameter
    parsed: Callable[[Any], Any]


def with_settings(*names: str, **defaults: Any) -> Callable[[Subcommand], Subcommand]:
    """A subcommand with the options of settings of a run; its first argument is a dict of what was given of them.

    typer makes them from a signature that follows the declarations; tyro and cyclopts read a dataclass themselves, but
    the other commands, their messages and their exit codes are typer's. The options are those of the settings named
    (none: all) and of `defaults`: what this command takes where they are not given; `...` if they must be.
    """
    from lipdp.training.config import SETTINGS

    def made(name: str) -> _Option:
        default = defaults.get(name)
        words = None if name not in defaults else "" if default in (None, ...) else str(default)
        return _of_setting(SETTINGS[name], default, words, None if names or defaults else SETTINGS[name].panel)

    return _taking([made(name) for name in (*names, *defaults) or SETTINGS], dict)


def with_config(kind: type, *names: str, **parsers: Callable[[str], Any]) -> Callable[[Subcommand], Subcommand]:
    """A subcommand with the options of a dataclass; its first argument is an object of it.

    They are the fields whose type is annotated with a text, which is the option's help, and the settings of a run among
    the fields that are named. A field with a parser takes texts.
    """
    if names:
        from lipdp.training.config import SETTINGS
    declared, hints = {one.name: one for one in fields(kind)}, get_type_hints(kind, include_extras=True)
    chosen = []
    for name in (*names, *(name for name, hint in hints.items() if get_origin(hint) is Annotated)):
        default = ... if declared[name].default is MISSING else declared[name].default
        if name in names:
            chosen.append(_of_setting(SETTINGS[name], default, None if default is None else str(default), None))
        else:
            chosen.append(_of_field(name, default, parsers.get(name), *get_args(hints[name])))
    return _taking(chosen, lambda given: kind(**given))


def _of_setting(one: Setting, default: Any, words: str | None, panel: str | None) -> _Option:
    info, taken = option(one.name, default=words, panel=panel), one.kind.option
    return _Option(one.name, _parameter(one.name, taken, info, default), partial(_parsed, one))


def _of_field(
    name: str, default: Any, parser: Callable[[str], Any] | None, taken: Any, help: str, flag: str = ""
) -> _Option:
    if get_origin(taken) is not Sequence:
        flag = f"--{name.replace('_', '-')}" if default is False else flag  # without its opposite
        info = typer.Option(*filter(None, [flag]), help=help, show_default=default is not False)
        return _Option(name, _parameter(name, taken, info, default), lambda value: value)
    (item,) = get_args(taken)
    values = [] if default is ... else [f"{value:.3g}" if item is float else str(value) for value in default]
    listed = f"; default {' '.join(values)}" if values else ""
    info = typer.Option(*filter(None, [flag]), help=f"{help}{listed} (several values in a row)", show_default=False)
    lists = GenericAlias(list, item if parser is None else str)
    parameter = _parameter(name, lists, info, ... if default is ... else None)
    return _Option(name, parameter, lambda texts: tuple(map(parser or item, texts)) if texts else None)


def _parameter(name: str, taken: Any, info: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        annotation=Annotated[taken if taken is bool else taken | None, info],
        default=inspect.Parameter.empty if default is ... else default,
    )


def _taking(options: Sequence[_Option], made: Callable[[dict[str, Any]], Any]) -> Callable[[Subcommand], Subcommand]:
    """A subcommand with these options beside its own; its first argument is made of those that were given."""

    def decorate(function: Subcommand) -> Subcommand:
        own = list(inspect.signature(function, eval_str=True).parameters.values())[1:]
        keyword = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in own]
        parameters = sorted([*(one.parameter for one in options), *keyword], key=_may_be_left_out)

        @functools.wraps(function)
        def command(**arguments: Any) -> None:
            given = {one.name: one.parsed(arguments.pop(one.parameter.name)) for one in options}
            function(made({name: value for name, value in given.items() if value is not None}), **arguments)

        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {one.name: one.annotation for one in parameters}
        return command

    return decorate


def _may_be_left_out(one: inspect.Parameter) -> bool:
    return one.default is not inspect.Parameter.empty


def _parsed(one: Setting, value: Any) -> Any:
    if one.kind is OPTIONS:
        value = parse_options(one.flag, value)
    elif one.kind is LIST and value is not None:
        value = [read_value(text.strip()) for text in value.split(",")]
    elif one.kind is GATE:
        value = parse_gate(value)
    if value not in (None, "off") and one.kind is not SCHEMA:  # a path, which is read later
        one.check(value)
    return value


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
        found[key] = read_value(text)
    return found


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
