"""What is gained without touching ε: python examples/accelerator.py [--models cnn resnet] [--projection]

Forward and backward pass as written, channels last, in bf16 and compiled, interleaved in one process: the ratios count,
not the times. With --projection: the layers' projections one by one and as stacks of equal shape.
"""

import argparse
import copy
import os
import statistics
import time
from collections.abc import Callable

import torch

import lipdp
from lipdp import losses
from lipdp.training import Forward

ROUNDS, WARM = 15, 3


def build(name: str) -> torch.nn.Module:
    shape = (1, 28, 28) if name == "cnn" else (3, 32, 32)
    return lipdp.models.build(name, input_shape=shape, num_classes=10)


def passes(name: str, batch_size: int) -> dict[str, Callable[[], float]]:
    """Seconds a sample of one step's passes, for batches that differ in size as Poisson's do."""
    model, loss = build(name), losses.TauCrossEntropy(8.0)
    shape = (1, 28, 28) if name == "cnn" else (3, 32, 32)
    ways = {
        "as written": Forward(copy.deepcopy(model)),
        "channels last": Forward(copy.deepcopy(model), channels_last=True),
        "bf16": Forward(copy.deepcopy(model), autocast=torch.bfloat16),
        "compiled": Forward(copy.deepcopy(model), compiled=True),
    }

    def timed(forward: Forward) -> Callable[[], float]:
        def once() -> float:
            size = batch_size + int(torch.randint(-16, 17, ()))
            x, y = torch.rand(size, *shape), torch.randint(10, (size,))
            start = time.perf_counter()
            forward.model.zero_grad()
            loss(forward(x), y).sum().backward()
            return (time.perf_counter() - start) / size

        return once

    return {way: timed(forward) for way, forward in ways.items()}


def projections(name: str) -> dict[str, Callable[[], float]]:
    """Seconds of one projection of the whole model, a small step away from the constraints."""
    model = build(name)

    def timed(batched: bool) -> Callable[[], float]:
        def once() -> float:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter), alpha=0.002)
            start = time.perf_counter()
            lipdp.nn.project_(model, batched=batched)
            return time.perf_counter() - start

        return once

    return {"one by one": timed(False), "stacked": timed(True)}


def compare(name: str, ways: dict[str, Callable[[], float]]) -> None:
    """Median and fastest of each way over those of the first, round by round."""
    times: dict[str, list[float]] = {way: [] for way in ways}
    for done in range(ROUNDS):
        for way, once in ways.items():
            seconds = once()
            if done >= WARM:
                times[way].append(seconds)
    first = next(iter(times.values()))
    for way, own in times.items():
        ratio = statistics.median(a / b for a, b in zip(own, first, strict=True))
        print(f"{name:8} {way:14} {ratio:5.2f} (of the fastest {min(own) / min(first):.2f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["cnn", "resnet"])
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--projection", action="store_true")
    arguments = parser.parse_args()
    print(f"{torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}")
    for name in arguments.models:
        compare(name, projections(name) if arguments.projection else passes(name, arguments.batch_size))


if __name__ == "__main__":
    main()
