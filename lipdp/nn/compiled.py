"""torch.compile: the model behind it, and why the bounds hold for compiled code.

Bounds are derived from the model as it was written, and hold for compiled code as they do for torch's own kernels. A
compiler may fuse and reorder: a sum of n terms in any order errs by at most (n − 1) ε Σ|terms| (Higham 2002, section
4.2), and every rule allows 8 n ε (`lipdp.bounds.rounding`). Contracted multiply-adds round once where two operations
round twice, and values that stay in float32 inside a fused bfloat16 kernel are rounded less. No bound covers a compiler
that computes another function. The engine's check of the gradients of a few records (`GradientCheck`) runs the compiled
code.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from lipdp.errors import UnsupportedLayerError


def original(module: nn.Module) -> nn.Module:
    """The module that `torch.compile(module)` was made of; any other module as it is.

    >>> model = torch.nn.Linear(2, 1)
    >>> original(model) is model, original(torch.compile(model, backend="eager")) is model
    (True, True)
    """
    if "_orig_mod" not in module._modules:
        return module
    from torch._dynamo import OptimizedModule  # heavy

    if not isinstance(module, OptimizedModule):
        return module
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        raise UnsupportedLayerError(
            "what torch.compile returned carries forward or backward hooks, which no bound covers; remove them"
        )
    return original(module._orig_mod)


def is_compiled(module: nn.Module) -> bool:
    """Whether `torch.compile(module)` made it, or `module.compile()` was called on it.

    >>> model = torch.nn.Linear(2, 1)
    >>> is_compiled(model), is_compiled(torch.compile(model, backend="eager"))
    (False, True)
    """
    return original(module) is not module or module._compiled_call_impl is not None


@contextmanager
def eager(model: nn.Module) -> Iterator[None]:
    """The model as it was written, without what `model.compile()` made of it or of its parts; afterwards as before."""
    compiled = [(m, m._compiled_call_impl) for m in model.modules() if m._compiled_call_impl is not None]
    try:
        for module, _ in compiled:
            module._compiled_call_impl = None
        yield
    finally:
        for module, call in compiled:
            module._compiled_call_impl = call
