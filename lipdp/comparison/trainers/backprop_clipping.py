"""Backpropagation clipping: clips and gates around unconstrained layers, then lipdp's own engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from lipdp.comparison.backprop_clipping import with_backprop_clipping
from lipdp.comparison.protocol import Session, Task, Trainer
from lipdp.comparison.trainers.clipless import EngineSession


@dataclass(frozen=True)
class BackpropClipping(Trainer):
    """`with_backprop_clipping` and `lipdp.PrivacyEngine`: no per-sample gradients, no constraint.

    Attributes:
        input_bound: X. cotangent_bound: C. allocation: of the noise.

    Source: Stevens et al. (2022), with the account corrected: one joint subsample for all layers.
    """

    input_bound: float = 3.0
    cotangent_bound: float = 0.1
    allocation: str = "per_layer"

    name: ClassVar[str] = "backprop_clipping"
    words: ClassVar[str] = "clips inputs and gradients inside backpropagation, on an unconstrained model"
    lipschitz: ClassVar[bool] = False
    grid: ClassVar[Mapping[str, Sequence[Any]]] = {"lr": (0.3, 1.0), "cotangent_bound": (0.03, 0.1)}

    def start(self, model: nn.Module, task: Task) -> Session:
        clipped = with_backprop_clipping(model, self.input_bound, self.cotangent_bound)
        return EngineSession(clipped, task, gate=None, allocation=self.allocation)
