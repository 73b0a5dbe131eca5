"""Names, folders and splits: what is found where, and what is refused by name."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from data_files import save

from lipdp import data
from lipdp.errors import DataError, LipdpError, ParameterError, UnknownNameError
from lipdp.files import written_whole

pytestmark = pytest.mark.usefixtures("no_environment")


SHARED = Path(__file__).parents[2] / "shared" / "data"


# --- digits -----------------------------------------------------------------------------------------------------------


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


# --- ADBench ----------------------------------------------------------------------------------------------------------


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


# --- data folder ------------------------------------------------------------------------------------------------------


def test_unknown_names_list_the_known():
    with pytest.raises(UnknownNameError, match=r"did you mean 'mnist'.*cifar10.*digits.*fashion-mnist"):
        data.load("mnits")


# --- fuzz -------------------------------------------------------------------------------------------------------------


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


# --- validation, bounding ---------------------------------------------------------------------------------------------


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
        with pytest.raises(ParameterError, match=f"a validation part of {fraction} of"):
            data.split_validation(split, fraction=fraction)


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


# --- real files -------------------------------------------------------------------------------------------------------


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
    assert abs(len(split.test_x) - records / 5) < 6 * (0.16 * records) ** 0.5  # by a hash: of a binomial law
    assert len(split.train_x) == records - len(split.test_x)
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


def test_a_file_of_the_user_is_not_to_be_deleted(tmp_path):
    (tmp_path / "mine.npz").write_bytes(b"PK nothing")
    with pytest.raises(DataError, match="write it again") as raised:
        data.load(str(tmp_path / "mine.npz"))
    assert "delete" not in str(raised.value)
