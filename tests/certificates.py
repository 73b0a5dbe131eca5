"""Certificates of a model's own predictions, and how many of them an attack breaks."""

from __future__ import annotations

import torch

from lipdp.certify import certify
from lipdp.certify.attack import pgd
from lipdp.certify.inputs import apply_maps


def attacked(model, x, certificate, *, maps=(), factor=1.0, **options):
    """How many samples PGD breaks at `factor` times their certified radius, of how many; `x` has predicted labels."""
    inside = (certificate.radii > 0) & certificate.radii.isfinite()
    labels = predicted(model, x, maps)
    result = pgd(model, x[inside], labels[inside], radius=factor * certificate.radii[inside], maps=maps, **options)
    return int(result.broken.sum()), int(inside.sum())


@torch.no_grad()
def predicted(model, x, maps=()):
    dtype = next(model.parameters()).dtype
    outputs = model(apply_maps(maps, x, dtype))
    return outputs.argmax(1) if outputs.shape[1] > 1 else (outputs[:, 0] > 0).long()


def certified(model, x, maps=(), **options):
    return certify(model, x, predicted(model, x, maps), maps=maps, **options)
