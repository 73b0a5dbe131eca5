"""The contenders of a comparison: which trainer on which model, and the task each is given."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

from lipdp.accounting.plan import PrivacyPlan
from lipdp.comparison.protocol import ComparedTrainer, Session, Task
from lipdp.comparison.trainers import TRAINERS, get_trainer
from lipdp.data import Split, number_of_units
from lipdp.errors import ParameterError
from lipdp.losses import LipschitzLoss
from lipdp.models import build
from lipdp.training.assembly import plan_of, prepare
from lipdp.training.choices import make_loss, make_optimizer
from lipdp.training.config import TrainConfig, config_from_dict

KINDS = ("lipschitz", "plain")
_BLOCK = 64 << 20  # per-sample gradients, in numbers, that a forward pass may leave: what keeps hooks within a few GiB


@dataclass(frozen=True)
class Contender:
    """A trainer and a kind of model: with certified norms, or the unconstrained twin of the same shape."""

    trainer: ComparedTrainer
    plain: bool

    def model_name(self, name: str) -> str:
        """As the results call it: "cnn", or "cnn-twin"."""
        return f"{name}-twin" if self.plain else name


def contenders(names: Iterable[str] = (), kinds: Iterable[str] = KINDS) -> list[Contender]:
    """Every trainer named, on every kind of model that it trains; all trainers by default, and for "all"."""
    asked = list(kinds)
    unknown = [kind for kind in asked if kind not in KINDS]
    if unknown or not asked:
        raise ParameterError(f"kinds of model are {' and '.join(KINDS)}, got {', '.join(map(str, unknown)) or 'none'}")
    named = list(names)
    trainers = list(TRAINERS.values()) if named in ([], ["all"]) else [get_trainer(name) for name in named]
    found = [
        Contender(trainer, plain)
        for trainer in dict.fromkeys(trainers)
        for plain in (False, True)
        if KINDS[plain] in asked and (trainer.plain if plain else trainer.lipschitz)
    ]
    if not found:
        raise ParameterError(f"none of {', '.join(t.name for t in trainers)} trains a {' or '.join(asked)} model")
    return found


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What every contender is trained on: a model of the zoo, its loss, and the shape of the data.

    `model_options` are for both kinds, of which gates and input bound are of the Lipschitz kind; `loss_options` for the
    Lipschitz kind: its temperature makes up for small logits. The twin has none to make up for: its temperature is 1.
    """

    model: str
    input_shape: tuple[int, ...]
    num_classes: int
    loss: str
    model_options: Mapping[str, Any] = field(default_factory=dict)
    loss_options: Mapping[str, Any] = field(default_factory=dict)

    def loss_for(self, contender: Contender) -> LipschitzLoss:
        """The loss of a contender."""
        return self._loss(contender)[0]

    def temperature(self, contender: Contender) -> float:
        """τ, by which logits are multiplied before they are probabilities."""
        return float(getattr(self.loss_for(contender), "tau", 1.0))

    def build(self, contender: Contender) -> nn.Module:
        """A new model of a contender's kind."""
        outputs, options = self._loss(contender)[1], dict(self.model_options)
        return build(self.model, input_shape=self.input_shape, num_classes=outputs, twin=contender.plain, **options)

    def _loss(self, contender: Contender) -> tuple[LipschitzLoss, int]:
        options = dict(self.loss_options)
        if contender.plain and "tau" in options:
            options["tau"] = 1.0
        return make_loss(self.loss, self.num_classes, options)


@dataclass(frozen=True)
class Bench:
    """What the training runs of one data set at one budget share.

    Attributes:
        train: the resolved configuration; of it count model, loss, optimiser, momentum and schedule.
        split: the data, as the model takes them.
        plan: of every private run; without a budget σ = 1, which nobody adds.
        input_bound: on the norm of the inputs, where their features have one.
    """

    train: TrainConfig
    split: Split
    plan: PrivacyPlan
    input_bound: float | None

    def setup(self, **loss_options: Any) -> Setup:
        """Model and loss; `loss_options` go over the configuration's own."""
        train, bound = self.train, {} if self.input_bound is None else {"input_bound": self.input_bound}
        return Setup(
            model=train.model,
            input_shape=self.split.input_shape,
            num_classes=self.split.num_classes,
            loss=str(train.loss),
            model_options={**bound, **train.model_options},
            loss_options={**train.loss_options, **loss_options},
        )

    def trained(
        self, contender: Contender, settings: Mapping[str, Any], *, lr: float, seed: int, setup: Setup | None = None
    ) -> Session:
        """A new model after all T steps on the training part: seeded, repeatable, not private."""
        setup = setup or self.setup()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = setup.build(contender)
            task = Task(
                dataset=TensorDataset(self.split.train_x, self.split.train_y),
                loss=setup.loss_for(contender),
                plan=self.plan,
                optimizer=partial(make_optimizer, self.train.optimizer, lr=lr, momentum=self.train.momentum),
                schedule=self.train.schedule,
                microbatch=max(32, min(512, _BLOCK // sum(p.numel() for p in model.parameters()))),
                seed=seed,
            )
            return replace(contender.trainer, **settings).train(model, task)

    def plan_figures(self, contender: Contender, *, trial: bool = False) -> dict[str, Any]:
        """What a cell says of the plan; a trial has no ε."""
        private = contender.trainer.private
        return {
            "batch_size": self.plan.expected_batch_size,
            "steps": self.plan.steps,
            "noise_multiplier": self.plan.noise_multiplier if private else None,
            "epsilon": self.plan.predicted.epsilon if private and not trial else None,
            "delta": self.plan.target_delta,
            "private": False,  # seeded, and trials look at private records
        }


def bench(train: TrainConfig, epsilon: float | None) -> Bench:
    """That of a configuration with another budget, or without one; the data are read once."""
    return _bench(json.dumps(train.as_dict()), epsilon)


@functools.lru_cache(maxsize=64)
def _bench(plain: str, epsilon: float | None) -> Bench:
    split, input_bound = _data(plain)
    sigma = 1.0 if epsilon is None else None
    train = replace(config_from_dict(json.loads(plain)), epsilon=epsilon, noise_multiplier=sigma)
    train = train.resolve(number_of_units(split), binary=split.task == "binary")
    return Bench(train, split, plan_of(train, split, measured=False), input_bound)


@functools.lru_cache(maxsize=2)
def _data(plain: str) -> tuple[Split, float | None]:
    split, input_bound = prepare(config_from_dict(json.loads(plain)))
    return split.in_memory(), input_bound
