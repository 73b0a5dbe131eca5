"""The recipe for tables: a private map of the columns, a private preconditioner, and a dense head behind a gate.

Every release is an event of the engine's one account: the *histograms* of the columns, the *Gram matrix* of the
features, and the T steps of the head. With μ the Gaussian mechanism that the whole budget is like, μ² is shared 3 % to
87.3 %, and 9.7 % to the Gram matrix. The constants were chosen on public benchmarks (`docs/tables.md`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lipdp.accounting.plan import PrivacyPlan
from lipdp.data import DataSplit
from lipdp.data.scaling import Bounding, Clip, Rescale, SignedLog, Tanh
from lipdp.errors import CheckpointError, ParameterError
from lipdp.nn.table import BINS, TableFeatures
from lipdp.privacy.engine import PrivacyEngine

Rows: TypeAlias = Callable[[], Iterator[tuple[Tensor, Tensor | None]]]
"""All training records in batches: inputs (n, k), and what each counts, (n,); None: 1."""

HISTOGRAM, GRAM = "histogram", "gram"
BATCH = 4096
_HISTOGRAM_SHARE, _GRAM_SHARE = 0.03, 0.097
_CUTOFF, _PRIOR, _TRUST = 1.5, 6.0, 20.0  # in noise stds of a bin: what counts as empty; the prior's mass; in ranks
_UNKNOWN_RANGE = 5.0  # of columns that were standardised by public constants
_SLACK = 1 + 1e-9  # covers the float64 rounding of what one record adds


def measured_shares(bounding: Bounding) -> Mapping[str, float]:
    """What is measured, and each one's share of μ². Columns with public ranges need no histogram."""
    gram = {GRAM: _GRAM_SHARE}
    return {HISTOGRAM: _HISTOGRAM_SHARE, **gram} if isinstance(bounding, SignedLog) else gram


# --- the map of the columns -------------------------------------------------------------------------------------------


def set_public_map(features: TableFeatures, bounding: Bounding) -> None:
    """The columns' map before anything is measured: from what the inputs' own map says of their range.

    A signed logarithm is taken back and done again at the scale 1/10; an interval [a, b] goes to [−√3, √3] (unit
    variance where values are uniform); without an interval inputs stay as they are, up to ±5.
    """
    if isinstance(bounding, SignedLog):
        features.set_(bounding.limit, features.values)
        values = SignedLog()(bounding.inverse(features.edges()))
        features.set_(bounding.limit, values.expand(features.columns, -1))
        return
    limit = _range_of(bounding)
    features.set_(limit or _UNKNOWN_RANGE, features.values)
    values = features.edges() * (math.sqrt(3) / limit if limit else 1)
    features.set_(limit or _UNKNOWN_RANGE, values.expand(features.columns, -1))


def _range_of(bounding: Bounding) -> float | None:
    """The largest absolute value behind a map; None where it has none."""
    if isinstance(bounding, (Rescale, Tanh)):
        return 1.0
    if isinstance(bounding, Clip):
        ends = [bounding.lower, bounding.upper]
        return max(abs(v) for end in ends for v in (end if isinstance(end, tuple) else (end,)))
    return None


@torch.no_grad()
def fit_map(engine: PrivacyEngine, features: TableFeatures, bounding: SignedLog, rows: Rows) -> None:
    r"""Measure the columns' histograms and make of them the columns' map.

    Sensitivity: a record is in one of the 128 bins of each of the k columns, whatever its values, so that it moves the
    k histograms side by side by a vector of k ones: `√k`. An owner whose records count w_i, Σ w_i ≤ 1, moves them by
    `‖Σ w_i v_i‖ ≤ Σ w_i √k ≤ √k`.

    With s the noise std of a bin, bins below 1.5 s are set to 0 and a public prior, N(0, 1) of the raw values, is added
    with a mass of 6 s. The distribution function F gives ranks `√12 (F − ½)`, which are mixed with the public signed
    logarithm by `α = min(1, 20 s/N)`. All of this is post-processing.
    """
    k = features.columns
    counts = torch.zeros(k * BINS, dtype=torch.float64, device=features.values.device)
    offsets = torch.arange(k, device=counts.device) * BINS
    for x, weight in rows():
        index, _ = features.place(x.to(features.values))
        ones = torch.ones(len(x), dtype=torch.float64) if weight is None else weight.double()
        counts.index_add_(0, (index + offsets).flatten(), ones.to(counts.device).repeat_interleave(k))
    std = engine.measure_(HISTOGRAM, counts, sensitivity=math.sqrt(k) * _SLACK)
    raw = bounding.inverse(features.edges())
    prior = (0.5 * (1 + torch.erf(raw / math.sqrt(2)))).diff()
    counts = counts.view(k, BINS)
    mass = torch.where(counts < _CUTOFF * std, 0.0, counts) + _PRIOR * std * prior
    share = torch.cat((torch.zeros_like(mass[:, :1]), mass.cumsum(1) / mass.sum(1, keepdim=True)), dim=1)
    alpha = min(1.0, _TRUST * std / engine.plan.dataset_size)
    features.set_(float(features.limit), alpha * SignedLog()(raw) + (1 - alpha) * math.sqrt(12) * (share - 0.5))


# --- the preconditioner -----------------------------------------------------------------------------------------------


@torch.no_grad()
def measure_gram(engine: PrivacyEngine, features: nn.Module, rows: Rows) -> tuple[Tensor, float]:
    r"""Measure G = Σ φφᵀ.

    Sensitivity: released are the d(d + 1)/2 numbers `(G_ii, √2 G_ij)`, i < j. Of one record they are an isometric
    image of the matrix φφᵀ, whose norm is `‖φφᵀ‖_F = ‖φ‖² ≤ 1`: 1 where ‖φ‖ = 1, and ≤ Σ w_i ≤ 1 for an owner.
    The factor √2 matters: of the upper triangle *without* it the norm is `√((‖φ‖⁴ + Σ φ_i⁴)/2)`, which is also at
    most 1 and reaches 1 at unit vectors, so noise of the same std would be sound on all entries, but √2 times too large
    off the diagonal. The matrix that comes out has noise of std s on the diagonal, s/√2 off it, and is symmetric.
    ‖φ‖ ≤ 1 holds of the float32 numbers themselves (`clip_norm`); products and sums are taken in float64.

    Args:
        engine: after `make_private`, with a plan that measures `GRAM`.
        features: gives (n, d) float32 rows of norm at most 1.
        rows: all training records.

    Returns:
        (d, d) float64, and the std of the noise off the diagonal.
    """
    total = torch.zeros((), dtype=torch.float64)
    for x, weight in rows():
        phi = features(x).double()
        scaled = phi if weight is None else phi * weight.to(phi)[:, None]
        total = total.to(phi) + scaled.T @ phi
    upper = torch.triu_indices(len(total), len(total), device=total.device)
    scale = torch.where(upper[0] == upper[1], 1.0, math.sqrt(2)).to(total)
    released = total[upper[0], upper[1]] * scale
    std = engine.measure_(GRAM, released, sensitivity=_SLACK)
    gram = torch.zeros_like(total)
    gram[upper[0], upper[1]] = released / scale
    return gram + gram.T - torch.diag(gram.diagonal()), std / math.sqrt(2)


class Preconditioner:
    r"""Replaces the noisy mean gradient g of a dense layer by `N η g P` in front of every step; post-processing.

    `P = (G₊ + ℓ)⁻¹` with `ℓ = 2 s √d`, the norm of the noise in G, and `η = 0.1 min(1.5 μ ℓ/(T c), 16)`: a
    smaller step where the head's noise, of std `c √T/μ`, would dominate. G₊ has no negative eigenvalues.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, weight: Tensor) -> None:
        self._weight, self.matrix = weight, torch.eye(weight.shape[1], device=weight.device)
        optimizer.register_step_pre_hook(self._apply)

    def _apply(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self._weight.grad is not None:
            self._weight.grad = self._weight.grad @ self.matrix

    def set_(self, gram: Tensor, std: float, plan: PrivacyPlan, gate: float) -> None:
        """From the noisy Gram matrix and the std of its noise."""
        ridge = 2 * std * math.sqrt(len(gram))
        mu = plan.subsampling.mu(plan.noise_multiplier)
        rate = 0.1 * min(1.5 * mu * ridge / (plan.steps * gate), 16.0)
        values, vectors = torch.linalg.eigh(gram)
        inverse = (vectors / (values.clamp(min=0) + ridge)) @ vectors.T
        self.matrix = (inverse * (rate * plan.dataset_size)).to(self.matrix)

    def state_dict(self) -> dict[str, Tensor]:
        """The matrix."""
        return {"matrix": self.matrix}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state; CheckpointError if it is of another layer."""
        matrix = state.get("matrix")
        if not isinstance(matrix, Tensor) or matrix.shape != self.matrix.shape or not bool(matrix.isfinite().all()):
            raise CheckpointError("the preconditioner is of another model")
        self.matrix = matrix.to(self.matrix)


def table_model(model: nn.Module) -> tuple[TableFeatures, nn.Sequential, Tensor] | None:
    """The columns' features, the features of unit norm, and the head's weight; None where a model is none of a table.

    >>> table_model(torch.nn.Linear(2, 1)) is None
    True
    """
    if not (isinstance(model, nn.Sequential) and len(model) == 3):
        return None
    features, norm, head = model
    if not (isinstance(features, TableFeatures) and isinstance(head, nn.Linear)):
        return None
    weight: Any = head.weight
    return features, nn.Sequential(features, norm), weight


@dataclass(frozen=True)
class TableRun:
    """What a run of the recipe has beside model and optimiser."""

    model: nn.Module
    preconditioner: Preconditioner
    bounding: Bounding
    rows: Rows
    gate: float

    def measure(self, engine: PrivacyEngine) -> None:
        """Take the measurements of the plan, those that are left, and set the model's map and the preconditioner."""
        parts = table_model(self.model)
        if parts is None:
            raise ParameterError("the model is not tabular: build it with lipdp.models.build('tabular', ...)")
        features, unit, _ = parts
        left = {m.name for m in engine.plan.measurements} - set(engine.measured)
        if HISTOGRAM in left and isinstance(self.bounding, SignedLog):
            fit_map(engine, features, self.bounding, self.rows)
        if GRAM in left:
            self.preconditioner.set_(*measure_gram(engine, unit, self.rows), engine.plan, self.gate)


def rows_of(split: DataSplit, device: torch.device | str = "cpu") -> Rows:
    """The training records of a split; those of an owner count 1 together."""
    weights = None
    if split.train_owner is not None:
        _, owner, counts = split.train_owner.unique(return_inverse=True, return_counts=True)
        weights = 1.0 / counts[owner].double()

    def rows() -> Iterator[tuple[Tensor, Tensor | None]]:
        dataset = split.training_dataset(device)
        inputs: Iterable[Tensor] = (x for x, _ in DataLoader(dataset, batch_size=BATCH))
        if isinstance(dataset, TensorDataset):
            inputs = dataset.tensors[0].split(BATCH)
        start = 0
        for x in inputs:
            yield x.to(device), None if weights is None else weights[start : start + len(x)]
            start += len(x)

    return rows
