"""Small data, small nets, a private run and its loop, for every test file."""

from __future__ import annotations

import torch
from scipy import stats
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import lipdp
from lipdp import losses
from lipdp import nn as lnn

FALSE_ALARM = 1e-6  # of each statistical test; the seeds are fixed, so a pass stays a pass
EMPTY_FIRST = 0  # a seed whose first batch, of 1 in 200 records on average, is empty
ALLOCATIONS = ("per_layer", "global", "min_variance")


def table(n=256, features=20, classes=5, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, features, generator=generator, dtype=dtype)
    return TensorDataset(x, torch.randint(classes, (n,), generator=generator))


def lipschitz_net(features=20, hidden=32, classes=5, dtype=torch.float32):
    return nn.Sequential(
        lnn.InputBound(1.0),
        lnn.SpectralLinear(features, hidden, dtype=dtype),
        lnn.GroupSort2(),
        lnn.SpectralLinear(hidden, classes, dtype=dtype),
    )


def plain_net(features=100, hidden=200, classes=50):
    """Without constraints nothing is projected, so a step moves the weights by the noisy gradient and nothing else."""
    return nn.Sequential(
        lnn.InputBound(1.0), nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, classes, bias=False)
    )


def private(model=None, dataset=None, *, optimizer=None, lr=0.5, momentum=0.0, accountant="rdp", seed=0, **options):
    model = model if model is not None else lipschitz_net()
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)
    defaults = {
        "expected_batch_size": 64,
        "steps": 5,
        "noise_multiplier": 1.0,
        "criterion": losses.TauCrossEntropy(8.0),
    }
    engine = lipdp.PrivacyEngine(accountant, seed=seed)
    made = engine.make_private(
        module=model,
        optimizer=optimizer,
        dataset=dataset if dataset is not None else table(),
        **{**defaults, **options},
    )
    return engine, *made


def train(model, optimizer, loader, criterion, steps=None, scheduler=None):
    for done, (x, y) in enumerate(loader, start=1):
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        if done == steps:
            return


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def has_std(samples: Tensor, std: float) -> bool:
    """Two-sided χ² test of a centred Gaussian's standard deviation."""
    total = float((samples.double() / std).square().sum())
    tail = min(stats.chi2.cdf(total, samples.numel()), stats.chi2.sf(total, samples.numel()))
    return tail > FALSE_ALARM / 2


def pure_noise(engine, model, optimizer, loader, criterion) -> dict[str, Tensor]:
    """Per parameter the noise of every step on the *sum*, with lr = 1 and a gradient of exactly zero."""
    draws: dict[str, list[Tensor]] = {name: [] for name, _ in model.named_parameters()}
    for x, y in loader:
        before = weights(model)
        optimizer.zero_grad()
        (criterion(model(x), y) * 0.0).backward()
        optimizer.step()
        for name, p in model.named_parameters():
            draws[name].append((before[name].double() - p.detach().double()) * engine.facts.expected_batch_size)
            p.data.copy_(before[name])  # the same weights, hence the same bounds, at every step
    return {name: torch.stack(d) for name, d in draws.items()}
