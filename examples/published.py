"""Two published comparisons, run again: python examples/published.py backprop|global --data-dir DIR [--epochs E]

backprop: backpropagation clipping (Stevens et al. 2022) on MNIST, B = 256, 5 epochs, with the account corrected to one
joint subsample of four layers: noise of 9.06 and 4.82 per layer is a σ of 4.53 and 2.41. X, C and the learning rates
were chosen on 6,000 training records. The bound of a convolution grows with the overlap of its windows, so ours do not
overlap; `--lenet` takes Opacus' small network, whose windows overlap 16-fold.
global: local against global clipping (Bu et al. 2021), four layers, B = 250, σ = 1.3, R = 1.5: accuracy and
calibration. On Fashion-MNIST 20 epochs (11 to 20 minutes a run, beside other work); `--dataset cifar10` takes the
published network, but four epochs, not 60.
"""

import argparse
import time
from dataclasses import replace
from functools import partial

import torch
from torch import nn
from torch.utils.data import TensorDataset

from lipdp.accounting import PrivacyPlan
from lipdp.comparison import Task, calibration, get_trainer
from lipdp.data import load
from lipdp.losses import TauCrossEntropy

BACKPROP_RUNS = ((9.06 / 2, 2.0, "79 % at ε = 0.10"), (4.82 / 2, 4.0, "87 % at ε = 0.21"))  # σ, learning rate, found


def lenet() -> nn.Module:
    """The small network of Opacus' MNIST example, without biases: two convolutions and two dense layers."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 8, 2, padding=3, bias=False), nn.ReLU(), nn.AvgPool2d(2),
        nn.Conv2d(16, 32, 4, 1, bias=False), nn.ReLU(), nn.AvgPool2d(2),
        nn.Flatten(), nn.Linear(128, 32, bias=False), nn.ReLU(), nn.Linear(32, 10, bias=False),
    )  # fmt: skip


def patches() -> nn.Module:
    """A convolution of windows side by side, and two dense layers."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 4, 4, bias=False), nn.ReLU(), nn.Flatten(),
        nn.Linear(784, 32, bias=False), nn.ReLU(), nn.Linear(32, 10, bias=False),
    )  # fmt: skip


def four_layers() -> nn.Module:
    """Three convolutions and a dense layer for 3x32x32."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2),
        nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2),
        nn.Flatten(), nn.Linear(1024, 10),
    )  # fmt: skip


GLOBAL_RUNS = {"fashion-mnist": (lenet, 40.0, 0.3, 20), "cifar10": (four_layers, 10.0, 0.05, 4)}
"""Network, Z, learning rate and epochs. Those of Fashion-MNIST were found on 6,000 training records."""


def run(name: str, trainer, net: nn.Module, split, *, batch_size: int, epochs: float, sigma: float, **task) -> None:
    began = time.perf_counter()
    plan = PrivacyPlan.of(
        dataset_size=len(split.train_x), expected_batch_size=batch_size, epochs=epochs, noise_multiplier=sigma,
        target_delta=1e-5,
    )  # fmt: skip
    task = Task(dataset=TensorDataset(split.train_x, split.train_y), loss=TauCrossEntropy(1.0), plan=plan, **task)
    found = calibration.calibration(trainer.train(net, task).model, split.test_x, split.test_y)
    print(
        f"{name}: ε = {plan.predicted.epsilon:.3f}, accuracy {found.accuracy:.4f}, ECE {found.ece:.4f},"
        f" MCE {found.mce:.4f}, NLL {found.nll:.3f}, Brier {found.brier:.3f} ({time.perf_counter() - began:.0f} s)",
        flush=True,
    )


def backprop(args: argparse.Namespace) -> None:
    split = load("mnist", data_dir=args.data_dir)
    trainer = replace(get_trainer("backprop_clipping"), input_bound=1.5, cotangent_bound=args.cotangent_bound)
    for sigma, lr, published in BACKPROP_RUNS:
        torch.manual_seed(args.seed)
        run(
            f"σ_joint = {sigma:.2f} (published, corrected: {published})", trainer,
            lenet() if args.lenet else patches(), split,
            batch_size=256, epochs=args.epochs or 5, sigma=sigma, schedule="linear",
            optimizer=partial(torch.optim.SGD, lr=args.lr or lr, momentum=0.9),
        )  # fmt: skip


def local_and_global(args: argparse.Namespace) -> None:
    raw = load(args.dataset, data_dir=args.data_dir)
    split = replace(raw, train_x=2 * raw.train_x - 1, test_x=2 * raw.test_x - 1) if args.dataset == "cifar10" else raw
    net, threshold, lr, epochs = GLOBAL_RUNS[args.dataset]
    ways = {
        "local flat, R = 1.5": replace(get_trainer("opacus_functorch"), max_grad_norm=1.5),
        f"global, R = 1.5, Z = {threshold:g}": replace(
            get_trainer("global_scaled"), max_grad_norm=1.5, threshold=threshold
        ),
        "global, 1(‖g‖ ≤ R)": replace(get_trainer("global"), max_grad_norm=1.5),
    }
    for name, trainer in ways.items():
        torch.manual_seed(args.seed)
        run(
            f"{name}, {args.epochs or epochs:g} epochs", trainer, net(), split,
            batch_size=250, epochs=args.epochs or epochs, sigma=1.3, microbatch=64,
            optimizer=partial(torch.optim.SGD, lr=args.lr or lr),
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["backprop", "global"])
    parser.add_argument("--data-dir")
    parser.add_argument("--dataset", choices=list(GLOBAL_RUNS), default="fashion-mnist", help="of global")
    parser.add_argument("--epochs", type=float)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--cotangent-bound", type=float, default=0.09)
    parser.add_argument("--lenet", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    {"backprop": backprop, "global": local_and_global}[args.what](args)


if __name__ == "__main__":
    main()
