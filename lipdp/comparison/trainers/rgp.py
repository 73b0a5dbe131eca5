"""RGP: per-sample gradients of two thin matrices for each weight, clipped and noised in its place."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn

from lipdp.accounting.plan import whole
from lipdp.comparison.protocol import Session, Task
from lipdp.comparison.trainers.opacus import OpacusSession, OpacusTrainer

_WINDOWS = ("kernel_size", "stride", "padding", "dilation", "padding_mode")


@dataclass(frozen=True)
class Reparametrized(OpacusTrainer):
    r"""Reparametrized gradient perturbation: W = L R + (W − L R), of which L and R alone have gradients.

    W is the weight of one nn.Linear, or of one nn.Conv2d without groups as a matrix (out, in·k·k); a weight that layers
    share is clipped as it is. At every step L (out, r) and R (r, in·k·k) are one power iteration on W_t − W_0,
    orthonormalised; on a random matrix while W_t = W_0. Of L, R and all other parameters (biases) together every
    record's gradient is clipped to C, their sum gets noise of std σC, and W the gradient ∂L R + L ∂R − L Lᵀ ∂L R: as
    ∂L = ∂W Rᵀ and ∂R = Lᵀ ∂W, that is the orthogonal projection of ∂W onto {A R + L B}, and ∂W itself at full rank.

    Guarantees: one step is one Gaussian mechanism of noise multiplier σ on one Poisson batch, as with flat clipping.
    L and R follow from W_t and W_0, which are released, and from random numbers, not from the batch: given the steps
    before, one record more or less moves the sum by one clipped gradient, of norm at most C if finite. What becomes of
    the noisy sum, from the projection on, is post-processing.

    Attributes:
        rank: r ≥ 1; of a smaller matrix, its smaller side. The authors' example takes 16 for a WRN-28-10.

    Source: Yu, Zhang, Chen, Yin & Liu (2021), "Large scale private learning via low-rank reparametrization". Their code
    (dayu11/Differentially-Private-Deep-Learning, vision/RGP) trains the last layer without L and R; here all have them.
    """

    rank: int = 8

    name = "rgp"
    words = "clips gradients of two thin matrices for each weight, on an unconstrained model"
    lipschitz = False

    def __post_init__(self) -> None:
        whole("rank", self.rank)

    def start(self, model: nn.Module, task: Task) -> Session:
        return _Session(model, task, self)


class _Session(OpacusSession):
    """Opacus' hooks and clipping on carriers and biases; the task's optimiser moves weights and biases."""

    def __init__(self, model: nn.Module, task: Task, trainer: Reparametrized) -> None:
        uses = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
        layers = [layer for layer in model.modules() if _has_carriers(layer) and uses[id(layer.weight)] == 1]
        self.carriers = [_Carriers(layer, trainer.rank) for layer in layers]
        try:
            super().__init__(model, task, trainer)
        except BaseException:
            self._remove_carriers()
            raise
        if layers:
            self.optimizer.add_param_group({"params": [layer.weight for layer in layers]})

    def step(self, x: Tensor, y: Tensor) -> None:
        for carriers in self.carriers:
            carriers.renew_(self.private.generator)
        super().step(x, y)

    def _divide(self, optimizer: DPOptimizer) -> None:
        super()._divide(optimizer)
        for carriers in self.carriers:
            carriers.map_back_()

    def close(self) -> None:
        super().close()
        self._remove_carriers()

    def _remove_carriers(self) -> None:
        for carriers in self.carriers:
            carriers.remove()


def _has_carriers(layer: nn.Module) -> bool:
    plain = type(layer) is nn.Linear or (type(layer) is nn.Conv2d and layer.groups == 1)
    return plain and bool(layer.weight.requires_grad)


class _Carriers:
    """L and R of one layer, as two layers within it whose gradients Opacus samples; the weight itself is frozen."""

    left: nn.Linear | nn.Conv2d
    right: nn.Linear | nn.Conv2d

    def __init__(self, layer: nn.Module, rank: int) -> None:
        self.layer, self.plain_forward = layer, layer.forward
        self.weight: nn.Parameter = layer.weight  # type: ignore[assignment]
        self.start = self.weight.detach().clone()
        rank = min(rank, *self.start.flatten(1).shape)
        kind: dict[str, Any] = {"bias": False, "device": self.start.device, "dtype": self.start.dtype}
        if isinstance(layer, nn.Conv2d):
            windows = {name: getattr(layer, name) for name in _WINDOWS}
            self.right = nn.Conv2d(layer.in_channels, rank, **windows, **kind)
            self.left = nn.Conv2d(rank, layer.out_channels, 1, **kind)
        else:
            self.right = nn.Linear(self.start.shape[1], rank, **kind)
            self.left = nn.Linear(rank, self.start.shape[0], **kind)
        layer.left, layer.right, layer.forward = self.left, self.right, self.forward
        self.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's own values and cotangents, to the bit: L R x is added and taken off, for ∂L and ∂R alone."""
        carried = self.left(self.right(x.detach()))
        return self.plain_forward(x) + (carried - carried.detach())

    @torch.no_grad()
    def renew_(self, generator: torch.Generator) -> None:
        """L an orthonormal basis of (W_t − W_0) Ω with Ω random, R one of L's image under (W_t − W_0)ᵀ."""
        change = (self.weight - self.start).flatten(1)
        if not change.any():
            change.normal_(generator=generator)
        omega = change.new_empty(change.shape[1], len(self.right.weight)).normal_(generator=generator)
        left = torch.linalg.qr(change @ omega).Q
        right = torch.linalg.qr(change.mT @ left).Q.mT
        self.left.weight.copy_(left.reshape(self.left.weight.shape))
        self.right.weight.copy_(right.reshape(self.right.weight.shape))

    @torch.no_grad()
    def map_back_(self) -> None:
        """The gradient of W in place of those of L and R, which the optimiser leaves alone without one."""
        left, right = self.left.weight.flatten(1), self.right.weight.flatten(1)
        d_left, d_right = (p.weight.grad.flatten(1) for p in (self.left, self.right))  # type: ignore[union-attr]
        self.weight.grad = (d_left @ right + left @ (d_right - left.mT @ d_left @ right)).view_as(self.weight)
        self.left.weight.grad = self.right.weight.grad = None

    def remove(self) -> None:
        """The layer as it was."""
        del self.layer.left, self.layer.right, self.layer.forward
        self.weight.requires_grad_(True)
