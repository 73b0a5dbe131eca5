"""Temperature as the dial between accuracy and certified robustness, for several trainers at one ε."""

from __future__ import annotations

import functools
import time
from dataclasses import asdict
from functools import partial
from typing import Any

from torch import nn

from lipdp.certify.inputs import InputMap
from lipdp.certify.run import assess, maps_of
from lipdp.comparison.configs import RobustnessConfig
from lipdp.comparison.contenders import Bench, Contender, bench, contenders
from lipdp.comparison.results import Cell, Progress, Results, markdown
from lipdp.comparison.trainers.engine import Clipless
from lipdp.comparison.trainers.opacus import OpacusTrainer
from lipdp.data import Split, load
from lipdp.errors import NonFiniteError, UnboundedError, UnsupportedLayerError, UnsupportedOperationError
from lipdp.losses.labels import answers_of
from lipdp.training.assembly import learning_rate
from lipdp.training.evaluation import outputs

Job = tuple[Contender, float, int]
"""Whom to train, at which temperature, with which seed."""


def robustness(
    config: RobustnessConfig, *, out: str | None = None, progress: Progress = lambda cell, done, total: None
) -> Results:
    """Train every trainer at every temperature and certify what came out.

    All private trainers have the same data, q, T and noise multiplier, calibrated for ε, and the same optimiser.
    Nothing is tuned, so nothing is chosen by looking at the data.

    Returns:
        Cells with trainer, model, dataset, tau, seed, epsilon, accuracy, certified_accuracy (one a radius), lipschitz,
        …. A model that cannot be certified has certified accuracy 0 and says why under `refused`.

    Raises:
        BoundViolation: an attack succeeded inside a certified radius.
    """
    results = Results(out, config={**asdict(config), "what": "robustness"})
    asked = [
        (contender, tau, seed)
        for contender in contenders(config.trainers)
        if not (contender.plain and contender.trainer.private)
        for tau in ((1.0,) if contender.plain else config.taus)
        for seed in range(config.seeds)
    ]

    results.fill(asked, key=partial(_key, config), run=partial(_run, config), progress=progress, total=len(asked))
    return results


def _key(config: RobustnessConfig, job: Job) -> Cell:
    contender, tau, seed = job
    model = contender.model_name(config.train_config().model)
    return {"trainer": contender.trainer.name, "model": model, "dataset": config.dataset, "tau": tau, "seed": seed}


def _run(config: RobustnessConfig, job: Job) -> Cell:
    begin = time.perf_counter()
    contender, tau, seed = job
    shared = bench(config.train_config(), config.epsilon)
    setup = shared.setup(tau=tau)
    rate = learning_rate(shared.train, shared.plan, setup.loss_for(contender))
    settings: dict[str, Any] = {}
    if isinstance(contender.trainer, Clipless):
        settings = {"gate": shared.train.gate, "allocation": shared.train.allocation}
    elif isinstance(contender.trainer, OpacusTrainer):
        settings = {"max_grad_norm": config.max_grad_norm}
    session = shared.trained(
        contender, settings, lr=config.twin_lr if contender.plain else rate, seed=seed, setup=setup
    )
    return {
        **_key(config, job),
        **shared.plan_figures(contender),
        "radii": list(config.radii),
        **_certified(config, shared, session.model),
        "seconds": round(time.perf_counter() - begin, 2),
    }


@functools.lru_cache(maxsize=1)
def _raw(dataset: str, data_dir: str | None) -> Split:
    return load(dataset, data_dir=data_dir)


def _certified(config: RobustnessConfig, shared: Bench, model: nn.Module) -> Cell:
    """Accuracy and certificate; zeros and the reason for a model that has none."""
    raw = _raw(config.dataset, config.data_dir)
    x, y = raw.test_x[: config.samples], raw.test_y[: config.samples]
    maps: tuple[InputMap, ...] = maps_of(shared.train, raw)
    try:
        found = assess(model, x, y, radii=config.radii, maps=maps, attack=config.attack)
    except (UnboundedError, UnsupportedLayerError, UnsupportedOperationError, NonFiniteError) as error:
        nothing = {"certified_accuracy": [0.0] * len(config.radii), "attacked_accuracy": None, "lipschitz": None}
        accuracy = _accuracy(model, shared.split, config.samples)
        return {**nothing, "accuracy": accuracy, "mean_radius": 0.0, "refused": str(error)}
    names = ("accuracy", "certified_accuracy", "attacked_accuracy", "lipschitz", "mean_radius", "curve")
    figures = found.as_dict()
    return {name: figures[name] for name in names}


def _accuracy(model: nn.Module, split: Split, samples: int | None) -> float:
    """Without a certificate; an answer that is NaN is wrong."""
    y = split.test_y[:samples]
    found = outputs(model, split.test_x[: len(y)].split(1024))
    return float(((answers_of(found) == y) & found.isfinite().all(1)).double().mean())


# --- what it shows ----------------------------------------------------------------------------------------------------


def table(results: Results) -> str:
    """Accuracy and certified accuracy in percent, a row for each cell."""
    radii = results.cells[0]["radii"] if results.cells else []
    body = []
    for cell in results.cells:
        constant = "none" if cell["lipschitz"] is None else f"{cell['lipschitz']:.3g}"
        budget = "no privacy" if cell["epsilon"] is None else f"{cell['epsilon']:.3g}"
        scores = [cell["accuracy"], *cell["certified_accuracy"]]
        body.append(
            [cell["trainer"], cell["model"], f"{cell['tau']:g}", budget, constant, *(f"{100 * s:.1f}" for s in scores)]
        )
    return markdown(["trainer", "model", "τ", "ε", "K", "accuracy", *(f"r = {r:.3g}" for r in radii)], body)
