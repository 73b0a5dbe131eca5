"""Certificates count what is done to the inputs, and what two classes make of the radii."""

from __future__ import annotations

import math

import pytest
import torch
from certificates import attacked, certified
from sklearn.metrics import roc_auc_score

import lipdp
from lipdp import nn as lnn
from lipdp.certify import certify
from lipdp.certify.inputs import apply_maps, moduli_of_maps
from lipdp.certify.moduli import pull
from lipdp.data import Clip, Rescale, SignedLog, Standardise
from lipdp.features import features
from lipdp.nn.gates import clip_norm

pytestmark = pytest.mark.usefixtures("one_thread")


# --- preprocessing ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "step",
    [
        Clip(-0.5, 0.5),
        Rescale(0.0, 4.0),
        Rescale((0.0, -1.0, -2.0, 0.0), (0.1, 1.0, 2.0, 9.0)),
        Standardise((0.1, 0.2, 0.3, 0.4), (0.5, 1.0, 3.0, 2.0)),
        SignedLog(),
    ],
    ids=str,
)
def test_radii_are_in_units_of_the_raw_input(step):
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        lnn.InputBound(1.0), lnn.SpectralLinear(4, 8), lnn.GroupSort2(), lnn.SpectralLinear(8, 3)
    )
    x = torch.randn(100, 4)
    certificate = certified(model, x, [step])
    broken, count = attacked(model, x, certificate, maps=[step])
    assert broken == 0
    assert count > 60


def test_the_constant_of_a_rescaling_is_tight():
    """A factor 10 from tenths of units: a certificate that forgot it, or took 9, is broken."""
    torch.manual_seed(0)
    model, step = torch.nn.Linear(6, 2), Standardise(std=0.1)
    x = 0.1 * torch.randn(80, 6)
    certificate = certified(model, x, [step])
    assert attacked(model, x, certificate, maps=[step])[0] == 0
    broken, count = attacked(model, x, certificate, maps=[step], factor=10 / 9)
    assert broken > 0.9 * count


@pytest.mark.parametrize(
    "options", [{}, {"unit_norm": True}, {"group_norm": 3, "unit_norm": True}, {"dtype": "float16"}]
)
def test_features_with_and_without_normalisation(options):
    torch.manual_seed(0)
    maps = [Clip(), features("dct", keep=4, **options)]
    x = torch.rand(60, 3, 6, 6)
    inputs = apply_maps(maps, x, torch.float32)
    model = torch.nn.Sequential(lnn.InputBound(1.0), torch.nn.Linear(inputs.shape[1], 4))
    certificate = certified(model, x, maps)
    broken, count = attacked(model, x, certificate, maps=maps)
    assert broken == 0
    assert count > 40


def test_the_unit_norm_of_features_is_a_projection():
    """‖z‖ = a moves by ρ/a: the radius grows with the norm, where a global constant does not exist."""
    spec = features("dct", unit_norm=True)
    x = torch.rand(4, 1, 5, 5, dtype=torch.float64)
    chain = moduli_of_maps([spec], x, torch.float64)
    large = moduli_of_maps([spec], 7 * x, torch.float64)
    rho = torch.full((4,), 0.1, dtype=torch.float64)
    assert torch.allclose(pull(large, rho), 7 * pull(chain, rho), rtol=1e-6)
    expected = 0.1 * math.sqrt(1 - 0.1**2 / 4) * x.flatten(1).norm(dim=1)
    assert torch.allclose(pull(chain, rho), expected, rtol=1e-6)


# --- two classes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize("steps", [(), (SignedLog(),)])
def test_the_certified_auroc_is_below_what_an_attack_on_the_scores_leaves(outputs, steps):
    torch.manual_seed(0)
    model = lipdp.models.build("mlp", input_shape=(6,), num_classes=outputs, width=64, depth=1, clips=0.3)
    y = torch.arange(120) % 2
    x = torch.randn(120, 6) + 1.5 * y[:, None]

    def scores(inputs):
        z = model(apply_maps(steps, inputs, torch.float32))
        return z[:, 0] if outputs == 1 else z[:, 1] - z[:, 0]

    certificate = certify(model, x, y, maps=steps)
    clean = roc_auc_score(y, scores(x).detach())
    assert certificate.auroc() == pytest.approx(clean, abs=1e-12)
    for radius in (0.05, 0.3, 1.0):
        moved = x.clone()
        for _ in range(30):  # ascent of each score in the wrong direction, within the ball
            moved.requires_grad_()
            (gradient,) = torch.autograd.grad((scores(moved) * (1.0 - 2.0 * y)).sum(), moved)
            step = moved.detach() - x + 0.3 * radius * torch.nn.functional.normalize(gradient, dim=1)
            moved = x + clip_norm(step, radius)
        left = roc_auc_score(y, scores(moved).detach())
        assert certificate.auroc(radius) <= left <= clean
    assert certificate.auroc(1e6) <= certificate.auroc(0.3) <= certificate.auroc(0.05) <= clean


def test_the_certified_auroc_of_a_linear_score_is_exact():
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 1)
    y = torch.arange(200) % 2
    x = torch.randn(200, 5) + 0.8 * y[:, None]
    certificate = certify(model, x, y)
    shift = 0.4 * model.weight.norm() * (1.0 - 2.0 * y)
    truth = roc_auc_score(y, (model(x)[:, 0] + shift).detach())
    assert certificate.auroc(0.4) == pytest.approx(truth, abs=2e-3)
