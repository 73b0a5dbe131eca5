"""Names that every doctest may use, as a reader would have imported them.

Torch is imported where it is used: the process that only hands tests to others is not to wait for it.
"""

import copy
import functools

import pytest


@pytest.fixture(autouse=True)
def _names(doctest_namespace):
    import torch

    import lipdp

    doctest_namespace["lipdp"] = lipdp
    doctest_namespace["torch"] = torch


@pytest.fixture(autouse=True)
def _seed(_absent_devices_are_not_seeded):
    import torch

    torch.manual_seed(0)


@pytest.fixture(scope="session")
def _absent_devices_are_not_seeded():
    """`torch.manual_seed` writes down the stack for every kind of device that may still come: 2 ms for thousands."""
    import torch

    with pytest.MonkeyPatch.context() as patch:
        for kind in (torch.cuda, torch.xpu, torch.mtia):
            if not kind.is_available():
                patch.setattr(kind, "manual_seed_all", lambda seed: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def _digits_are_parsed_once():
    """scikit-learn reads them from a text file at each of a thousand loads; here each load gets a copy."""
    from sklearn import datasets

    digits = functools.cache(datasets.load_digits)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "load_digits", lambda **options: copy.deepcopy(digits(**options)))
        yield
