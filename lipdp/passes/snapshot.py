"""The model and the loss as they were when the bounds were derived, compared with what they are at every step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import nn

from lipdp.constraints import Constraint
from lipdp.errors import ChangedError

_BOOKKEEPING = frozenset(
    {
        "training",  # looked at once for the whole model
        "_compiled_call_impl",  # nn.Module.compile: the same function
        "_is_torch_compile",  # torch.compile(model): a mark on the original
        "_compile_kwargs",  # the same under Lightning
        "_is_accelerate_prepared",  # Accelerator.prepare: a mark
        "_state_dict_hooks",
        "_state_dict_pre_hooks",
        "_load_state_dict_pre_hooks",
        "_load_state_dict_post_hooks",
    }
)
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


_Container = dict[Any, Any] | list[Any]


@dataclass(frozen=True)
class _Cell:
    """One container (a module's attributes, a list among them, …) and what it held."""

    where: str
    container: _Container
    held: dict[Any, Any]


class Snapshot:
    """A module tree as it was when its bound was derived, compared with what it is now.

    Compared are the modules and their classes, all attributes of each (stride, scale, constraint, …, and what lists,
    dicts and constraints among them hold), the identity, shape and dtype of parameters and buffers, and hooks. Values
    of weights and buffers may change, and so may `requires_grad`: the bounds follow both at every step.

    Not seen: a change that is undone before the next step, and one inside an object of a foreign class that an
    attribute refers to. Where nothing changed, a look costs a few microseconds per module.

    Args:
        root: the model, or the loss.
        what: how messages call it.
        mode: whether train() and eval() count: every module's mode must stay as at the first look.

    >>> model = torch.nn.Sequential(lipdp.nn.SpectralConv2d(1, 4, 3))
    >>> snapshot = Snapshot(model, "the model")
    >>> snapshot.check()
    >>> model[0].stride = (2, 2)
    >>> snapshot.check()
    Traceback (most recent call last):
    lipdp.errors.ChangedError: the model has changed since make_private: '0' (SpectralConv2d): stride was (1, 1)...
    """

    def __init__(self, root: nn.Module, what: str, *, mode: bool = True) -> None:
        self._what, self._mode = what, mode
        self._modules = [(path, m, type(m), type(m).forward) for path, m in root.named_modules()]
        kinds = {kind for m in root.modules() for kind in _own_classes(type(m))}
        self._classes = [(kind, dict(vars(kind)), list(map(id, vars(kind).values()))) for kind in kinds]
        self._cells: list[_Cell] = []
        known: set[int] = set()
        for path, module, kind, _ in self._modules:
            self._keep(f"'{path or kind.__name__}' ({kind.__name__})", vars(module), known)
        self._views = [_values(cell.container) for cell in self._cells]  # live: they show what is there now
        self._ids = self._identities()
        self._tensors = [
            (name, t, t.shape, t.dtype, isinstance(t, nn.Parameter))
            for name, t in chain(root.named_parameters(), root.named_buffers())
        ]
        self._modes: list[bool] | None = None

    def _keep(self, where: str, container: _Container, known: set[int]) -> None:
        if id(container) in known:
            return
        known.add(id(container))
        self._cells.append(_Cell(where, container, _named(container)))
        for value in _values(container):
            for inner in _inner(value):
                self._keep(where, inner, known)

    def _identities(self) -> list[int]:
        """Of every object the tree holds; `_cells` keep them alive, so that an identity is not used again."""
        return list(map(id, chain.from_iterable(self._views)))

    def check(self, *, mode: bool = True) -> None:
        """Refuse any difference; of mode too, unless told otherwise."""
        if self._identities() != self._ids:
            for cell in self._cells:
                self._compare(cell)
            self._cells = [replace(cell, held=_named(cell.container)) for cell in self._cells]
            self._ids = self._identities()  # what was added is only a mark: the next look is quick again
        for path, module, kind, forward in self._modules:
            if type(module) is not kind or kind.forward is not forward:
                self._refuse(f"'{path}' is of another class, or its class has another forward")
        for kind, held, ids in self._classes:
            if ids != list(
                map(id, vars(kind).values())
            ):  # `held` keeps them alive, so that an identity is one object's
                names = {*held, *vars(kind)} - {"project_"}  # at which `ProjectionCheck` looks
                if any(held.get(name) is not vars(kind).get(name) for name in names):
                    self._refuse(f"attributes of the class {kind.__name__} are others")
        for name, tensor, shape, dtype, is_parameter in self._tensors:
            if tensor.shape != shape or tensor.dtype is not dtype:
                self._refuse(f"'{name}' was {tuple(shape)} {dtype}, is now {tuple(tensor.shape)} {tensor.dtype}")
            if is_parameter and (tensor._backward_hooks or getattr(tensor, "_post_accumulate_grad_hooks", None)):
                self._refuse(f"'{name}' carries a gradient hook, which can scale its gradient beyond the bound")
        if self._mode and mode:
            self._check_mode()

    def _check_mode(self) -> None:
        modes = [module.training for _, module, _, _ in self._modules]
        if self._modes is None:
            self._modes = modes
        elif modes != self._modes:
            flipped = [i for i, (now, was) in enumerate(zip(modes, self._modes, strict=True)) if now != was]
            path, mode = self._modules[flipped[0]][0], "train()" if modes[flipped[0]] else "eval()"
            self._refuse(f"{f'{path!r}' if path else 'it'} is in {mode} mode, and was not at the first step")

    def _compare(self, cell: _Cell) -> None:
        """The slow look, by value: an equal number is no change."""
        before, after = cell.held, _named(cell.container)
        if "_original_forward" in after and "_original_forward" not in before:
            self._refuse(
                f"{cell.where}: its forward was wrapped, as accelerator.prepare(model) does under mixed precision."
                " Leave the model out of prepare and run it inside accelerator.autocast()"
            )
        for name in {**before, **after}:
            if name in _BOOKKEEPING:
                continue
            if name not in before or name not in after:
                self._refuse(f"{cell.where}: {name} was {'removed' if name in before else 'added'}")
            if not _same(before[name], after[name]):
                was, is_now = _shown(before[name]), _shown(after[name])
                self._refuse(f"{cell.where}: {name} " + (f"was {was}, is now {is_now}" if was else "is another object"))

    def _refuse(self, difference: str) -> None:
        raise ChangedError(
            f"{self._what} has changed since make_private: {difference}. The noise is calibrated to the bounds that"
            " were derived then; put it back, or detach() the engine and call make_private again",
            difference,
        )


def _own_classes(kind: type) -> Iterator[type]:
    """A module's class and the classes that it inherits from, torch's own excepted."""
    return (base for base in kind.__mro__ if not base.__module__.startswith("torch.") and base is not object)


def _values(container: _Container) -> Iterable[Any]:
    return container.values() if isinstance(container, dict) else container


def _named(container: _Container) -> dict[Any, Any]:
    return dict(container) if isinstance(container, dict) else dict(enumerate(container))


def _inner(value: Any) -> Iterator[_Container]:
    """The containers whose changes `value` would hide."""
    if isinstance(value, (dict, list)):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from _inner(part)
    elif isinstance(value, Constraint) and hasattr(value, "__dict__"):
        yield vars(value)


def _same(old: Any, new: Any) -> bool:
    if old is new:
        return True
    if type(old) is not type(new):
        return False
    if isinstance(old, tuple):
        return len(old) == len(new) and all(map(_same, old, new))
    return isinstance(old, (*_PLAIN, Constraint)) and old == new


def _shown(value: Any) -> str:
    """A value as messages show it; nothing where it is no value."""
    return f"{value!r:.80}" if isinstance(value, (*_PLAIN, tuple, Constraint)) else ""
