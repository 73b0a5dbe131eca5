"""Downloads: written once, whole or not at all."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from data_files import IDX_FILES

from lipdp import data
from lipdp.errors import DataError

pytestmark = pytest.mark.usefixtures("no_environment")


def openml(monkeypatch, answer):
    from sklearn import datasets

    calls = []

    def fetch(name, **options):
        calls.append((name, options))
        return answer()

    monkeypatch.setattr(datasets, "fetch_openml", fetch)
    return calls


def test_download_writes_the_layout_once(tmp_path, monkeypatch):
    pixels = np.zeros((70_000, 784), np.float32)
    pixels[0, :3], pixels[60_000, 0] = (1, 2, 255), 7
    labels = np.array([str(i % 10) for i in range(70_000)], dtype=object)
    calls = openml(monkeypatch, lambda: SimpleNamespace(data=pixels, target=labels))
    split = data.load("fashion-mnist", data_dir=tmp_path / "new", download=True)
    assert calls[0][0] == "Fashion-MNIST"
    assert calls[0][1]["version"] == 1
    assert len(split.train_x) == 60_000
    assert len(split.test_x) == 10_000
    assert (split.train_x[0].flatten()[:3] * 255).tolist() == [1, 2, 255]
    assert split.test_x[0, 0, 0, 0] * 255 == 7
    assert sorted(path.name for path in (tmp_path / "new/FashionMNIST/raw").iterdir()) == sorted(IDX_FILES)
    data.load("fashion-mnist", data_dir=tmp_path / "new", download=True)
    assert len(calls) == 1  # what is there is not fetched again


@pytest.mark.slow
def test_download_of_cifar_and_the_default_folder(monkeypatch, tmp_path):
    pixels = np.zeros((60_000, 3072), np.uint8)
    pixels[50_000] = 255
    openml(monkeypatch, lambda: SimpleNamespace(data=pixels, target=np.arange(60_000) % 10))
    split = data.load("cifar10", download=True)
    assert split.test_x[0].min() == 1
    assert split.test_x[1:].max() == 0
    assert len(split.train_x) == 50_000
    assert (tmp_path / "cache/data/cifar-10-batches-py/test_batch").is_file()
    assert len(data.load("cifar10").test_x) == 10_000  # found again without download


def _constant(value):
    return np.broadcast_to(np.float32(value), (70_000, 784))


def _fail(error):
    raise error


@pytest.mark.parametrize(
    "answer",
    [
        lambda: _fail(OSError("Network is unreachable")),
        lambda: _fail(ValueError("md5 checksum")),
        lambda: _fail(ImportError("pandas")),
        lambda: SimpleNamespace(data=np.zeros((3, 784)), target=np.zeros(3)),
        lambda: SimpleNamespace(data=_constant(-1.0), target=np.zeros(70_000)),
        lambda: SimpleNamespace(data=_constant(0.5), target=np.zeros(70_000)),
        lambda: SimpleNamespace(data=_constant(np.nan), target=np.zeros(70_000)),
        lambda: SimpleNamespace(data=_constant(256.0), target=np.zeros(70_000)),
        lambda: SimpleNamespace(data=_constant(0.0), target=np.full(70_000, 10)),
        lambda: SimpleNamespace(data=_constant(0.0), target=np.full(70_000, "cat")),
    ],
)
def test_failing_download_leaves_nothing(tmp_path, monkeypatch, answer):
    openml(monkeypatch, answer)
    with pytest.raises(DataError, match="OpenML"):
        data.load("mnist", data_dir=tmp_path, download=True)
    assert not list(tmp_path.rglob("*ubyte*"))
