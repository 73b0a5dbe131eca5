"""`torchrun -m lipdp train`: processes that die, are started again, or stop at a signal."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from worlds.agent import launch

from lipdp.cli import main

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc"),
]
SETTINGS = [
    "--model", "mlp", "--model-option", "depth=1", "--model-option", "width=8", "--batch-size", "64", "--seed", "3",
]  # fmt: skip
TOTAL, EARLY = 50, 10  # steps of a run, and when something happens to it at the soonest
STEPS = ["--steps", TOTAL, "--checkpoint-every", 5, "--log-every", 100, "--accountant", "rdp", "--threads", 1]
STEPS = [str(word) for word in STEPS]


@contextmanager
def torchrun(*arguments, restarts=0, size=2):
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={size}", f"--max-restarts={restarts}"]
    command += ["--monitor-interval=0.2", "--master-port=0", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    with subprocess.Popen(
        [*command, "-m", "lipdp", "train", *SETTINGS, *STEPS, *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.terminate()  # ends its workers, if it has any left


def worker(parent, rank):
    """The process id of a rank."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            kin = int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == parent
            if kin and f"RANK={rank}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                return int(entry.name)
        except (OSError, ValueError):
            continue
    raise AssertionError(f"no process of rank {rank}")


def wait_for_step(folder, step, process):
    end = time.monotonic() + 120
    while time.monotonic() < end and process.poll() is None:
        report = folder / "privacy.json"
        if report.exists() and json.loads(report.read_text())["steps"] >= step:
            return
        time.sleep(0.02)
    said = process.communicate(timeout=60)[0] if isinstance(process, subprocess.Popen) else process
    raise AssertionError(f"step {step} was not reached: {said}")


def last(folder):
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone") / "run"
    assert main(["train", *SETTINGS, *STEPS, "--out", str(folder)]) == 0
    return folder


def assert_same_run(folder, alone):
    ours, theirs = (torch.load(f / "checkpoint.pt", weights_only=True) for f in (folder, alone))
    assert ours["step"] == theirs["step"] == TOTAL
    for name, value in theirs["model"].items():
        torch.testing.assert_close(ours["model"][name], value, rtol=1e-3, atol=1e-3)
    assert last(folder)["epsilon"] == last(alone)["epsilon"]
    assert json.loads((folder / "privacy.json").read_text())["steps_counted_again"] == 0


@contextmanager
def agent(forks, *arguments, restarts=0):
    """What `torchrun` runs, without the start of Python and torch in each of its processes."""
    folder = Path(arguments[1]).parent
    words = ["train", *SETTINGS, *STEPS, *arguments]
    process = forks.Process(target=launch, args=(folder, words), kwargs={"restarts": restarts})
    process.start()
    process.poll = lambda: process.exitcode
    try:
        yield process
    finally:
        process.terminate()  # ends its workers, if it has any left
        process.join(60)


def test_a_killed_process_is_started_again_with_all_and_nothing_is_lost(tmp_path, alone, forks):
    with agent(forks, "--out", tmp_path / "run", restarts=1) as process:
        wait_for_step(tmp_path / "run", EARLY, process)
        os.kill(int((tmp_path / "worker-1").read_text()), signal.SIGKILL)
        process.join(180)
    assert process.exitcode == 0
    assert_same_run(tmp_path / "run", alone)


@pytest.mark.slow
def test_under_torchrun_too(tmp_path, alone):
    with torchrun("--out", tmp_path / "run", restarts=1) as process:
        wait_for_step(tmp_path / "run", EARLY, process)
        os.kill(worker(process.pid, 1), signal.SIGKILL)
        said, _ = process.communicate(timeout=180)
    assert process.returncode == 0, said
    assert_same_run(tmp_path / "run", alone)


@pytest.mark.slow
def test_without_restarts_the_others_end_and_the_checkpoint_is_whole(tmp_path, alone):
    folder = tmp_path / "run"
    with torchrun("--out", folder) as process:
        wait_for_step(folder, EARLY, process)
        os.kill(worker(process.pid, 0), signal.SIGKILL)
        process.communicate(timeout=60)
    assert process.returncode != 0
    assert EARLY <= torch.load(folder / "checkpoint.pt", weights_only=True)["step"] < TOTAL
    assert main(["train", "--resume", str(folder)]) == 0  # alone
    assert_same_run(folder, alone)


@pytest.mark.slow
def test_a_silent_process_counts_as_lost_after_the_timeout(tmp_path, alone):
    folder = tmp_path / "run"
    with torchrun("--out", folder, "--peer-timeout", "0.1") as process:
        wait_for_step(folder, EARLY, process)
        silent = worker(process.pid, 1)
        os.kill(silent, signal.SIGSTOP)
        said, _ = process.communicate(timeout=90)  # six seconds, and the half minute that torchrun gives the silent one
    assert process.returncode != 0
    assert "process 0 of 2 cannot reach the other processes" in said
    assert EARLY <= torch.load(folder / "checkpoint.pt", weights_only=True)["step"] < TOTAL


@pytest.mark.slow
def test_a_signal_stops_all_at_the_same_step(tmp_path, alone):
    folder = tmp_path / "run"
    with torchrun("--out", folder) as process:
        wait_for_step(folder, EARLY, process)
        os.kill(worker(process.pid, 1), signal.SIGTERM)
        said, _ = process.communicate(timeout=60)
    assert "interrupted after step" in said
    with torchrun("--resume", folder, size=4) as again:
        said, _ = again.communicate(timeout=120)
    assert again.returncode == 0, said
    assert_same_run(folder, alone)


@pytest.mark.slow
def test_what_a_user_gets_wrong_is_said_once(tmp_path):
    with torchrun("--dataset", "nothing", "--out", tmp_path / "run") as process:
        said, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert said.count("error: unknown data set") == 1
    with torchrun(restarts=1) as process:
        said, _ = process.communicate(timeout=120)
    assert "give --out DIR" in said
