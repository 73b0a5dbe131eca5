"""Folders of images and arrays as people have them: channels and labels are recognised, or refused in one line."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

from lipdp import data
from lipdp.cli import main
from lipdp.data.arrays import channels_last
from lipdp.errors import DataError, ParameterError
from lipdp.training import configure, train

Image = pytest.importorskip("PIL.Image")
pytestmark = pytest.mark.usefixtures("one_thread")


def put(folder, count, *, size=(6, 5), mode="RGB", ending="png"):
    """Images whose pixels are all their number."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.fromarray(np.full((*size, 3), i, np.uint8)).convert(mode).save(folder / f"{i:02d}.{ending}")


@pytest.fixture
def folder(tmp_path):
    for name in ("cat", "dog", "owl"):
        put(tmp_path / "pets" / "train" / name, 8)
        put(tmp_path / "pets" / "test" / name, 2)
    (tmp_path / "pets" / "train" / "cat" / "notes.txt").write_text("no image")
    put(tmp_path / "pets" / "train" / ".trash", 2)
    return tmp_path / "pets"


def test_a_folder_for_each_class(folder):
    split = data.open_split(str(folder))
    assert (split.records, split.input_shape, split.num_classes, split.task) == (24, (3, 6, 5), 3, "multiclass")
    whole = split.in_memory()
    assert whole.train_y.tolist() == [i // 8 for i in range(24)]
    assert torch.equal(whole.train_x[:, 0, 0, 0] * 255, torch.arange(8.0).repeat(3))
    assert whole.test_y.tolist() == [0, 0, 1, 1, 2, 2]
    copy = pickle.loads(pickle.dumps(split.training_dataset()))
    assert torch.equal(copy[11][0], whole.train_x[11])
    assert data.open_split("pets", data_dir=folder.parent).records == 24
    chosen = data.open_split(str(folder), columns=data.Columns(classes=["owl", "dog", "cat", "emu"]))
    assert (chosen.num_classes, chosen.in_memory().test_y.tolist()) == (4, [0, 0, 1, 1, 2, 2])


def test_a_folder_without_parts_is_split_by_names_so_that_one_image_more_moves_no_other(tmp_path):
    for name in ("a", "b"):
        put(tmp_path / name, 30, mode="L", ending="pgm")
    split = data.open_split(str(tmp_path))
    assert (split.input_shape, split.num_classes) == ((1, 6, 5), 2)
    whole = split.in_memory()
    assert 4 <= len(whole.test_y) <= 20  # 12 are expected
    assert (torch.cat([whole.train_y, whole.test_y]) == 1).sum() == 30
    files = set(split.train.files), set(split.test.files)
    (tmp_path / "a" / "00.pgm").rename(tmp_path / "a" / "000.pgm")
    again = data.open_split(str(tmp_path))
    assert all(
        len(set(part.files) - before) <= 1 for part, before in zip((again.train, again.test), files, strict=True)
    )


def test_a_damaged_image_stops_nothing_and_sizes_are_brought_to_one(folder):
    (folder / "train" / "dog" / "03.png").write_bytes(b"no image")
    whole = data.open_split(str(folder)).in_memory()
    assert not whole.train_x[11].any()
    assert int(whole.train_y[11]) < 0
    put(folder / "train" / "cat", 8, size=(9, 9))
    with pytest.raises(DataError, match="--image-size"):
        data.open_split(str(folder)).in_memory()
    assert data.open_split(str(folder), image_size=(4, 4)).in_memory().train_x.shape == (24, 3, 4, 4)


@pytest.mark.parametrize("first", [{"mode": "L"}, {"size": (9, 9)}], ids=["grey", "size"])
def test_the_first_image_alone_decides_nothing(folder, first):
    before = data.open_split(str(folder)).in_memory()
    put(folder / "train" / "cat", 1, **first)
    split = data.open_split(str(folder))
    assert split.input_shape == before.input_shape
    assert torch.equal(split.in_memory().train_x[1:], before.train_x[1:])


def test_a_run_on_a_folder_of_images(folder):
    config = configure(
        dataset=str(folder), model="linear", steps=2, batch_size=8, noise_multiplier=2.0, accountant="rdp", seed=0
    )
    assert train(config).steps == 2


def test_what_is_no_such_folder_is_refused(folder, tmp_path):
    put(folder / "test" / "emu", 1)
    with pytest.raises(DataError, match="'emu', which are none of the classes 'cat', 'dog', 'owl'"):
        data.open_split(str(folder))
    with pytest.raises(ParameterError, match="folders of images, which have no --owner-column"):
        data.open_split(str(folder), columns=data.Columns(owner="who"))
    put(tmp_path / "half" / "train" / "a", 3)
    with pytest.raises(DataError, match="a folder train and none of test, val"):
        data.open_split(str(tmp_path / "half"))


@pytest.mark.parametrize(
    ("shape", "last"),
    [
        ((9, 3, 8, 8), False),
        ((9, 8, 8, 3), True),
        ((9, 2, 8, 9), False),
        ((9, 32, 32, 2), True),
        ((9, 13, 64, 64), False),
        ((9, 64, 48, 13), True),
        ((9, 32, 32, 32), None),
        ((9, 3, 8, 3), None),
        ((9, 32, 8, 32), None),
    ],
)
def test_channels_are_recognised_or_refused(tmp_path, shape, last):
    x, y = np.random.default_rng(0).random(shape), np.arange(9) % 2
    np.savez(tmp_path / "x.npz", X=x, y=y, X_test=x, y_test=y)
    (tmp_path / "npy").mkdir()
    for part in ("train", "test"):
        np.save(tmp_path / "npy" / f"{part}_x.npy", x)
        np.save(tmp_path / "npy" / f"{part}_y.npy", y)
    for name in ("x.npz", "npy"):
        if last is None:
            with pytest.raises(DataError, match="the channels may be axis 1 or axis 3"):
                data.open_split(str(tmp_path / name))
        else:
            assert channels_last("x", shape) is last
            found = data.open_split(str(tmp_path / name)).input_shape
            assert found == (shape[3], *shape[1:3]) if last else shape[1:]


LABELS = {
    "from 1": (np.arange(60) % 3 + 1, [1, 2, 3], "all of the labels 1 to 3 and no 0.*--classes 1,2,3"),
    "signs": (np.arange(60) % 2 * 2 - 1, [-1, 1], "not whole numbers 0, 1, 2, .*--classes"),
    "text": (np.array(["no", "yes"])[np.arange(60) % 2], ["no", "yes"], "dtype <U3.*--classes"),
}


@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize("form", ["npz", "npz with test", "npy"])
def test_labels_are_listed_or_refused(tmp_path, kind, form):
    y, classes, says = LABELS[kind]
    x = np.random.default_rng(0).normal(size=(60, 4))
    path = tmp_path / "set.npz"
    if form == "npz":
        np.savez(path, X=x, y=y)
    elif form == "npz with test":
        np.savez(path, X=x[:50], y=y[:50], X_test=x[50:], y_test=y[50:])
    else:
        path = tmp_path / "set"
        path.mkdir()
        for name, array in {"train_x": x[:50], "train_y": y[:50], "test_x": x[50:], "test_y": y[50:]}.items():
            np.save(path / f"{name}.npy", array)
    with pytest.raises(DataError, match=says) as raised:
        data.open_split(str(path))
    assert "fetch" not in str(raised.value)
    split = data.open_split(str(path), columns=data.Columns(classes=classes)).in_memory()
    places = torch.tensor([classes.index(label) for label in y.tolist()])
    assert torch.equal(torch.cat([split.train_y, split.test_y]).sort().values, places.sort().values)
    assert split.num_classes == len(classes)
    if form != "npz":
        assert torch.equal(split.train_y, places[:50])
    with pytest.raises(DataError, match="none of the classes"):
        data.open_split(str(path), columns=data.Columns(classes=["x", "y"]))


def test_the_command_takes_a_list_of_classes(tmp_path, capsys):
    np.savez(tmp_path / "set.npz", X=np.random.default_rng(0).normal(size=(60, 4)), y=np.arange(60) % 2 * 2 - 1)
    command = ["train", "--dataset", str(tmp_path / "set.npz"), "--steps", "2", "--noise-multiplier", "2"]
    assert main([*command, "--accountant", "rdp", "--dry-run", "--classes=-1,1"]) == 0
    assert "classes = [-1, 1]" in " ".join(capsys.readouterr().out.split())
    assert main([*command, "--dry-run", "--classes=1,1"]) == 2
    assert "a list of different texts or numbers is needed" in capsys.readouterr().err
    assert main(["train", "--dataset", "digits", "--classes", "a,b"]) == 2
    assert "digits has no --classes to choose" in capsys.readouterr().err
