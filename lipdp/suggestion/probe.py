"""What typically flows through a model at its initialisation, read from inputs that no record has a part in."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lipdp.bounds.probe import sample_shape, untouched
from lipdp.bounds.trace import mode
from lipdp.errors import ParameterError
from lipdp.nn.gates import per_sample_norm

_SAMPLES = 64
_ALONE = 16  # samples whose gradients are computed one by one


def public_inputs(input_shape: tuple[int, ...], count: int = _SAMPLES) -> Tensor:
    """Inputs of the format of the data: images of 1/f noise with entries in [0, 1], or standard normal rows.

    Natural images have spectra near 1/f, so convolutions see correlations like those of photographs.

    Args:
        input_shape: of one sample; (channels, height, width) is an image.

    Returns:
        (count, *input_shape), the same at every call.

    >>> x = public_inputs((1, 28, 28), 5)
    >>> x.shape, bool((x >= 0).all() and (x <= 1).all())
    (torch.Size([5, 1, 28, 28]), True)

    Source: Field (1987) for the spectrum.
    """
    shape = sample_shape(input_shape)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(count, *shape, generator=generator)
    if len(shape) != 3 or min(shape[1:]) < 2:
        return noise
    frequencies = torch.fft.fftfreq(shape[1])[:, None].square() + torch.fft.rfftfreq(shape[2])[None].square()
    falling = frequencies.clamp_min(frequencies[frequencies > 0].min()).rsqrt()
    grey = 0.9 * noise.mean(1, keepdim=True) * math.sqrt(shape[0]) + 0.45 * noise if shape[0] > 1 else noise
    images = torch.fft.irfft2(torch.fft.rfft2(grey) * falling, s=shape[1:])
    spread = images.flatten(1).std(dim=1).clamp_min(1e-12).view(-1, 1, 1, 1)
    return (0.5 + 0.25 * images / spread).clamp(0, 1)


@dataclass(frozen=True)
class Typical:
    """Medians over the probe: the norm of a layer's input, and that of the cotangent there."""

    value: float
    cotangent: float


def typical(model: nn.Module, x: Tensor, layers: Sequence[str], start: float) -> dict[str, Typical]:
    """What layers see, for cotangents of norm `start` at the logits: those of a wrong label where all are alike.

    Args:
        model: run in evaluation mode, and left as it was.
        x: (n, *features) public inputs.
        layers: names of modules that take one tensor.
        start: the gate at the logits, or the loss's constant.

    >>> linear = torch.nn.Linear(4, 3)
    >>> typical(torch.nn.Sequential(linear), torch.ones(5, 4), ["0"], 0.3)["0"].value
    2.0
    """
    if not layers:
        return {}
    seen: dict[str, Tensor] = {}
    with _ready(model), _watched(model, layers, seen):
        out = model(_as_input(model, x).requires_grad_())
        names = list(seen)
        found = torch.autograd.grad((out * _cotangents(out, start)).sum(), [seen[n] for n in names], allow_unused=True)
    return {
        name: Typical(_median(seen[name]), 0.0 if gradient is None else _median(gradient))
        for name, gradient in zip(names, found, strict=True)
    }


def gradient_norms(model: nn.Module, x: Tensor, start: float) -> dict[str, float]:
    """The root mean square norm of one sample's gradient, by parameter, for cotangents as in `typical`.

    No mean of gradients is longer, so this is the most that a step's signal can be per record.

    >>> layer = torch.nn.Linear(4, 3, bias=False)
    >>> round(gradient_norms(layer, torch.ones(5, 4), 0.3)["weight"], 4)
    0.6
    """
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if not named:
        return {}
    energy = dict.fromkeys(named, 0.0)
    x = x[:_ALONE]
    with _ready(model):
        for i in range(len(x)):
            out = model(_as_input(model, x[i : i + 1]))
            cotangents = _cotangents(out.expand(len(x), *out.shape[1:]), start)[i : i + 1]
            found = torch.autograd.grad((out * cotangents).sum(), list(named.values()), allow_unused=True)
            for name, gradient in zip(named, found, strict=True):
                energy[name] += 0.0 if gradient is None else float(gradient.double().square().sum())
    return {name: math.sqrt(total / max(len(x), 1)) for name, total in energy.items()}


@torch.no_grad()
def output_shape(model: nn.Module, x: Tensor) -> tuple[int, ...]:
    """The shape of a sample's logits.

    >>> output_shape(torch.nn.Linear(4, 3), torch.ones(5, 4))
    (3,)
    """
    with _ready(model):
        return tuple(model(_as_input(model, x[:2])).shape[1:])


def _cotangents(out: Tensor, start: float) -> Tensor:
    """(n, …) of norm `start`: of cross-entropy at equal logits and labels 0, 1, …; of one output, ± in turn."""
    flat = out.detach().reshape(len(out), -1)
    count, outputs = flat.shape
    if outputs == 1:
        rows = torch.tensor([1.0, -1.0]).repeat(count)[:count].view(-1, 1)
    else:
        rows = 1 / outputs - torch.eye(outputs)[torch.arange(count) % outputs]
    rows = rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return (start * rows).to(flat).view(out.shape)


def _median(rows: Tensor) -> float:
    return float(per_sample_norm(rows.detach()).median())


def _as_input(model: nn.Module, x: Tensor) -> Tensor:
    reference = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    return x.detach().to(device=reference.device, dtype=reference.dtype)


@contextmanager
def _ready(model: nn.Module) -> Iterator[None]:
    with untouched(model), mode(model, False), torch.enable_grad():
        yield


@contextmanager
def _watched(model: nn.Module, layers: Sequence[str], seen: dict[str, Tensor]) -> Iterator[None]:
    """The inputs of layers during a forward pass."""

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if not args or not isinstance(args[0], Tensor):
                raise ParameterError(f"'{name}' doesn't take one tensor, so nothing can be placed in front of it")
            seen[name] = args[0]

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(note(name)) for name in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
