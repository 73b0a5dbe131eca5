"""Figures of a run for TensorBoard, and several monitors as one."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lipdp.certify import certify
from lipdp.errors import LipdpError, ParameterError
from lipdp.training.monitor import Monitor

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from lipdp.training import Trainer

_log = logging.getLogger(__name__)
_CERTIFIED = 256  # test records whose radius is looked at in every record: enough for a median


class Monitors(Monitor):
    """Tells several monitors."""

    def __init__(self, monitors: Sequence[Monitor]) -> None:
        self.monitors = tuple(monitors)
        for what in ("opened", "features", "begin", "step", "record"):
            setattr(self, what, partial(self._tell, what))

    def _tell(self, what: str, *arguments: Any) -> None:
        for monitor in self.monitors:
            getattr(monitor, what)(*arguments)


class TensorBoard(Monitor):
    """Writes scalars to RUN/tensorboard, readable by their owner alone, whenever the run writes a record.

    - `privacy/epsilon`: spent so far.
    - `not_private/train_loss`: after every step. ε does not cover it, and the tag says so.
    - `noise/largest_signal`: B √(Σ_l Δ_l²) / √(Σ_l d_l s_l²), the most that the gradients of B records can weigh over
      the noise. A bound from released weights, no figure of the data.
    - `noise/gradient_to_noise`: √max(0, ‖B g̃‖² / Σ_l d_l s_l² − 1) from the noisy gradient g̃ that the step released, so
      it costs no privacy. The noise's energy is known, and what is above it is the gradient's.
    - `robustness/lipschitz`: the network's certified constant.
    - `robustness/median_certified_radius`: of 256 test records, in units of the model's input (after bounding and
      features).
    - `test/…`: as in metrics.jsonl.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder) / "tensorboard"
        self._losses: list[tuple[int, float]] = []
        self._trainer: Trainer | None = None
        self._writer_type = _summary_writer()
        self._writer: SummaryWriter | None = None

    def begin(self, trainer: Trainer) -> None:
        """Open the file; what a run that was interrupted wrote beyond its checkpoint is left out of the curves."""
        self._trainer = trainer
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._writer = self._writer_type(str(self.folder), purge_step=trainer.step + 1 if trainer.step else None)
        except OSError as error:
            if not trainer.step:
                raise ParameterError(f"--tensorboard can't write to {self.folder} ({error})") from error
            self._stop(error)

    def step(self, step: int, loss: float, epsilon: float) -> None:
        """Keep the loss until the step is in a checkpoint."""
        self._losses.append((step, loss))

    def record(self, record: dict[str, Any]) -> None:
        """Write what is known at this step. A disk that is full ends the figures, not the run."""
        if self._trainer is None or self._writer is None:
            return
        try:
            self._write(self._trainer, self._writer, record)
        except Exception as error:  # the writer's thread hands on whatever stopped it
            self._stop(error)

    def _stop(self, error: Exception) -> None:
        self._writer = None
        _log.warning("no more figures are written to %s (%s)", self.folder, error)

    def _write(self, trainer: Trainer, writer: SummaryWriter, record: dict[str, Any]) -> None:
        for step, loss in self._losses:
            writer.add_scalar("not_private/train_loss", loss, step)
        self._losses.clear()
        scalars = {"privacy/epsilon": record["epsilon"], **_noise(trainer), **_robustness(trainer)}
        scalars |= {f"test/{name[5:]}": value for name, value in record.items() if name.startswith("test_")}
        for tag, value in scalars.items():
            if value is not None and math.isfinite(value):
                writer.add_scalar(tag, value, record["step"])
        writer.flush()
        if record["step"] == trainer.total_steps:
            writer.close()


@torch.no_grad()
def _noise(trainer: Trainer) -> dict[str, float]:
    parameters = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
    stds, bounds = trainer.engine.noise_stds(), trainer.engine.sensitivity()
    energy = sum(parameters[name].numel() * std**2 for name, std in stds.items())
    if not energy:
        return {"robustness/lipschitz": bounds.lipschitz}
    released = sum(float(p.grad.double().square().sum()) for p in parameters.values() if p.grad is not None)
    excess = trainer.batch_size**2 * released / energy - 1.0
    return {
        "noise/largest_signal": trainer.batch_size * bounds.total / math.sqrt(energy),
        "noise/gradient_to_noise": math.sqrt(max(0.0, excess)),
        "robustness/lipschitz": bounds.lipschitz,
    }


def _robustness(trainer: Trainer) -> dict[str, float]:
    x, y = next(iter(trainer.split.test_batches(_CERTIFIED)))
    try:
        radii = certify(trainer.model, x.to(trainer.device), y.to(trainer.device)).radii
    except LipdpError:  # no certified constant: no radius, and the run goes on
        return {}
    return {"robustness/median_certified_radius": float(radii.median())}


def _summary_writer() -> type[SummaryWriter]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ParameterError(f'--tensorboard needs tensorboard ({error}): pip install "lipdp[tensorboard]"') from error
    return SummaryWriter
