"""CIFAR's pickles of every age, and hostile ones."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from data_files import IMAGES, PYTHON2_BATCH, pickled

from lipdp import data
from lipdp.data.cifar import read_cifar_batch, write_cifar_batch
from lipdp.errors import DataError

RNG = np.random.default_rng(0)


pytestmark = pytest.mark.usefixtures("no_environment")


def small_cifar(folder: Path, count=3) -> Path:
    for file in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        write_cifar_batch(folder / file, RNG.integers(0, 256, (count, 3, 32, 32), dtype=np.uint8), np.arange(count))
    return folder


@pytest.mark.parametrize("layout", ["cifar-10-batches-py", "."])
def test_cifar_layouts(tmp_path, layout):
    small_cifar(tmp_path / layout)
    split = data.load("cifar10", data_dir=tmp_path)
    assert split.train_x.shape == (15, 3, 32, 32)
    assert split.test_x.shape == (3, 3, 32, 32)
    assert split.train_y.tolist() == [0, 1, 2] * 5
    assert split.note == ""


@pytest.mark.parametrize("content", [PYTHON2_BATCH, *(pickled(p) for p in range(6)), pickled(2, "numpy.core")])
def test_cifar_pickles_of_every_age(tmp_path, content):
    path = tmp_path / "data_batch_1"
    path.write_bytes(content)
    images, labels = read_cifar_batch(path)
    assert np.array_equal(images.reshape(4, 3072), IMAGES)
    assert labels.tolist() == [3, 1, 4, 9]


def test_cifar_fortran_order(tmp_path):
    path = tmp_path / "data_batch_1"
    for protocol in range(6):
        path.write_bytes(pickled(protocol, data=np.asfortranarray(IMAGES)))
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
        (pickled(4, data=IMAGES.tolist()), "lacks"),
        (pickled(4, data=IMAGES.astype(np.float32)), "unsigned bytes"),
        (pickled(4, data=IMAGES[:, :3000]), r"\(4, 3000\), not \(n, 3072\)"),
        (pickled(4, data=IMAGES[:0]), "shape"),
        (pickled(4, data=IMAGES.reshape(4, 3, 32, 32)), "shape"),
        (pickled(4, labels=[0, 1, 2]), "4 images but 3 labels"),
        (pickled(4, labels=[0, 1, 2, 10]), r"0\.\.9"),
        (pickled(4, labels=[0, 1, 2, -1]), r"0\.\.9"),
        (pickled(4, labels=[0, 1, 2, 3.0]), r"0\.\.9"),
        (pickled(4, labels=[0, 1, 2, None]), r"0\.\.9"),
        (pickled(4)[:-100], "cannot be read"),
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
