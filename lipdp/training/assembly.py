"""From a configuration to everything a run consists of: data, model, optimiser, engine."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from lipdp.accounting.accountants import Spent
from lipdp.accounting.calibration import EpsilonCurve
from lipdp.accounting.plan import PrivacyPlan
from lipdp.batches.loader import BatchLoader
from lipdp.data import BOUNDINGS, Bounding, DataSplit, bounding, default_bounding, number_of_units, open_split
from lipdp.data.augment import Augmented, augment
from lipdp.distributed.collectives import Alone, World
from lipdp.distributed.wrappers import plan_together
from lipdp.errors import ParameterError
from lipdp.features.maps import FeatureSpec, Progress, apply, features
from lipdp.losses import LipschitzLoss
from lipdp.privacy.criterion import PrivateCriterion
from lipdp.privacy.engine import PrivacyEngine
from lipdp.privacy.gate import QuantileGate
from lipdp.training.choices import make_network, make_optimizer, make_scheduler
from lipdp.training.config import TrainConfig, columns_of
from lipdp.training.ema import Ema, average_of
from lipdp.training.forward import Forward, precision
from lipdp.training.recipes import TABLES, head_rate
from lipdp.training.runtime import choose_device, own_random_state, random_state
from lipdp.training.table_recipe import Preconditioner, TableRun, measured_shares, rows_of, set_public_map, table_model


def open_configured(config: TrainConfig, *, data_dir: str | os.PathLike[str] | None = None) -> DataSplit:
    """The data of a run as they are, resized if it says so. `data_dir`: where, if not where the configuration says."""
    return open_split(
        config.dataset,
        data_dir=data_dir or config.data_dir,
        download=config.download,
        columns=columns_of(vars(config)),
        image_size=config.image_size,
    )


def bounding_of(config: TrainConfig, split: DataSplit) -> Bounding:
    """The public map of a run's inputs."""
    return default_bounding(split) if config.bounding is None else named_bounding(config)


def named_bounding(config: TrainConfig) -> Bounding:
    """That of a configuration which names one."""
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in config.bounding_options.items()}
    return bounding(str(config.bounding), **options)


def with_inputs_named(config: TrainConfig, split: DataSplit) -> TrainConfig:
    """The configuration that also names the map of the inputs, so that a run's folder says all of a trained model.

    Args:
        split: the raw data.
    """
    made: Any = bounding_of(config, split)
    name = next(name for name, kind in BOUNDINGS.items() if type(made) is kind)
    return replace(config, bounding=name, bounding_options=asdict(made))


def prepare(
    config: TrainConfig,
    *,
    raw: DataSplit | None = None,
    progress: Progress | None = None,
    opened: Callable[[TrainConfig, DataSplit], None] | None = None,
) -> tuple[DataSplit, float | None]:
    """The data of a run: read or opened, bounded by public constants, turned into features.

    Features are computed of everything at once: a set that stays on disk is read for them, or refused if it is too
    large.

    Args:
        config: of the run.
        raw: from `open_configured`, if it was called.
        progress: is told how many records have their features.
        opened: is told when the data are open, before any features are computed.

    Returns:
        The split, and where a model clips its inputs, if they are features.
    """
    split = open_configured(config) if raw is None else raw
    split = split.bounded(bounding_of(config, split))
    if opened is not None:
        opened(config, split)
    spec = features_of(config)
    if spec is None:
        return split, None
    return apply(split.in_memory(), spec, progress=progress), spec.input_bound(split.input_shape)


def features_of(config: TrainConfig) -> FeatureSpec | None:
    """The features of a run, if it has some."""
    return None if config.features is None else features(config.features, **config.feature_options)


def stated_features(config: TrainConfig) -> dict[str, Any] | None:
    """The spec of the features of a run, and what computes them; no record has a part in it."""
    spec = features_of(config)
    return (
        None if spec is None else {**spec.to_json(), "computed_by": spec.map.version(), "learned_from_records": False}
    )


def plan_of(
    config: TrainConfig,
    split: DataSplit,
    *,
    noise_multiplier: float | None = None,
    world: World | None = None,
    measured: bool = True,
) -> PrivacyPlan:
    """The plan of a run: the one place between a configuration and its q, T, σ and relation.

    Args:
        config: resolved for the split: with B, T and δ decided.
        split: the data; where it names owners, they are the units.
        noise_multiplier: σ, where the configuration gives only a budget; calibrated by default.
        world: the processes that train together.
        measured: whether what the recipe for tables measures is part of it; without, of the model's training alone.

    Raises:
        CalibrationError, ParameterError: no σ reaches the target; a value out of range.
    """
    return plan_together(
        world or Alone(),
        dataset_size=number_of_units(split),
        unit="record" if split.train_owner is None else "owner",
        expected_batch_size=decided(config.batch_size),
        steps=decided(config.steps),
        sampling=config.sampling,
        bands=config.bands,
        truncated_batch_size=config.truncated_batch_size,
        noise_multiplier=config.noise_multiplier or noise_multiplier,
        target_epsilon=config.epsilon,
        target_delta=config.delta,
        accountant=config.accountant,
        shares=measured_shares(bounding_of(config, split)) if measured and config.model in TABLES else None,
    )


def _dataset(config: TrainConfig, split: DataSplit, device: torch.device) -> Dataset[Any]:
    if config.augment is None:
        return split.training_dataset(device)
    return Augmented(split.training_dataset(), augment(config.augment), views=config.views)


@dataclass(frozen=True)
class Assembly:
    """What a run consists of.

    Attributes:
        planned: ε after all steps.
        random: torch's generators after the model was drawn.
        table: what is measured before the first step, of a table.
    """

    device: torch.device
    model: nn.Module
    forward: Forward
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    ema: Ema
    engine: PrivacyEngine
    loader: BatchLoader
    criterion: PrivateCriterion
    planned: Spent
    curve: EpsilonCurve
    random: dict[str, Tensor]
    table: TableRun | None = None


_CPU_MICROBATCH = 512  # Poisson batches differ in size: in one piece each leaves blocks of its own size in glibc's heap


def _piece(config: TrainConfig, device: torch.device) -> int | None:
    """Records that are read and go through the model together, all views of each; None: the whole batch."""
    samples = config.microbatch or (_CPU_MICROBATCH if device.type == "cpu" else None)
    return None if samples is None else max(1, samples // config.views)


def assemble(
    config: TrainConfig,
    split: DataSplit,
    *,
    input_bound: float | None = None,
    noise_multiplier: float | None = None,
    world: World | None = None,
) -> Assembly:
    """Build a run. Nothing is released.

    Args:
        input_bound: of the model, where it names none. Others as for `plan_of`.

    Raises:
        LipdpError: no bound, no calibration, a name or a number that is not one.
    """
    world = world or Alone()
    device = choose_device(config.device)
    with own_random_state(device):
        torch.manual_seed(config.seed if config.seed is not None else secrets.randbits(63))
        model, loss = make_network(config, split.input_shape, split.num_classes, input_bound=input_bound)
        model = model.to(device)
        random = random_state(device)
    bounding, parts = bounding_of(config, split), table_model(model)
    if parts is not None:
        set_public_map(parts[0], bounding)
    forward = Forward(
        model, autocast=precision(config.autocast), channels_last=config.channels_last, compiled=config.compile
    )
    plan = plan_of(config, split, noise_multiplier=noise_multiplier, world=world)
    rate = learning_rate(config, plan, loss)
    optimizer = make_optimizer(config.optimizer, model.parameters(), lr=rate, momentum=config.momentum)
    engine = PrivacyEngine(
        config.accountant, seed=config.seed, secure=config.secure, check_every=config.check_every, world=world
    )
    _, _, loader, criterion = engine.make_private_with_plan(
        plan,
        module=forward.module,
        optimizer=optimizer,
        criterion=loss,
        dataset=_dataset(config, split, device),
        input_shape=split.input_shape,
        group=split.train_owner,
        views=config.views,
        allocation=config.allocation,
        gate=_gate(config, loss, plan),
        num_workers=config.num_workers,
        pin_memory=config.pin_memory,
        forward_dtype=precision(config.autocast),
        piece=_piece(config, device),
    )
    table = None
    if parts is not None and plan.measurements:
        preconditioner = Preconditioner(optimizer, parts[2])
        table = TableRun(
            model, preconditioner, bounding, rows_of(split, device), min(config.gate or 1.0, loss.lipschitz)
        )
    return Assembly(
        device=device,
        model=model,
        forward=forward,
        optimizer=optimizer,
        scheduler=make_scheduler(config.schedule, optimizer, steps=plan.steps),
        ema=average_of(model, config.ema, tail=config.tail, steps=plan.steps),
        engine=engine,
        loader=loader,
        criterion=criterion,
        planned=plan.predicted,
        curve=EpsilonCurve(plan.events, decided(plan.target_delta), plan.accountant),
        random=random,
        table=table,
    )


def learning_rate(config: TrainConfig, plan: PrivacyPlan, loss: LipschitzLoss) -> float:
    """As configured; where that leaves it to the account, `recipes.head_rate`."""
    if config.lr is not None:
        return config.lr
    return head_rate(
        noise_multiplier=plan.noise_multiplier,
        steps=plan.steps,
        batch_size=plan.expected_batch_size,
        momentum=config.momentum,
        gate=min(config.gate or loss.lipschitz, loss.lipschitz),
        tau=getattr(loss, "tau", 1.0),
        features=config.features,
    )


def _gate(config: TrainConfig, loss: LipschitzLoss, plan: PrivacyPlan) -> float | QuantileGate | None:
    if config.gate_quantile is None:
        return config.gate
    # noise of 2.5 σ on the count leaves all but 2 % of σ to the gradient
    count_std = max(plan.expected_batch_size / 20, 2.5 * plan.noise_multiplier)
    return QuantileGate(config.gate or loss.lipschitz, quantile=config.gate_quantile, count_std=count_std)


def decided(value: Any) -> Any:
    """A setting that `TrainConfig.resolve` has filled in."""
    if value is None:
        raise ParameterError("the configuration has neither an epsilon nor a noise_multiplier; give one")
    return value
