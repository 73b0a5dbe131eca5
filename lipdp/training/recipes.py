"""What `lipdp train` does where it was not told: a declared table of settings by data set, model and features.

The settings were chosen on public benchmarks. Choosing them by looking at private data is not covered by ε.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

EPSILON = 3.0
"""The budget where neither ε nor a noise multiplier is given."""

LEARNING_RATES = {"adam": 0.01, "sgd": 0.5}
"""Where another optimiser is chosen than the recipe's, and no learning rate."""

TEMPERED = ("bce", "cross-entropy")
"""The losses that a recipe's temperature is for."""


_SCATTERING: Mapping[str, Any] = {
    "batch_size": 4096,
    "epochs": 40,
    "loss_options": {"tau": 30.0},
    "gate": 0.3,
    "ema": 0.98,
    "model_options": {"radius": 16.0},
}

# (data set, model, features); None stands for any. The first key in `_keys` order that is there decides.
_RECIPES: dict[tuple[str | None, str | None, str | None], Mapping[str, Any]] = {
    ("digits", "mlp", None): {  # so few records that every step takes them all, q = 1
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
    ("mnist", "cnn", None): {
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
    ("mnist", "linear", "scattering"): _SCATTERING,
    ("fashion-mnist", "linear", "scattering"): {
        "batch_size": 4096,
        "epochs": 30,
        "loss_options": {"tau": 50.0},
        "gate": 0.3,
    },
    (None, "linear", "scattering"): _SCATTERING,
    (None, "linear", "frozen"): {"loss_options": {"tau": 30.0}, "gate": 0.3, "model_options": {"radius": 16.0}},
    (None, "tabular", None): {  # `lipdp.training.tables`: every step takes all records, q = 1
        "steps": 100,
        "epochs": None,
        "bounding": "signed-log",
        "bounding_options": {"scale": 0.01, "limit": 16 / math.log1p(100)},
        "lr": 1.0,
        "gate": 0.5,
        "tail": 25,
    },
    (None, None, None): {"loss_options": {"tau": 32.0}, "gate": 0.3},
}

RECOMMENDED = frozenset(name for settings in _RECIPES.values() for name in settings)
"""The settings that some recipe says."""


def recipe(dataset: str, model: str, features: str | None = None) -> Mapping[str, Any]:
    """The settings for this data set, model and feature map; the most specific ones there are.

    >>> recipe("mnist", "linear", "scattering")["batch_size"]
    4096
    >>> recipe("my.npz", "mixer") == recipe("cifar10", "vgg")
    True
    """
    features = "frozen" if features is not None and ":" in features else features
    keys = [
        (name, architecture, features) for architecture in (model, None) for name in (dataset, None)
    ]  # a recipe for features never serves pixels, nor the other way round
    return next((_RECIPES[key] for key in keys if key in _RECIPES), _RECIPES[None, None, None])


TABLES = frozenset({"tabular"})
"""The models that are prepared by private measurements, and whose steps take all records where no B is given."""


def default_batch(model: str, records: int) -> int:
    """B where none is given: a twentieth of the records, 256 to 4,096; all of them for a model of `TABLES`.

    >>> default_batch("cnn", 60_000), default_batch("tabular", 60_000)
    (3000, 60000)
    """
    return records if model in TABLES else min(records, 4096, max(256, records // 20))


def default_model(dataset: str, features: str | None = None, *, table: bool = False) -> str:
    """The model where none is named: a linear head on features, `tabular` for a table, a convolution net on images, an
    MLP elsewhere.

    Args:
        table: whether the inputs are known to be a table.

    >>> default_model("digits"), default_model("mnist"), default_model("mnist", "dct"), default_model("adbench/donors")
    ('mlp', 'cnn', 'linear', 'tabular')
    """
    if features is not None:
        return "linear"
    if table or dataset.startswith("adbench/"):
        return "tabular"
    return "cnn" if dataset in ("mnist", "fashion-mnist", "cifar10") else "mlp"
