"""What a training run is given: one frozen, JSON-able value."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from numbers import Real
from typing import Any

from lipdp.accounting.plan import Subsampling
from lipdp.errors import CheckpointError, ParameterError, ResumeError, UnknownNameError
from lipdp.training.forward import precision
from lipdp.training.recipes import EPSILON, LEARNING_RATES, TEMPERED, Recipe, default_model, recipe

RUNTIME = frozenset(
    {
        *("data_dir", "device", "download", "threads", "num_workers", "pin_memory", "checkpoint_every", "check_every"),
        *("compile", "channels_last", "autocast"),
    }
)
"""Settings that may change at a resume: ε is the same whatever they are. It follows from q, T and σ; σ is relative to Δ, and
Δ is computed at every step for the precision that the forward pass has then. Where one of them changes, the run goes on with
other roundings, so that it does not end with the bits of one that was not interrupted."""


_TEXTS = (
    "dataset",
    "model",
    "loss",
    "features",
    "bounding",
    "optimizer",
    "schedule",
    "accountant",
    "sampling",
    "device",
    "input_column",
    "label_column",
    "owner_column",
    "augment",
    "autocast",
)

MAX_THREADS = 1024
"""More of them than any machine's cores are a mistake."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything a run is given. `configure(...)` fills in the recipe; `resolve(N)` what depends on the public N.

    Attributes:
        dataset, data_dir, download, image_size: as `lipdp.data.open_split` takes them; input_column, label_column,
            owner_column: its columns. With an owner column batches are of owners, and ε protects an owner.
        augment, augment_multiplicity: random views of images, by name (`lipdp.data.augment`), and K of them in one record.
        num_workers, pin_memory: processes that read records, and page-locked batches on the way to a GPU; for sets on disk
            and for augmented ones.
        features, feature_options: a fixed feature map ("scattering", "dct") and its options, or None.
        bounding, bounding_options: the public map of the inputs; None takes `lipdp.data.default_bounding`.
        model, model_options: as `lipdp.models.build` takes them.
        loss, loss_options: as `lipdp.training.choices.make_loss` takes them; None takes "bce" for a binary task, else
            "cross-entropy".
        epsilon, delta: the budget. δ = None: 1e-5, or the largest power of ten below 1/N where that is smaller.
        noise_multiplier: σ, instead of a budget.
        accountant, sampling, allocation: as `lipdp.PrivacyEngine` takes them.
        gate: cotangent gate at the logits, or None: at the loss's constant.
        gate_quantile: follow this quantile of the cotangent norms, from `gate` on; accounted.
        batch_size: B. steps: T; epochs: E instead, T = E N / B rounded.
        microbatch: samples per forward pass; None takes 512 on a CPU (steady memory), the whole batch elsewhere.
        optimizer, lr, momentum, schedule: as `lipdp.training.choices` takes them. ema: decay of the averaged weights.
        device: "auto", "cpu", "cuda", …; threads: of torch on the CPU.
        seed: repeatable draws, for tests: the run is NOT private then.
        compile: torch.compile the model; channels_last: memory format of images; autocast: precision of products, "bf16".
        secure, check_every: as `lipdp.PrivacyEngine` takes them.
        checkpoint_every, log_every: in steps; None takes a tenth and a twentieth of the run.
    """

    dataset: str
    model: str
    batch_size: int | None
    epochs: float | None
    optimizer: str
    lr: float
    momentum: float
    schedule: str
    allocation: str
    ema: float
    gate: float | None
    loss: str | None
    loss_options: Mapping[str, Any] = field(default_factory=dict)
    model_options: Mapping[str, Any] = field(default_factory=dict)
    feature_options: Mapping[str, Any] = field(default_factory=dict)
    features: str | None = None
    bounding: str | None = None
    bounding_options: Mapping[str, Any] = field(default_factory=dict)
    data_dir: str | None = None
    download: bool = False
    input_column: str | None = None
    label_column: str | None = None
    owner_column: str | None = None
    image_size: Sequence[int] | None = None
    augment: str | None = None
    augment_multiplicity: int = 1
    num_workers: int = 0
    pin_memory: bool = False
    epsilon: float | None = None
    delta: float | None = None
    noise_multiplier: float | None = None
    accountant: str = "prv"
    sampling: str = "poisson"
    gate_quantile: float | None = None
    steps: int | None = None
    microbatch: int | None = None
    device: str = "auto"
    threads: int | None = None
    seed: int | None = None
    secure: bool = False
    compile: bool = False
    channels_last: bool = False
    autocast: str | None = None
    check_every: int | None = None
    checkpoint_every: int | None = None
    log_every: int | None = None

    def __post_init__(self) -> None:
        for name in ("batch_size", "steps", "microbatch", "threads", "checkpoint_every", "log_every"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ParameterError(f"{name}={value!r}: a whole number of at least 1 is needed")
        if self.threads is not None and self.threads > MAX_THREADS:  # torch would crash on many more
            raise ParameterError(f"threads={self.threads}: at most {MAX_THREADS}")
        if self.seed is not None and (type(self.seed) is not int or not 0 <= self.seed < 2**63):
            raise ParameterError(f"seed={self.seed!r}: a whole number from 0 to 2**63 - 1 is needed")
        for name in ("secure", "compile", "channels_last", "pin_memory"):
            if not isinstance(getattr(self, name), bool):
                raise ParameterError(f"{name}={getattr(self, name)!r}: true or false is needed")
        precision(self.autocast)
        self._check_data()
        if self.check_every is not None and (type(self.check_every) is not int or self.check_every < 0):
            raise ParameterError(f"check_every={self.check_every!r}: a whole number of steps, 0 for never")
        for name in ("epochs", "lr", "epsilon", "noise_multiplier", "gate"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, (int, float)) and 0 < value < math.inf):
                raise ParameterError(f"{name}={value!r}: a finite number > 0 is needed")
        if not (isinstance(self.momentum, Real) and 0 <= self.momentum < 1):
            raise ParameterError(f"momentum={self.momentum!r}: a number in [0, 1) is needed")
        if self.delta is not None and not (isinstance(self.delta, Real) and 0 < self.delta < 1):
            raise ParameterError(f"delta={self.delta!r}: a probability in (0, 1), well below 1/(number of records)")
        if self.epsilon is not None and self.noise_multiplier is not None:
            raise ParameterError("epsilon and noise_multiplier were both given: one follows from the other; give one")

    def _check_data(self) -> None:
        workers, size, views = self.num_workers, self.image_size, self.augment_multiplicity
        if type(workers) is not int or not 0 <= workers <= MAX_THREADS:
            raise ParameterError(f"num_workers={workers!r}: a whole number from 0 to {MAX_THREADS} is needed")
        if size is not None and (
            not isinstance(size, (tuple, list))
            or len(size) != 2
            or any(type(n) is not int or not 1 <= n <= 2**15 for n in size)
        ):
            raise ParameterError(f"image_size={size!r}: a height and a width are needed, in pixels")
        if type(views) is not int or not 1 <= views <= 1024:
            raise ParameterError(f"augment_multiplicity={views!r}: a whole number of views from 1 to 1024 is needed")
        if views > 1 and self.augment is None:
            raise ParameterError(
                f"augment_multiplicity={views}, but no augment: all views of a record would be the same"
            )
        if self.augment is not None and self.features is not None:
            raise ParameterError("augment and features were both given: features are computed once, not of every view")

    def resolve(self, records: int, *, binary: bool = False) -> TrainConfig:
        """The same with B, T, δ and the loss decided, from the public number of training records (or of their owners, where
        those are drawn) and kind of task.

        >>> config = configure(dataset="digits", batch_size=100, epochs=2).resolve(1437)
        >>> config.steps, config.delta, config.loss
        (29, 1e-05, 'cross-entropy')
        """
        batch = self.batch_size or min(records, 4096, max(256, records // 20))
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
            plain, asked = self.as_dict(), json.loads(json.dumps(dict(given)))
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


def default_delta(records: int) -> float:
    """1e-5, or the largest power of ten below 1/N where that is smaller.

    >>> default_delta(60_000), default_delta(600_000)
    (1e-05, 1e-06)
    """
    return min(1e-5, 10.0 ** -len(str(records)))


def configure(*, dataset: str = "digits", **given: Any) -> TrainConfig:
    """A configuration from what is given (None: not given), the rest from the recipe for data set, model and features.

    Options given by name (`loss_options`, …) are merged over the recipe's, unless what they are options of was given.
    `tau` is short for loss_options={"tau": …}, and gate="off" sets no gate below the loss's constant.

    Raises:
        UnknownNameError: a setting there is not. ParameterError: one out of range.

    >>> configure(lr=0.1).lr, configure().epsilon
    (0.1, 3.0)
    """
    given = {name: value for name, value in given.items() if value is not None}
    tau = given.pop("tau", None)
    for name, value in {"dataset": dataset, **given}.items():
        if name in _TEXTS and not isinstance(value, str):
            raise ParameterError(f"{name}={value!r}: a name is needed")
    known = {f.name for f in fields(TrainConfig)}
    for name in given:
        if name not in known:
            raise UnknownNameError("setting", name, known)
    features = given.get("features")
    given.setdefault("model", default_model(dataset, features))
    base = recipe(dataset, given["model"], features)
    settings = {f.name: getattr(base, f.name) for f in fields(Recipe)}
    if given.get("gate") == "off":
        given["gate"] = None
    if given.get("loss") not in (base.loss, None, *TEMPERED):
        settings["loss_options"] = {}  # they belong to the recipe's loss
    if given.get("optimizer") not in (base.optimizer, None):
        settings["lr"] = LEARNING_RATES.get(given["optimizer"], base.lr)
    if "steps" in given:
        if "epochs" in given:
            raise ParameterError("steps and epochs were both given: one follows from the other; give one")
        settings["epochs"] = None
    for name in ("loss_options", "model_options", "feature_options"):
        options = given.pop(name, {})
        if not isinstance(options, Mapping):
            raise ParameterError(f"{name}={options!r}: a mapping of options is needed")
        settings[name] = {**settings[name], **options}
    if tau is not None:
        settings["loss_options"]["tau"] = tau
    if "noise_multiplier" not in given:
        given.setdefault("epsilon", EPSILON)
    return TrainConfig(dataset=dataset, **{**settings, **given})


def config_from_dict(plain: Mapping[str, Any]) -> TrainConfig:
    """The inverse of `TrainConfig.as_dict`; CheckpointError if it is not one."""
    try:
        return TrainConfig(**plain)
    except TypeError as error:
        raise CheckpointError(f"not the configuration of a run: {error}") from error
