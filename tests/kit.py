"""Small data and nets, a private run and its loop, refusals, and statistics, for every test file."""

from __future__ import annotations

import signal

import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import lipdp
from lipdp import losses
from lipdp import nn as lnn
from lipdp.cli import main
from lipdp.training import Monitor, Trainer

FALSE_ALARM = 1e-6  # of each statistical test; the seeds are fixed, so a pass stays a pass
EMPTY_FIRST = 0  # a seed whose first batch, of 1 in 200 records on average, is empty
ALLOCATIONS = ("per_layer", "global", "min_variance")
LIGHT = {"weights": ("given", "scaled"), "starts": 3, "climbs": 1, "steps": 5}  # of an attack on a small model


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


class Function(nn.Module):
    """A model written as one function of (module, x), behind an input bound; tensors become buffers."""

    def __init__(self, forward, **members):
        super().__init__()
        self.bound = lnn.InputBound(1.0)
        self.forwards = [forward]
        for name, member in members.items():
            if isinstance(member, torch.Tensor) and not isinstance(member, nn.Parameter):
                self.register_buffer(name, member)
            else:
                setattr(self, name, member)

    def forward(self, x):
        return self.forwards[0](self, self.bound(x))


def linear(i, o=3, **options):
    return lnn.SpectralLinear(i, o, **options)


def parameter(*shape):
    return nn.Parameter(torch.randn(*shape, generator=torch.Generator().manual_seed(1)))


def conv_net():
    return nn.Sequential(
        lnn.InputBound(1.0),
        lnn.SpectralConv2d(1, 4, 3, padding=1, bias=True),
        lnn.GroupSort2(),
        lnn.ScaledL2NormPool2d(2),
        nn.Flatten(),
        lnn.SpectralLinear(36, 4, True),
    )


def private(
    model=None, dataset=None, *, net=lipschitz_net, data=table, optimizer=None, lr=0.5, momentum=0.0, accountant="rdp",
    seed=0, secure=False, check_every=None, deferred=None, world=None, engine=None, **options,
):  # fmt: skip
    """(engine, model, optimizer, loader, criterion) of a run; `options` go to `make_private`.

    A test file has its own defaults by `private = partial(kit.private, net=..., data=..., lr=...)`.
    """
    if model is None:
        torch.manual_seed(0)
        model = net()
    engine = engine or lipdp.PrivacyEngine(
        accountant, seed=seed, secure=secure, check_every=check_every, deferred=deferred, world=world
    )
    defaults = {
        "expected_batch_size": 64,
        "steps": 5,
        "noise_multiplier": 1.0,
        "criterion": losses.TauCrossEntropy(8.0),
    }
    made = engine.make_private(
        module=model,
        optimizer=optimizer or torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum),
        dataset=data() if dataset is None else dataset,
        **{**defaults, **options},
    )
    return engine, *made


def step(batch, model, optimizer, criterion):
    x, y, *weight = batch
    optimizer.zero_grad()
    criterion(model(x), y, *weight).backward()
    optimizer.step()


def train(model, optimizer, loader, criterion, *, steps=None, after=lambda: None):
    """The ordinary loop, to its end or for some steps; `after` is called after each."""
    for done, batch in enumerate(loader, start=1):
        step(batch, model, optimizer, criterion)
        after()
        if done == steps:
            return


def refusal(arguments, capsys):
    """The one line on stderr with which a command is refused."""
    capsys.readouterr()
    assert main([str(a) for a in arguments]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert len(message.strip().splitlines()) == 1
    return message


class Raises(Monitor):
    """Raises a signal, or an exception, after a step."""

    def __init__(self, step, what):
        self.at, self.what = step, what

    def step(self, step, loss, epsilon):
        if step == self.at:
            if isinstance(self.what, signal.Signals):
                signal.raise_signal(self.what)
            else:
                raise self.what


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def has_std(samples: Tensor, std: float) -> bool:
    """Two-sided χ² test of a centred Gaussian's standard deviation."""
    total = float((samples.double() / std).square().sum())
    tail = min(stats.chi2.cdf(total, samples.numel()), stats.chi2.sf(total, samples.numel()))
    return tail > FALSE_ALARM / 2


def assert_only_this_std(drawn: Tensor, std: float) -> None:
    """Centred draws of that standard deviation; one per cent more or less is seen."""
    assert has_std(drawn, std)
    assert abs(drawn.mean().item()) < stats.norm.isf(FALSE_ALARM / 2) * std / drawn.numel() ** 0.5
    assert not any(has_std(drawn * wrong, std) for wrong in (0.95, 0.99, 1.01, 1.05))


def assert_normal_to_the_tails(z) -> None:
    """Standard normal draws, 2 % less are seen; beyond 2, 3 and 4 there are as many as there should be."""
    assert stats.kstest(z, "norm").pvalue > FALSE_ALARM
    assert stats.kstest(z * 0.98, "norm").pvalue < FALSE_ALARM
    for level in (2.0, 3.0, 4.0):
        low, high = stats.poisson.ppf([FALSE_ALARM / 2, 1 - FALSE_ALARM / 2], len(z) * 2 * stats.norm.sf(level))
        assert low <= (abs(z) > level).sum() <= high


def assert_all_bits_are_fair(words: Tensor) -> None:
    bits = (words[:, None] >> torch.arange(64)) & 1
    z = (bits.double().mean(0) - 0.5) * 2 * len(words) ** 0.5
    assert z.abs().max().item() < stats.norm.isf(FALSE_ALARM / 128)


def pure_noise(engine, model, optimizer, loader, criterion) -> dict[str, Tensor]:
    """Per parameter the noise of every step on the *sum*, with lr = 1: what is released less what was summed."""
    draws: dict[str, list[Tensor]] = {name: [] for name, _ in model.named_parameters()}
    for x, y in loader:
        before = weights(model)
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        summed = {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        for name, p in model.named_parameters():
            moved = (before[name].double() - p.detach().double()) * engine.plan.expected_batch_size
            draws[name].append(moved - summed.get(name, 0.0))
            p.data.copy_(before[name])  # the same weights, hence the same bounds, at every step
    return {name: torch.stack(d) for name, d in draws.items()}


def killed_and_resumed(config, folder):
    """The folder of a whole run, once one that was killed at step 8 and resumed has ended with the same weights."""
    whole = Trainer(config, out=folder / "whole")
    whole.run()
    with pytest.raises(RuntimeError, match="killed"):
        Trainer(config, out=folder / "parts", monitor=Raises(8, RuntimeError("killed"))).run()
    resumed = Trainer.resume(folder / "parts")
    resumed.run()
    assert all(torch.equal(whole.model.state_dict()[n], w) for n, w in resumed.model.state_dict().items())
    return folder / "whole"
