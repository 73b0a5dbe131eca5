"""Checks that run the model: that its graph is faithful, and that its samples stay apart."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lipdp.bounds.trace import mode
from lipdp.constraints import is_size
from lipdp.errors import MixesSamplesError, ParameterError, UnsupportedOperationError

_BATCH = 6  # an unusual batch size, so that a hard-coded one shows; a second run has one sample


def sample_shape(input_shape: object) -> tuple[int, ...]:
    """The shape of one sample as a tuple; ParameterError for what is none. It may be empty: a scalar."""
    if not isinstance(input_shape, Sequence) or not all(map(is_size, input_shape)):
        raise ParameterError(
            f"input_shape={input_shape!r}: the sizes of one sample are needed, e.g. (1, 28, 28) or (30,)"
        )
    return tuple(input_shape)


def probe_input(
    model: nn.Module, input_shape: tuple[int, ...], *, batch: int = _BATCH, vocabulary: int | None = None
) -> Tensor:
    """A batch of random samples on the device of the model's parameters: in their dtype, or of `vocabulary` tokens."""
    reference = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    generator = torch.Generator().manual_seed(0)
    if vocabulary is not None:
        return torch.randint(vocabulary, (batch, *input_shape), generator=generator).to(reference.device)
    x = torch.randn(batch, *input_shape, generator=generator)
    return x.to(device=reference.device, dtype=reference.dtype)


class _Lookups(TorchFunctionMode):
    """Notes the number of rows of every embedding that is asked for a float, and answers with row 0."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (F.embedding, F.embedding_bag) and args and args[0].is_floating_point():
            weight = args[1] if len(args) > 1 else (kwargs or {})["weight"]
            self.rows.append(len(weight))
            args = (torch.zeros_like(args[0], dtype=torch.int64), *args[1:])
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def vocabulary_of(model: nn.Module, x: Tensor) -> int | None:
    """How many tokens the model knows, if it looks its inputs up in embeddings; None where they are numbers."""
    lookups = _Lookups()
    try:
        with untouched(model), lookups:
            model(x)
    except Exception:  # whatever is wrong with the model is found, and named, when it is inspected
        pass
    return min(lookups.rows, default=None)


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Run the model without lasting effects: buffers and the state of the random generators are put back."""
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    devices = sorted({p.device.index for p in model.parameters() if p.is_cuda})
    drawn = random.getstate()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(drawn)
        with torch.no_grad():
            for buffer, saved in buffers:
                buffer.copy_(saved)


def _outputs_and_gradients(
    forward: nn.Module, x: Tensor, parameters: list[nn.Parameter], *, first: float = 1.0
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """Outputs, and the gradients of a linear function of them by the input and by the parameters.

    The cotangent is another one for every sample, counted from the last; that of the first is multiplied by `first`.
    """
    torch.default_generator.manual_seed(0x11D9)  # the same dropout every time
    if x.is_cuda:
        torch.cuda.manual_seed_all(0x11D9)
    x = x.detach().clone().requires_grad_(x.is_floating_point())
    with torch.enable_grad():
        out = forward(x)
        rows = out.reshape(len(out), -1)
        cotangents = torch.linspace(1.0, 2.0, rows.shape[1], device=out.device, dtype=out.dtype)
        cotangents = cotangents * torch.arange(len(out), 0, -1, device=out.device, dtype=out.dtype).unsqueeze(1)
        cotangents[0] *= first
        total = (rows * cotangents).sum()
    if not total.requires_grad:
        return out.detach(), torch.zeros_like(x), [None] * len(parameters)
    own = [x] if x.requires_grad else []
    grads = torch.autograd.grad(total, [*own, *parameters], allow_unused=True) if own or parameters else ()
    by_input = grads[0] if own else None
    return out.detach(), torch.zeros_like(x) if by_input is None else by_input, list(grads[len(own) :])


def _close(first: Tensor, second: Tensor) -> bool:
    """Equal up to the rounding of the dtype, relative to the largest entry (whatever the scale of the model)."""
    if first.dtype is not second.dtype:  # of a model that sets up its own autocast, which no graph holds
        return False
    if not first.is_floating_point():
        return torch.equal(first, second)
    scale = float(first.abs().nan_to_num().amax()) if first.numel() else 0.0
    tolerance = 1e3 * torch.finfo(first.dtype).eps
    return torch.allclose(first, second, rtol=0.0, atol=tolerance * scale, equal_nan=True)


def check_faithful(model: nn.Module, graph: fx.GraphModule, x: Tensor) -> set[str]:
    """Compare the graph with the model, outputs and gradients; returns the parameters that get a gradient.

    torch.fx records what a custom `autograd.Function` does forwards and forgets its backward; a hook on the model
    itself is not recorded either. Both show here.
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with untouched(model):
        expected = _outputs_and_gradients(model, x, list(named.values()))
        traced = _outputs_and_gradients(graph, x, list(named.values()))
    same = _close(expected[0], traced[0]) and _close(expected[1], traced[1])
    for first, second in zip(expected[2], traced[2], strict=True):
        same = same and (first is None) == (second is None)
        same = same and (first is None or second is None or _close(first, second))
    if not same:
        raise UnsupportedOperationError(
            f"the graph that torch.fx traced from {type(model).__name__} does not compute the values and gradients of"
            " the model: it has a custom autograd.Function, sets autocast, draws random numbers, or its `forward` was"
            " patched. Put that code into a module of its own and register a rule for it (lipdp.bounds.rule)"
        )
    return {name for name, grad in zip(named, expected[2], strict=True) if grad is not None}


def check_samples_apart(model: nn.Module, x: Tensor) -> None:
    """Change one sample, then leave it out, and look at the others: outputs and gradients must not change at all.

    A dynamic check beside the rules: it catches what hides inside a module with a (wrong) user rule. A buffer that a
    batch leaves changed would carry its records into the next one.
    """
    state = {name: b.detach().clone() for name, b in model.named_buffers()}
    moved = x.clone()
    moved[0] = 2 * moved[0].flip(-1) + 1.0 if x.is_floating_point() else x.amax() - moved[0]
    with untouched(model):
        for training in (True, False):
            with mode(model, training):
                base = _outputs_and_gradients(model, x, [])
                changes = {"changing": _outputs_and_gradients(model, moved, [], first=-3.0)}
                if not training:  # in training mode dropout draws by the shape of the batch
                    changes["leaving out"] = _outputs_and_gradients(model, x[1:], [])
            for change, after in changes.items():
                for what, first, second in zip(("output", "gradient"), base[:2], after[:2], strict=True):
                    second = second[-len(x) + 1 :]
                    if not _close(first[1:], second):
                        raise MixesSamplesError(
                            f"{change} one sample changed the {what} of others by up to"
                            f" {(first[1:] - second).abs().max().item():.3g}: {type(model).__name__} mixes the samples"
                            " of a batch, so no per-sample bound exists"
                        )
        for name, buffer in model.named_buffers():
            if not torch.equal(buffer, state[name]):
                raise MixesSamplesError(
                    f"the forward pass changes the buffer '{name}': it keeps something of the records, which no noise"
                    " covers. Use a layer without running statistics"
                )
