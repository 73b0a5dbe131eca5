"""Pre-train a Lipschitz network on synthetic pictures, then train all its layers privately on CIFAR-10.

    python examples/synthetic_start.py pretrain start.pt --minutes 35
    python examples/synthetic_start.py tune --start start.pt --epsilon 8 --data-dir DIR

pretrain: two views of the same synthetic scene should be alike, and views of different scenes should not (Chen et al.
2020). No record and no downloaded picture has a part in it, so the weights cost no ε.
tune: all layers, or the last one alone (`--head-only`); without `--start` from the weights that lipdp gives a network.
Settings are those of `lipdp.suggest`; `--body F` multiplies the learning rate of all layers but the last. `--scale 8`
runs at B/8 and σ/8: as noisy, an eighth of the time, and not private at the ε that is shown.

Source: the idea is DP-RandP's (Tang, Panda, Sehwag & Mittal 2023), there with a wide residual net and clipping.
"""

import argparse
import math
import time

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import lipdp
from lipdp.features import dead_leaves

SHAPE = (3, 32, 32)
ROOM = 40  # side of the pictures that views are cut from


def network(width: int) -> nn.Sequential:
    return lipdp.models.build("cnn", input_shape=SHAPE, num_classes=10, width=width)


# ------------------------------------------------------------------------------------------------------- pre-training


def view(pictures: Tensor) -> Tensor:
    """A random cut-out of each: half to all of a side, stretched, mirrored, in other light and colours, or grey."""
    n = len(pictures)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(n, *shape)

    side, stretch = uniform(0.5, 1.0), uniform(-0.2, 0.2).exp()
    sides = torch.stack((side * stretch, side / stretch), 1)
    cut = torch.zeros(n, 2, 3)
    cut[:, 0, 0], cut[:, 1, 1] = sides[:, 0] * torch.where(torch.rand(n) < 0.5, 1.0, -1.0), sides[:, 1]
    cut[:, :, 2] = uniform(-1, 1, 2) * (1 - sides.clamp(max=1))
    grid = F.affine_grid(cut, [n, *SHAPE], align_corners=False)
    x = F.grid_sample(pictures, grid, align_corners=False, padding_mode="reflection")
    x = 0.5 + uniform(0.6, 1.4, 1, 1, 1) * (x - 0.5) + 0.1 * torch.randn(n, 1, 1, 1) + 0.06 * torch.randn(n, 3, 1, 1)
    return torch.where(torch.rand(n, 1, 1, 1) < 0.2, x.mean(1, keepdim=True), x).clamp(0, 1)


def contrast(first: Tensor, second: Tensor, temperature: float = 0.2) -> Tensor:
    """Cross-entropy of finding each view's partner among all others."""
    z = F.normalize(torch.cat((first, second)), dim=1)
    alike = (z @ z.T / temperature).fill_diagonal_(-math.inf)
    n = len(first)
    return F.cross_entropy(alike, torch.cat((torch.arange(n) + n, torch.arange(n))))


def pretrain(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    scenes = dead_leaves(args.scenes, (3, ROOM, ROOM), args.seed)
    body = network(args.width)[:-1]
    project = nn.Linear(body(torch.zeros(1, *SHAPE)).shape[1], 128, bias=False)  # only here: it is thrown away
    optimizer = torch.optim.Adam([*body.parameters(), *project.parameters()])
    began, mean, step = time.monotonic(), 0.0, 0
    while (done := (time.monotonic() - began) / (60 * args.minutes)) < 1:
        optimizer.param_groups[0]["lr"] = args.lr * (1 + math.cos(math.pi * done)) / 2
        picked = torch.randint(args.scenes, (128,))
        first, second = (project(10 * body(view(pictures[picked]))) for pictures in scenes)
        loss = contrast(first, second)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        lipdp.nn.project_(body)
        step, mean = step + 1, 0.98 * mean + 0.02 * loss.item()
        if step % 100 == 0:
            print(f"step {step}, {time.monotonic() - began:.0f} s, loss {mean / (1 - 0.98**step):.3f}", flush=True)
    torch.save({"width": args.width, "body": body.state_dict()}, args.start)


# ------------------------------------------------------------------------------------------------------ private tuning


def tune(args: argparse.Namespace) -> None:
    split = lipdp.data.load("cifar10", data_dir=args.data_dir)
    if args.validation:
        split = lipdp.data.split_validation(split)
    torch.manual_seed(args.seed)
    model = network(args.width)
    if args.start:
        weights = torch.load(args.start)
        model = network(weights["width"])
        model[:-1].load_state_dict(weights["body"])
    if args.head_only:
        model[:-1].requires_grad_(False)
    public = dead_leaves(64, SHAPE, seed=1)[0]
    facts = {"input_shape": SHAPE, "dataset_size": len(split.train_x), "steps": args.steps, "public": public}
    settings = lipdp.suggest(
        model, target_epsilon=args.epsilon, target_delta=1e-5, expected_batch_size=args.batch_size, **facts
    )
    if args.scale > 1:
        fewer = args.batch_size // args.scale
        sigma = settings.plan.noise_multiplier * fewer / args.batch_size
        settings = lipdp.suggest(model, noise_multiplier=sigma, expected_batch_size=fewer, **facts)
    arguments = settings.arguments(model)
    for group in arguments["optimizer"].param_groups:
        if group["params"][0] is not model[-1].weight:
            group["lr"] *= args.body
            group["initial_lr"] *= args.body
    began = time.monotonic()
    dataset = TensorDataset(split.train_x, split.train_y)
    model, optimizer, loader, criterion = lipdp.PrivacyEngine().make_private(module=model, dataset=dataset, **arguments)
    for x, y in loader:
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        answers = torch.cat([model(x).argmax(1) for x in split.test_x.split(500)])
    start = f"from {args.start}" if args.start else "not pre-trained"
    layers = "last layer" if args.head_only else f"all layers, those below the last at {args.body:g} of their rates"
    simulated = f", simulated at B/{args.scale}, not private" if args.scale > 1 else ""
    accuracy = (answers == split.test_y).float().mean()
    print(
        f"{start}, {layers}: ε = {args.epsilon:g}{simulated}, accuracy {accuracy:.4f}, {time.monotonic() - began:.0f} s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="what", required=True)
    first = commands.add_parser("pretrain")
    first.add_argument("start", help="file for the weights")
    first.add_argument("--minutes", type=float, default=35)
    first.add_argument("--scenes", type=int, default=8000)
    first.add_argument("--lr", type=float, default=2e-3)
    second = commands.add_parser("tune")
    second.add_argument("--start")
    second.add_argument("--data-dir")
    second.add_argument("--epsilon", type=float, default=8)
    second.add_argument("--batch-size", type=int, default=2048)
    second.add_argument("--steps", type=int, default=300)
    second.add_argument("--body", type=float, default=1.0)
    second.add_argument("--head-only", action="store_true")
    second.add_argument("--scale", type=int, default=1)
    second.add_argument("--validation", action="store_true", help="judge on a tenth of the training records")
    for command in (first, second):
        command.add_argument("--width", type=int, default=16)
        command.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    {"pretrain": pretrain, "tune": tune}[args.what](args)


if __name__ == "__main__":
    main()
