"""A test kit that tries to falsify bounds: of a model, of a layer of yours, of a loss.

class TestMyLayer(lipdp.testing.LayerTestCase):
    input_shape = (8,)
    def make_layer(self): return MyLayer()
"""

from lipdp.testing.case import LayerTestCase
from lipdp.testing.falsify import falsify, falsify_layer, tightness
from lipdp.testing.inputs import WEIGHTS, ProbeLoss, example_targets
from lipdp.testing.loss import falsify_loss
from lipdp.testing.report import Finding, Report

__all__ = [
    "WEIGHTS",
    "Finding",
    "LayerTestCase",
    "ProbeLoss",
    "Report",
    "example_targets",
    "falsify",
    "falsify_layer",
    "falsify_loss",
    "tightness",
]
