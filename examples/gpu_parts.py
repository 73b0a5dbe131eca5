"""The parts of `gpu.py`: what is done in each, a row at a time."""

import json
import os
import shlex
import signal
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lipdp import cli
from lipdp.comparison import get_trainer
from lipdp.comparison.configs import SpeedConfig
from lipdp.comparison.contenders import Contender
from lipdp.comparison.speed import MEASURED, peak, speed
from lipdp.data import Split
from lipdp.noise import GaussianNoise
from lipdp.training import Trainer, assembly, configure
from lipdp.training.environment import environment
from lipdp.training.forward import Forward
from lipdp.training.profile import StepProfile

ROOT = Path(__file__).resolve().parents[1]
Row = dict[str, Any]
Emit = Callable[[Row], None]


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much is measured."""

    models: tuple[str, ...] = ("cnn", "vgg", "resnet", "mixer")
    datasets: tuple[str, ...] = ("cifar10", "tiny-imagenet")
    batches: tuple[int, ...] = (256, 1024, 4096, 16384, 65536)
    repeat: int = 5
    step_batch: int = 1024
    steps: int = 15  # of a profile: 2 warm, 10 timed, 3 traced
    view_batch: int = 128
    views: tuple[int, ...] = (1, 16)
    largest: int = 1 << 20
    draws: int = 4_000_000
    backend: str = "inductor"
    train: tuple[str, ...] = ("--dataset", "cifar10")


QUICK = Size(
    models=("cnn",), datasets=("digits",), batches=(4, 8), repeat=1, step_batch=8, steps=5, view_batch=4, views=(1, 3),
    largest=8, backend="eager", draws=20_000,
    train=("--dataset", "digits", "--batch-size", "64", "--steps", "4", "--seed", "0"),
)  # fmt: skip


class Late(Exception):
    """The part's time is over."""


@dataclass(frozen=True)
class Run:
    """What a part is given.

    Attributes:
        size, device, data_dir: of the whole.
        scratch: a folder.
        end: when to be done, as `time.time()` counts.
        train: options of `lipdp train`.
    """

    size: Size
    device: str
    data_dir: str | None
    scratch: Path
    end: float
    train: tuple[str, ...]

    def check_time(self, what: str = "") -> None:
        print(what, flush=True)
        if time.time() > self.end:
            raise Late(what)

    def config(self, model: str, batch_size: int, dataset: str | None = None, **options: Any) -> SpeedConfig:
        sizes = {"batch_sizes": (batch_size,), "repeat": self.size.repeat, "memory": self.device != "cpu"}
        name = dataset or self.size.datasets[0]
        return SpeedConfig(dataset=name, model=model, device=self.device, **{**sizes, **options})

    def seconds(self, work: Callable[[], Any], repeat: int = 7) -> float:
        """Median, the device's queue emptied before and after."""
        taken = []
        for _ in range(repeat + 1):
            self.wait()
            begin = time.perf_counter()
            work()
            self.wait()
            taken.append(time.perf_counter() - begin)
        return statistics.median(taken[1:])

    def wait(self) -> None:
        if self.device != "cpu":
            torch.cuda.synchronize(self.device)


# --- the parts --------------------------------------------------------------------------------------------------------


def machine(run: Run, emit: Emit) -> None:
    """The card, and its two ceilings: products and copies."""
    if run.device != "cpu":
        about = torch.cuda.get_device_properties(run.device)
        emit({"what": about.name, "value": f"{about.total_memory / 2**30:.0f} GiB"})
    for name, value in environment().items():
        emit({"what": name, "value": json.dumps(value)})
    n = 8192 if run.device != "cpu" else 256
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.randn(n, n, device=run.device, dtype=dtype) for _ in range(2))
        emit({"what": f"{dtype} product, TFLOP/s", "value": f"{2e-12 * n**3 / run.seconds(lambda: a @ b):.3g}"})  # noqa: B023
    source = torch.randn(n * n, device=run.device)
    target = torch.empty_like(source)
    emit({"what": "copy, TB/s", "value": f"{8e-12 * n * n / run.seconds(lambda: target.copy_(source)):.3g}"})


def tests(run: Run, emit: Emit) -> None:
    """All tests marked `gpu`, a row each: that a step does not synchronise, projections, and the rest."""
    import pytest

    class Tally:
        def pytest_runtest_logreport(self, report: Any) -> None:
            if report.when == "call" or report.outcome != "passed":
                row = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 2)}
                emit({**row, "reason": str(report.longrepr)[-600:]} if report.outcome == "failed" else row)

        def pytest_collectreport(self, report: Any) -> None:
            if report.failed:
                emit({"test": report.nodeid, "outcome": "not collected", "reason": str(report.longrepr)[-600:]})

    files = [str(p) for p in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in p.read_text()]
    options = ["-m", "gpu", "-o", "addopts=", "-p", "no:cacheprovider", "-W", "default", f"--rootdir={ROOT}"]
    pytest.main([*files, *options], plugins=[Tally()])


def noise(run: Run, emit: Emit) -> None:
    """Std, independence of blocks and steps, and the same bits after a resume: |z| < 6 by chance but once in 10⁸."""
    stds, n = torch.tensor([0.1, 0.7, 1.0, 30.0], device=run.device), run.size.draws
    source = GaussianNoise(seed=4, device=run.device)

    def draw() -> torch.Tensor:
        blocks = [torch.zeros(n, device=run.device) for _ in stds]
        source.add_(blocks, stds)
        return torch.stack(blocks) / stds[:, None]

    saved = source.state_dict()
    blocks = torch.cat([draw(), draw()])
    source.load_state_dict(saved)
    again = torch.cat([draw(), draw()])
    x = blocks.double()
    means = x.mean(1).abs().max() * n**0.5
    spread = ((x.square().mean(1) - 1) * (n / 2) ** 0.5).abs().max()
    apart = [(torch.corrcoef(y) - torch.eye(len(y), device=y.device)).abs().max() * n**0.5 for y in (x, x.square())]
    shifted = (x[:, 1:] * x[:, :-1]).mean(1).abs().max() * n**0.5
    checks = {"mean": means, "std": spread, "blocks and steps": apart[0], "their squares": apart[1]}
    for name, z in {**checks, "neighbours": shifted}.items():
        emit({"check": name, "worst |z|": round(float(z), 2), "passed": float(z) < 6})
    emit({"check": "the same bits after a resume", "passed": torch.equal(blocks, again)})
    emit({"check": "draws a second", "value": f"{4 * n / run.seconds(draw):.3g}"})


def views(run: Run, emit: Emit) -> None:
    """Several views of each record: clipless against clipping."""
    for model in run.size.models:
        trainers = ("non_private", "clipless", "opacus_hooks", "opacus_functorch")
        config = run.config(model, run.size.view_batch, views=run.size.views, trainers=trainers)
        for cell in speed(config, progress=run.check_time).cells:
            emit(cell)


def forward(run: Run, emit: Emit) -> None:
    """Compiled, channels last, bf16, each and together: the steps of `lipdp train` and their parts."""
    size = run.size
    shape, n = run.config("cnn", 1).setup.input_shape, 2 * size.step_batch
    x, y = torch.rand(n, *shape), torch.randint(10, (n,))
    split = Split(size.datasets[0], x, y, x[:8], y[:8], num_classes=10, task="multiclass")
    ways: dict[str, dict[str, Any]] = {"as written": {}, "channels last": {"channels_last": True}}
    ways |= {"bf16": {"autocast": "bf16"}, "compiled": {"compile": True}}
    ways["together"] = {name: value for options in list(ways.values()) for name, value in options.items()}
    assembly.Forward = partial(Forward, backend=size.backend)
    for way, options in ways.items():  # what takes long to compile comes last
        for model in size.models:
            run.check_time(f"{model} {way}")
            profile = StepProfile()
            config = configure(
                dataset=size.datasets[0], model=model, batch_size=size.step_batch, steps=size.steps, device=run.device,
                noise_multiplier=2.0, accountant="rdp", log_every=size.steps, checkpoint_every=size.steps, **options,
            )  # fmt: skip
            Trainer(config, split=split, profile=profile).run()
            found = profile.table or {}
            parts = {f"{part}, ms": 1e3 * each["seconds"] for part, each in found["parts"].items()}
            times = {"step, ms": 1e3 * found["step_seconds"], "fastest, ms": 1e3 * found["fastest_step_seconds"]}
            emit({"model": model, "way": way, **times, **parts})


def steps(run: Run, emit: Emit) -> None:
    """Step time and memory of every trainer, all models at a batch size before the next."""
    for batch_size in run.size.batches:
        for dataset in run.size.datasets:
            for model in run.size.models:
                folder = run.scratch / f"speed-{dataset}-{model}"  # knows who ran out of memory
                config = run.config(model, batch_size, dataset)
                for cell in speed(config, out=str(folder), progress=run.check_time).find(batch_size=batch_size):
                    emit(cell)


def largest(run: Run, emit: Emit) -> None:
    """The largest batch, doubled until there is no memory."""
    for model in run.size.models:
        for name in ("clipless", "non_private", "opacus_hooks", "opacus_ghost"):
            batch_size, found = run.size.batches[0], {"status": "none"}
            row: Row = {"model": model, "trainer": name, "largest": None}
            while batch_size <= run.size.largest:
                run.check_time(f"{model} {name} {batch_size}")
                found = peak(run.config(model, batch_size), Contender(get_trainer(name), False), batch_size)
                if found["status"] != MEASURED:
                    break
                row |= {"largest": batch_size, "GiB": found["peak_bytes"] / 2**30}
                batch_size *= 2
            emit({**row, "then": found["status"], "reason": found.get("reason", "")})


def train(run: Run, emit: Emit) -> None:
    """`lipdp train` at two budgets; at the end of its time it saves, and says what it has."""
    if run.data_dir is None and "cifar10" in run.train:
        emit({"skipped": "no --data-dir with cifar-10-batches-py"})
        return
    where = [] if run.data_dir is None else ["--data-dir", run.data_dir]
    for epsilon, end in ((3.0, (time.time() + run.end) / 2), (8.0, run.end)):
        folder = run.scratch / f"epsilon-{epsilon:g}"
        timer = threading.Timer(max(end - time.time(), 1.0), os.kill, (os.getpid(), signal.SIGTERM))
        timer.start()
        options = ["train", *run.train, *where, "--epsilon", str(epsilon), "--device", run.device, "--out", str(folder)]
        code = cli.main(options)
        timer.cancel()
        lines = (folder / "metrics.jsonl").read_text().splitlines() if (folder / "metrics.jsonl").exists() else []
        emit({"command": shlex.join(["lipdp", *options]), "target": epsilon, "exit code": code}
             | (json.loads(lines[-1]) if lines else {}))  # fmt: skip


PARTS: dict[str, tuple[Callable[[Run, Emit], None], float]] = {  # with its share of the time
    "machine": (machine, 15), "tests": (tests, 75), "noise": (noise, 15), "views": (views, 30),
    "forward": (forward, 70), "speed": (steps, 120), "largest": (largest, 40), "train": (train, 70),
}  # fmt: skip
