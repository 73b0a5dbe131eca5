"""The settings of a run are declared once: options, checks, search, resume and the documentation's table follow."""

from __future__ import annotations

from dataclasses import fields

import pytest
import typer

from lipdp import cli
from lipdp.accounting.plan import PrivacyPlan
from lipdp.commands.options import Command, option, with_settings
from lipdp.errors import LipdpError, ParameterError, UnknownNameError
from lipdp.planning.simulation import Simulation
from lipdp.planning.space import parse_space
from lipdp.training import TrainConfig, configure, settings_table
from lipdp.training.config import RUNTIME, SEARCHABLE, SETTINGS, config_from_dict
from lipdp.training.recipes import RECOMMENDED
from lipdp.training.settings import OPTIONS, SIZE

OWN = {  # options of a command that are no settings of a run
    "train": {"--out", "--resume", "--dry-run", "--tensorboard", "--profile", "--peer-timeout", "--help"},
    "plan simulate": {
        *("--search", "--scale", "--trials", "--jobs", "--validation", "--search-seed", "--option", "--run"),
        *("--confirm", "--out", "--help"),
    },
}
OTHER_MEANING = {  # an option that is called as a setting and is another thing, or is said in other words there
    "compare speed": {"--dataset"},
    "audit": {"--epsilon", "--seed"},
    "certify": {"--steps"},
    "plan": {"--steps", "--dataset", "--epsilon", "--delta", "--accountant"},
}
ELSEWHERE = {"epsilon", "calibrate", "plan scale"}  # plan with q, T and devices, not with the settings of a run

DATA = {"dataset", "input_column", "label_column", "owner_column", "schema", "classes", "image_size"}
DATA |= {"certified", "features", "feature_options", "bounding", "bounding_options"}
ACCOUNT = {"epsilon", "delta", "noise_multiplier", "accountant", "sampling", "batch_size", "epochs", "steps"}
ACCOUNT |= {"seed", "secure", "bands", "truncated_batch_size"}


def commands(group=None, prefix=""):
    group = group or typer.main.get_command(cli.app)
    for name, command in group.commands.items():
        path = f"{prefix}{name}"
        yield path, command
        if hasattr(command, "commands"):
            yield from commands(command, f"{path} ")


COMMANDS = dict(commands())
FLAGS = {one.flag: one for one in SETTINGS.values()}


def flags(command):
    return {max(parameter.opts, key=len): parameter for parameter in command.params if parameter.opts[0][0] == "-"}


@pytest.mark.parametrize("path", list(OWN))
def test_every_option_is_declared(path):
    assert set(flags(COMMANDS[path])) - {"--help"} <= {*FLAGS, *OWN[path]}


def test_every_setting_is_an_option_of_train():
    assert set(flags(COMMANDS["train"])) - OWN["train"] == set(FLAGS)
    assert set(SETTINGS) == {field.name for field in fields(TrainConfig)} | {"tau"}


@pytest.mark.parametrize("path", sorted(set(COMMANDS) - ELSEWHERE))
def test_a_setting_is_the_same_in_every_command(path):
    """Its help begins with the declared words; the default may be the command's own."""
    for flag, parameter in flags(COMMANDS[path]).items():
        if flag in FLAGS and flag not in OTHER_MEANING.get(path, ()):
            assert parameter.help.startswith(FLAGS[flag].description), flag


def test_the_table_of_the_documentation_has_every_field():
    lines = settings_table().splitlines()[2:]
    assert [line.split("`")[1] for line in lines] == list(SETTINGS)
    for line, one in zip(lines, SETTINGS.values(), strict=True):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert len(cells) == 6
        assert one.help in line
        assert cells[4:] == ["yes" if one.name in RUNTIME else "", "yes" if one.name in SEARCHABLE else ""]
        assert (cells[3] == "the recipe's") == (one.name in {*RECOMMENDED, "tau"})


def test_a_search_leaves_data_account_and_machine_alone():
    assert not SEARCHABLE & (DATA | ACCOUNT | RUNTIME)
    assert set(SETTINGS) == SEARCHABLE | DATA | ACCOUNT | RUNTIME
    assert not RUNTIME & (DATA | ACCOUNT)
    for name in sorted(set(SETTINGS) - SEARCHABLE):
        with pytest.raises(ParameterError, match="cannot be searched"):
            parse_space([f"{name}=a,b"])


RIGHT = {
    "dataset": "digits", "model": "mlp", "image_size": (8, 8), "device": "cpu", "gate": 0.3, "tau": 2.0, "delta": 1e-6,
    "views": 1, "momentum": 0.5, "ema": 0.5, "gate_quantile": 0.5, "loss": "hinge", "optimizer": "adam",
}  # fmt: skip
WRONG = [object(), float("nan"), -1, 10**400, [1], b"x", {1}]


@pytest.mark.parametrize("name", list(SETTINGS))
def test_a_value_that_is_none_is_refused_by_name(name):
    for value in WRONG:
        with pytest.raises(LipdpError, match=name):
            configure(**{name: value})
    if name in RIGHT:
        configure(**{name: RIGHT[name]})
    if SETTINGS[name].choices:
        with pytest.raises(UnknownNameError, match=f"unknown {name} 'nothing'"):
            configure(**{name: "nothing"})


def test_only_a_setting_that_may_be_left_out_is_none():
    for name, one in SETTINGS.items():
        if name != "tau":
            plain = configure().as_dict() | {name: None}
            if one.required:
                with pytest.raises(ParameterError, match=f"{name}=None"):
                    config_from_dict(plain)
            else:
                assert getattr(config_from_dict(plain), name) is None


def test_a_command_of_settings_gets_what_was_given(monkeypatch):
    told = []

    @with_settings("features", "image_size", "gate", "model_options", "compile", model=..., lr=0.5)
    def command(given, *, other: int = 3):
        told.append((given, other))

    app = typer.Typer()
    app.command(cls=Command)(command)
    words = "--model mlp --model-option width=3 depth=1 --gate off --image-size 8 9 --no-compile --other 4"
    app(words.split(), standalone_mode=False)
    given = {"model": "mlp", "model_options": {"width": 3, "depth": 1}, "gate": "off", "image_size": (8, 9)}
    assert told == [(given | {"compile": False, "lr": 0.5}, 4)]
    assert option("data_dir", default="as the run").help == "where the files are (default: as the run)"


def test_a_command_that_a_search_prints_is_read_as_it_was_meant(monkeypatch):
    settings = {"image_size": [8, 9], "model_options": {"width": 3}, "secure": True, "download": False, "gate": "off"}
    plan = PrivacyPlan.of(dataset_size=100, expected_batch_size=50, steps=3, noise_multiplier=1.0)
    found = Simulation(settings, 2.0, 0.1, 0, plan, plan, "accuracy")
    words = found.command({"lr": 0.5}).split()[2:]
    context = COMMANDS["train"].make_context("train", words)
    given = {name: value for name, value in context.params.items() if value not in (None, [], ())}
    expected = {"image_size": (8, 9), "model_options": ["width=3"], "secure": True, "gate": "off", "batch_size": 50}
    assert {name: given[name] for name in expected} == expected
    assert (given["steps"], given["lr"]) == (3, 0.5)
    assert {one.flag for one in SETTINGS.values() if one.kind in (OPTIONS, SIZE)} >= {"--image-size", "--model-option"}
