"""What every trainer of the comparison is given, and what it gives back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lipdp.accounting.events import Event
from lipdp.accounting.plan import PrivacyPlan
from lipdp.batches.loader import BatchLoader
from lipdp.batches.rows import plain
from lipdp.batches.samplers import PoissonSampler
from lipdp.errors import ParameterError
from lipdp.losses import LipschitzLoss
from lipdp.nn import GradientGate
from lipdp.training.choices import make_scheduler

MakeOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
Grid = Mapping[str, Sequence[Any]]


@dataclass(frozen=True, kw_only=True)
class Task:
    """The same for every trainer: data, loss, plan and optimiser.

    Attributes:
        dataset: N records, inputs and targets, on the model's device.
        loss: per sample, summed over the batch; the sum is divided by the public B.
        plan: B, T, q and the σ of everything a step releases, of Poisson batches of the dataset's records. A
            non-private trainer draws the same batches and leaves σ alone.
        microbatch: rows a forward pass, or None for the whole batch: what bounds the memory of per-sample gradients.
            All views of a record go through together.
        views: K: an input of the dataset is K views of its record, (K, *features), and a record's gradient the mean of
            theirs.
        seed: repeatable batches and noise: NOT private.
    """

    dataset: TensorDataset
    loss: LipschitzLoss
    plan: PrivacyPlan
    optimizer: MakeOptimizer
    schedule: str = "constant"
    microbatch: int | None = None
    views: int = 1
    seed: int | None = None

    def __post_init__(self) -> None:
        drawn = (self.plan.dataset_size, self.plan.sampling, self.plan.unit, self.plan.bands)
        if drawn != (len(self.dataset), "poisson", "record", 1) or self.plan.truncated_batch_size is not None:
            raise ParameterError(
                f"the plan is for {drawn[0]} {drawn[2]}s, {drawn[1]}, bands={drawn[3]}; trainers are compared on"
                f" Poisson batches of all {len(self.dataset)} records, with independent noise"
            )

    @property
    def batch_size(self) -> int:
        """B."""
        return self.plan.expected_batch_size

    def loader(self) -> BatchLoader:
        """Poisson batches, drawn as the private engine draws them."""
        plan = self.plan
        sampler = PoissonSampler(plan.dataset_size, sampling_rate=plan.sampling_rate, steps=plan.steps, seed=self.seed)
        return BatchLoader(self.dataset, sampler, views=self.views)

    def pieces(self, x: Tensor, y: Tensor) -> Sequence[tuple[Tensor, Tensor]]:
        """A batch in pieces of at most `microbatch` rows, and a record at least; an empty batch has none.

        They are plain tensors: who clips has no use for the rows that the loader's tensors follow, which takes time.
        """
        x, y = plain(x), plain(y)
        size = self.views * max(self.microbatch // self.views, 1) if self.microbatch else max(len(x), 1)
        return [piece for piece in zip(x.split(size), y.split(size), strict=True) if len(piece[0])]


def ladder(middle: float, rungs: int = 4) -> tuple[float, ...]:
    """`middle`, 1 or 3 times a power of ten, and so many values on both sides, about three times apart.

    >>> ladder(0.1, 3)
    (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
    """
    values = [float(f"{digit}e{power}") for power in range(-12, 13) for digit in (1, 3)]
    place = values.index(middle)
    return tuple(values[place - rungs : place + rungs + 1])


class Session(ABC):
    """A model in training: `for x, y in session.loader: session.step(x, y)`, then `close`, which leaves a plain module.

    `event` is what one step costs; None if it is not private.
    """

    model: nn.Module
    loader: BatchLoader
    optimizer: torch.optim.Optimizer
    event: Event | None

    @abstractmethod
    def step(self, x: Tensor, y: Tensor) -> None:
        """One step on one batch of the loader, which may be empty."""

    @abstractmethod
    def close(self) -> None:
        """Take the hooks off the model."""


@dataclass(frozen=True)
class ComparedTrainer(ABC):
    """A way to train, with its settings: a frozen dataclass that starts sessions.

    Attributes:
        words: what it does, for a legend. private: whether its steps have an ε.
        lipschitz, plain: whether it trains models with certified norms, and unconstrained ones.
        grid: setting → values that `compare utility` searches, from the middle on.
    """

    name: ClassVar[str]
    words: ClassVar[str]
    private: ClassVar[bool] = True
    lipschitz: ClassVar[bool] = True
    plain: ClassVar[bool] = True
    grid: ClassVar[Grid]

    @property
    def gain(self) -> float:
        """By what it multiplies a gradient of norm 1 that it keeps: a searched learning rate is divided by it."""
        return 1.0

    @abstractmethod
    def start(self, model: nn.Module, task: Task) -> Session:
        """Begin to train the model, in place.

        Raises:
            LipdpError: this trainer cannot train this model, and why.
        """

    def train(self, model: nn.Module, task: Task) -> Session:
        """All T steps."""
        session = self.start(model, task)
        session.model.train()
        scheduler = make_scheduler(task.schedule, session.optimizer, steps=task.plan.steps)
        try:
            for x, y in session.loader:
                session.step(x, y)
                scheduler.step()
        finally:
            session.close()
        return session


def remove_gates(model: nn.Module) -> list[tuple[nn.Module, str, Any]]:
    """The identity in place of every cotangent gate, no weight gates; (owner, name, gate) of each, for `put_back`.

    A gate is the identity forwards, so the model computes the same. Behind it a sample's gradient is not linear in the
    sample's weight in the loss, on which ghost clipping relies: it clips by weighting the loss with C/‖g‖, and a gate
    would then let more than C through. Under the other ways of clipping a gate only adds a bias.
    """
    found: list[tuple[nn.Module, str, Any]] = []
    for parent in list(model.modules()):
        if getattr(parent, "weight_gate", None) is not None:
            found.append((parent, "weight_gate", parent.weight_gate))
            parent.weight_gate = None  # type: ignore[assignment]
        for name, child in list(parent.named_children()):
            if isinstance(child, GradientGate):
                setattr(parent, name, nn.Identity())
                found.append((parent, name, child))
    return found


def put_back(gates: Iterable[tuple[nn.Module, str, Any]]) -> None:
    """Undo `remove_gates`."""
    for parent, name, gate in gates:
        setattr(parent, name, gate)
