"""The README does what it says: its Python runs as written, its commands exist, its files are there."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import lipdp
from lipdp import bounds
from lipdp.cli import app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)


def test_the_quick_start_runs_as_written(capsys):
    exec(compile(BLOCKS[0], "README", "exec"), {"__name__": "__main__"})
    printed = capsys.readouterr().out
    epsilon, accuracy = map(float, re.findall(r"\d+\.\d+", printed))
    assert 2.9 < epsilon <= 3.0
    assert accuracy > 0.6  # chance is 0.1; the run is private, so it is not repeatable
    assert len(BLOCKS[0].strip().splitlines()) <= 20


def test_the_layer_example_runs_as_written():
    known = dict(bounds.rules._RULES)
    try:
        exec(compile(BLOCKS[1], "README", "exec"), {"torch": torch, "lipdp": lipdp})
    finally:
        bounds.rules._RULES.clear()
        bounds.rules._RULES.update(known)


@pytest.mark.parametrize("command", sorted(set(re.findall(r"`(lipdp [a-z]+)", README))))
def test_every_command_exists(command):
    result = CliRunner().invoke(app, [*shlex.split(command)[1:], "--help"])
    assert result.exit_code == 0


@pytest.mark.parametrize("option", sorted(set(re.findall(r"`lipdp [^`]*?(--[a-z][a-z-]+)", README))))
def test_every_option_exists(option):
    helps = [CliRunner().invoke(app, [c, "--help"], terminal_width=200).output for c in ("train", "sensitivity")]
    assert any(option in text for text in helps)


@pytest.mark.parametrize("path", re.findall(r"`((?:lipdp|models|examples)/[\w/.]*)`", README))
def test_every_file_exists(path):
    assert (ROOT / path).exists()


def test_the_two_commands_are_there():
    assert "\npip install -e . && lipdp train\n" in README
    assert '\npip install -e ".[dev]" && pytest\n' in README
