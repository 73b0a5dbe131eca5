"""What mkdocs adds to the pages: the API and command line references, the notebooks as pages, formulas as MathML.

Nothing here is a second copy. The API pages name what the `__init__.py` of each room offers. The page of the command is
read off its declarations. The notebooks are those of examples/.
"""

from __future__ import annotations

import ast
import html
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import griffe
import typer
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

import lipdp
from lipdp.cli import app

ROOT = Path(__file__).parents[1]
ROOMS = lipdp._ROOMS.split()


def on_config(config: MkDocsConfig) -> None:
    """The rooms' pages at the end of the shelf "Reference"."""
    rooms = [{f"lipdp.{room}": f"api/{room}.md"} for room in ROOMS]
    shelf = next(entry["Reference"] for entry in config.nav if "Reference" in entry)
    shelf.append({"API": [{"lipdp": "api/lipdp.md"}, *rooms]})


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """The pages that are not written by hand."""
    pages = {"api/lipdp.md": api_page("")} | {f"api/{room}.md": api_page(room) for room in ROOMS}
    pages["command.md"] = command_page()
    pages |= {f"notebooks/{path.stem}.md": notebook_page(path) for path in sorted(ROOT.glob("examples/*.ipynb"))}
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_content(text: str, **_: Any) -> str:
    """Formulas, as browsers show them without a script."""
    for pattern, display in (
        (r'<span class="arithmatex">\\\((.*?)\\\)</span>', "inline"),
        (r'<div class="arithmatex">\\\[(.*?)\\\]</div>', "block"),
    ):
        text = re.sub(pattern, lambda m, d=display: shown(m[1], d), text, flags=re.S)
    return text


def shown(formula: str, display: str) -> str:
    """LaTeX as MathML; a wide formula scrolls on a telephone."""
    mathml = convert(html.unescape(formula).strip(), display=display)
    return mathml if display == "inline" else f'<div style="overflow-x: auto">{mathml}</div>'


# -- API ---------------------------------------------------------------------------------------------------------------


def source(room: str) -> Path:
    """The file that names what a room offers."""
    tree = ROOT if room == "models" else ROOT / "lipdp"
    return next(p for p in (tree / room / "__init__.py", tree / f"{room}.py") if p.exists())


def offered(room: str) -> dict[str, str]:
    """Public name → the module that defines it, read off the room's file without importing it."""
    path = source(room)
    tree = ast.parse(path.read_text())
    here = "models" if room == "models" else f"lipdp.{room}".rstrip(".")
    if path.name != "__init__.py":
        kinds = (ast.ClassDef, ast.FunctionDef)
        return {n.name: here for n in tree.body if isinstance(n, kinds) and not n.name.startswith("_")}
    names = {}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom):
            module = f"{here}.{node.module}" if node.level else node.module
            names |= {alias.asname or alias.name: module for alias in node.names}
        for table in [n for n in ast.walk(node) if isinstance(n, ast.Dict)]:  # of a lazy façade
            try:
                names |= ast.literal_eval(table)
            except ValueError:  # {room: … for room in …}
                continue
    names = {n: here if m == f".{n}" else m for n, m in names.items()}  # a module of the room
    return {n: m for n, m in names.items() if not n.startswith("_") and n != "facade"}


def origin(module: str, name: str) -> str | None:
    """The other library that a name comes from, if one."""
    file = ROOT / (module.replace(".", "/") + ".py")
    imports = [n for n in ast.parse(file.read_text()).body if isinstance(n, ast.ImportFrom)] if file.exists() else []
    return next(
        (n.module for n in imports if name in [a.name for a in n.names] and not n.module.startswith("lipdp")), None
    )


def api_page(room: str) -> str:
    """One `:::` for what a room is about, and one for each of its public names."""
    title = "lipdp" if not room else f"lipdp.{room}"
    parts = [f"# {title}", fenced(ast.get_docstring(ast.parse(source(room).read_text())) or "")]
    for name, module in sorted(offered(room).items(), key=lambda item: item[0].lower()):
        if not room and name in ROOMS and module == "lipdp":
            continue  # a room has a page of its own
        if not room and any(offered(other).get(name) == module for other in ROOMS):
            parts.append(f"## {name}\n\nSee [`{module}.{name}`][{module}.{name}].")
        elif borrowed := origin(module, name):
            parts.append(f"## {name}\n\nThe class of that name in `{borrowed}`, as it is.")
        else:
            parts.append(f"::: {module}.{name}\n    options:\n      heading: {name}\n      toc_label: {name}")
    return "\n\n".join(parts)


def fenced(text: str) -> str:
    """A docstring with its doctests as code blocks."""
    return re.sub(r"^>>> .*\n?(?:^\S.*\n?)*", lambda m: f"\n```pycon\n{m[0].rstrip()}\n```\n", text, flags=re.M)


class Doctests(griffe.Extension):
    """Doctests of the docstrings as code blocks: markdown would read `>>>` as a quotation."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = fenced(obj.docstring.value)


# -- command line ------------------------------------------------------------------------------------------------------


def commands(group: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Every command below a group, with its full name."""
    for name, command in group.commands.items():
        yield f"{path} {name}", command
        if hasattr(command, "commands"):
            yield from commands(command, f"{path} {name}")


def command_page() -> str:
    """Every command, its arguments and options, as `--help` has them."""
    parts = ["# Command line", "Every option of every command, as `lipdp COMMAND --help` shows them."]
    for name, command in commands(typer.main.get_command(app), "lipdp"):
        parts += [f"## {name}", plain(command.help), examples(command.epilog)]
        panels: dict[str, list[str]] = {}
        for option in command.params:
            if option.name != "help":
                panels.setdefault(getattr(option, "rich_help_panel", None) or "", []).append(row(option))
        for panel, rows in panels.items():
            parts += [f"**{panel}**" if panel else "", "| option | meaning |\n|---|---|\n" + "\n".join(rows)]
    return "\n\n".join(part for part in parts if part)


def row(option: Any) -> str:
    names = option.opts if option.opts[0].startswith("-") else [option.metavar or option.name.upper()]
    names = ", ".join(f"`{name}`" for name in [*names, *option.secondary_opts])
    return f"| {names} | {plain(getattr(option, 'help', '')).replace('|', chr(92) + '|')} |"


def plain(text: str | None) -> str:
    """Help without rich's markup, safe in markdown."""
    return html.escape(re.sub(r"\[/?[a-z ]+\]", "", text or ""), quote=False).replace("*", r"\*").replace("_", r"\_")


def examples(epilog: str | None) -> str:
    """The examples of a command's help, as a block of code."""
    lines = re.findall(r"\[green\](.*?)\[/green\](?: +\((.*)\))?", epilog or "")
    return (
        "```sh\n" + "\n".join(f"{line}  # {note}" if note else line for line, note in lines) + "\n```" if lines else ""
    )


# -- notebooks ---------------------------------------------------------------------------------------------------------


def notebook_page(path: Path) -> str:
    """The cells of a notebook one after the other."""
    cells = json.loads(path.read_text())["cells"]
    parts = [
        "".join(c["source"]) if c["cell_type"] == "markdown" else f"```python\n{''.join(c['source'])}\n```"
        for c in cells
    ]
    return "\n\n".join([*parts, f"This page is `examples/{path.name}`, a notebook that the tests run."])
