"""What the comparisons are given: a field with a text is an option of `lipdp compare`, others are as for `train`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any

from lipdp.accounting.events import require_positive
from lipdp.certify import IMAGE_RADII
from lipdp.errors import ParameterError
from lipdp.training.config import TrainConfig, configure
from lipdp.training.recipes import default_model, recipe
from lipdp.training.runtime import choose_device

if TYPE_CHECKING:
    from lipdp.comparison.contenders import Setup

SHAPES: Mapping[str, tuple[int, ...]] = {
    "mnist": (1, 28, 28),
    "fashion-mnist": (1, 28, 28),
    "cifar10": (3, 32, 32),
    "digits": (1, 8, 8),
    "tiny-imagenet": (3, 64, 64),
}
DISTINCT = ("non_private", "clipless", "backprop_clipping", "opacus_hooks", "opacus_functorch", "opacus_ghost", "rgp")
"""Trainers whose steps cost differently; the other ways of clipping cost what Opacus' hooks cost."""


def _check_budgets(epsilons: Sequence[float]) -> None:
    """Before the first run, which may be long before the first private one."""
    for epsilon in epsilons:
        require_positive("epsilon", epsilon)


_Kinds = Annotated[Sequence[str], "of model: lipschitz, plain (the unconstrained twin)"]


@dataclass(frozen=True, kw_only=True)
class SpeedConfig:
    """What `speed` measures: random images, on which a step takes as long as on real ones.

    Every batch size is measured with every number of views, from the smallest on. In each repetition every trainer
    takes one step on the same batch. Peak memory is taken in a process for each cell, which on a CPU may allocate
    `memory_limit` GiB (None: 80 % of what is available). `model_options` None takes those of the data set's recipe.
    """

    dataset: Annotated[str, f"whose shape: {', '.join(SHAPES)}"] = "mnist"
    model: str = "cnn"
    model_options: Mapping[str, Any] | None = None
    batch_sizes: Annotated[Sequence[int], "expected batch sizes"] = (64, 256, 1024, 4096, 8192)
    views: Annotated[Sequence[int], "views of each record in one gradient"] = (1,)
    trainers: Annotated[Sequence[str], "`all`, or names; those that cost differently"] = DISTINCT
    kinds: _Kinds = ("lipschitz", "plain")
    repeat: Annotated[int, "interleaved repetitions"] = 7
    memory: Annotated[bool, "measure peak memory too"] = True
    memory_limit: Annotated[float | None, "GiB a process may take on a CPU"] = None
    device: str = "cpu"
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.dataset not in SHAPES:
            raise ParameterError(f"dataset {self.dataset!r}: speed is measured on shapes of {', '.join(SHAPES)}")
        if min([self.repeat, *self.views, *self.batch_sizes]) < 1 or not (self.views and self.batch_sizes):
            given = f"batch_sizes={list(self.batch_sizes)}, views={list(self.views)}, repeat={self.repeat}"
            raise ParameterError(f"{given}: at least 1 is needed")
        if self.memory_limit is not None:
            require_positive("memory_limit", self.memory_limit)
        object.__setattr__(self, "device", str(choose_device(self.device)))

    @cached_property
    def setup(self) -> Setup:
        """Model, loss and shape of the data."""
        from lipdp.comparison.contenders import Setup

        recommended = recipe(self.dataset, self.model).get("model_options", {})
        return Setup(
            model=self.model,
            model_options=dict(recommended if self.model_options is None else self.model_options),
            input_shape=SHAPES[self.dataset],
            num_classes=10,
            loss="cross-entropy",
            loss_options={"tau": 32.0},
        )


@dataclass(frozen=True, kw_only=True)
class _Trained:
    """What training runs on one recipe share; None takes the recipe's."""

    data_dir: str | None = None
    schema: str | None = None
    model: str | None = None
    model_options: Mapping[str, Any] | None = None
    features: str | None = None
    delta: float | None = None
    batch_size: int | None = None
    epochs: float | None = None

    def recipe_for(self, dataset: str, **given: Any) -> TrainConfig:
        """The recipe of a data set, with what was given."""
        names = ("data_dir", "schema", "model_options", "features", "delta", "batch_size", "epochs")
        model = self.model or default_model(dataset, self.features, data_dir=self.data_dir)
        return configure(dataset=dataset, model=model, **{name: getattr(self, name) for name in names}, **given)


@dataclass(frozen=True, kw_only=True)
class UtilityConfig(_Trained):
    """What `utility` compares, where, and how each trainer is tuned.

    The seeds give the initial weights, batches and noise: such runs are repeatable and therefore not private
    themselves. Trials are judged by a share `validation` of the training records; the test part is seen by the final
    runs alone. At a tune scale of k they run at B/k and σ/k,
    with the signal-to-noise ratio of the full run at a k-th of its cost (Sander et al. 2023); a non-private trainer has
    no noise to scale, and is tuned at B.
    """

    datasets: Annotated[Sequence[str], "as for lipdp train"] = ("digits",)
    epsilons: Annotated[Sequence[float], "budgets"] = (1.0, 3.0)
    trainers: Annotated[Sequence[str], "default: all"] = ()
    kinds: _Kinds = ("lipschitz", "plain")
    seeds: Annotated[int, "runs of each trainer at each budget"] = 3
    trials: Annotated[int, "most tuning trials of each trainer at each budget, all the same; 1: no tuning"] = 16
    tune_scale: Annotated[int, "k: trials at B/k and σ/k, a k-th of the cost"] = 1
    validation: float = 0.1
    optimizer: str | None = None
    momentum: float | None = None
    schedule: str | None = None

    def __post_init__(self) -> None:
        for name in ("trials", "seeds", "tune_scale"):
            if getattr(self, name) < 1:
                raise ParameterError(f"{name}={getattr(self, name)}: at least 1 is needed")
        if not self.datasets or not self.epsilons:
            raise ParameterError("at least one dataset and one epsilon are needed")
        _check_budgets(self.epsilons)

    def train_config(self, dataset: str) -> TrainConfig:
        """The recipe for one of the data sets; trainers are given budgets of their own."""
        chosen = {"optimizer": self.optimizer, "momentum": self.momentum, "schedule": self.schedule}
        return self.recipe_for(dataset, epsilon=1.0, **chosen)


@dataclass(frozen=True, kw_only=True)
class RobustnessConfig(_Trained):
    """What `robustness` compares: trainers of the Lipschitz model along the temperature of the loss CE(τz)/τ.

    A large τ asks for a margin of about 1/τ and no more: accuracy; a small one rewards any margin: radius. Of trainers
    without privacy the unconstrained twin is trained too, at τ = 1, with a learning rate of its own: nothing keeps its
    constant small. Runs are seeded, so repeatable and not private themselves.
    """

    dataset: str = "digits"
    epsilon: float = 3.0
    lr: float | None = None
    trainers: Annotated[Sequence[str], "by name"] = ("clipless", "opacus_hooks", "non_private")
    taus: Annotated[Sequence[float], "temperatures"] = (2.0, 8.0, 32.0, 128.0)
    radii: Annotated[Sequence[float], "L2, in units of the raw input, fractions such as 36/255 too"] = IMAGE_RADII
    seeds: Annotated[int, "runs of each cell"] = 1
    twin_lr: Annotated[float, "of the unconstrained twin"] = 0.1
    max_grad_norm: Annotated[float, "C, of trainers that clip"] = 0.3
    samples: Annotated[int | None, "test records certified, the first N; default: all"] = None
    attack: Annotated[bool, "run L2 PGD (foolbox) as well"] = False

    def __post_init__(self) -> None:
        if not self.taus or min(self.taus) <= 0:
            raise ParameterError(f"taus={tuple(self.taus)}: temperatures are positive numbers")
        if not self.radii or min(self.radii) < 0:
            raise ParameterError(f"radii={tuple(self.radii)}: at least one, none negative")
        for name in ("epsilon", "twin_lr", "max_grad_norm"):
            require_positive(name, getattr(self, name))
        if self.seeds < 1 or (self.samples is not None and self.samples < 1):
            raise ParameterError("seeds and samples are at least 1")

    def train_config(self) -> TrainConfig:
        """The recipe, with what was given."""
        return self.recipe_for(self.dataset, epsilon=self.epsilon, lr=self.lr)


@dataclass(frozen=True, kw_only=True)
class TablesConfig:
    """What `tables` compares. Every seed cuts the records anew: four fifths to learn from, one to test on."""

    tables: Annotated[Sequence[str], "data sets, as for lipdp train"]
    epsilons: Annotated[Sequence[float], "budgets"] = (1.0,)
    trainers: Annotated[
        Sequence[str], "lipdp, opacus_mlp, ebm, logistic_regression, diffprivlib; default: all but the last"
    ] = ()
    seeds: Annotated[int, "runs of each trainer, each on its own random split"] = 5
    records: Annotated[int, "of a table, at most, drawn at random"] = 30_000
    data_dir: str | None = None
    delta: float | None = None

    def __post_init__(self) -> None:
        if not self.tables or not self.epsilons:
            raise ParameterError("at least one table and one epsilon are needed, e.g. --tables adbench/22_magic.gamma")
        _check_budgets(self.epsilons)
        if self.seeds < 1 or self.records < 20:
            raise ParameterError(f"seeds={self.seeds}, records={self.records}: at least 1 and 20 are needed")
