"""What a run will cost: the arithmetic exactly, the fit on synthetic times, the measurement on small models."""

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

from lipdp.cli import main
from lipdp.distributed import collectives as world_module
from lipdp.errors import ParameterError
from lipdp.planning import cost as cost_module
from lipdp.planning import measure as measuring
from lipdp.planning.cost import (
    Cost,
    Memory,
    Network,
    StepTime,
    StepTimes,
    Timing,
    fit_memory,
    fit_times,
    predict,
    predictions,
)
from lipdp.planning.measure import Workload, flops, memory, peak, private_step
from lipdp.privacy.criterion import PrivateCriterion
from lipdp.processes import ProcessEnded, in_own_process

pytestmark = pytest.mark.usefixtures("one_thread")

TRUE = StepTime(0.05, 0.004, 0.0007)
SMALL = Workload(model="mlp", model_options={"width": 16}, input_shape=(8,), num_classes=3, microbatch=16)


def timings(step=TRUE, sizes=(0, 128, 256, 512), *, noise=0.0, repeat=7, microbatch=512, seed=0):
    rng = np.random.default_rng(seed)
    return [
        Timing(n, tuple((step.seconds(n, microbatch) * np.exp(noise * rng.standard_normal(repeat))).tolist()))
        for n in sizes
    ]


def cost(step=TRUE, **changes):
    return replace(Cost(10**6, StepTimes(step, (step,)), Memory(300, 100, 2.0, 1.0), 512), **changes)


# --- the arithmetic ---------------------------------------------------------------------------------------------------


def test_a_step_is_fixed_plus_pieces_plus_samples():
    assert TRUE.seconds(0, 512) == 0.05
    assert TRUE.seconds(512, 512) == pytest.approx(0.05 + 0.004 + 512 * 0.0007)
    assert TRUE.seconds(513, 512) == pytest.approx(0.05 + 0.008 + 513 * 0.0007)


def test_a_ring_moves_each_byte_twice_but_for_its_own_share():
    network = Network(bandwidth=1e9, internode_bandwidth=1e8, latency=1e-3, per_node=8)
    assert network.all_reduce(4 * 10**6, 1) == 0
    assert network.all_reduce(4 * 10**6, 8) == pytest.approx(2 * 7 / 8 * 4e6 / 1e9 + 14e-3)
    assert network.all_reduce(4 * 10**6, 16) == pytest.approx(2 * 15 / 16 * 4e6 / 1e8 + 30e-3)
    assert network.all_reduce(4 * 10**8, 8) == pytest.approx(2 * 7 / 8 * 4e8 / 1e9 + 12 * 14e-3)  # 12 buckets of 32 MiB
    assert cost_module._BUCKET == 4 * world_module._BUCKET


def test_a_prediction_by_hand():
    network = Network(bandwidth=1e9, latency=1e-3)
    found = predict(cost(), batch_size=4097, steps=100, devices=4, network=network, speedup=2.0)
    compute = (0.05 + 0.004 * 3 + 0.0007 * 1025) / 2  # 1,025 samples on the fullest device, in three pieces
    reduce = 1.5 * 4e6 / 1e9 + 6e-3
    assert found.samples == 1025
    assert found.compute_seconds == pytest.approx(compute)
    assert found.reduce_seconds == pytest.approx(reduce)
    assert found.step_seconds == pytest.approx(compute + reduce)
    assert found.run_seconds == pytest.approx(100 * (compute + reduce))
    assert found.fixed_share == pytest.approx(0.025 / (compute + reduce))
    assert found.as_dict()["device_hours"] == pytest.approx(4 * 100 * (compute + reduce) / 3600)
    assert found.peak_bytes == 300 + 100 + 2 * 512 + 1025


def test_without_a_microbatch_a_step_is_one_piece():
    found = predict(cost(microbatch=None), batch_size=4096, steps=1)
    assert found.compute_seconds == pytest.approx(0.05 + 0.004 + 0.0007 * 4096)
    assert found.peak_bytes == 300 + 100 + 3 * 4096


def test_more_devices_never_take_longer_to_compute_and_the_fixed_part_stays():
    found = predictions(cost(), [1, 2, 8, 64, 4096], batch_size=4096, steps=1)
    seconds = [prediction.compute_seconds for prediction in found]
    assert seconds == sorted(seconds, reverse=True)
    assert seconds[-1] > TRUE.fixed
    shares = [prediction.fixed_share for prediction in found[:3]]
    assert shares == sorted(shares)


@pytest.mark.parametrize(
    "changes",
    [{"devices": 0}, {"devices": 4097}, {"steps": 0}, {"speedup": 0.0}, {"speedup": math.nan}, {"batch_size": 0}],
)
def test_predictions_out_of_range_are_refused(changes):
    with pytest.raises(ParameterError, match="are needed"):
        predict(cost(), **{"batch_size": 4096, "steps": 1, **changes})


@pytest.mark.parametrize("changes", [{"bandwidth": 0.0}, {"latency": -1.0}, {"per_node": 0}, {"bandwidth": math.nan}])
def test_networks_out_of_range_are_refused(changes):
    with pytest.raises(ParameterError, match="are needed"):
        Network(**changes)


# --- the fit ----------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(
    fixed=st.floats(1e-4, 1.0), piece=st.floats(1e-5, 0.1), sample=st.floats(1e-4, 1e-2), seed=st.integers(0, 2**32 - 1)
)
def test_exact_times_are_fitted_exactly(fixed, piece, sample, seed):
    true = StepTime(fixed, piece, sample)
    found = fit_times(timings(true, seed=seed), 512)
    assert found.fit.seconds(10_000, 512) == pytest.approx(true.seconds(10_000, 512), rel=1e-6)
    assert found.fit.fixed == pytest.approx(fixed, rel=1e-4)


def test_the_interval_holds_the_truth_nine_times_in_ten():
    """200 measurements with 3 % of noise: coverage 0.9 nominal; a bootstrap of 9 medians is a little short of it."""
    covered, truth = 0, TRUE.seconds(4096, 512)
    for seed in range(200):
        low, high = fit_times(timings(noise=0.03, repeat=9, seed=seed), 512).interval(4096, 512)
        assert 0.8 * truth < low <= high < 1.25 * truth
        covered += low <= truth <= high
    assert covered >= 150  # 15 standard deviations above what an interval half as wide would give


def test_more_noise_is_a_wider_interval():
    widths = [np.diff(fit_times(timings(noise=noise), 512).interval(4096, 512)).item() for noise in (0.0, 0.01, 0.05)]
    assert widths == sorted(widths)
    assert widths[0] < 1e-9 < widths[1]


def test_one_slow_step_of_seven_moves_nothing():
    clean = timings()
    struck = [replace(t, seconds=(10 * t.seconds[0], *t.seconds[1:])) for t in clean]
    assert fit_times(struck, 512).fit.seconds(4096, 512) == pytest.approx(TRUE.seconds(4096, 512))


def test_times_that_are_noise_are_refused():
    fixed_only = StepTime(0.05, 0.0, 1e-7)
    with pytest.raises(ParameterError, match="too noisy"):
        fit_times(timings(fixed_only, noise=0.2), 512)


@pytest.mark.parametrize(
    "given",
    [timings(sizes=(0, 64)), timings(repeat=2), [*timings()[:2], Timing(512, (1.0,) * 9)], timings(sizes=(8, 8))],
)
def test_too_few_times_are_refused(given):
    with pytest.raises(ParameterError, match="two sizes above 0"):
        fit_times(given, 512)


def test_memory_is_a_line_above_the_process():
    found = fit_memory(1000, [(10, 1000 + 500 + 10 * 7), (20, 1000 + 500 + 20 * 7), (40, 1000 + 500 + 40 * 7)], 3.0)
    assert found == Memory(1000, 500, 4.0, 3.0)
    assert found.bytes(40, 40) == 1780
    assert found.bytes(400, 40) == 1500 + 40 * 4 + 400 * 3  # ten pieces: the activations of one, the records of all
    with pytest.raises(ParameterError, match="two sizes"):
        fit_memory(0, [(10, 5)], 1.0)


# --- the measurement --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [0, 5, 40])
def test_the_step_measured_is_a_private_one_on_that_many_samples(samples, monkeypatch):
    """Each sample goes through the criterion once, in pieces; every weight moves, also where there is only noise."""
    seen, forward = [], PrivateCriterion.forward
    monkeypatch.setattr(PrivateCriterion, "forward", lambda self, z, y: (seen.append(len(z)), forward(self, z, y))[1])
    module, step = private_step(SMALL, samples)
    before = [p.detach().clone() for p in module.parameters()]
    step()
    step()
    assert sum(seen) == 2 * samples
    assert all(n <= 16 for n in seen)
    assert all(not torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))


def test_times_are_taken_round_by_round(monkeypatch):
    order = []
    monkeypatch.setattr(measuring, "private_step", lambda workload, n: (None, lambda: order.append(n)))
    found = measuring.times(SMALL, (4, 8), repeat=3)
    assert order == [0, 4, 8] * 5  # two rounds to warm up
    assert [(t.samples, len(t.seconds)) for t in found] == [(0, 3), (4, 3), (8, 3)]


def test_peak_memory_sees_the_activations():
    """256 hidden units of float32 for 7,680 samples more are 7.5 MiB each time they are kept, in each of two layers."""
    found = memory(replace(SMALL, model_options={"width": 256}, microbatch=None), (512, 8192))
    kept = 2 * 256 * 4
    assert kept < found.sample < 20 * kept
    assert found.record == 8 * 4 + 8
    assert 50 << 20 < found.process < 1 << 30


def test_a_step_that_does_not_fit_is_refused():
    wide = replace(SMALL, model_options={"width": 4096}, microbatch=None)
    with pytest.raises(ParameterError, match="does not fit"):
        peak(wide, 30_000, memory_limit=600 << 20)


def test_the_operations_of_a_dense_layer():
    """2mn forwards, 2mn for the weight; the first layer's input needs no gradient, the second's does."""
    assert flops(replace(SMALL, model_options={"width": 16, "depth": 1})) == 2 * 8 * 16 * 2 + 2 * 16 * 3 * 3


def test_a_process_that_dies_is_reported():
    with pytest.raises(ProcessEnded, match="without an answer"):
        in_own_process(os._exit, 3)


@pytest.mark.slow
@pytest.mark.distributed
def test_a_reduction_between_two_processes(tmp_path):
    found = measuring.measure_reduce(100_000, tmp_path, repeat=3)
    assert 1e4 < found.bandwidth < 1e13
    assert 0 < found.latency < 60
    assert found.all_reduce(400_000, 2) > 2 * found.latency


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_measurement_on_cuda():
    found, _ = measuring.measure(replace(SMALL, device="cuda", microbatch=None), (1024, 4096, 16384), repeat=5)
    assert found.memory.sample > 0
    assert predict(found, batch_size=32768, steps=1).step_seconds > 0


# --- the command ------------------------------------------------------------------------------------------------------

SCALE = ["plan", "--scale", "--model", "mlp", "--dataset", "digits", "--batch-size", "1024", "--steps", "50"]


@pytest.fixture
def measured(monkeypatch):
    """A measurement that is known, and takes no time."""
    calls = []

    def fake(workload, sizes, **options):
        calls.append((workload, sizes, options))
        return cost(), timings()

    monkeypatch.setattr(measuring, "measure", fake)
    return calls


def test_the_command_predicts(measured, tmp_path, capsys):
    assert (
        main([*SCALE, "--devices", "1", "8", "--bandwidth-gb", "1", "--latency-us", "0", "--out", str(tmp_path)]) == 0
    )
    printed = capsys.readouterr().out
    workload, sizes, _ = measured[0]
    assert (workload.model, workload.input_shape, sizes) == ("mlp", (1, 8, 8), (128, 256, 512))
    written = json.loads((tmp_path / "cost.json").read_text())
    one, eight = written["predictions"]
    assert one["step_seconds"] == pytest.approx(0.05 + 0.008 + 0.0007 * 1024)
    assert eight["step_seconds"] == pytest.approx(0.05 + 0.004 + 0.0007 * 128 + 7 / 4 * 4e6 / 1e9)
    assert written["flops_per_sample"] > 0
    assert written["network"]["measured"] is False
    assert "assumed: a ring, 1 GB/s" in printed
    assert "ASSUMED, not measured" not in printed


def test_a_measurement_serves_again(measured, tmp_path, capsys):
    """From the file, with other assumptions: nothing is measured twice."""
    assert main([*SCALE, "--devices", "8", "--out", str(tmp_path)]) == 0
    first = json.loads((tmp_path / "cost.json").read_text())["predictions"][0]
    arguments = [
        "--measured",
        str(tmp_path),
        "--batch-size",
        "1024",
        "--steps",
        "50",
        "--devices",
        "8",
        "--speedup",
        "4",
    ]
    capsys.readouterr()
    assert main(["plan", "--scale", *arguments, "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["workload"]["model"] == "mlp"
    assert again["predictions"][0]["compute_seconds"] == pytest.approx(first["compute_seconds"] / 4)
    assert again["predictions"][0]["peak_bytes"] == first["peak_bytes"]
    assert len(measured) == 1


@pytest.mark.parametrize(
    ("text", "message"), [("{", "cannot be read"), ("{}", "is not what"), (None, "cannot be read")]
)
def test_a_measurement_that_is_none_is_refused(text, message, tmp_path, capsys):
    if text is not None:
        (tmp_path / "cost.json").write_text(text)
    assert main(["plan", "--scale", "--measured", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_on_a_busy_machine_cpu_time_is_counted(measured, capsys):
    assert main([*SCALE, "--cpu-time", "--device", "cpu", "--threads", "1"]) == 0
    assert measured[0][2]["clock"] is time.process_time
    assert "CPU time" in capsys.readouterr().out
    assert main(SCALE) == 0
    assert measured[1][2]["clock"] is time.perf_counter


def test_the_command_says_that_a_speedup_is_assumed(measured, capsys):
    assert main([*SCALE, "--speedup", "100"]) == 0
    assert "ASSUMED, not measured: each device is 100 times" in capsys.readouterr().out.replace("\n", " ")


@pytest.mark.parametrize(
    "arguments",
    [
        ["plan", "--model", "mlp", "--scale", "--dataset", "digits", "--json"],
        ["plan", "scale", "--model", "mlp", "--dataset", "digits", "--json"],
        [*SCALE, "--input-shape", "1", "8", "8", "--json"],
    ],
)
def test_the_flag_may_stand_anywhere(measured, arguments, capsys):
    assert main(arguments) == 0
    assert [p["devices"] for p in json.loads(capsys.readouterr().out)["predictions"]] == [1, 8, 64]
    assert measured[0][0].input_shape == (1, 8, 8)


def test_the_scale_of_a_simulation_is_another_option(capsys):
    """`lipdp plan simulate --scale 16` is not this command."""
    assert main(["plan", "simulate", "--scale", "1000", "--search", "lr=0.1:1", "--out", "/nowhere/at/all"]) == 2
    assert "scale" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--devices", "2000"], "devices ≤ batch_size"),
        (["--speedup", "0"], "speedup > 0"),
        (["--dataset", "imgenet"], "did you mean 'imagenet'"),
        (["--model", "cn"], "did you mean 'cnn'"),
        (["--sizes", "600", "700"], "two sizes at least"),
        (["--sizes", "8", "16", "--repeat", "2"], "3 repetitions"),
        (["--microbatch", "0"], "at least one sample"),
        (["--bandwidth-gb", "0"], "positive bandwidths"),
        (["--device", "cuda:99"], "cannot be used here"),
        (["--num-classes", "0"], "classes"),
        (["--cpu-time", "--threads", "2"], "--threads 1"),
    ],
)
def test_the_command_refuses_in_one_line(arguments, message, capsys):
    assert main([*SCALE, *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert len(error.splitlines()) == 1


@pytest.mark.slow
def test_the_command_measures(tmp_path, monkeypatch):
    monkeypatch.setattr(cost_module, "_WIDEST", math.inf)  # however busy the machine is
    assert main([*SCALE, "--repeat", "5", "--measure-reduce", "--out", str(tmp_path)]) == 0
    written = json.loads((tmp_path / "cost.json").read_text())
    assert len(written["timings"]) == 4
    assert written["network"]["measured"] is True
    assert written["predictions"][0]["peak_bytes"] > 50 << 20
