"""What a loss must be, found by calling it: a function of each sample alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from lipdp.errors import ChangedError, LossError
from lipdp.losses import LipschitzLoss, PerPixel
from lipdp.passes.snapshot import Snapshot

_ROWS, _ENTRIES = 512, 1 << 18  # of the probe, at most

_Called = tuple[Tensor, Tensor]
"""The values of a loss, and the gradient of their sum by the logits."""


def check_loss(loss: LipschitzLoss, targets: Tensor, outputs: tuple[int, ...]) -> None:
    """Call the loss as training does, with gradients on, and refuse what breaks the bound of one sample.

    Change some samples' logits, then leave them out: no other sample's value may change, and no other's gradient. Some
    are the first, a random half, all of one class, all but two; logits are alike once, and once of all lengths. Beside
    the targets given there are others, and most are of one class, so that a loss which weights by counts or shares of
    classes shows itself also where the first records are few or alike. What the calls leave behind in the loss (a count
    of classes, say) would carry the records of one batch to the next; what trains with it would leave without noise.

    Args:
        targets: (n, ...) of the records looked at. One that the loss does not know is mapped to 0
            (`LipschitzLoss.knows`).
        outputs: the shape of the logits of one sample: (C,), (C, H, W), ….

    Raises:
        LossError: samples are coupled, there is not one value per sample, the loss trains or changes when it is
            called, or it does not know two or more of the targets.
    """
    name = type(loss).__name__
    trained = [path for path, parameter in loss.named_parameters() if parameter.requires_grad]
    if trained:
        raise LossError(
            f"{name} has trainable parameters ({', '.join(trained)}), whose gradients get no noise: make them constants"
            " (requires_grad_(False)), or put what is to be learned in the model"
        )
    shape = _logits_shape(loss, outputs)
    known, classes = loss.knows(_alike(len(targets), shape, targets.device), targets), shape[0]
    if int((~known).sum()) > 1:
        raise LossError(
            f"the targets do not fit {name}: for {classes} outputs, class labels are whole numbers in"
            f" 0 … {classes - 1}, other targets finite numbers. Subtract 1 from labels that count from 1; number others"
            " by a public list"
        )
    usual = targets[int(known.int().argmax())]
    targets = targets[: max(2, _ENTRIES // math.prod(shape) // 4)]
    targets = torch.cat([targets, _others(targets, classes)]).repeat(2, *[1] * (targets.dim() - 1))
    more = min(_ROWS, _ENTRIES // math.prod(shape)) - len(targets)
    targets = torch.cat([targets, usual.expand(max(more, 2), *usual.shape)])
    one_class = (targets == usual).flatten(1).all(1) if targets.dim() > 1 else targets == usual
    with _unchanged(loss), torch.enable_grad():
        _check_apart(loss, _of_all_lengths(len(targets), shape, targets.device), targets, one_class)
        if not type(loss).__module__.startswith("lipdp."):  # whose own are proven, and looked at once
            _check_apart(loss, _alike(len(targets), shape, targets.device), targets, one_class)


def is_apart(loss: LipschitzLoss, logits: Tensor, targets: Tensor, *, seed: int) -> Tensor:
    """() bool: a random half of a batch has the values and gradients by itself that it has in the whole batch.

    The check of a real batch: its size, its targets and its logits may show what `check_loss` does not think of. The
    half follows from the seed; no generator of torch moves.
    """
    most = max(2, 16 * _ENTRIES // max(logits[0].numel(), 1))
    logits, targets = logits[:most], targets[:most]
    half = torch.randperm(len(logits), generator=torch.Generator().manual_seed(seed))[: len(logits) // 2]
    half = half.to(logits.device)
    with torch.enable_grad():
        whole, alone = _called(loss, logits, targets), _called(loss, logits[half], targets[half])
    return torch.stack([_agree(loss, w[half], a, logits[half]) for w, a in zip(whole, alone, strict=True)]).all()


def coupled(loss: LipschitzLoss, change: str, what: str) -> LossError:
    """The error of a loss that is none of each sample alone."""
    return LossError(
        f"{type(loss).__name__} couples the samples of a batch: {change} changed another sample's {what}, so no"
        " per-sample bound exists. Make it a function of each sample's logits and target, without counts, quantiles or"
        " means of the batch"
    )


def _logits_shape(loss: LipschitzLoss, outputs: tuple[int, ...]) -> tuple[int, ...]:
    """The outputs of a sample as the loss is given them here: positions apart for `PerPixel`, else in a row."""
    return outputs if isinstance(loss, PerPixel) else (math.prod(outputs),)


def _alike(count: int, shape: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.linspace(-1.0, 1.0, count * math.prod(shape), device=device).reshape(count, *shape)


def _of_all_lengths(count: int, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """A few rows are extreme beside the others: up to 30 standard deviations, or 0.1."""
    generator = torch.Generator().manual_seed(0)
    lengths = 10 ** (2.5 * torch.rand(count, *[1] * len(shape), generator=generator) - 1)
    return (lengths * torch.randn(count, *shape, generator=generator)).to(device)


def _check_apart(loss: LipschitzLoss, logits: Tensor, targets: Tensor, one_class: Tensor) -> None:
    """No sample's value or gradient hangs on others."""
    count = len(targets)
    whole = _called(loss, logits, targets)
    if whole[0].shape != (count,):
        raise LossError(
            f"{type(loss).__name__} returned shape {tuple(whole[0].shape)} for {count} samples; it must return one"
            " value per sample, without reduction"
        )
    moved = logits.flip(1) * 3.0 + 1.0
    for kept in _kept(one_class):
        changed = torch.where(kept.view(-1, *[1] * (logits.dim() - 1)), logits, moved)
        changes = {
            "changing logits": [part[kept] for part in _called(loss, changed, targets)],
            "leaving samples out": _called(loss, logits[kept], targets[kept]),
        }
        for change, after in changes.items():
            for what, before, now in zip(("loss", "gradient"), whole, after, strict=True):
                if now.shape != before[kept].shape or not bool(_agree(loss, before[kept], now, logits[kept])):
                    raise coupled(loss, change, what)


def _kept(one_class: Tensor) -> list[Tensor]:
    """(n,) bool each, some true: the samples that stay as they are, while the others change or go."""
    place = torch.arange(len(one_class), device=one_class.device)
    half = torch.rand(len(place), generator=torch.Generator().manual_seed(1)).to(place.device) < 0.5
    kept = [place > 0, half, ~one_class, (place == 0) | (place == len(place) - 1)]
    return [rows for rows in kept if bool(rows.any())]


def _agree(loss: LipschitzLoss, before: Tensor, now: Tensor, logits: Tensor) -> Tensor:
    """() bool: equal but for rounding, in the lowest precision that took part, of numbers as large as the row's own."""
    constant = loss.lipschitz if 1 < loss.lipschitz < math.inf else 1.0
    kind = logits.device.type
    dtypes = [torch.get_autocast_dtype(kind)] if torch.is_autocast_enabled(kind) else []
    eps = max(torch.finfo(d).eps for d in [logits.dtype, before.dtype, *dtypes] if d.is_floating_point)
    sizes = logits.detach().reshape(len(logits), -1).abs().amax(1).view(-1, *[1] * (before.dim() - 1))
    near = (before - now).abs() <= eps**0.85 * (constant * (1 + sizes) + before.abs())
    return (near | (before == now) | (before.isnan() & now.isnan())).all()


def _called(loss: LipschitzLoss, logits: Tensor, targets: Tensor) -> _Called:
    leaf = logits.detach().clone().requires_grad_()
    values = loss(leaf, targets)
    if not values.requires_grad:
        return values, torch.zeros_like(leaf)
    (gradient,) = torch.autograd.grad(values.sum(), leaf, allow_unused=True, materialize_grads=True)
    return values.detach(), gradient


@contextmanager
def _unchanged(loss: LipschitzLoss) -> Iterator[None]:
    """A block in which the loss is called, and must not change."""
    snapshot = Snapshot(loss, "the loss", mode=False)
    held = [(name, tensor, tensor.detach().clone()) for name, tensor in _tensors(loss)]
    yield
    changed = [name for name, now, before in held if bool(((now != before) & ~(now.isnan() & before.isnan())).any())]
    try:
        snapshot.check()
    except ChangedError as error:
        changed.append(error.difference)
    if changed:
        raise LossError(
            f"{type(loss).__name__} changes when it is called ({changed[0]}): one batch changes the loss of the next,"
            " so no per-sample bound exists. Make it a function of its arguments alone"
        )


def _tensors(loss: LipschitzLoss) -> list[tuple[str, Tensor]]:
    """Parameters, buffers and other tensors among the attributes."""
    attributes = [(name, value) for module in loss.modules() for name, value in vars(module).items()]
    return [*loss.named_parameters(), *loss.named_buffers(), *((n, t) for n, t in attributes if isinstance(t, Tensor))]


def _others(targets: Tensor, num_outputs: int) -> Tensor:
    """Targets of another kind than these: the next class, or the value mirrored."""
    if targets.dtype is torch.bool:
        return ~targets
    if not targets.is_floating_point():
        return (targets + 1) % max(num_outputs, 2)
    return torch.where((targets >= 0) & (targets <= 1), 1 - targets, -targets)
