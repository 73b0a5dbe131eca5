"""Temperature as the dial between accuracy and certified robustness, for several trainers at one ε."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn

from lipdp.accounting.plan import PrivacyPlan
from lipdp.certify import IMAGE_RADII
from lipdp.certify.inputs import InputMap
from lipdp.certify.run import assess, maps_of
from lipdp.comparison.contenders import Contender, Setup, contenders, trained
from lipdp.comparison.plots import pareto
from lipdp.comparison.protocol import ComparedTrainer
from lipdp.comparison.results import Cell, Results, markdown
from lipdp.comparison.trainers.engine import Clipless
from lipdp.comparison.trainers.opacus import OpacusTrainer
from lipdp.data import Split, load, number_of_units
from lipdp.errors import (
    NonFiniteError,
    ParameterError,
    UnboundedError,
    UnsupportedLayerError,
    UnsupportedOperationError,
)
from lipdp.training.assembly import learning_rate, plan_of, prepare
from lipdp.training.config import TrainConfig, configure
from lipdp.training.evaluation import outputs
from lipdp.training.recipes import default_model

Progress = Callable[[Cell, int, int], None]
_MARKERS = "os^Dv"


@dataclass(frozen=True, kw_only=True)
class RobustnessConfig:
    """What is compared; the options of `lipdp compare robustness`.

    Attributes:
        trainers: of the Lipschitz model; of those without privacy, the unconstrained twin is trained too, at τ = 1,
            with learning rate `twin_lr`: nothing keeps its constant small.
        taus: temperatures of the loss CE(τz)/τ. A large τ asks for a margin of about 1/τ and no more: accuracy; a small
            one rewards any margin: radius.
        radii: in units of the raw input.
        seeds: number of runs of each cell; they are seeded, so repeatable and not private themselves.
        samples: test records certified, the first ones; None for all.
    """

    dataset: str = "digits"
    data_dir: str | None = None
    model: str | None = None
    features: str | None = None
    model_options: dict[str, Any] | None = None
    epsilon: float = 3.0
    delta: float | None = None
    trainers: Sequence[str] = ("clipless", "opacus_hooks", "non_private")
    taus: Sequence[float] = (2.0, 8.0, 32.0, 128.0)
    radii: Sequence[float] = IMAGE_RADII
    seeds: int = 1
    batch_size: int | None = None
    epochs: float | None = None
    lr: float | None = None
    twin_lr: float = 0.1
    max_grad_norm: float = 0.3
    samples: int | None = None
    attack: bool = False

    def __post_init__(self) -> None:
        if not self.taus or min(self.taus) <= 0:
            raise ParameterError(f"taus={tuple(self.taus)}: temperatures are positive numbers")
        if not self.radii or min(self.radii) < 0:
            raise ParameterError(f"radii={tuple(self.radii)}: at least one, none negative")
        if self.seeds < 1 or (self.samples is not None and self.samples < 1):
            raise ParameterError("seeds and samples are at least 1")

    def train_config(self) -> TrainConfig:
        """The recipe, with what was given."""
        names = ("data_dir", "model", "features", "model_options", "delta", "epsilon", "batch_size", "epochs", "lr")
        given = {name: getattr(self, name) for name in names}
        given["model"] = self.model or default_model(self.dataset, self.features)
        return configure(dataset=self.dataset, **given)


@dataclass(frozen=True)
class _Bench:
    """What all cells share."""

    config: RobustnessConfig
    train: TrainConfig
    split: Split
    raw: Split
    maps: tuple[InputMap, ...]
    input_bound: float | None
    plan: PrivacyPlan

    def setup(self, tau: float) -> Setup:
        """Model and loss at a temperature."""
        return Setup.of(self.train, self.split, self.input_bound, tau=tau)


def robustness(
    config: RobustnessConfig, *, out: str | None = None, progress: Progress = lambda cell, done, total: None
) -> Results:
    """Train every trainer at every temperature and certify what came out.

    All private trainers have the same data, q, T and joint noise multiplier, calibrated for ε, and the same optimiser.
    Nothing is tuned, so nothing is chosen by looking at the data.

    Args:
        config: what is compared.
        out: the folder, with `results.json`; one that was begun is completed, cell by cell.
        progress: is given every cell, how many there are then, and how many there will be.

    Returns:
        Cells with trainer, model, dataset, tau, seed, epsilon, accuracy, certified_accuracy (one a radius), lipschitz,
        …. A model that cannot be certified has certified accuracy 0 and says why under `refused`.

    Raises:
        BoundViolation: an attack succeeded inside a certified radius.
    """
    results = Results(out, config={**asdict(config), "what": "robustness"})
    bench: _Bench | None = None
    planned = _plan(config)
    for contender, tau, seed in planned:
        key = _key(config, contender, tau, seed)
        if results.find(**key):
            continue
        bench = bench or _bench(config)
        cell = {**key, **_cell(bench, contender, tau, seed)}
        results.add(cell)
        progress(cell, len(results.cells), len(planned))
    return results


def _plan(config: RobustnessConfig) -> list[tuple[Contender, float, int]]:
    found = []
    for contender in contenders(config.trainers):
        if contender.plain and contender.trainer.private:
            continue
        found += [
            (contender, tau, seed)
            for tau in ((1.0,) if contender.plain else config.taus)
            for seed in range(config.seeds)
        ]
    return found


def _key(config: RobustnessConfig, contender: Contender, tau: float, seed: int) -> Cell:
    model = contender.model_name(config.train_config().model)
    return {"trainer": contender.trainer.name, "model": model, "dataset": config.dataset, "tau": tau, "seed": seed}


def _bench(config: RobustnessConfig) -> _Bench:
    train = config.train_config()
    raw = load(config.dataset, data_dir=config.data_dir)
    data, input_bound = prepare(train)
    split = data.in_memory()
    train = train.resolve(number_of_units(split), binary=split.task == "binary")
    return _Bench(config, train, split, raw, maps_of(train, raw), input_bound, plan_of(train, split, measured=False))


def _cell(bench: _Bench, contender: Contender, tau: float, seed: int) -> Cell:
    begin = time.perf_counter()
    config, train, plan, setup = bench.config, bench.train, bench.plan, bench.setup(tau)
    rate = learning_rate(train, plan, setup.loss_for(contender))
    session = trained(
        contender,
        _configured(contender.trainer, bench),
        setup,
        train,
        bench.split,
        plan=plan,
        lr=config.twin_lr if contender.plain else rate,
        seed=seed,
    )
    private = session.event is not None
    return {
        "batch_size": plan.expected_batch_size,
        "steps": plan.steps,
        "noise_multiplier": plan.noise_multiplier if private else None,
        "epsilon": plan.predicted.epsilon if private else None,
        "delta": plan.target_delta,
        "radii": list(config.radii),
        **_certified(bench, session.model),
        "private": False,  # seeded
        "seconds": round(time.perf_counter() - begin, 2),
    }


def _certified(bench: _Bench, model: nn.Module) -> Cell:
    """Accuracy and certificate; zeros and the reason for a model that has none."""
    config, raw = bench.config, bench.raw
    x, y = raw.test_x[: config.samples], raw.test_y[: config.samples]
    try:
        found = assess(model, x, y, radii=config.radii, maps=bench.maps, attack=config.attack)
    except (UnboundedError, UnsupportedLayerError, UnsupportedOperationError, NonFiniteError) as error:
        nothing = {"certified_accuracy": [0.0] * len(config.radii), "attacked_accuracy": None, "lipschitz": None}
        return {**nothing, "accuracy": _accuracy(model, bench), "mean_radius": 0.0, "refused": str(error)}
    names = ("accuracy", "certified_accuracy", "attacked_accuracy", "lipschitz", "mean_radius", "curve")
    facts = found.as_dict()
    return {name: facts[name] for name in names}


def _accuracy(model: nn.Module, bench: _Bench) -> float:
    """Without a certificate; an answer that is NaN is wrong."""
    y = bench.split.test_y[: bench.config.samples]
    found = outputs(model, bench.split.test_x[: len(y)].split(1024))
    answers = found.argmax(1) if found.shape[1] > 1 else (found[:, 0] > 0).long()
    return float(((answers == y) & found.isfinite().all(1)).double().mean())


def _configured(trainer: ComparedTrainer, bench: _Bench) -> ComparedTrainer:
    """The trainer with the recipe's gate and allocation, or with the clipping norm."""
    if isinstance(trainer, Clipless):
        return replace(trainer, gate=bench.train.gate, allocation=bench.train.allocation)
    return replace(trainer, max_grad_norm=bench.config.max_grad_norm) if isinstance(trainer, OpacusTrainer) else trainer


# --- what it shows ----------------------------------------------------------------------------------------------------


def front(cells: Sequence[Cell], number: int = 0) -> list[Cell]:
    """The cells no other beats in accuracy and in certified accuracy at radius `number`, from accurate to robust."""
    points = pareto([(-cell["accuracy"], cell["certified_accuracy"][number]) for cell in cells])
    return [next(c for c in cells if (-c["accuracy"], c["certified_accuracy"][number]) == point) for point in points]


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


def robustness_figure(results: Results, number: int = 0) -> Any:
    """Certified accuracy at radius `number` against accuracy, a line per trainer and model along τ.

    Thick: the Pareto front of the private cells (of all, where none is). A matplotlib figure that belongs to no window.
    """
    from matplotlib.figure import Figure

    cells = results.cells
    figure = Figure(figsize=(6.5, 4.5), layout="constrained")
    axes = figure.subplots()
    for i, (trainer, model) in enumerate(dict.fromkeys((c["trainer"], c["model"]) for c in cells)):
        mine = sorted(results.find(trainer=trainer, model=model), key=lambda cell: cell["tau"])
        xs, ys = [c["accuracy"] for c in mine], [c["certified_accuracy"][number] for c in mine]
        budget = "no privacy" if mine[0]["epsilon"] is None else f"ε = {mine[0]['epsilon']:.3g}"
        label = f"{trainer}, {model}, {budget}"
        axes.plot(xs, ys, marker=_MARKERS[i % len(_MARKERS)], linewidth=1, color=f"C{i % 10}", label=label)
        for cell, x, y in zip(mine, xs, ys, strict=True):
            axes.annotate(f"τ={cell['tau']:g}", (x, y), textcoords="offset points", xytext=(4, 4), fontsize=7)
    best = front([cell for cell in cells if cell["epsilon"] is not None] or cells, number)
    points = [(c["accuracy"], c["certified_accuracy"][number]) for c in best]
    axes.plot(*zip(*points, strict=True), color="black", linewidth=4, alpha=0.2, zorder=0, label="Pareto front")
    axes.set(xlabel="test accuracy", ylabel=f"certified accuracy at radius {cells[0]['radii'][number]:.3g}")
    axes.set_title(f"Robustness and accuracy: {cells[0]['dataset']}, along the temperature τ")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure
