"""Names that every doctest may use, as a reader would have imported them."""

import copy
import functools

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


@pytest.fixture(scope="session", autouse=True)
def _digits_are_parsed_once():
    """scikit-learn reads them from a text file at each of a thousand loads; here each load gets a copy."""
    from sklearn import datasets

    digits = functools.cache(datasets.load_digits)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "load_digits", lambda **options: copy.deepcopy(digits(**options)))
        yield
