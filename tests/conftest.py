"""Fixtures shared by test files."""

import pytest
import torch


@pytest.fixture(scope="module")
def one_thread():
    """For files of many small tensors, where a second thread only waits: `pytestmark = usefixtures("one_thread")`."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
