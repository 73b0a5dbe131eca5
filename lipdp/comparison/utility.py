"""Accuracy, or AUROC, of every trainer at given budgets, over several seeds, after equally many tuning trials."""

from __future__ import annotations

import functools
import itertools
import json
import math
import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch

from lipdp.accounting.plan import PrivacyPlan
from lipdp.comparison.calibration import calibration
from lipdp.comparison.contenders import Contender, Setup, contenders, trained
from lipdp.comparison.protocol import ComparedTrainer, Session
from lipdp.comparison.results import Cell, Results, markdown
from lipdp.data import Split, number_of_units, split_validation
from lipdp.errors import NonFiniteError, ParameterError
from lipdp.training.assembly import plan_of, prepare
from lipdp.training.config import TrainConfig, config_from_dict, configure
from lipdp.training.evaluation import evaluate
from lipdp.training.recipes import default_model


@dataclass(frozen=True, kw_only=True)
class UtilityConfig:
    """What is compared, where, and how each trainer is tuned.

    Attributes:
        datasets: as `lipdp.data.load` takes them.
        data_dir, model, features, model_options: as for `lipdp.training.configure`; None takes the recipe's.
        epsilons, delta: budgets; δ None takes the default for N.
        trainers, kinds: of `lipdp compare`: names of `TRAINERS`, and "lipschitz", "plain"; none given, all.
        seeds: number of runs of each trainer at each budget. They give the initial weights, batches and noise: seeded
            runs, which are repeatable and therefore not private themselves.
        trials: number of tuning trials of each trainer at each budget, at most 4: the first of its declared grid.
        validation: share of the training records that trials are judged by; the test part is seen by the final runs
            alone.
        tune_scale: k; trials run at B/k and σ/k, with the signal-to-noise ratio of the full run at a k-th of its cost
            (Sander et al. 2023). A non-private trainer has no noise to scale, and is tuned at B.
        batch_size, epochs, optimizer, momentum, schedule: None takes the recipe's; the same for every trainer.
    """

    datasets: Sequence[str] = ("digits",)
    data_dir: str | None = None
    model: str | None = None
    features: str | None = None
    model_options: Mapping[str, Any] | None = None
    epsilons: Sequence[float] = (1.0, 3.0)
    delta: float | None = None
    trainers: Sequence[str] = ()
    kinds: Sequence[str] = ("lipschitz", "plain")
    seeds: int = 3
    trials: int = 4
    validation: float = 0.1
    tune_scale: int = 1
    batch_size: int | None = None
    epochs: float | None = None
    optimizer: str | None = None
    momentum: float | None = None
    schedule: str | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.trials <= 4:
            raise ParameterError(f"trials={self.trials}: every trainer declares a grid of 4; give 1 to 4")
        for name in ("seeds", "tune_scale"):
            if getattr(self, name) < 1:
                raise ParameterError(f"{name}={getattr(self, name)}: at least 1 is needed")
        if not self.datasets or not self.epsilons:
            raise ParameterError("at least one dataset and one epsilon are needed")

    def train_config(self, dataset: str) -> TrainConfig:
        """The recipe for one of the data sets, with what was given."""
        names = ("data_dir", "model", "features", "model_options", "delta", "batch_size", "epochs", "optimizer")
        given = {name: getattr(self, name) for name in (*names, "momentum", "schedule")}
        given["model"] = self.model or default_model(dataset, self.features)
        return configure(dataset=dataset, epsilon=1.0, **given)


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
    progress: Callable[[Cell, int, int], None] = lambda cell, done, total: None,
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
        progress: is given every cell, how many there are then, and how many there will be.

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

    _run(config, trials, tuning, jobs, told)
    finals = []
    for cell in cells:
        settings = _best(config, tuning, cell)
        finals += [Job(*cell, settings, seed, False) for seed in range(config.seeds)]
    _run(config, finals, results, jobs, told)
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


def _run(
    config: UtilityConfig, asked: Iterable[Job], results: Results, jobs: int, progress: Callable[[Cell], None]
) -> None:
    """Run what is not in the results yet."""
    left = [job for job in asked if not results.find(**_key(config, job))]
    for cell in map(partial(run, config), left) if jobs == 1 else _in_processes(config, left, jobs):
        results.add(cell)
        progress(cell)


def _in_processes(config: UtilityConfig, left: Sequence[Job], jobs: int) -> Iterator[Cell]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        waiting: list[Future[Cell]] = [pool.submit(run, config, job) for job in left]
        try:
            for done in as_completed(waiting):
                yield done.result()
        finally:
            pool.shutdown(cancel_futures=True)


@functools.lru_cache(maxsize=2)
def _data(plain: str) -> tuple[Split, float | None]:
    """The data of a configuration, in JSON, and a bound on the norm of the inputs if their features have one."""
    split, input_bound = prepare(config_from_dict(json.loads(plain)))
    return split.in_memory(), input_bound


@functools.lru_cache(maxsize=64)
def _plan(plain: str, epsilon: float | None) -> tuple[TrainConfig, PrivacyPlan]:
    """The resolved configuration, and the plan of a final run at a budget; without one, σ = 1 which nobody adds."""
    split, _ = _data(plain)
    given = replace(
        config_from_dict(json.loads(plain)), epsilon=epsilon, noise_multiplier=1.0 if epsilon is None else None
    )
    train = given.resolve(number_of_units(split), binary=split.task == "binary")
    return train, plan_of(train, split, measured=False)


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
    plain = json.dumps(config.train_config(job.dataset).as_dict())
    split, input_bound = _data(plain)
    train, plan = _plan(plain, job.epsilon)
    if job.trial:
        split = split_validation(split, fraction=config.validation)
        plan = trial_plan(plan, split, config.tune_scale if job.contender.trainer.private else 1)
    setup = Setup.of(train, split, input_bound)
    settings = dict(job.settings)
    session = trained(
        job.contender,
        replace(job.contender.trainer, **{name: v for name, v in settings.items() if name != "lr"}),
        setup,
        train,
        split,
        plan=plan,
        lr=settings["lr"],
        seed=job.seed,
    )
    try:
        found = evaluate(session.model, split.test_x, split.test_y, binary=split.task == "binary")
        scores = {name: value for name, value in found.items() if value is not None}  # no AUROC of one class
    except NonFiniteError:  # a learning rate too large for this trainer: the worst score there is
        scores = dict.fromkeys(("accuracy", "auroc") if split.task == "binary" else ("accuracy",), 0.0)
    return {
        **_key(config, job),
        "batch_size": plan.expected_batch_size,
        "steps": plan.steps,
        "noise_multiplier": plan.noise_multiplier if job.contender.trainer.private else None,
        "epsilon": plan.predicted.epsilon if job.contender.trainer.private and not job.trial else None,
        "delta": plan.target_delta,
        **({"score": scores.get("auroc", scores["accuracy"])} if job.trial else scores),
        **(
            {}
            if job.trial or split.task == "binary"
            else _calibration(session, setup.temperature(job.contender), split)
        ),
        "chance": chance_of(split),
        "private": False,  # seeded, and trials look at private records
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
        mean = sum(scores) / len(scores)
        spread = math.sqrt(sum((s - mean) ** 2 for s in scores) / (len(scores) - 1)) if len(scores) > 1 else None
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
