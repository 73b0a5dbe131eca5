"""Sets that stay on disk give the run that the same set in memory gives, and are refused where they are not whole."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import pickle
import random
import signal
import subprocess
import sys
import time
import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kit import FALSE_ALARM, Raises
from scipy import stats
from torch.utils.data import TensorDataset

from lipdp import data
from lipdp.batches.loader import BatchLoader
from lipdp.batches.records import NO_LABEL
from lipdp.batches.samplers import PoissonSampler
from lipdp.cli import main
from lipdp.data import npy, stored
from lipdp.data.augment import AUGMENTS, Augmented, Crop, Flip, augment
from lipdp.data.files import read_npz
from lipdp.data.scaling import BOUNDINGS
from lipdp.data.split import resize
from lipdp.errors import DataError, LipdpError, NonFiniteError, ParameterError, UnknownNameError
from lipdp.training import Interrupted, Trainer, configure, train

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("LIPDP_DATA", raising=False)
    monkeypatch.setenv("LIPDP_CACHE", str(tmp_path / "cache"))


def write(folder: Path, **arrays) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    return folder


def images(folder: Path, shape=(30, 3, 8, 8), **others) -> Path:
    """A folder of 30 images for training and 8 for testing, in 3 classes."""
    x = RNG.integers(0, 256, (shape[0] + 8, *shape[1:]), dtype=np.uint8)
    y = np.arange(len(x)) % 3
    parts = {"train_x": x[:-8], "train_y": y[:-8], "test_x": x[-8:], "test_y": y[-8:]}
    return write(folder, **{**parts, **others})


def digits() -> dict[str, np.ndarray]:
    split = data.load("digits")
    x, test_x = ((part * 16 * 15).round().to(torch.uint8).numpy() for part in (split.train_x, split.test_x))
    return {"X": x, "y": split.train_y.numpy(), "X_test": test_x, "y_test": split.test_y.numpy()}


@pytest.fixture(scope="module")
def digits_folder(tmp_path_factory):
    arrays = digits()
    names = {"X": "train_x", "y": "train_y", "X_test": "test_x", "y_test": "test_y"}
    folder = tmp_path_factory.mktemp("digits")
    np.savez(folder / "digits.npz", **arrays)
    return write(folder, **{names[key]: array for key, array in arrays.items()})


SHORT = {"model": "mlp", "steps": 6, "batch_size": 200, "noise_multiplier": 4.0, "seed": 3, "accountant": "rdp"}


def weights(result) -> dict[str, torch.Tensor]:
    return result.folder.load()["model"]


def equal(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---------------------------------------------------------------------------------------------------------- npy folders


def test_a_run_from_disk_is_the_run_from_memory(digits_folder, tmp_path):
    """The same bits after every step, with and without workers."""
    options = {**SHORT, "model": "cnn", "model_options": {"width": 8}}
    runs = [
        train(configure(dataset=str(dataset), **options, **more), out=tmp_path / str(i))
        for i, (dataset, more) in enumerate(
            [(digits_folder / "digits.npz", {}), (digits_folder, {}), (digits_folder, {"num_workers": 2})]
        )
    ]
    first, *others = map(weights, runs)
    assert all(equal(first, other) for other in others)
    assert len({run.metrics["test_accuracy"] for run in runs}) == 1
    assert len({run.epsilon for run in runs}) == 1
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize(
    ("shape", "found"),
    [
        ((30, 5), (5,)),
        ((30, 8, 9), (1, 8, 9)),
        ((30, 3, 8, 9), (3, 8, 9)),
        ((30, 8, 9, 3), (3, 8, 9)),
        ((30, 2, 8, 9), (2, 8, 9)),
    ],
)
@pytest.mark.parametrize("kind", ["u1", "<f4", ">f8", "f2"])
def test_shapes_and_dtypes(tmp_path, shape, found, kind):
    dtype, table = np.dtype(kind), len(shape) == 2
    x = RNG.integers(0, 256, (38, *shape[1:])) if kind == "u1" else RNG.random((38, *shape[1:]))
    x = x.astype(dtype)
    folder = images(tmp_path, train_x=x[:30], test_x=x[30:])
    split = data.open_split(str(folder))
    assert (split.input_shape, split.records, split.num_classes, split.task) == (found, 30, 3, "multiclass")
    wanted = x.astype(np.float32) / np.float32(1 if table or kind != "u1" else 255)
    wanted = np.moveaxis(wanted, -1, 1) if shape[-1] == 3 and not table else wanted
    whole = split.in_memory()
    assert torch.equal(whole.train_x, torch.from_numpy(wanted[:30].reshape(30, *found).copy()))
    assert torch.equal(whole.test_x, torch.from_numpy(wanted[30:].reshape(8, *found).copy()))
    assert whole.train_y.tolist() == [i % 3 for i in range(30)]
    assert whole.train_x.dtype == torch.float32
    picked, labels = split.training_dataset().read_batch([7, 2, 29])
    assert torch.equal(picked, whole.train_x[[7, 2, 29]])
    assert torch.equal(labels, whole.train_y[[7, 2, 29]])
    x0, y0 = split.training_dataset()[4]
    assert torch.equal(x0, whole.train_x[4])
    assert (y0.shape, int(y0)) == ((), 1)
    assert data.load(str(folder)).train_x.shape == (30, *found)


def test_inputs_beyond_any_memory_are_trained_on(tmp_path):
    """150 GB of inputs, sparse on disk; whoever reads or converts them whole fails."""
    records, shape = 1_000_000, (3, 224, 224)
    images(tmp_path, shape=(8, *shape), train_y=np.arange(records, dtype=np.uint16) % 5)
    with (tmp_path / "train_x.npy").open("wb") as stream:
        header = {"descr": "|u1", "fortran_order": False, "shape": (records, *shape)}
        np.lib.format.write_array_header_1_0(stream, header)
        stream.truncate(stream.tell() + records * 3 * 224 * 224)
    tracemalloc.start()
    options = {**SHORT, "model": "linear", "steps": 2, "batch_size": 16, "image_size": (32, 32)}
    result = train(configure(dataset=str(tmp_path), **options, check_every=0))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert result.steps == 2
    assert peak < 100e6
    with pytest.raises(DataError, match=r"takes 560\.8 GiB of memory"):
        data.load(str(tmp_path))
    assert train(configure(dataset=str(tmp_path), **{**options, "steps": 1}, check_every=0, num_workers=1)).steps == 1


def test_records_go_to_other_processes_as_paths(tmp_path):
    dataset = data.open_split(str(images(tmp_path))).training_dataset()
    before = dataset.read_batch([3])
    sent = pickle.dumps(dataset)
    assert len(sent) < 2000
    assert torch.equal(pickle.loads(sent).read_batch([3])[0], before[0])


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"train_x": RNG.random((30, 5)).astype(complex)}, "train_x.npy has dtype complex128"),
        ({"train_x": np.zeros((30, 3, 8, 8), np.int64)}, r"has dtype int64; write bytes \(uint8\)"),
        ({"train_x": np.zeros(30)}, r"train_x.npy has shape \(30,\); give a table"),
        ({"train_x": np.zeros((0, 3, 8, 8), np.uint8), "train_y": np.zeros(0, int)}, "has shape"),
        ({"train_x": np.zeros((30, 3, 9, 8), np.uint8)}, r"inputs of shape \(3, 9, 8\) but test_x \(3, 8, 8\)"),
        (
            {"train_x": np.zeros((30, 3, 8, 4), np.uint8), "test_x": np.zeros((8, 3, 8, 4), np.uint8)},
            "axis 1 or axis 3",
        ),
        ({"train_x": np.full((30, 3, 8, 8), 2.0)}, r"the images leave \[0, 1\]"),
        ({"train_y": np.zeros(29, int)}, r"train_y.npy holds labels of shape \(29,\).* for 30 records"),
        ({"train_y": np.arange(30) - 2}, "not whole numbers"),
        ({"test_y": np.arange(8) - 1}, "not whole numbers"),
        ({"train_y": np.arange(30) + 0.5}, "not whole numbers"),
        ({"test_y": np.full(8, 70_000)}, "not whole numbers"),
        ({"train_y": np.array(["a"] * 30)}, "dtype <U1"),
        ({"train_y": np.array([None] * 30)}, "train_y.npy cannot be read"),
    ],
)
def test_bad_folders_are_named(tmp_path, arrays, says):
    with pytest.raises(DataError, match=says):
        data.open_split(str(images(tmp_path, **arrays)))


def test_missing_and_damaged_files(tmp_path, capsys):
    folder = images(tmp_path / "set")
    content = (folder / "train_x.npy").read_bytes()
    for damaged in (content[:-1], content[:50], b"", b"no array"):
        (folder / "train_x.npy").write_bytes(damaged)
        with pytest.raises(DataError, match=r"train_x\.npy cannot be read"):
            data.open_split(str(folder))
    with (folder / "train_x.npy").open("wb") as stream:
        np.savez(stream, train_x=np.zeros(3))
    with pytest.raises(DataError, match="an archive of arrays"):
        data.open_split(str(folder))
    (folder / "test_y.npy").unlink()
    with pytest.raises(DataError, match=r"lacks test_y\.npy"):
        data.open_split(str(folder))
    with pytest.raises(DataError, match=r"no data set: give a folder with train_x\.npy"):
        data.open_split(str(tmp_path))
    with pytest.raises(UnknownNameError, match="DIR"):
        data.open_split("nowhere")
    for arguments in (["--dataset", str(tmp_path)], ["--dataset", str(tmp_path / "none")], ["--dataset", str(folder)]):
        assert main(["train", *arguments, "--out", str(tmp_path / "run")]) == 2
        assert "Traceback" not in capsys.readouterr().err


def test_a_folder_is_found_in_the_data_folder(tmp_path):
    images(tmp_path / "pictures")
    assert data.open_split("pictures", data_dir=tmp_path).records == 30


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_record_that_is_not_finite_stops_nothing(tmp_path, workers):
    x = np.zeros((200, 5))
    x[150:] = np.inf
    write(tmp_path / "set", train_x=x, train_y=np.arange(200) % 3, test_x=x[150:159], test_y=np.arange(9) % 3)
    options = ["--batch-size", "200", "--steps", "2", "--noise-multiplier", "3", "--num-workers", workers]
    assert main(["train", "--dataset", str(tmp_path / "set"), *options, "--out", str(tmp_path / "run")]) == 0
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 2
    assert 0 <= last["test_accuracy"] <= 1


# ------------------------------------------------------------------------------------- what a split answers, everywhere


@pytest.mark.parametrize("dataset", ["memory", "disk"])
def test_both_kinds_of_split_answer_alike(tmp_path, dataset):
    folder = images(tmp_path, train_owner=np.arange(30) // 3)
    split: data.DataSplit = npy.open_npy(folder, owner="owner")
    if dataset == "memory":
        split = split.in_memory()
    assert (split.records, split.input_shape, split.num_classes, split.note) == (30, (3, 8, 8), 3, "")
    assert split.train_owner.tolist() == [i // 3 for i in range(30)]
    bounded = split.bounded(data.Rescale(0.0, 0.5)).resized((4, 6))
    assert bounded.input_shape == (3, 4, 6)
    x, y = bounded.test_part()
    assert (x.shape, y.shape) == ((8, 3, 4, 6), (8,))
    assert -1 <= x.min() < x.max() <= 1
    batches = list(bounded.test_batches(3, num_workers=2))
    assert [len(part) for part, _ in batches] == [3, 3, 2]
    assert torch.equal(torch.cat([part for part, _ in batches]), x)
    record, label = bounded.training_dataset("cpu")[29]
    assert record.shape == (3, 4, 6)
    assert int(label) == 2
    assert len(bounded.training_dataset()) == 30
    assert isinstance(split.in_memory(), data.Split)
    assert split.in_memory().train_owner is not None
    with pytest.raises(ParameterError, match=r"image_size=\(4, 4\) is for images"):
        data.open_split(str(images(tmp_path / "table", shape=(30, 7))), image_size=(4, 4))


@pytest.mark.parametrize("name", sorted(BOUNDINGS))
@given(seed=st.integers(0, 10**6))
@settings(max_examples=15, deadline=None)
def test_every_bounding_treats_each_record_by_itself(name, seed):
    """A batch of one gives what the record gives among others: otherwise the map would mix records."""
    x = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(seed)) * 10
    bound = data.bounding(name)
    whole = bound(x)
    assert all(torch.equal(bound(x[i : i + 1])[0], whole[i]) for i in range(5))


@given(seed=st.integers(0, 10**6), height=st.integers(1, 20), width=st.integers(1, 20))
@settings(max_examples=25, deadline=None)
def test_resizing_treats_each_record_by_itself_and_keeps_the_range(seed, height, width):
    x = torch.rand(4, 2, 9, 7, generator=torch.Generator().manual_seed(seed))
    small = resize(x, (height, width))
    assert small.shape == (4, 2, height, width)
    assert -1e-6 <= small.min() <= small.max() <= 1 + 1e-6
    assert all(torch.allclose(resize(x[i : i + 1], (height, width))[0], small[i], atol=1e-6) for i in range(4))
    assert torch.allclose(resize(torch.ones(1, 1, 9, 7), (height, width)), torch.ones(()))


def test_certify_and_report_take_a_run_from_disk(digits_folder, tmp_path, capsys, monkeypatch):
    run = str(tmp_path / "run")
    train(configure(dataset=str(digits_folder), **SHORT, image_size=(6, 6)), out=run)
    assert main(["certify", run, "--samples", "20"]) == 0
    pytest.importorskip("jinja2")
    assert main(["report", run]) == 0
    capsys.readouterr()
    monkeypatch.setattr(stored, "IN_MEMORY", 1000)
    assert main(["certify", run]) == 2
    error = capsys.readouterr().err
    assert "the test part takes" in error
    assert "Traceback" not in error
    options = ["--dataset", str(digits_folder), "--features", "dct", "--out", str(tmp_path / "other")]
    assert main(["train", *options]) == 2
    assert "without --features reads batch by batch" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------- Hugging Face folders


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


# ------------------------------------------------------------------------------------------------------------- owners


def test_owners_of_npy_and_npz(tmp_path):
    names = np.array([f"user {i // 5}" for i in range(30)])
    folder = images(tmp_path, train_owner=names, train_clinic=np.arange(30) % 4 + 100)
    assert npy.open_npy(folder, owner="owner").train_owner.tolist() == [i // 5 for i in range(30)]
    clinics = data.open_split(str(folder), columns=data.Columns(owner="clinic")).train_owner
    assert (clinics.tolist(), clinics.dtype) == ([i % 4 for i in range(30)], torch.int64)
    assert data.open_split(str(folder)).train_owner is None
    arrays = {"X": RNG.random((30, 4)), "y": np.arange(30) % 2, "who": names}
    np.savez(tmp_path / "own.npz", **arrays, X_test=arrays["X"][:5], y_test=arrays["y"][:5])
    np.savez(tmp_path / "one.npz", **arrays)
    whole = data.open_split(str(tmp_path / "own.npz"), columns=data.Columns(owner="who"))
    assert whole.train_owner.tolist() == [i // 5 for i in range(30)]
    part = data.open_split(str(tmp_path / "one.npz"), columns=data.Columns(owner="who"))
    rows = [int((np.float32(arrays["X"]) == x.numpy()).all(1).argmax()) for x in part.train_x]
    assert part.train_owner.tolist() == [row // 5 for row in rows]
    held = data.split_validation(part, fraction=0.25)
    assert len(held.train_owner) == held.records < part.records
    assert read_npz(tmp_path / "own.npz", ["X"])["X"].shape == (30, 4)


@pytest.mark.parametrize("owners", [np.zeros(29, int), np.zeros((30, 2), int), np.zeros(30), np.array([None] * 30)])
def test_bad_owners_are_named(tmp_path, owners):
    np.save(images(tmp_path) / "train_owner.npy", owners)
    with pytest.raises(DataError, match="train_owner"):
        npy.open_npy(tmp_path, owner="owner")
    with pytest.raises(DataError, match=r"train_nobody\.npy does not exist"):
        npy.open_npy(tmp_path, owner="nobody")
    with pytest.raises(ParameterError, match="digits has no --owner-column to choose"):
        data.open_split("digits", columns=data.Columns(owner="owner"))
    with pytest.raises(ParameterError, match=r"\.npy files, which have no --label-column to choose"):
        data.open_split(str(tmp_path), columns=data.Columns(label="y"))


# --------------------------------------------------------------------------------------------------------- augmentation


@pytest.mark.parametrize("name", sorted(AUGMENTS))
@given(seed=st.integers(0, 10**6), height=st.integers(1, 9), width=st.integers(1, 9))
@settings(max_examples=30, deadline=None)
def test_views_are_never_longer_and_hold_no_other_record(name, seed, height, width):
    """The norm bound, entry by entry: a view holds pixels of its own image, each as often as there, and zeros."""
    x = torch.randn(4, 2, height, width, generator=torch.Generator().manual_seed(seed)).double()
    x += torch.arange(4)[:, None, None, None] * 100  # records are told apart by their values
    torch.manual_seed(seed)
    views = augment(name)(x)
    assert views.shape == x.shape
    for view, image in zip(views, x, strict=True):
        kept = view[view != 0].tolist()
        assert sorted(kept) == sorted(set(kept) & set(image.flatten().tolist()))
        assert view.norm() <= image.norm() * (1 + 1e-12)


@pytest.mark.statistical
def test_views_have_their_law():
    torch.manual_seed(0)
    x = torch.arange(1.0, 10.0).reshape(1, 1, 3, 3).expand(20_000, 1, 3, 3)
    mirrored = (Flip()(x)[:, 0, 0, 0] == 3).double()
    assert abs(mirrored.mean() - 0.5) < stats.norm.isf(FALSE_ALARM / 2) * 0.5 / 20_000**0.5
    crops = Crop(2)(x).flatten(1)
    kinds, counts = crops.unique(dim=0, return_counts=True)
    assert len(kinds) == 25
    assert stats.chisquare(counts.numpy()).pvalue > FALSE_ALARM
    assert (crops == x.flatten(1)).all(1).any()


def test_views_of_one_record_are_drawn_apart():
    x = torch.rand(50, 3, 8, 8)
    torch.manual_seed(0)
    views, labels = Augmented(TensorDataset(x, torch.arange(50)), augment("crop-flip"), multiplicity=5).read_batch(
        [7, 3]
    )
    assert (views.shape, labels.tolist()) == ((2, 5, 3, 8, 8), [7, 3])
    assert len(views.flatten(0, 1).flatten(1).unique(dim=0)) == 10
    values = set(x[7].flatten().tolist()) | {0.0}
    assert set(views[0].flatten().tolist()) <= values
    one, label = Augmented(TensorDataset(x, torch.arange(50)), augment("flip"))[7]
    assert (one.shape, int(label)) == ((3, 8, 8), 7)


def test_bad_augmentations():
    images_ = TensorDataset(torch.rand(5, 3, 8, 8), torch.arange(5))
    with pytest.raises(UnknownNameError, match="crop-flip"):
        augment("mixup")
    with pytest.raises(ParameterError, match="multiplicity=0"):
        Augmented(images_, Flip(), multiplicity=0)
    with pytest.raises(ParameterError, match="augmentation is for images"):
        Augmented(TensorDataset(torch.rand(5, 3), torch.arange(5)), Flip())
    with pytest.raises(ParameterError, match="padding=0"):
        Crop(0)
    for given_, says in [
        ({"augment_multiplicity": 4}, "but no augment"),
        ({"augment": "flip", "augment_multiplicity": 0}, "augment_multiplicity=0"),
        ({"augment": "flip", "features": "dct"}, "augment and features"),
        ({"num_workers": -1}, "num_workers=-1"),
        ({"pin_memory": 1}, "pin_memory=1"),
        ({"image_size": (8,)}, r"image_size=\(8,\)"),
        ({"image_size": 8}, "image_size=8"),
        ({"owner_column": 3}, "owner_column=3"),
    ]:
        with pytest.raises(ParameterError, match=says):
            configure(**given_)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_no_batch(tmp_path, workers):
    split = data.open_split(str(images(tmp_path))).bounded(data.Rescale(0.0, 1.0))
    dataset = Augmented(split.training_dataset(), augment("crop-flip"), multiplicity=2)

    def batches(count):
        sampler = PoissonSampler(30, sampling_rate=0.2, steps=12, seed=0)
        return list(BatchLoader(dataset, sampler, num_workers=count, pin_memory=True))

    for (x, y), (other_x, other_y) in zip(batches(0), batches(workers), strict=True):
        assert torch.equal(x, other_x)
        assert torch.equal(y, other_y)
        assert x.shape == (len(y), 2, 3, 8, 8)


def test_an_augmented_run_resumes_bit_identical_with_other_workers(digits_folder, tmp_path):
    settings_ = {**SHORT, "dataset": str(digits_folder), "augment": "crop-flip"}
    whole = train(configure(**settings_), out=tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(configure(**settings_, num_workers=2), out=tmp_path / "cut", monitor=Raises(3, signal.SIGINT))
    assert multiprocessing.active_children() == []
    rest = Trainer.resume(tmp_path / "cut", num_workers=1, pin_memory=True).run()
    assert equal(weights(whole), weights(rest))
    plain = train(configure(**{**settings_, "augment": None}), out=tmp_path / "plain")
    assert not equal(weights(whole), weights(plain))
    assert plain.epsilon == whole.epsilon  # augmentation does not touch the account
    memory = train(configure(**{**settings_, "dataset": str(digits_folder / "digits.npz")}), out=tmp_path / "memory")
    assert equal(weights(whole), weights(memory))


def test_several_views_of_a_record_cost_no_more_privacy(tmp_path):
    """K = 3: the same ε, Δ and noise as K = 1, in a run of its own that resumes with the same bits."""
    settings_ = {**SHORT, "steps": 4, "batch_size": 100, "augment": "crop-flip"}
    one = train(configure(**settings_), out=tmp_path / "one")
    many = train(configure(**settings_, augment_multiplicity=3), out=tmp_path / "many")
    assert many.epsilon == one.epsilon
    alone, helped = (Trainer(configure(**settings_, augment_multiplicity=views)).engine for views in (1, 3))
    assert alone.plan == helped.plan
    assert alone.sensitivity().total == helped.sensitivity().total
    with pytest.raises(Interrupted):
        train(configure(**settings_, augment_multiplicity=3), out=tmp_path / "cut", monitor=Raises(2, signal.SIGINT))
    rest = Trainer.resume(tmp_path / "cut", num_workers=1).run()
    assert equal(weights(rest), weights(many))
    assert not equal(weights(one), weights(many))
    assert rest.metrics["train_loss_not_private"] == many.metrics["train_loss_not_private"]


# ---------------------------------------------------------------------------------------------------- batches of owners


def owned(folder: Path, records=900, owners=60, names=None) -> Path:
    """Digits of which every owner has another number."""
    split = data.load("digits")
    owner = np.sort(RNG.integers(0, owners, records))
    owner[:owners] = np.arange(owners)
    x, test_x = split.train_x[:records].numpy(), split.test_x.numpy()
    arrays = {
        "train_x": x,
        "train_y": split.train_y[:records].numpy(),
        "test_x": test_x,
        "test_y": split.test_y.numpy(),
    }
    return write(folder, **arrays, train_user=owner if names is None else np.array([f"{names} {i}" for i in owner]))


def test_a_run_over_owners_is_accounted_by_owners(tmp_path, capsys):
    folder = owned(tmp_path / "set", names="user")
    options = {**SHORT, "dataset": str(folder), "owner_column": "user", "batch_size": 20}
    run = train(configure(**options, augment="flip"), out=tmp_path / "run")
    told = json.loads((tmp_path / "run" / "privacy.json").read_text())
    assert (told["dataset_size"], told["sampling_rate"], told["unit"]) == (60, 20 / 60, "owner")
    assert told["protects"].startswith("each of the 60 owners")
    assert 0 < run.metrics["train_loss_not_private"] < 5
    trainer = Trainer(configure(**options, augment="flip", num_workers=1))
    assert trainer.total_steps == 6
    assert equal(trainer.run() and trainer.model.state_dict(), weights(run))
    with pytest.raises(LipdpError, match="batch_size=100, but there are 60"):
        Trainer(configure(**{**options, "batch_size": 100}))
    pytest.importorskip("jinja2")
    assert main(["report", str(tmp_path / "run")]) == 0
    page = (tmp_path / "run" / "report.html").read_text()
    assert "60 owners of training records" in page
    assert "the worst owner and the best attack" in page
    assert "{unit}" not in page
    assert main(["certify", str(tmp_path / "run"), "--samples", "9"]) == 0
    capsys.readouterr()


def test_the_command_takes_an_owner_column(tmp_path, capsys):
    folder = owned(tmp_path / "set")
    options = ["--model", "linear", "--steps", "2", "--batch-size", "20", "--epsilon", "3", "--owner-column", "user"]
    assert main(["train", "--dataset", str(folder), *options, "--out", str(tmp_path / "run")]) == 0
    assert "each of 60 owners (add or remove one owner)" in " ".join(capsys.readouterr().out.split())
    assert json.loads((tmp_path / "run" / "privacy.json").read_text())["sampling_rate"] == 20 / 60
    assert main(["train", "--resume", str(tmp_path / "run"), "--owner-column", "other"]) == 2
    assert main(["train", "--dataset", "digits", "--owner-column", "user", "--out", str(tmp_path / "no")]) == 2
    assert "Traceback" not in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------- the command


def test_the_command_takes_the_options(digits_folder, tmp_path):
    options = [
        "--model", "mlp", "--steps", "3", "--batch-size", "100", "--noise-multiplier", "4", "--accountant", "rdp",
    ]  # fmt: skip
    options += ["--image-size", "6", "7", "--augment", "flip", "--num-workers", "1", "--pin-memory"]
    assert main(["train", "--dataset", str(digits_folder), *options, "--out", str(tmp_path / "run")]) == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["image_size"], config["augment"], config["num_workers"]) == ([6, 7], "flip", 1)
    assert config["pin_memory"] is True


@pytest.mark.slow
@pytest.mark.parametrize("end", ["interrupt of all", "terminate all", "kill a worker"])
def test_signals_to_a_run_with_workers(digits_folder, tmp_path, end):
    """Ctrl-C reaches the workers too: the run saves, ends with 130 and takes them along, also without one of them."""
    out = tmp_path / "run"
    command = [sys.executable, "-m", "lipdp", "train", "--dataset", str(digits_folder), "--num-workers", "2"]
    options = ["--model", "mlp", "--steps", "100000", "--checkpoint-every", "5", "--batch-size", "100"]
    process = subprocess.Popen(
        [*command, *options, "--noise-multiplier", "20", "--accountant", "rdp", "--out", str(out)],
        start_new_session=True,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    limit = time.monotonic() + 120
    while not (out / "checkpoint.previous.pt").exists() and time.monotonic() < limit and process.poll() is None:
        time.sleep(0.2)
    if end == "kill a worker":
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        if not children.exists():
            pytest.skip("the system does not list the children of a process")
        os.kill(int(children.read_text().split()[-1]), signal.SIGKILL)
    else:
        os.killpg(process.pid, signal.SIGINT if end == "interrupt of all" else signal.SIGTERM)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == (2 if end == "kill a worker" else 130), error
    assert ("a process that reads records ended" if end == "kill a worker" else "interrupted after step") in error
    assert "Traceback" not in error
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


def test_errors_are_those_of_the_library():
    assert issubclass(DataError, LipdpError)
    assert issubclass(NonFiniteError, LipdpError)
