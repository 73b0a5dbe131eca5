"""What the private estimators share: reading tables by the public rule, the fit, the account, and what is kept of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from lipdp.errors import ParameterError, RefusedMethodError
from lipdp.estimators.columns import (
    MISSING,
    ColumnRule,
    bounds_of_data,
    label_of,
    read_bounds,
    read_categories,
)
from lipdp.estimators.recipe import TableRecipe, read_hidden
from lipdp.estimators.scikit import BaseEstimator, check_array, check_is_fitted, check_random_state, validate_data
from lipdp.losses import LipschitzLoss
from lipdp.training.config import default_delta

_SEEDS = 2**31 - 1


class PrivateEstimator(BaseEstimator):
    """The fit of a private model of a table, for `PrivateClassifier` and `PrivateRegressor`.

    What a fit keeps is plain: arrays of weights, the public rule, the account. No generator, key, optimiser or record is
    among it, so a pickle of a fitted estimator holds what ε covers and nothing else.
    """

    epsilon: float
    delta: float | None
    bounds: Any
    categories: Any
    missing: str
    hidden: Any
    recipe: TableRecipe | None
    random_state: Any

    _recipe = TableRecipe()

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True  # missing values have a public rule, and no record raises an error
        tags.input_tags.categorical = bool(self.categories)
        tags.non_deterministic = self.random_state is None
        return tags

    @property
    def partial_fit(self) -> NoReturn:
        """Refused: a second look at records costs ε again, and the account of one fit can't know of it."""
        raise RefusedMethodError(
            f"{type(self).__name__} has no partial_fit: every call would spend ε again on the records of the one before."
            " Call fit once with all records, or use lipdp.PrivacyEngine and its account"
        )

    # -- the fit -------------------------------------------------------------------------------------------------------

    def _read(self, X: Any, *, reset: bool) -> Any:
        """A table that can be indexed [row, column]; a frame keeps its columns' own types until the rule reads them."""
        if not _is_frame(X):
            dtype = None if self.categories else "numeric"
            return validate_data(self, X, dtype=dtype, ensure_all_finite=False, reset=reset)
        validate_data(self, X, skip_check_array=True, reset=reset)
        if self.categories:
            if not len(X):
                raise ParameterError("X has 0 records: at least 1 is needed")
            return X.to_numpy(dtype=object)
        textual = [name for name, dtype in zip(X.columns, X.dtypes, strict=True) if dtype.kind not in "biuf"]
        if textual:
            raise ParameterError(
                f"the columns {textual} hold no numbers: list their public values in categories={{column: [...]}}"
            )
        return check_array(X, dtype=np.float64, ensure_all_finite=False)

    def _learn_columns(self, x: Any) -> ColumnRule:
        """Decide the public rule, and keep it as plain values."""
        if self.missing not in MISSING:
            raise ParameterError(f"missing={self.missing!r}: one of {', '.join(MISSING)} is needed")
        names, count = getattr(self, "feature_names_in_", None), x.shape[1]
        categories = read_categories(self.categories, names, count)
        numeric = [j for j in range(count) if j not in categories]
        self.leaks_ = []
        if self.bounds is None and numeric:
            bounds = bounds_of_data(x, numeric, "bounds of the columns")
            self.leaks_.append("the bounds of the columns were taken from the data")
        else:
            bounds = read_bounds(self.bounds, numeric, names, count) if numeric else {}
        self.bounds_, self.categories_ = bounds, categories
        return self._rule()

    def _rule(self) -> ColumnRule:
        return ColumnRule(self.bounds_, self.categories_, self.missing)

    def _chosen(self) -> TableRecipe:
        """The recipe, with the hidden layers that were asked for."""
        recipe = self._recipe if self.recipe is None else self.recipe
        return recipe if self.hidden is None else replace(recipe, hidden=read_hidden(self.hidden))

    def _learn(self, rows: npt.NDArray[np.float32], y: Tensor, loss: LipschitzLoss, outputs: int, norm: float) -> None:
        recipe, seed = self._chosen(), None
        if self.random_state is not None:
            seed = int(check_random_state(self.random_state).randint(_SEEDS))
        delta = default_delta(len(rows)) if self.delta is None else self.delta
        with torch.random.fork_rng(devices=[]):
            if seed is not None:
                torch.manual_seed(seed)
            network = recipe.network(rows.shape[1], outputs, norm)
        plan = recipe.plan(len(rows), epsilon=self.epsilon, delta=delta)
        learnt = recipe.learn(network, plan, torch.from_numpy(rows), y, loss, seed=seed)
        self.weights_, self.privacy_ = dict(learnt.weights), dict(learnt.privacy)
        self.hidden_, self.radius_, self.n_outputs_ = recipe.hidden, recipe.radius, outputs
        self.epsilon_ = math.inf if self.leaks_ else self.privacy_["epsilon"]
        self.delta_ = self.privacy_["delta"]
        self.is_private_ = not self.leaks_ and seed is None

    # -- what was learnt -----------------------------------------------------------------------------------------------

    def _network(self) -> nn.Module:
        """The fitted network in float64: what it says of a record does not depend on the records beside it."""
        rule = self._rule()
        recipe = TableRecipe(hidden=self.hidden_, radius=self.radius_)
        network = recipe.network(rule.width, self.n_outputs_, rule.norm_bound)
        network.load_state_dict({name: torch.from_numpy(value) for name, value in self.weights_.items()})
        return network.double().eval()

    def _rows(self, X: Any) -> Tensor:
        check_is_fitted(self)
        return torch.from_numpy(self._rule()(self._read(X, reset=False))).double()

    def _outputs(self, X: Any) -> npt.NDArray[np.float64]:
        """(N, outputs)."""
        rows = self._rows(X)
        with torch.no_grad():
            found: npt.NDArray[np.float64] = self._network()(rows).numpy()
        return found

    def report(self) -> str:
        """What the fit protects, how strongly, and what it does not, in sentences.

        Raises:
            NotFittedError: before `fit`.
        """
        check_is_fitted(self)
        told = self.privacy_
        reasons = list(self.leaks_)
        if told["seeded"]:
            reasons.append("random_state was given, so the noise can be drawn again and taken away")
        first = [f"This fit is NOT private: {'; '.join(reasons)}."] if reasons else []
        return "\n".join(
            [
                *first,
                f"Each of {told['dataset_size']:,} training records, input and target, is protected with"
                f" ε = {told['epsilon']:.4g} at δ = {told['delta']:.3g}"
                f" ({told['relation'].replace('_', ' ')} record).",
                f"{told['steps']} noisy steps of SGD, batches of {told['expected_batch_size']:,} expected, noise"
                f" multiplier {told['noise_multiplier']:.4g}, accountant {told['accountant']}.",
                f"Taken as public: the number of records, the columns{self._public()}.",
                "Not covered: scores on private records, and settings chosen by looking at them. Fits add up: k of them"
                " on the same records, as in k-fold cross-validation, cost up to k ε.",
            ]
        )

    def _public(self) -> str:
        """What else was taken as public, in words."""
        named = [str(label_of(j, getattr(self, "feature_names_in_", None))) for j in self.categories_]
        return ", their bounds" + (f", the categories of {', '.join(named)}" if named else "")


def _is_frame(X: Any) -> bool:
    return hasattr(X, "columns") and hasattr(X, "dtypes") and hasattr(X, "to_numpy")


def public_list(name: str, values: Sequence[Any] | None) -> npt.NDArray[Any] | None:
    """A public list of at least two different values, sorted; None where there is none."""
    if values is None:
        return None
    known = np.unique(np.asarray(values))
    if len(known) < 2 or len(known) != len(values):
        raise ParameterError(f"{name}={values!r}: a list of at least two different values is needed")
    return known
