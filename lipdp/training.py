"""The training loop: from a configuration to a private model, with metrics, checkpoints and an exact resume."""

from __future__ import annotations

import math
import os
import secrets
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lipdp.checkpoint import RunFolder
from lipdp.choices import make_loss, make_optimizer, make_scheduler
from lipdp.config import TrainConfig, config_from_dict, configure
from lipdp.data import Split
from lipdp.ema import Ema
from lipdp.errors import CheckpointError, NonFiniteError, ParameterError, ResumeError
from lipdp.evaluation import evaluate
from lipdp.losses import LipschitzLoss
from lipdp.models import build
from lipdp.monitor import Interrupted, Monitor, Result
from lipdp.pipeline import prepare
from lipdp.privacy.calibration import EpsilonCurve, calibrate
from lipdp.privacy.engine import PrivacyEngine
from lipdp.privacy.gate import QuantileGate
from lipdp.relation import Relation
from lipdp.runtime import choose_device, own_random_state, random_state, stop_signals

__all__ = ["Interrupted", "Monitor", "Result", "TrainConfig", "Trainer", "configure", "train"]

NOT_COVERED = "training loss; choices made by looking at private data; metrics on a private test set"


def train(config: TrainConfig, *, out: str | os.PathLike[str] | None = None, monitor: Monitor | None = None) -> Result:
    """Train one model, from data to ε.

    Args:
        config: from `configure`.
        out: the run's folder; without one nothing is written.
        monitor: is told how it goes.

    Raises:
        LipdpError: anything that would break the guarantee or cannot be read or written.
        Interrupted: SIGINT or SIGTERM, after a checkpoint.

    >>> result = train(configure(dataset="digits", model="linear", steps=3, noise_multiplier=9.0, seed=0))
    >>> result.steps, result.epsilon < 1, sorted(result.metrics)[-3:]
    (3, True, ['test_accuracy', 'test_accuracy_ema', 'train_loss_not_private'])
    """
    return Trainer(config, out=out, monitor=monitor).run()


class Trainer:
    r"""One run: everything is decided when it is made, nothing is released before `run`.

    Guarantees: each step is one step of `PrivacyEngine`, so the weights after any number of steps, their average, the
    checkpoints' weights and the metrics on the test part are (ε, δ)-DP for the training records, ε as reported. An
    interrupted run that is resumed ends with the same bits (on a CPU, with the same number of threads) as one that
    was not.

    Args:
        config: from `configure`.
        out: the run's folder; refused if it holds a run.
        split: the data, if they are not to be read as the configuration says.
        monitor: is told how it goes.

    Attributes:
        config: with every number decided.
        model, optimizer, scheduler, loader, criterion, engine, ema: what is trained, and with what.
        step: noisy steps taken.
        planned: ε after all of them, and the accountant that says so.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        out: str | os.PathLike[str] | None = None,
        split: Split | None = None,
        monitor: Monitor | None = None,
    ) -> None:
        self._set_up(config, split, monitor or Monitor(), noise_multiplier=None)
        self.folder = None if out is None else RunFolder(out)
        if self.folder is not None:
            self.folder.start(self.config.as_dict())

    @classmethod
    def resume(
        cls,
        out: str | os.PathLike[str],
        *,
        split: Split | None = None,
        monitor: Monitor | None = None,
        **given: Any,
    ) -> Trainer:
        """Go on with an interrupted run.

        Args:
            out: its folder.
            split, monitor: as for a new run.
            given: settings; those of `config.RUNTIME` may differ from the run's.

        Raises:
            ResumeError: the run is finished, or another setting differs, first of all one that ε depends on.
            CheckpointError: no checkpoint can be read.
        """
        folder = RunFolder(out)
        config = config_from_dict(folder.config())
        checkpoint = folder.load()
        if "resume" not in checkpoint:
            folder.seal()
            raise ResumeError(f"the run in {folder} is finished: all {checkpoint['step']} steps are taken")
        config = config.resumed(checkpoint["config"]).resumed(given)
        saved = checkpoint["resume"]
        trainer = cls.__new__(cls)
        trainer._set_up(config, split, monitor or Monitor(), noise_multiplier=_saved_noise_multiplier(saved))
        trainer.folder = folder
        trainer._restore(checkpoint["model"], saved)
        return trainer

    # -- construction --------------------------------------------------------------------------------------------------

    def _set_up(
        self, config: TrainConfig, split: Split | None, monitor: Monitor, *, noise_multiplier: float | None
    ) -> None:
        self.monitor = monitor
        self.device = choose_device(config.device)
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        input_bound = None
        if split is None:
            split, input_bound = prepare(config, progress=monitor.features)
        self.split = split
        self.config = config = config.resolve(len(split.train_x), binary=split.task == "binary")
        loss, outputs = make_loss(str(config.loss), split.num_classes, config.loss_options)
        options = dict(config.model_options)
        if input_bound is not None and ":" not in config.model:
            options.setdefault("input_bound", input_bound)
        with own_random_state(self.device):
            torch.manual_seed(config.seed if config.seed is not None else secrets.randbits(63))
            model = build(config.model, input_shape=split.input_shape, num_classes=outputs, **options)
            self.model: nn.Module = model.to(self.device)
            self._random = random_state(self.device)
        self.optimizer = make_optimizer(
            config.optimizer, self.model.parameters(), lr=config.lr, momentum=config.momentum
        )
        self.scheduler = make_scheduler(config.schedule, self.optimizer, steps=self.total_steps)
        self.ema = Ema(self.model, config.ema)
        self._make_private(loss, config.noise_multiplier or noise_multiplier)
        self.records: list[dict[str, Any]] = []
        self.step, self._seconds, self._loss, self._samples = 0, 0.0, 0.0, 0
        self._saved_at: int | None = None

    def _make_private(self, loss: LipschitzLoss, noise_multiplier: float | None) -> None:
        config, split = self.config, self.split
        relation = Relation.ADD_OR_REMOVE_ONE if config.sampling == "poisson" else Relation.REPLACE_ONE
        if noise_multiplier is None:
            noise_multiplier = calibrate(
                target_epsilon=_decided(config.epsilon),
                sampling_rate=self.batch_size / len(split.train_x),
                steps=self.total_steps,
                delta=self.delta,
                accountant=config.accountant,
                relation=relation,
            )
        gate: float | QuantileGate | None = config.gate
        if config.gate_quantile is not None:
            # 2.5 σ of noise on the count leave all but 2 % of σ to the gradient
            spread = max(self.batch_size / 20, 2.5 * noise_multiplier)
            gate = QuantileGate(config.gate or loss.lipschitz, quantile=config.gate_quantile, count_std=spread)
        self.engine = PrivacyEngine(config.accountant, seed=config.seed)
        _, _, self.loader, self.criterion = self.engine.make_private(
            module=self.model,
            optimizer=self.optimizer,
            criterion=loss,
            dataset=TensorDataset(split.train_x.to(self.device), split.train_y.to(self.device)),
            expected_batch_size=self.batch_size,
            steps=self.total_steps,
            noise_multiplier=noise_multiplier,
            allocation=config.allocation,
            sampling=config.sampling,
            gate=gate,
            target_epsilon=config.epsilon,
            target_delta=config.delta,
        )
        plan = self.engine.facts.step_event.with_steps(self.total_steps)
        self._curve = EpsilonCurve([plan], self.delta, config.accountant)
        self.planned = self.engine.accountant.epsilon([plan], self.delta)
        self._epsilons = {self.total_steps: self.planned.epsilon}

    @property
    def total_steps(self) -> int:
        """T."""
        return _decided(self.config.steps)

    @property
    def batch_size(self) -> int:
        """B, the expected batch size."""
        return _decided(self.config.batch_size)

    @property
    def delta(self) -> float:
        """δ."""
        return _decided(self.config.delta)

    # -- the loop ------------------------------------------------------------------------------------------------------

    def run(self) -> Result:
        """Take the steps that are left.

        Raises:
            Interrupted: SIGINT or SIGTERM came; a checkpoint was saved first.
            NonFiniteError: NaN or infinity; the last good checkpoint is left as it is.
        """
        with own_random_state(self.device, self._random), stop_signals() as stop:
            self.monitor.begin(self)
            self.model.train()
            if self._saved_at is None:
                self._save()
            clock = time.perf_counter() - self._seconds
            for x, y in self._batches(stop):
                self._take_step(x, y)
                self._seconds = time.perf_counter() - clock
                last = self.step == self.total_steps
                if self.step % self._every(self.config.log_every, 20) == 0 or last:
                    self._record()
                if self.step % self._every(self.config.checkpoint_every, 10) == 0 and not last:
                    self._save()
        return self._finish()

    def _batches(self, stop: threading.Event) -> Iterator[tuple[Tensor, Tensor]]:
        """The loader's batches, until a signal comes: then a checkpoint and `Interrupted`."""
        batches = iter(self.loader)
        while self.step < self.total_steps:
            if stop.is_set():
                self._save()
                where = f"; go on with --resume {self.folder}" if self.folder is not None else ""
                raise Interrupted(f"interrupted after step {self.step} of {self.total_steps}{where}")
            yield next(batches)

    def _take_step(self, x: Tensor, y: Tensor) -> None:
        self.optimizer.zero_grad()
        total = torch.zeros((), device=self.device)
        for xb, yb in self.engine.microbatches(x, y, self.config.microbatch or max(len(x), 1)):
            if len(xb):  # an empty batch has no gradient, and its step is noise
                loss = self.criterion(self.model(xb.float()), yb)
                loss.backward()
                total += loss.detach()
        self.optimizer.step()
        self.scheduler.step()
        self.ema.update()
        self.step += 1
        self._loss += float(total)
        self._samples += len(x)
        self.monitor.step(self.step, float(total) / max(len(x), 1), self.epsilon_at(self._next_record()))

    def epsilon_at(self, step: int) -> float:
        """An upper bound on ε after `step` steps of this run; at the end, what `engine.get_epsilon` says."""
        if step not in self._epsilons:
            self._epsilons[step] = self._curve(step)
        return self._epsilons[step]

    def _every(self, given: int | None, parts: int) -> int:
        return given or max(1, math.ceil(self.total_steps / parts))

    def _next_record(self) -> int:
        every = self._every(self.config.log_every, 20)
        return min(math.ceil(self.step / every) * every, self.total_steps)

    # -- what is written -----------------------------------------------------------------------------------------------

    def _record(self) -> None:
        self._check_weights()
        record: dict[str, Any] = {
            "step": self.step,
            "epsilon": self.epsilon_at(self.step),
            "delta": self.delta,
            "lr": self.optimizer.param_groups[0]["lr"],
            "train_loss_not_private": self._loss / max(self._samples, 1),
        }
        if self.config.gate_quantile is not None:
            record["gate"] = self.engine.state_dict()["gate"]["bound"]
        test = {f"test_{n}": v for n, v in self._evaluate().items()}
        with self.ema.applied():
            averaged = {f"test_{n}_ema": v for n, v in self._evaluate().items()}
        record |= {**test, **averaged, "seconds": round(self._seconds, 2)}
        self._loss, self._samples = 0.0, 0
        self.records.append(record)
        self._report()
        self.monitor.record(record)

    def _evaluate(self) -> dict[str, float]:
        split = self.split
        return evaluate(self.model, split.test_x, split.test_y, binary=split.task == "binary", device=self.device)

    def privacy(self) -> dict[str, Any]:
        """What `privacy.json` holds: the facts, and the ε spent so far."""
        facts = self.engine.facts.as_dict()
        return {
            "epsilon": self.epsilon_at(self.step),
            "delta": self.delta,
            **facts,
            "steps": self.step,
            "planned_steps": self.total_steps,
            "planned_epsilon": self.planned.epsilon,
            "accountant": self.planned.accountant,
            "accountant_requested": self.planned.requested,
            "accountant_note": self.planned.note,
            "sensitivity": dict(self.engine.sensitivity()),
            "protects": f"each of the {facts['dataset_size']} training records, input and label",
            "not_covered": NOT_COVERED,
        }

    def _report(self) -> None:
        """Account for what is about to leave the process, before it does."""
        if self.folder is not None:
            self.folder.write_privacy(self.privacy())
            self.folder.write_metrics(self.records)

    def _save(self) -> None:
        self._check_weights()
        self._saved_at = self.step
        if self.folder is not None:
            self._report()
            self.folder.save({**self._weights(), "resume": self._state()})

    def _finish(self) -> Result:
        if self.folder is not None:
            self.folder.save(self._weights())
            self.folder.seal()
        epsilon = self.engine.get_epsilon(self.delta)
        return Result(self.records[-1], epsilon, self.delta, self.step, self.folder)

    def _weights(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "ema": {**self.model.state_dict(), **self.ema.weights()},
            "step": self.step,
            "config": self.config.as_dict(),
            "facts": self.engine.facts.as_dict(),
        }

    def _check_weights(self) -> None:
        bad = [n for n, p in self.model.named_parameters() if not bool(torch.isfinite(p).all())]
        if bad:
            kept = f"; the last good checkpoint is of step {self._saved_at}" if self._saved_at is not None else ""
            raise NonFiniteError(
                f"step {self.step}: NaN or infinity in {', '.join(bad)}; lower the learning rate{kept}"
            )

    # -- state ---------------------------------------------------------------------------------------------------------

    def _state(self) -> dict[str, Any]:
        return {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "ema": self.ema.state_dict(),
            "engine": self.engine.state_dict(),
            "random": random_state(self.device),
            "records": self.records,
            "progress": [self.step, self._seconds, self._loss, self._samples],
        }

    def _restore(self, model: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        self.engine.load_state_dict(state["engine"])
        try:
            self.model.load_state_dict(model)
            self.optimizer.load_state_dict(state["optimizer"])
            self.scheduler.load_state_dict(state["scheduler"])
            self.ema.load_state_dict(state["ema"])
            self._random = state["random"]
            self.records = list(state["records"])
            self.step, self._seconds, self._loss, self._samples = state["progress"]
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise ResumeError(f"the checkpoint does not fit this run: {error}") from error
        self._saved_at = self.step


def _decided(value: Any) -> Any:
    """A setting that `TrainConfig.resolve` has filled in."""
    if value is None:
        raise ParameterError("the configuration has neither an epsilon nor a noise_multiplier; give one")
    return value


def _saved_noise_multiplier(state: dict[str, Any]) -> float:
    try:
        return float(state["engine"]["facts"]["noise_multiplier"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"the checkpoint lacks the state of its engine ({error!r})") from error
