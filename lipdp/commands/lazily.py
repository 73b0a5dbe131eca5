"""Groups of commands of which the help needs nothing but a name and a sentence: a command is imported when it runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, ClassVar

import typer
from typer.core import TyperCommand, TyperGroup


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


class LazyGroup(TyperGroup):
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
