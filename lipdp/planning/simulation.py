"""Runs at B/k and σ/k that stand for a private run at (B, σ): the scaling law of TAN at work. They are NOT private."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from lipdp.accounting.calibration import calibrate
from lipdp.accounting.relation import Relation
from lipdp.data import Split, split_validation
from lipdp.errors import NonFiniteError, ParameterError
from lipdp.planning.space import Scalar, merged
from lipdp.training import Trainer, configure
from lipdp.training.assembly import decided, prepare
from lipdp.training.config import TrainConfig

LABEL = "NOT PRIVATE: simulation at a fraction of the batch and of the noise, for choosing hyper-parameters only"
"""Stands in every file, line and database entry of a simulation."""

MOST = 128
"""The largest k."""


@dataclass(frozen=True)
class Simulation:
    r"""A private run, and what stands for it at k times less compute.

    At fixed T the update of one step is :math:`(\sum_{i\in batch}\nabla\ell_i + \sigma\Delta\xi)/B`: both parts divided
    by k leave the noise of the step as it is, :math:`\sigma\Delta/B`, and so the best learning rate. What changes is
    the sampling noise of the batch, k times the variance; the law holds as long as that stays below the privacy noise.
    ε does not survive (see `lipdp.planning.tan.WALL`): a simulated run releases next to unprotected gradients.

    B/k is rounded and σ takes the same ratio exactly. The simulated run trains on the training part less a validation
    part, never on the test part, and with that many records its batches are a slightly larger share of them.

    Attributes:
        settings: of the full run, as `lipdp.training.configure` takes them.
        scale: k.
        validation: share of the training records held out.
        seed: of the simulated runs, the same for all, so that they differ by their settings only.
        records, batch_size, steps, noise_multiplier: N, B, T, σ of the full run.
        metric: what is maximised, on the validation part, with averaged weights.
    """

    settings: Mapping[str, Any]
    scale: float
    validation: float
    seed: int
    records: int
    batch_size: int
    steps: int
    noise_multiplier: float
    metric: str

    @property
    def simulated_batch_size(self) -> int:
        """B/k, rounded."""
        return max(1, round(self.batch_size / self.scale))

    @property
    def simulated_noise_multiplier(self) -> float:
        """σ/k, so that B/σ is exactly that of the full run."""
        return self.noise_multiplier * self.simulated_batch_size / self.batch_size

    @property
    def saved(self) -> float:
        """Records processed by a full run for one of a simulated run."""
        return self.batch_size / self.simulated_batch_size

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values, with the label."""
        return {
            "label": LABEL,
            "private": False,
            "settings": dict(self.settings),
            "scale": self.scale,
            "validation": self.validation,
            "seed": self.seed,
            "metric": self.metric,
            "full": {
                "records": self.records,
                "batch_size": self.batch_size,
                "steps": self.steps,
                "noise_multiplier": self.noise_multiplier,
            },
            "simulated": {
                "batch_size": self.simulated_batch_size,
                "steps": self.steps,
                "noise_multiplier": self.simulated_noise_multiplier,
                "seeded": True,
            },
        }

    def full_settings(self, drawn: Mapping[str, Scalar]) -> dict[str, Any]:
        """What `configure` takes for the full, private run with what was drawn; B and T are named, σ follows from ε."""
        settings = {
            name: value for name, value in self.settings.items() if name not in ("batch_size", "steps", "epochs")
        }
        return merged({**settings, "batch_size": self.batch_size, "steps": self.steps}, drawn)

    def simulated_config(self, drawn: Mapping[str, Scalar], *, input_bound: float | None) -> TrainConfig:
        """The configuration of one simulated run."""
        settings = {n: v for n, v in self.full_settings(drawn).items() if n not in ("epsilon", "noise_multiplier")}
        config = configure(
            **settings
            | {
                "batch_size": self.simulated_batch_size,
                "noise_multiplier": self.simulated_noise_multiplier,
                "accountant": "rdp",  # the quickest: nobody relies on the ε of a simulation
                "seed": self.seed,
            }
        )
        if input_bound is not None and ":" not in config.model:
            config = replace(config, model_options={"input_bound": input_bound, **config.model_options})
        return config

    def command(self, drawn: Mapping[str, Scalar], *, out: str | None = None) -> str:
        """The one `lipdp train` command of the full private run."""
        words = ["lipdp", "train"]
        for name, value in self.full_settings(drawn).items():
            words += _option(name, value)
        return shlex.join([*words, *(["--out", out] if out is not None else [])])


def simulation(
    settings: Mapping[str, Any], *, scale: float = 16.0, validation: float = 0.1, seed: int = 0
) -> tuple[Simulation, Split, float | None]:
    """Decide B, T and σ of the full run, and read its data.

    Args:
        settings: of the full run, as `configure` takes them; without a seed.
        scale: k in [1, 128].
        validation: share of the training records to validate on.
        seed: of the simulated runs.

    Returns:
        The simulation, the data as the simulated runs see them (the validation part in the place of the test part), and
        the bound on the norm of the inputs where the features have one.

    Raises:
        ParameterError: a scale or a share out of range, or a seeded full run. And what `configure`, the data and the
        calibration raise.
    """
    if not 1.0 <= scale <= MOST:
        raise ParameterError(f"scale={scale}: k in [1, {MOST}] is needed")
    if settings.get("seed") is not None:
        raise ParameterError(
            f"seed={settings['seed']}: the full run is to be private; the simulated runs have a seed of their own"
        )
    settings = {"dataset": "digits"} | {name: value for name, value in settings.items() if value is not None}
    config = configure(**settings)
    data, input_bound = prepare(config)
    split = data.in_memory()
    records, binary = len(split.train_x), split.task == "binary"
    config = config.resolve(records, binary=binary)
    relation = Relation.ADD_OR_REMOVE_ONE if config.sampling == "poisson" else Relation.REPLACE_ONE
    sigma = config.noise_multiplier or calibrate(
        target_epsilon=decided(config.epsilon),
        sampling_rate=decided(config.batch_size) / records,
        steps=decided(config.steps),
        delta=decided(config.delta),
        accountant=config.accountant,
        relation=relation,
    )
    found = Simulation(
        settings=settings,
        scale=float(scale),
        validation=validation,
        seed=seed,
        records=records,
        batch_size=decided(config.batch_size),
        steps=decided(config.steps),
        noise_multiplier=sigma,
        metric="auroc" if binary else "accuracy",
    )
    held_out = split_validation(split, fraction=validation)
    if found.simulated_batch_size > len(held_out.train_x):
        raise ParameterError(
            f"scale={scale:g}: B/k = {found.simulated_batch_size} of {len(held_out.train_x)} records left to train on; "
            "take a larger scale, or a smaller validation part"
        )
    return found, held_out, input_bound


class Runner:
    """Carries out simulated runs on data read once.

    Args:
        simulation, split, input_bound: as `simulation` returns them.
    """

    def __init__(self, simulation: Simulation, split: Split, input_bound: float | None) -> None:
        self.simulation, self._split, self._input_bound = simulation, split, input_bound

    def __call__(self, drawn: Mapping[str, Scalar]) -> dict[str, Any]:
        """One simulated run, never the test part; returns what a trial's file holds.

        `value` is None where the run diverged. `curve` holds a line for each twentieth of the run.
        """
        simulation, start = self.simulation, time.perf_counter()
        config = simulation.simulated_config(drawn, input_bound=self._input_bound)
        record: dict[str, Any] = {
            "label": LABEL,
            "private": False,
            "drawn": dict(drawn),
            "batch_size": simulation.simulated_batch_size,
            "noise_multiplier": simulation.simulated_noise_multiplier,
            "steps": simulation.steps,
            "samples": simulation.simulated_batch_size * simulation.steps,
        }
        trainer = Trainer(config, split=self._split)
        try:
            trainer.run()
            value: float | None = trainer.records[-1][f"test_{simulation.metric}_ema"]
            diverged = ""
        except NonFiniteError as error:
            value, diverged = None, str(error)
        curve = [_validated(line) for line in trainer.records]
        return {**record, "value": value, "diverged": diverged, "curve": curve, "seconds": time.perf_counter() - start}


def _validated(line: Mapping[str, Any]) -> dict[str, Any]:
    """A line of metrics under the names that a validation part has; its ε says nothing and is left out."""
    return {n.replace("test_", "validation_"): v for n, v in line.items() if n not in ("epsilon", "delta")}


def _option(name: str, value: Any) -> list[str]:
    if value is None or value is False:
        return []
    flag = f"--{name.replace('_', '-')}"
    if isinstance(value, Mapping):
        return [word for key, item in value.items() for word in (flag.removesuffix("s"), f"{key}={_text(item)}")]
    return [flag] if value is True else [flag, _text(value)]


def _text(value: Any) -> str:
    if isinstance(value, float):
        return repr(value)
    return value if isinstance(value, str) else json.dumps(value)
