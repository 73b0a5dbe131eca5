"""Accuracy, or AUROC, of every trainer at given budgets, over several seeds, after equally many tuning trials."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from statistics import fmean, stdev
from typing import Any, TypeAlias

import torch

from lipdp.accounting.plan import PrivacyPlan
from lipdp.comparison.calibration import calibration
from lipdp.comparison.configs import UtilityConfig
from lipdp.comparison.contenders import Contender, bench, contenders
from lipdp.comparison.protocol import Session
from lipdp.comparison.results import Cell, Progress, Results, markdown
from lipdp.comparison.tuning import Settings, proposal, winner
from lipdp.data import Split, number_of_units, split_validation
from lipdp.errors import NonFiniteError
from lipdp.training.evaluation import evaluate

_Run: TypeAlias = tuple[str, Contender, float | None]
"""Data set, contender and budget."""


@dataclass(frozen=True)
class Job:
    """One training run: a trial, or a final run with the settings that won.

    Attributes:
        dataset, contender, epsilon: the cell; ε None without privacy.
        settings: of the trainer, and "lr", which its `gain` divides.
        seed: of weights, batches and noise.
        trial: judged on a validation part carved out of the training part, and scaled.
        interior: of a final run, whether the trials around its settings were worse; None: there were none.
    """

    dataset: str
    contender: Contender
    epsilon: float | None
    settings: Settings
    seed: int
    trial: bool
    interior: bool | None = None


def utility(
    config: UtilityConfig,
    *,
    out: str | None = None,
    jobs: int = 1,
    progress: Progress = lambda cell, done, total: None,
) -> Results:
    """Tune every trainer at every budget, then train it with its best settings, once for each seed.

    Guarantees: every trainer gets the same data, expected batch size, number of steps, noise multiplier,
    optimiser, schedule and number of trials: one each, and again until all best settings have worse neighbours on every
    side (`tuning.winner`), or `config.trials` are done; then those on the edge are marked. Settings are chosen on a
    validation part of the training records; the test part is looked at once per final run, and chooses nothing. (None
    of the choices is covered by ε: they are made as one would on public data, for all trainers alike.)

    Args:
        config: what is compared.
        out: the folder, with `results.json` (final runs) and `tuning.json` (trials). One that was begun is completed.
        jobs: processes, each with one thread, if more than one.

    Returns:
        Cells with trainer, model, dataset, batch_size, target_epsilon, epsilon, seed, accuracy (auroc), settings.
    """
    plain = {**asdict(config), "what": "utility"}
    tuning = Results(out, config=plain, name="tuning.json")
    results = Results(out, config=plain)
    cells = [
        (dataset, contender, epsilon)
        for dataset in config.datasets
        for contender in contenders(config.trainers, config.kinds)
        for epsilon in (config.epsilons if contender.trainer.private else (None,))
    ]
    total = len(cells) * (config.trials * (config.trials > 1) + config.seeds)  # at most
    work: dict[str, Any] = {"key": partial(_key, config), "run": partial(run, config), "jobs": jobs}
    work |= {"progress": progress, "total": total}
    if config.trials > 1:
        for dataset in config.datasets:
            here = [cell for cell in cells if cell[0] == dataset]
            _tune(config, tuning, here, {**work, "beside": len(results.cells)})
    finals = []
    for cell in cells:
        settings, interior = _best(config, tuning, cell)
        finals += [Job(*cell, settings, seed, False, interior) for seed in range(config.seeds)]
    results.fill(finals, **work, beside=len(tuning.cells))
    return results


def _tune(config: UtilityConfig, tuning: Results, cells: Sequence[_Run], work: Mapping[str, Any]) -> None:
    """One trial of every trainer at every budget, and again, until no winner is on the edge of what was tried."""
    for done in range(config.trials):
        tried = [(cell, cell[1].trainer.grid, dict(_tried(config, tuning, cell)[:done])) for cell in cells]
        if done and all(winner(grid, scores)[1] for _, grid, scores in tried):
            return
        proposed = [(cell, proposal(grid, scores)) for cell, grid, scores in tried]
        tuning.fill([Job(*cell, settings, 0, True) for cell, settings in proposed if settings is not None], **work)


def _tried(config: UtilityConfig, tuning: Results, cell: _Run) -> list[tuple[Settings, float]]:
    key = _key(config, Job(*cell, (), 0, True))
    del key["settings"]
    return [(tuple(trial["settings"].items()), trial["score"]) for trial in tuning.find(**key)]


def _best(config: UtilityConfig, tuning: Results, cell: _Run) -> tuple[Settings, bool | None]:
    """The settings of the final runs, and whether they are in the interior of what was tried; None: nothing was."""
    grid, tried = cell[1].trainer.grid, dict(_tried(config, tuning, cell))
    if tried:
        return winner(grid, tried)
    middle = proposal(grid, {})
    return middle or (), None


def _key(config: UtilityConfig, job: Job) -> Cell:
    train = config.train_config(job.dataset)
    return {
        "trainer": job.contender.trainer.name,
        "model": job.contender.model_name(train.model),
        "dataset": job.dataset,
        "target_epsilon": job.epsilon,
        "settings": dict(job.settings),
        "seed": job.seed,
    }


def trial_plan(plan: PrivacyPlan, split: Split, scale: int) -> PrivacyPlan:
    """The same q and σ on fewer records, both over k: what a trial runs at."""
    records = number_of_units(split)
    batch_size = max(1, round(plan.expected_batch_size * records / plan.dataset_size / scale))
    return replace(
        plan, dataset_size=records, expected_batch_size=batch_size, noise_multiplier=plan.noise_multiplier / scale
    )


def run(config: UtilityConfig, job: Job) -> Cell:
    """One training run and its cell."""
    begin = time.perf_counter()
    found, contender = bench(config.train_config(job.dataset), job.epsilon), job.contender
    if job.trial:
        held_out = split_validation(found.split, fraction=config.validation)
        scale = config.tune_scale if contender.trainer.private else 1
        found = replace(found, split=held_out, plan=trial_plan(found.plan, held_out, scale))
    settings = dict(job.settings)
    lr = settings.pop("lr") / replace(contender.trainer, **settings).gain
    session = found.trained(contender, settings, lr=lr, seed=job.seed)
    split, binary = found.split, found.split.task == "binary"
    try:
        measured = evaluate(session.model, split.test_x, split.test_y, binary=binary)
        scores = {name: value for name, value in measured.items() if value is not None}  # no AUROC of one class
    except NonFiniteError:  # a learning rate too large for this trainer: the worst score there is
        scores = dict.fromkeys(("accuracy", "auroc") if binary else ("accuracy",), 0.0)
    if job.trial:
        scores = {"score": scores.get("auroc", scores["accuracy"])}
    elif not binary:
        scores |= _calibration(session, found.setup().temperature(contender), split)
    return {
        **_key(config, job),
        **found.plan_figures(contender, trial=job.trial),
        **scores,
        **({} if job.trial else {"interior": job.interior}),
        "chance": chance_of(split),
        "seconds": round(time.perf_counter() - begin, 2),
    }


def _calibration(session: Session, temperature: float, split: Split) -> Cell:
    """How far its probabilities are from its accuracy; nothing where they are not numbers."""
    try:
        found = calibration(session.model, split.test_x, split.test_y, temperature=temperature)
    except NonFiniteError:
        return {}
    return {"ece": found.ece, "nll": found.nll, "brier": found.brier}


def chance_of(split: Split) -> float:
    """An AUROC of one half, or the accuracy of always answering the most frequent class of the test records."""
    if split.task == "binary":
        return 0.5
    return float(torch.bincount(split.test_y).max()) / len(split.test_y)


def summary(results: Results) -> list[Cell]:
    """Mean and spread over seeds, a cell for each trainer, model, data set and budget.

    The spread is the standard deviation over the seeds (n − 1), None of one seed. A trainer `learned` where its mean is
    above chance by a twentieth of what chance leaves to reach.
    """
    found = []
    names = ("dataset", "model", "trainer", "target_epsilon")
    for key in dict.fromkeys(tuple(cell[name] for name in names) for cell in results.cells):
        cells = results.find(**dict(zip(names, key, strict=True)))
        metric = "auroc" if "auroc" in cells[0] else "accuracy"
        scores = [cell[metric] for cell in cells]
        mean, spread = fmean(scores), stdev(scores) if len(scores) > 1 else None
        chance = cells[0].get("chance", 0.0)
        figures = {"metric": metric, "mean": mean, "spread": spread, "runs": len(scores)}
        figures["learned"] = mean > chance + 0.05 * (1.0 - chance)
        shared = {name: cells[0].get(name) for name in ("settings", "epsilon", "interior")}
        found.append({**dict(zip(names, key, strict=True)), **figures, **shared})
    return found


def table(cells: Sequence[Cell]) -> str:
    """Mean ± spread in percent, a row for each data set, model and trainer, a column for each budget."""
    budgets = sorted({cell["target_epsilon"] for cell in cells if cell["target_epsilon"] is not None})
    keys = dict.fromkeys((cell["dataset"], cell["model"], cell["trainer"], cell["metric"]) for cell in cells)
    body = []
    for key in keys:
        mine = [c for c in cells if (c["dataset"], c["model"], c["trainer"], c["metric"]) == key]
        at = {c["target_epsilon"]: shown(c) for c in mine}
        body.append([*key, *(at.get(budget, "") for budget in (*budgets, None))])
    header = ["data set", "model", "trainer", "metric, %", *(f"ε = {b:g}" for b in budgets), "no privacy"]
    return markdown(header, body)


def shown(cell: Cell) -> str:
    """Mean ± spread in percent, whether it learned, and whether its settings are on the edge of what was tried."""
    spread = "(one seed)" if cell["spread"] is None else f"± {100 * cell['spread']:.1f}"
    learned = "" if cell["learned"] else ", did not learn"
    edge = ", settings on the edge" if cell["interior"] is False else ""
    return f"{100 * cell['mean']:.1f} {spread}" + learned + edge
