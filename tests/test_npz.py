"""Tables and images in npz archives."""

from __future__ import annotations

import io
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from data_files import save

from lipdp import data
from lipdp.data.files import read_npz
from lipdp.errors import DataError

RNG = np.random.default_rng(0)


pytestmark = pytest.mark.usefixtures("no_environment")


def test_npz_table_and_its_split(tmp_path):
    x = np.arange(50.0).reshape(25, 2)
    test = [12.0, 28.0, 30.0, 42.0]
    split = data.load(save(tmp_path / "t.npz", X=x, y=np.arange(25) % 2))
    assert split.task == "binary"
    assert split.num_classes == 2
    assert split.input_shape == (2,)
    assert sorted(torch.cat([split.train_x, split.test_x])[:, 0].tolist()) == x[:, 0].tolist()
    assert torch.equal(split.test_y, (split.test_x[:, 0] / 2).long() % 2)  # labels stay with their records
    assert split.test_x[:, 0].tolist() == test  # the public cut itself must never move
    other = data.load(save(tmp_path / "u.npz", X=x[::-1], y=np.arange(25)[::-1] % 2))
    assert other.test_x[:, 0].tolist() == test[::-1]


def test_npz_with_its_own_test_part(tmp_path):
    path = save(tmp_path / "t.npz", X=np.ones((3, 2)), y=[0, 1, 2], X_test=np.zeros((2, 2)), y_test=[3, 0])
    split = data.load(path)
    assert (len(split.train_x), len(split.test_x), split.num_classes, split.task) == (3, 2, 4, "multiclass")


@pytest.mark.parametrize("shape", [(40, 5, 6), (40, 1, 5, 6), (40, 3, 5, 6)])
def test_npz_images(tmp_path, shape):
    pixels = RNG.integers(0, 256, shape, dtype=np.uint8)
    as_bytes = data.load(save(tmp_path / "b.npz", X=pixels, y=[0, 1] * 20))
    as_floats = data.load(save(tmp_path / "f.npz", X=pixels / 255, y=[0, 1] * 20))
    assert as_bytes.input_shape == (shape[1] if len(shape) == 4 else 1, 5, 6)
    assert as_bytes.task == "multiclass"
    torch.testing.assert_close(as_bytes.train_x, as_floats.train_x)


def test_npz_dtypes_and_orders(tmp_path):
    x = np.arange(12).reshape(6, 2)
    for kind in ("<f4", ">f8", "<i2", ">i8", "u1", "f2"):
        loaded = data.load(save(tmp_path / "t.npz", X=np.asfortranarray(x.astype(kind)), y=np.arange(6).astype(">u2")))
        assert sorted(torch.cat([loaded.train_x, loaded.test_x]).tolist()) == x.tolist()
    np.savez_compressed(tmp_path / "z.npz", X=x, y=np.array([True, False] * 3))
    assert data.load(str(tmp_path / "z.npz")).task == "binary"


def _object_npz() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, X=np.array([[1], ["a"]], dtype=object), y=[0, 1])
    return buffer.getvalue()


def _lying_npz(shape: str) -> bytes:
    """An archive whose member declares `shape` in its npy header but holds 32 bytes."""
    header = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}}}".ljust(117).encode() + b"\n"
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("X.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(32))
        archive.writestr("y.npy", b"")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"X": np.ones((4, 2))}, "lacks y"),
        ({"X": np.ones((4, 2)), "y": np.zeros(3, int)}, r"labels of shape \(3,\) .* for 4 records"),
        ({"X": np.ones((4, 2)), "y": np.zeros((4, 1), int)}, r"labels of shape \(4, 1\)"),
        ({"X": np.ones((4, 2)), "y": np.array([0, -1, -1, 0])}, "not whole numbers"),
        ({"X": np.ones((4, 2)), "y": np.array([0.5, 1, 0.5, 0])}, "not whole numbers"),
        ({"X": np.ones((4, 2)), "y": np.array([0, 1, np.nan, np.nan])}, "not whole numbers"),
        ({"X": np.ones((4, 2)), "y": np.array([0, 10**12, 10**12, 0])}, "not whole numbers"),
        ({"X": np.ones((4, 2)), "y": np.zeros(4), "X_test": np.ones((2, 2)), "y_test": [0, -1]}, "y_test.* not whole"),
        ({"X": np.ones(4), "y": np.zeros(4, int)}, "X has shape"),
        ({"X": np.ones((4, 0)), "y": np.zeros(4, int)}, "X has shape"),
        ({"X": np.ones((0, 4)), "y": np.zeros(0, int)}, "X has shape"),
        ({"X": np.ones((1, 4)), "y": np.zeros(1, int)}, "1 records, too few"),
        ({"X": np.full((4, 2, 2), 2.0), "y": np.zeros(4, int)}, r"leave \[0, 1\]"),
        ({"X": np.array([["a"], ["b"]]), "y": [0, 1]}, "dtype"),
        ({"X": np.ones((4, 2), complex), "y": np.zeros(4, int)}, "dtype"),
        ({"X": np.ones((4, 2)), "y": np.zeros(4, int), "X_test": np.ones((4, 2))}, "only one of"),
        ({"X": np.ones((4, 2)), "y": np.zeros(4, int), "X_test": np.ones((4, 3)), "y_test": np.zeros(4, int)}, "but"),
    ],
)
def test_bad_npz_is_named(tmp_path, arrays, says):
    path = save(tmp_path / "t.npz", **arrays)
    with pytest.raises(DataError, match=says) as caught:
        data.load(path)
    assert path in str(caught.value)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "cannot be read"),
        (b"PK\x05\x06" + bytes(18), "lacks X, y"),
        (_object_npz(), "dtype object"),
        (_lying_npz("(10**12,)"), "cannot be read"),
        (_lying_npz("(1000000000000,)"), "declares 8000000000000 bytes and holds 32"),
        (_lying_npz("(3,)"), "holds 32"),
        (_lying_npz("(-2, -2)"), "cannot be read"),
    ],
)
def test_hostile_npz_is_named(tmp_path, content, says):
    path = tmp_path / "t.npz"
    path.write_bytes(content)
    with pytest.raises(DataError, match=says) as caught:
        data.load(str(path))
    assert str(path) in str(caught.value)


def test_zip_that_declares_more_than_deflate_can_hold(tmp_path):
    path = Path(save(tmp_path / "t.npz", X=np.ones((4, 2)), y=np.zeros(4, int)))
    content = bytearray(path.read_bytes())
    entry = content.find(b"PK\x01\x02")
    content[entry + 24 : entry + 28] = struct.pack("<I", 2**31)  # the uncompressed size in the central directory
    path.write_bytes(content)
    with pytest.raises(DataError, match="declares 2147483648 bytes"):
        read_npz(path, ("X",))
