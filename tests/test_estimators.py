"""The estimators keep scikit-learn's conventions, read no data in silence, and keep nothing of the training."""

from __future__ import annotations

import pickle
import warnings

import numpy as np
import pandas as pd
import pytest
from sklearn.base import clone
from sklearn.ensemble import BaggingClassifier
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.utils.estimator_checks import parametrize_with_checks

from lipdp import errors
from lipdp.data.listed import as_numbers
from lipdp.estimators import PrivacyLeakWarning, PrivateClassifier, PrivateRegressor, PublicScaler
from lipdp.estimators.columns import ColumnRule, read_bounds

pytestmark = [
    pytest.mark.usefixtures("one_thread", "unjudged"),
    pytest.mark.filterwarnings("ignore:random_state:lipdp.errors.PrivacyLeakWarning"),  # what is fitted here is seeded
]

CELL = {
    "check_dtype_object": "a cell that is no number counts as missing: an error would tell that the record is there"
}
EXPECTED = {
    PublicScaler: {},
    PrivateClassifier: CELL,
    PrivateRegressor: {
        **CELL, "check_supervised_y_no_nan": "an infinite target counts as the bound, NaN as none: as for a cell",
    },
}  # fmt: skip
"""The checks of scikit-learn that fail, and why they should."""

FAST = [
    PublicScaler(bounds=(-10, 10)),
    PrivateClassifier(hidden=0, steps=1, bounds=(-10, 10)),
    PrivateRegressor(hidden=0, steps=1, bounds=(-10, 10), target_bounds=(-100, 100)),
]


def expected(estimator):
    return EXPECTED[type(estimator)]


def checks(*estimators):
    """As scikit-learn's decorator, with a list: pytest 9 refuses the generator of scikit-learn 1.7."""
    made = parametrize_with_checks(estimators, expected_failed_checks=expected)
    return pytest.mark.parametrize(made.args[0], list(made.args[1]), **made.kwargs)


@checks(*FAST)
def test_scikit_learns_checks(estimator, check):
    check(estimator)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::lipdp.errors.PrivacyLeakWarning")
@checks(PublicScaler(), PrivateClassifier(), PrivateClassifier(hidden=4), PrivateRegressor())
def test_scikit_learns_checks_with_the_defaults(estimator, check):
    check(estimator)


@pytest.fixture
def table():
    x = np.random.default_rng(0).uniform(size=(400, 3))
    return x, np.where(x[:, 0] > 0.5, "yes", "no")


def fast(**given):
    return PrivateClassifier(**{"bounds": (0, 1), "hidden": 0, "steps": 20, "random_state": 0, **given})


# --- the guarantee ----------------------------------------------------------------------------------------------------


def test_bounds_that_come_from_the_data_are_a_leak(table):
    for given in ({"bounds": None}, {"bounds": "data"}, {"bounds": "data", "hidden": None, "steps": 2}):
        with pytest.warns(PrivacyLeakWarning, match="NOT covered"):
            fitted = fast(**given, random_state=None).fit(*table)
        assert fitted.epsilon_ == np.inf
        assert not fitted.is_private_
        assert "NOT private: the bounds of the columns were taken from the data" in fitted.report()


def test_bounds_that_are_measured_privately_are_within_the_budget(table):
    fitted = PrivateClassifier(epsilon=1.0, steps=2).fit(*table)
    assert fitted.epsilon_ <= 1.0
    assert fitted.is_private_
    assert {m["name"] for m in fitted.privacy_["measurements"]} == {"histogram", "gram"}
    assert fitted.bounds_ is None


def test_public_bounds_and_no_seed_are_private(table):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fitted = fast(random_state=None).fit(*table)
    assert fitted.is_private_
    assert 0.9 < fitted.epsilon_ <= 1.0
    assert fitted.report().startswith("Each of 400 training records")


@pytest.mark.parametrize("hidden", [None, 0])
def test_a_seed_is_not_private_whoever_gives_it(table, hidden):
    with pytest.warns(PrivacyLeakWarning, match="random_state=0 was given .* NOT private"):
        fitted = fast(hidden=hidden, steps=2).fit(*table)
    with pytest.warns(PrivacyLeakWarning, match=r"BaggingClassifier .* NOT private"):
        bag = BaggingClassifier(fast(hidden=hidden, steps=2, random_state=None), n_estimators=1).fit(*table)
    for seeded in (fitted, *bag.estimators_):
        assert seeded.epsilon_ == np.inf
        assert not seeded.is_private_
        assert "NOT private: random_state was given" in seeded.report()


def test_nothing_of_a_record_raises_an_error_or_moves_another_row():
    rule = ColumnRule({0: (0.0, 1.0), 1: (-1.0, 1.0)}, {2: ("a", "b")}, "indicator")
    odd = [np.nan, np.inf, -np.inf, None, "text", 1e300, True, pd.NA]
    rows = rule(np.array([[v, v, v] for v in odd], dtype=object))
    assert np.isfinite(rows).all()
    assert (np.linalg.norm(rows, axis=1) <= rule.norm_bound + 1e-6).all()
    assert rows.shape[1] == rule.width


ODD = ["n/a", "0.25", 2**80, 1 + 2j, np.complex128(2j), None, pd.NA, [1, 2], {}, b"x", np.inf, True]


def fitted_weights(x, y, **given):
    known = {"classes": [0, 1], "hidden": None, "steps": 2, "bounds": (0, 1), **given}
    return list(fast(**known).fit(x, y).weights_.values())


@pytest.mark.parametrize("value", ODD, ids=repr)
def test_one_cell_raises_no_error_and_moves_no_other_row(table, value):
    """Whatever it does to the type of its column, or of the table; the reference lacks the number alone."""
    x, y = table[0].round(3), (table[1] == "yes").astype(int)
    x[:, 2] = x[:, 2] > 0.5
    as_object = x.astype(object)
    as_object[5, 1] = value
    frame = pd.DataFrame(x, columns=list("abc")).astype({"c": bool})
    frame["b"] = pd.Series([value if i == 5 else cell for i, cell in enumerate(frame["b"])])  # pandas chooses the type
    (other := x.copy())[5, 1] = as_numbers(np.array([value, None], dtype=object))[0]
    expected = fitted_weights(other, y)
    for odd in (as_object, as_object.tolist(), frame):
        for found, wanted in zip(fitted_weights(odd, y), expected, strict=True):
            np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("value", ["x", None, pd.NA, [1], 1j, np.nan, 2**80], ids=repr)
def test_one_label_raises_no_error_and_moves_no_other(table, value):
    x, y = table[0], (table[1] == "yes").astype(int)
    (other := y.copy())[5] = 7
    expected, labels = fitted_weights(x, other), [value if i == 5 else label for i, label in enumerate(y.tolist())]
    odd = [labels] if isinstance(value, list) else [labels, pd.Series(labels)]
    for given in odd:
        for found, wanted in zip(fitted_weights(x, given), expected, strict=True):
            np.testing.assert_array_equal(found, wanted)
    PrivateRegressor(bounds=(0, 1), target_bounds=(0, 1), steps=1).fit(x, labels)


def test_the_bound_of_a_row_is_tight():
    rule = ColumnRule({0: (0.0, 1.0), 1: (-1.0, 1.0)}, {2: ("a", "b")}, intercept=True)
    row = rule(np.array([[1.0, -1.0, "b"]], dtype=object))
    assert np.linalg.norm(row) == pytest.approx(rule.norm_bound)


def test_a_label_that_is_not_public_is_none(table):
    x, y = table
    fitted = fast(classes=["no", "yes"]).fit(x, np.where(np.arange(len(y)) == 3, "new", y))
    assert fitted.classes_.tolist() == ["no", "yes"]
    only = fast(classes=["no", "yes"]).fit(x, np.full(len(y), "yes"))
    assert only.predict(x).tolist() == ["yes"] * len(x)
    with pytest.raises(errors.ParameterError, match="1 class"):
        fast().fit(x, np.full(len(y), "yes"))


@pytest.mark.parametrize("hidden", [None, 0])
def test_a_list_of_classes_that_is_not_that_of_y_is_named(table, hidden):
    x, y = table
    with pytest.raises(errors.ParameterError, match=r"classes=\[0, 1\] are not the labels in y, which are of type str"):
        fast(classes=[0, 1], hidden=hidden).fit(x, y)


def test_partial_fit_says_why_not():
    with pytest.raises(errors.RefusedMethodError, match="spend ε again"):
        PrivateClassifier().partial_fit  # noqa: B018
    assert not hasattr(PrivateRegressor(), "partial_fit")


PLAIN = (str, int, float, bool, type(None), np.ndarray, np.generic)


def is_plain(value):
    if isinstance(value, dict):
        return all(map(is_plain, value)) and all(map(is_plain, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(is_plain, value))
    return isinstance(value, PLAIN)


@pytest.mark.parametrize("hidden", [None, 4])
def test_a_pickle_holds_weights_and_the_account_and_nothing_of_the_training(table, hidden):
    x, y = table
    fitted = fast(hidden=hidden, steps=2).fit(x, y)
    assert is_plain(vars(fitted))
    assert not [v for v in vars(fitted).values() if isinstance(v, np.ndarray) and len(x) in v.shape]
    again = pickle.loads(pickle.dumps(fitted))
    np.testing.assert_array_equal(again.predict_proba(x), fitted.predict_proba(x))


# --- scikit-learn's habits --------------------------------------------------------------------------------------------


def test_a_model_is_learnt_and_probabilities_agree_with_the_labels(table):
    x, y = table
    for hidden in (0, 8):
        fitted = fast(epsilon=4.0, hidden=hidden, steps=40).fit(x, y)
        assert fitted.score(x, y) > 0.85
        share = fitted.predict_proba(x)
        np.testing.assert_allclose(share.sum(1), 1)
        assert (fitted.classes_[share.argmax(1)] == fitted.predict(x)).all()


def test_three_classes():
    x = np.random.default_rng(0).uniform(size=(600, 2))
    y = (3 * x[:, 0]).astype(int)
    fitted = PrivateClassifier(epsilon=8.0, bounds=(0, 1), steps=40, random_state=0).fit(x, y)
    assert fitted.decision_function(x).shape == (600, 3)
    assert fitted.score(x, y) > 0.75


def test_a_frame_with_categories_and_missing_values():
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"age": rng.integers(0, 100, 400).astype(float), "job": rng.choice(["a", "b", "c"], 400)})
    y = frame["job"] == "b"
    frame.loc[::7, "age"] = np.nan
    frame.loc[::11, "job"] = None
    given = {"bounds": {"age": (0, 120)}, "categories": {"job": ["a", "b", "c"]}}
    for missing in ("middle", "indicator"):
        fitted = fast(**given, missing=missing, epsilon=4.0, steps=40).fit(frame, y)
        assert fitted.score(frame, y) > 0.85
        assert fitted.feature_names_in_.tolist() == ["age", "job"]
        assert "the categories of job" in fitted.report()
    with pytest.raises(errors.ParameterError, match=r"\['job'\] hold no numbers"):
        fast(bounds=(0, 120)).fit(frame, y)
    with pytest.raises(errors.ParameterError, match=r"\['age'\] have none"):
        fast(bounds={}, categories=given["categories"]).fit(frame, y)
    with pytest.raises(ValueError, match="feature names should match"):
        fitted.predict(frame.rename(columns={"age": "years"}))


@pytest.mark.parametrize(
    "given", [{"hidden": 64.5}, {"hidden": (3,)}, {"hidden": -2}, {"epsilon": -1}, {"delta": 2}, {"random_state": "x"}]
)
def test_arguments_out_of_range_are_named(table, given):
    x, y = table
    with pytest.raises(errors.ParameterError, match=f"{next(iter(given))}=.*needed"):
        fast(**{"hidden": None, **given}).fit(x, y)


def test_bounds_as_they_may_be_given():
    names = ["a", "b", "c"]
    pair = {0: (0.0, 2.0), 1: (0.0, 2.0), 2: (0.0, 2.0)}
    assert read_bounds((0, 2), [0, 1, 2], names, 3) == pair
    assert read_bounds([(0, 2)] * 3, [0, 1, 2], None, 3) == pair
    assert read_bounds({"a": (0, 2), 1: 2}, [0, 1], names, 3) == {0: (0.0, 2.0), 1: (-2.0, 2.0)}
    for bad in ((1, 1), (0, np.inf), "x", [(0, 1)] * 2, {"z": 1}):
        with pytest.raises(errors.LipdpError):
            read_bounds(bad, [0, 1, 2], names, 3)


def test_a_pipeline_a_clone_and_cross_validation(table):
    pipeline = make_pipeline(PublicScaler(bounds=(0, 1)), fast(bounds=1.0))
    copy = clone(pipeline).fit(*table)
    assert copy[-1].privacy_["epsilon"] <= 1.0
    assert len(cross_val_score(pipeline, *table, cv=2)) == 2


def test_before_fit_there_is_nothing(table):
    for method in ("predict", "predict_proba", "decision_function", "certified_radius"):
        with pytest.raises(NotFittedError):
            getattr(fast(), method)(table[0])
    with pytest.raises(NotFittedError):
        fast().report()


def test_a_regressor_stays_in_the_public_bounds_of_its_targets():
    x = np.random.default_rng(0).uniform(size=(2000, 2))
    y = x[:, 0] + x[:, 1]
    y[0], y[1] = 1e9, np.nan
    given = {"bounds": (0, 1), "target_bounds": (0, 2), "epsilon": 4.0, "random_state": 0}
    for hidden in (None, 0):
        fitted = PrivateRegressor(**given, hidden=hidden, steps=50).fit(x, y)
        assert fitted.score(x[2:], y[2:]) > 0.6
        assert fitted.predict(np.full((1, 2), 1e9)).item() <= 2
    with pytest.warns(PrivacyLeakWarning, match="target_bounds"):
        leaky = PrivateRegressor(bounds=(0, 1), hidden=0, steps=1).fit(x, y)
    assert leaky.epsilon_ == np.inf


@pytest.mark.parametrize("hidden", [None, 0, 8])
def test_no_change_within_the_certified_radius_changes_the_answer(table, hidden):
    x, y = table
    fitted = fast(epsilon=8.0, hidden=hidden, bounds=(-1, 3), steps=40).fit(x, y)  # half the range: 2
    radii = fitted.certified_radius(x[:50])
    assert radii.max() > 0
    rng, said = np.random.default_rng(1), fitted.predict(x[:50])
    for _ in range(20):
        step = rng.normal(size=(50, 3))
        step *= 2 * radii[:, None] / np.linalg.norm(step, axis=1, keepdims=True)
        assert (fitted.predict(x[:50] + step) == said).all()
    # the boundary lies at x₀ = ½ (in units of 2), so no sound radius is much larger than the way there
    if hidden == 0:
        assert (radii <= np.abs(x[:50, 0] - 0.5) / 2 + 0.3).all()
