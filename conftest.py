"""Names that every doctest may use, as a reader would have imported them."""

import pytest
import torch

import lipdp


@pytest.fixture(autouse=True)
def _names(doctest_namespace):
    doctest_namespace["lipdp"] = lipdp
    doctest_namespace["torch"] = torch


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
