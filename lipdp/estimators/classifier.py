"""A private classifier of tables, with scikit-learn's habits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lipdp.batches.records import NO_LABEL, looked_at
from lipdp.certify.certificate import certify
from lipdp.errors import ParameterError
from lipdp.estimators.base import PrivateEstimator, public_list
from lipdp.estimators.recipe import choose
from lipdp.estimators.scikit import ClassifierMixin, check_classification_targets, column_or_1d
from lipdp.losses.labels import answers_of, probabilities


@dataclass(eq=False, repr=False)
class PrivateClassifier(ClassifierMixin, PrivateEstimator):
    """A differentially private classifier of tables: the recipe for tables, or a linear or small Lipschitz net.

    Numbers are mapped to [−1, 1] by public bounds, categories to one-hot columns by public lists. Then random Fourier
    features with a linear head (`lipdp.training.fit_table`), or with `hidden` a net, are trained with noise on the sum
    of the gradients, whose norms the layers bound.

    Guarantees: the fitted model, and whatever is computed from it, is (`epsilon_`, `delta_`)-DP for each record, input
    and label together. The number of records, the columns and the set of labels are taken as public. Where `bounds` is
    None the columns' ranges are measured privately, within the same ε. Where they are read off the data (bounds="data",
    or None for a net), or with a `random_state`, by which anybody can draw the noise again, a `PrivacyLeakWarning` says
    that the fit is not covered, and `epsilon_` is infinite. Each fit costs ε again: `cross_val_score` with k folds
    costs up to kε, and a grid search that times the size of the grid; their scores are not covered at all.
    Nor is what a step before it in a pipeline learns: `StandardScaler` reads the private data, `PublicScaler` does not.

    Args:
        epsilon, delta: the budget; delta None takes 1e-5, or the power of ten below 1/N if that is smaller.
        bounds: public: b for [−b, b], a pair (low, high) for all columns, one pair a column, or a mapping from columns
            (by name or number) to either. What lies outside is clipped. None measures the ranges privately.
        categories: public: column → list of its values. Others count as none of them.
        classes: public: the labels; records with another one count as records without, but where two or more of the
            first 16 looked at have one, `fit` says so. By default those in y.
        missing: what a missing number is: "middle" of its bounds, or "indicator", the same with a column that says so.
        hidden: neurons of the hidden layers of a net, e.g. 64 or (64, 32), or 0 for a linear model; None takes the
            recipe for tables, which is better on most tables.
        steps: noisy steps; None takes the recipe's.
        random_state: repeats the fit exactly, for tests: NOT private.

    Attributes:
        classes_, n_features_in_, feature_names_in_: as scikit-learn has them.
        epsilon_, delta_, is_private_, leaks_, privacy_: the account; `report()` says it in words.
        bounds_, categories_, weights_: the rule and the weights.

    Raises:
        ParameterError: an argument out of range. CalibrationError: no noise reaches ε.

    >>> X = np.random.default_rng(0).uniform(size=(500, 2))
    >>> clf = PrivateClassifier(epsilon=1.0, bounds=(0, 1)).fit(X, X[:, 0] > 0.5)
    >>> clf.epsilon_ <= 1, clf.score(X, X[:, 0] > 0.5) > 0.8
    (True, True)

    Source: Béthune et al. (2024), "DP-SGD without clipping".
    """

    classes: Sequence[Any] | None = field(default=None, kw_only=True)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.poor_score = True  # ε = 1 on the hundred records of a check leaves little but noise
        return tags

    def fit(self, X: Any, y: Any) -> PrivateClassifier:
        """Learn from records `X` (N, columns), an array or a frame, and labels `y` (N,)."""
        x = self._read(X, reset=True)
        labels = self._labels(y, len(x))
        self._learn_columns(x)
        self.tau_ = choose(self.hidden, self.steps).tau
        self._learn(x, torch.from_numpy(labels), 1 if len(self.classes_) == 2 else len(self.classes_))
        return self

    def _labels(self, y: Any, count: int) -> npt.NDArray[np.int64]:
        """(N,) places in `classes_`; `NO_LABEL` for what is not among the public ones."""
        if y is None:
            raise ParameterError("requires y to be passed, but the target y is None: one label a record")
        public = public_list("classes", self.classes)
        y = column_or_1d(y if public is None else np.asarray(y, dtype=object), warn=True)  # else one text makes texts
        if public is None:
            if y.dtype.kind == "f" and not np.isfinite(y).all():
                raise ParameterError("Input y contains infinity or NaN: name the public labels in classes")
            check_classification_targets(y)
        if len(y) != count:
            raise ParameterError(f"{count} records have {len(y)} labels; give one a record")
        self.classes_ = np.unique(y) if public is None else public
        if len(self.classes_) < 2:
            raise ParameterError(
                f"y holds 1 class, {self.classes_.tolist()}: name the public labels in classes, of which there"
                " are two or more"
            )
        known = {label: i for i, label in enumerate(self.classes_.tolist())}
        places = np.array([_place(known, label) for label in y.tolist()], dtype=np.int64)
        if int((places[looked_at(count)] == NO_LABEL).sum()) > 1:
            kinds = ", ".join(sorted({type(label).__name__ for label in y.tolist()}))
            raise ParameterError(
                f"classes={self.classes_.tolist()} are not the labels in y, which are of type {kinds}: list in classes"
                " every label that y may hold, written as in y"
            )
        return places

    def decision_function(self, X: Any) -> npt.NDArray[np.float64]:
        """Log-odds of the second of two classes (N,), or logits (N, classes); at the temperature of the loss."""
        scores = self._outputs(X) * self.tau_
        return scores[:, 0] if scores.shape[1] == 1 else scores

    def predict_proba(self, X: Any) -> npt.NDArray[np.float64]:
        """Probabilities (N, classes): σ or softmax of `decision_function`."""
        found: npt.NDArray[np.float64] = probabilities(torch.from_numpy(self._outputs(X)), self.tau_).numpy()
        return found

    def predict(self, X: Any) -> npt.NDArray[Any]:
        """The most likely label of every record (N,)."""
        places = answers_of(torch.from_numpy(self._outputs(X)))
        chosen: npt.NDArray[Any] = self.classes_[places.numpy()]
        return chosen

    def certified_radius(self, X: Any) -> npt.NDArray[np.float64]:
        """(N,) radii r: no change of a record's columns of total size at most r changes its predicted label.

        The size is √Σ d², where d is the change of a number in units of half its bounds' range (a change from bound to
        bound is 2), and √2 for a change from one category to another.

        Guarantee: as `lipdp.certify.certify`, deterministic, rounding included.

        >>> X = np.random.default_rng(0).uniform(size=(500, 2))
        >>> clf = PrivateClassifier(bounds=(0, 1)).fit(X, X[:, 0] > 0.5)
        >>> near, far = clf.certified_radius([[0.45, 0.5], [0.0, 0.5]])
        >>> bool(near < far <= 1.2)
        True
        """
        rows = self._rows(X)
        network = self._network()
        with torch.no_grad():
            logits = network(self._front(rows))
        radii: npt.NDArray[np.float64] = certify(network, rows, answers_of(logits), maps=[self._front]).radii.numpy()
        return radii

    def _public(self) -> str:
        return f"{super()._public()}, the labels"


def _place(known: dict[Any, int], label: Any) -> int:
    try:
        return known.get(label, NO_LABEL)
    except TypeError:  # a list, say, which is no label
        return NO_LABEL
