"""The rules of what copies entries to other places: padding, upsampling, unfolding. Gain √(most copies), counted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from lipdp.bounds.rules import Call, Local, rule
from lipdp.bounds.windows import axis_overlap, most_copies, sides, whole
from lipdp.errors import MixesSamplesError, UnsupportedLayerError


def _padded(call: Call, padding: Sequence[Any], mode: str, value: Any) -> Local:
    """Copies of entries, and constants v: ‖y‖² ≤ m ‖x‖² + (their number) v², m the product of the axes' most copies."""
    pairs = list(zip(padding[::2], padding[1::2], strict=True))  # of the last axis first
    if any(pair != (0, 0) for pair in pairs[len(call.x.shape) :]):
        raise MixesSamplesError(f"'{call.name}' pads the batch axis; give pads for the axes of one sample")
    if not isinstance(value, (int, float)):
        raise UnsupportedLayerError(f"'{call.name}': padding with {value!r}; only a number has a bound")
    pairs = pairs[: len(call.x.shape)]
    sizes = call.x.shape[::-1]
    copies = math.prod(most_copies(n, *pair, mode) for n, pair in zip(sizes, pairs, strict=False))
    if mode != "constant" or not value:
        return Local(gains=(math.sqrt(copies),), fan_in=max(copies, 1))
    kept = call.x.numel * math.prod(
        max(n + min(before, 0) + min(after, 0), 0) / n for n, (before, after) in zip(sizes, pairs, strict=False)
    )
    constants = math.prod(call.output_shape) - round(kept)
    return Local(gains=(math.sqrt(copies),), offset=math.sqrt(constants) * abs(value))


_PADS = {"Constant": "constant", "Zero": "constant", "Reflection": "reflect", "Replication": "replicate"}


def _register_pads() -> None:
    for prefix, mode in (*_PADS.items(), ("Circular", "circular")):
        for axes in (1, 2, 3):

            @rule(getattr(nn, f"{prefix}Pad{axes}d"))
            def pad(call: Call, mode: str = mode) -> Local:
                layer: Any = call.module
                return _padded(call, layer.padding, mode, getattr(layer, "value", 0.0))


_register_pads()


@rule(F.pad)
def _pad(call: Call) -> Local:
    value = call.argument(3, "value")
    return _padded(call, call.argument(1, "pad"), call.argument(2, "mode", "constant"), 0.0 if value is None else value)


@rule("expand", "expand_as", "repeat")
def _repeated(call: Call) -> Local:
    """Every entry k times in a sample: √k. A constant (a class token) is repeated for every sample besides."""
    copies = math.prod(call.output_shape) // call.x.numel
    return Local(gains=(math.sqrt(copies), *[0.0] * (len(call.inputs) - 1)), fan_in=max(copies, 1))


@lru_cache(maxsize=1024)
def _nearest_copies(size: int, out: int, shift: float) -> int:
    """The most copies of an entry: torch floors (i + shift) · size/out in float32 or float64, which may miss by one."""
    found = []
    for dtype in (torch.float32, torch.float64):
        scales = (torch.tensor(1.0 / (out / size), dtype=dtype), torch.tensor(size, dtype=dtype) / out)
        for scale in scales:
            index = ((torch.arange(out, dtype=dtype) + shift) * scale).floor().clamp(max=size - 1).long()
            found.append(int(index.bincount().max()))
    return max(found)


@rule(nn.Upsample, nn.UpsamplingNearest2d, F.interpolate)
def _upsample(call: Call) -> Local:
    """Nearest upsampling by whole factors shows every entry f₁ f₂ … times: √(f₁ f₂ …)."""
    factor, mode = call.setting(2, "scale_factor"), call.setting(3, "mode", "nearest")
    old, new = call.x.shape[1:], call.output_shape[1:]
    even = all(n % o == 0 for o, n in zip(old, new, strict=True)) and (factor is None or whole(factor))
    if mode not in ("nearest", "nearest-exact") or not even:
        raise UnsupportedLayerError(
            f"'{call.name}': upsampling from {old} to {new}, mode={mode!r}, scale_factor={factor}; there is a bound for"
            " mode='nearest' with whole factors. Use that, or ConvTranspose2d"
        )
    shift = 0.5 if mode == "nearest-exact" else 0.0
    copies = math.prod(_nearest_copies(o, n, shift) for o, n in zip(old, new, strict=True))
    return Local(gains=(math.sqrt(copies),), fan_in=copies)


@rule(nn.Unfold, F.unfold)
def _unfold(call: Call) -> Local:
    """The patch matrix of a convolution: an entry lies in at most m windows, √m."""
    kernel, dilation = sides(call.setting(1, "kernel_size"), 2), sides(call.setting(2, "dilation", 1), 2)
    padding, stride = sides(call.setting(3, "padding", 0), 2), sides(call.setting(4, "stride", 1), 2)
    settings = zip(call.x.shape[-2:], kernel, stride, padding, dilation, strict=True)
    overlap = math.prod(axis_overlap(n, k, s, p, p, dilation=d) for n, k, s, p, d in settings)
    return Local(gains=(math.sqrt(overlap),), fan_in=max(overlap, 1))
