"""The contenders of a comparison: which trainer on which model, and the task each is given."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

from lipdp.accounting.plan import PrivacyPlan
from lipdp.comparison.protocol import ComparedTrainer, Session, Task
from lipdp.comparison.trainers import TRAINERS, get_trainer
from lipdp.data import Split
from lipdp.errors import ParameterError
from lipdp.losses import LipschitzLoss
from lipdp.models import build
from lipdp.training.choices import make_loss, make_optimizer
from lipdp.training.config import TrainConfig

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
    """Every trainer named, on every kind of model that it trains; all trainers by default.

    Raises:
        UnknownNameError: no such trainer. ParameterError: no such kind.

    >>> [contender.model_name("cnn") for contender in contenders(["clipless", "opacus_hooks"])]
    ['cnn', 'cnn', 'cnn-twin']
    """
    asked = list(kinds)
    unknown = [kind for kind in asked if kind not in KINDS]
    if unknown or not asked:
        raise ParameterError(f"kinds of model are {' and '.join(KINDS)}, got {', '.join(map(str, unknown)) or 'none'}")
    trainers = [get_trainer(name) for name in names] or list(TRAINERS.values())
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

    @classmethod
    def of(cls, train: TrainConfig, split: Split, input_bound: float | None, **loss_options: Any) -> Setup:
        """That of a training configuration; `loss_options` go over the configuration's own."""
        bound = {} if input_bound is None else {"input_bound": input_bound}
        return cls(
            model=train.model,
            input_shape=split.input_shape,
            num_classes=split.num_classes,
            loss=str(train.loss),
            model_options={**bound, **train.model_options},
            loss_options={**train.loss_options, **loss_options},
        )

    def _loss(self, contender: Contender) -> tuple[LipschitzLoss, int]:
        options = dict(self.loss_options)
        if contender.plain and "tau" in options:
            options["tau"] = 1.0
        return make_loss(self.loss, self.num_classes, options)


def trained(
    contender: Contender,
    trainer: ComparedTrainer,
    setup: Setup,
    train: TrainConfig,
    split: Split,
    *,
    plan: PrivacyPlan,
    lr: float,
    seed: int,
) -> Session:
    """A new model of the contender's kind after all T steps on the training part: seeded, repeatable, not private.

    `trainer` is the contender's, with its settings; `train` gives optimiser, momentum and schedule.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = setup.build(contender)
        task = Task(
            dataset=TensorDataset(split.train_x, split.train_y),
            loss=setup.loss_for(contender),
            plan=plan,
            optimizer=partial(make_optimizer, train.optimizer, lr=lr, momentum=train.momentum),
            schedule=train.schedule,
            microbatch=max(32, min(512, _BLOCK // sum(p.numel() for p in model.parameters()))),
            seed=seed,
        )
        return trainer.train(model, task)
