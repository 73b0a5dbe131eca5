"""Private models with scikit-learn's habits: `fit`, `predict`, `score`, pipelines, cross-validation.

    clf = PrivateClassifier(epsilon=1.0, delta=1e-5, bounds=(0.0, 1.0)).fit(X, y)
    clf.predict_proba(X), clf.epsilon_, clf.certified_radius(X), print(clf.report())

`columns` holds the public rule from raw columns to bounded numbers, `recipe` how a table is learnt. Needs scikit-learn
1.6 (`pip install "lipdp[estimators]"`).
"""

from lipdp.lazy import facade

# public name → the module that defines it; imported on first use, because scikit-learn is slow to import
_NAMES = {
    "PrivacyLeakWarning": "lipdp.errors",
    "PrivateClassifier": "lipdp.estimators.classifier",
    "PrivateRegressor": "lipdp.estimators.regressor",
    "PublicScaler": "lipdp.estimators.scaler",
}

__getattr__, __dir__, __all__ = facade(__name__, _NAMES)
