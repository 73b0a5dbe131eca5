r"""What a private step may contain, whatever the training script does between the loader and `optimizer.step()`.

**Claim.** Let batch t hold the rows 0 … n − 1, and let Δ_l bound the gradient of parameter l for every record at the
weights of this step (`lipdp.sensitivity`). Every step that is released adds noise to S_l = Σ_i ∇_l ℓ̃_i, in which each
record drawn (or owner) has exactly one term, and ‖∇_l ℓ̃_i‖ ≤ Δ_l. All other steps are refused before anything is
released.

**Proof**, along the way of one record. The engine does not use what autograd leaves in `p.grad`. It forms S_l itself:

1. *Rows.* The loader's tensors know which rows of the batch they hold, and keep that only through operations that
   treat rows apart (batches/rows.py). A step is released only if the rows that went into the model, and those of
   the labels, are known, are of the batch drawn last, do not meet, and are all n. So row i of the input depends on
   record i alone.
2. *Graph.* A call of the model with gradients on runs the graph that the bounds were derived from, constants included,
   and not the script's `forward` (`PrivateForward`); modules, their classes and hooks are compared before each call.
   So the logits are z_i = f(x_i), f being the function that was bounded.
3. *Cotangent.* The criterion takes logits of such a call, each once, cut off from autograd. It computes c_i = ∂ℓ(z_i,
   y_i)/∂z_i itself and shortens each to the gate, ‖c_i‖ ≤ G. What the script does with the loss's value, the logits or
   the activations does not enter c_i.
4. *Pull-back.* When the value is back-propagated, the engine computes g = Σ_i (∂z_i/∂θ)ᵀ c_i from the cotangents of 3
   alone, by a backward pass of its own from the logits, and adds it to S. By the definition of Δ_l each term is within
   Δ_l, at the weights of the call; these must be untouched until the step, whose bounds are computed at the same
   weights.
5. *Step.* The hook in front of the optimiser puts S_l in the place of `p.grad`, then adds the noise.

What differs from the plain sum that the script believes in is refused and not repaired: a factor on the value, further
terms in the loss, gradients that were clipped, added or left over. That is a comparison of `p.grad` with S_l, and of
the value's cotangent with 1, which says no more than whether the script did so.

**What remains.** Numbers that a script reads (`.item()`, `.numpy()`, `len(x)`) and computes with count as public; an
attack whose own loss mixes records is not seen; nor is an operation that depends on a row's place in the batch, or a
generator that is seeded between the loader and the step: one record more moves all later rows. Memory that is written
through numpy or `.data` between a forward pass and the step is seen in gradients and not in weights. Under
`fully_shard`, which reduces within the backward pass, 2 and 4 are replaced by watching: the root's cotangent is the
engine's, and gradients must stay as that pass left them (`WatchedGradients`).

Source: ours. Steps 1 to 5 replace the per-sample clipping of DP-SGD (Abadi et al. 2016), which is robust by nature.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from lipdp.batches.loader import Draw, Listener
from lipdp.batches.row_rules import Rows
from lipdp.batches.rows import of_batches, plain
from lipdp.errors import EngineError
from lipdp.passes.sums import DROPPED, Claim, Gradients, ModelCall

_FACTOR = (
    "the criterion's value was multiplied, divided or transformed before backward(): the bound holds for the value"
    " itself, and a factor could depend on the batch. Call criterion(model(x), y).backward(); the engine divides by the"
    " public batch size"
)


WRITTEN = (
    "a tensor of {} was overwritten by what was computed from a batch, so the gradient of one record depends on others."
    " Put there what is public, or learn it as a weight"
)
OVERWRITTEN = (
    "the logits were overwritten between the model and the criterion, which takes what the model returned, as it is"
)


class StepInProgress(Listener):
    """The passes since the last private step: which rows went through, at which weights, and what came of it.

    Attributes:
        gradients: how the sum is formed. grouped: whether owners are drawn, whose rows have weights.
        drawn: the batch that the loader handed out last.
        reason: why the last call of the model was no private one.
        looked_at: whether this is a step at which some records are looked at; its number, counted from 0.
        waiting: the parameters that a pass went to since the last step, as keys; one object for life, for `Guard`.
    """

    def __init__(self, gradients: Gradients, *, grouped: bool, forgotten: Callable[[], None]) -> None:
        self.gradients, self.grouped, self._forgotten = gradients, grouped, forgotten
        self.drawn: Draw | None = None
        self.reason = "they were not made by a call of the model with gradients on"
        self.looked_at: int | None = None
        self._rows: list[Rows | None] = []
        self._claims: list[Claim] = []
        self._versions: list[tuple[Tensor, int]] = []
        self._parameters: list[nn.Parameter] = []
        self._outside: dict[nn.Parameter, tuple[Tensor, int]] = {}
        self.waiting: dict[nn.Parameter, None] = {}
        self._pass = -1

    def records(self) -> list[Tensor] | None:
        """Inputs and labels of the batch drawn last, as plain tensors; None where it holds none."""
        drawn = self.drawn
        held = None if drawn is None or not drawn.rows else drawn.batch  # None: no piece of it was asked for yet
        return None if held is None else [plain(part) for part in held[:2]]

    @property
    def pending(self) -> bool:
        """Whether a private backward pass waits for its step."""
        self._drop_unused()
        return bool(self._rows)

    @property
    def without_noise(self) -> bool:
        """Whether `p.grad` may hold gradients of records that no noise was added to.

        Only looks: the step of an optimiser in another thread asks it, in the middle of a pass.
        """
        return any(p.grad is not None for p in tuple(self.waiting))

    # -- the loader ----------------------------------------------------------------------------------------------------

    def before_draw(self) -> None:
        """Keep the next batch back (EngineError) while gradients of the last one wait for their noise."""
        if self.pending:
            raise EngineError(
                "the last batch was back-propagated, but no private step followed: another optimiser, or a copy, would"
                " move the weights without noise. Call step() of the optimiser that make_private returned, once per"
                " batch, without accumulate_grad_batches, gradient_accumulation_steps or the like. To leave a batch"
                " unused, call engine.skip_batch()"
            )

    def after_draw(self, drawn: Draw | None) -> None:
        self.drawn = drawn
        if drawn is None:
            self.forget()

    # -- passes --------------------------------------------------------------------------------------------------------

    def add_pass(self, call: ModelCall, upstream: Tensor) -> list[Tensor | None]:
        """One backward pass, from the gated cotangents of a call of the model; its gradients, by input."""
        if call.back_propagated:
            raise EngineError("the criterion's value is back-propagated twice: a record would count more than once")
        current = torch._C._current_graph_task_id()
        if current != self._pass:  # a new backward pass, in front of which `p.grad` tells what became of the last one
            self._drop_unused()
        self._pass = current
        _check_versions([*self._versions, *self._outside.values(), *call.versions])
        call.back_propagated = True
        found = self.gradients.add(call)
        self._rows.append(call.rows)
        self._versions = call.versions
        self._parameters = list(dict.fromkeys([*self._parameters, *call.parameters]))  # some may be frozen by now
        self.waiting.update(dict.fromkeys(call.parameters))
        self._claims += [((upstream == 1).all(), _FACTOR), *call.claims]
        return found

    def outside(self, call: ModelCall) -> None:
        """Gradients of records on a way beside the criterion: free for an attack, but no weight may follow them."""
        for parameter in call.parameters:
            self._outside.setdefault(parameter, (parameter, parameter._version))
            self.waiting[parameter] = None

    def _drop_unused(self) -> None:
        """Passes whose gradients are gone (`zero_grad()`, `torch.autograd.grad`) do not count."""
        if self._rows and all(p.grad is None for p in self._parameters):
            _check_versions(self._versions)  # nor were they used before they went
            outside = self._outside
            self.forget()
            self._outside = outside
            self.waiting.update(dict.fromkeys(outside))

    def forget(self) -> None:
        """The step is taken, or its gradients are gone."""
        self._rows, self._claims, self._versions, self._parameters = [], [], [], []
        self._outside = {}
        self.waiting.clear()
        self.gradients.forget()
        self._forgotten()

    # -- at the step ---------------------------------------------------------------------------------------------------

    def check(self, parameters: list[nn.Parameter]) -> list[Claim]:
        """Refuse what the host knows to be wrong; what only the device knows comes back as claims."""
        if self._rows and all(p.grad is None for p in self._parameters):
            raise EngineError(DROPPED)
        _check_versions([*self._versions, *self._outside.values()])
        drawn = self.drawn
        claims = [*self._claims, *self.gradients.claims(parameters)]
        if drawn is not None:
            self._check_rows(drawn)
        return claims

    def _check_rows(self, drawn: Draw) -> None:
        if drawn.rows and not self._rows:
            raise EngineError(
                f"the batch has {drawn.rows} samples but no gradient went through the criterion that make_private"
                " returned. Train with that one, criterion(model(x), y).backward(): it bounds every sample's gradient"
            )
        if any(rows is None for rows in self._rows):
            raise EngineError(
                "lipdp cannot tell that every row given to the model or the criterion comes from one record of this"
                " batch. Rows were picked or repeated by an index, standardised or mixed over the batch, taken from"
                " another batch, or made outside torch. Prepare inputs in the data set, in the model, by operations on"
                " single samples, or with lipdp.batches.per_record(function, x)"
            )
        spans = sorted((r.start, r.stop) for r in self._rows if r is not None and len(r))
        if any(r is not None and r.batch is not drawn.key for r in self._rows):
            raise EngineError("the gradients are of another batch than the one drawn last: take one step per batch")
        seen = sum(stop - start for start, stop in spans)
        met = any(start < before for (_, before), (start, _) in pairwise(spans))
        if met:
            raise EngineError(
                f"the criterion saw {seen} samples since the last step but the batch has {drawn.rows}: a record would"
                " count more than once. Evaluate the criterion once per record and step (under torch.no_grad() for"
                " metrics)"
            )
        if seen < drawn.rows:
            raise EngineError(
                f"the criterion saw {seen} of the {drawn.rows} samples of the batch: which ones are left out would"
                " depend on the records. Train on the whole batch; engine.microbatches gives it in pieces"
            )


def overwritten_by_batches(*modules: nn.Module, held: Sequence[Tensor] = ()) -> bool:
    """Whether something of a batch was written to a buffer, or to another tensor that is no weight."""
    known = chain(held, (t for module in modules for t, _ in tensors_of(module)))
    return of_batches(t for t in known if not isinstance(t, nn.Parameter))


def tensors_of(model: nn.Module, *others: Tensor) -> list[tuple[Tensor, int]]:
    """All tensors of a model, plain attributes among them, and others; how often each was changed in place so far."""
    plain = (t for module in model.modules() for t in vars(module).values() if isinstance(t, Tensor))
    return [(t, t._version) for t in (*model.parameters(), *model.buffers(), *plain, *others)]


def _check_versions(known: list[tuple[Tensor, int]]) -> None:
    if any(t._version != version for t, version in known):
        raise EngineError(
            "weights, buffers or other tensors of the model were changed between the forward pass and step(): the"
            " gradients and the noise would belong to different weights. Change weights (EMA, loading, projecting)"
            " after step() only"
        )


def logits_call(logits: Tensor) -> Any:
    """The `ModelCall` whose logits these are, casts and views of the same rows aside; None for anything else."""
    node, rows, entries = logits.grad_fn, len(logits) if logits.dim() else -1, logits.numel()
    while node is not None and type(node).__name__ in _SAME_ROWS:
        node = node.next_functions[0][0]
    call = getattr(node, "call", None)
    return call if isinstance(call, ModelCall) and len(call.out) == rows and call.out.numel() == entries else None


_SAME_ROWS = frozenset(
    f"{name}Backward0"
    for name in ["ToCopy", "View", "UnsafeView", "ReshapeAlias", "Squeeze", "Unsqueeze", "Alias", "Clone"]
) | {"SqueezeBackward1", "SqueezeBackward2"}
