"""Private learners of tables side by side: lipdp's estimator, Opacus, a private EBM, diffprivlib, and no privacy."""

from __future__ import annotations

import functools
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import import_module
from statistics import fmean
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lipdp.accounting.plan import PrivacyPlan, default_delta
from lipdp.comparison.configs import TablesConfig, UtilityConfig
from lipdp.comparison.protocol import Task
from lipdp.comparison.results import Cell, Progress, Results, markdown
from lipdp.comparison.tuning import Settings, proposal, winner
from lipdp.comparison.utility import chance_of, shown, summary, trial_plan
from lipdp.data import Rescale, SignedLog, Split, bound_inputs, default_bounding, load, split_validation
from lipdp.errors import ParameterError, PrivacyLeakWarning, UnknownNameError
from lipdp.losses import TauBCEWithLogits, TauCrossEntropy
from lipdp.models import build
from lipdp.training.evaluation import evaluate, outputs

Scores = npt.NDArray[Any]
_OPACUS_BATCH, _OPACUS_STEPS = 2048, 200
_VALIDATION = 0.1


@dataclass(frozen=True)
class Learner:
    """A way to learn a table.

    Attributes:
        name, words: as the command and its legend call it.
        scores: (split, ε, δ, seed) → (n,) or (n, C) scores of the test part; seeded, so not private itself.
        module: what must be installed. install: how.
        private: whether it has an ε. two_classes: whether it learns two classes only.
    """

    name: str
    words: str
    scores: Callable[[Split, float, float, int], Scores]
    module: str
    install: str = 'pip install "lipdp[comparison]"'
    private: bool = True
    two_classes: bool = False


def tables(
    config: TablesConfig, *, out: str | None = None, progress: Progress = lambda cell, done, total: None
) -> Results:
    """Every learner on every table at every budget, once for each seed.

    Guarantees: all learners get the same records, cut the same way, and the same public map of the columns; none reads
    a range off them. lipdp's recipe has no settings to choose. Opacus' learning rate and threshold are chosen on a
    tenth of the training part, by training runs that its ε does not pay for. The others take their own defaults. The
    test part is looked at once a run.

    Returns:
        Cells with trainer, dataset, target_epsilon, seed, accuracy and, for two classes, auroc, average_precision,
        base_rate, recall, specificity.
    """
    learners = _required(config.trainers)
    results = Results(out, config={**asdict(config), "what": "tables"})
    jobs = [
        (name, learner, epsilon, seed)
        for seed in range(config.seeds)  # outermost: one that is stopped has as many runs of every table
        for name in config.tables
        for learner in learners
        for epsilon in (config.epsilons if learner.private else (None,))
        if not (learner.two_classes and _table(name, config.data_dir).num_classes > 2)
    ]

    results.fill(
        jobs, key=lambda job: _key(*job), run=lambda job: _run(config, *job), progress=progress, total=len(jobs)
    )
    return results


def _key(name: str, learner: Learner, epsilon: float | None, seed: int) -> Cell:
    return {"trainer": learner.name, "model": "table", "dataset": name, "target_epsilon": epsilon, "seed": seed}


def _run(config: TablesConfig, name: str, learner: Learner, epsilon: float | None, seed: int) -> Cell:
    begin = time.perf_counter()
    split = cut(_table(name, config.data_dir), records=config.records, seed=seed)
    delta = default_delta(split.records) if config.delta is None else config.delta
    scores = torch.as_tensor(learner.scores(split, epsilon or 1.0, delta, seed)).double()
    found = evaluate(nn.Identity(), scores.view(len(scores), -1), split.test_y, binary=split.task == "binary")
    return {
        **_key(name, learner, epsilon, seed),
        "epsilon": epsilon,
        "delta": delta if learner.private else None,
        "records": split.records,
        "settings": {},
        **{metric: value for metric, value in found.items() if value is not None},
        "chance": chance_of(split),
        "private": False,  # seeded
        "seconds": round(time.perf_counter() - begin, 2),
    }


@functools.lru_cache(maxsize=8)
def _table(name: str, data_dir: str | None) -> Split:
    split = load(name, data_dir=data_dir)
    if len(split.input_shape) > 1:
        raise ParameterError(f"{name} holds inputs of shape {split.input_shape}, and a table (N, columns) is needed")
    return split


def cut(split: Split, *, records: int, seed: int) -> Split:
    """At most `records` of both parts together in a random order, the first fifth for the test.

    >>> part = cut(replace(load("digits"), name="all"), records=1000, seed=0)
    >>> len(part.train_x), len(part.test_x)
    (800, 200)
    """
    x, y = torch.cat((split.train_x, split.test_x)), torch.cat((split.train_y, split.test_y))
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(x)))[:records]
    test, train = order[: len(order) // 5], order[len(order) // 5 :]
    return replace(split, train_x=x[train], train_y=y[train], test_x=x[test], test_y=y[test], train_owner=None)


def _mapped(split: Split) -> tuple[Split, float]:
    """Inputs in [−b, b] by the public map of the data set, and b."""
    bounding = default_bounding(split)
    return bound_inputs(split, bounding), bounding.limit if isinstance(bounding, SignedLog) else 1.0


# --- the learners -----------------------------------------------------------------------------------------------------


def _lipdp(split: Split, epsilon: float, delta: float, seed: int) -> Scores:
    from lipdp.estimators import PrivateClassifier

    known = default_bounding(split)
    bounds = (known.lower, known.upper) if isinstance(known, Rescale) else None
    model = PrivateClassifier(
        epsilon, delta, bounds=bounds, classes=range(split.num_classes), random_state=seed
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "random_state=", PrivacyLeakWarning)  # the records say so
        model.fit(split.train_x.numpy(), split.train_y.numpy())
    scores: Scores = model.decision_function(split.test_x.numpy())
    return scores


def _logistic(split: Split, epsilon: float, delta: float, seed: int) -> Scores:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    split, _ = _mapped(split)
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    return _probabilities(model.fit(split.train_x.numpy(), split.train_y.numpy()), split)


def _ebm(split: Split, epsilon: float, delta: float, seed: int) -> Scores:
    from interpret.privacy import DPExplainableBoostingClassifier

    (split, bound), columns = _mapped(split), split.input_shape[0]
    model = DPExplainableBoostingClassifier(
        epsilon=epsilon, delta=delta, privacy_bounds=dict.fromkeys(range(columns), (-bound, bound)),
        feature_types=["continuous"] * columns, random_state=seed, n_jobs=1,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Privacy violation: using a fixed random_state")  # the cell says so
        model.fit(split.train_x.numpy(), split.train_y.numpy())
    return _probabilities(model, split)


def _diffprivlib(split: Split, epsilon: float, delta: float, seed: int) -> Scores:
    """Objective perturbation; rows over √columns, which it clips to norm 1 itself."""
    from diffprivlib.models import LogisticRegression

    split, _ = _mapped(split)
    size = split.input_shape[0] ** 0.5
    split = replace(split, train_x=split.train_x / size, test_x=split.test_x / size)
    model = LogisticRegression(epsilon=epsilon, data_norm=1.0, max_iter=1000, random_state=seed)
    return _probabilities(model.fit(split.train_x.numpy(), split.train_y.numpy()), split)


def _probabilities(model: Any, split: Split) -> Scores:
    found: Scores = model.predict_proba(split.test_x.numpy())
    return found


def _opacus(split: Split, epsilon: float, delta: float, seed: int) -> Scores:
    """Settings searched on a validation part as in `compare utility`, then all training records."""
    from lipdp.comparison.trainers.opacus import CLIP_GRID

    split, _ = _mapped(split)
    plan = PrivacyPlan.of(
        dataset_size=split.records, expected_batch_size=min(split.records, _OPACUS_BATCH), steps=_OPACUS_STEPS,
        target_epsilon=epsilon, target_delta=delta,
    )  # fmt: skip
    held = split_validation(split, fraction=_VALIDATION, seed=seed)
    tried = trial_plan(plan, held, 1)

    def judged(settings: Settings) -> float:
        scores = _clipped_mlp(held, tried, settings, seed)
        found = evaluate(nn.Identity(), scores, held.test_y, binary=split.task == "binary")
        return found.get("auroc") or found["accuracy"] or 0.0

    found: dict[Settings, float] = {}
    while len(found) < UtilityConfig.trials and not (found and winner(CLIP_GRID, found)[1]):
        settings = proposal(CLIP_GRID, found)
        if settings is None:
            break
        found[settings] = judged(settings)
    return _clipped_mlp(split, plan, winner(CLIP_GRID, found)[0], seed).numpy()


def _clipped_mlp(split: Split, plan: PrivacyPlan, settings: Settings, seed: int) -> Tensor:
    """Scores of a ReLU network of 64 neurons, trained by Opacus."""
    from lipdp.comparison.trainers import get_trainer

    two, chosen = split.task == "binary", dict(settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classes = 1 if two else split.num_classes
        model = build("mlp", input_shape=split.input_shape, num_classes=classes, twin=True, width=64, depth=1)
        trainer: Any = get_trainer("opacus_hooks")
        task = Task(
            dataset=TensorDataset(split.train_x, split.train_y),
            loss=TauBCEWithLogits(1.0) if two else TauCrossEntropy(1.0),
            plan=plan,
            optimizer=partial(torch.optim.SGD, lr=chosen["lr"], momentum=0.9),
            seed=seed,
        )
        session = replace(trainer, max_grad_norm=chosen["max_grad_norm"]).train(model, task)
    return outputs(session.model, split.test_x.split(4096))


_OLD = "pip install diffprivlib, in an environment with scikit-learn below 1.8"
LEARNERS: Mapping[str, Learner] = {
    learner.name: learner
    for learner in (
        Learner("lipdp", "PrivateClassifier with its defaults", _lipdp, "sklearn"),
        Learner("opacus_mlp", "a network of 64 neurons, gradients clipped by Opacus, tuned", _opacus, "opacus"),
        Learner("ebm", "InterpretML's private boosted bins", _ebm, "interpret.privacy", two_classes=True),
        Learner("diffprivlib", "logistic regression with a noisy objective", _diffprivlib, "diffprivlib.models", _OLD),
        Learner("logistic_regression", "no noise, no privacy", _logistic, "sklearn", private=False),
    )
}
"""name → learner."""


def _required(names: Sequence[str]) -> list[Learner]:
    """The learners with these names; by default all but diffprivlib's."""
    for name in names:
        if name not in LEARNERS:
            raise UnknownNameError("trainer", name, LEARNERS)
    chosen = [LEARNERS[name] for name in names] or [one for one in LEARNERS.values() if one.name != "diffprivlib"]
    missing = []
    for learner in chosen:
        try:
            import_module(learner.module)
        except ImportError as error:
            missing.append(f"{learner.name} ({error}): {learner.install}")
    if missing:
        raise ParameterError(f"lipdp compare tables lacks what it needs for {'; '.join(missing)}")
    return chosen


# --- what is shown ----------------------------------------------------------------------------------------------------


def table(results: Results) -> str:
    """Mean ± spread over seeds in percent: a row for each table and budget, a column for each learner, a mean below."""
    cells = summary(results)
    names = [name for name in LEARNERS if any(cell["trainer"] == name for cell in cells)]
    budgets: Sequence[float | None] = sorted({c["target_epsilon"] for c in cells if c["target_epsilon"] is not None})
    rows: list[list[str]] = []
    for budget in budgets or (None,):
        here = [cell for cell in cells if cell["target_epsilon"] in (budget, None)]
        head = "" if budget is None else f"{budget:g}"
        for dataset in dict.fromkeys(cell["dataset"] for cell in here):
            mine = {cell["trainer"]: cell for cell in here if cell["dataset"] == dataset}
            metric = next(iter(mine.values()))["metric"]
            texts = [shown(mine[name]) if name in mine else "two classes only" for name in names]
            rows.append([dataset, head, metric, *texts])
        means = [[cell["mean"] for cell in here if cell["trainer"] == name] for name in names]
        rows.append(["mean", head, "", *(f"{100 * fmean(scores):.1f}" for scores in means)])
    return markdown(["table", "ε", "metric, %", *names], rows)
