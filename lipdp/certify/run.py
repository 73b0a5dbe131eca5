"""A run's folder certified: its model, its test records and its preprocessing, what is written and what is drawn."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lipdp.certify import Certificate, certify
from lipdp.certify.attack import pgd
from lipdp.certify.inputs import InputMap, apply_maps
from lipdp.data import DataSplit, number_of_units
from lipdp.errors import BoundViolation, CheckpointError, ParameterError
from lipdp.training.assembly import bounding_of, features_of, open_configured
from lipdp.training.checkpoint import RunFolder
from lipdp.training.choices import make_network
from lipdp.training.config import TrainConfig, config_from_dict, weights_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_CURVE_POINTS = 61


@dataclass(frozen=True)
class LoadedRun:
    """What was trained (in evaluation mode, on the CPU) with the raw test records, labels, and the maps in between."""

    config: TrainConfig
    model: nn.Module
    x: Tensor
    y: Tensor
    maps: tuple[InputMap, ...]
    step: int
    weights: str


def load_run(
    folder: str | os.PathLike[str], *, weights: str | None = None, data_dir: str | os.PathLike[str] | None = None
) -> LoadedRun:
    """Read a run's folder."""
    runs = RunFolder(folder)
    config = config_from_dict(runs.config())
    weights = weights_of(config, weights)
    checkpoint = runs.load()
    split = open_configured(config, data_dir=data_dir)
    config = config.resolve(number_of_units(split), binary=split.task == "binary")
    maps = maps_of(config, split)
    x, y = split.test_part()
    spec, shape = features_of(config), apply_maps(maps, x[:1], torch.float32).shape[1:]
    bound = None if spec is None else spec.input_bound(split.input_shape)
    model, _ = make_network(config, tuple(shape), split.num_classes, input_bound=bound)
    try:
        model.load_state_dict(checkpoint[weights])
    except (KeyError, RuntimeError, TypeError) as error:
        raise CheckpointError(f"the checkpoint in {runs} does not fit the run's model: {error}") from error
    return LoadedRun(config, model.eval(), x, y, maps, int(checkpoint["step"]), weights)


def maps_of(config: TrainConfig, split: DataSplit) -> tuple[InputMap, ...]:
    """As `lipdp.training.assembly.prepare` applies them."""
    return tuple(each for each in (bounding_of(config, split), features_of(config)) if each is not None)


@dataclass(frozen=True)
class Robustness:
    """Certified accuracy at the radii asked for, beside the accuracy that an attack leaves there, if there was one.

    Attributes:
        attacked_inside, broken_inside: samples attacked at their own certified radius, and those that gave way (none).
    """

    certificate: Certificate
    radii: tuple[float, ...]
    attacked: tuple[float, ...] | None = None
    attacked_inside: int = 0
    broken_inside: int = 0
    steps: int = 0
    restarts: int = 0

    @property
    def certified(self) -> tuple[float, ...]:
        """Certified accuracy at the radii."""
        return tuple(self.certificate.accuracy(r) for r in self.radii)

    @property
    def is_binary(self) -> bool:
        """Whether there is an AUROC."""
        return self.certificate.is_binary

    def curve(self) -> tuple[list[float], list[float]]:
        """Radii and certified accuracy, for a figure."""
        top = 1.25 * max((*self.radii, 1e-9))
        points = [top * i / (_CURVE_POINTS - 1) for i in range(_CURVE_POINTS)]
        return points, [self.certificate.accuracy(r) for r in points]

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        certificate = self.certificate
        points, accuracies = self.curve()
        found: dict[str, Any] = {
            "samples": len(certificate),
            "accuracy": certificate.accuracy(),
            "radii": list(self.radii),
            "certified_accuracy": list(self.certified),
            "attacked_accuracy": None if self.attacked is None else list(self.attacked),
            "mean_radius": float(certificate.radii[certificate.radii.isfinite()].mean()),
            "lipschitz": certificate.lipschitz,
            "method": certificate.method,
            "seconds_per_10000_samples": certificate.seconds_per_10_000,
            "curve": {"radii": points, "certified_accuracy": accuracies},
        }
        if self.is_binary:
            found |= {"auroc": certificate.auroc(), "certified_auroc": [certificate.auroc(r) for r in self.radii]}
        if self.attacked is not None:
            inside = {"attacked_at_own_radius": self.attacked_inside, "broken_at_own_radius": self.broken_inside}
            found["attack"] = {"name": "L2 PGD (foolbox)", "steps": self.steps, "restarts": self.restarts, **inside}
        return found


def assess(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    radii: Sequence[float],
    maps: Sequence[InputMap] = (),
    attack: bool = False,
    steps: int = 40,
    restarts: int = 2,
    convolution: str = "fourier",
) -> Robustness:
    """Certify, and if asked attack: every sample at every radius, and at its own certified radius."""
    if not radii or min(radii) < 0:
        raise ParameterError(f"radii={tuple(radii)}: give numbers of at least 0, in units of the raw input")
    certificate = certify(model, x, y, maps=maps, convolution=convolution)
    if not attack:
        return Robustness(certificate, tuple(radii))
    options: dict[str, Any] = {"maps": maps, "steps": steps, "restarts": restarts}
    inside = (certificate.radii > 0) & certificate.radii.isfinite()
    own = pgd(model, x[inside], y[inside], radius=certificate.radii[inside], **options)
    broken = int(own.broken.sum())
    alive = certificate.correct.clone()
    attacked: dict[float, float] = {}
    for radius in sorted(radii):  # what gave way at a smaller radius has given way
        fallen = alive.clone()
        fallen[alive] = pgd(model, x[alive], y[alive], radius=radius, **options).broken
        broken += int((fallen & (certificate.radii >= radius)).sum())
        alive &= ~fallen
        attacked[radius] = float(alive.double().mean())
    if broken:
        raise BoundViolation(
            f"PGD changed the label of {broken} samples inside their certified radius: the certificate is wrong. Please"
            " report it with the model"
        )
    return Robustness(
        certificate, tuple(radii), tuple(attacked[r] for r in radii), int(inside.sum()), broken, steps, restarts
    )


def draw(results: Mapping[str, Robustness], *, title: str | None = None, unit: str = "L2 radius") -> Figure:
    """Certified and attacked accuracy against radius, one colour per model: a figure that belongs to no window."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for i, (name, result) in enumerate(results.items()):
        prefix = f"{name}: " if name else ""
        axes.plot(*result.curve(), color=f"C{i}", label=f"{prefix}certified")
        if result.attacked is not None:
            points = [(0.0, result.certificate.accuracy()), *zip(result.radii, result.attacked, strict=True)]
            radii, accuracies = zip(*sorted(points), strict=True)
            axes.plot(radii, accuracies, color=f"C{i}", linestyle="--", marker="o", label=f"{prefix}under PGD")
    axes.set(xlabel=unit, ylabel="accuracy", ylim=(0, 1), title=title)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure
