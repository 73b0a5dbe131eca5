"""What a run will cost: the arithmetic by hand, the measurement on small models, the command."""

import json
import math
import os
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kit import refusal

from lipdp.cli import main
from lipdp.distributed import collectives
from lipdp.errors import LipdpError, ParameterError, UnknownNameError
from lipdp.planning import cost as cost_module
from lipdp.planning.cost import Cost, Scale, Workload, measure_cost, private_step
from lipdp.privacy.criterion import PrivateCriterion
from lipdp.processes import peak_bytes

pytestmark = pytest.mark.usefixtures("one_thread", "forks")

COST = Cost(10**6, 8, (0, 128, 512), ((0.05, 0.15, 0.45),) * 3, (1000, 2000, 5000))
SMALL = Workload(model="mlp", model_options={"width": 16}, input_shape=(8,), num_classes=3)
WIDE = replace(SMALL, model_options={"width": 4096})


# --- the arithmetic ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("samples", "seconds", "peak"),
    [
        (64, 0.10, 1500),
        (128, 0.15, 2000),
        (512, 0.45, 5000),
        (513, 0.45 + 0.1 / 128, 5000 + 8),
        (1024, 0.85, 5000 + 8 * 512),
        (1280, 1.25 - 0.4 + 0.3 * 128 / 384 + 0.10, 5000 + 8 * 768),
    ],
)
def test_a_step_by_hand(samples, seconds, peak):
    """Measured sizes as measured, a line between them, whole pieces of 0.4 s and their records beyond."""
    found = COST.predict(Scale(batch_size=samples, steps=100))
    assert found.step_seconds == pytest.approx(seconds)
    assert found.step_quartiles == pytest.approx((seconds, seconds))
    assert found.run_seconds == pytest.approx(100 * seconds)
    assert (found.fixed_seconds, found.reduce_seconds, found.peak_bytes) == (0.05, 0, peak)


@settings(deadline=None, max_examples=30)
@given(fixed=st.floats(0, 1), sample=st.floats(1e-4, 1e-2), batch=st.integers(1, 10**6))
def test_a_step_that_is_a_line_is_found_at_any_batch(fixed, sample, batch):
    rounds = (tuple(fixed + sample * n for n in COST.sizes),) * 3
    found = replace(COST, seconds=rounds).predict(Scale(batch_size=batch))
    assert found.step_seconds == pytest.approx(fixed + sample * batch, rel=1e-6)


def test_devices_share_the_samples_and_move_each_gradient_twice():
    """1,025 samples on the fullest of 4; a ring sends a gradient but for its W-th part, twice."""
    scale = Scale(batch_size=4097, devices=4, bandwidth=1e9, latency=1e-3)
    found = COST.predict(scale)
    alone = COST.predict(Scale(batch_size=1025))
    assert found.reduce_seconds == pytest.approx(1.5 * 4e6 / 1e9 + 6e-3)
    assert found.step_seconds == pytest.approx(alone.step_seconds + found.reduce_seconds)
    large = replace(COST, parameters=10**8).predict(replace(scale, devices=8))
    assert large.reduce_seconds == pytest.approx(2 * 7 / 8 * 4e8 / 1e9 + 12 * 14e-3)  # 12 buckets of 32 MiB
    assert cost_module._BUCKET == 4 * collectives._BUCKET


def test_a_slow_round_moves_nothing_and_the_quartiles_hold_the_truth():
    rounds = [tuple(t * factor for t in COST.seconds[0]) for factor in (0.9, 0.95, 1.0, 1.1, 30.0)]
    found = replace(COST, seconds=tuple(rounds)).predict(Scale(batch_size=4096))
    truth = COST.predict(Scale(batch_size=4096)).step_seconds
    assert found.step_seconds == pytest.approx(truth)
    assert found.step_quartiles == pytest.approx((0.95 * truth, 1.1 * truth))


def test_times_that_are_noise_are_refused():
    with pytest.raises(ParameterError, match="no longer than empty ones"):
        replace(COST, seconds=((0.5, 0.4, 0.45),) * 3).predict(Scale(batch_size=4096))


@pytest.mark.parametrize(
    "changes",
    [{"devices": 0}, {"devices": 4097}, {"steps": 0}, {"batch_size": 0}, {"bandwidth": 0.0}, {"bandwidth": math.nan},
     {"latency": -1.0}, {"latency": math.inf}],
)  # fmt: skip
def test_runs_out_of_range_are_refused(changes):
    with pytest.raises(ParameterError, match="are needed"):
        Scale(**{"batch_size": 4096, **changes})


# --- the measurement --------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("error:this run can hardly learn", "error:this learning rate is far too")
@pytest.mark.parametrize("samples", [0, 5, 40])
def test_the_step_measured_is_a_private_one_on_that_many_samples(samples, monkeypatch):
    """Each sample goes through the criterion once, in pieces; every weight moves, also where there is only noise."""
    seen, forward, models, build = [], PrivateCriterion.forward, [], Workload.build
    monkeypatch.setattr(PrivateCriterion, "forward", lambda self, z, y: (seen.append(len(z)), forward(self, z, y))[1])
    monkeypatch.setattr(Workload, "build", lambda self: (models.append(build(self)), models[-1])[1])
    step = private_step(SMALL, samples, 16)
    before = [p.detach().clone() for p in models[0].parameters()]
    step()
    step()
    assert sum(seen) == 2 * samples
    assert all(n <= 16 for n in seen)
    assert all(not torch.equal(a, b) for a, b in zip(before, models[0].parameters(), strict=True))


def test_times_are_taken_round_by_round(monkeypatch):
    order = []
    monkeypatch.setattr(cost_module, "private_step", lambda workload, n, m: lambda: order.append(n))
    found = measure_cost(SMALL, 8, repeat=3, memory=False, clock=iter(range(100)).__next__)
    assert order == [0, 2, 8] * 5  # two rounds to warm up
    assert (found.sizes, found.seconds, found.peaks) == ((0, 2, 8), ((1, 1, 1),) * 3, None)
    assert (found.parameters, found.record) == (sum(p.numel() for p in SMALL.build().parameters()), 4 * 8 + 8)


def test_peak_memory_sees_the_activations():
    """256 hidden units of float32 for 8,192 samples are 8 MiB each time they are kept, in each of two layers."""
    empty, _, full = measure_cost(replace(SMALL, model_options={"width": 256}), 8192, repeat=3).peaks
    kept = 8192 * 2 * 256 * 4
    assert kept < full - empty < 20 * kept
    assert 50 << 20 < empty < 1 << 30


def test_a_step_that_does_not_fit_is_refused(monkeypatch):
    assert peak_bytes(private_step, WIDE, 30_000, 30_000, memory_limit=600 << 20) is None
    monkeypatch.setattr(cost_module, "peak_bytes", lambda *arguments, **options: None)
    with pytest.raises(ParameterError, match="do not fit"):
        measure_cost(SMALL, 8, repeat=3)


def test_a_process_that_dies_has_no_peak_and_one_that_refuses_says_why():
    assert peak_bytes(os._exit, 3) is None
    with pytest.raises(UnknownNameError, match="did you mean 'mlp'") as refused:
        peak_bytes(private_step, replace(SMALL, model="mlpp"), 1, 1)
    assert isinstance(refused.value, LipdpError)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_measurement_on_cuda():
    found = measure_cost(replace(WIDE, device="cuda"), 16384, repeat=5)
    assert found.peaks[-1] > found.peaks[0] > 0
    assert found.predict(Scale(batch_size=32768)).step_seconds > 0


# --- the command ------------------------------------------------------------------------------------------------------

COMMAND = ["plan", "scale", "--model", "mlp", "--input-shape", "1", "8", "8", "--steps", "50"]


@pytest.fixture
def measured(monkeypatch):
    """A measurement that is known, and takes no time."""
    calls = []
    monkeypatch.setattr(
        cost_module, "measure_cost", lambda *given, **options: (calls.append((*given, options)), COST)[1]
    )
    return calls


def test_the_command_predicts(measured, capsys):
    network = ["--bandwidth-gb", "1", "--latency-us", "0"]
    assert main([*COMMAND, "--batch-sizes", "512", "1024", "--devices", "1", "8", *network, "--json"]) == 0
    workload, microbatch, options = measured[0]
    assert (workload.model, workload.input_shape, microbatch) == ("mlp", (1, 8, 8), 512)
    assert options == {"repeat": 7, "memory": True}
    found = json.loads(capsys.readouterr().out)["predictions"]
    asked = [(p["scale"]["batch_size"], p["scale"]["devices"]) for p in found]
    assert asked == [(512, 1), (512, 8), (1024, 1), (1024, 8)]
    assert found[3]["step_seconds"] == pytest.approx(0.15 + 7 / 4 * 4e6 / 1e9)
    assert main([*COMMAND, "--batch-sizes", "1024"]) == 0
    printed = capsys.readouterr().out
    assert "1,000,000 weights" in printed
    assert "0.85" in printed
    assert "Assumed: bandwidth and latency" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--devices", "8000"], "devices ≤ batch_size"),
        (["--model", "cn"], "did you mean 'cnn'"),
        (["--repeat", "2"], "3 repetitions"),
        (["--microbatch", "0"], "--microbatch 0: a whole number"),
        (["--bandwidth-gb", "0"], "positive numbers"),
        (["--device", "cuda:99"], "cannot be used here"),
        (["--threads", "0"], "--threads 0: a whole number"),
        (["--num-classes", "0"], "classes"),
        (["--input-shape", "0"], "sizes of one sample"),
    ],
)
def test_the_command_refuses_in_one_line(arguments, message, capsys):
    assert message in refusal([*COMMAND, *arguments], capsys)


@pytest.mark.slow
def test_the_command_measures(capsys):
    before = time.perf_counter()
    assert main([*COMMAND, "--model-option", "width=512", "--repeat", "5", "--json"]) == 0
    cost = json.loads(capsys.readouterr().out)["cost"]
    assert cost["sizes"] == [0, 128, 512]
    assert np.shape(cost["seconds"]) == (5, 3)
    assert 0 < np.sum(cost["seconds"]) < time.perf_counter() - before
    assert min(cost["peaks"]) > 50 << 20
