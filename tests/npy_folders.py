"""Sets as folders of .npy files, and the weights of short runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from lipdp import data

RNG = np.random.default_rng(0)
SHORT = {
    "model": "mlp", "steps": 6, "batch_size": 200, "noise_multiplier": 4.0, "seed": 3, "accountant": "rdp",
    "log_every": 3,
}  # fmt: skip


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


def weights(result) -> dict[str, torch.Tensor]:
    return result.folder.load()["model"]


def equal(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
