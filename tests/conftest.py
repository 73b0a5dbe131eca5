"""Fixtures shared by test files. Imports are in them, as in the other `conftest.py`."""

import gc
import logging
import multiprocessing
import os
from multiprocessing import forkserver

import pytest

FORKED = [
    "torch.distributed.fsdp", "lipdp.cli", "lipdp.commands.display", "lipdp.training.trainer", "lipdp.comparison.speed",
    "lipdp.comparison.utility", "lipdp.planning.search", "lipdp.planning.cost", "torch._dynamo",
]  # fmt: skip
LONGEST = (
    "torchrun", "distributed", "compare", "faults", "cost", "simulation", "suggestion", "fuzz", "cli", "readme",
    "planning", "testing", "training", "report", "estimators", "audit", "secure", "trainers", "any_loop", "port",
)  # fmt: skip
"""The files to begin with, where several processes share them: the last to end decides when all is done."""

if "PYTEST_XDIST_WORKER" in os.environ:  # a process a core: one thread in each
    import torch

    torch.set_num_threads(1)


def pytest_configure(config):
    config.option.loadscopereorder = False  # xdist would begin with the files of the most tests, not the longest
    gc.disable()  # what is imported and collected lives to the end: looking through it takes a third of the time


def pytest_collection_finish():
    gc.enable()
    for logger in logging.root.manager.loggerDict.values():
        if isinstance(logger, logging.Logger):
            logger.propagate = True  # else pytest puts its handlers on each of torch's fifty, six times a test


def pytest_collection_modifyitems(items):
    places = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


@pytest.fixture(scope="session", autouse=True)
def _no_waiting_for_the_disk():
    """What a test writes need not outlive a power cut; the processes of `commands` flush as ever."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="module")
def one_thread():
    """For files of many small tensors, where a second thread only waits: `pytestmark = usefixtures("one_thread")`."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def unjudged():
    """For files of many runs of one plain net that say nothing of how well it learns: no gradient is probed before."""
    from lipdp.privacy import attach

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attach, "_probed", lambda *given: {})
        patch.setattr(attach, "noise_moves", lambda *given: {})
        yield


@pytest.fixture(scope="session")
def forks():
    """What the processes of tests are forked from, those of the library too: it has imported once what they use."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(FORKED)
    forkserver.ensure_running()
    return context


@pytest.fixture(scope="session")
def commands(forks):
    """`lipdp` as processes of their own, forked from one that has run it."""
    from faults.client import Commands

    server = Commands(forks)
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
    import numpy as np
    from npy_folders import digits, write

    arrays = digits()
    names = {"X": "train_x", "y": "train_y", "X_test": "test_x", "y_test": "test_y"}
    folder = tmp_path_factory.mktemp("digits")
    np.savez(folder / "digits.npz", **arrays)
    return write(folder, **{names[key]: array for key, array in arrays.items()})
