"""How the sum of a private step is formed: by the engine itself, or watched where `fully_shard` forms it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lipdp.batches.row_rules import Rows
from lipdp.errors import EngineError, LossError

Claim = tuple[Tensor, str | LossError]
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
class ModelCall:
    """One call of the model with gradients on.

    Attributes:
        out: the logits, with the graph that leads to the parameters. x: the input, as the model was given it.
        rows: which rows of the batch went in; None where that is not known.
        versions: every tensor of the model, and how often it was changed so far.
        sharded: whether `fully_shard` reduces the gradients within the pass. private: whether the input is of a batch.
        given, back_propagated: whether the criterion has had the logits, and its value was back-propagated.
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
    back_propagated: bool = False
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

    def add(self, call: ModelCall) -> list[Tensor | None]:
        """Add one pass, from the cotangent of the call; its gradients, by input of the call."""
        ...

    def claims(self, parameters: Iterable[nn.Parameter]) -> list[Claim]:
        """What must be true of `p.grad` at the step, once these are trained."""
        ...

    def take(self, parameters: Iterable[nn.Parameter]) -> None:
        """Put the sum in the place of `p.grad`, once: if the step is refused, nothing vouches for `p.grad` any more."""
        ...

    def forget(self) -> None:
        """Begin anew."""
        ...


class OwnGradients:
    """S_l, formed by the engine: `p.grad` is compared with it and then replaced by it.

    A large S_l is not kept twice. Where a pass hands out a gradient whose memory nothing else uses, S_l is that memory,
    which autograd makes `p.grad` of, and the engine keeps a sum over its bits (`_mark`): what is written there by
    anyone, past torch's counts too, is refused at the step like a `p.grad` that differs.
    """

    def __init__(self) -> None:
        self._sums: dict[nn.Parameter, Tensor] = {}
        self._marks: dict[nn.Parameter, Tensor] = {}  # of sums in shared memory
        self._found: list[Claim] = []

    def add(self, call: ModelCall) -> list[Tensor | None]:
        if any(p._backward_hooks for p in call.parameters):
            raise EngineError("a parameter carries a gradient hook, which can scale its gradient; remove it")
        for p in call.parameters:
            if p.grad is not None and p not in self._sums:  # zeros, if the script called zero_grad(set_to_none=False)
                self._found.append(((p.grad == 0).all(), _LEFT))
        wanted = [t for t in call.inputs if t.requires_grad]
        gradients = torch.autograd.grad(call.out, wanted, call.cotangent, allow_unused=True)
        found = dict(zip(map(id, wanted), gradients, strict=True))
        del gradients  # `found` alone holds them: see `_is_alone`
        with torch.no_grad():
            for p in call.parameters:
                key = id(p)
                if found[key] is None:
                    continue
                if p in self._sums:
                    self._own(p).add_(found[key])
                elif _is_alone(found, key):
                    self._sums[p] = found[key].detach()
                    self._marks[p] = _mark(found[key])
                else:
                    self._sums[p] = found[key].clone()
        return [found.get(id(t)) for t in call.inputs]

    def _own(self, p: nn.Parameter) -> Tensor:
        """The sum in memory of its own."""
        if p in self._marks:
            self._found.append((_mark(self._sums[p]) == self._marks.pop(p), OTHER_TERMS))
            self._sums[p] = self._sums[p].clone()
        return self._sums[p]

    def claims(self, parameters: Iterable[nn.Parameter]) -> list[Claim]:
        found = list(self._found)
        for p in parameters:
            own, held = self._sums.get(p), p.grad
            if held is None and own is not None:
                raise EngineError(DROPPED)
            if p in self._marks:
                found.append((_mark(self._sums[p]) == self._marks[p], OTHER_TERMS))
            if held is not None and (own is None or held.data_ptr() != own.data_ptr()):
                same = held == 0 if own is None else (held == own) | (own != own)  # NaN is named elsewhere
                found.append((same.all(), OTHER_TERMS))
        return found

    def take(self, parameters: Iterable[nn.Parameter]) -> None:
        for p in parameters:
            own, mark = self._sums.pop(p, None), self._marks.pop(p, None)
            if own is not None and mark is not None and not torch.equal(_mark(own), mark):
                raise EngineError(OTHER_TERMS)  # changed while the step went on
            p.grad = torch.zeros_like(p) if own is None else own

    def forget(self) -> None:
        self._sums, self._marks, self._found = {}, {}, []


_LARGE = 1 << 20  # numbers of a gradient that is not kept twice
_PIECE = 1 << 18


def _is_alone(found: dict[int, Any], key: int) -> bool:
    """Whether a large gradient, and its memory, is held by `found` and by nothing else: no cotangent, buffer or view.

    Holders are counted, in Python and in C++, and compared with those of a tensor that was just made.
    """
    g = found[key]
    if (
        g.is_cuda
        or g.numel() < _LARGE
        or not g.is_contiguous()
        or g.untyped_storage().nbytes() != g.numel() * g.itemsize
    ):
        return False
    del g
    fresh = {key: torch.empty(1, 1)} if found[key]._base is None else {key: torch.empty(1, 1).mT}
    return _holders(found, key) == _holders(fresh, key)


def _holders(found: dict[int, Any], key: int) -> list[int]:
    """Of a tensor, of what it is a view of, and of their memory."""
    g = found[key]
    storage, base = g.untyped_storage(), g._base
    counts = [torch._C._storage_Use_Count(storage._cdata), sys.getrefcount(storage), g._use_count(), sys.getrefcount(g)]
    return counts + ([] if base is None else [base._use_count(), sys.getrefcount(base)])


def _mark(tensor: Tensor) -> Tensor:
    """() int64 Σ_i h(w_i b_i) mod 2⁶⁴ over words b_i of the entries, with fixed random odd weights w_i; h mixes bits.

    A change that is not made for it shows but with a chance of 2⁻⁶⁰, be it of one entry, of all signs or by 2^k. (A sum
    of w_i b_i alone does not see an even number of signs in float64: each adds 2⁶³.)
    """
    bits = tensor.detach().reshape(-1).view(torch.int16 if tensor.itemsize == 2 else torch.int32)
    generator = torch.Generator().manual_seed(0x5EA1)
    weights = torch.randint(-(2**62), 2**62, (min(len(bits), _PIECE),), generator=generator).mul_(2).add_(1)
    weights, total = weights.to(bits.device), torch.zeros((), dtype=torch.int64, device=bits.device)
    for number, piece in enumerate(bits.split(_PIECE)):
        mixed = piece * weights[: len(piece)]
        mixed ^= mixed >> 29  # the top bits, where a sign is, reach all others by the next product
        total = total * 0x2545F4914F6CDD1D + mixed.mul_(0x1B873593CC9E2D51).bitwise_xor_(mixed >> 32).sum() + number
    return total


class WatchedGradients:
    r"""Under `fully_shard`: the sum is formed by the pass itself, and must stay as it was left until the step.

    The noise is calibrated to ‖∇_l ℓ_i‖ ≤ Δ_l, the share of one record in the *plain* sum S = Σ_i ∇ℓ_i. A map c(S) S
    with a factor that depends on S, such as clipping the norm of S, can move by more than Δ_l in layer l when one
    record comes or goes: the factor of *all* layers changes with the norm of one, and each layer's noise is calibrated
    to that layer alone.

    Guarantees: a gradient that was scaled, clipped, added to, replaced or dropped after its backward pass is refused,
    whatever the framework that did it, by torch's own count of changes in place. Nothing is read from the device. Not
    seen: what is written through `.data`, which torch does not count, and a further term of the loss within the pass.
    """

    def __init__(self, parameters: Callable[[], Iterable[Tensor]]) -> None:
        self._parameters = parameters
        self._left: list[tuple[Tensor, Tensor | None, int]] = []
        self._calls: list[ModelCall] = []

    def add(self, call: ModelCall) -> list[Tensor | None]:
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
