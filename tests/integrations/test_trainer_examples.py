"""The examples of trainers, in one process and in two, release the weights of the plain loop."""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys

import pytest
import torch
from plain_loop import DELTA, EXAMPLES, QUIET, same

pytest.importorskip("lightning")
pytest.importorskip("accelerate")
pytestmark = QUIET


# --- the examples -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lightning_private", "fabric_private", "accelerate_private"])
def test_an_example_releases_the_weights_of_the_plain_loop(name, twin, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--seed", "0"])
    monkeypatch.chdir(tmp_path)
    names = runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    model = names["module"].model if "module" in names else names["model"]
    assert same(model.state_dict(), twin[0])
    assert names["engine"].get_epsilon(DELTA) == twin[1] <= 3.0
    assert names["engine"].steps_taken == 60
    assert names["accuracy"] > 0.6
    assert "test accuracy 0." in capsys.readouterr().out


KILLED = """
import os, signal, sys
import lightning
lightning.pytorch.callbacks.ModelCheckpoint.on_train_batch_end = (lambda real: lambda self, trainer, *args: (
    real(self, trainer, *args), trainer.global_step == 47 and os.kill(os.getpid(), signal.SIGKILL)))(
    lightning.pytorch.callbacks.ModelCheckpoint.on_train_batch_end)
import runpy
sys.argv = [sys.argv[1], "--seed", "0"]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_the_example_killed_and_resumed_releases_the_weights_of_the_plain_loop(twin, tmp_path, monkeypatch):
    example = str(EXAMPLES / "lightning_private.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLES.parent)}
    process = subprocess.run(
        [sys.executable, "-c", KILLED, example], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert process.returncode == -signal.SIGKILL, process.stderr
    folder = tmp_path / "lightning_digits"
    assert sorted(path.name for path in folder.iterdir()) == ["step=20.ckpt", "step=40.ckpt"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [example, "--seed", "0", "--resume", str(folder / "step=40.ckpt")])
    names = runpy.run_path(example, run_name="__main__")
    assert same(names["module"].model.state_dict(), twin[0])
    assert names["engine"].get_epsilon(DELTA) == twin[1]


# --- several processes ------------------------------------------------------------------------------------------------


def run_in_a_process(*command, cwd, **variables):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLES.parent), **variables}
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def close(one, other):
    return one.keys() == other.keys() and all(torch.allclose(one[name], other[name], atol=2e-6) for name in one)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("name", ["accelerate", "fabric"])
def test_two_processes_release_what_one_does(name, twin, tmp_path):
    """One account, one draw of the batch and one of the noise: at one seed all that differs is the order of a sum."""
    launch = {
        "accelerate": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2],
        "fabric": [],  # starts its processes itself
    }
    more = {"accelerate": [], "fabric": ["--processes", 2]}
    printed = run_in_a_process(
        *launch[name], EXAMPLES / f"{name}_private.py", "--seed", 0, "--out", "two.pt", *more[name],
        cwd=tmp_path, ACCELERATE_USE_CPU="true",
    )  # fmt: skip
    assert printed.count("2 process(es), 60 steps") == 1
    assert f"ε = {twin[1]:.3f}" in printed
    weights = torch.load(tmp_path / "two.pt", weights_only=True)
    assert close(weights, twin[0])


@pytest.mark.slow
@pytest.mark.distributed
def test_the_trainer_on_two_processes_releases_what_one_does_and_one_goes_on(twin, tmp_path, monkeypatch):
    """DistributedDataParallel by Lightning, the closure included; then the run of two processes ends on one."""
    example = EXAMPLES / "lightning_private.py"
    printed = run_in_a_process(example, "--seed", 0, "--processes", 2, cwd=tmp_path)
    assert printed.count(f"ε = {twin[1]:.3f}") == 1
    folder = tmp_path / "lightning_digits"
    state = torch.load(folder / "step=60.ckpt", weights_only=True)["state_dict"]
    weights = {name.removeprefix("model."): value for name, value in state.items()}
    assert close(weights, twin[0])
    assert not same(weights, twin[0])  # there were two: the sum is rounded in another order
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(example), "--seed", "0", "--resume", str(folder / "step=40.ckpt")])
    names = runpy.run_path(str(example), run_name="__main__")
    assert close(names["module"].model.state_dict(), twin[0])
    assert names["engine"].get_epsilon(DELTA) == twin[1]


HOOKED = """
import runpy, sys
import lightning, torch
from lightning.pytorch.strategies import DDPStrategy

def lossy(state, bucket):
    future = torch.futures.Future()
    future.set_result(bucket.buffer() * 0.0)
    return future

class Hooked(DDPStrategy):  # Lightning's own argument is for CUDA only
    def configure_ddp(self):
        super().configure_ddp()
        self.model.register_comm_hook(None, lossy)

real = lightning.Trainer
lightning.Trainer = lambda **options: real(**{**options, "strategy": Hooked()})
sys.argv = [sys.argv[1], "--seed", "0", "--processes", "2"]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.distributed
def test_a_communication_hook_has_no_say(twin, tmp_path):
    """PowerSGD and the like change the sum before the noise; the engine sums itself."""
    (tmp_path / "hooked.py").write_text(HOOKED)
    run_in_a_process(
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "hooked.py",
        EXAMPLES / "lightning_private.py", cwd=tmp_path,
    )  # fmt: skip
    state = torch.load(tmp_path / "lightning_digits" / "step=60.ckpt", weights_only=True)["state_dict"]
    assert close({name.removeprefix("model."): value for name, value in state.items()}, twin[0])
