"""MNIST's files: the layouts that users have, and whatever is wrong with one."""

from __future__ import annotations

import gzip
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from data_files import IDX_FILES, save

from lipdp import data
from lipdp.data.files import read_idx, write_idx
from lipdp.errors import DataError

RNG = np.random.default_rng(0)


pytestmark = pytest.mark.usefixtures("no_environment")


def small_idx(folder: Path, counts=(12, 4), zipped=False) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for files, count in zip((IDX_FILES[:2], IDX_FILES[2:]), counts, strict=True):
        write_idx(folder / files[0], RNG.integers(0, 256, (count, 28, 28), dtype=np.uint8))
        write_idx(folder / files[1], (np.arange(count) % 10).astype(np.uint8))
    if zipped:
        for file in IDX_FILES:
            (folder / f"{file}.gz").write_bytes(gzip.compress((folder / file).read_bytes()))
            (folder / file).unlink()
    return folder


# --- IDX --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("mnist", "MNIST/raw"),
        ("mnist", "MNIST"),
        ("mnist", "."),
        ("fashion-mnist", "FashionMNIST/raw"),
        ("fashion-mnist", "fashion-mnist"),
        ("fashion-mnist", "."),
    ],
)
def test_idx_layouts(tmp_path, name, layout, zipped):
    small_idx(tmp_path / layout, zipped=zipped)
    split = data.load(name, data_dir=tmp_path)
    assert split.train_x.shape == (12, 1, 28, 28)
    assert split.test_y.tolist() == [0, 1, 2, 3]
    assert split.train_x.is_contiguous()
    assert split.train_x.min() >= 0
    assert split.train_x.max() <= 1
    assert split.name == name


def test_idx_values_are_bytes_over_255(tmp_path):
    pixels = np.arange(2 * 784, dtype=np.uint32).astype(np.uint8).reshape(2, 28, 28)
    write_idx(tmp_path / "a", pixels)
    assert np.array_equal(read_idx(tmp_path / "a", (28, 28)), pixels)
    small_idx(tmp_path, counts=(2, 2))
    write_idx(tmp_path / IDX_FILES[0], pixels)
    loaded = data.load("mnist", data_dir=tmp_path).train_x
    assert torch.equal((loaded * 255).round().to(torch.uint8)[:, 0], torch.from_numpy(pixels))


def test_named_folder_wins_over_the_data_folder_itself(tmp_path):
    small_idx(tmp_path, counts=(5, 5))
    small_idx(tmp_path / "FashionMNIST/raw", counts=(7, 5))
    assert len(data.load("fashion-mnist", data_dir=tmp_path).train_x) == 7
    assert len(data.load("mnist", data_dir=tmp_path).train_x) == 5


def _idx(magic=0x803, shape=(3, 28, 28), body=3 * 784) -> bytes:
    return struct.pack(f">{1 + len(shape)}I", magic, *shape) + bytes(body)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "ends inside its header"),
        (b"\x00\x00\x08", "ends inside its header"),
        (_idx(magic=0x801), "starts with"),
        (_idx(magic=0xD03), "starts with"),
        (_idx(shape=(3, 28, 27)), "declares shape"),
        (_idx(shape=(0, 28, 28), body=0), "declares shape"),
        (_idx(body=3 * 784 - 1), "holds only"),
        (_idx(body=3 * 784 + 1), "holds more"),
        (_idx(shape=(2**32 - 1, 28, 28)), "declares 3367254359280 bytes"),
        (gzip.compress(_idx(), mtime=0)[:-1], "cannot be read"),
        (gzip.compress(_idx(), mtime=0)[:-8] + bytes(8), "cannot be read"),
        (gzip.compress(_idx(), mtime=0)[:20], "cannot be read"),
        (b"\x1f\x8b" + bytes(50), "cannot be read"),
    ],
)
def test_bad_idx_is_named(tmp_path, content, says):
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(content)
    with pytest.raises(DataError, match=says) as caught:
        read_idx(path, (28, 28))
    assert str(path) in str(caught.value)


def test_gzip_bomb_is_not_inflated(tmp_path):
    """A file is inflated up to what its header declares and no further."""
    path = tmp_path / "bomb.gz"
    path.write_bytes(gzip.compress(_idx() + bytes(50_000_000), compresslevel=1))
    tracemalloc.start()
    with pytest.raises(DataError, match="holds more"):
        read_idx(path, (28, 28))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_000_000


def test_missing_and_partial_sets(tmp_path):
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte.*--data-dir.*LIPDP_DATA.*--download"):
        data.load("mnist", data_dir=tmp_path)
    small_idx(tmp_path / "MNIST/raw")
    (tmp_path / "MNIST/raw" / IDX_FILES[3]).unlink()
    with pytest.raises(DataError, match="raw lacks t10k-labels-idx1-ubyte"):
        data.load("mnist", data_dir=tmp_path)


def test_labels_are_checked_against_images(tmp_path):
    small_idx(tmp_path)
    write_idx(tmp_path / IDX_FILES[1], np.zeros(11, np.uint8))
    with pytest.raises(DataError, match=r"train-labels.*\(11,\) for 12 records"):
        data.load("mnist", data_dir=tmp_path)
    write_idx(tmp_path / IDX_FILES[1], np.full(12, 10, np.uint8))
    with pytest.raises(DataError, match=r"train-labels.*0\.\.9"):
        data.load("mnist", data_dir=tmp_path)


def test_unreadable_path_is_a_data_error(tmp_path):
    small_idx(tmp_path)
    (tmp_path / IDX_FILES[0]).unlink()
    (tmp_path / IDX_FILES[0]).mkdir()
    with pytest.raises(DataError, match="lacks train-images"):
        data.load("mnist", data_dir=tmp_path)
    with pytest.raises(DataError, match="cannot be read"):
        read_idx(tmp_path, (28, 28))


# --- data folder ------------------------------------------------------------------------------------------------------


def test_data_dir_argument_environment_and_neither(tmp_path, monkeypatch):
    small_idx(tmp_path / "a" / "MNIST/raw", counts=(5, 2))
    small_idx(tmp_path / "b" / "MNIST/raw", counts=(6, 2))
    with pytest.raises(DataError, match=r"no folder was given.*--data-dir.*LIPDP_DATA.*--download"):
        data.load("mnist")
    monkeypatch.setenv("LIPDP_DATA", str(tmp_path / "b"))
    assert len(data.load("mnist").train_x) == 6
    assert len(data.load("mnist", data_dir=tmp_path / "a").train_x) == 5
    with pytest.raises(DataError, match="nowhere is not a folder"):
        data.load("mnist", data_dir=tmp_path / "nowhere")
    save(tmp_path / "b" / "t.npz", X=np.ones((4, 2)), y=np.zeros(4, int))
    assert data.load("t.npz").name == "t.npz"
