"""L2 projected gradient descent on the whole pipeline, by foolbox: what must never succeed inside a certified radius.

Every sample is attacked in its own ball. foolbox sees the perturbation in units of that ball's radius, so that one step
size fits all radii, and logits in units of the sample's margin, so that the cross-entropy neither saturates (a plain
network's large logits) nor is flat (a network with a small constant).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lipdp.bounds.trace import mode
from lipdp.certify.inputs import InputMap, apply_maps
from lipdp.data.scaling import Clip
from lipdp.errors import ParameterError

_INSIDE = 1.0 - 1e-4  # the ball attacked, so that rounding the perturbed input leaves it inside the radius


@dataclass(frozen=True)
class AttackResult:
    """The result of an attack.

    Attributes:
        broken: (N,) bool, whether some input within the radius is given another label than the true one.
        distances: (N,) float64, how far the perturbed input found is; 0 for samples that were wrong before, ∞ where
            none was found.
    """

    broken: Tensor
    distances: Tensor

    @property
    def accuracy(self) -> float:
        """The share of samples that are right whatever the attack tried."""
        return float((~self.broken).double().mean())


class _Ball(nn.Module):
    """u ↦ logits at x + r u, in units of the margin at x; a single logit z becomes (0, z)."""

    def __init__(
        self, model: nn.Module, maps: Sequence[InputMap], x: Tensor, radii: Tensor, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.model, self.maps, self.x, self.dtype = model, tuple(maps), x, dtype
        self.radii = radii.to(x).view(-1, *[1] * (x.dim() - 1))
        self.unit: Tensor | float = 1.0

    def perturbed(self, u: Tensor) -> Tensor:
        return self.x + self.radii * u

    def forward(self, u: Tensor) -> Tensor:
        logits = self.model(apply_maps(self.maps, self.perturbed(u), self.dtype)).flatten(1)
        if logits.shape[1] == 1:
            logits = torch.cat([torch.zeros_like(logits), logits], 1)
        return logits / self.unit


def pgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    radius: float | Tensor,
    maps: Sequence[InputMap] = (),
    steps: int = 40,
    restarts: int = 2,
    step_size: float = 0.1,
    seed: int = 0,
    batch_size: int = 500,
) -> AttackResult:
    """Attack: look within a radius of each sample for inputs with another answer.

    Args:
        model, x, y, maps: as for `certify`.
        radius: one number, or one per sample (N,), in units of the raw input.
        steps, restarts: of the gradient descent; the first start is the sample itself, the others are random.
        step_size: as a share of the radius.
        seed: of the random starts.
        batch_size: samples attacked at a time.

    Raises:
        ParameterError: foolbox is not installed, or a radius is negative or not finite.

    Source: Madry et al. (2018); Rauber, Brendel & Bethge (2018), foolbox.
    """
    attacker = _attacker()
    radii = torch.as_tensor(radius, dtype=torch.float64).expand(len(x))
    if not bool(((radii >= 0) & radii.isfinite()).all()):
        raise ParameterError("radii to attack are finite and at least 0")
    like = next((p for p in model.parameters() if p.is_floating_point()), x)
    results = [(torch.zeros(0, dtype=torch.bool), torch.zeros(0, dtype=torch.float64))]
    with mode(model, False), _without_gradients(model), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for start in range(0, len(x), batch_size):
            batch = slice(start, start + batch_size)
            xb, rb = x[batch].to(like.device), radii[batch].to(like.device)

            def make(chosen: Tensor, xb: Tensor = xb, rb: Tensor = rb) -> _Ball:
                return _Ball(model, maps, xb[chosen], rb[chosen] * _INSIDE, like.dtype).eval()

            results.append(_attack(make, y[batch].to(like.device), attacker, rb, steps, restarts, step_size))
    return AttackResult(*(torch.cat(column) for column in zip(*results, strict=True)))


@contextmanager
def _without_gradients(model: nn.Module) -> Iterator[None]:
    """The model's parameters out of the backward pass, which would leave gradients on them."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def _attack(
    make: Callable[[Tensor], _Ball],
    labels: Tensor,
    attacker: Any,
    radii: Tensor,
    steps: int,
    restarts: int,
    step_size: float,
) -> tuple[Tensor, Tensor]:
    """All restarts on one batch; `make` builds the balls of the samples at some indices. A broken one is left alone."""
    import foolbox

    with torch.no_grad():
        everything = make(torch.arange(len(labels), device=labels.device))
        clean = everything(torch.zeros_like(everything.x))
    margins = clean.gather(1, labels[:, None]) - clean.scatter(1, labels[:, None], -torch.inf).amax(1, keepdim=True)
    distances = torch.where(clean.argmax(1) == labels, torch.inf, 0.0).double()
    for attempt in range(restarts):
        left = distances.isinf().nonzero()[:, 0]
        if not len(left):
            break
        ball = make(left)
        ball.unit = margins[left].clamp_min(1e-6)
        target = foolbox.PyTorchModel(ball, bounds=(-2.0, 2.0), device=ball.x.device)
        attack = attacker(ball, steps=steps, rel_stepsize=step_size, random_start=attempt > 0)
        criterion = foolbox.criteria.Misclassification(labels[left])
        u = attack.run(target, torch.zeros_like(ball.x), criterion, epsilon=1.0)
        with torch.no_grad():
            wrong = ball(u).argmax(1) != labels[left]
            moved = torch.linalg.vector_norm((ball.perturbed(u).double() - ball.x.double()).flatten(1), dim=1)
        distances[left] = torch.where(wrong & (moved <= radii[left]), moved, torch.inf)
    distances = distances.cpu()
    return distances < torch.inf, distances


def _attacker() -> Any:
    """foolbox's L2 PGD; where the pipeline begins with a clip, the perturbed input is kept in its box."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # foolbox imports a deprecated name of scipy
            import eagerpy
            from foolbox.attacks import L2ProjectedGradientDescentAttack
    except ImportError as error:
        raise ParameterError(f'the attack needs foolbox ({error}): pip install "lipdp[robustness]"') from error

    class InBox(L2ProjectedGradientDescentAttack):
        def __init__(self, ball: _Ball, **options: Any) -> None:
            super().__init__(**options)
            self.ball = ball

        def project(self, x: Any, x0: Any, epsilon: float) -> Any:
            """First on the box, then on the ball around its point: the second keeps in the box, which is convex."""
            first = self.ball.maps[0] if self.ball.maps else None
            if isinstance(first, Clip):
                inside = first(self.ball.perturbed(x.raw))
                scale = self.ball.radii.clamp_min(torch.finfo(self.ball.x.dtype).tiny)
                x = eagerpy.astensor((inside - self.ball.x) / scale)
            return super().project(x, x0, epsilon)

    return InBox
