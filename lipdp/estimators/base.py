"""What the private estimators share: reading tables by the public rule, the fit, the account, what is kept of it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from lipdp.batches.records import looked_at
from lipdp.data import Bounding
from lipdp.data.columns import Number
from lipdp.errors import ParameterError, PrivacyLeakWarning, RefusedMethodError, outside
from lipdp.estimators.columns import MISSING, ColumnRule, bounds_of_data, label_of, read_bounds, read_categories
from lipdp.estimators.recipe import BOUNDED, COLUMNS, choose
from lipdp.estimators.scikit import BaseEstimator, check_is_fitted, check_random_state, validate_data
from lipdp.training.config import default_delta

FROM_DATA = "data"
_SEEDS = 2**31 - 1


@dataclass(eq=False, repr=False)
class PrivateEstimator(BaseEstimator):
    """The fit of a private model of a table, for `PrivateClassifier` and `PrivateRegressor`.

    What a fit keeps is plain: arrays of weights, the public rule, the account. No generator, key, optimiser or record
    is among it, so a pickle of a fitted estimator holds what ε covers and nothing else.
    """

    epsilon: float = 1.0
    delta: float | None = None
    _: KW_ONLY
    bounds: Any = None
    categories: Any = None
    missing: str = "middle"
    hidden: int | Sequence[int] | None = None
    steps: int | None = None
    random_state: Any = None

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
            f"{type(self).__name__} has no partial_fit: every call would spend ε again on the records of the"
            " one before."
            " Call fit once with all records, or use lipdp.PrivacyEngine and its account"
        )

    # -- the fit -------------------------------------------------------------------------------------------------------

    def _read(self, X: Any, *, reset: bool) -> Any:
        """A table that can be indexed [row, column]. One cell decides nothing of the others, nor raises an error."""
        if _is_frame(X):
            validate_data(self, X, skip_check_array=True, reset=reset)
            plain = not self.categories and all(isinstance(d, np.dtype) and d.kind in "biuf" for d in X.dtypes)
            x = X.to_numpy(dtype=np.float64 if plain else object)
            if not len(x):
                raise ParameterError("X has 0 records: at least 1 is needed")
        else:
            cells = np.array(X, dtype=object) if isinstance(X, (list, tuple)) else X  # else one text makes texts of all
            x = validate_data(self, cells, dtype=None, ensure_all_finite=False, reset=reset)
        return x

    def _learn_columns(self, x: Any) -> None:
        """Decide the public rule, and keep it as plain values: `bounds_` is None where the columns' map is measured."""
        if self.missing not in MISSING:
            raise ParameterError(f"missing={self.missing!r}: one of {', '.join(MISSING)} is needed")
        names, count = getattr(self, "feature_names_in_", None), x.shape[1]
        self.categories_ = read_categories(self.categories, names, count)
        self.numeric_ = [j for j in range(count) if j not in self.categories_]
        looked = x[looked_at(len(x))]
        textual = [label_of(j, names) for j in self.numeric_ if Number("").check(looked[:, j])]
        if textual:
            raise ParameterError(
                f"the columns {textual} hold no numbers: list their public values in categories={{column: [...]}}"
            )
        self.leaks_, recipe = [], choose(self.hidden, self.steps)
        self.bounds_: dict[int, tuple[float, float]] | None
        if not self.numeric_:
            self.bounds_ = {}
        elif isinstance(self.bounds, str) or (self.bounds is None and recipe.needs_bounds):
            if self.bounds not in (None, FROM_DATA):
                raise ParameterError(f"bounds={self.bounds!r}: numbers, None, or {FROM_DATA!r} is needed")
            self.bounds_ = bounds_of_data(x, self.numeric_, "bounds of the columns")
            self.leaks_.append("the bounds of the columns were taken from the data")
        elif self.bounds is None:
            self.bounds_ = None
        else:
            self.bounds_ = read_bounds(self.bounds, self.numeric_, names, count)

    def _rule(self) -> ColumnRule:
        bounds = dict.fromkeys(self.numeric_) if self.bounds_ is None else self.bounds_
        intercept = choose(self.hidden_, None).needs_bounds
        return ColumnRule(bounds, self.categories_, self.missing, intercept)

    @property
    def _front(self) -> Bounding:
        """The public map of rows in front of the network."""
        return COLUMNS if self.bounds_ is None else BOUNDED

    def _learn(self, x: Any, y: Tensor, outputs: int) -> None:
        """Train on the rows of `x` and the targets, and keep what came of it."""
        self.hidden_, self.n_outputs_ = self.hidden, outputs
        rule, seed = self._rule(), self._seed()
        delta = default_delta(len(x)) if self.delta is None else self.delta
        weights, plan, spent = choose(self.hidden, self.steps).learn(
            torch.from_numpy(rule(x)), y, front=self._front, outputs=outputs, norm_bound=rule.norm_bound,
            epsilon=self.epsilon, delta=delta, seed=seed,
        )  # fmt: skip
        self.weights_ = {name: np.array(value.cpu().numpy()) for name, value in weights.items()}
        self.privacy_ = {**plan.as_dict(), "epsilon": spent, "delta": delta}
        self.epsilon_, self.delta_ = math.inf if self.leaks_ else spent, delta
        self.is_private_ = not self.leaks_

    def _seed(self) -> int | None:
        """Of the noise, which `random_state` gives away."""
        if self.random_state is None:
            return None
        try:
            seed = int(check_random_state(self.random_state).randint(_SEEDS))
        except ValueError as error:
            raise ParameterError(
                f"random_state={self.random_state!r}: a whole number from 0 to 2**32 - 1, a RandomState of numpy, or"
                " None is needed"
            ) from error
        warnings.warn(
            f"random_state={self.random_state!r} was given (BaggingClassifier and others set it by themselves): whoever"
            " knows it can draw the noise again and take it away, so this fit is NOT private",
            PrivacyLeakWarning,
            stacklevel=outside(),
        )
        self.leaks_.append("random_state was given, so the noise can be drawn again and taken away")
        return seed

    # -- what was learnt -----------------------------------------------------------------------------------------------

    def _network(self) -> nn.Module:
        """The fitted network in float64: what it says of a record does not depend on the records beside it."""
        rule = self._rule()
        network = choose(self.hidden_, None).network(rule.width, self.n_outputs_, rule.norm_bound)
        network.load_state_dict({name: torch.from_numpy(value) for name, value in self.weights_.items()})
        return network.double().eval()

    def _rows(self, X: Any) -> Tensor:
        check_is_fitted(self)
        return torch.from_numpy(self._rule()(self._read(X, reset=False))).double()

    def _outputs(self, X: Any) -> npt.NDArray[np.float64]:
        """(N, outputs)."""
        rows = self._rows(X)
        with torch.no_grad():
            found: npt.NDArray[np.float64] = self._network()(self._front(rows)).numpy()
        return found

    def report(self) -> str:
        """What the fit protects, how strongly, and what it does not, in sentences."""
        check_is_fitted(self)
        account = self.privacy_
        first = [f"This fit is NOT private: {'; '.join(self.leaks_)}."] if self.leaks_ else []
        return "\n".join(
            [
                *first,
                f"Each of {account['dataset_size']:,} training records, input and target, is protected with"
                f" ε = {account['epsilon']:.4g} at δ = {account['delta']:.3g}"
                f" ({account['relation'].replace('_', ' ')} record).",
                f"{account['steps']} noisy steps of SGD, batches of {account['expected_batch_size']:,} expected, noise"
                f" multiplier {account['noise_multiplier']:.4g}, accountant {account['accountant']}.",
                f"Taken as public: the number of records, the columns{self._public()}.",
                "Not covered: scores on private records, settings chosen by looking at them, and what other steps of a"
                " pipeline learn from them, such as StandardScaler (take PublicScaler). Fits add up: k of them on the"
                " same records, as in k-fold cross-validation, cost up to k ε.",
            ]
        )

    def _public(self) -> str:
        """What else was taken as public, in words."""
        named = [str(label_of(j, getattr(self, "feature_names_in_", None))) for j in self.categories_]
        bounds = "" if self.bounds_ is None else ", their bounds"
        return bounds + (f", the categories of {', '.join(named)}" if named else "")


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
