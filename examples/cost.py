"""Is the cost model right? python examples/cost.py --data-dir DIR [--batch-sizes 1024 4096] [--steps 8] [--repeat 9]

Predicts from steps on at most 512 records what `lipdp train` (cnn on MNIST, micro-batches of 512) takes at larger
batches, then runs that, and compares the time of a step. Times are CPU seconds of the process, which other work on the
machine disturbs least.
"""

import argparse
import os
import statistics
import time
from itertools import pairwise

import torch

from lipdp.planning import Scale, Workload, measure_cost
from lipdp.training import Monitor, Trainer, configure, recipe

MICROBATCH = 512


class Clock(Monitor):
    """Notes the time after every step."""

    def __init__(self) -> None:
        self.stamps: list[float] = []

    def step(self, step: int, loss: float, epsilon: float) -> None:
        self.stamps.append(time.process_time())


def trained(data_dir: str, batch_size: int, steps: int) -> float:
    clock = Clock()
    config = configure(
        dataset="mnist", model="cnn", data_dir=data_dir, batch_size=batch_size, steps=steps + 1, microbatch=MICROBATCH,
        noise_multiplier=2.0, accountant="rdp", log_every=steps + 1, checkpoint_every=steps + 1, device="cpu",
    )  # fmt: skip
    Trainer(config, monitor=clock).run()
    return statistics.median(b - a for a, b in pairwise(clock.stamps))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", default=os.environ.get("LIPDP_DATA", "."))
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--repeat", type=int, default=9)
    args = parser.parse_args()
    workload = Workload(model_options=recipe("mnist", "cnn").model_options)
    cost = measure_cost(workload, MICROBATCH, repeat=args.repeat, memory=False, clock=time.process_time)
    print(f"cnn, {cost.parameters:,} weights, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}")
    for batch_size in args.batch_sizes:
        found = cost.predict(Scale(batch_size=batch_size))
        taken = trained(args.data_dir, batch_size, args.steps)
        low, high = found.step_quartiles
        print(
            f"B = {batch_size}: predicted {found.step_seconds:.3f} s ({low:.3f} to {high:.3f}), measured {taken:.3f} s"
            f" ({found.step_seconds / taken - 1:+.1%})"
        )


if __name__ == "__main__":
    main()
