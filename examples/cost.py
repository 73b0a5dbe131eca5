"""Is the cost model right? python examples/cost.py --data-dir DIR [--batch-sizes 1024 4096] [--steps 8] [--repeat 9]

Predicts from steps on at most 512 records what `lipdp train` (cnn on MNIST, micro-batches of 512) takes at larger
batches, then runs that, each batch size in a process of its own, and compares the time of a step and the peak memory.
Times are CPU seconds of the process, which other work on the machine disturbs least; wall times are shown beside them.

With --ratio PARAMETERS: peak memory of a private step over the same model's non-private step, at about so many weights.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import torch

from lipdp.planning.cost import predict
from lipdp.planning.measure import STEPS, Workload, measure, peak
from lipdp.processes import peak_bytes
from lipdp.training import Monitor, Trainer, configure
from lipdp.training.recipes import recipe

MICROBATCH = 512


def check(data_dir: str, batch_sizes: list[int], steps: int, repeat: int) -> None:
    options = recipe("mnist", "cnn")["model_options"]
    workload = Workload(model="cnn", model_options=options, input_shape=(1, 28, 28), microbatch=MICROBATCH)
    load = os.getloadavg()[0]
    cost, _ = measure(workload, (128, 256, 512), repeat=repeat, clock=time.process_time, progress=print)
    print(
        f"cnn, {cost.parameters:,} weights, {torch.get_num_threads()} threads, load {load:.1f} on {os.cpu_count()}"
        " cores"
    )
    print(f"fit, CPU seconds: {cost.times.fit}")
    for batch_size in batch_sizes:
        found = predict(cost, batch_size=batch_size, steps=steps)
        run = trained(data_dir, batch_size, steps)
        print(f"B = {batch_size}, lipdp train, {steps} steps, load {run['load']:.1f}")
        print(
            f"  step: predicted {found.step_seconds:.3f} s ({found.step_seconds_low:.3f} to"
            f" {found.step_seconds_high:.3f}), measured {run['cpu']:.3f} s"
            f" ({found.step_seconds / run['cpu'] - 1:+.1%}); wall {run['wall']:.3f} s"
        )
        compare_bytes("the step alone", found.peak_bytes, peak(workload, batch_size))
        compare_bytes("lipdp train", run["before"] + found.peak_bytes - cost.memory.process, run["peak"])


def compare_bytes(what: str, predicted: int, measured: int) -> None:
    print(f"  {what}: predicted {predicted >> 20} MiB, measured {measured >> 20} MiB ({predicted / measured - 1:+.1%})")


def trained(data_dir: str, batch_size: int, steps: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--data-dir", data_dir, "--run", str(batch_size), "--steps", str(steps)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


class Clock(Monitor):
    """Notes the time and the memory after every step, and the memory before the first."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.cpu: list[float] = []
        self.before = self.peak = 0

    def begin(self, trainer: Trainer) -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[1])  # resident now, with the data set
        self.before = pages * os.sysconf("SC_PAGE_SIZE")

    def step(self, step: int, loss: float, epsilon: float) -> None:
        self.wall.append(time.perf_counter())
        self.cpu.append(time.process_time())
        self.peak = peak_bytes()  # before anything is evaluated


def run(data_dir: str, batch_size: int, steps: int) -> None:
    clock = Clock()
    config = configure(
        dataset="mnist", model="cnn", data_dir=data_dir, batch_size=batch_size, steps=steps + 1, microbatch=MICROBATCH,
        noise_multiplier=2.0, accountant="rdp", log_every=steps + 1, checkpoint_every=steps + 1, device="cpu",
    )  # fmt: skip
    Trainer(config, monitor=clock).run()
    seconds = {
        name: statistics.median(b - a for a, b in pairwise(stamps))
        for name, stamps in (("wall", clock.wall), ("cpu", clock.cpu))
    }
    print(json.dumps({**seconds, "before": clock.before, "peak": clock.peak, "load": os.getloadavg()[0]}))


def ratio(parameters: int, width: int, batch_size: int, kinds: list[str]) -> None:
    """Dense layers of that width on 3x32x32, as many as give about so many weights: (3072 + 10) w + (depth - 1) w²."""
    depth = 1 + max(0, round((parameters - 3082 * width) / width**2))
    weights = 3082 * width + (depth - 1) * width**2
    options = {"width": width, "depth": depth}
    workload = Workload(model="mlp", model_options=options, input_shape=(3, 32, 32), microbatch=None, average=False)
    base = peak(Workload(model="linear", input_shape=(5,), num_classes=2), 1)
    held = {kind: peak(workload, batch_size, kind=kind, steps=2) for kind in kinds}
    print(f"mlp, {depth} layers of {width} neurons, {weights:,} weights, B = {batch_size}; libraries {base >> 20} MiB")
    for kind, value in held.items():
        print(
            f"  {kind}: {value >> 20} MiB, above the libraries {(value - base) / (4 * weights):.2f} times the weights",
            end="",
        )
        if "non_private" in held:
            plain = held["non_private"]
            print(f"; ratio {value / plain:.3f}, above the libraries {(value - base) / (plain - base):.3f}", end="")
        print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", default=os.environ.get("LIPDP_DATA", "."))
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--ratio", type=int, help="number of weights")
    parser.add_argument("--width", type=int, default=512, help="neurons of a layer, with --ratio")
    parser.add_argument("--kinds", nargs="+", choices=list(STEPS), default=list(STEPS), help="of step, with --ratio")
    parser.add_argument("--run", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        run(args.data_dir, args.run, args.steps)
    elif args.ratio:
        ratio(args.ratio, args.width, 64, args.kinds)
    else:
        check(args.data_dir, args.batch_sizes, args.steps, args.repeat)


if __name__ == "__main__":
    main()
