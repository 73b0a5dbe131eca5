"""How a table is learnt privately: a linear or small net, its loss, its steps. The one place that decides it."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lipdp import nn as lnn
from lipdp.accounting.plan import PrivacyPlan
from lipdp.constraints import Spectral
from lipdp.errors import ParameterError
from lipdp.losses import LipschitzLoss
from lipdp.privacy.engine import PrivacyEngine
from lipdp.training.ema import Ema
from lipdp.training.runtime import own_random_state

Weights = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Learnt:
    """What was learnt: plain arrays, nothing of the training. `privacy`: the plan as plain values, with ε and δ."""

    weights: Weights
    privacy: Mapping[str, Any]


@dataclass(frozen=True)
class TableRecipe:
    """Full batches while the table is small, Poisson batches of at most 4096 beyond; the average of the weights.

    Every step of a full batch has the same σ per √T, so few large steps lose little; with subsampling more steps pay.

    Attributes:
        hidden: neurons of each hidden layer; none is a linear model.
        batch_size, steps: B and T; None decides them from the public N.
        lr, momentum, ema: of SGD and of the averaged weights.
        radius: of the head's weights, on inputs of norm 1. It bounds what the model can say; Δ does not depend on it.
        tau: temperature of the loss. gate: bound on every record's gradient at the logits.
    """

    hidden: tuple[int, ...] = ()
    batch_size: int | None = None
    steps: int | None = None
    lr: float = 1.0
    momentum: float = 0.9
    ema: float = 0.95
    radius: float = 1.0
    tau: float = 16.0
    gate: float | None = 0.3

    def network(self, width: int, outputs: int, input_bound: float) -> nn.Module:
        """The model of rows of norm at most `input_bound`, which are scaled to norm 1."""
        layers: list[nn.Module] = [lnn.InputBound(input_bound)]
        size, gain = width, 1 / input_bound
        for neurons in self.hidden:
            layers += [lnn.SpectralLinear(size, neurons, bias=False, k_coef_lip=gain), lnn.GroupSort2()]
            size, gain = neurons, 1.0
        head = lnn.SpectralLinear(size, outputs, bias=False, k_coef_lip=gain, constraint=Spectral(self.radius))
        with torch.no_grad():
            head.weight.zero_()
        return nn.Sequential(*layers, head)

    def plan(self, records: int, *, epsilon: float, delta: float) -> PrivacyPlan:
        """q, T and σ, from the public number of records."""
        batch = min(records, self.batch_size or 4096)
        steps = self.steps or (100 if batch == records else 300)
        return PrivacyPlan.of(
            dataset_size=records, expected_batch_size=batch, steps=steps, target_epsilon=epsilon, target_delta=delta
        )

    def learn(
        self, network: nn.Module, plan: PrivacyPlan, x: Tensor, y: Tensor, loss: LipschitzLoss, *, seed: int | None
    ) -> Learnt:
        """Train on rows `x` (N, width) and targets `y` (N,).

        Guarantee: the weights are (ε, δ)-DP for the records, as `PrivacyEngine` accounts them; with a seed the draws can
        be repeated, and the run is not private.
        """
        with own_random_state(torch.device("cpu")):
            torch.manual_seed(secrets.randbits(63) if seed is None else seed)
            optimizer = torch.optim.SGD(network.parameters(), lr=self.lr, momentum=self.momentum)
            engine = PrivacyEngine(plan.accountant, seed=seed)
            _, _, loader, criterion = engine.make_private_with_plan(
                plan, module=network, optimizer=optimizer, criterion=loss, dataset=TensorDataset(x, y), gate=self.gate,
                allocation="min_variance",
            )  # fmt: skip
            average = Ema(network, self.ema)
            for xb, yb in loader:
                optimizer.zero_grad()
                if len(xb):
                    criterion(network(xb), yb).backward()
                optimizer.step()
                average.update()
        weights = {name: value.numpy().astype(np.float32) for name, value in average.weights().items()}
        delta = plan.target_delta
        if delta is None:
            raise ParameterError("the plan has no δ")
        spent = {"epsilon": engine.get_epsilon(delta), "delta": delta}
        return Learnt(weights, {**engine.plan.as_dict(), **spent})


def read_hidden(hidden: int | Sequence[int] | None) -> tuple[int, ...]:
    """`hidden` as it may be given: None or 0 for a linear model, a number for one layer, a sequence for several.

    >>> read_hidden(None), read_hidden(64), read_hidden([32, 16])
    ((), (64,), (32, 16))
    """
    layers = () if hidden is None or hidden == 0 else (hidden,) if isinstance(hidden, int) else tuple(hidden)
    if not all(isinstance(size, int) and size > 0 and size % 2 == 0 for size in layers):
        raise ParameterError(f"hidden={hidden!r}: even numbers of neurons are needed, e.g. 64 or (64, 32), or None")
    return layers
