"""Fixtures shared by test files."""

import os

import numpy as np
import pytest
import torch
from faults.client import Commands
from npy_folders import digits, write

if "PYTEST_XDIST_WORKER" in os.environ:  # a process a core: one thread in each
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def one_thread():
    """For files of many small tensors, where a second thread only waits: `pytestmark = usefixtures("one_thread")`."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def commands():
    """`lipdp` as processes of their own, forked from one that has torch imported."""
    server = Commands()
    yield server
    server.close()


@pytest.fixture
def no_environment(monkeypatch, tmp_path):
    """No data folder, and a cache of the test's own."""
    monkeypatch.delenv("LIPDP_DATA", raising=False)
    monkeypatch.setenv("LIPDP_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def digits_folder(tmp_path_factory):
    """The digits as bytes, as a folder and in `digits.npz` within."""
    arrays = digits()
    names = {"X": "train_x", "y": "train_y", "X_test": "test_x", "y_test": "test_y"}
    folder = tmp_path_factory.mktemp("digits")
    np.savez(folder / "digits.npz", **arrays)
    return write(folder, **{names[key]: array for key, array in arrays.items()})
