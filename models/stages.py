"""What the models share: the chain of stages with its joints, and checks of sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from torch import nn

from lipdp.errors import ParameterError

from .families import Family, Patches

Stages: TypeAlias = "list[list[nn.Module]]"
"""A model without its input bound: the modules of every stage. The joints lie between the stages."""

Joints: TypeAlias = "float | Sequence[float | None] | None"
"""Bounds at the joints of a model: none, the same at every joint, or one (or None) per joint."""


def chain(family: Family, stages: Stages, *, input_bound: float, clips: Joints, gates: Joints) -> nn.Sequential:
    """Input bound, then the stages with a joint between each and the next: stage, gate, clip, stage, …, stage."""
    joints = len(stages) - 1
    clip_bounds, gate_bounds = _per_joint("clips", clips, joints), _per_joint("gates", gates, joints)
    modules: list[nn.Module] = [family.bound(input_bound), *stages[0]]
    for stage, clip, gate in zip(stages[1:], clip_bounds, gate_bounds, strict=True):
        modules += [] if gate is None else [family.gate(gate)]
        modules += [] if clip is None else [family.clip(clip)]
        modules += stage
    return nn.Sequential(*modules)


def head(layers: Family, features: int, *, hidden: int | None = None) -> Stages:
    """The last stages: a hidden dense layer of `hidden` neurons, an even number, if there is one, and a dense layer."""
    if hidden is None:
        return [[layers.linear(features, layers.num_classes)]]
    width = count("hidden", hidden, even=True)
    return [[layers.linear(features, width), layers.activation()], [layers.linear(width, layers.num_classes)]]


def embedding(layers: Family, model: str, patch: int, width: int) -> tuple[list[nn.Module], int]:
    """The first stage of a model of patches, tokens (N, T, width) of images; and T."""
    channels, height, columns = image(model, layers.input_shape)
    if height % patch or columns % patch:
        raise ParameterError(
            f"{model}: patches of {patch}x{patch} do not tile {height}x{columns}; choose a common divisor"
        )
    cut = Patches(height // patch, columns // patch, patch)
    return [cut, layers.linear(channels * patch**2, width, lipschitz=layers.gain)], cut.rows * cut.columns


def _per_joint(name: str, bounds: Joints, joints: int) -> list[float | None]:
    if bounds is None or isinstance(bounds, (int, float)):
        return [bounds] * joints
    if not isinstance(bounds, Sequence) or len(bounds) != joints:
        raise ParameterError(
            f"{name}={bounds!r}: the model has {joints} joints; give one number for all, or {joints} numbers (None:"
            " nothing there)"
        )
    return list(bounds)


def count(name: str, value: int, *, even: bool = False, odd: bool = False) -> int:
    """`value` if it is a positive integer (even, odd), else a `ParameterError` that names it."""
    kind = "even " if even else "odd " if odd else ""
    fits = isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31
    if not fits or (even and value % 2) or (odd and not value % 2):
        raise ParameterError(f"{name} is a positive {kind}integer, got {value!r}")
    return value


def image(model: str, input_shape: tuple[int, ...], *, halvings: int = 0) -> tuple[int, int, int]:
    """(channels, height, width), refused if it is no image or too small to be halved that often."""
    if len(input_shape) != 3:
        raise ParameterError(
            f"{model} takes images, input_shape=(channels, height, width), got {input_shape}; for vectors use 'mlp',"
            " 'tabular' or 'linear'"
        )
    channels, height, width = input_shape
    if min(height, width) < 2**halvings:
        raise ParameterError(
            f"{model} halves its images {halvings} times, but {height}x{width} is smaller than {2**halvings}x"
            f"{2**halvings}; lower `depth`, or use 'mlp'"
        )
    return channels, height, width
