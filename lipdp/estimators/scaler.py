"""A transformer that scales columns by public bounds, so that a pipeline looks at no data before the private step."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from lipdp.data.columns import scaled
from lipdp.estimators.columns import bounds_of_data, read_bounds
from lipdp.estimators.scikit import (
    BaseEstimator,
    OneToOneFeatureMixin,
    TransformerMixin,
    check_is_fitted,
    validate_data,
)


class PublicScaler(OneToOneFeatureMixin, TransformerMixin, BaseEstimator):
    """Columns of numbers onto [−1, 1] by public bounds: 2 (clip(x, a, b) − a)/(b − a) − 1; NaN stays NaN.

    What `StandardScaler` and `MinMaxScaler` learn is read off the private data and covered by no ε. This learns
    nothing: the map is 2/(b − a)-Lipschitz and acts record by record.

    Args:
        bounds: as for `PrivateClassifier`. None reads them off the data, with a `PrivacyLeakWarning`.

    >>> PublicScaler(bounds=(0, 120)).fit_transform([[30.0], [500.0]]).tolist()
    [[-0.5], [1.0]]
    """

    def __init__(self, bounds: Any = None) -> None:
        self.bounds = bounds

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        return tags

    def fit(self, X: Any, y: Any = None) -> PublicScaler:
        """Read the bounds; of `X` the columns alone, unless there are none."""
        x = validate_data(self, X, dtype=np.float64, ensure_all_finite=False)
        columns = range(x.shape[1])
        if self.bounds is None:
            self.bounds_ = bounds_of_data(x, columns, "bounds")
        else:
            self.bounds_ = read_bounds(self.bounds, columns, getattr(self, "feature_names_in_", None), x.shape[1])
        return self

    def transform(self, X: Any) -> npt.NDArray[np.float64]:
        """(N, columns), in [−1, 1]."""
        check_is_fitted(self)
        x = validate_data(self, X, dtype=np.float64, ensure_all_finite=False, reset=False)
        return np.stack([scaled(x[:, j], *pair) for j, pair in self.bounds_.items()], axis=1)
