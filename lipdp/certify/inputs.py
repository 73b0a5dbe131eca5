"""From raw inputs to what the model is given: each map with its modulus, so that radii are in raw units."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lipdp.certify.moduli import GroupNormalisation, Lipschitz, Modulus, Projection, sample_norms
from lipdp.data.scaling import Clip
from lipdp.errors import UnboundedError
from lipdp.features import NORM_FLOOR, FeatureSpec
from lipdp.nn.normalization import normalised

InputMap = Callable[[Tensor], Tensor]
"""A map of a batch of inputs, record by record: of `lipdp.data`, a `FeatureSpec`, or any with `lipschitz`."""


def apply_maps(maps: Sequence[InputMap], x: Tensor, dtype: torch.dtype) -> Tensor:
    """The model's inputs in its dtype. All but a clip is computed in float64, so that it rounds once, at the end."""
    if not all(isinstance(step, Clip) for step in maps):
        x = x.double()
    for step in maps:
        x = step(x).to(x.dtype)
    return x.to(dtype)


def moduli_of_maps(maps: Sequence[InputMap], x: Tensor, dtype: torch.dtype) -> list[Modulus]:
    """The moduli of the maps, in the order they are applied, at each raw input, and of the rounding to the model's
    dtype.
    """
    chain: list[Modulus] = []
    exact = all(isinstance(step, Clip) for step in maps) and torch.finfo(x.dtype).eps >= torch.finfo(dtype).eps
    z = x if exact else x.double()
    for step in maps:
        chain += _feature_moduli(step, z) if isinstance(step, FeatureSpec) else [Lipschitz(_constant(step))]
        z = step(z).to(z.dtype)
    return chain if exact else [*chain, _rounding(z, dtype)]


def _constant(step: Any) -> float:
    constant = getattr(step, "lipschitz", None)
    if not isinstance(constant, (int, float)) or not 0 <= constant < float("inf"):
        raise UnboundedError(
            f"{step!r} states no finite Lipschitz constant (`lipschitz` is {constant!r}), so nothing follows for raw"
            " inputs. Give maps of lipdp.data or a lipdp.features.FeatureSpec"
        )
    return float(constant)


def _feature_moduli(spec: FeatureSpec, x: Tensor) -> list[Modulus]:
    """A fixed linear or scattering map by its constant; its normalisations, which have none, by their local modulus."""
    chain: list[Modulus] = [Lipschitz(spec.map.lipschitz(x.shape[1:]))]
    z = spec.map(x)
    if spec.group_norm:
        groups = z.reshape(len(z), spec.group_norm, -1)
        entries = groups.shape[2]
        squares = (groups - groups.mean(2, keepdim=True)).square().sum(2)
        smallest = (squares + entries * spec.eps).sqrt().amin(1) * (1 - 1e-9)
        chain.append(GroupNormalisation(entries, spec.group_norm, smallest.cpu()))
        z = normalised(groups, 1, spec.eps)
    if spec.unit_norm:
        norms = sample_norms(z) * (1 - 1e-9)
        chain += [Projection(NORM_FLOOR, norms), Lipschitz(1 / NORM_FLOOR)]
        z = F.normalize(z.flatten(1), dim=1, eps=NORM_FLOOR)
    return chain if spec.dtype == "float32" else [*chain, _rounding(z, getattr(torch, spec.dtype))]


def _rounding(z: Tensor, dtype: torch.dtype) -> Lipschitz:
    """Rounding moves z by at most u ‖z‖, and z' by u (‖z‖ + r): ω(r) = (1 + u) r + 2 u ‖z‖, u half the spacing.

    Numbers below the smallest normal one are rounded by at most its spacing's half, entry by entry.
    """
    info = torch.finfo(dtype)
    unit = info.eps / 2 * (1 + 1e-6)
    tiny = info.smallest_normal * info.eps * z[0].numel() ** 0.5
    return Lipschitz(1 + unit, 2 * unit * sample_norms(z) + tiny)
