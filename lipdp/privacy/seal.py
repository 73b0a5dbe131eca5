"""Gradients that a backward pass reduced over processes by itself: they must stay as it left them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from lipdp.errors import EngineError


class GradientSeal:
    r"""Counts torch's own count of changes in place, of every gradient, from a backward pass to the step.

    The noise is calibrated to ‖∇_l ℓ_i‖ ≤ Δ_l, the share of one record in the *plain* sum S = Σ_i ∇ℓ_i. A map c(S) S
    with a factor that depends on S, such as clipping the norm of S, can move by more than Δ_l in layer l when one
    record comes or goes: the factor of *all* layers changes with the norm of one, and each layer's noise is calibrated
    to that layer alone.

    Guarantees: a gradient that was scaled, clipped, added to, replaced or dropped after its backward pass is refused,
    whatever the framework that did it. Nothing is read from the device. Not seen: what is written through `.data`,
    which torch does not count, and a further term of the loss within the same pass.

    Args:
        parameters: what the optimiser holds now.
    """

    def __init__(self, parameters: Callable[[], Iterable[Tensor]]) -> None:
        self._parameters = parameters
        self._gradients: list[tuple[Tensor, Tensor | None, int]] = []

    def begin(self) -> None:
        """A backward pass begins; what is there is sealed when it ends."""
        self.check()
        queue = torch.autograd.Variable._execution_engine.queue_callback
        queue(lambda: queue(self._close))  # behind the callbacks in which fully_shard finishes

    def _close(self) -> None:
        self._gradients = [(p, p.grad, -1 if p.grad is None else p.grad._version) for p in self._parameters()]

    def check(self) -> None:
        """Compare with the last backward pass of this step, if there was one.

        Raises:
            EngineError: a gradient has changed.
        """
        trained = (sealed for sealed in self._gradients if sealed[0].requires_grad)  # a frozen one's is dropped
        if any(p.grad is not g or (g is not None and g._version != version) for p, g, version in trained):
            raise EngineError(
                "the summed gradients were changed between backward() and step(), as clipping (gradient_clip_val,"
                " accelerator.clip_grad_norm_, fabric.clip_gradients) and a GradScaler do. No gradient here needs"
                " clipping: leave it out, or change the noisy gradients in a step pre-hook registered after"
                " make_private"
            )

    def open(self) -> None:
        """The step is taken, or its gradients are gone."""
        self._gradients = []
