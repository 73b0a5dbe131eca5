r"""What a private step may contain, whatever the training script does between the loader and `optimizer.step()`.

**Claim.** Let batch t hold the rows 0 … n − 1, and let Δ_l bound the gradient of parameter l for every record at the weights
of this step (`lipdp.sensitivity`). Every step that is released adds noise to S_l = Σ_i ∇_l ℓ̃_i, in which each record drawn
(or owner) has exactly one term, and ‖∇_l ℓ̃_i‖ ≤ Δ_l. All other steps are refused before anything is released.

**Proof**, along the way of one record. The engine does not use what autograd leaves in `p.grad`. It forms S_l itself:

1. *Rows.* The loader's tensors know which rows of the batch they hold, and keep that only through operations that treat rows
   apart (`lipdp.batches.rows`). A step is released only if the rows that went into the model, and those of the labels,
   are known, are of the batch drawn last, do not meet, and are all n. So row i of the input depends on record i alone.
2. *Graph.* A call of the model with gradients on runs the graph that the bounds were derived from, constants included, and
   not the script's `forward` (`PrivateForward`); modules, their classes and hooks are compared before each call. So the
   logits are z_i = f(x_i), f being the function that was bounded.
3. *Cotangent.* The criterion takes logits of such a call, each once, cut off from autograd. It computes
   c_i = ∂ℓ(z_i, y_i)/∂z_i itself and shortens each to the gate, ‖c_i‖ ≤ G. What the script does with the loss's value, the
   logits or the activations does not enter c_i.
4. *Pull-back.* When the value is back-propagated, the engine computes g = Σ_i (∂z_i/∂θ)ᵀ c_i from the cotangents of 3 alone, by
   a backward pass of its own from the logits, and adds it to S. By the definition of Δ_l each term is within Δ_l, at
   the weights of the call; these must be untouched until the step, whose bounds are computed at the same weights.
5. *Step.* The hook in front of the optimiser puts S_l in the place of `p.grad`, then adds the noise.

What differs from the plain sum that the script believes in is refused and not repaired: a factor on the value, further terms
in the loss, gradients that were clipped, added or left over. That is a comparison of `p.grad` with S_l, and of the value's
cotangent with 1, which says no more than whether the script did so.

**What remains.** Numbers that a script reads (`.item()`, `.numpy()`, `len(x)`) and computes with count as public; an attack whose
own loss mixes records is not seen; memory that is written through numpy or `.data` between a forward pass and the step is
seen in gradients and not in weights. Under `fully_shard`, which reduces within the backward pass, 2 and 4 are replaced by
watching: the root's cotangent is the engine's, and gradients must stay as that pass left them (`GradientSeal`).

Source: ours. Steps 1 to 5 replace the per-sample clipping of DP-SGD (Abadi et al. 2016), which is robust by nature.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lipdp.batches.loader import Draw, Listener
from lipdp.batches.rows import Rows
from lipdp.errors import EngineError
from lipdp.privacy.seal import GradientSeal

Claim = tuple[Tensor, str]
"""() bool on the device, and what is wrong where it is False."""

OTHER_TERMS = (
    "the summed gradients were changed between backward() and step(), or something beside the criterion's value reached them: a"
    " further term of the loss, clipping (clip_grad_norm_, gradient_clip_val, accelerator.clip_grad_norm_), a GradScaler, a"
    " missing zero_grad(). Only the criterion's value may be back-propagated. For a penalty on the weights alone use"
    " engine.add_penalty; change noisy gradients in a step pre-hook registered after make_private"
)
_LEFT = "p.grad held something before the first private backward pass of this step; call optimizer.zero_grad() first"
_DROPPED = (
    "the summed gradients were changed between backward() and step(): some are gone. Call zero_grad() before backward()"
)
_FACTOR = (
    "the criterion's value was multiplied, divided or transformed before backward(): the bound holds for the value itself, and a"
    " factor could depend on the batch. Call criterion(model(x), y).backward(); the engine divides by the public batch size"
)


OVERWRITTEN = (
    "the logits were overwritten between the model and the criterion, which takes what the model returned, as it is"
)


@dataclass
class RootCall:
    """One call of the model with gradients on.

    Attributes:
        out: the logits, with the graph that leads to the parameters.
        x: the input, as the model was given it.
        rows: which rows of the batch went in; None where that is not known.
        parameters: the trainable ones.
        versions: every tensor of the model, and how often it was changed so far.
        sharded: whether `fully_shard` reduces the gradients within the pass.
        private: whether the input is of a batch.
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
        return torch.autograd.grad(self.out, self.x, self.cotangent, retain_graph=True, allow_unused=True)[0]


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
        """See `Gradients.add`."""
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
        """See `Gradients.claims`."""
        found = list(self._found)
        for p in parameters:
            own, held = self._sums.get(p), p.grad
            if held is None and own is not None:
                raise EngineError(_DROPPED)
            if held is not None:
                same = held == 0 if own is None else (held == own) | (own != own)  # NaN is named elsewhere
                found.append((same.all(), OTHER_TERMS))
        return found

    def take(self, parameters: Iterable[nn.Parameter]) -> None:
        """See `Gradients.take`."""
        for p in parameters:
            own = self._sums.get(p)
            p.grad = torch.zeros_like(p) if own is None else own

    def forget(self) -> None:
        """See `Gradients.forget`."""
        self._sums, self._found = {}, []


class SealedGradients:
    """Under `fully_shard`: the sum is formed by the pass itself, and must stay as it was left."""

    def __init__(self, parameters: Callable[[], Iterable[Tensor]]) -> None:
        self._seal = GradientSeal(parameters)
        self._calls: list[RootCall] = []

    def add(self, call: RootCall) -> list[Tensor | None]:
        """See `Gradients.add`; the pass goes on from the logits with this cotangent."""
        self._seal.begin()
        self._calls.append(call)
        return []

    def claims(self, parameters: Iterable[nn.Parameter]) -> list[Claim]:
        """See `Gradients.claims`."""
        self._seal.check()
        return [claim for call in self._calls for claim in call.claims]

    def take(self, parameters: Iterable[nn.Parameter]) -> None:
        """See `Gradients.take`."""
        for p in parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)

    def forget(self) -> None:
        """See `Gradients.forget`."""
        self._seal.open()
        self._calls = []


class StepInProgress(Listener):
    """The passes since the last private step: which rows went through, at which weights, and what came of it.

    Args:
        gradients: how the sum is formed.
        grouped: whether owners are drawn, whose rows have weights.
        forgotten: what else begins anew with a step: the count of a quantile gate.

    Attributes:
        drawn: the batch that the loader handed out last.
        reason: why the last call of the model was no private one.
    """

    def __init__(self, gradients: Gradients, *, grouped: bool, forgotten: Callable[[], None]) -> None:
        self.gradients, self.grouped, self._forgotten = gradients, grouped, forgotten
        self.drawn: Draw | None = None
        self.reason = "they were not made by a call of the model with gradients on"
        self._rows: list[Rows | None] = []
        self._claims: list[Claim] = []
        self._versions: list[tuple[Tensor, int]] = []
        self._parameters: list[nn.Parameter] = []
        self._outside: dict[nn.Parameter, tuple[Tensor, int]] = {}
        self._pass = -1

    @property
    def pending(self) -> bool:
        """Whether a private backward pass waits for its step."""
        self._drop_unused()
        return bool(self._rows)

    @property
    def without_noise(self) -> bool:
        """Whether `p.grad` may hold gradients of records that no noise was added to."""
        return self.pending or any(p.grad is not None for p in self._outside)

    # -- the loader ----------------------------------------------------------------------------------------------------

    def before_draw(self) -> None:
        """Keep the next batch back while gradients of the last one wait for their noise.

        Raises:
            EngineError: they do.
        """
        if self.pending:
            raise EngineError(
                "the last batch was back-propagated, but no private step followed: another optimiser, or a copy, would move the"
                " weights without noise. Call step() of the optimiser that make_private returned, once per batch; to give a"
                " batch up call engine.skip_batch()"
            )

    def after_draw(self, drawn: Draw | None) -> None:
        """See `Listener`."""
        self.drawn = drawn
        if drawn is None:
            self.forget()

    # -- passes --------------------------------------------------------------------------------------------------------

    def release(self, call: RootCall, upstream: Tensor) -> list[Tensor | None]:
        """One backward pass, from the gated cotangents of one root call; its gradients, by input of the call.

        Args:
            call: the criterion has left its cotangent there.
            upstream: () the cotangent of the criterion's value.

        Raises:
            EngineError: the weights are not those of the step's first forward pass, a gradient hook is there, or the value
                was back-propagated before.
        """
        if call.released:
            raise EngineError("the criterion's value is back-propagated twice: a record would count more than once")
        current = torch._C._current_graph_task_id()
        if current != self._pass:  # a new backward pass, in front of which `p.grad` tells what became of the last one
            self._drop_unused()
        self._pass = current
        _check_versions([*self._versions, *self._outside.values(), *call.versions])
        call.released = True
        found = self.gradients.add(call)
        self._rows.append(call.rows)
        self._versions, self._parameters = call.versions, call.parameters
        self._claims += [((upstream == 1).all(), _FACTOR), *call.claims]
        return found

    def outside(self, call: RootCall) -> None:
        """Gradients of records on a way beside the criterion: for an attack they are free, but no weight may follow them."""
        for parameter in call.parameters:
            self._outside.setdefault(parameter, (parameter, parameter._version))

    def _drop_unused(self) -> None:
        """Passes whose gradients are gone (`zero_grad()`, `torch.autograd.grad`) do not count."""
        if self._rows and all(p.grad is None for p in self._parameters):
            _check_versions(self._versions)  # nor were they used before they went
            outside = self._outside
            self.forget()
            self._outside = outside

    def forget(self) -> None:
        """The step is taken, or its gradients are gone."""
        self._rows, self._claims, self._versions, self._parameters = [], [], [], []
        self._outside = {}
        self.gradients.forget()
        self._forgotten()

    # -- at the step ---------------------------------------------------------------------------------------------------

    def check(self, parameters: list[nn.Parameter]) -> list[Claim]:
        """Everything that the host knows; what only the device knows comes back as claims.

        Raises:
            EngineError: rows are missing, met or unknown; weights or gradients were changed.
        """
        if self._rows and all(p.grad is None for p in self._parameters):
            raise EngineError(_DROPPED)
        _check_versions([*self._versions, *self._outside.values()])
        drawn = self.drawn
        claims = [*self._claims, *self.gradients.claims(parameters)]
        if drawn is not None:
            self._check_rows(drawn)
        return claims

    def _check_rows(self, drawn: Draw) -> None:
        if drawn.rows and not self._rows:
            raise EngineError(
                f"the batch has {drawn.rows} samples but no gradient went through the criterion that make_private returned;"
                " train with that one, criterion(model(x), y).backward(): only there is every sample's gradient bounded"
            )
        if any(rows is None for rows in self._rows):
            raise EngineError(
                "the model or the criterion was given rows that are not known to be records of this batch, each by itself:"
                " picked or repeated by an index, standardised or mixed over the batch, from another batch, or made outside torch."
                " Prepare inputs in the data set, in the model, by operations on single samples, or with"
                " lipdp.batches.per_record(function, x)"
            )
        spans = sorted((r.start, r.stop) for r in self._rows if r is not None and len(r))
        if any(r is not None and r.batch is not drawn for r in self._rows):
            raise EngineError("the gradients are of another batch than the one drawn last: take one step per batch")
        seen = sum(stop - start for start, stop in spans)
        met = any(start < before for (_, before), (start, _) in pairwise(spans))
        if met:
            raise EngineError(
                f"the criterion saw {seen} samples since the last step but the batch has {drawn.rows}: a record would count"
                " more than once. Evaluate the criterion once per record and step (under torch.no_grad() for metrics)"
            )
        if seen < drawn.rows:
            raise EngineError(
                f"the criterion saw {seen} of the {drawn.rows} samples of the batch: which ones are left out would depend on the"
                " records. Train on the whole batch; engine.microbatches gives it in pieces"
            )


def tensors_of(model: nn.Module) -> list[tuple[Tensor, int]]:
    """Every parameter and buffer of a model, and how often each was changed in place so far."""
    return [(t, t._version) for t in (*model.parameters(), *model.buffers())]


def _check_versions(known: list[tuple[Tensor, int]]) -> None:
    if any(t._version != version for t, version in known):
        raise EngineError(
            "the weights or buffers were changed between the forward pass and step(): the gradients belong to other weights"
            " than those that the noise would be calibrated to. Change weights (EMA, loading, projecting) after step() only"
        )


def logits_call(logits: Tensor) -> Any:
    """The `RootCall` whose logits these are, casts and views of the same rows aside; None for anything else."""
    node, rows, entries = logits.grad_fn, len(logits) if logits.dim() else -1, logits.numel()
    while node is not None and type(node).__name__ in _SAME_ROWS:
        node = node.next_functions[0][0]
    call = getattr(node, "call", None)
    return call if isinstance(call, RootCall) and len(call.out) == rows and call.out.numel() == entries else None


_SAME_ROWS = frozenset(
    f"{name}Backward0"
    for name in ["ToCopy", "View", "UnsafeView", "ReshapeAlias", "Squeeze", "Unsqueeze", "Alias", "Clone"]
) | {"SqueezeBackward1", "SqueezeBackward2"}
