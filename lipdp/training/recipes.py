"""What `lipdp train` does where it was not told: a declared table of settings by data set and model, or by features.

The settings were chosen on public benchmarks. Choosing them by looking at private data is not covered by ε.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from lipdp.data import is_table

EPSILON = 3.0
"""The budget where neither ε nor a noise multiplier is given."""

LEARNING_RATES = {"adam": 0.01, "sgd": 0.5}
"""Where another optimiser is chosen than the recipe's, and no learning rate."""

TEMPERED = ("bce", "cross-entropy")
"""The losses that a recipe's temperature is for."""


PICTURES = {"cifar10": "photographs", "fashion-mnist": "objects", "mnist": "handwriting"}
"""The features of the image sets whose kind of picture is known by name."""

FULL_BATCH = 65_536
"""A head on features takes all records at every step, up to so many."""

LOGIT_NOISE = 1.0
"""What `head_rate` lets the noise in a logit be after all steps, as a standard deviation."""

_GATES = {"photographs": 0.6, "objects": 0.55, "handwriting": 0.25}

CERTIFIED = "energies"
"""The features of a run that is to have certified radii: their Lipschitz constant is 1."""

_CERTIFIED_NOISE = 0.1
"""Instead of `LOGIT_NOISE` on `CERTIFIED` features: large margins take a smaller rate."""

# (data set, model); None stands for any. The first key in the order of `recipe` that is there decides.
_RECIPES: dict[tuple[str | None, str | None], Mapping[str, Any]] = {
    ("digits", "mlp"): {  # so few records that every step takes them all, q = 1
        "batch_size": 1437,
        "epochs": 60,
        "lr": 1.0,
        "schedule": "linear",
        "loss_options": {"tau": 32.0},
        "gate": 0.3,
        "allocation": "min_variance",
        "ema": 0.9,
        "model_options": {"depth": 1, "input_bound": 3.4},
    },
    ("mnist", "cnn"): {
        "batch_size": 2048,
        "epochs": 10,
        "lr": 1.2,
        "schedule": "linear",
        "loss_options": {"tau": 32.0},
        "gate": 0.3,
        "allocation": "min_variance",
        "ema": 0.99,
        "model_options": {"input_bound": 8.1, "clips": (0.7, 0.14), "gates": (0.05, 0.1)},
    },
    (None, "tabular"): {  # training/table_recipe.py: every step takes all records, q = 1
        "steps": 100,
        "epochs": None,
        "bounding": "signed-log",
        "bounding_options": {"scale": 0.01, "limit": 16 / math.log1p(100)},
        "lr": 1.0,
        "gate": 0.5,
        "tail": 25,
    },
    (None, None): {"loss_options": {"tau": 32.0}, "gate": 0.3},
}


def _head(features: str) -> Mapping[str, Any]:
    """Of a linear head on features: all records at every step, and a rate that follows from the account."""
    return {
        "batch_size": None,
        "epochs": None,
        "steps": 60,
        "lr": None,
        "loss_options": {"tau": 50.0},
        "gate": _GATES.get(features, 0.5),
        "model_options": {"radius": 100.0},
    }


def head_rate(
    *,
    noise_multiplier: float,
    steps: int,
    batch_size: int,
    momentum: float,
    gate: float,
    tau: float,
    features: str | None = None,
) -> float:
    """The learning rate of a linear head such that noise alone moves a logit, times τ, by a deviation of 1 in all.

    The head is ⟨w, x⟩ with ‖x‖ ≤ 1: the zoo's divides its inputs by their bound. A step adds noise of deviation
    `η σ c / B` to every weight, momentum multiplies what remains of it by 1/(1 − β), and after T steps τ⟨w, x⟩ has the
    deviation `τ η σ c √T / (B (1 − β))`. Every argument is public. (1 suited CIFAR-10, Fashion-MNIST and MNIST at ε
    from 1 to 3: rates within a factor of 1.5 of the best.) On `CERTIFIED` features the deviation is 0.1.

    Args:
        noise_multiplier: σ. steps: T. batch_size: B. momentum: β. gate: c. tau: τ.
        features: by name.
    """
    deviation = _CERTIFIED_NOISE if features == CERTIFIED else LOGIT_NOISE
    return deviation * batch_size * (1 - momentum) / (tau * noise_multiplier * gate * math.sqrt(steps))


RECOMMENDED = frozenset(name for settings in (*_RECIPES.values(), _head("")) for name in settings)
"""The settings that some recipe says."""


def recipe(dataset: str, model: str, features: str | None = None) -> Mapping[str, Any]:
    """The settings for this data set, model and feature map; the most specific ones there are.

    >>> recipe("mnist", "linear", "scattering") == recipe("my.npz", "linear", "dct")
    True
    >>> recipe("my.npz", "mixer") == recipe("cifar10", "vgg")
    True
    """
    if features is not None and model == "linear":
        return _head(features)
    keys = [(name, architecture) for architecture in (model, None) for name in (dataset, None)]
    return next((_RECIPES[key] for key in keys if key in _RECIPES), _RECIPES[None, None])


TABLES = frozenset({"tabular"})
"""The models that are prepared by private measurements, and whose steps take all records where no B is given."""


def default_batch(model: str, records: int, features: str | None = None) -> int:
    """B where none is given: a twentieth of the records, 256 to 4,096; all of them for a model of `TABLES` and, up to
    `FULL_BATCH`, for a head on features.

    >>> default_batch("cnn", 60_000), default_batch("tabular", 60_000), default_batch("linear", 60_000, "dct")
    (3000, 60000, 60000)
    """
    if model in TABLES:
        return records
    head = features is not None and model == "linear"
    return min(records, FULL_BATCH if head else min(4096, max(256, records // 20)))


def default_features(dataset: str, input_shape: Sequence[int] | None) -> str | None:
    """The features where neither a model nor features are named: from the name, or from the format of the images.

    Colour images from 28 pixels on are taken for photographs, grey ones for things on a plain ground. Handwriting has
    to be named: no record is looked at.

    >>> default_features("mnist", None), default_features("my.npz", (3, 64, 64)), default_features("my.npz", (9,))
    ('handwriting', 'photographs', None)
    """
    if dataset in PICTURES:
        return PICTURES[dataset]
    if input_shape is None or len(input_shape) != 3 or min(input_shape[1:]) < 28:
        return None
    return {3: "photographs", 1: "objects"}.get(input_shape[0])


def certified_features(dataset: str, input_shape: Sequence[int] | None) -> dict[str, Any]:
    """The settings that `certified` stands for; the kind of picture as in `default_features`, else things on black.

    >>> certified_features("mnist", None)
    {'features': 'energies', 'feature_options': {'pictures': 'handwriting', 'window': 2}}
    """
    kind = default_features(dataset, input_shape) or "objects"
    window = {} if kind == "photographs" else {"window": 2}
    return {"features": CERTIFIED, "feature_options": {"pictures": kind, **window}}


def default_model(dataset: str, features: str | None = None, *, data_dir: str | os.PathLike[str] | None = None) -> str:
    """The model where none is named: a linear head on features, `tabular` for a table, a convolution net on images, an
    MLP elsewhere.

    Args:
        data_dir: where the data set is sought, to see whether it is a table.

    >>> default_model("digits"), default_model("mnist"), default_model("mnist", "dct"), default_model("my.csv")
    ('mlp', 'cnn', 'linear', 'tabular')
    """
    if features is not None:
        return "linear"
    if dataset.startswith("adbench/") or is_table(dataset, data_dir):
        return "tabular"
    return "cnn" if dataset in PICTURES else "mlp"
