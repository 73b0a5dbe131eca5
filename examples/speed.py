"""What privacy costs a step: python examples/speed.py [--model cnn] [--batch-size 1024] [--repeat 15] [--memory]

The private step (noise, sensitivities and projection included), the same model's step without privacy, and the step of
its unconstrained twin (Conv2d, ReLU, average pooling, Linear), interleaved in one process: the ratios count, not the
times. With --memory each of the three takes 3 steps in a process of its own, and its peak memory (resident set) is
compared.
"""

import argparse
import copy
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch

import lipdp
from lipdp import losses
from lipdp.training import recipe

KINDS = ("private", "same", "twin")
Step = Callable[[torch.Tensor, torch.Tensor], None]


def steps(name: str, batch_size: int, kinds: tuple[str, ...]) -> tuple[dict[str, Step], torch.utils.data.TensorDataset]:
    """One step of each kind, on random images, with the settings of the MNIST recipe."""
    shape = (1, 28, 28) if name in ("cnn", "mlp", "linear", "mixer") else (3, 32, 32)
    options = dict(recipe("mnist", name).get("model_options", {}))
    model = lipdp.models.build(name, input_shape=shape, num_classes=10, **options)
    same, twin = copy.deepcopy(model), lipdp.models.build(name, input_shape=shape, num_classes=10, twin=True)
    data = torch.utils.data.TensorDataset(torch.rand(batch_size, *shape), torch.randint(10, (batch_size,)))
    loss = losses.TauCrossEntropy(32.0)
    found: dict[str, Step] = {}
    for kind, module in (("same", same), ("twin", twin)):
        found[kind] = ordinary(module, loss)
    engine = lipdp.PrivacyEngine()  # in every process, so that all have loaded the same modules
    if "private" in kinds:
        model, optimizer, loader, criterion = engine.make_private(
            module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9), criterion=loss,
            dataset=data, expected_batch_size=batch_size, steps=10**6, noise_multiplier=2.0,
            allocation="min_variance", gate=0.3, sampling="fixed_size",
        )  # fmt: skip
        batches = iter(loader)

        def private(x: torch.Tensor, y: torch.Tensor) -> None:
            x, y = next(batches)
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            optimizer.step()

        found["private"] = private
    return {kind: found[kind] for kind in kinds}, data


def ordinary(module: torch.nn.Module, loss: torch.nn.Module) -> Step:
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01, momentum=0.9)

    def step(x: torch.Tensor, y: torch.Tensor) -> None:
        optimizer.zero_grad()
        loss(module(x), y).mean().backward()
        optimizer.step()

    return step


def compare_time(name: str, batch_size: int, repeat: int) -> None:
    kinds, data = steps(name, batch_size, KINDS)
    x, y = data.tensors
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    for turn in range(repeat + 2):  # two to warm up
        for kind, step in kinds.items():
            start = time.perf_counter()
            step(x, y)
            times[kind] += [time.perf_counter() - start] if turn >= 2 else []
    print(f"{name}, B = {batch_size}, {torch.get_num_threads()} threads, {repeat} interleaved repetitions")
    for kind in KINDS:
        print(
            f"  {kind:8s} median {statistics.median(times[kind]) * 1e3:7.1f} ms, least {min(times[kind]) * 1e3:7.1f} ms"
        )
    for kind in KINDS[1:]:
        ratios = [a / b for a, b in zip(times["private"], times[kind], strict=True)]
        print(
            f"  private / {kind}: {statistics.median(ratios):.3f} (median),"
            f" {min(times['private']) / min(times[kind]):.3f} (least)"
        )


def compare_memory(name: str, batch_size: int) -> None:
    peaks = {}
    for kind in KINDS:
        command = [sys.executable, __file__, "--model", name, "--batch-size", str(batch_size), "--peak", kind]
        peaks[kind] = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    print(
        f"{name}, B = {batch_size}, peak resident memory in MiB:"
        f" {', '.join(f'{k} {v >> 10}' for k, v in peaks.items())}"
    )
    print(
        f"  private / same: {peaks['private'] / peaks['same']:.3f}, private / twin:"
        f" {peaks['private'] / peaks['twin']:.3f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="cnn")
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--repeat", type=int, default=15)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--peak", choices=KINDS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        kinds, data = steps(args.model, args.batch_size, (args.peak,))
        for _ in range(3):
            kinds[args.peak](*data.tensors)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    elif args.memory:
        compare_memory(args.model, args.batch_size)
    else:
        compare_time(args.model, args.batch_size, args.repeat)


if __name__ == "__main__":
    main()
