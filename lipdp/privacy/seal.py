"""What `backward()` left, compared with what `step()` finds: a summed gradient changed in between has another sensitivity."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from lipdp.errors import EngineError

_HINT = (
    "Clipping (gradient_clip_val, accelerator.clip_grad_norm_, fabric.clip_gradients), a GradScaler (fp16) and averaging do that. The"
    " factor depends on the records, so the bound on one record's share, which the noise is calibrated to, does not hold for"
    " the result. Leave it out (no gradient here needs clipping), or change the noisy gradients, in a step pre-hook"
    " registered after make_private"
)


class GradientSeal:
    r"""Counts torch's own count of changes in place, of every gradient and every weight, from a backward pass to the step.

    The noise is calibrated to :math:`\|\nabla_l \ell_i\| \le \Delta_l`, the share of one record in the *plain* sum
    S = Σ_i ∇ℓ_i at the weights W that S was computed at. A map c(S) S with a factor that depends on S, such as clipping the
    norm of S, can move by more than Δ_l in layer l when one record comes or goes: the factor of *all* layers changes with the
    norm of one, and each layer's noise is calibrated to that layer alone. And if the weights are others than W when the
    bounds are computed, these are bounds on other gradients.

    Guarantees: a gradient that was scaled, clipped, added to, replaced or dropped after its backward pass is refused, and
    so is a weight that was set after the forward pass, whatever the framework that did it. Nothing is read from the device.
    Not seen: what is written through `.data`, numpy or (on a CPU) `GradScaler.unscale_`, which torch does not count, and what a communication hook of
    `DistributedDataParallel` does within the pass.

    Args:
        parameters: what the optimiser holds now.
    """

    def __init__(self, parameters: Callable[[], Iterable[Tensor]]) -> None:
        self._parameters = parameters
        self._gradients: list[tuple[Tensor, Tensor | None, int]] = []
        self._weights: list[tuple[Tensor, int]] = []

    def weights(self) -> list[tuple[Tensor, int]]:
        """The weights that a forward pass has just used, and how often each was changed so far."""
        return [(p, p._version) for p in self._parameters()]

    def begin(self, weights: list[tuple[Tensor, int]]) -> None:
        """A backward pass through a forward pass at these weights begins; what is there is sealed when it ends."""
        self.check()
        self._weights = weights
        queue = torch.autograd.Variable._execution_engine.queue_callback
        queue(lambda: queue(self._close))  # behind the callbacks in which DistributedDataParallel and FSDP finish

    def _close(self) -> None:
        self._gradients = [(p, p.grad, -1 if p.grad is None else p.grad._version) for p in self._parameters()]

    def check(self) -> None:
        """Compare with the last backward pass of this step, if there was one.

        Raises:
            EngineError: a gradient or a weight has changed.
        """
        trained = (
            sealed for sealed in self._gradients if sealed[0].requires_grad
        )  # a frozen one's gradient is dropped
        if any(p.grad is not g or (g is not None and g._version != version) for p, g, version in trained):
            raise EngineError(f"the summed gradients were changed between backward() and step(). {_HINT}")
        if any(p._version != version for p, version in self._weights):
            raise EngineError(
                "the weights were changed between the forward pass and step(): the gradients belong to other weights than those that"
                " the noise would be calibrated to. Change weights (EMA, loading, projecting) after step() only"
            )

    def open(self) -> None:
        """The step is taken, or its gradients are gone."""
        self._gradients, self._weights = [], []
