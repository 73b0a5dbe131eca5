"""How a table is learnt privately. The one place that decides it: the recipe for tables, or a linear or small net.

Each learns from the rows (N, width) that `ColumnRule` makes, mapped by a public `front`, and y (N,): int64 labels, or
float32 targets in [−1, 1]. `tau` is the temperature of the loss of labels, so that probabilities are those of τ z;
`needs_bounds` says whether every number needs public bounds.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lipdp import nn as lnn
from lipdp.accounting.plan import PrivacyPlan
from lipdp.constraints import Spectral
from lipdp.data import Bounding, Clip, bounding
from lipdp.errors import ParameterError
from lipdp.losses import Huber, LipschitzLoss, TauBCEWithLogits, TauCrossEntropy
from lipdp.models import build
from lipdp.privacy.engine import PrivacyEngine
from lipdp.training.ema import Ema
from lipdp.training.fitted import fit_head
from lipdp.training.recipes import recipe
from lipdp.training.runtime import own_random_state

_TABLE = recipe("", "tabular")

BOUNDED = Clip(-1.0, 1.0)
"""In front of the model where the columns have bounds."""

COLUMNS = bounding(_TABLE["bounding"], **_TABLE["bounding_options"])
"""In front of the model where they have none; their ranges are measured privately."""

_HUBER = 0.5  # in units of half the targets' range: errors beyond it count by their size, not its square
_BATCH = 4096

Learnt: TypeAlias = tuple[Mapping[str, Tensor], PrivacyPlan, float]
"""The weights, the plan they were learnt by, and the ε that was spent."""


@dataclass(frozen=True)
class TableRecipe:
    """The recipe of `lipdp.training.fit_table`: random Fourier features, a private preconditioner, full batches.

    Attributes:
        steps, waves: T, and the number of frequencies.
    """

    steps: int | None = None
    waves: int = 200

    needs_bounds = False
    tau = 1.0

    def network(self, width: int, outputs: int, norm_bound: float) -> nn.Module:
        """The model; its features have norm 1 whatever the rows'."""
        return build("tabular", input_shape=(width,), num_classes=outputs, waves=self.waves)

    def learn(
        self, rows: Tensor, y: Tensor, *, front: Bounding, outputs: int, norm_bound: float, **budget: Any
    ) -> Learnt:
        """As `fit_head`."""
        found = fit_head(
            front(rows), y, _loss(self.tau, y, outputs), bounding=front, outputs=outputs, waves=self.waves,
            steps=self.steps or _TABLE["steps"], **budget,
        )  # fmt: skip
        return found.module.state_dict(), found.plan, found.epsilon


@dataclass(frozen=True)
class NetRecipe:
    """A linear model or a small Lipschitz net; Poisson batches of 4096, or all records; the average of the weights.

    Attributes:
        hidden: neurons of each hidden layer; none is a linear model.
        steps: T.
    """

    hidden: tuple[int, ...] = ()
    steps: int | None = None

    needs_bounds = True
    tau = 16.0
    _radius = 8.0  # of the head's weights on inputs of norm 1: what the model can say; Δ does not depend on it

    def network(self, width: int, outputs: int, norm_bound: float) -> nn.Module:
        """The model, of rows of norm at most `norm_bound`, which are scaled to norm 1."""
        layers: list[nn.Module] = [lnn.InputBound(norm_bound)]
        size, gain = width, 1 / norm_bound
        for neurons in self.hidden:
            layers += [lnn.SpectralLinear(size, neurons, k_coef_lip=gain), lnn.GroupSort2()]
            size, gain = neurons, 1.0
        head = lnn.SpectralLinear(size, outputs, k_coef_lip=gain, constraint=Spectral(self._radius))
        with torch.no_grad():
            head.weight.zero_()
        return nn.Sequential(*layers, head)

    def learn(
        self, rows: Tensor, y: Tensor, *, front: Bounding, outputs: int, norm_bound: float, epsilon: float,
        delta: float, seed: int | None,
    ) -> Learnt:  # fmt: skip
        """Train with `PrivacyEngine`."""
        batch, regression = min(len(rows), _BATCH), y.is_floating_point()
        plan = PrivacyPlan.of(
            dataset_size=len(rows), expected_batch_size=batch, target_epsilon=epsilon, target_delta=delta,
            steps=self.steps or (100 if batch == len(rows) else 300),
        )  # fmt: skip
        with own_random_state(torch.device("cpu")):
            torch.manual_seed(secrets.randbits(63) if seed is None else seed)
            network = self.network(rows.shape[1], outputs, norm_bound)
            optimizer = torch.optim.SGD(network.parameters(), lr=1.0, momentum=0.9)
            engine = PrivacyEngine(plan.accountant, seed=seed)
            _, _, loader, criterion = engine.make_private_with_plan(
                plan, module=network, optimizer=optimizer, criterion=_loss(self.tau, y, outputs),
                dataset=TensorDataset(front(rows), y), gate=None if regression else 0.3, allocation="min_variance",
            )  # fmt: skip
            average = Ema(network, 0.95)
            for xb, yb in loader:
                optimizer.zero_grad()
                criterion(network(xb), yb).backward()
                optimizer.step()
                average.update()
        return average.weights(), engine.plan, engine.get_epsilon(delta)


def choose(hidden: int | Sequence[int] | None, steps: int | None) -> TableRecipe | NetRecipe:
    """The recipe for `hidden` as it may be given: None takes that for tables, 0 a linear model, else a net.

    >>> choose(None, None), choose(0, 5), choose((32, 16), None).hidden
    (TableRecipe(steps=None, waves=200), NetRecipe(hidden=(), steps=5), (32, 16))
    """
    if hidden is None:
        return TableRecipe(steps)
    layers = () if hidden == 0 else tuple(hidden) if isinstance(hidden, Sequence) else (hidden,)
    if not all(isinstance(size, int) and size > 0 and size % 2 == 0 for size in layers):
        raise ParameterError(
            f"hidden={hidden!r}: positive even numbers of neurons are needed, e.g. 64 or (64, 32), or None"
        )
    return NetRecipe(layers, steps)


def _loss(tau: float, y: Tensor, outputs: int) -> LipschitzLoss:
    if y.is_floating_point():
        return Huber(_HUBER)
    return TauBCEWithLogits(tau) if outputs == 1 else TauCrossEntropy(tau)
