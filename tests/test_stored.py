"""Sets that stay on disk give the run that the same set in memory gives, and are refused where they are not whole."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from npy_folders import RNG, SHORT, equal, images, weights, write

from lipdp import data
from lipdp.cli import main
from lipdp.data import npy, stored
from lipdp.data.scaling import BOUNDINGS
from lipdp.data.split import resize
from lipdp.errors import DataError, ParameterError, UnknownNameError
from lipdp.training import configure, train

pytestmark = pytest.mark.usefixtures("no_environment")


# --- npy folders ------------------------------------------------------------------------------------------------------


def test_a_run_from_disk_is_the_run_from_memory(digits_folder, tmp_path):
    """The same bits after every step, with and without workers."""
    already = set(multiprocessing.active_children())  # of other tests
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
    assert set(multiprocessing.active_children()) <= already


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


# --- what a split answers, everywhere ---------------------------------------------------------------------------------


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


# --- the command ------------------------------------------------------------------------------------------------------


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
