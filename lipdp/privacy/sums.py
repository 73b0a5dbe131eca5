"""How the sum of a private step is formed: by the engine itself, or watched where `fully_shard` forms it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lipdp.batches.rows import Rows
from lipdp.errors import EngineError

Claim = tuple[Tensor, str]
"""() bool on the device, and what is wrong where it is False."""

OTHER_TERMS = (
    "the summed gradients were changed between backward() and step(), or something beside the criterion's value reached"
    " them: a further term of the loss, clipping (clip_grad_norm_, gradient_clip_val, accelerator.clip_grad_norm_,"
    " fabric.clip_gradients), a GradScaler, a missing zero_grad(). Only the criterion's value may be back-propagated."
    " For a penalty on the weights alone use engine.add_penalty; change noisy gradients in a step pre-hook registered"
    " after make_private"
)
_LEFT = "p.grad held something before the first private backward pass of this step; call optimizer.zero_grad() first"
DROPPED = (
    "the summed gradients were changed between backward() and step(): some are gone. Call zero_grad() before backward()"
)


@dataclass
class RootCall:
    """One call of the model with gradients on.

    Attributes:
        out: the logits, with the graph that leads to the parameters. x: the input, as the model was given it.
        rows: which rows of the batch went in; None where that is not known.
        versions: every tensor of the model, and how often it was changed so far.
        sharded: whether `fully_shard` reduces the gradients within the pass. private: whether the input is of a batch.
        given, released: whether the criterion has had the logits, and its value was back-propagated.
        cotangent: (n, …) what the criterion found for the logits, gated.
        claims: what must be true at the step.
    """

    out: Tensor
    x: Tensor
    rows: Rows | None
    parameters: list[nn.Parameter]
    versions: list[tuple[Tensor, int]]
    sharded: bool = False
    private: bool = False
    given: bool = False
    released: bool = False
    cotangent: Tensor | None = None
    claims: list[Claim] = field(default_factory=list)

    @property
    def inputs(self) -> list[Tensor]:
        """What the value of the criterion depends on: the input, then the parameters."""
        return [self.x, *self.parameters]

    def gradient_of_input(self) -> Tensor | None:
        """For an attack: the pull-back to the input alone."""
        return torch.autograd.grad(self.out, self.x, self.cotangent, allow_unused=True)[0]


def is_wanted(node: Any) -> bool:
    """Whether the backward pass that is running leads to this node."""
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:  # torch says so of a leaf that torch.autograd.grad was asked for
        return True


class Gradients(Protocol):
    """How the sum of a step is formed and guarded."""

    def add(self, call: RootCall) -> list[Tensor | None]:
        """Add one pass, from the cotangent of the call; its gradients, by input of the call."""
        ...

    def claims(self, parameters: Iterable[nn.Parameter]) -> list[Claim]:
        """What must be true of `p.grad` at the step, once these are trained."""
        ...

    def take(self, parameters: Iterable[nn.Parameter]) -> None:
        """Put the sum in the place of `p.grad`."""
        ...

    def forget(self) -> None:
        """Begin anew."""
        ...


class OwnGradients:
    """S_l, formed by the engine: `p.grad` is compared with it and then replaced by it."""

    def __init__(self) -> None:
        self._sums: dict[nn.Parameter, Tensor] = {}
        self._found: list[Claim] = []

    def add(self, call: RootCall) -> list[Tensor | None]:
        if any(p._backward_hooks for p in call.parameters):
            raise EngineError("a parameter carries a gradient hook, which can scale its gradient; remove it")
        for p in call.parameters:
            if p.grad is not None and p not in self._sums:  # zeros, if the script called zero_grad(set_to_none=False)
                self._found.append(((p.grad == 0).all(), _LEFT))
        wanted = [t for t in call.inputs if t.requires_grad]
        pairs = zip(wanted, torch.autograd.grad(call.out, wanted, call.cotangent, allow_unused=True), strict=True)
        found = {id(t): g for t, g in pairs}
        with torch.no_grad():
            for p in call.parameters:
                g = found[id(p)]
                if g is not None:
                    self._sums[p] = self._sums[p].add_(g) if p in self._sums else g.clone()
        return [found.get(id(t)) for t in call.inputs]

    def claims(self, parameters: Iterable[nn.Parameter]) -> list[Claim]:
        found = list(self._found)
        for p in parameters:
            own, held = self._sums.get(p), p.grad
            if held is None and own is not None:
                raise EngineError(DROPPED)
            if held is not None:
                same = held == 0 if own is None else (held == own) | (own != own)  # NaN is named elsewhere
                found.append((same.all(), OTHER_TERMS))
        return found

    def take(self, parameters: Iterable[nn.Parameter]) -> None:
        for p in parameters:
            own = self._sums.get(p)
            p.grad = torch.zeros_like(p) if own is None else own

    def forget(self) -> None:
        self._sums, self._found = {}, []


class SealedGradients:
    r"""Under `fully_shard`: the sum is formed by the pass itself, and must stay as it was left until the step.

    The noise is calibrated to ‖∇_l ℓ_i‖ ≤ Δ_l, the share of one record in the *plain* sum S = Σ_i ∇ℓ_i. A map c(S) S
    with a factor that depends on S, such as clipping the norm of S, can move by more than Δ_l in layer l when one
    record comes or goes: the factor of *all* layers changes with the norm of one, and each layer's noise is calibrated
    to that layer alone.

    Guarantees: a gradient that was scaled, clipped, added to, replaced or dropped after its backward pass is refused,
    whatever the framework that did it, by torch's own count of changes in place. Nothing is read from the device. Not
    seen: what is written through `.data`, which torch does not count, and a further term of the loss within the pass.

    Args:
        parameters: what the optimiser holds now.
    """

    def __init__(self, parameters: Callable[[], Iterable[Tensor]]) -> None:
        self._parameters = parameters
        self._left: list[tuple[Tensor, Tensor | None, int]] = []
        self._calls: list[RootCall] = []

    def add(self, call: RootCall) -> list[Tensor | None]:
        """See `Gradients`; the pass goes on from the logits with this cotangent, and what it leaves is noted."""
        self._check()
        queue = torch.autograd.Variable._execution_engine.queue_callback
        queue(lambda: queue(self._note))  # behind the callbacks in which fully_shard finishes
        self._calls.append(call)
        return []

    def _note(self) -> None:
        self._left = [(p, p.grad, -1 if p.grad is None else p.grad._version) for p in self._parameters()]

    def _check(self) -> None:
        """Compare with the last backward pass of this step, if there was one; EngineError where one has changed."""
        trained = (left for left in self._left if left[0].requires_grad)  # a frozen one's is dropped
        if any(p.grad is not g or (g is not None and g._version != version) for p, g, version in trained):
            raise EngineError(
                "the summed gradients were changed between backward() and step(), as clipping (gradient_clip_val,"
                " accelerator.clip_grad_norm_, fabric.clip_gradients) and a GradScaler do. No gradient here needs"
                " clipping: leave it out, or change the noisy gradients in a step pre-hook registered after"
                " make_private"
            )

    def claims(self, parameters: Iterable[nn.Parameter]) -> list[Claim]:
        self._check()
        return [claim for call in self._calls for claim in call.claims]

    def take(self, parameters: Iterable[nn.Parameter]) -> None:
        for p in parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)

    def forget(self) -> None:
        self._left, self._calls = [], []
