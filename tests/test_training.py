"""The loop: what a run writes, an exact resume, what it refuses, and what is free."""

from __future__ import annotations

import json
import math
import re
import shutil
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from kit import Raises
from sklearn.metrics import roc_auc_score
from torch import nn

import lipdp
from lipdp.accounting.plan import default_delta
from lipdp.comparison.configs import RobustnessConfig, UtilityConfig
from lipdp.data import Split, load
from lipdp.errors import (
    CheckpointError,
    DataError,
    LipdpError,
    NonFiniteError,
    ParameterError,
    ResumeError,
    UnknownNameError,
)
from lipdp.processes import peak_bytes
from lipdp.training import Interrupted, Monitor, Trainer, configure, train
from lipdp.training.checkpoint import RunFolder
from lipdp.training.choices import LOSSES, make_loss, make_optimizer, make_scheduler
from lipdp.training.config import config_from_dict
from lipdp.training.ema import Ema
from lipdp.training.evaluation import evaluate
from lipdp.training.recipes import _RECIPES, default_model, recipe

README = Path(__file__).parents[1] / "README.md"
QUICK = {
    "model": "linear", "steps": 12, "batch_size": 128, "noise_multiplier": 2.0, "accountant": "rdp", "seed": 0,
    "log_every": 4,
}  # fmt: skip

OWN_MODELS = """
import torch
from lipdp import nn as lnn

def dropout(*, input_shape, num_classes):
    return torch.nn.Sequential(
        lnn.InputBound(2.0), torch.nn.Flatten(), lnn.SpectralLinear(64, 16), torch.nn.Dropout(0.2), lnn.GroupSort2(),
        lnn.SpectralLinear(16, num_classes),
    )

def free(*, input_shape, num_classes):
    return torch.nn.Sequential(lnn.InputBound(2.0), torch.nn.Flatten(), torch.nn.Linear(64, num_classes))
"""


@pytest.fixture
def own_models(tmp_path, monkeypatch):
    """A user's file with models, in the working folder."""
    (tmp_path / "own_models.py").write_text(OWN_MODELS)
    monkeypatch.chdir(tmp_path)


def quick(**changes):
    return configure(**{**QUICK, **changes})


def lines(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def timeless(records):
    return [{k: v for k, v in record.items() if k != "seconds"} for record in records]


def checkpoint(path, name="checkpoint.pt"):
    return torch.load(path / name, weights_only=True)


# --- what a run writes ------------------------------------------------------------------------------------------------


def test_a_run_writes_what_the_readers_of_its_folder_expect(tmp_path):
    result = train(quick(), out=tmp_path)
    privacy = json.loads((tmp_path / "privacy.json").read_text())
    expected = lipdp.epsilon(
        noise_multiplier=2.0, sampling_rate=128 / 1437, steps=12, delta=1e-5, accountant="rdp"
    )  # fmt: skip
    assert privacy["epsilon"] == result.epsilon == expected
    assert (privacy["delta"], privacy["noise_multiplier"], privacy["steps"]) == (1e-5, 2.0, 12)
    assert (privacy["sampling_rate"], privacy["expected_batch_size"]) == (128 / 1437, 128)
    assert (privacy["relation"], privacy["allocation"], privacy["accountant"]) == (
        "add_or_remove_one",
        "per_layer",
        "rdp",
    )
    assert privacy["seeded"] is True
    assert list(privacy["sensitivity"]) == ["2.weight"]
    assert privacy["sensitivity"]["2.weight"] == pytest.approx(0.3, rel=1e-3)

    last = lines(tmp_path)[-1]
    assert last == result.metrics
    assert last["step"] == 12
    assert last["epsilon"] == expected
    assert {"test_accuracy", "test_accuracy_ema", "train_loss_not_private", "lr"} <= set(last)
    assert not [key for record in lines(tmp_path) for key in record if "train" in key and "not_private" not in key]

    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["dataset"], config["model"], config["steps"], config["seed"]) == ("digits", "linear", 12, 0)
    assert config_from_dict(config).as_dict() == config

    saved = checkpoint(tmp_path)
    split = load("digits")
    for weights, name in (("model", "test_accuracy"), ("ema", "test_accuracy_ema")):
        model = lipdp.models.build("linear", input_shape=split.input_shape, num_classes=10)
        model.load_state_dict(saved[weights])
        assert evaluate(model, split.test_x, split.test_y)["accuracy"] == last[name]
    assert not list(tmp_path.glob("*.tmp"))


def test_epsilon_along_the_run_is_an_upper_bound(tmp_path):
    seen = []

    class Watch(Monitor):
        def step(self, step, loss, epsilon):
            seen.append((step, epsilon))

    result = train(quick(log_every=5, accountant="prv"), out=tmp_path, monitor=Watch())
    facts = {"noise_multiplier": 2.0, "sampling_rate": 128 / 1437, "delta": 1e-5}
    for step, claimed in seen:
        assert lipdp.epsilon(**facts, steps=step) <= claimed * 1.0001
        assert claimed <= result.epsilon
    assert [record["step"] for record in lines(tmp_path)] == [5, 10, 12]
    assert lines(tmp_path)[-1]["epsilon"] == lipdp.epsilon(**facts, steps=12)


def test_fixed_size_batches_report_their_relation(tmp_path):
    train(quick(sampling="fixed_size"), out=tmp_path)
    assert json.loads((tmp_path / "privacy.json").read_text())["relation"] == "replace_one"


def test_a_budget_is_kept(tmp_path):
    result = train(configure(**{**QUICK, "noise_multiplier": None, "epsilon": 1.5}))
    assert 1.49 <= result.epsilon <= 1.5


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert train(quick()).folder is None
    assert list(tmp_path.iterdir()) == []


def test_a_finished_runs_checkpoints_hold_no_keys(tmp_path):
    trainer = Trainer(quick(steps=20, checkpoint_every=5), out=tmp_path)
    keys = {trainer.engine.state_dict()["noise"]["key"]}
    trainer.run()
    for name in ("checkpoint.pt", "checkpoint.previous.pt"):
        saved = checkpoint(tmp_path, name)
        assert "resume" not in saved
        assert not any(key in (tmp_path / name).read_bytes().decode("latin1") for key in keys)
        assert b"ratchet" not in (tmp_path / name).read_bytes()
        assert torch.isfinite(saved["model"]["2.weight"]).all()
    assert (tmp_path / "checkpoint.pt").stat().st_mode & 0o077 == 0


# --- resume -----------------------------------------------------------------------------------------------------------

VARIANTS = {
    "linear": {},
    "dropout": {"model": "own_models:dropout", "optimizer": "adam", "schedule": "cosine", "ema": 0.8},
    "fixed": {"sampling": "fixed_size", "gate_quantile": 0.5, "microbatch": 50, "schedule": "linear", "log_every": 5},
    "private": {"seed": None},
}


@pytest.mark.parametrize(
    ("variant", "number"), [*((name, signal.SIGTERM) for name in VARIANTS), ("linear", signal.SIGINT)]
)
def test_an_interrupted_run_ends_bit_identical(variant, number, tmp_path, own_models):
    config = quick(**VARIANTS[variant], checkpoint_every=100)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    trainer = Trainer(config, out=parts, monitor=Raises(7, number))
    state, initial = trainer.engine.state_dict(), {n: p.clone() for n, p in trainer.model.state_dict().items()}
    uninterrupted = Trainer(config, out=whole)
    uninterrupted.engine.load_state_dict(state)  # the same keys, for the run without a seed
    uninterrupted.model.load_state_dict(initial)
    uninterrupted._random = trainer._random
    expected = uninterrupted.run()

    with pytest.raises(Interrupted, match=r"after step 7 of 12; go on with --resume"):
        trainer.run()
    privacy = json.loads((parts / "privacy.json").read_text())
    assert privacy["steps"] == checkpoint(parts)["step"] == 7
    assert 0 < privacy["epsilon"] < expected.epsilon
    resumed = Trainer.resume(parts).run()

    assert resumed.epsilon == expected.epsilon
    one, other = checkpoint(whole), checkpoint(parts)
    for weights in ("model", "ema"):
        assert all(torch.equal(one[weights][name], other[weights][name]) for name in one[weights])
    assert timeless(lines(whole)) == timeless(lines(parts))
    assert (whole / "privacy.json").read_text() == (parts / "privacy.json").read_text()
    with pytest.raises(ResumeError, match="finished: all 12 steps"):
        Trainer.resume(parts)


def test_a_killed_run_goes_on_from_its_last_checkpoint(tmp_path):
    config = quick(checkpoint_every=2, log_every=3)
    train(config, out=tmp_path / "whole")
    with pytest.raises(RuntimeError, match="killed"):
        Trainer(config, out=tmp_path / "parts", monitor=Raises(7, RuntimeError("killed"))).run()
    assert checkpoint(tmp_path / "parts")["step"] == 6
    shown = [record["step"] for record in lines(tmp_path / "parts")]
    assert shown == [3, 6]  # nothing of a step is shown before a checkpoint holds it
    Trainer.resume(tmp_path / "parts").run()
    assert timeless(lines(tmp_path / "whole")) == timeless(lines(tmp_path / "parts"))
    one, other = (checkpoint(tmp_path / name) for name in ("whole", "parts"))
    assert torch.equal(one["model"]["2.weight"], other["model"]["2.weight"])


def test_a_run_can_be_resumed_before_its_first_step(tmp_path):
    class AtOnce(Monitor):
        def begin(self, trainer):
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted, match="after step 0"):
        Trainer(quick(), out=tmp_path, monitor=AtOnce()).run()
    assert json.loads((tmp_path / "privacy.json").read_text())["epsilon"] == 0
    assert Trainer.resume(tmp_path).run().steps == 12


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """An interrupted run, to be copied."""
    path = tmp_path_factory.mktemp("interrupted")
    with pytest.raises(Interrupted):
        Trainer(quick(checkpoint_every=3), out=path, monitor=Raises(7, signal.SIGTERM)).run()
    return path


@pytest.fixture
def stopped(interrupted, tmp_path):
    return shutil.copytree(interrupted, tmp_path / "run")


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"batch_size": 64}, "batch_size was 128, is now 64"),
        ({"noise_multiplier": 1.0}, "noise_multiplier was 2.0"),
        ({"epsilon": 1.0}, "epsilon was None"),
        ({"steps": 100}, "steps was 12"),
        ({"epochs": 2.0}, "epochs was None"),
        ({"sampling": "fixed_size"}, "sampling was 'poisson'"),
        ({"delta": 1e-6}, "delta was 1e-05"),
        ({"gate": "off"}, "gate was"),
        ({"accountant": "prv"}, "accountant was 'rdp'"),
        ({"seed": 1}, "seed was 0"),
        ({"lr": 0.1}, "lr was"),
        ({"tau": 1.0}, "loss_options was {'tau'"),
        ({"dataset": "mnist"}, "dataset was 'digits'"),
        ({"model_option": {}}, "model_option was"),
    ],
)
def test_a_resume_with_other_settings_is_refused(given, named, stopped):
    with pytest.raises(ResumeError, match=named):
        Trainer.resume(stopped, **given)


def test_a_resume_may_repeat_the_settings_and_change_the_machine(stopped):
    trainer = Trainer.resume(
        stopped, **{**QUICK, "tau": trainer_tau(stopped)}, checkpoint_every=2, device="cpu", threads=1
    )
    assert trainer.run().steps == 12
    assert trainer.config.checkpoint_every == 2


def trainer_tau(path):
    return RunFolder(path).config()["loss_options"]["tau"]


@pytest.mark.parametrize(("name", "value"), [("batch_size", 64), ("noise_multiplier", 9.0), ("steps", 99), ("lr", 7.0)])
def test_an_edited_configuration_is_refused(name, value, stopped):
    config = json.loads((stopped / "config.json").read_text())
    (stopped / "config.json").write_text(json.dumps({**config, name: value}))
    with pytest.raises(ResumeError, match=f"{name} was {value}"):
        Trainer.resume(stopped)


def test_other_data_are_refused(stopped):
    split = load("digits")
    fewer = type(split)(**{**vars(split), "train_x": split.train_x[:1000], "train_y": split.train_y[:1000]})
    with pytest.raises(ResumeError, match="dataset_size was 1437, is now 1000"):
        Trainer.resume(stopped, split=fewer)


def test_a_damaged_checkpoint_leaves_the_previous_one(stopped):
    good = (stopped / "checkpoint.pt").read_bytes()
    (stopped / "checkpoint.pt").write_bytes(good[: len(good) // 2])
    assert checkpoint(stopped, "checkpoint.previous.pt")["step"] == 6
    assert Trainer.resume(stopped).step == 6
    (stopped / "checkpoint.previous.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"no checkpoint to go on from: .*checkpoint\.pt is damaged"):
        Trainer.resume(stopped)
    for name in ("checkpoint.pt", "checkpoint.previous.pt"):
        (stopped / name).unlink()
    with pytest.raises(CheckpointError, match="does not exist"):
        Trainer.resume(stopped)


@pytest.mark.parametrize("content", [[1, 2], {"model": 1}, {"step": 1, "model": {}, "config": {}, "resume": {}}])
def test_another_kind_of_file_is_refused(content, stopped):
    for name in ("checkpoint.pt", "checkpoint.previous.pt"):
        torch.save(content, stopped / name)
    with pytest.raises((CheckpointError, ResumeError)):
        Trainer.resume(stopped)


def test_what_is_not_a_run_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="the folder of a run"):
        Trainer.resume(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="not the configuration"):
        Trainer.resume(tmp_path)
    (tmp_path / "config.json").write_text('{"dataset": "digits"}')
    with pytest.raises(CheckpointError, match="not the configuration"):
        Trainer.resume(tmp_path)


def test_a_used_folder_is_refused_before_any_work(stopped, monkeypatch):
    monkeypatch.setattr("lipdp.training.trainer.prepare", lambda *a, **k: pytest.fail("data were read"))
    with pytest.raises(ParameterError, match="holds a run already"):
        Trainer(quick(), out=stopped)


def test_a_write_that_fails_leaves_the_old_checkpoint(stopped, monkeypatch):
    before = {name: (stopped / name).read_bytes() for name in ("checkpoint.pt", "privacy.json", "config.json")}

    def full(value, stream):
        stream.write(b"half a checkpoint")
        raise RuntimeError("[enforce fail at inline_container.cc:595] . unexpected pos: No space left on device")

    trainer = Trainer.resume(stopped)
    monkeypatch.setattr("torch.save", full)
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt cannot be written .*No space left"):
        trainer.run()
    assert (stopped / "checkpoint.pt").read_bytes() == before["checkpoint.pt"]
    assert not list(stopped.glob("*.tmp"))


# --- numbers that are not finite --------------------------------------------------------------------------------------


def test_weights_that_overflow_stop_the_run_and_leave_the_last_good_checkpoint(tmp_path, own_models):
    out = tmp_path / "run"
    with pytest.raises(NonFiniteError, match=r"step \d+: NaN or infinity in .*2\.weight"):
        train(quick(model="own_models:free", lr=1e37, momentum=0.9, checkpoint_every=1, log_every=1), out=out)
    saved = checkpoint(out)
    assert all(torch.isfinite(p).all() for p in saved["model"].values())
    assert json.loads((out / "privacy.json").read_text())["steps"] == saved["step"]


def test_a_bad_record_is_zero_and_stops_nothing():
    ends = []
    for value in (math.nan, 0.0):
        split = load("digits")
        x = split.train_x.clone()
        x[::50] = value
        trainer = Trainer(quick(), split=type(split)(**{**vars(split), "train_x": x}))
        trainer.run()
        ends.append(list(trainer.model.parameters()))
    assert all(map(torch.equal, *ends))


# --- what a run is given ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "error", "named"),
    [
        ({"dataset": "minst"}, UnknownNameError, "mnist"),
        ({"model": "cnnn"}, UnknownNameError, "cnn"),
        ({"loss": "mse"}, UnknownNameError, "cross-entropy"),
        ({"loss": "bce"}, ParameterError, "2 classes"),
        ({"loss_options": {"margin": 1.0}}, ParameterError, "margin"),
        ({"optimizer": "lbfgs"}, UnknownNameError, "sgd"),
        ({"schedule": "step"}, UnknownNameError, "cosine"),
        ({"accountant": "clt"}, UnknownNameError, "prv"),
        ({"allocation": "even"}, UnknownNameError, "per_layer"),
        ({"sampling": "shuffle"}, UnknownNameError, "poisson"),
        ({"features": "sift"}, UnknownNameError, "scattering"),
        ({"bounding": "none"}, UnknownNameError, "clip"),
        ({"no_such": 1}, UnknownNameError, "no_such"),
        ({"device": "tpu"}, ParameterError, "tpu"),
        ({"batch_size": 10_000}, ParameterError, "1437"),
        ({"batch_size": 0}, ParameterError, "batch_size"),
        ({"steps": -1}, ParameterError, "steps"),
        ({"epochs": 3}, ParameterError, "steps= and epochs="),
        ({"epsilon": 1.0}, ParameterError, "epsilon= and noise_multiplier="),
        ({"noise_multiplier": 0.0}, ParameterError, "noise_multiplier"),
        ({"lr": math.nan}, ParameterError, "lr"),
        ({"momentum": 1.0}, ParameterError, "momentum"),
        ({"ema": 1.0}, ParameterError, "ema"),
        ({"delta": 1.0}, ParameterError, "delta"),
        ({"gate": -0.1}, ParameterError, "gate"),
        ({"gate_quantile": 1.5}, ParameterError, "quantile"),
        ({"microbatch": 0}, ParameterError, "microbatch"),
    ],
)
def test_bad_settings_are_named_and_nothing_is_left_behind(given, error, named, tmp_path):
    with pytest.raises(error, match=named):
        train(quick(**given), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_recipes_fill_in_what_was_not_given():
    assert configure().model == "mlp"
    assert configure().epsilon == 3.0
    assert configure(noise_multiplier=1.0).epsilon is None
    assert configure(dataset="mnist").features == "handwriting"
    assert configure(dataset="cifar10").model == "linear"
    assert configure(dataset="cifar10", model="cnn").features is None
    assert configure(dataset="cifar10", augment="flip").model == "cnn"
    assert configure(dataset="mnist", features="scattering").resolve(60_000).batch_size == 60_000
    assert configure(dataset="mnist", epochs=3).resolve(60_000).steps == 3
    assert configure(dataset="mnist", features="scattering", tau=9.0).loss_options == {"tau": 9.0}
    assert configure(gate="off").gate is None
    assert configure(tau=3.0).loss_options == {"tau": 3.0}
    assert configure(loss="hinge").loss_options == {}
    assert configure(optimizer="adam").lr == 0.01
    assert configure(optimizer="adam", lr=0.2).lr == 0.2
    assert configure(momentum=0.0).momentum == 0.0
    assert configure(steps=5).resolve(1437).steps == 5
    assert recipe("digits", "linear") == recipe("nowhere", "linear")
    assert recipe("mnist", "linear", "scattering") != recipe("mnist", "linear")
    for dataset, model in _RECIPES:
        config = configure(dataset=dataset or "digits", model=model).resolve(60_000)
        make_loss(config.loss, 10, config.loss_options)
        assert config.model in lipdp.models.names()
    assert default_model("my.npz") in lipdp.models.names()


def test_a_table_has_one_default_model_wherever_it_is_named(tmp_path, monkeypatch):
    np.savez(tmp_path / "t.npz", X=np.zeros((40, 3), "float32"), y=np.arange(40) % 2)
    (tmp_path / "t.csv").write_text("a,label\n1,0\n2,1\n")
    for name in ("t.npz", "t.csv"):
        given = {"dataset": name, "data_dir": str(tmp_path)}
        found = (
            configure(**given),
            UtilityConfig(datasets=(name,), data_dir=str(tmp_path)).train_config(name),
            RobustnessConfig(**given).train_config(),
        )
        assert [config.model for config in found] == ["tabular"] * 3


def test_the_format_of_a_file_of_images_decides_its_features(tmp_path, monkeypatch):
    y = np.arange(40) % 2
    formats = {"colour": (3, 28, 28), "grey": (1, 30, 28), "small": (3, 8, 8), "table": (5,), "many": (4, 28, 28)}
    for name, shape in formats.items():
        np.savez(tmp_path / f"{name}.npz", X=np.full((40, *shape), 0.5, dtype=np.float32), y=y)
    found = {name: configure(dataset=str(tmp_path / f"{name}.npz")).features for name in (*formats, "absent")}
    expected = dict.fromkeys(found) | {"colour": "photographs", "grey": "objects"}
    assert found == expected
    colour = str(tmp_path / "colour.npz")
    assert configure(dataset=colour, model="mlp").features is None
    assert configure(dataset=colour, image_size=(8, 8)).features is None
    assert configure(dataset=str(tmp_path / "small.npz"), image_size=(28, 28)).features == "photographs"


def test_delta_is_below_one_over_n_and_at_most_1e_5():
    for n in (1, 9, 10, 1437, 60_000, 99_999, 100_000, 619_326, 10**7):
        assert default_delta(n) <= 1e-5
        assert default_delta(n) < 1 / n
        assert default_delta(n) == 1e-5 or default_delta(n) * 10 >= 1 / n * 0.999


def test_a_seed_repeats_a_run_and_no_seed_does_not():
    runs = [train(quick()).metrics for _ in range(2)]
    assert timeless(runs[:1]) == timeless(runs[1:])
    results = [Trainer(quick(seed=None)) for _ in range(2)]
    for trainer in results:
        trainer.run()
    one, other = (trainer.model.state_dict()["2.weight"] for trainer in results)
    assert not torch.equal(one, other)
    assert not results[0].privacy()["seeded"]


def test_torchs_generators_are_left_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    train(quick(seed=None))
    assert torch.equal(before, torch.get_rng_state())


def test_microbatches_make_no_difference():
    whole, parts = (Trainer(quick(microbatch=size)) for size in (None, 17))
    whole.run(), parts.run()
    for one, other in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-5)
    assert whole.engine.state_dict()["noise"] == parts.engine.state_dict()["noise"]


def steps_on_large_records(microbatch):
    """A step on all of 2400 records of 64 KiB: 150 MiB."""
    x, y = torch.full((2400, 1, 128, 128), 0.5), torch.arange(2400) % 2
    split = Split("large", x, y, x[:2], y[:2], 2, "binary")
    trainer = Trainer(quick(batch_size=2400, steps=3, sampling="fixed_size", microbatch=microbatch), split=split)
    batches, stop = iter(trainer.loader), threading.Event()
    trainer.model.train()
    return lambda: trainer._take_step(trainer._pieces(batches, stop))


@pytest.mark.usefixtures("forks")
def test_a_logical_batch_is_never_held_at_once():
    whole, pieces = (peak_bytes(steps_on_large_records, size) for size in (2400, 100))
    assert pieces < whole - 120 * 2**20


def test_batches_that_are_mostly_empty():
    result = train(quick(batch_size=1, steps=20))
    assert result.steps == 20


def test_a_run_in_a_thread_of_its_own():
    results = []
    thread = threading.Thread(target=lambda: results.append(train(quick())))
    thread.start()
    thread.join()
    assert results[0].steps == 12


@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_the_learning_rate_follows_its_schedule(name, tmp_path):
    train(quick(schedule=name, log_every=1, lr=1.0), out=tmp_path)
    rates = [record["lr"] for record in lines(tmp_path)]
    assert rates == sorted(rates, reverse=True)
    assert rates[5] == pytest.approx(0.5)
    assert rates[-1] == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("loss", [None, "cross-entropy", "hinge", "hkr", "cosine", "multiclass-hinge"])
def test_a_binary_table_is_scored_by_its_roc_curve(loss, tmp_path):
    generator = np.random.default_rng(0)
    y = (generator.random(600) < 0.2).astype(np.int64)
    np.savez(tmp_path / "table.npz", X=generator.normal(size=(600, 5)) + 2.0 * y[:, None], y=y)
    config = configure(
        dataset=str(tmp_path / "table.npz"), model="tabular", loss=loss, steps=30, batch_size=200,
        noise_multiplier=1.0, accountant="rdp", seed=0, log_every=30,
    )  # fmt: skip
    trainer = Trainer(config)
    metrics = trainer.run().metrics
    assert metrics["test_auroc"] > 0.9
    assert metrics["test_auroc_ema"] > 0.9
    assert trainer.config.loss == loss or trainer.config.loss == "bce"
    with torch.no_grad():
        out = trainer.model(trainer.split.test_x)
    assert out.shape[1] == (1 if loss is None else 2)
    score = out[:, 0] if loss is None else out[:, 1] - out[:, 0]
    assert metrics["test_auroc"] == pytest.approx(roc_auc_score(trainer.split.test_y, score), abs=1e-9)


# --- the parts --------------------------------------------------------------------------------------------------------


class Broken(nn.Module):
    def forward(self, x):
        return x * math.nan


def test_evaluation_refuses_what_has_no_answer():
    identity = nn.Identity()
    one_class = evaluate(identity, torch.zeros(3, 1), torch.zeros(3, dtype=torch.int64), binary=True)
    assert one_class["accuracy"] == 1.0
    assert one_class["auroc"] is one_class["average_precision"] is None
    with pytest.raises(DataError, match="no records"):
        evaluate(identity, torch.zeros(0, 1), torch.zeros(0, dtype=torch.int64))
    with pytest.raises(NonFiniteError):
        evaluate(Broken(), torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64))


def test_evaluation_in_batches_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 3))
    x, y = torch.randn(50, 4), torch.randint(3, (50,))
    assert evaluate(model, x, y, batch_size=7) == evaluate(model, x, y, batch_size=1000)
    assert model.training


def test_the_average_is_the_bias_corrected_one_and_is_taken_back():
    model = nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    ema, history = Ema(model, 0.9), []
    assert torch.equal(ema.weights()["weight"], model.weight)
    for _ in range(20):
        model.weight.data.copy_(torch.randn(2, 3))
        history.append(model.weight.detach().clone())
        ema.update()
    share = torch.tensor([0.9 ** (19 - k) for k in range(20)])
    expected = torch.einsum("k,kij->ij", share / share.sum(), torch.stack(history))
    assert list(ema.weights()) == ["weight"]
    assert torch.allclose(ema.weights()["weight"], expected, atol=1e-6)
    with ema.applied():
        assert torch.allclose(model.weight, expected, atol=1e-6)
    assert torch.equal(model.weight, history[-1])
    with pytest.raises(CheckpointError, match="another model"):
        ema.load_state_dict({"updates": 1, "sums": {}})


def test_the_average_of_constrained_weights_keeps_the_lipschitz_constant():
    trainer = Trainer(quick(model="mlp"))
    trainer.run()
    raw = lipdp.lipschitz_constant(trainer.model, trainer.split.input_shape)
    with trainer.ema.applied():
        assert lipdp.lipschitz_constant(trainer.model, trainer.split.input_shape) <= raw * (1 + 1e-4)


def test_every_choice_by_name_works():
    parameters = [nn.Parameter(torch.zeros(2))]
    optimizer = make_optimizer("adam", parameters, lr=0.1, momentum=0.8)
    assert optimizer.defaults["betas"] == (0.8, 0.999)
    assert make_scheduler("constant", optimizer, steps=3).get_last_lr() == [0.1]
    for name in LOSSES:
        loss, outputs = make_loss(name, 2)
        values = loss(torch.randn(5, outputs), torch.tensor([0, 1, 1, 0, 1]))
        assert values.shape == (5,)


def test_progress_of_the_features_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("LIPDP_CACHE", str(tmp_path))
    seen = []

    class Watch(Monitor):
        def features(self, done, total):
            seen.append((done, total))

    trainer = Trainer(quick(features="dct", feature_options={"keep": 4, "unit_norm": True}, steps=2), monitor=Watch())
    assert trainer.run().steps == 2
    assert seen[-1] == (1797, 1797)
    assert trainer.model[0].bound == 1.0  # the features' own bound
    assert trainer.split.input_shape == (16,)


@pytest.mark.slow
def test_the_accuracy_that_readme_states():
    stated = re.search(r"`lipdp train` \(digits[^|]*\|[^|]*\|\s*([\d.]+) %", README.read_text())
    averaged = []
    for seed in range(5):
        result = train(configure(threads=2, seed=seed))
        assert result.epsilon <= 3.0
        averaged.append(result.metrics["test_accuracy_ema"])
    assert all(abs(accuracy - float(stated[1]) / 100) <= 0.02 for accuracy in averaged), averaged


def test_errors_are_those_of_the_library():
    for error in (Interrupted, KeyboardInterrupt):
        assert not issubclass(error, LipdpError)  # an interruption is no refusal
