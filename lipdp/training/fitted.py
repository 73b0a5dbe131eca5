"""Fit the recipe for tables to arrays: one call, and an object that can be kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lipdp.accounting.plan import PrivacyPlan, protected
from lipdp.data import Bounding, Rescale
from lipdp.data import bounding as named_bounding
from lipdp.errors import DataError, ParameterError
from lipdp.losses import LipschitzLoss
from lipdp.losses.labels import probabilities
from lipdp.models import build
from lipdp.privacy.engine import PrivacyEngine
from lipdp.training import table_recipe
from lipdp.training.choices import make_loss
from lipdp.training.ema import average_of
from lipdp.training.evaluation import outputs
from lipdp.training.recipes import recipe

Array = npt.NDArray[Any] | Tensor
_RECIPE = recipe("", "tabular")


@dataclass(frozen=True)
class TableModel:
    """What was fitted: the map of the columns, the weights, and what they cost.

    Attributes:
        module: from mapped inputs (n, k) to logits, (n, 1) for two classes, else (n, C); the columns' fitted map is in
            its buffers, so `state_dict()` is the whole model. In evaluation mode, on the CPU.
        bounding: the public map in front of it.
        num_classes: C.
        plan: the account as planned. epsilon, delta: what was spent.
        sensitivity: parameter → Δ of the head's steps.
    """

    module: nn.Sequential
    bounding: Bounding
    num_classes: int
    plan: PrivacyPlan
    epsilon: float
    delta: float
    sensitivity: dict[str, float]

    def logits(self, x: Array) -> Tensor:
        """(n, 1) or (n, C) float64. `x`: (n, k) raw."""
        return outputs(self.module, (self.bounding(part) for part in _table(x).split(table_recipe.BATCH)))

    def probabilities(self, x: Array) -> Tensor:
        """(n, C) float64."""
        return probabilities(self.logits(x))

    def statement(self) -> dict[str, Any]:
        """What `privacy.json` says of a run: the plan, the ε spent, and what it protects."""
        return {
            "epsilon": self.epsilon,
            "delta": self.delta,
            **self.plan.as_dict(),
            "planned_steps": self.plan.steps,
            "planned_epsilon": self.epsilon,
            "sensitivity": dict(self.sensitivity),
            "protects": protected(self.plan.unit, self.plan.dataset_size),
        }


def fit_table(
    x: Array,
    y: Array,
    *,
    epsilon: float,
    delta: float,
    num_classes: int,
    bounds: tuple[float | Sequence[float], float | Sequence[float]] | Bounding | None = None,
    class_weight: Sequence[float] | None = None,
    steps: int = _RECIPE["steps"],
    gate: float = _RECIPE["gate"],
    waves: int = 200,
    accountant: str = "prv",
    seed: int | None = None,
    secure: bool = False,
    check_every: int | None = None,
) -> TableModel:
    r"""Fit random Fourier features and a dense head to a table, with (ε, δ)-differential privacy.

    Guarantees: the model (map, weights, and all that is computed from them) is (ε, δ)-DP under adding or removing one
    of the N records; N is public. Histograms of the columns where no bounds are given, a Gram matrix and T full-batch
    steps are events of one account; training/table_recipe.py proves their sensitivities.

    Args:
        x: (N, k) numbers; those that are not finite count as 0.
        y: (N,) labels 0 … C − 1.
        epsilon, delta: the budget.
        num_classes: C ≥ 2, a public fact, never read off the labels.
        bounds: the columns' public ranges (lower, upper), each one number or one per column; or a map of `lipdp.data`.
            None: the map is measured privately.
        class_weight: one public number for each class, for its share of the loss; never its share of the data.
        steps, gate, waves: T, the bound on a record's gradient at the logits, and the number of frequencies.
        accountant: "prv", "pld" or "rdp".
        seed: repeatable noise, for tests: NOT private.
        secure: noise from a cipher.
        check_every: see `PrivacyEngine`.

    Raises:
        DataError: not such arrays. ParameterError, CalibrationError: a value out of range.

    >>> x, y = torch.randn(500, 3), torch.randint(2, (500,))
    >>> fitted = fit_table(x, y, epsilon=1.0, delta=1e-5, num_classes=2, bounds=(-3.0, 3.0), seed=0)
    >>> fitted.probabilities(x).shape, fitted.epsilon <= 1.0
    (torch.Size([500, 2]), True)
    """
    table, labels = _table(x), torch.as_tensor(y)
    if type(num_classes) is not int or num_classes < 2:
        raise ParameterError(f"num_classes={num_classes!r}: a whole number of at least 2 is needed")
    if labels.shape != (len(table),) or labels.is_floating_point() or not len(table):
        raise DataError(
            f"y has shape {tuple(labels.shape)} and {labels.dtype} for {len(table)} rows; give (N,) integers"
        )
    bounding = _bounding(bounds)
    loss, outs = make_loss(
        "bce" if num_classes == 2 else "cross-entropy", num_classes, _weighted(num_classes, class_weight)
    )
    fitted = fit_head(
        bounding(table), labels.long(), loss, bounding=bounding, outputs=outs, epsilon=epsilon, delta=delta,
        steps=steps, gate=gate, waves=waves, accountant=accountant, seed=seed, secure=secure, check_every=check_every,
    )  # fmt: skip
    return replace(fitted, num_classes=num_classes)


def fit_head(
    inputs: Tensor,
    targets: Tensor,
    loss: LipschitzLoss,
    *,
    bounding: Bounding,
    outputs: int,
    epsilon: float,
    delta: float,
    steps: int = _RECIPE["steps"],
    gate: float = _RECIPE["gate"],
    waves: int = 200,
    accountant: str = "prv",
    seed: int | None = None,
    secure: bool = False,
    check_every: int | None = None,
) -> TableModel:
    """`fit_table` for any loss."""
    model: Any = build("tabular", input_shape=tuple(inputs.shape[1:]), num_classes=outputs, waves=waves)
    table_recipe.set_public_map(model[0], bounding)
    plan = PrivacyPlan.of(
        dataset_size=len(inputs), expected_batch_size=len(inputs), steps=steps, target_epsilon=epsilon,
        target_delta=delta, accountant=accountant, shares=table_recipe.measured_shares(bounding),
    )  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=_RECIPE["lr"], momentum=0.9)
    engine = PrivacyEngine(accountant, seed=seed, secure=secure, check_every=check_every)
    phi = torch.zeros(len(inputs), model[0].out_features)  # filled once the map is measured
    _, _, loader, _ = engine.make_private_with_plan(
        plan, module=model[1:], optimizer=optimizer, criterion=loss, dataset=TensorDataset(phi, targets), gate=gate
    )
    preconditioner = table_recipe.Preconditioner(optimizer, model[2].weight)
    parts = inputs.split(table_recipe.BATCH)
    gate = min(gate, loss.lipschitz)
    table_recipe.TableRun(model, preconditioner, bounding, lambda: zip(parts, repeat(None)), gate).measure(engine)
    with torch.no_grad():
        torch.cat([model[0](part) for part in parts], out=phi)
    average = average_of(model, 0.0, tail=_RECIPE["tail"], steps=steps)
    for batch in loader:
        optimizer.zero_grad()
        engine.backward(*batch, microbatch=table_recipe.BATCH)
        optimizer.step()
        average.update()
    account = engine.plan, engine.get_epsilon(delta), delta, dict(engine.sensitivity())
    engine.detach()
    average.apply()
    return TableModel(model.eval(), bounding, outputs, *account)


def _table(x: Array) -> Tensor:
    """(n, k) float32."""
    table = torch.as_tensor(x)
    if table.dim() != 2 or table.is_complex() or not table.shape[1]:
        raise DataError(f"x has shape {tuple(table.shape)} and {table.dtype}; give a table of numbers, (N, k)")
    return table.to(torch.float32)


def _bounding(bounds: Any) -> Bounding:
    if bounds is None:
        return named_bounding(_RECIPE["bounding"], **_RECIPE["bounding_options"])
    if callable(bounds):
        made: Bounding = bounds
        return made
    if not isinstance(bounds, tuple) or len(bounds) != 2:
        raise ParameterError(f"bounds={bounds!r}: give (lower, upper), each one number or one per column, or a map")
    lower, upper = (float(b) if isinstance(b, (int, float)) else tuple(map(float, b)) for b in bounds)
    return Rescale(lower, upper)


def _weighted(num_classes: int, class_weight: Sequence[float] | None) -> dict[str, Any]:
    """Options of the loss. For two classes the ratio of the weights alone matters: the gate sets the scale."""
    if class_weight is None:
        return {}
    if len(class_weight) != num_classes or not all(w > 0 for w in class_weight):
        raise ParameterError(
            f"class_weight={class_weight!r}: give {num_classes} public numbers > 0, one for each class"
        )
    if num_classes == 2:
        return {"pos_weight": class_weight[1] / class_weight[0]}
    return {"weight": list(class_weight)}
