"""Readers, splits and bounding: what they accept is valid, what they refuse they refuse by name."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import struct
import sys
import tracemalloc
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lipdp import data
from lipdp.data.cifar import read_cifar_batch, write_cifar_batch
from lipdp.data.files import read_idx, read_npz, write_idx
from lipdp.errors import DataError, LipdpError, ParameterError, UnknownNameError
from lipdp.files import written_whole

SHARED = Path(__file__).parents[2] / "shared" / "data"
RNG = np.random.default_rng(0)
IDX_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("LIPDP_DATA", raising=False)
    monkeypatch.setenv("LIPDP_CACHE", str(tmp_path / "cache"))


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


def small_cifar(folder: Path, count=3) -> Path:
    for file in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        write_cifar_batch(folder / file, RNG.integers(0, 256, (count, 3, 32, 32), dtype=np.uint8), np.arange(count))
    return folder


# ----------------------------------------------------------------------------------------------------------- digits


def test_digits_split_is_every_fifth_record():
    from sklearn.datasets import load_digits

    raw = load_digits()
    split = data.load("digits")
    assert torch.equal(split.test_x[:, 0], torch.tensor(raw.images[::5] / 16, dtype=torch.float32))
    assert split.train_y.tolist() == [int(y) for i, y in enumerate(raw.target) if i % 5]
    assert (split.input_shape, split.num_classes, split.task, split.note) == ((1, 8, 8), 10, "multiclass", "")
    assert split.train_x.dtype == torch.float32
    assert split.train_y.dtype == torch.int64
    assert split.train_x.min() == 0
    assert split.train_x.max() == 1


def test_split_is_frozen():
    with pytest.raises(AttributeError):
        data.load("digits").name = "other"  # type: ignore[misc]


# -------------------------------------------------------------------------------------------------------------- IDX


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


# ------------------------------------------------------------------------------------------------------------ CIFAR


@pytest.mark.parametrize("layout", ["cifar-10-batches-py", "."])
def test_cifar_layouts(tmp_path, layout):
    small_cifar(tmp_path / layout)
    split = data.load("cifar10", data_dir=tmp_path)
    assert split.train_x.shape == (15, 3, 32, 32)
    assert split.test_x.shape == (3, 3, 32, 32)
    assert split.train_y.tolist() == [0, 1, 2] * 5
    assert split.note == ""


IMAGES = RNG.integers(0, 256, (4, 3072), dtype=np.uint8)

PYTHON2_BATCH = (
    b"\x80\x02}q\x01(U\x04dataq\x02cnumpy.core.multiarray\n_reconstruct\nq\x03cnumpy\nndarray\nq\x04K\x00\x85U\x01b\x87R"
    b"q\x05(K\x01K\x04M\x00\x0c\x86cnumpy\ndtype\nq\x06U\x02u1K\x00K\x01\x87Rq\x07(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff"
    b"\xff\xff\xffK\x00tb\x89T\x00\x30\x00\x00" + IMAGES.tobytes() + b"tbU\x06labelsq\x08]q\x09(K\x03K\x01K\x04K\x09e"
    b"U\x0bbatch_labelq\x0aU\x15training batch 1 of 5q\x0bu."
)
"""What cPickle of Python 2 wrote for the original files, written out by hand: old module names, byte strings."""


def _pickled(protocol: int, core: str | None = None, **fields) -> bytes:
    batch = {b"data": IMAGES, b"labels": [3, 1, 4, 9], **{k.encode(): v for k, v in fields.items()}}
    content = pickle.dumps(batch, protocol)
    return content.replace(b"numpy._core", b"numpy.core") if core == "numpy.core" and protocol < 4 else content


@pytest.mark.parametrize("content", [PYTHON2_BATCH, *(_pickled(p) for p in range(6)), _pickled(2, "numpy.core")])
def test_cifar_pickles_of_every_age(tmp_path, content):
    path = tmp_path / "data_batch_1"
    path.write_bytes(content)
    images, labels = read_cifar_batch(path)
    assert np.array_equal(images.reshape(4, 3072), IMAGES)
    assert labels.tolist() == [3, 1, 4, 9]


def test_cifar_fortran_order(tmp_path):
    path = tmp_path / "data_batch_1"
    for protocol in range(6):
        path.write_bytes(_pickled(protocol, data=np.asfortranarray(IMAGES)))
        assert np.array_equal(read_cifar_batch(path)[0].reshape(4, 3072), IMAGES)


class _Evil:
    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(6))
def test_a_hostile_pickle_runs_nothing(tmp_path, protocol):
    path, proof = tmp_path / "data_batch_1", tmp_path / "proof"
    for evil in (_Evil(os.system, f"touch {proof}"), _Evil(eval, "1"), _Evil(np.load, str(proof)), _Evil(Path, "x")):
        path.write_bytes(pickle.dumps({b"data": IMAGES, b"labels": [0, 1, 2, evil]}, protocol))
        with pytest.raises(DataError, match="refers to") as caught:
            read_cifar_batch(path)
        assert str(path) in str(caught.value)
    assert not proof.exists()


BOMB = b")" + b"q\x01h\x01\x86" * 40
"""A tuple that holds the same tuple twice, forty levels deep: 160 bytes, and 2⁴⁰ entries to hash or to print."""

ARRAY = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
DTYPE = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R"


@pytest.mark.parametrize(
    "content",
    [
        b"}" + BOMB + b"K\x01s.",
        b"}(" + BOMB + b"K\x01u.",
        b"(" + BOMB + b"K\x01d.",
        b"}(U\x04data" + ARRAY + b"(K\x01" + BOMB + DTYPE + b"\x89U\x010tbU\x06labels]u.",
        b"}(U\x04data" + ARRAY + b"(K\x01cnumpy\ndtype\n" + BOMB + b"\x85R\x85" + DTYPE + b"\x89U\x010tbU\x06labels]u.",
        b"cnumpy\ndtype\n" + BOMB + b"\x85R.",
        b"\x8f(" + BOMB + b"\x90.",
    ],
)
def test_a_pickle_that_would_take_for_ever_is_refused(tmp_path, content):
    path = tmp_path / "data_batch_1"
    path.write_bytes(b"\x80\x04" + content)
    with pytest.raises(DataError) as caught:
        read_cifar_batch(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_a_pickle_changes_nothing_in_the_reader(tmp_path):
    path = tmp_path / "data_batch_1"
    for state in (b"}U\x01aK\x01s", b"N}U\x0c__defaults__K\x01\x85s\x86", b"}U\x04nameU\x03a bs"):
        path.write_bytes(b"\x80\x02cnumpy\ndtype\n" + state + b"b.")
        with pytest.raises(DataError, match="not a CIFAR batch"):
            read_cifar_batch(path)
        path.write_bytes(PYTHON2_BATCH)
        assert np.array_equal(read_cifar_batch(path)[0].reshape(4, 3072), IMAGES)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "cannot be read"),
        (pickle.dumps([1, 2]), "holds a list"),
        (pickle.dumps({b"data": IMAGES}), "lacks"),
        (_pickled(4, data=IMAGES.tolist()), "lacks"),
        (_pickled(4, data=IMAGES.astype(np.float32)), "unsigned bytes"),
        (_pickled(4, data=IMAGES[:, :3000]), r"\(4, 3000\), not \(n, 3072\)"),
        (_pickled(4, data=IMAGES[:0]), "shape"),
        (_pickled(4, data=IMAGES.reshape(4, 3, 32, 32)), "shape"),
        (_pickled(4, labels=[0, 1, 2]), "4 images but 3 labels"),
        (_pickled(4, labels=[0, 1, 2, 10]), r"0\.\.9"),
        (_pickled(4, labels=[0, 1, 2, -1]), r"0\.\.9"),
        (_pickled(4, labels=[0, 1, 2, 3.0]), r"0\.\.9"),
        (_pickled(4, labels=[0, 1, 2, None]), r"0\.\.9"),
        (_pickled(4)[:-100], "cannot be read"),
        (b"\x80\x04r\xff\xff\xff\xff.", "cannot be read"),  # a memo index of 4 billion
        (b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.", "cannot be read"),  # 8 EiB of bytes
        (b"\x80\x05\x96\xff\xff\xff\xff\xff\xff\xff\x7f.", "cannot be read"),  # the same as a bytearray
    ],
)
def test_bad_cifar_is_named(tmp_path, content, says):
    path = tmp_path / "data_batch_1"
    path.write_bytes(content)
    with pytest.raises(DataError, match=says) as caught:
        read_cifar_batch(path)
    assert str(path) in str(caught.value)


def test_missing_cifar_batch(tmp_path):
    with pytest.raises(DataError, match=r"lacks data_batch_1.*--data-dir"):
        data.load("cifar10", data_dir=tmp_path)
    (small_cifar(tmp_path / "cifar-10-batches-py") / "data_batch_4").unlink()
    with pytest.raises(DataError, match="lacks data_batch_4;"):
        data.load("cifar10", data_dir=tmp_path)


# -------------------------------------------------------------------------------------------------------------- npz


def save(path: Path, **arrays) -> str:
    np.savez(path, **arrays)
    return str(path)


def test_npz_table_and_its_split(tmp_path):
    x = np.arange(50.0).reshape(25, 2)
    split = data.load(save(tmp_path / "t.npz", X=x, y=np.arange(25) % 2))
    assert split.task == "binary"
    assert split.num_classes == 2
    assert split.input_shape == (2,)
    assert len(split.test_x) == 5
    assert len(split.train_x) == 20
    assert sorted(torch.cat([split.train_x, split.test_x])[:, 0].tolist()) == x[:, 0].tolist()
    # labels stay with their records, and other values give the same cut
    assert torch.equal(split.test_y, (split.test_x[:, 0] / 2).long() % 2)
    other = data.load(save(tmp_path / "u.npz", X=-7 * x, y=np.zeros(25, int)))
    assert torch.equal(other.test_x, -7 * split.test_x)
    assert split.test_x[:, 0].tolist() == [8.0, 20.0, 22.0, 38.0, 48.0]  # the public cut itself must never move


def test_npz_with_its_own_test_part(tmp_path):
    path = save(tmp_path / "t.npz", X=np.ones((3, 2)), y=[0, 1, 2], X_test=np.zeros((2, 2)), y_test=[3, 0])
    split = data.load(path)
    assert (len(split.train_x), len(split.test_x), split.num_classes, split.task) == (3, 2, 4, "multiclass")


@pytest.mark.parametrize("shape", [(6, 5, 6), (6, 1, 5, 6), (6, 3, 5, 6)])
def test_npz_images(tmp_path, shape):
    pixels = RNG.integers(0, 256, shape, dtype=np.uint8)
    as_bytes = data.load(save(tmp_path / "b.npz", X=pixels, y=[0, 1] * 3))
    as_floats = data.load(save(tmp_path / "f.npz", X=pixels / 255, y=[0, 1] * 3))
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
        ({"X": np.ones((1, 4)), "y": np.zeros(1, int)}, "one record"),
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


# ---------------------------------------------------------------------------------------------------------- ADBench


def test_adbench_names(tmp_path):
    folder = tmp_path / "adbench"
    folder.mkdir()
    for stem in ("11_donors", "22_magic.gamma", "1_ALOI"):
        save(folder / f"{stem}.npz", X=np.ones((10, 2)), y=np.arange(10) % 2)
    for asked, stem in [
        ("11_donors", "11_donors"),
        ("donors", "11_donors"),
        ("magic", "22_magic.gamma"),
        ("magic.gamma", "22_magic.gamma"),
        ("aloi", "1_ALOI"),
        ("1_ALOI.npz", "1_ALOI"),
    ]:
        split = data.load(f"adbench/{asked}", data_dir=tmp_path)
        assert split.name == f"adbench/{stem}"
        assert split.task == "binary"
    with pytest.raises(UnknownNameError, match=r"Known: 11_donors, 1_ALOI, 22_magic\.gamma"):
        data.load("adbench/donor", data_dir=tmp_path)
    with pytest.raises(UnknownNameError):
        data.load("adbench/../adbench/11_donors", data_dir=tmp_path)
    save(folder / "7_three.npz", X=np.ones((10, 2)), y=np.arange(10) % 3)
    with pytest.raises(DataError, match=r"7_three.npz is not a table with labels 0 and 1"):
        data.load("adbench/three", data_dir=tmp_path)


def test_adbench_missing(tmp_path):
    with pytest.raises(DataError, match=r"no tables.*--data-dir"):
        data.load("adbench/donors", data_dir=tmp_path)
    with pytest.raises(DataError, match=r"github\.com/Minqi824/ADBench"):
        data.load("adbench/donors", data_dir=tmp_path, download=True)


# ------------------------------------------------------------------------------------------------------ data folder


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


def test_unknown_names_list_the_known():
    with pytest.raises(UnknownNameError, match=r"did you mean 'mnist'.*cifar10.*digits.*fashion-mnist"):
        data.load("mnits")


# --------------------------------------------------------------------------------------------------------- download


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


# ------------------------------------------------------------------------------------------------------------- fuzz

FUZZ = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@st.composite
def damage(draw):
    """A function that truncates, flips bits of, overwrites or pads a file's content."""
    cut = draw(st.one_of(st.none(), st.floats(0, 1)))
    flips = draw(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=4))
    near_start = draw(st.booleans())
    tail = draw(st.binary(max_size=8))

    def apply(content: bytes) -> bytes:
        damaged = bytearray(content if cut is None else content[: int(cut * len(content))])
        for place, value in flips:
            if damaged:
                damaged[int(place * (min(len(damaged), 200 if near_start else len(damaged)) - 1))] ^= value
        return bytes(damaged) + tail

    return apply


def _files() -> dict[str, bytes]:
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as name:
        folder = Path(name)
        write_idx(folder / "idx", RNG.integers(0, 256, (2, 28, 28), dtype=np.uint8))
        write_cifar_batch(folder / "cifar", IMAGES.reshape(4, 3, 32, 32), np.arange(4))
        np.savez(folder / "npz.npz", X=RNG.normal(size=(6, 3)), y=np.arange(6) % 2)
        np.savez_compressed(folder / "npzc.npz", X=RNG.normal(size=(6, 3)), y=np.arange(6) % 2)
        plain = {file.stem: file.read_bytes() for file in folder.iterdir()}
    return {**plain, "gz": gzip.compress(plain["idx"]), "cifar2": PYTHON2_BATCH, "cifar5": _pickled(5)}


FILES = _files()


@FUZZ
@given(damage=damage(), kind=st.sampled_from(sorted(FILES)))
def test_damaged_files_load_validly_or_raise_data_error(tmp_path, damage, kind):
    path = tmp_path / f"{kind}.npz"
    path.write_bytes(damage(FILES[kind]))
    try:
        check_valid(kind, path)
    except DataError as error:
        named = str(path) in str(error)
    else:
        named = True
    assert named


def check_valid(kind: str, path: Path) -> None:
    if kind in ("idx", "gz"):
        assert read_idx(path, (28, 28)).shape[1:] == (28, 28)
    elif kind.startswith("cifar"):
        images, labels = read_cifar_batch(path)
        assert images.shape == (len(labels), 3, 32, 32)
        assert set(labels.tolist()) <= set(range(10))
    else:
        split = data.load(str(path))
        for x, y in ((split.train_x, split.train_y), (split.test_x, split.test_y)):
            assert x.isfinite().all()
            assert len(x) == len(y) > 0
            assert set(y.tolist()) <= set(range(split.num_classes))


def test_files_are_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "deep" / "file"
    with written_whole(path) as stream:
        stream.write(b"old")

    def interrupted():
        with written_whole(path) as stream:
            stream.write(b"new but interru")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_bytes() == b"old"
    assert list(path.parent.iterdir()) == [path]


# ----------------------------------------------------------------------------------------------- validation, bounding


def test_validation_is_carved_from_train_only():
    split = data.load("digits")
    carved = data.split_validation(split, fraction=0.25, seed=3)
    again = data.split_validation(split, fraction=0.25, seed=3)
    assert torch.equal(carved.test_x, again.test_x)
    assert len(carved.test_x) == round(0.25 * 1437)
    assert not torch.equal(carved.test_x, data.split_validation(split, fraction=0.25, seed=4).test_x)
    whole = torch.cat([carved.train_x, carved.test_x]).flatten(1)
    rows = sorted(map(tuple, split.train_x.flatten(1).tolist()))
    assert sorted(map(tuple, whole.tolist())) == rows
    for fraction in (0.0, 1.0, -1.0, 2.0, 1e-9, float("nan")):
        with pytest.raises(ParameterError, match="fraction"):
            data.split_validation(split, fraction=fraction)


BOUNDS = [
    data.Clip(-2.0, 0.5),
    data.Clip((-1.0, 0.0, -3.0), (1.0, 2.0, 3.0)),
    data.Rescale(-2.0, 0.5),
    data.Rescale((-1.0, 0.0, -3.0), 4.0),
    data.Tanh(0.7),
    data.SignedLog(),
    data.SignedLog(scale=3.0, limit=2.0),
    data.Standardise((0.1, -2.0, 0.3), (0.2, 1.0, 3.0)),
]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), spread=st.sampled_from([1e-3, 0.1, 1.0, 50.0]))
@pytest.mark.parametrize("bound", BOUNDS, ids=repr)
def test_bounding_keeps_its_constant_and_is_monotone(bound, seed, spread):
    generator = torch.Generator().manual_seed(seed)
    x = spread * torch.randn(64, 3, dtype=torch.float64, generator=generator)
    other = x + spread * 10.0 ** -(seed % 7) * torch.rand(64, 3, dtype=torch.float64, generator=generator)
    moved = bound(other) - bound(x)
    assert (moved >= -1e-12).all()
    assert (moved.norm(dim=1) <= bound.lipschitz * (other - x).norm(dim=1) * (1 + 1e-9) + 1e-12).all()
    # record by record: each alone is mapped as in the batch
    assert torch.equal(bound(x)[5:6], bound(x[5:6]))


@pytest.mark.parametrize("bound", BOUNDS, ids=repr)
def test_bounding_constant_is_reached(bound):
    """Somewhere the slope is the declared constant: 5 % less would fail."""
    x = torch.linspace(-3, 3, 60_001, dtype=torch.float64)[:, None].repeat(1, 3)
    slope = (bound(x[1:]) - bound(x[:-1])).abs() / (x[1:] - x[:-1])
    assert slope.max() >= 0.99 * bound.lipschitz


def test_bounding_ranges():
    x = torch.tensor([[-1e30, 0.0, 1e30], [3.0, -0.2, 0.1]])
    assert data.Clip(-1.0, 1.0)(x).tolist()[0] == [-1, 0, 1]
    assert data.SignedLog(limit=6.0)(x)[0].tolist() == [-6, 0, 6]
    assert data.Tanh()(x)[0].tolist() == [-1, 0, 1]
    assert data.Rescale(0.0, 0.1)(x)[1].tolist() == [1, -1, 1]
    images = torch.ones(2, 3, 4, 5)
    assert data.public_standardisation("cifar10")(images)[0, :, 0, 0].tolist() == pytest.approx(
        [(1 - 0.4914) / 0.2470, (1 - 0.4822) / 0.2435, (1 - 0.4465) / 0.2616]
    )


@pytest.mark.parametrize(
    "make",
    [
        lambda: data.Clip(1.0, 1.0),
        lambda: data.Clip((0.0, 1.0), (1.0, 2.0, 3.0)),
        lambda: data.Rescale(0.0, float("inf")),
        lambda: data.Clip(float("nan"), 1.0),
        lambda: data.Tanh(0.0),
        lambda: data.SignedLog(scale=-1.0),
        lambda: data.SignedLog(limit=float("inf")),
        lambda: data.Standardise(0.0, 0.0),
        lambda: data.Standardise(float("nan"), 1.0),
        lambda: data.clip_features(torch.ones(2, 2), lower=2.0, upper=1.0),
        lambda: data.clip_features(torch.ones(2, 2), lower=(0.0, 0.0, 0.0), upper=1.0),
        lambda: data.Standardise((0.0, 1.0), 1.0)(torch.ones(4)),
        lambda: data.bounding("tanh", scales=1.0),
    ],
)
def test_bad_constants_are_refused(make):
    with pytest.raises(ParameterError):
        make()


@pytest.mark.parametrize("bound", BOUNDS, ids=repr)
def test_bounding_takes_what_is_not_finite_for_zero(bound):
    for bad in (float("nan"), float("inf"), -float("inf")):
        assert torch.equal(bound(torch.tensor([[0.3, bad, 0.0]])), bound(torch.tensor([[0.3, 0.0, 0.0]])))


def test_names_of_boundings():
    assert data.bounding("signed-log") == data.SignedLog()
    with pytest.raises(UnknownNameError, match="standardise"):
        data.bounding("min-max")
    with pytest.raises(UnknownNameError, match="mnist"):
        data.public_standardisation("digits")
    split = data.load("digits")
    assert data.default_bounding(split) == data.Clip(0.0, 1.0)
    table = replace(split, name="t", train_x=split.train_x.flatten(1), test_x=split.test_x.flatten(1))
    assert data.default_bounding(table) == data.SignedLog()
    assert data.default_bounding(replace(table, name="adbench/8_celeba")) == data.Rescale(0.0, 1.0)
    assert data.bound_inputs(split, data.Rescale()).test_x.min() == -1


def test_every_error_is_a_lipdp_error():
    assert issubclass(DataError, LipdpError)


# -------------------------------------------------------------------------------------------------------- real files

needs_files = pytest.mark.skipif(not SHARED.is_dir(), reason=f"no data folder at {SHARED}")


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> Path:
    """The real files in the layout users have, without CIFAR-10, whose images take long to decode."""
    sys.path.insert(0, str(SHARED))
    try:
        import prepare
    finally:
        sys.path.remove(str(SHARED))
    root = tmp_path_factory.mktemp("real")
    prepare.copy(sorted((SHARED / "mnist").iterdir()), root / "MNIST" / "raw")
    prepare.copy(sorted((SHARED / "fashion-mnist").iterdir()), root / "FashionMNIST" / "raw")
    prepare.copy(sorted((SHARED / "adbench").iterdir()), root / "adbench")
    return root


@needs_files
@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_real_images(real, name):
    split = data.load(name, data_dir=real)
    assert split.train_x.shape == (60_000, 1, 28, 28)
    assert split.test_x.shape == (10_000, 1, 28, 28)
    assert split.train_y.bincount().sum() == 60_000
    assert len(split.train_y.unique()) == 10
    pixels, constants = split.train_x, data.public_standardisation(name)
    assert pixels.mean().item() == pytest.approx(constants.mean, abs=2e-4)
    assert pixels.std().item() == pytest.approx(constants.std, abs=2e-4)


@needs_files
@pytest.mark.parametrize(
    ("name", "records", "width", "rare"),
    [
        ("1_ALOI", 49_534, 27, 1508),
        ("5_campaign", 41_188, 62, 4640),
        ("8_celeba", 202_599, 39, 4547),
        ("11_donors", 619_326, 10, 36_710),
        ("22_magic.gamma", 19_020, 10, 6688),
        ("32_shuttle", 49_097, 9, 3511),
        ("33_skin", 245_057, 3, 50_859),
        ("47_yeast", 1484, 8, 507),
    ],
)
def test_real_tables(real, name, records, width, rare):
    split = data.load(f"adbench/{name}", data_dir=real)
    assert split.input_shape == (width,)
    assert split.task == "binary"
    assert len(split.test_x) == records // 5
    assert len(split.train_x) == records - records // 5
    assert int(split.train_y.sum() + split.test_y.sum()) == rare
    bounded = data.bound_inputs(split, data.default_bounding(split))
    assert bounded.train_x.abs().max() <= 6


@pytest.mark.slow
@needs_files
def test_real_cifar(real):
    pytest.importorskip("PIL")
    import prepare

    prepare.cifar10(real / "cifar-10-batches-py")
    split = data.load("cifar10", data_dir=real)
    assert split.train_x.shape == (50_000, 3, 32, 32)
    assert split.test_x.shape == (10_000, 3, 32, 32)
    assert split.train_y.bincount().tolist() == [5000] * 10
    assert split.test_y.bincount().tolist() == [1000] * 10
    constants = data.public_standardisation("cifar10")
    assert split.train_x.mean(dim=(0, 2, 3)).tolist() == pytest.approx(constants.mean, abs=5e-3)


def test_images_of_an_npz_may_have_their_channels_last(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (6, 8, 9, 3), dtype=np.uint8)
    labels = np.arange(6) % 2
    np.savez(tmp_path / "last.npz", X=images, y=labels)
    np.savez(tmp_path / "first.npz", X=images.transpose(0, 3, 1, 2), y=labels)
    last, first = (data.load(str(tmp_path / name)) for name in ("last.npz", "first.npz"))
    assert last.input_shape == (3, 8, 9)
    assert torch.equal(last.train_x, first.train_x)


def test_a_file_of_the_user_is_not_to_be_deleted(tmp_path):
    (tmp_path / "mine.npz").write_bytes(b"PK nothing")
    with pytest.raises(DataError, match="write it again") as raised:
        data.load(str(tmp_path / "mine.npz"))
    assert "delete" not in str(raised.value)
