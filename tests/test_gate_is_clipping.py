"""On features of norm 1 a gate at the logits is per-sample clipping: Opacus' sum and lipdp's are the same."""

from __future__ import annotations

import pytest
import torch
from kit import private, table
from torch import nn

from lipdp import losses
from lipdp import nn as lnn

GATE, TAU = 0.6, 8.0


def unit_table():
    data = table(dtype=torch.float64)
    x, y = data.tensors
    return type(data)(x / x.norm(dim=1, keepdim=True), y)


def head(weight):
    layer = nn.Linear(*reversed(weight.shape), bias=False, dtype=torch.float64)
    layer.weight = nn.Parameter(weight.clone())
    return layer


@pytest.mark.filterwarnings("ignore:Full backward hook")  # of Opacus' own hooks
def test_the_gated_head_releases_what_opacus_clips():
    """δ(φ(x)(p − y)ᵀ) has norm ‖p − y‖ where ‖φ(x)‖ = 1, so both shorten by min(1, c/‖p − y‖)."""
    opacus = pytest.importorskip("opacus")
    data, weight = unit_table(), 3 * torch.randn(5, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    model = nn.Sequential(lnn.InputBound(1.0), head(weight))
    _, _, optimizer, loader, criterion = private(
        model, data, noise_multiplier=1e-9, lr=1.0, criterion=losses.TauCrossEntropy(TAU), gate=GATE, steps=1
    )
    x, y = next(iter(loader))
    criterion(model(x), y).backward()
    optimizer.step()
    ours = (weight - model[1].weight) * 64  # lr 1, over the public batch size

    twin = opacus.GradSampleModule(head(weight))
    clipping = opacus.optimizers.DPOptimizer(
        torch.optim.SGD(twin.parameters(), lr=1.0), noise_multiplier=0.0, max_grad_norm=GATE, expected_batch_size=len(x)
    )
    (nn.functional.cross_entropy(TAU * twin(x), y) / TAU).backward()
    clipping.clip_and_accumulate()
    (theirs,) = (p.summed_grad for p in twin.parameters())

    norms = (torch.softmax(TAU * (x @ weight.T), 1) - nn.functional.one_hot(y, 5)).norm(dim=1)
    assert 0.2 < (norms > GATE).double().mean() < 0.98  # the gate bites, and not on all
    assert torch.allclose(ours, theirs.detach(), rtol=0, atol=1e-5 * len(x))  # Opacus divides by norm + 1e-6
    assert (ours - theirs).norm() < 1e-5 * ours.norm()
