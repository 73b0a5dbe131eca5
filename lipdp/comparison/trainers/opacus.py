"""Opacus: per-sample gradients by hooks or by functorch, ghost clipping, clipping per layer."""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from opacus.grad_sample.utils import get_hooks_class
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping, DPPerLayerOptimizer
from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping
from torch import Tensor, nn

import lipdp.comparison.opacus_layers  # noqa: F401  (registers lipdp's layers with Opacus)
from lipdp.comparison.protocol import ComparedTrainer, Grid, Session, Task, ladder, put_back, remove_gates
from lipdp.comparison.trainers.probe import probe, quiet_hooks
from lipdp.errors import ParameterError, UnsupportedLayerError
from lipdp.nn import project_

CLIP_GRID: Grid = {"lr": ladder(0.3, 8), "max_grad_norm": ladder(0.3)}


@dataclass(frozen=True)
class OpacusTrainer(ComparedTrainer):
    """Flat clipping at C by Opacus' own optimiser; subclasses choose how gradients come about and are clipped.

    A record whose gradient is NaN or infinite makes the sum NaN, as in Opacus: C bounds finite gradients.
    """

    max_grad_norm: float = 1.0

    mode: ClassVar[str] = "hooks"
    grid: ClassVar[Grid] = CLIP_GRID

    @property
    def gain(self) -> float:
        return min(1.0, self.max_grad_norm)

    def start(self, model: nn.Module, task: Task) -> Session:
        return OpacusSession(model, task, self)

    def wrap(self, optimizer: torch.optim.Optimizer, **options: Any) -> DPOptimizer:
        """Opacus' optimiser around the task's; `options`: noise multiplier, generator, ….

        σ is Opacus' noise multiplier: noise of std σC on a sum that a record moves by at most C.
        """
        return DPOptimizer(optimizer, max_grad_norm=self.max_grad_norm, **options)

    def backward(self, session: OpacusSession, losses: Tensor) -> None:
        """Per-sample gradients of (n,) losses."""
        losses.sum().backward()


@dataclass(frozen=True)
class Hooks(OpacusTrainer):
    """Per-sample gradients by a sampler for each layer.

    Source: Abadi et al. (2016), algorithm 1; Yousefpour et al. (2021), Opacus.
    """

    name = "opacus_hooks"
    words = "DP-SGD, every gradient clipped at C, by Opacus hooks"


@dataclass(frozen=True)
class Functorch(OpacusTrainer):
    """Per-sample gradients by `torch.func`, for every layer."""

    name = "opacus_functorch"
    words = "the same, gradients by torch.func"
    mode = "functorch"


@dataclass(frozen=True)
class Ghost(OpacusTrainer):
    """Per-sample norms alone, then a second backward pass on losses weighted by min(1, C/‖g‖).

    Source: Li, Tramèr, Liang & Hashimoto (2022), section 4; Opacus 1.6.
    """

    name = "opacus_ghost"
    words = "the same, by norms alone and a second backward pass"
    mode = "ghost"

    def wrap(self, optimizer: torch.optim.Optimizer, **options: Any) -> DPOptimizer:
        return DPOptimizerFastGradientClipping(optimizer, max_grad_norm=self.max_grad_norm, **options)

    def backward(self, session: OpacusSession, losses: Tensor) -> None:
        DPTensorFastGradientClipping(session.hooks, session.private, losses, "sum").backward()


@dataclass(frozen=True)
class PerLayer(OpacusTrainer):
    """Each parameter's gradient clipped to C/√D: together at most C."""

    name = "opacus_per_layer"
    words = "DP-SGD with a threshold for each parameter"

    def wrap(self, optimizer: torch.optim.Optimizer, **options: Any) -> DPOptimizer:
        blocks = sum(len(group["params"]) for group in optimizer.param_groups)
        return DPPerLayerOptimizer(
            optimizer, max_grad_norm=[self.max_grad_norm / math.sqrt(blocks)] * blocks, **options
        )


class OpacusSession(Session):
    """A model with Opacus' hooks on it, and Opacus' optimiser. The divisor is the public B, whatever the batch."""

    def __init__(self, model: nn.Module, task: Task, trainer: OpacusTrainer) -> None:
        if trainer.mode == "ghost" and task.views > 1:
            raise ParameterError(
                f"{trainer.name} finds the norm of every row's gradient, not of the mean over {task.views} views of a"
                " record; take opacus_hooks, or one view"
            )
        self.model, self.task, self.trainer, self.event = model, task, trainer, task.plan.step_event
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        if not self.parameters:
            raise UnsupportedLayerError(f"{trainer.name} cannot train this model: no weight has requires_grad")
        self.gates = remove_gates(model)
        self.hooks: Any = None
        try:
            self._attach()
            probe(self)
        except BaseException:
            OpacusSession.close(self)  # a subclass takes off by itself what it put on before
            raise

    def _attach(self) -> None:
        """Opacus' hooks and optimiser."""
        task, trainer = self.task, self.trainer
        self.loader = task.loader()
        options: dict[str, Any] = {"force_functorch": True} if trainer.mode == "functorch" else {}
        if trainer.mode == "ghost":
            options["max_grad_norm"] = trainer.max_grad_norm
        try:
            self.hooks = get_hooks_class(trainer.mode)(self.model, loss_reduction="sum", **options)
        except (NotImplementedError, ValueError) as error:
            raise UnsupportedLayerError(f"{trainer.name} cannot train this model: {error}") from error
        generator = torch.Generator(self.parameters[0].device)
        generator.manual_seed(secrets.randbits(63) if task.seed is None else task.seed)
        self.optimizer = task.optimizer(self.parameters)
        self.private = trainer.wrap(
            self.optimizer,
            noise_multiplier=task.plan.noise_multiplier,
            expected_batch_size=task.batch_size,
            loss_reduction="sum",
            generator=generator,
        )
        self.private.attach_step_hook(self._divide)

    def step(self, x: Tensor, y: Tensor) -> None:
        self.private.zero_grad()
        pieces = self.task.pieces(x, y)
        for number, (xb, yb) in enumerate(pieces, start=1):
            self.backward(self.task.loss(self.model(xb), yb))
            self.private.signal_skip_step(do_skip=number < len(pieces))  # the noise comes with the last piece
            self.private.step()
            self._forget()
        if not pieces:
            self._no_gradient()
            self.private.step()
        project_(self.model)

    def backward(self, losses: Tensor) -> None:
        """The gradients of their records, or the norms, where Opacus leaves them."""
        with quiet_hooks():
            self.trainer.backward(self, losses)
        if self.task.views > 1:
            self._average_views()

    def norms(self) -> list[Tensor]:
        """(rows,) for each parameter, of what `backward` found."""
        if self.trainer.mode == "ghost":
            return [p._norm_sample for p in self.parameters]  # type: ignore[attr-defined]
        return [self.private._get_flat_grad_sample(p).flatten(1).norm(dim=1) for p in self.parameters]

    def _divide(self, optimizer: DPOptimizer) -> None:
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter.grad /= self.task.batch_size

    def _average_views(self) -> None:
        """A gradient for each record: the mean of its views'.

        Source: De et al. (2022), "Unlocking high-accuracy differentially private image classification through scale".
        """
        for parameter in self.parameters:
            rows: Tensor = parameter.grad_sample  # type: ignore[attr-defined]
            parameter.grad_sample = rows.unflatten(0, (-1, self.task.views)).mean(1)  # type: ignore[attr-defined]

    def _forget(self) -> None:
        """Drop the per-sample gradients of a piece, keep the sum."""
        for parameter in self.parameters:
            parameter.grad_sample = None  # type: ignore[attr-defined]

    def _no_gradient(self) -> None:
        """An empty batch is a step like any other: no gradient, and noise."""
        for parameter in self.parameters:
            parameter.grad_sample = parameter.new_zeros((0, *parameter.shape))  # type: ignore[attr-defined]
            parameter.grad = torch.zeros_like(parameter)

    def close(self) -> None:
        if self.hooks is not None:
            self.hooks.cleanup()
        for parameter in self.parameters:
            for name in ("summed_grad", "grad_sample"):
                vars(parameter).pop(name, None)
        for module in self.model.modules():  # a backward pass that never came leaves what went in
            for name in ("activations", "max_batch_len"):
                vars(module).pop(name, None)
        put_back(self.gates)
