"""Fixtures shared by test files."""

import os

import pytest
import torch
from faults.client import Commands

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
