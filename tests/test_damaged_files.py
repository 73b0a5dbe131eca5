"""Files that were cut, flipped or padded load validly or are refused by name."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
from data_files import IMAGES, PYTHON2_BATCH, pickled
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lipdp import data
from lipdp.data.cifar import read_cifar_batch, write_cifar_batch
from lipdp.data.files import read_idx, write_idx
from lipdp.errors import DataError

RNG = np.random.default_rng(0)


pytestmark = pytest.mark.usefixtures("no_environment")


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
    return {**plain, "gz": gzip.compress(plain["idx"]), "cifar2": PYTHON2_BATCH, "cifar5": pickled(5)}


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
