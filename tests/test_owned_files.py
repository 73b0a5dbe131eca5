"""Owners in files: read, refused by name, and accounted as owners."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from npy_folders import RNG, SHORT, equal, images, weights, write

from lipdp import data
from lipdp.cli import main
from lipdp.data import npy
from lipdp.data.files import read_npz
from lipdp.errors import DataError, LipdpError, ParameterError
from lipdp.training import Trainer, configure, train

pytestmark = pytest.mark.usefixtures("no_environment")


# --- owners -----------------------------------------------------------------------------------------------------------


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


# --- batches of owners ------------------------------------------------------------------------------------------------


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
