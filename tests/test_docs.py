"""The pages do what they say: their Python runs, their commands are accepted, their references are complete."""

import json
import re
import runpy
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

import lipdp
from lipdp import bounds
from lipdp.cli import app

ROOT = Path(__file__).parents[1]
PAGES = sorted(ROOT.glob("docs/*.md"))
RUN_ELSEWHERE = {"dynamics.md": "test_dynamics.test_the_page_shows_what_it_prints"}
NOTEBOOKS = sorted(ROOT.glob("examples/*.ipynb"))
BLOCK = re.compile(
    r"(<!-- not run: .+? -->\n)?```(\w*)\n(.*?)```", re.S
)  # a mark is an HTML comment: readers don't see it
QUICK = ("epsilon", "calibrate", "sensitivity")  # commands that answer at once: these are run as they stand


@pytest.fixture
def _rules():
    """A page may add a rule; it is gone afterwards."""
    known = dict(bounds.rules._RULES)
    yield
    bounds.rules._RULES.clear()
    bounds.rules._RULES.update(known)


def run_blocks(blocks, name, names=()):
    names = dict(names) | {"__name__": "__main__"}
    for number, code in enumerate(blocks):
        exec(compile(code, f"{name}, block {number}", "exec"), names)


@pytest.mark.parametrize("path", [p for p in PAGES if p.name not in RUN_ELSEWHERE], ids=lambda p: p.name)
@pytest.mark.usefixtures("_rules")
def test_the_python_of_a_page_runs_as_written(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = [code for mark, kind, code in BLOCK.findall(path.read_text()) if kind == "python" and not mark]
    run_blocks(blocks, path.name, {"torch": torch, "lipdp": lipdp})
    if path.name == "port.md":
        assert float(re.search(r"accuracy ([\d.]+)", capsys.readouterr().out)[1]) > 0.75  # private, so not repeatable
        assert (tmp_path / "run.pt").exists()


def test_few_blocks_are_left_out():
    found = [mark for path in PAGES for mark, kind, _ in BLOCK.findall(path.read_text()) if kind == "python"]
    assert sum(map(bool, found)) <= len(found) / 5


def commands():
    """The calls of lipdp in the pages, one line each, without comments."""
    for path in PAGES:
        for _, kind, code in BLOCK.findall(path.read_text()):
            for line in code.replace("\\\n", " ").splitlines() if kind == "sh" else []:
                words = shlex.split(line, comments=True)
                if "lipdp" in words and words[0] in ("lipdp", "torchrun"):
                    yield pytest.param(words[words.index("lipdp") + 1 :], id=f"{path.stem}: {line.strip()[:50]}")


@pytest.mark.parametrize("words", [*commands()])
def test_a_command_of_the_pages_is_accepted(words):
    run = words[0] in QUICK and not any(word.isupper() for word in words)
    result = CliRunner().invoke(app, words if run else [*words, "--help"])
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_a_notebook_runs_and_holds_no_output(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    notebook = json.loads(path.read_text())
    assert notebook["nbformat"] == 4
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in cells)
    run_blocks(["".join(cell["source"]) for cell in cells], path.name)


def test_the_references_hold_every_public_name_and_command():
    hooks = site_hooks()
    for room in hooks.ROOMS:
        public = getattr(getattr(lipdp, room), "__all__", None)
        page = hooks.api_page(room)
        assert public is None or all(f"heading: {n}\n" in page or f"## {n}\n" in page for n in public)
    page = hooks.command_page()
    assert all(f"## lipdp {name}\n" in page for name in ("train", "audit", "plan simulate", "compare speed"))
    assert "`--noise-multiplier`" in page


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.name)
def test_a_page_is_on_a_shelf_and_its_pictures_are_there(path):
    assert f" {path.name}\n" in (ROOT / "mkdocs.yml").read_text(), "name the page in the nav of mkdocs.yml"
    assert all((path.parent / name).exists() for name in re.findall(r"!\[.*?\]\((.*?)\)", path.read_text()))


def test_the_pictures_are_drawn_from_the_tables(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["draw.py", str(tmp_path)])
    runpy.run_path(str(ROOT / "docs" / "draw.py"), run_name="__main__")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["privacy-utility.svg", "speed.svg"]


def test_formulas_become_mathml():
    shown = site_hooks().on_page_content(r'<p><span class="arithmatex">\(\sigma &lt; 2\)</span></p>')
    assert shown.startswith("<p><math")
    assert "<mn>2</mn>" in shown


def site_hooks():
    pytest.importorskip("mkdocs")
    pytest.importorskip("latex2mathml")
    return SimpleNamespace(**runpy.run_path(str(ROOT / "docs" / "hooks.py")))
