"""Groups of commands of which the help needs nothing but a name and a sentence: a command is imported when it runs."""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, ClassVar

import typer
from typer.core import TyperCommand, TyperGroup

from lipdp.errors import LipdpError, PeerError

INTERRUPTED = 130
_ARGUMENT = re.compile(
    r"\w\([^()]*\)"  # a call
    r"| \((?P<again>\w+)=[^()\s]*\)"  # the option in Python, in brackets after it
    r"|(?<![\w.,:/\\'-])(?:expected_|target_)?(?P<name>[a-z]\w*)\b(?!\.[a-z])"
    r"(?:=True\b|(?P<given>='(?P<word>[\w./:-]+)'|=(?=[^\s,;:)]))|=)?"
)


@dataclass(frozen=True)
class Entry:
    """A command that is not imported yet: its module of `lipdp.commands`, and what is there."""

    module: str
    name: str
    help: str
    epilog: str = "EPILOG"

    def load(self, name: str) -> Any:
        """The command itself, as typer makes it."""
        module = import_module(f"lipdp.commands.{self.module}")
        found = getattr(module, self.name)
        if not isinstance(found, typer.Typer):
            from lipdp.commands.options import Command

            found, function = typer.Typer(rich_markup_mode="rich", add_completion=False), found
            found.command(name, cls=Command, epilog=getattr(module, self.epilog))(function)
        command = typer.main.get_command(found)
        command.name = name
        return command


class _Stub(TyperCommand):
    """Stands for a command in its group's help, and makes way for it where it is called."""

    def __init__(self, name: str, entry: Entry) -> None:
        super().__init__(name=name, help=entry.help)
        self._load = entry.load

    def make_context(self, info_name: Any, args: list[str], parent: Any = None, **extra: Any) -> Any:
        return self._load(str(self.name)).make_context(info_name, args, parent=parent, **extra)


def with_options_named(message: str, parameters: Iterable[Any]) -> str:
    """A message of the library, with its arguments as the options of a command: `steps=3` as `--steps 3`.

    So is a bare name of several words, such as `batch_size`, but not `model`, which may be a word of the sentence, nor
    what stands in a call, as in `Clip(lower=0.0)`.
    """
    flags = {one.name: max(one.opts, key=len) for one in parameters if one.opts[0].startswith("-")}

    def named(found: re.Match[str]) -> str:
        if found["again"] in flags:
            return ""
        flag = flags.get(found["name"] or "")
        if flag is None or not re.search("[_=]", found[0]):
            return found[0]
        return f"{flag} {found['word'] or ''}" if found["given"] else flag

    return _ARGUMENT.sub(named, message)


class Invoked:
    """A command that ends with exit code 130 at SIGINT and SIGTERM, whatever typer's version makes of them, and whose
    refusals name its options."""

    def invoke(self, ctx: Any) -> Any:
        """Run it."""
        main = threading.current_thread() is threading.main_thread()
        before = signal.signal(signal.SIGTERM, signal.default_int_handler) if main else None
        try:
            return super().invoke(ctx)  # type: ignore[misc]
        except KeyboardInterrupt as interrupt:
            typer.echo(str(interrupt) or "interrupted", err=True)
            raise typer.Exit(INTERRUPTED) from interrupt
        except LipdpError as error:
            if isinstance(error, PeerError) or ctx.invoked_subcommand is not None:
                raise
            raise LipdpError(with_options_named(str(error), ctx.command.params)) from error
        finally:
            if main:
                signal.signal(signal.SIGTERM, before)


class LazyGroup(Invoked, TyperGroup):
    """A group whose commands are imported when they run; `commands` imports all of them."""

    entries: ClassVar[Mapping[str, Entry]]

    @property
    def commands(self) -> dict[str, Any]:
        """Name → command."""
        return {name: entry.load(name) for name, entry in self.entries.items()}

    @commands.setter
    def commands(self, found: Mapping[str, Any]) -> None:
        """typer registers none."""

    def list_commands(self, ctx: Any) -> list[str]:
        """The names, in the order of the help."""
        return list(self.entries)

    def get_command(self, ctx: Any, cmd_name: str) -> TyperCommand | None:
        """What stands for the command."""
        return _Stub(cmd_name, self.entries[cmd_name]) if cmd_name in self.entries else None


def lazily(**entries: Entry) -> type[LazyGroup]:
    """The class of a group of these commands, for `typer.Typer(cls=...)`."""
    return type("LazyCommands", (LazyGroup,), {"entries": entries})
