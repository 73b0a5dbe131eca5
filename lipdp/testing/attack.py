"""The search: maximise per-sample gradient norms over inputs and targets, by ascent from many starts."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, grad_and_value, vmap

from lipdp.testing.report import Finding, largest

INPUT = "<input>"  # the name of the gradient by the input, bounded by the Lipschitz constant


@dataclass(frozen=True)
class Objective:
    """Per-sample gradient norms of a model and a loss, as a function of input and target."""

    model: nn.Module
    loss: nn.Module
    names: tuple[str, ...]
    autocast: torch.dtype | None = None

    @property
    def chunk(self) -> int:
        """Samples per vectorised evaluation: each holds its own gradient of every parameter."""
        size = sum(p.numel() for p in self.model.parameters())
        return max(8, min(512, 2**22 // max(size, 1)))

    def _value(self, wrt: Mapping[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        """The loss of one sample; `wrt` holds the parameters and, under `INPUT`, a zero added to the input."""
        parameters = {name: p for name, p in wrt.items() if name != INPUT}
        if INPUT in wrt:
            x = x + wrt[INPUT]
        device = x.device.type
        with torch.autocast(device, self.autocast) if self.autocast else contextlib.nullcontext():
            logits = functional_call(self.model, parameters, (x.unsqueeze(0),))
            return self.loss(logits, y.unsqueeze(0)).sum()

    def _arguments(self, x: Tensor) -> dict[str, Tensor]:
        own = dict(self.model.named_parameters())
        return {name: torch.zeros_like(x) if name == INPUT else own[name] for name in self.names}

    def _norms(self, x: Tensor, y: Tensor) -> Tensor:
        """(names,): the gradient norms of one sample."""
        grads = grad(self._value)(self._arguments(x), x, y)
        return torch.stack([_norm(grads[name]) for name in self.names])

    def norms(self, x: Tensor, y: Tensor) -> Tensor:
        """(S, names): per-sample gradient norms of the S samples."""
        vectorised = self._vectorised(self._norms, x, y)
        if vectorised is not None:
            return vectorised
        return torch.stack([self._plain_norms(*pair).detach() for pair in zip(x, y, strict=True)])

    def climb(self, x: Tensor, y: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(directions by x, directions by y, norms) of S samples whose weighted norms are to grow."""
        along = (0, 1) if y.is_floating_point() else (0,)

        def weighted(x: Tensor, y: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
            norms = self._norms(x, y)
            return (norms * weights).sum(), norms

        vectorised = self._vectorised(grad_and_value(weighted, argnums=along, has_aux=True), x, y, weights)
        if vectorised is not None:
            directions, (_, norms) = vectorised
            return directions[0], directions[1] if len(along) > 1 else torch.zeros_like(y), norms
        rows = [self._plain_climb(*row) for row in zip(x, y, weights, strict=True)]
        return tuple(torch.stack(column) for column in zip(*rows, strict=True))  # type: ignore[return-value]

    def _vectorised(self, function: Callable[..., Any], *arguments: Tensor) -> Any:
        """The function of every sample by vmap, or None where an operation of the model does not allow it."""
        try:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="There is a performance drop")  # vmap falls back to a loop
                return vmap(function, randomness="different", chunk_size=self.chunk)(*arguments)
        except (RuntimeError, NotImplementedError, ValueError):
            return None

    def _plain_norms(self, x: Tensor, y: Tensor) -> Tensor:
        """The same for one sample by ordinary autograd."""
        wrt = {n: t.detach().requires_grad_() if n == INPUT else t for n, t in self._arguments(x).items()}
        grads = torch.autograd.grad(self._value(wrt, x, y), list(wrt.values()), create_graph=True, allow_unused=True)
        return torch.stack([x.new_zeros(()) if g is None else _norm(g) for g in grads])

    def _plain_climb(self, x: Tensor, y: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One sample by ordinary autograd; a random direction where the gradient cannot be differentiated again."""
        free = [t.detach().requires_grad_() for t in (x, y) if t.is_floating_point()]
        norms = self._plain_norms(free[0], free[1] if len(free) > 1 else y)
        try:
            directions = torch.autograd.grad((norms * weights).sum(), free, allow_unused=True)
        except RuntimeError:
            directions = tuple(torch.randn_like(t) for t in free)
        along = [torch.zeros_like(t) if d is None else d for t, d in zip(free, directions, strict=True)]
        return along[0], along[1] if len(free) > 1 else torch.zeros_like(y), norms.detach()


def _norm(x: Tensor) -> Tensor:
    """The Euclidean norm, in float32 or better, with gradient 0 (not NaN) at 0."""
    square = x.to(torch.promote_types(x.dtype, torch.float32)).square().sum()
    safe = torch.where(square > 0, square, 1.0)
    return torch.where(square > 0, safe.sqrt(), square)


class Ascent:
    """Gradient ascent on one norm over its bound per start, with a step size of its own for every start.

    The step is x ← (1 − η) x + η r ĝ with ĝ the unit gradient, kept inside the ball of radius r: for η = 1 it is the
    power iteration (the best point of the ball for a linearised objective), and small η is plain ascent. η grows after
    a success and shrinks after a failure, and the best point is kept. All ends early where each start stays where it is
    or its η has fallen below 1e-9.
    """

    def __init__(self, objective: Objective, bounds: Tensor, radius: float) -> None:
        self.objective = objective
        self.bounds = bounds
        self.radius = radius
        self.evaluations = 0

    def norms(self, x: Tensor, y: Tensor) -> Tensor:
        """Norms of every pair, counted."""
        self.evaluations += len(x)
        return self.objective.norms(x, y)

    def run(self, x: Tensor, y: Tensor, which: Tensor, *, steps: int) -> tuple[Tensor, Tensor, Tensor]:
        """Climb from (x, y), maximising norm number `which` of each start: the best points and all their norms."""
        weights = nn.functional.one_hot(which, len(self.bounds)).to(x.dtype)
        rate = torch.full((len(x),), 1.0, dtype=x.dtype, device=x.device)
        y_radius = _lengths(y) if y.is_floating_point() else None
        best_x, best_y = x, y
        along_x, along_y, best = self._evaluate(x, y, weights)
        for _ in range(steps):
            x = self._move(best_x, along_x, rate, torch.full_like(rate, self.radius))
            y = best_y if y_radius is None else self._move(best_y, along_y, rate, y_radius)
            if not bool(((self._moves(best_x, x) | self._moves(best_y, y)) & (rate > 1e-9)).any()):
                break
            new_x, new_y, norms = self._evaluate(x, y, weights)
            new, old = _pick(norms, which), _pick(best, which)
            better, grown = new > old, new > old * (1 + 1e-9)
            best_x, best_y = _where(better, x, best_x), _where(better, y, best_y)
            along_x, along_y = _where(better, new_x, along_x), _where(better, new_y, along_y)
            best = _where(better, norms, best)
            rate = torch.where(grown, (rate * 1.5).clamp(max=1.0), rate * 0.4)
        return best_x, best_y, best

    def _evaluate(self, x: Tensor, y: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.evaluations += len(x)
        along_x, along_y, norms = self.objective.climb(x, y, weights)
        return along_x, along_y, norms

    @staticmethod
    def _moves(before: Tensor, after: Tensor) -> Tensor:
        """Which of the points have moved by more than rounding."""
        if not after.is_floating_point():
            return torch.zeros(len(after), dtype=torch.bool, device=after.device)
        return _lengths(after - before) > 8 * torch.finfo(after.dtype).eps * _lengths(before)

    @staticmethod
    def _move(x: Tensor, direction: Tensor, rate: Tensor, radius: Tensor) -> Tensor:
        direction = direction.nan_to_num(0.0, 0.0, 0.0)
        length = _lengths(direction)
        unit = direction / _column(torch.where(length > 0, length, 1.0), x)
        eta = _column(torch.where(length > 0, rate, 0.0), x)
        moved = (1 - eta) * x + eta * _column(radius, x) * unit
        return moved * _column((radius / _lengths(moved).clamp_min(1e-30)).clamp(max=1.0), x)


def _lengths(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x.reshape(len(x), -1), dim=1)


def _column(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.dim() - 1))


def _pick(norms: Tensor, which: Tensor) -> Tensor:
    return norms.gather(1, which.unsqueeze(1)).squeeze(1)


def _where(condition: Tensor, first: Tensor, second: Tensor) -> Tensor:
    return torch.where(_column(condition, first), first, second)


def findings(
    objective: Objective, bounds: Tensor, norms: Tensor, x: Tensor, y: Tensor, how: list[str]
) -> dict[str, Finding]:
    """Per name the sample whose norm is largest relative to its bound (a NaN is the largest)."""
    found: dict[str, Finding] = {}
    for k, name in enumerate(objective.names):
        i = largest(norms[:, k])
        quantity = "Lipschitz constant (gradient by the input)" if name == INPUT else f"gradient of {name}"
        found[quantity] = Finding(quantity, float(norms[i, k]), float(bounds[k]), how[i], x[i], y[i])
    return found
