"""Where a step's time goes: the parts, their sum, and a run that they do not change."""

from __future__ import annotations

import json
import time

import kit
import pytest
import torch
from small_convnet import config, weights

from lipdp.timing import UNTIMED
from lipdp.training import Trainer
from lipdp.training.profile import PARTS, PartsTimer, StepProfile

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_profile_does_not_change_what_is_computed(tmp_path):
    ends = []
    for name, profile in (("without", None), ("with", StepProfile(tmp_path / "with"))):
        trainer = Trainer(config(), out=tmp_path / name, profile=profile)
        trainer.run()
        ends.append((weights(trainer.model), trainer.ema.weights(), trainer.records[-1]["train_loss_not_private"]))
    assert torch.equal(ends[0][0], ends[1][0])
    assert all(torch.equal(ends[0][1][n], ends[1][1][n]) for n in ends[0][1])
    assert ends[0][2] == ends[1][2]
    table = json.loads((tmp_path / "with" / "profile.json").read_text())
    assert table["steps"] == [3, 9]
    assert list(table["parts"]) == list(PARTS)
    assert all(table["parts"][part]["seconds"] > 0 for part in PARTS)
    assert sum(part["seconds"] for part in table["parts"].values()) == pytest.approx(table["step_seconds"], rel=1e-9)
    assert sum(part["share"] for part in table["parts"].values()) == pytest.approx(1.0)
    assert all(part["processor_seconds"] >= 0 for part in table["parts"].values())
    trace = json.loads((tmp_path / "with" / "trace.json").read_text())
    names = [event.get("name") for event in trace["traceEvents"] if event.get("cat") == "user_annotation"]
    assert {f"lipdp: {part}" for part in PARTS if part != "other"} | {"lipdp: step"} <= set(names)
    assert names.count("lipdp: step") == 3
    assert not (tmp_path / "without" / "profile.json").exists()


def test_parts_within_parts_are_counted_once():
    timer = PartsTimer(torch.device("cpu"))
    for _ in range(2):
        with timer.step(), timer("optimiser"):
            time.sleep(0.002)
            with timer("noise"):
                time.sleep(0.02)
            time.sleep(0.002)
    for parts in timer.read():
        assert set(parts) == {"other", "optimiser", "noise"}
        assert parts["noise"] >= 0.02
        assert parts["optimiser"] >= 0.004


def test_an_error_in_a_traced_step_takes_the_profiler_down(tmp_path):
    profile = StepProfile(tmp_path)
    cpu = torch.device("cpu")
    for done in range(3):
        with profile.step(done, 5, cpu):
            pass
    with pytest.raises(KeyboardInterrupt), profile.step(3, 5, cpu):
        raise KeyboardInterrupt
    assert not torch.autograd._profiler_enabled()


def test_a_resumed_run_is_profiled_from_where_it_goes_on(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        Trainer(
            config(checkpoint_every=2, log_every=6), out=tmp_path / "run", monitor=kit.Raises(4, KeyboardInterrupt())
        ).run()
    profile = StepProfile(tmp_path / "run")
    trainer = Trainer.resume(tmp_path / "run", profile=profile)
    trainer.run()
    whole = Trainer(config(checkpoint_every=2, log_every=6))
    whole.run()
    assert profile.table["steps"][0] == 5
    assert torch.equal(weights(trainer.model), weights(whole.model))


def test_nobody_times_by_default():
    assert UNTIMED("noise") is UNTIMED("bound")
