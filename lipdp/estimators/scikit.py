"""What is used of scikit-learn, or one line that says how to get it."""

from __future__ import annotations

from lipdp.errors import ParameterError

try:
    from sklearn.base import BaseEstimator, ClassifierMixin, OneToOneFeatureMixin, RegressorMixin, TransformerMixin
    from sklearn.utils import check_random_state
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import check_is_fitted, column_or_1d, validate_data
except ImportError as error:
    raise ParameterError(
        f'lipdp.estimators needs scikit-learn 1.6 or newer ({error}): pip install "lipdp[estimators]"'
    ) from error

__all__ = [
    "BaseEstimator",
    "ClassifierMixin",
    "OneToOneFeatureMixin",
    "RegressorMixin",
    "TransformerMixin",
    "check_classification_targets",
    "check_is_fitted",
    "check_random_state",
    "column_or_1d",
    "validate_data",
]
