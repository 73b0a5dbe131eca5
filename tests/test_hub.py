"""Folders that Hugging Face's datasets wrote: what is found in them, and what is refused."""

from __future__ import annotations

import io
import pickle
import random
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from npy_folders import RNG, SHORT, digits, equal, images, weights

from lipdp import data
from lipdp.batches.records import NO_LABEL
from lipdp.cli import main
from lipdp.errors import DataError, LipdpError, ParameterError
from lipdp.training import configure, train

pytestmark = pytest.mark.usefixtures("no_environment")


hub = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")


def save(folder: Path, columns: dict, features: dict, test: int = 8) -> Path:
    """A DatasetDict whose last `test` records are for testing."""
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    whole = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    count = len(whole)
    parts = {"train": whole.select(range(count - test)), "test": whole.select(range(count - test, count))}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        datasets.DatasetDict(parts).save_to_disk(str(folder))
    return folder


def pictures(shapes, mode="RGB", kind="PNG") -> list[dict]:
    from PIL import Image

    found = []
    for height, width in shapes:
        pixels = RNG.integers(0, 256, (height, width, 3) if mode == "RGB" else (height, width), dtype=np.uint8)
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, kind)
        found.append({"bytes": stream.getvalue(), "path": None})
    return found


def image_set(folder: Path, shapes=((8, 9),) * 30, mode="RGB", **more) -> Path:
    datasets = pytest.importorskip("datasets")
    count = len(shapes)
    columns = {
        "photo": pictures(shapes, mode),
        "kind": [i % 3 for i in range(count)],
        "user": [f"user {i // 4}" for i in range(count)],
        **more,
    }
    features = {
        "photo": datasets.Image(),
        "kind": datasets.ClassLabel(names=["a", "b", "c", "d"]),
        "user": datasets.Value("string"),
        **{name: datasets.Value("int64") for name in more},
    }
    return save(folder, columns, features)


@hub
def test_a_run_from_a_datasets_folder_is_the_run_from_memory(digits_folder, tmp_path):
    datasets = pytest.importorskip("datasets")
    from PIL import Image

    arrays = digits()
    x, y = (np.concatenate([arrays[key], arrays[f"{key}_test"]]) for key in ("X", "y"))
    columns = {"image": [Image.fromarray(image[0]) for image in x], "label": y.tolist()}
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=10)}
    folder = save(tmp_path / "hf", columns, features, test=len(arrays["X_test"]))
    first = train(configure(dataset=str(digits_folder), **SHORT), out=tmp_path / "a")
    second = train(configure(dataset=str(folder), **SHORT, num_workers=1), out=tmp_path / "b")
    assert equal(weights(first), weights(second))
    assert first.metrics["test_accuracy"] == second.metrics["test_accuracy"]


@hub
def test_columns_are_found_or_chosen(tmp_path):
    folder = image_set(tmp_path / "hf", other=list(range(30)))
    split = data.open_split(str(folder), columns=data.Columns(owner="user"))
    assert (split.records, split.input_shape, split.num_classes, split.task) == (22, (3, 8, 9), 4, "multiclass")
    assert split.train_owner.tolist() == [i // 4 for i in range(22)]
    assert split.training_dataset()[4][1] == 1
    assert pickle.loads(pickle.dumps(split.training_dataset()))[4][1] == 1
    chosen = data.open_split(str(folder), columns=data.Columns(input="photo", label="other"))
    assert chosen.num_classes == 30
    assert chosen.training_dataset()[7][1] == 7
    grey = data.open_split(str(image_set(tmp_path / "grey", mode="L")))
    assert grey.input_shape == (1, 8, 9)
    assert grey.in_memory().train_x.unique().numel() > 100
    for columns, says in [
        (data.Columns(input="none"), r"no column 'none'; it has photo, kind, user"),
        (data.Columns(label="user"), r"the labels in 'user' are Value\('string'\), not whole numbers"),
        (data.Columns(owner="none"), "no column 'none'"),
        (data.Columns(input="user"), "not lists of numbers"),
    ]:
        with pytest.raises(DataError, match=says):
            data.open_split(str(folder), columns=columns)


@hub
def test_tables_in_datasets_folders(tmp_path):
    datasets = pytest.importorskip("datasets")
    x = RNG.normal(size=(30, 6)).astype(np.float32)
    columns = {"x": x.tolist(), "y": [i % 2 for i in range(30)], "person": [i % 7 for i in range(30)]}
    features = {
        "x": getattr(datasets, "List", datasets.Sequence)(datasets.Value("float32")),
        "y": datasets.Value("int8"),
        "person": datasets.Value("int64"),
    }
    folder = save(tmp_path / "hf", columns, features)
    with pytest.raises(DataError, match=r"which column is the label\? Give --label-column, one of x, y, person"):
        data.open_split(str(folder))
    split = data.open_split(str(folder), columns=data.Columns(owner="person"))
    assert (split.task, split.num_classes, split.input_shape) == ("binary", 2, (6,))
    assert torch.equal(split.in_memory().train_x, torch.from_numpy(x[:22]))
    assert split.train_owner.tolist() == [i % 7 for i in range(22)]
    columns["x"][5] = [1.0]
    ragged = save(tmp_path / "ragged", columns, features)
    kept = data.open_split(str(ragged), columns=data.Columns(owner="person")).in_memory()
    assert torch.equal(kept.train_x, torch.from_numpy(x[:22]) * (torch.arange(22) != 5)[:, None])
    assert kept.train_y.tolist() == [NO_LABEL if i == 5 else i % 2 for i in range(22)]


@hub
def test_images_of_several_sizes_need_a_public_one(tmp_path):
    folder = image_set(tmp_path / "hf", shapes=[(8 + i % 2, 9) for i in range(30)])
    with pytest.raises(DataError, match=r"different shapes \(such as \(3, [89], 9\).* --image-size"):
        data.open_split(str(folder)).in_memory()
    split = data.open_split(str(folder), image_size=(6, 6)).in_memory()
    assert split.train_x.shape == (22, 3, 6, 6)
    assert 0 <= split.train_x.min() < split.train_x.max() <= 1


@hub
@pytest.mark.parametrize("stored_as", [{"bytes": b"no image", "path": None}, {"bytes": None, "path": "/etc/passwd"}])
def test_images_that_are_none(tmp_path, stored_as):
    """A path is not followed: a data set does not say which files of this machine are read."""
    photos = pictures([(8, 9)] * 30)
    bad = io.BytesIO(stored_as["bytes"] or b"")
    for row, says in ((3, "record 3"), (0, "record 0")):
        folder = image_set(tmp_path / f"hf{row}")
        datasets = pytest.importorskip("datasets")
        photos[row] = {"bytes": bad.getvalue() or None, "path": stored_as["path"]}
        part = datasets.Dataset.from_dict(
            {"photo": photos[:22], "kind": [0] * 22, "user": ["u"] * 22},
            features=datasets.load_from_disk(str(folder / "test")).features,
        )
        _write_part(part, folder / "train")
        train = data.open_split(str(folder)).in_memory()
        assert not train.train_x[row].any(), says
        assert train.train_y.tolist() == [NO_LABEL if i == row else 0 for i in range(22)]
        assert all(train.train_x[i].any() for i in range(22) if i != row)
        photos = pictures([(8, 9)] * 30)


def _write_part(part, folder: Path) -> None:
    """As `save_to_disk`, which would look for the file that a path names."""
    import pyarrow as pa

    (shard,) = folder.glob("*.arrow")
    with pa.OSFile(str(shard), "wb") as sink, pa.ipc.new_stream(sink, part.data.schema) as stream:
        stream.write_table(part.data.table)


@hub
def test_datasets_folders_that_are_not_whole(tmp_path, capsys):
    folder = image_set(tmp_path / "hf")
    (shard,) = (folder / "train").glob("*.arrow")
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError):
        data.open_split(str(folder)).in_memory()
    shard.unlink()
    with pytest.raises(DataError, match="train is not whole"):
        data.open_split(str(folder))
    (folder / "train" / "state.json").unlink()
    with pytest.raises(DataError, match=r"lacks the split train \(it holds test\)"):
        data.open_split(str(folder))
    assert main(["train", "--dataset", str(folder), "--out", str(tmp_path / "run")]) == 2
    assert "Traceback" not in capsys.readouterr().err


@hub
@pytest.mark.parametrize("kind", ["npy", "arrow"])
def test_damaged_files_are_read_or_refused(tmp_path, kind):
    """Cut, or with other bytes in places; Arrow follows offsets wherever they point unless they are checked."""
    folder = image_set(tmp_path) if kind == "arrow" else images(tmp_path)
    files = sorted(folder.rglob(f"*.{kind}"))
    draw = random.Random(0)
    refused = 0
    for _ in range(50):
        file = draw.choice(files)
        content = file.read_bytes()
        damaged = bytearray(content[: draw.randrange(len(content))] if draw.random() < 0.2 else content)
        for _ in range(draw.choice((1, 3, 20)) if damaged else 0):
            damaged[draw.randrange(min(len(damaged), 3000) if draw.random() < 0.7 else len(damaged))] = draw.randrange(
                256
            )
        file.write_bytes(damaged)
        try:
            split = data.open_split(str(folder)).in_memory()
        except LipdpError:
            refused += 1
        else:
            assert split.train_x.isfinite().all()
        file.write_bytes(content)
    assert 5 < refused <= 50
    assert data.open_split(str(folder)).in_memory().num_classes in (3, 4)


@hub
def test_offsets_that_make_no_sense_are_not_followed(tmp_path):
    """Arrow would follow them to any address; here, four bytes into the next record and back."""
    pa = pytest.importorskip("pyarrow")
    folder = image_set(tmp_path)
    photos = [photo["bytes"] for photo in pictures([(8, 9)] * 22)]
    for damaged in (False, True):
        ends = np.cumsum([0, *map(len, photos)]).astype(np.int32)
        if damaged:
            ends[5] = ends[6] + 4
        buffers = [None, pa.py_buffer(ends.tobytes()), pa.py_buffer(b"".join(photos))]
        content = pa.Array.from_buffers(pa.binary(), 22, buffers)
        photo = pa.StructArray.from_arrays([content, pa.nulls(22, pa.string())], ["bytes", "path"])
        table = pa.table({"photo": photo, "kind": pa.array([i % 3 for i in range(22)]), "user": ["u"] * 22})
        (shard,) = (folder / "train").glob("*.arrow")
        with pa.OSFile(str(shard), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table)
        if damaged:
            with pytest.raises(DataError, match=r"cannot be read \(ArrowInvalid"):
                data.open_split(str(folder))
        else:
            assert data.open_split(str(folder)).in_memory().records == 22


def test_without_datasets_the_reason_is_named(tmp_path, monkeypatch):
    folder = image_set(tmp_path / "hf")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ParameterError, match=r'pip install "lipdp\[hf\]"'):
        data.open_split(str(folder))
