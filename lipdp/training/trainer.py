"""The training loop: from a configuration to a private model, with metrics, checkpoints and an exact resume."""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from lipdp.accounting.accountants import Spent
from lipdp.data import DataSplit, number_of_units
from lipdp.distributed.collectives import World, current_world
from lipdp.errors import DataError
from lipdp.privacy.deferred import DeferredRead
from lipdp.timing import UNTIMED, Timer
from lipdp.training.account import Account
from lipdp.training.assembly import assemble, decided, open_configured, prepare, with_inputs_named
from lipdp.training.checkpoint import RunFolder
from lipdp.training.config import TrainConfig, config_from_dict
from lipdp.training.environment import environment
from lipdp.training.evaluation import answers, detail_of, evaluate_batches, metrics_of, metrics_or_null
from lipdp.training.monitor import Interrupted, Monitor, Result
from lipdp.training.profile import StepProfile
from lipdp.training.progress import Progress
from lipdp.training.release import Release
from lipdp.training.resume import read_checkpoint, restore, saved_noise_multiplier
from lipdp.training.runtime import own_random_state, stop_signals

_EVALUATED = 1024  # test records at a time


def train(config: TrainConfig, *, out: str | os.PathLike[str] | None = None, monitor: Monitor | None = None) -> Result:
    """Train one model, from data to ε.

    Args:
        config: from `configure`.
        out: the run's folder; without one nothing is written.
        monitor: is told how it goes.

    Raises:
        LipdpError: anything that would break the guarantee or cannot be read or written.
        Interrupted: SIGINT or SIGTERM, after a checkpoint.

    >>> from lipdp.training import configure
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
        profile: times the parts of a few steps.
        world: the processes that train together; by default those of torch.distributed. The first one writes, and alone
            has a `folder`.

    Attributes:
        config: with every number decided.
        model, optimizer, scheduler, loader, criterion, engine, ema: what is trained, and with what.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        out: str | os.PathLike[str] | None = None,
        split: DataSplit | None = None,
        monitor: Monitor | None = None,
        profile: StepProfile | None = None,
        world: World | None = None,
    ) -> None:
        self.profile, self.world = profile, world or current_world()
        self.folder = None if out is None or self.world.rank > 0 else RunFolder(out)
        with self.world.fail_together():
            if self.folder is not None:
                self.folder.require_free()  # before any long work
        self._set_up(config, split, monitor or Monitor(), noise_multiplier=None)
        with self.world.fail_together():
            if self.folder is not None:
                self.folder.start(self.config.as_dict())

    @classmethod
    def resume(
        cls,
        out: str | os.PathLike[str],
        *,
        split: DataSplit | None = None,
        monitor: Monitor | None = None,
        profile: StepProfile | None = None,
        world: World | None = None,
        **given: Any,
    ) -> Trainer:
        """Go on with an interrupted run.

        Args:
            out: its folder.
            split, monitor, profile, world: as for a new run; the number of processes may be another.
            given: settings; those of `config.RUNTIME` may differ from the run's.

        Raises:
            ResumeError: the run is finished, or another setting differs, first of all one that ε depends on.
            CheckpointError: no checkpoint can be read.
        """
        world = world or current_world()
        folder = RunFolder(out)
        with world.fail_together():
            config, checkpoint = read_checkpoint(folder, given, world)
        if checkpoint is None:
            trainer = cls(config, split=split, monitor=monitor, profile=profile, world=world)
            trainer.folder = folder if world.rank == 0 else None
            return trainer
        with world.fail_together():
            sigma = saved_noise_multiplier(checkpoint["resume"])
        trainer = cls.__new__(cls)
        trainer.profile, trainer.world = profile, world
        trainer._set_up(config, split, monitor or Monitor(), noise_multiplier=sigma)
        with world.fail_together():  # and all have read the folder before the first process writes to it
            trainer.engine.plan.check_same(checkpoint.get("plan", {}))
            every = min(config_from_dict(checkpoint["config"]).saves)  # of the session that saved it
            released, first = folder.released_steps(checkpoint, every=every), world.rank == 0
            trainer._random, lost = restore(
                trainer.config, trainer._parts, trainer._progress, checkpoint, released=released, first=first
            )
            trainer._account.plan_again()
            trainer._release.saved_at = None if lost else trainer.step
            folder.check_privacy(trainer.engine.plan.as_dict())
        trainer.folder = folder if world.rank == 0 else None
        return trainer

    # -- construction --------------------------------------------------------------------------------------------------

    def _set_up(
        self, config: TrainConfig, split: DataSplit | None, monitor: Monitor, *, noise_multiplier: float | None
    ) -> None:
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        input_bound = None
        with self.world.fail_together():
            inputs = open_configured(config) if split is None else split
            if split is None:
                config = with_inputs_named(config, inputs)
                split, input_bound = prepare(config, raw=inputs, progress=monitor.features, opened=monitor.opened)
            config = config.resolve(number_of_units(split), binary=split.task == "binary")
        parts = assemble(config, split, input_bound=input_bound, noise_multiplier=noise_multiplier, world=self.world)
        self.config, self.split, self.monitor, self.device = config, split, monitor, parts.device
        self.model, self.optimizer, self.scheduler, self.ema = parts.model, parts.optimizer, parts.scheduler, parts.ema
        self.engine, self.loader, self.criterion = parts.engine, parts.loader, parts.criterion
        self.forward = parts.forward
        self._progress = Progress(torch.zeros((), dtype=torch.float64, device=self.device))
        self._parts, self._account = parts, Account(config, parts, self._progress)
        data = {"input_shape": list(inputs.input_shape), "num_classes": inputs.num_classes}
        self._release = Release(config, parts, self._progress, self._account, self.world, data)
        self._random: Mapping[str, Tensor] = parts.random
        self._details: dict[str, Any] = {}
        self._shown: DeferredRead | None = None
        self._timer: Timer = UNTIMED

    @property
    def step(self) -> int:
        """Noisy steps taken."""
        return self._progress.step

    @property
    def records(self) -> list[dict[str, Any]]:
        """The lines of metrics so far."""
        return self._progress.records

    @property
    def planned(self) -> Spent:
        """ε after all steps, and the accountant that says so."""
        return self._account.planned

    @property
    def total_steps(self) -> int:
        """T."""
        return self.engine.plan.steps

    @property
    def batch_size(self) -> int:
        """B, the expected batch size."""
        return self.engine.plan.expected_batch_size

    @property
    def delta(self) -> float:
        """δ."""
        return decided(self.engine.plan.target_delta)

    # -- the loop ------------------------------------------------------------------------------------------------------

    def run(self) -> Result:
        """Take the steps that are left.

        Raises:
            Interrupted: SIGINT or SIGTERM came; a checkpoint was saved first.
            NonFiniteError: NaN or infinity; the last good checkpoint is left as it is.
        """
        batches = iter(self.loader)
        with own_random_state(self.device, self._random), stop_signals() as stop, closing(batches):
            self.monitor.begin(self)
            if self.folder is not None:
                self.folder.add_session(environment())
            self.model.train()
            if self._release.saved_at is None:
                self._check_test_part()
                if self._parts.table is not None:
                    self._parts.table.measure(self.engine)
                self._release.save(self.folder)
            else:
                self._release.restate(self.folder)
            clock = time.perf_counter() - self._progress.seconds
            while self._goes_on(stop):
                with self._timed():
                    self._take_step(self._pieces(batches, stop))
                self._progress.seconds = time.perf_counter() - clock
                if self.step == self._next_record():
                    self._record()
                elif self.step % self.config.saves[1] == 0:
                    self._release.save(self.folder)
        if self.folder is not None and not self._details:  # killed after its last step
            self._test()
        self._release.finish(self.folder, {"step": self.step, **self._details} if self._details else None)
        return Result(self.records[-1], self.engine.get_epsilon(self.delta), self.delta, self.step, self.folder)

    def _goes_on(self, stop: threading.Event) -> bool:
        """Whether there is a step to take; where a signal came, a checkpoint and `Interrupted`."""
        if self.step < self.total_steps and self.world.any(stop.is_set()):
            if self._release.saved_at != self.step == self.loader.position:  # not between the pieces of a batch
                self._release.save(self.folder)
            where = f"; go on with --resume {self.folder}" if self.folder is not None else ""
            raise Interrupted(f"interrupted after step {self.step} of {self.total_steps}{where}")
        return self.step < self.total_steps

    def _pieces(self, batches: Iterator[Any], stop: threading.Event) -> Iterator[list[Tensor]]:
        """The pieces of the next batch, each read when it is asked for, where the model is."""
        batch = self._read(batches, stop)
        pieces = batch if self.loader.piece else iter([batch])
        del batch
        while (piece := self._read(pieces, stop)) is not None:
            yield [part.to(self.device, non_blocking=True) for part in piece]

    def _read(self, source: Iterator[Any], stop: threading.Event) -> Any:
        try:
            with self._timer("data"):
                return next(source, None)
        except DataError:
            if self.world.size == 1:
                self._goes_on(stop)  # the signal that stops the run may have ended its workers first
            raise

    @contextmanager
    def _timed(self) -> Iterator[None]:
        """One step, its parts named to the profile, if there is one."""
        if self.profile is None:
            yield
            return
        with self.profile.step(self.step, self.total_steps, self.device) as self._timer:
            self.engine.time_with(self._timer)
            yield

    def _take_step(self, pieces: Iterator[list[Tensor]]) -> None:
        self.optimizer.zero_grad()
        total = torch.zeros((), device=self.device)
        for xb, *others in pieces:
            if len(xb):  # an empty batch has no gradient, and its step is noise
                with self._timer("model"):
                    logits = self.forward(xb)
                with self._timer("loss"):
                    loss = self.criterion(logits, *others)
                    total += loss.detach() * (others[1].sum() if len(others) > 1 else len(xb))
                with self._timer("backward"):
                    loss.backward()
                del logits, loss  # with the graph they hold
            del xb, others  # before the next piece is read
        with self._timer("optimiser"):
            self.optimizer.step()
            self.scheduler.step()
            self.ema.update()
        self._progress.step += 1
        self._progress.stds = None
        self._progress.loss += total
        samples = (self.loader.drawn.units if self.loader.drawn else 0) * self.loader.views  # rows, where each weighs 1
        self._progress.samples += samples
        mean = DeferredRead(total.double() / max(samples, 1))
        # off the CPU the loss of the step before is shown: it has arrived, and nothing waits for it
        deferred = self.engine.deferred or self.device.type != "cpu"
        shown, self._shown = self._shown or mean if deferred else mean, mean
        self.monitor.step(self.step, float(shown.read()), self._account.epsilon_at(self._next_record()))

    def _next_record(self) -> int:
        every = self.config.saves[0]
        return min(math.ceil(self.step / every) * every, self.total_steps)

    # -- what is written -----------------------------------------------------------------------------------------------

    def _record(self) -> None:
        self._release.check_weights()
        progress = self._progress
        sums = torch.stack([progress.loss, progress.loss.new_tensor(float(progress.samples))])
        self.world.all_reduce_([sums])
        loss, samples = sums.tolist()
        record: dict[str, Any] = {
            "step": self.step,
            "epsilon": self._account.epsilon_at(self.step),
            "delta": self.delta,
            "lr": self.optimizer.param_groups[0]["lr"],
            "train_loss_not_private": loss / max(samples, 1) if math.isfinite(loss) else None,
        }
        if self.config.gate_quantile is not None:
            record["gate"] = self.engine.state_dict()["gate"]["bound"]
        with self.world.fail_together():
            if self.world.rank == 0:
                record |= self._test()
        record = self.world.broadcast({**record, "seconds": round(progress.seconds, 2)})
        progress.since_record()
        self.records.append(record)
        self._release.save(self.folder)
        self.monitor.record(record)

    def _test(self) -> dict[str, float | None]:
        """Metrics of the last and of the averaged weights."""
        found = {f"test_{n}": v for n, v in self._evaluate("model").items()}
        with self.ema.applied():
            return found | {f"test_{n}_ema": v for n, v in self._evaluate("ema").items()}

    def _evaluate(self, weights: str) -> dict[str, float | None]:
        """Metrics on the test part; after the last step their details are kept for `evaluation.json`."""
        split, binary = self.split, self.split.task == "binary"

        def evaluated() -> dict[str, float | None]:
            batches = split.test_batches(_EVALUATED, num_workers=self.config.num_workers)
            found, truth = answers(self.model, batches, device=self.device)
            if self.step == self.total_steps:
                self._details[weights] = detail_of(found, truth, binary=binary, num_classes=split.num_classes)
            return metrics_of(found, truth, binary=binary)

        return metrics_or_null(evaluated, binary=binary, step=self.step)

    def _check_test_part(self) -> None:
        """Before the first step: that a batch of the test part can be read and put through the model."""
        with self.world.fail_together():
            if self.step == 0 and self.world.rank == 0:
                evaluate_batches(self.model, islice(self.split.test_batches(_EVALUATED), 1), device=self.device)

    def privacy(self) -> dict[str, Any]:
        """What `privacy.json` holds: the plan, and the ε spent so far."""
        return self._account.statement()
