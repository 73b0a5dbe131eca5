"""A private regressor of tables, with scikit-learn's habits."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lipdp.data.columns import scaled
from lipdp.data.listed import as_numbers
from lipdp.errors import ParameterError
from lipdp.estimators.base import PrivateEstimator
from lipdp.estimators.columns import bounds_of_data, read_bounds
from lipdp.estimators.scikit import RegressorMixin, column_or_1d


@dataclass(eq=False, repr=False)
class PrivateRegressor(RegressorMixin, PrivateEstimator):
    """A differentially private regressor of tables, for targets in a public interval.

    As `PrivateClassifier`, with targets clipped to `target_bounds` and mapped to [−1, 1], and Huber's loss, whose slope
    is bounded whatever the target. Predictions lie in the bounds.

    Guarantees: as `PrivateClassifier`; the targets' bounds count as public too, and are read off the data if None.

    Args:
        target_bounds: public (low, high) of y.
        epsilon, delta, bounds, categories, missing, hidden, steps, random_state: as for `PrivateClassifier`.

    >>> X = np.random.default_rng(0).uniform(size=(2000, 2))
    >>> reg = PrivateRegressor(bounds=(0, 1), target_bounds=(0, 2)).fit(X, X[:, 0] + X[:, 1])
    >>> reg.score(X, X[:, 0] + X[:, 1]) > 0.7
    True
    """

    target_bounds: tuple[float, float] | None = field(default=None, kw_only=True)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.regressor_tags.poor_score = True  # ε = 1 on the hundred records of a check leaves little but noise
        return tags

    def fit(self, X: Any, y: Any) -> PrivateRegressor:
        """Learn from records `X` (N, columns), an array or a frame, and numbers `y` (N,); NaN is no number."""
        x = self._read(X, reset=True)
        if y is None:
            raise ParameterError("requires y to be passed, but the target y is None: one number a record")
        targets = as_numbers(column_or_1d(np.asarray(y, dtype=object), warn=True))
        if len(targets) != len(x):
            raise ParameterError(f"{len(x)} records have {len(targets)} targets; give one a record")
        self._learn_columns(x)
        if self.target_bounds is None:
            (found,) = bounds_of_data(targets[:, None], [0], "target_bounds").values()
            self.leaks_.append("the bounds of the targets were taken from the data")
        else:
            (found,) = read_bounds(self.target_bounds, [0], ["y"], 1).values()
        self.target_bounds_ = found
        y_in = torch.from_numpy(scaled(targets, *found).astype(np.float32))
        self._learn(x, y_in, 1)
        return self

    def predict(self, X: Any) -> npt.NDArray[np.float64]:
        """(N,) numbers in `target_bounds_`."""
        outputs = self._outputs(X)[:, 0].clip(-1, 1)
        low, high = self.target_bounds_
        return low + (outputs + 1) * (high - low) / 2

    def _public(self) -> str:
        return f"{super()._public()}, the bounds of the targets"
