"""The scaling law in practice: what a simulated run shares with the private one, its label, a search that is killed."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest
import torch
from kit import refusal

from lipdp.cli import main
from lipdp.data import load
from lipdp.errors import CheckpointError, ParameterError, ResumeError, UnknownNameError
from lipdp.planning import simulate
from lipdp.planning.search import STUDY, _alone, confirm
from lipdp.planning.simulation import LABEL, Runner, simulation
from lipdp.planning.space import Choice, Range, merged, parse_space
from lipdp.training import Trainer, configure, train

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK = {"dataset": "digits", "model": "linear", "batch_size": 256, "steps": 5, "noise_multiplier": 4.0}
RATES = parse_space(["lr=0.1:2:log"])
COMMAND = ["plan", "simulate", "--model", "linear", "--batch-size", "256", "--steps", "5"]
COMMAND += ["--option", "noise_multiplier=4.0", "--scale", "8", "--search", "lr=0.1:2:log"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", "NO_COLOR": "1"}


def timeless(trials):
    return {
        n: {
            k: [{m: x for m, x in line.items() if m != "seconds"} for line in v] if k == "curve" else v
            for k, v in t.items()
        }
        for n, t in trials.items()
        for t in [{k: v for k, v in t.items() if k not in ("seconds", "number")}]
    }


# --- the scaling law --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 7.0, 16.0, 128.0])
def test_a_simulated_run_has_the_noise_of_the_full_one_in_every_update(scale):
    given, split, bound = simulation({**QUICK, "model": "mlp"}, scale=scale)
    config = given.simulated_config({}, input_bound=bound)
    assert config.steps == 5
    assert config.batch_size == round(256 / scale)
    small = Trainer(config, split=split)
    full = Trainer(configure(**given.full_settings({}), seed=0))
    assert small.engine.plan.noise_multiplier * 256 == pytest.approx(4.0 * config.batch_size, rel=1e-12)
    stds = small.engine.noise_stds()
    assert set(stds) == set(full.engine.noise_stds())
    for name, std in full.engine.noise_stds().items():
        assert stds[name] / small.batch_size == pytest.approx(std / full.batch_size, rel=1e-4)


def test_a_simulated_run_on_features_has_the_input_bound_of_the_full_one(tmp_path, monkeypatch):
    monkeypatch.setenv("LIPDP_CACHE", str(tmp_path))
    given, split, bound = simulation({**QUICK, "features": "dct"}, scale=4.0)
    assert bound is not None
    small, full = (
        Trainer(given.simulated_config({}, input_bound=bound), split=split),
        Trainer(configure(**given.full_settings({}))),
    )
    assert small.engine.sensitivity().total == pytest.approx(full.engine.sensitivity().total, rel=1e-6)
    assert str(small.model) == str(full.model)


def test_the_full_run_is_calibrated_on_all_training_records():
    given, split, _ = simulation({**QUICK, "noise_multiplier": None, "epsilon": 2.0, "accountant": "rdp"}, scale=4.0)
    full = Trainer(configure(**given.full_settings({})))
    assert full.engine.plan.noise_multiplier == pytest.approx(given.plan.noise_multiplier, rel=1e-12)
    assert (given.plan.dataset_size, len(split.train_x), len(split.test_x)) == (1437, 1293, 144)


def test_the_test_part_is_never_looked_at():
    _, split, _ = simulation(QUICK)
    whole = load("digits")
    seen = {tuple(row) for part in (split.train_x, split.test_x) for row in part.flatten(1).tolist()}
    assert seen == {tuple(row) for row in whole.train_x.flatten(1).tolist()}
    trained, held_out = ({tuple(row) for row in part.flatten(1).tolist()} for part in (split.train_x, split.test_x))
    assert not trained & held_out


def test_a_run_that_diverges_is_rated_below_all_others(tmp_path):
    space = {"lr": Choice((1e38, 0.5)), "momentum": Choice((0.9,))}
    settings = {**QUICK, "model": "tests.test_simulation:free", "noise_multiplier": 4e3}
    found = simulate(settings, space, out=tmp_path, trials=2)
    bad, good = found.trials[0], found.trials[1]
    assert bad["value"] is None
    assert "NaN or infinity" in bad["diverged"]
    assert found.best == good
    assert found.as_dict()["diverged"] == 1
    with pytest.raises(ParameterError, match="every simulated run diverged"):
        _ = type(found)(found.simulation, {0: bad}).best


def free(*, input_shape, num_classes):
    """A model whose weights nothing holds."""
    from lipdp import nn as lnn

    return torch.nn.Sequential(lnn.InputBound(2.0), torch.nn.Flatten(), torch.nn.Linear(64, num_classes))


# --- labels -----------------------------------------------------------------------------------------------------------


def test_every_trace_of_a_simulation_says_that_it_is_not_private(tmp_path, capsys):
    assert main([*COMMAND, "--trials", "2", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "NOT PRIVATE" in printed.splitlines()[0]
    assert all("not private" in line for line in printed.splitlines() if line.startswith("run "))
    files = [*tmp_path.glob("*.json"), *(tmp_path / "trials").iterdir()]
    assert len(files) == 4
    for path in files:
        written = json.loads(path.read_text())
        assert (written["label"], written["private"]) == (LABEL, False), path
        assert '"epsilon"' not in path.read_text()  # there is no ε to claim
    study = optuna.load_study(study_name=STUDY, storage=f"sqlite:///{tmp_path / 'study.db'}")
    assert study.user_attrs == {"label": LABEL, "private": False}
    assert "not-private" in study.study_name
    assert all(trial.user_attrs["label"] == LABEL for trial in study.trials)


def test_simulated_runs_are_seeded_which_the_engine_calls_not_private():
    given, split, bound = simulation(QUICK)
    assert Trainer(given.simulated_config({}, input_bound=bound), split=split).engine.plan.seeded


# --- the search -------------------------------------------------------------------------------------------------------


def test_choices_alone_are_searched_whole(tmp_path):
    space = parse_space(["lr=0.1,0.5", "tau=8,32", "loss_options.tau=4"][:2])
    found = simulate(QUICK, space, out=tmp_path, trials=50)
    drawn = sorted((r["drawn"]["lr"], r["drawn"]["tau"]) for r in found.trials.values())
    assert drawn == [(0.1, 8), (0.1, 32), (0.5, 8), (0.5, 32)]
    assert found.best["value"] == max(record["value"] for record in found.trials.values())


def test_a_killed_search_goes_on_where_it_was(commands, tmp_path):
    """SIGKILL in the middle; the same command then ends with the runs of a search that nobody killed."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    expected = simulate(QUICK, RATES, out=whole, scale=8.0, trials=4)
    answer = commands(*COMMAND, "--trials", "4", "--out", killed, files=(str(killed / "trials" / "*.json"), 1))
    assert answer["signal"] == 9, answer["output"]
    before = {path.name: path.read_bytes() for path in (killed / "trials").glob("*.json")}
    assert 1 <= len(before) < 4
    assert not (killed / "result.json").exists()
    found = simulate(QUICK, RATES, out=killed, scale=8.0, trials=4)
    assert list(found.trials) == list(expected.trials) == list(range(4))
    assert timeless(found.trials) == timeless(expected.trials)
    ended = {path.name: path.read_bytes() for path in (killed / "trials").glob("*.json")}
    assert sum(ended[name] != content for name, content in before.items()) <= 1  # written, but not yet in the study


def test_a_run_begun_is_taken_up_again_and_one_half_drawn_is_not(tmp_path):
    simulate(QUICK, RATES, out=tmp_path, scale=8.0, trials=1)
    study = optuna.load_study(study_name=STUDY, storage=f"sqlite:///{tmp_path / 'study.db'}")
    begun, half = study.ask({"lr": optuna.distributions.FloatDistribution(0.1, 2.0, log=True)}), study.ask()
    found = simulate(QUICK, RATES, out=tmp_path, scale=8.0, trials=3)
    assert list(found.trials) == [0, begun.number, half.number + 1]
    assert found.trials[begun.number]["drawn"]["lr"] == pytest.approx(begun.params["lr"], rel=1e-3)


def test_more_trials_go_on_and_the_folder_alone_is_enough(tmp_path, capsys):
    assert main([*COMMAND, "--search", "tau=8,32", "--trials", "2", "--out", str(tmp_path)]) == 0
    assert main(["plan", "simulate", "--trials", "3", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("run ") >= 3
    assert json.loads((tmp_path / "result.json").read_text())["trials"] == 3


def test_another_search_in_the_same_folder_is_refused(tmp_path):
    arguments = {"settings": QUICK, "space": RATES, "out": tmp_path, "scale": 8.0, "trials": 1}
    simulate(**arguments)
    for change, message in (
        ({"settings": {**QUICK, "steps": 6}}, "steps was 5, is now 6"),
        ({"scale": 4.0}, r"scale was 8\.0, is now 4\.0"),
        ({"space": parse_space(["lr=0.1:3:log"])}, "space was"),
        ({"seed": 1}, "seed was 0"),
        ({"validation": 0.2}, "validation was"),
    ):
        with pytest.raises(ResumeError, match=message):
            simulate(**{**arguments, **change})
    simulate(**{**arguments, "settings": {**QUICK, "threads": 1}})  # no result depends on it


def test_two_searches_at_once_in_a_folder_are_refused(tmp_path):
    with _alone(tmp_path), pytest.raises(ResumeError, match="a search is going on"):
        simulate(QUICK, RATES, out=tmp_path, trials=1)
    simulate(QUICK, RATES, out=tmp_path, trials=1)


def test_a_folder_that_cannot_be_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        simulate(QUICK, RATES, out=tmp_path / "file", trials=1)


@pytest.mark.slow
@pytest.mark.distributed
def test_several_processes_find_what_one_finds(tmp_path):
    space = parse_space(["lr=0.1,0.4,1.6"])
    one = simulate(QUICK, space, out=tmp_path / "one", scale=8.0, trials=3)
    two = simulate(QUICK, space, out=tmp_path / "two", scale=8.0, trials=3, jobs=2)
    value = lambda found: {r["drawn"]["lr"]: r["value"] for r in found.trials.values()}  # noqa: E731
    assert value(two) == pytest.approx(value(one), abs=0.02)
    assert two.as_dict()["best"] == one.as_dict()["best"] or len(set(value(one).values())) < 3


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGTERM])
def test_processes_end_with_the_one_that_started_them(tmp_path, sign):
    command = [sys.executable, "-m", "lipdp", *COMMAND, "--trials", "500", "--jobs", "2", "--out", str(tmp_path)]
    with subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        while process.poll() is None and len(list(tmp_path.glob("trials/*.json"))) < 2:
            time.sleep(0.05)
        process.send_signal(sign)
        process.wait()
        if sign is signal.SIGTERM:
            assert process.returncode == 130
            assert "go on with: lipdp plan simulate --out" in process.stderr.read()
    while _alive(process.pid):  # ends, or the test's own time limit does
        time.sleep(0.05)
    found = simulate(QUICK, RATES, out=tmp_path, scale=8.0, trials=5)
    assert len(found.trials) >= 5


def _alive(group):
    """Whether a process of that group is left which is not a zombie."""
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                fields = Path("/proc", name, "stat").read_text().rsplit(")", 1)[1].split()
            except OSError:
                continue
            if int(fields[2]) == group and fields[0] != "Z":
                return True
    return False


# --- the full run -----------------------------------------------------------------------------------------------------


def test_the_command_printed_is_the_full_private_run(tmp_path, capsys):
    options = ["--option", 'model_options={"input_bound": 3.0}', "--option", "gate=off"]
    arguments = [
        *COMMAND,
        "--trials",
        "2",
        "--out",
        str(tmp_path / "search"),
        *options,
        "--search",
        "loss_options.tau=8,16",
    ]
    assert main(arguments) == 0
    result = json.loads((tmp_path / "search" / "result.json").read_text())
    assert result["command"] in capsys.readouterr().out
    words = shlex.split(result["command"])
    assert words[:2] == ["lipdp", "train"]
    assert "--seed" not in words
    assert main(words[1:]) == 0
    run = tmp_path / "search" / "full"
    privacy, config = (json.loads((run / f"{name}.json").read_text()) for name in ("privacy", "config"))
    assert (privacy["seeded"], privacy["noise_multiplier"], privacy["expected_batch_size"]) == (False, 4.0, 256)
    assert (config["lr"], config["loss_options"]["tau"]) == (result["best"]["lr"], result["best"]["loss_options.tau"])
    assert (config["gate"], config["model_options"]["input_bound"]) == (None, 3.0)
    assert main([*arguments, "--confirm", str(run)]) == 0
    assert "achieved" in capsys.readouterr().out
    confirmation = json.loads((tmp_path / "search" / "confirmation.json").read_text())
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert confirmation["achieved_accuracy"] == last["test_accuracy_ema"]
    assert confirmation["predicted_accuracy"] == result["predicted_accuracy"]
    assert confirmation["samples_saved"] == 2 * 5 * (256 - 32)
    assert confirmation["epsilon"] == privacy["epsilon"]


def test_run_trains_the_full_run_and_is_done_once(tmp_path, capsys):
    arguments = [*COMMAND, "--trials", "1", "--out", str(tmp_path), "--run"]
    assert main(arguments) == 0
    weights = (tmp_path / "full" / "checkpoint.pt").read_bytes()
    capsys.readouterr()
    assert main(arguments) == 0
    assert "predicted" in capsys.readouterr().out
    assert (tmp_path / "full" / "checkpoint.pt").read_bytes() == weights


def test_confirm_refuses_other_runs_and_unfinished_ones(tmp_path):
    found = simulate(QUICK, RATES, out=tmp_path / "search", trials=1)
    settings = found.simulation.full_settings(found.best["drawn"])
    train(configure(**{**settings, "lr": 0.123}), out=tmp_path / "other")
    with pytest.raises(ParameterError, match=r"lr is 0\.123, should be"):
        confirm(found, tmp_path / "other")
    with pytest.raises(CheckpointError):
        confirm(found, tmp_path / "none")
    metrics = tmp_path / "other" / "metrics.jsonl"
    metrics.write_text("".join(line + "\n" for line in metrics.read_text().splitlines()[:2]))
    with pytest.raises(CheckpointError, match="go on with --resume"):
        confirm(found, tmp_path / "other")


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_spaces_are_read_as_they_are_written():
    space = parse_space(["lr=0.05:5:log", "ema=0:0.99", "gate=off,0.3", "model_options.width=16,32", "schedule=cosine"])
    assert space == {
        "lr": Range(0.05, 5.0, True),
        "ema": Range(0.0, 0.99),
        "gate": Choice(("off", 0.3)),
        "model_options.width": Choice((16, 32)),
        "schedule": Choice(("cosine",)),
    }
    assert merged({"lr": 1, "loss_options": {"a": 1}}, {"loss_options.b": 2}) == {
        "lr": 1,
        "loss_options": {"a": 1, "b": 2},
    }


@pytest.mark.parametrize(
    ("texts", "error", "message"),
    [
        ([], ParameterError, "nothing to search"),
        (["lr"], ParameterError, "different values"),
        (["lr=0.1,0.1"], ParameterError, "different values"),
        (["lr=1:0.1"], ParameterError, "low < high"),
        (["lr=0:1:log"], ParameterError, "low > 0"),
        (["lr=0.1:1:exp"], ParameterError, "low < high"),
        (["lr=a:b"], ParameterError, "two numbers"),
        (["lr=0.1:nan"], ParameterError, "low < high"),
        (["lr=0.1:1", "lr=2:3"], ParameterError, "already"),
        (["learning_rate=0.1:1"], UnknownNameError, "unknown setting"),
        (["batch_size=64,128"], ParameterError, "ε depends on"),
        (["epsilon=1:2"], ParameterError, "ε depends on"),
        (["noise-multiplier=1:2"], ParameterError, "ε depends on"),
        (["steps=10,20"], ParameterError, "ε depends on"),
        (["feature_options.J=2,3"], ParameterError, "keeps the data"),
        (["model_options=1,2"], ParameterError, "name one option"),
        (["lr.x=1,2"], ParameterError, "no parts"),
        (["model_options.widths=[1],[2]"], ParameterError, "a choice is a number"),
    ],
)
def test_refusals_of_spaces(texts, error, message):
    with pytest.raises(error, match=message):
        parse_space(texts)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale": 0.5}, r"k in \[1, 128\]"),
        ({"scale": 129.0}, r"k in \[1, 128\]"),
        ({"trials": 0}, "trials=0"),
        ({"jobs": 0}, "jobs=0"),
        ({"seed": -1}, "search_seed=-1"),
        ({"validation": 1.0}, "a validation part of"),
        ({"settings": {**QUICK, "seed": 1}}, "the full run is to be private"),
        ({"settings": {**QUICK, "batch_size": 1437}, "scale": 1.0}, "larger scale"),
        ({"space": {"ema": Choice((1.5,))}}, r"with ema=1\.5 was refused"),
    ],
)
def test_refusals_of_simulations(tmp_path, changes, message):
    arguments = {"settings": QUICK, "space": RATES, "out": tmp_path, "trials": 1}
    with pytest.raises(ParameterError, match=message):
        simulate(**{**arguments, **changes})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--search", "epsilon=1:2"], "cannot be searched"),
        ([], "nothing to search"),
        (["--search", "lr=0.1:1", "--option", "colour=3"], "unknown setting"),
        (["--search", "lr=0.1:1", "--model", "linear", "--option", "steps=2", "--trials", "1", "--run",
          "--confirm", "x"],
         "give one of them"),
    ],
)  # fmt: skip
def test_the_command_refuses_in_one_line(arguments, message, tmp_path, capsys):
    assert message in refusal(["plan", "simulate", "--out", tmp_path, *arguments], capsys)


def test_a_runner_reports_what_it_did():
    record = Runner(*simulation(QUICK, scale=8.0))({"lr": 0.5})
    assert record["label"] == LABEL
    assert (record["batch_size"], record["noise_multiplier"], record["samples"]) == (32, 0.5, 160)
    assert record["curve"][-1]["step"] == 5
    assert record["value"] == record["curve"][-1]["validation_accuracy_ema"]
    assert not [name for line in record["curve"] for name in line if name.startswith("test")]
