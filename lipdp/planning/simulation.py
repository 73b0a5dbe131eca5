"""Runs at B/k and σ/k that stand for a private run at (B, σ): the scaling law of TAN at work. They are NOT private."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from lipdp.accounting.plan import PrivacyPlan
from lipdp.data import Split, number_of_units, split_validation
from lipdp.errors import NonFiniteError, ParameterError
from lipdp.planning.space import Scalar, merged
from lipdp.training import Trainer, configure
from lipdp.training.assembly import plan_of, prepare
from lipdp.training.config import SETTINGS, TrainConfig

LABEL = "NOT PRIVATE: simulation at a fraction of the batch and of the noise, for choosing hyper-parameters only"
"""Stands in every file, line and database entry of a simulation."""

MOST = 128
"""The largest k."""


@dataclass(frozen=True)
class Simulation:
    """A private run, and its simulation at a k-th of the compute.

    At fixed T the update of one step is (Σ_{i∈batch} ∇ℓ_i + σΔξ)/B: batch and noise divided by k leave the noise of the
    step as it is, σΔ/B, and with it the best learning rate. What changes is the sampling noise of the batch, k times
    the variance; the law holds as long as that stays below the privacy noise. ε does not survive (see `tan.WALL`): a
    simulated run releases next to unprotected gradients.

    B/k is rounded and σ takes the same ratio exactly. The simulated run trains on the training part less a validation
    part, never on the test part, and with that many records its batches are a slightly larger share of them.

    Attributes:
        settings: of the full run, as `lipdp.training.configure` takes them.
        scale: k. validation: share of the training records held out.
        seed: of the simulated runs, the same for all, so that they differ by their settings only.
        plan, simulated: of the full run, and of a simulated one.
        metric: what is maximised, on the validation part, with averaged weights.
    """

    settings: Mapping[str, Any]
    scale: float
    validation: float
    seed: int
    plan: PrivacyPlan
    simulated: PrivacyPlan
    metric: str

    @property
    def saved(self) -> float:
        """Records processed by a full run for one of a simulated run."""
        return self.plan.expected_batch_size / self.simulated.expected_batch_size

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
            "full": _stated(self.plan),
            "simulated": {**_stated(self.simulated), "seeded": True},
        }

    def full_settings(self, drawn: Mapping[str, Scalar]) -> dict[str, Any]:
        """What `configure` takes for the full, private run with what was drawn; B and T are named, σ follows from ε."""
        settings = {
            name: value for name, value in self.settings.items() if name not in ("batch_size", "steps", "epochs")
        }
        return merged({**settings, "batch_size": self.plan.expected_batch_size, "steps": self.plan.steps}, drawn)

    def simulated_config(self, drawn: Mapping[str, Scalar], *, input_bound: float | None) -> TrainConfig:
        """The configuration of one simulated run."""
        settings = {n: v for n, v in self.full_settings(drawn).items() if n not in ("epsilon", "noise_multiplier")}
        config = configure(
            **settings
            | {
                "batch_size": self.simulated.expected_batch_size,
                "noise_multiplier": self.simulated.noise_multiplier,
                "accountant": self.simulated.accountant,
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
    """Decide B, T and σ of the full run, and read its data; arguments as in `Simulation`.

    Returns:
        The simulation, the data as the simulated runs see them (the validation part in the place of the test part), and
            the bound on the norm of the inputs where the features have one.
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
    binary = split.task == "binary"
    plan = plan_of(config.resolve(number_of_units(split), binary=binary), split)
    held_out = split_validation(split, fraction=validation)
    found = Simulation(
        settings=settings,
        scale=float(scale),
        validation=validation,
        seed=seed,
        plan=plan,
        simulated=_simulated(plan, held_out, scale),
        metric="auroc" if binary else "accuracy",
    )
    return found, held_out, input_bound


def _simulated(plan: PrivacyPlan, split: Split, scale: float) -> PrivacyPlan:
    """B/k, rounded, and σ/k such that B/σ is exactly that of the full run."""
    batch_size, left = max(1, round(plan.expected_batch_size / scale)), number_of_units(split)
    if batch_size > left:
        raise ParameterError(
            f"scale={scale:g}: B/k = {batch_size} of {left} {plan.unit}s left to train on; take a larger scale, or a"
            " smaller validation part"
        )
    return replace(
        plan,
        dataset_size=left,
        expected_batch_size=batch_size,
        noise_multiplier=plan.noise_multiplier * batch_size / plan.expected_batch_size,
        accountant="rdp",  # the quickest: nobody relies on the ε of a simulation
        target_epsilon=None,
    )


def _stated(plan: PrivacyPlan) -> dict[str, Any]:
    """What the files of a simulation say of a plan: no ε."""
    names = ("dataset_size", "unit", "sampling", "relation", "expected_batch_size", "sampling_rate", "steps", "bands")
    stated = plan.as_dict()
    return {name: stated[name] for name in (*names, "noise_multiplier")}


class Runner:
    """Carries out simulated runs on data read once, as `simulation` returns them."""

    def __init__(self, simulation: Simulation, split: Split, input_bound: float | None) -> None:
        self.simulation, self._split, self._input_bound = simulation, split, input_bound

    def __call__(self, drawn: Mapping[str, Scalar]) -> dict[str, Any]:
        """One simulated run, never the test part; returns what a trial's file holds.

        `value` is None where the run diverged. `curve` holds a line for each twentieth of the run.
        """
        simulation, plan, start = self.simulation, self.simulation.simulated, time.perf_counter()
        config = simulation.simulated_config(drawn, input_bound=self._input_bound)
        record: dict[str, Any] = {
            "label": LABEL,
            "private": False,
            "drawn": dict(drawn),
            "batch_size": plan.expected_batch_size,
            "noise_multiplier": plan.noise_multiplier,
            "steps": plan.steps,
            "samples": plan.samples,
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
    flag = SETTINGS[name].flag
    if isinstance(value, Mapping):
        return [word for key, item in value.items() for word in (flag, f"{key}={_text(item)}")]
    if isinstance(value, (list, tuple)):
        return [flag, *map(_text, value)]
    return [flag] if value is True else [flag, _text(value)]


def _text(value: Any) -> str:
    if isinstance(value, float):
        return repr(value)
    return value if isinstance(value, str) else json.dumps(value)
