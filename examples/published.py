"""Two published comparisons, run again: python examples/published.py backprop|global --data-dir DIR [--epochs E]

backprop: backpropagation clipping (Stevens et al. 2022) on MNIST, B = 256, 5 epochs, with the account corrected to one
joint subsample of four layers: noise of 9.06 and 4.82 per layer is a σ of 4.53 and 2.41. X, C and the learning rates
were chosen on 6,000 training records. The bound of a convolution grows with the overlap of its windows, so ours do not
overlap; `--lenet` takes Opacus' small network, whose windows overlap 16-fold.
global: local against global clipping (Bu et al. 2021), four layers, B = 250, σ = 1.3, R = 1.5: accuracy and
calibration. On Fashion-MNIST 20 epochs (11 to 20 minutes a run, beside other work); `--dataset cifar10` takes the
published network and 60 epochs, three hours a run on one core, or half an hour with `--scale 16`.
"""

import argparse
import time
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn
from torch.utils.data import TensorDataset

from lipdp.accounting import PrivacyPlan
from lipdp.comparison import ComparedTrainer, Task, calibration, get_trainer
from lipdp.data import Split, load, split_validation
from lipdp.losses import TauCrossEntropy

R = 1.5  # C of local and of global clipping
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


GLOBAL_RUNS = {"fashion-mnist": (lenet, 40.0, 0.3, 20), "cifar10": (four_layers, 80.0, 0.5, 60)}
"""Network, Z, learning rate and epochs, found by short runs on a validation part."""


@dataclass(frozen=True)
class Setting:
    """What the trainers of one comparison share: how they sample, how much noise they add, how they are judged.

    Attributes:
        split, batch_size, epochs, sigma: records, B, passes over them and σ.
        scale: k; runs at B/k and σ/k are as noisy and cost a k-th, but they are not private at the ε that is shown.
    """

    split: Split
    batch_size: int
    epochs: float
    sigma: float
    scale: int = 1

    def run(self, name: str, trainer: ComparedTrainer, net: nn.Module, lr: float, momentum: float = 0, **task) -> None:
        began = time.perf_counter()
        plan = PrivacyPlan.of(
            dataset_size=len(self.split.train_x), expected_batch_size=self.batch_size, epochs=self.epochs,
            noise_multiplier=self.sigma, target_delta=1e-5,
        )  # fmt: skip
        optimizer = partial(torch.optim.SGD, lr=lr, momentum=momentum)
        records = TensorDataset(self.split.train_x, self.split.train_y)
        fewer = plan.expected_batch_size // self.scale
        shared = replace(plan, expected_batch_size=fewer, noise_multiplier=self.sigma * fewer / self.batch_size)
        task = Task(dataset=records, loss=TauCrossEntropy(1.0), plan=shared, optimizer=optimizer, **task)
        model = trainer.train(net, task).model
        simulated = f", simulated at B/{self.scale}, not private" if self.scale > 1 else ""
        found = calibration.calibration(model, self.split.test_x, self.split.test_y)
        print(
            f"{name}{simulated}: ε = {plan.predicted.epsilon:.3f}, accuracy {found.accuracy:.4f}, ECE {found.ece:.4f},"
            f" MCE {found.mce:.4f}, NLL {found.nll:.3f}, Brier {found.brier:.3f} ({time.perf_counter() - began:.0f} s)",
            flush=True,
        )


def backprop(args: argparse.Namespace, split: Split) -> None:
    trainer = replace(get_trainer("backprop_clipping"), input_bound=1.5, cotangent_bound=args.cotangent_bound)
    for sigma, lr, published in BACKPROP_RUNS:
        torch.manual_seed(args.seed)
        Setting(split, 256, args.epochs or 5, sigma, args.scale).run(
            f"σ_joint = {sigma:.2f} (published, corrected: {published})", trainer,
            lenet() if args.lenet else patches(), args.lr or lr, momentum=0.9, schedule="linear",
        )  # fmt: skip


def local_and_global(args: argparse.Namespace, split: Split) -> None:
    net, threshold, lr, epochs = GLOBAL_RUNS[args.dataset]
    if args.dataset == "cifar10":
        split = replace(split, train_x=2 * split.train_x - 1, test_x=2 * split.test_x - 1)
    threshold, lr, epochs = args.threshold or threshold, args.lr or lr, args.epochs or epochs
    setting = Setting(split, 250, epochs, 1.3, args.scale)
    ways = {
        "local": (f"local flat, R = {R:g}", replace(get_trainer("opacus_functorch"), max_grad_norm=R)),
        "global": (
            f"global, R = {R:g}, Z = {threshold:g}",
            replace(get_trainer("global_scaled"), max_grad_norm=R, threshold=threshold),
        ),
        "strict": (f"global, 1(‖g‖ ≤ {R:g})", replace(get_trainer("global"), max_grad_norm=R)),
    }
    for way in args.ways:
        name, trainer = ways[way]
        torch.manual_seed(args.seed)
        setting.run(f"{name}, {epochs:g} epochs, lr {lr:g}", trainer, net(), lr, microbatch=64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["backprop", "global"])
    parser.add_argument("--data-dir")
    parser.add_argument("--dataset", choices=list(GLOBAL_RUNS), default="fashion-mnist", help="of global")
    parser.add_argument(
        "--ways",
        nargs="+",
        choices=["local", "global", "strict"],
        default=["local", "global"],
        help="strict: 1(‖g‖ ≤ R), the later definition of global",
    )
    parser.add_argument("--epochs", type=float)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--threshold", type=float, help="Z of global")
    parser.add_argument("--cotangent-bound", type=float, default=0.09)
    parser.add_argument("--lenet", action="store_true")
    parser.add_argument("--scale", type=int, default=1, help="k: runs at B/k and σ/k, a k-th of the cost, not private")
    parser.add_argument("--validation", action="store_true", help="judge on a tenth of the training records")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    split = load("mnist" if args.what == "backprop" else args.dataset, data_dir=args.data_dir)
    {"backprop": backprop, "global": local_and_global}[args.what](
        args, split_validation(split) if args.validation else split
    )


if __name__ == "__main__":
    main()
