"""What a loss must be, found by calling it before the first step: a function of each sample alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from lipdp.errors import ChangedError, LossError
from lipdp.losses import LipschitzLoss, PerPixel
from lipdp.passes.snapshot import Snapshot


def check_loss(loss: LipschitzLoss, targets: Tensor, outputs: tuple[int, ...]) -> None:
    """Call the loss as training does, with gradients on, and refuse what breaks the bound of one sample.

    Change one sample's logits, then leave it out: no other sample's value may change, and no other's gradient. Beside
    the targets given there are others, so that a loss which weights by shares of classes shows itself also where the
    first records are all of one class. What the calls leave behind in the loss (a count of classes, say) would carry
    the records of one batch to the next; what trains with it would leave without noise.

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
    logits, classes = _probe(len(targets), shape, targets.device), shape[0]
    if int((~loss.knows(logits, targets)).sum()) > 1:
        raise LossError(
            f"the targets do not fit {name}: for {classes} outputs, class labels are whole numbers in"
            f" 0 … {classes - 1}, other targets finite numbers. Subtract 1 from labels that count from 1; number others"
            " by a public list"
        )
    targets = torch.cat([targets, _others(targets, classes)])
    with _unchanged(loss), torch.enable_grad():
        _check_apart(loss, torch.cat([targets, targets]), shape)  # a twin's weight would show a count of classes


def _logits_shape(loss: LipschitzLoss, outputs: tuple[int, ...]) -> tuple[int, ...]:
    """The outputs of a sample as the loss is given them here: positions apart for `PerPixel`, else in a row."""
    return outputs if isinstance(loss, PerPixel) else (math.prod(outputs),)


def _probe(count: int, shape: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.linspace(-1.0, 1.0, count * math.prod(shape), device=device).reshape(count, *shape)


def _check_apart(loss: LipschitzLoss, targets: Tensor, shape: tuple[int, ...]) -> None:
    """No sample's value or gradient hangs on another sample."""
    name, count = type(loss).__name__, len(targets)
    logits = _probe(count, shape, targets.device)
    moved = logits.clone()
    moved[0] = moved[0].flip(0) * 3.0 + 1.0
    whole = _called(loss, logits, targets)
    if whole[0].shape != (count,):
        raise LossError(
            f"{name} returned shape {tuple(whole[0].shape)} for {count} samples; it must return one value per sample,"
            " without reduction"
        )
    changes = {"changing its logits": (moved, targets), "leaving it out": (logits[1:], targets[1:])}
    for change, (changed, kept) in changes.items():
        for what, before, after in zip(("loss", "gradient"), whole, _called(loss, changed, kept), strict=True):
            if not torch.allclose(before[1:], after[-(count - 1) :], atol=1e-6, equal_nan=True):
                raise LossError(
                    f"{name} couples the samples of a batch: {change} changed another sample's {what}, so no per-sample"
                    " bound exists"
                )


def _called(loss: LipschitzLoss, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The values, and the gradient of their sum by the logits."""
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
