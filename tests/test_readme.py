"""The README does what it says: its Python runs as written, its commands exist, its files are there."""

import re
import shlex
import warnings
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits
from typer.testing import CliRunner

import lipdp
from lipdp import bounds
from lipdp.cli import app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
OPACUS = (ROOT / "docs" / "opacus.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)


def test_the_quick_start_runs_as_written(capsys):
    exec(compile(BLOCKS[0], "README", "exec"), {"__name__": "__main__"})
    printed = capsys.readouterr().out
    epsilon, accuracy = map(float, re.findall(r"\d+\.\d+", printed))
    assert 2.9 < epsilon <= 3.0
    assert accuracy > 0.6  # chance is 0.1; the run is private, so it is not repeatable
    assert len(BLOCKS[0].strip().splitlines()) <= 15


def test_the_layer_example_runs_as_written():
    known = dict(bounds.rules._RULES)
    try:
        exec(compile(BLOCKS[1], "README", "exec"), {"torch": torch, "lipdp": lipdp})
    finally:
        bounds.rules._RULES.clear()
        bounds.rules._RULES.update(known)


def test_coming_from_opacus_is_few_changes_and_both_scripts_run(capsys):
    """Both sides of the diff, as written, on the digits: each spends its budget and learns."""
    pytest.importorskip("opacus")
    lines = re.search(r"```diff\n(.*?)```", OPACUS, re.S).group(1).splitlines()
    assert sum(line[:1] == "+" for line in lines) == 4
    x, y = (torch.tensor(array) for array in load_digits(return_X_y=True))
    x = x.float() / 16
    for ours, others in (("+", "-"), ("-", "+")):
        script = "\n".join(line[1:] for line in lines if line[:1] != others)
        names = {"train": torch.utils.data.TensorDataset(x[:1500], y[:1500])}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore" if ours == "-" else "error")  # Opacus warns of itself
            exec(compile(script, "docs/opacus.md", "exec"), names)
        assert 2.5 < float(capsys.readouterr().out) <= 3.01
        accuracy = (names["model"](x[1500:]).argmax(1) == y[1500:]).float().mean()
        assert accuracy > 0.5


@pytest.mark.parametrize("command", sorted(set(re.findall(r"`(lipdp [a-z]+)", README))))
def test_every_command_exists(command):
    result = CliRunner().invoke(app, [*shlex.split(command)[1:], "--help"])
    assert result.exit_code == 0


@pytest.mark.parametrize("option", sorted(set(re.findall(r"`lipdp [^`]*?(--[a-z][a-z-]+)", README))))
def test_every_option_exists(option):
    commands = ["train", "sensitivity", "compare speed", "compare utility", "audit", "certify", "plan", "report"]
    helps = [CliRunner().invoke(app, [*c.split(), "--help"], terminal_width=200).output for c in commands]
    assert any(option in text for text in helps)


@pytest.mark.parametrize("path", re.findall(r"[`(]((?:lipdp|models|examples|docs)/[\w/.-]*)[`)]", README))
def test_every_file_exists(path):
    assert (ROOT / path).exists()


def test_it_fits_in_a_few_minutes():
    assert len(README.splitlines()) <= 120


def test_the_two_commands_are_there():
    assert "\npip install -e . && lipdp train\n" in README
    assert '\npip install -e ".[dev]" && pytest -n auto --dist loadfile\n' in README
