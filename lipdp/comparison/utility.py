"""Accuracy, or AUROC, of every trainer at given budgets, over several seeds, after equally many tuning trials."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from statistics import fmean, stdev
from typing import Any

import torch

from lipdp.accounting.plan import PrivacyPlan
from lipdp.comparison.calibration import calibration
from lipdp.comparison.configs import UtilityConfig
from lipdp.comparison.contenders import Contender, bench, contenders
from lipdp.comparison.protocol import ComparedTrainer, Session
from lipdp.comparison.results import Cell, Progress, Results, markdown
from lipdp.data import Split, number_of_units, split_validation
from lipdp.errors import NonFiniteError
from lipdp.training.evaluation import evaluate


@dataclass(frozen=True)
class Job:
    """One training run: a trial, or a final run with the settings that won.

    Attributes:
        dataset, contender, epsilon: the cell; ε None without privacy.
        settings: of the trainer, and "lr".
        seed: of weights, batches and noise.
        trial: judged on a validation part carved out of the training part, and scaled.
    """

    dataset: str
    contender: Contender
    epsilon: float | None
    settings: tuple[tuple[str, Any], ...]
    seed: int
    trial: bool


def utility(
    config: UtilityConfig,
    *,
    out: str | None = None,
    jobs: int = 1,
    progress: Progress = lambda cell, done, total: None,
) -> Results:
    """Tune every trainer at every budget, then train it with its best settings, once for each seed.

    Guarantees: every trainer gets the same data, expected batch size, number of steps, joint noise multiplier,
    optimiser, schedule and number of trials. Settings are chosen on a validation part of the training records; the test
    part is looked at once per final run, and chooses nothing. (None of the choices is covered by ε: they are made as
    one would on public data, for all trainers alike.)

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
    trials = [Job(*cell, settings, 0, True) for cell in cells for settings in _grid(cell[1].trainer, config.trials)]
    trials = trials if config.trials > 1 else []
    total = len(trials) + len(cells) * config.seeds

    def told(cell: Cell) -> None:
        progress(cell, len(tuning.cells) + len(results.cells), total)

    work: dict[str, Any] = {"key": partial(_key, config), "measure": partial(run, config), "told": told, "jobs": jobs}
    tuning.fill(trials, **work)
    finals = []
    for cell in cells:
        settings = _best(config, tuning, cell)
        finals += [Job(*cell, settings, seed, False) for seed in range(config.seeds)]
    results.fill(finals, **work)
    return results


def _grid(trainer: ComparedTrainer, trials: int) -> Iterator[tuple[tuple[str, Any], ...]]:
    """The first combinations of the declared grid; they begin with all learning rates."""
    names = sorted(trainer.grid, key="lr".__eq__)  # the last one varies fastest
    combinations = itertools.product(*(trainer.grid[name] for name in names))
    return (tuple(zip(names, combination, strict=True)) for combination in itertools.islice(combinations, trials))


def _best(
    config: UtilityConfig, tuning: Results, cell: tuple[str, Contender, float | None]
) -> tuple[tuple[str, Any], ...]:
    settings = list(_grid(cell[1].trainer, config.trials))
    if len(settings) == 1:
        return settings[0]
    return max(settings, key=lambda chosen: tuning.find(**_key(config, Job(*cell, chosen, 0, True)))[0]["score"])


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
    session = found.trained(contender, settings, lr=settings.pop("lr"), seed=job.seed)
    split, binary = found.split, found.split.task == "binary"
    try:
        told = evaluate(session.model, split.test_x, split.test_y, binary=binary)
        scores = {name: value for name, value in told.items() if value is not None}  # no AUROC of one class
    except NonFiniteError:  # a learning rate too large for this trainer: the worst score there is
        scores = dict.fromkeys(("accuracy", "auroc") if binary else ("accuracy",), 0.0)
    if job.trial:
        scores = {"score": scores.get("auroc", scores["accuracy"])}
    elif not binary:
        scores |= _calibration(session, found.setup().temperature(contender), split)
    return {
        **_key(config, job),
        **found.facts(contender, trial=job.trial),
        **scores,
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
        shared = {name: cells[0][name] for name in ("settings", "epsilon")}
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
    """Mean ± spread in percent, and whether it learned."""
    spread = "(one seed)" if cell["spread"] is None else f"± {100 * cell['spread']:.1f}"
    return f"{100 * cell['mean']:.1f} {spread}" + ("" if cell["learned"] else ", did not learn")
