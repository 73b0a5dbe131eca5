"""What a training run is given: one frozen, JSON-able value, whose fields declare all that is said of a setting."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, asdict, dataclass, fields, replace
from functools import partial
from typing import Any

from lipdp.accounting.plan import Subsampling, default_delta
from lipdp.data import BOUNDINGS, DATASETS, Columns, Schema, is_table, open_split, plain_schema
from lipdp.data.augment import AUGMENTS
from lipdp.errors import CheckpointError, LipdpError, ParameterError, ResumeError, UnknownNameError
from lipdp.features.maps import FEATURES
from lipdp.models import names
from lipdp.noise.allocation import ALLOCATIONS
from lipdp.training import recipes
from lipdp.training.choices import LOSSES, OPTIMIZERS, SCHEDULES
from lipdp.training.forward import OFF, PRECISIONS
from lipdp.training.settings import (
    FLAG,
    GATE,
    LIST,
    MAX_THREADS,
    NAME,
    OPTIONS,
    SCHEMA,
    SIZE,
    Role,
    Setting,
    declared,
    number,
    setting,
    table,
    whole,
)

DATA, ACCOUNT, METHOD, MACHINE = Role
_data, _model, _privacy, _optimisation, _run = (
    partial(setting, panel=panel) for panel in ("Data", "Model", "Privacy", "Optimisation", "Run")
)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything a run is given. `configure(...)` fills in the recipe; `resolve(N)` what depends on the public N.

    What each setting means, which values it takes and what it may change is declared where it stands, and nowhere else;
    `settings_table()` shows all of it.
    """

    dataset: str = _data(
        NAME,
        DATA,
        f"{', '.join(DATASETS[:-4])}, an .npz, .csv or .parquet file, or a folder of .npy files, of images by class or"
        " of Hugging Face datasets, read batch by batch",
        MISSING,
        words="digits",
    )
    data_dir: str | None = _data(NAME, MACHINE, "where the files are", words="$LIPDP_DATA")
    download: bool = _data(FLAG, MACHINE, "fetch what is not there", False)
    input_column: str | None = _data(NAME, DATA, "of a datasets folder", words="its only image column")
    label_column: str | None = _data(NAME, DATA, "of a datasets folder", words="its only class column")
    owner_column: str | None = _data(
        NAME, DATA, "array or column of owners: batches of owners, ε for an owner with all records"
    )
    schema: Mapping[str, Any] | None = _data(
        SCHEMA, DATA, "what is public of the columns of a .csv or .parquet file", metavar="FILE.toml", required=False
    )
    classes: Sequence[Any] | None = _data(
        LIST, DATA, "public list of the labels, such as 1,2,3 or no,yes", words="0, 1, 2, …", metavar="A,B,..."
    )
    image_size: Sequence[int] | None = _data(SIZE, DATA, "bring images to this height and width", metavar="H W")
    augment: str | None = _data(NAME, METHOD, "random views of images", choices=AUGMENTS)
    views: int = _data(whole(1, 1024), METHOD, "views of each record in one gradient", 1)
    num_workers: int = _data(
        whole(0, MAX_THREADS), MACHINE, "processes that read records, of sets on disk and augmented ones", 0
    )
    pin_memory: bool = _data(FLAG, MACHINE, "page-locked batches for a GPU", False)
    features: str | None = _data(
        NAME, DATA, f"a fixed feature map: {', '.join(n for n in FEATURES if n != 'frozen')}, or module:function"
    )
    feature_options: Mapping[str, Any] = _data(OPTIONS, DATA, "key=value, e.g. J=2, group_norm=27")
    certified: bool = _data(
        FLAG, DATA, "a head on features of Lipschitz constant 1, for the radii of `lipdp certify`", False
    )
    bounding: str | None = _data(NAME, DATA, "public map of the inputs", choices=BOUNDINGS, words="the data set's")
    bounding_options: Mapping[str, Any] = _data(OPTIONS, DATA, "key=value, e.g. upper=120")

    model: str = _model(NAME, METHOD, f"{', '.join(names())}, or module:function", MISSING, words="the data set's")
    model_options: Mapping[str, Any] = _model(OPTIONS, METHOD, "key=value, e.g. width=32")
    loss: str | None = _model(NAME, METHOD, "the loss", choices=LOSSES, words="cross-entropy, or bce for a binary task")
    loss_options: Mapping[str, Any] = _model(OPTIONS, METHOD, "key=value, e.g. margin=0.5")

    epsilon: float | None = _privacy(number(), ACCOUNT, "the budget ε", words=f"{recipes.EPSILON:g}")
    delta: float | None = _privacy(number(1), ACCOUNT, "δ", words="1e-5, or the power of ten below 1/N if smaller")
    noise_multiplier: float | None = _privacy(number(), ACCOUNT, "σ, instead of ε")
    accountant: str = _privacy(NAME, ACCOUNT, "what bounds ε", "prv", choices=("prv", "pld", "rdp"))
    sampling: str = _privacy(
        NAME, ACCOUNT, "batches for add or remove one, or for replace one", "poisson", choices=("poisson", "fixed_size")
    )
    bands: int = _privacy(
        whole(1, 1024), ACCOUNT, "correlate the noise of so many steps, each with its own part of the data", 1
    )
    truncated_batch_size: int | None = _privacy(
        whole(), ACCOUNT, "most records of a batch; every batch has so many rows, one shape for --compile"
    )
    allocation: str = _privacy(NAME, METHOD, "of the noise", "per_layer", choices=ALLOCATIONS)
    gate: float | None = _privacy(
        GATE, METHOD, "bound on every record's gradient at the logits, or off (the loss's own)"
    )
    gate_quantile: float | None = _privacy(number(1), METHOD, "let the gate follow this quantile, privately")
    secure: bool = _privacy(FLAG, ACCOUNT, "noise and batches from a cipher", False)

    batch_size: int | None = _optimisation(whole(), ACCOUNT, "expected batch size B")
    epochs: float | None = _optimisation(
        number(), ACCOUNT, "passes over the data, T = epochs · N / B", 20.0, required=False
    )
    steps: int | None = _optimisation(whole(), ACCOUNT, "T, instead of epochs")
    optimizer: str = _optimisation(NAME, METHOD, "the optimiser", "sgd", choices=OPTIMIZERS)
    lr: float | None = _optimisation(
        number(), METHOD, "learning rate; of a head on features from σ, T and B", recipes.LEARNING_RATES["sgd"],
        required=False,
    )  # fmt: skip
    momentum: float = _optimisation(number(1, zero=True), METHOD, "momentum; Adam's first β", 0.9)
    schedule: str = _optimisation(NAME, METHOD, "of the learning rate", "constant", choices=SCHEDULES)
    ema: float = _optimisation(number(1, zero=True), METHOD, "decay of the averaged weights", 0.95)
    tail: int | None = _optimisation(whole(), METHOD, "average the weights of the last so many steps, instead of ema")
    microbatch: int | None = _optimisation(
        whole(), MACHINE, "samples read and trained on at a time, to save memory (one noise draw all the same)",
        words="512 on a CPU, else the batch",
    )  # fmt: skip

    check_every: int | None = _run(
        whole(0), MACHINE, "steps between looks at the gradients of a few records; 0 never", words="by cost"
    )
    checkpoint_every: int | None = _run(whole(), MACHINE, "steps between checkpoints", words="T/10")
    log_every: int | None = _run(whole(), MACHINE, "steps between lines of metrics", words="T/20")
    device: str = _run(NAME, MACHINE, "auto (a GPU if there is one), cpu, cuda, cuda:1, …", "auto")
    threads: int | None = _run(whole(1, MAX_THREADS), MACHINE, "of torch on the CPU")
    compile: bool = _run(FLAG, MACHINE, "torch.compile the model", False)
    channels_last: bool = _run(FLAG, MACHINE, "memory format of images (same values)", False)
    autocast: str | None = _run(
        NAME, MACHINE, "precision of the forward pass; Δ allows for its rounding", choices=(*PRECISIONS, OFF)
    )
    seed: int | None = _run(whole(0, 2**63 - 1), ACCOUNT, "repeat the run exactly, for tests: NOT private")

    def __post_init__(self) -> None:
        for each in fields(self):
            SETTINGS[each.name].check(getattr(self, each.name))
        if self.schema is not None:
            Schema.of(self.schema)
            if self.classes is not None:
                raise ParameterError("schema= and classes= were both given: the schema lists the classes of its label")
        for of in ("bounding", "features"):
            options = getattr(self, f"{of.removesuffix('s')}_options")
            if options and getattr(self, of) is None:
                raise ParameterError(f"options {dict(options)} were given, but no {of}= that could take them; name one")
        if self.features is not None and ":" not in self.features and self.features not in FEATURES:
            raise UnknownNameError("features", self.features, FEATURES)
        if self.certified and self.features != recipes.CERTIFIED:
            raise ParameterError(f"certified=True is for {recipes.CERTIFIED} features, not for {self.features!r}")
        if self.views > 1 and self.augment is None:
            raise ParameterError(f"views={self.views}, but no augment=: all views of a record would be the same")
        if self.augment is not None and self.features is not None:
            raise ParameterError(
                "augment= and features= were both given: features are computed once, not of every view"
            )
        if self.epsilon is not None and self.noise_multiplier is not None:
            raise ParameterError("epsilon= and noise_multiplier= were both given: one follows from the other; give one")

    @property
    def weights(self) -> str:
        """Which weights of a run are its model: "ema", the averaged ones, where it averages a `tail`; else "model".

        Decided before the run, so that nobody picks by the score.

        >>> configure(dataset="digits", epsilon=1.0).weights
        'model'
        """
        return "model" if self.tail is None else "ema"

    @property
    def saves(self) -> tuple[int, int]:
        """Steps from one record of metrics to the next, and from one checkpoint, which each record brings too; T is
        decided.

        >>> configure(dataset="digits", epsilon=1.0, steps=100, checkpoint_every=3).saves
        (5, 3)
        """
        total = self.steps or 0
        return (
            self.log_every or max(1, math.ceil(total / 20)),
            self.checkpoint_every or max(1, math.ceil(total / 10)),
        )

    def resolve(self, records: int, *, binary: bool = False) -> TrainConfig:
        """The same with B, T, δ and the loss decided, from two public facts: the number of training records (or of
        their owners, where those are drawn) and the kind of task.

        >>> config = configure(dataset="digits", batch_size=100, epochs=2).resolve(1437)
        >>> config.steps, config.delta, config.loss
        (29, 1e-05, 'cross-entropy')
        """
        batch = self.batch_size or recipes.default_batch(self.model, records, self.features)
        if batch > records:
            raise ParameterError(f"batch_size={batch}, but there are {records} training records")
        steps = self.steps or Subsampling.of(records, batch, epochs=self.epochs or 1.0).steps
        return replace(
            self,
            batch_size=batch,
            steps=steps,
            delta=self.delta or default_delta(records),
            loss=self.loss or ("bce" if binary else "cross-entropy"),
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return plain

    def resumed(self, given: Mapping[str, Any]) -> TrainConfig:
        """The same with the `RUNTIME` settings of `given`, which is written as for `configure`.

        Raises:
            ResumeError: `given` holds anything else that differs; ε would be wrong, or the run another one.
        """
        try:
            plain, asked = self.as_dict(), json.loads(json.dumps(_with_schema_read(given)))
        except (TypeError, ValueError) as error:
            raise ResumeError(f"not the settings of a run: {error}") from error
        if "tau" in asked:
            asked["loss_options"] = {**asked.get("loss_options", {}), "tau": asked.pop("tau")}
        if asked.get("gate") == "off":
            asked["gate"] = None
        different = []
        for name, value in asked.items():
            was = plain.get(name)
            if isinstance(was, dict) and isinstance(value, dict):
                was = {key: was.get(key) for key in value}  # options may be given in part
            if name not in RUNTIME and value != was:
                different.append(f"{name} was {was!r}, is now {value!r}")
        if different:
            raise ResumeError(
                f"the run to resume has other settings ({'; '.join(different)}); leave them out, or start a new run"
            )
        return replace(self, **{n: v for n, v in given.items() if n in RUNTIME})


WEIGHTS = ("model", "ema")
"""What a checkpoint holds: the last weights, and their average."""

_TAU = setting(number(), METHOD, "temperature of cross-entropy and bce", panel="Model").metadata["setting"]
SETTINGS: Mapping[str, Setting] = {
    name: replace(one, default="the recipe's") if name in recipes.RECOMMENDED else one
    for name, one in {**declared(TrainConfig), "tau": replace(_TAU, name="tau", default="the recipe's")}.items()
}
"""Every setting of a run, by name; tau stands for loss_options={"tau": …}."""

RUNTIME = frozenset(name for name, one in SETTINGS.items() if one.role is MACHINE)
"""The settings that may change at a resume."""

SEARCHABLE = frozenset(name for name, one in SETTINGS.items() if one.role is METHOD)
"""The settings that a search may vary."""


def configure(*, dataset: str = "digits", **given: Any) -> TrainConfig:
    """A configuration from what is given (None: not given), the rest from the recipe for data set, model and features.

    Options given by name (`loss_options`, …) are merged over the recipe's, unless what they are options of was given.
    `tau` is short for loss_options={"tau": …}, and gate="off" sets no gate below the loss's constant.

    Raises:
        UnknownNameError: a setting there is not. ParameterError: one out of range.

    >>> configure(lr=0.1).lr, configure().epsilon
    (0.1, 3.0)
    """
    given = _with_schema_read({n: value for n, value in {"dataset": dataset, **given}.items() if value is not None})
    ungated = given.get("gate") == OFF
    if ungated:
        del given["gate"]
    for name, value in given.items():
        if name not in SETTINGS:
            raise UnknownNameError("setting", name, SETTINGS)
        SETTINGS[name].check(value)
    chosen = sorted({"model", "features", "augment"} & set(given))
    if given.get("certified"):
        if chosen:
            raise ParameterError(f"certified=True chooses the model and its features: leave out {', '.join(chosen)}")
        settled = recipes.certified_features(dataset, _image_shape(given))
        settled["feature_options"] |= given.get("feature_options", {})
        given |= settled
    elif not chosen:
        given["features"] = recipes.default_features(dataset, _image_shape(given))
    features = given.get("features")
    if "model" not in given:
        given["model"] = recipes.default_model(dataset, features, data_dir=given.get("data_dir"))
    settings = dict(recipes.recipe(dataset, given["model"], features))
    if "schema" in given and "bounding" in given:
        raise ParameterError("schema= and bounding= were both given: the schema's ranges are the map of the inputs")
    if "schema" in given and Schema.of(given["schema"]).is_bounded:
        settings |= {"bounding": "clip", "bounding_options": {"lower": -1.0, "upper": 1.0}}
    if "bounding" in given:
        settings.pop("bounding_options", None)  # they belong to the recipe's map
    if "epochs" in given:
        settings.pop("steps", None)
    if "ema" in given:
        settings.pop("tail", None)
    if given.get("loss") not in (None, *recipes.TEMPERED):
        settings["loss_options"] = {}  # they belong to the recipe's loss
    if given.get("optimizer") not in (TrainConfig.optimizer, None):
        settings["lr"] = recipes.LEARNING_RATES[given["optimizer"]]
    if "steps" in given:
        if "epochs" in given:
            raise ParameterError("steps= and epochs= were both given: one follows from the other; give one")
        settings["epochs"] = None
    elif "epochs" in given:
        settings["steps"] = None
    if "tau" in given:
        given["loss_options"] = {**given.get("loss_options", {}), "tau": given.pop("tau")}
    for name in ("loss_options", "model_options", "feature_options"):
        settings[name] = {**settings.get(name, {}), **given.pop(name, {})}
    if "noise_multiplier" not in given:
        given.setdefault("epsilon", recipes.EPSILON)
    return TrainConfig(**{**settings, **given, **({"gate": None} if ungated else {})})


def _image_shape(given: Mapping[str, Any]) -> tuple[int, ...] | None:
    """The shape of the images of a file or folder that features can be computed of; None of anything else.

    A public fact. Where a set cannot be read, whoever comes to read it says why.
    """
    name = given["dataset"]
    if name in DATASETS or name.startswith("adbench/"):
        return None
    if is_table(name, given.get("data_dir")):
        return None
    columns = columns_of(given)
    with suppress(LipdpError):
        split = open_split(name, data_dir=given.get("data_dir"), columns=columns)
        if split.is_small:
            return (split.input_shape[0], *given.get("image_size", split.input_shape[1:]))
    return None


def columns_of(settings: Mapping[str, Any]) -> Columns:
    """What the settings of a run say of its data's columns."""
    schema = settings.get("schema")
    return Columns(
        input=settings.get("input_column"),
        label=settings.get("label_column"),
        owner=settings.get("owner_column"),
        classes=settings.get("classes"),
        schema=None if schema is None else Schema.of(schema),
    )


def _with_schema_read(given: Mapping[str, Any]) -> dict[str, Any]:
    schema = given.get("schema")
    return {**given, "schema": plain_schema(schema)} if isinstance(schema, (str, os.PathLike)) else dict(given)


def config_from_dict(plain: Mapping[str, Any]) -> TrainConfig:
    """The inverse of `TrainConfig.as_dict`; CheckpointError if it is not one."""
    try:
        return TrainConfig(**plain)
    except TypeError as error:
        raise CheckpointError(f"not the configuration of a run: {error}") from error


def settings_table() -> str:
    """Every setting of a run as a table in Markdown: its option, meaning and default, and what may change it.

    >>> print(settings_table().splitlines()[-1])
    | `tau` | `--tau` | temperature of cross-entropy and bce | the recipe's |  | yes |
    """
    return table(SETTINGS)


def weights_of(config: TrainConfig, asked: str | None) -> str:
    """The weights asked for, "model" or "ema"; those that are the run's model if none are."""
    if asked not in (None, *WEIGHTS):
        raise UnknownNameError("weights", asked, WEIGHTS)
    return asked or config.weights
