"""How much of its bound an attack reaches, for every rule: the table of docs/testing.md.

python -m pytest -m slow -s tests/test_ratios.py
"""

import pytest
import test_everyday_layers as everyday
import test_everyday_losses
import test_layers
import test_losses
import test_tokens_and_weights as tokens
import torch

from lipdp.testing import falsify_layer, falsify_loss

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

LAYERS = {
    **{name: (make, shape, options.get("radius", 1.0)) for name, (make, shape, options) in test_layers.CASES.items()},
    **{name: (make, shape, radius) for name, (make, shape, radius, _) in everyday.LAYERS.items()},
    **{name: (make, shape, 1.0) for name, (make, shape, _) in tokens.LAYERS.items()},
    **{name: (make, shape, 1.0) for name, (make, shape) in tokens.TABLES.items()},
}
LOSSES = {**test_losses.LOSSES, **test_everyday_losses.LOSSES}
COLUMNS = {"weights": "gradient of layer", "constant": "Lipschitz constant (g", "value": "value of", "records": "batch"}


def row(name, report):
    """One line of the table: the largest ratio of each kind of bound."""
    found = {q: f.ratio for q, f in report.findings.items() if "bound" not in q}
    kinds = [[ratio for q, ratio in found.items() if q.startswith(start)] for start in COLUMNS.values()]
    return f"| {name} | " + " | ".join(f"{max(ratios):.3f}" if ratios else "–" for ratios in kinds) + " |"


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_ratios_of_layers(name):
    make, shape, radius = LAYERS[name]
    torch.manual_seed(0)
    report = falsify_layer(
        make(), shape, radius=radius, starts=8, climbs=3, steps=25, weights=("given", "constant", "rank one")
    )
    print(row(name, report))
    assert report.worst <= 1 + report.tolerance


@pytest.mark.parametrize("name", LOSSES)
def test_ratios_of_losses(name):
    loss, outputs, *_ = LOSSES[name]
    report = falsify_loss(loss, outputs)
    print(f"| {name} | – | {report.worst:.3f} | – | – |")
    assert report.worst <= 1 + report.tolerance
