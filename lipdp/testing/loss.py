"""Try to break the constant of a loss, and the promise that it takes samples one by one."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lipdp.constraints import is_size
from lipdp.errors import LossError, ParameterError
from lipdp.testing.attack import Ascent, Objective
from lipdp.testing.inputs import example_targets
from lipdp.testing.report import Finding, Report, default_tolerance, largest

_CONSTANT = "gradient of the logits"
_IN_BATCH = "gradient of the logits, in a batch"
_COUPLING = "influence of one sample on another"


class _Logits(nn.Module):
    """The identity, with a parameter in front whose gradient is the gradient by the logits."""

    def __init__(self, num_outputs: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(num_outputs, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shift


def falsify_loss(
    loss: nn.Module,
    num_outputs: int,
    *,
    targets: Tensor | None = None,
    output_bound: float = math.inf,
    starts: int = 8,
    steps: int = 15,
    seed: int = 0,
    raise_on_violation: bool = True,
) -> Report:
    """Search for logits and a target with ‖∂ℓ/∂z‖ > `loss.lipschitz`, and for coupled samples.

    The gradient norm is maximised over logits of scales from 1e-3 to 1e3 (ties and zeros included) with every target,
    alone and in batches in which one class is rare. Then one sample's logits are changed, its target is changed, and it
    is left out: no other sample's value or gradient may move.

    Args:
        loss: one value per sample, with an attribute `lipschitz` (or a method `constant(output_bound)`).
        num_outputs: C.
        targets: (n, ...) targets to try; default: `example_targets(loss, num_outputs)`.
        output_bound: the norm of the logits, for a loss whose constant depends on it; larger logits are not tried.
        starts, steps: of the ascents.

    Raises:
        BoundViolation: the constant is exceeded, or samples are coupled (unless `raise_on_violation=False`).
        LossError: the loss states no constant, or does not return one value per sample.

    >>> 0.99 < lipdp.testing.falsify_loss(lipdp.losses.TauCrossEntropy(4.0), 3).worst <= 1
    True
    """
    if not is_size(num_outputs):
        raise ParameterError(f"num_outputs={num_outputs!r}: the number of logits, at least 1, is needed")
    limit = _constant(loss, output_bound)
    generator = torch.Generator().manual_seed(seed)
    tried = example_targets(loss, num_outputs) if targets is None else targets
    tried = tried.double() if tried.is_floating_point() else tried
    logits = _logits(num_outputs, starts, min(output_bound, 1e3), generator)
    _check_shape(loss, logits[: len(tried)], tried[: len(logits)])
    x, y = logits.repeat_interleave(len(tried), 0), tried.repeat(len(logits), *[1] * (tried.dim() - 1))
    objective = Objective(_Logits(num_outputs), loss, ("shift",))
    radius = float(torch.linalg.vector_norm(logits, dim=1).max())
    ascent = Ascent(objective, torch.tensor([limit]), radius)
    norms = ascent.norms(x, y)[:, 0]
    best = torch.where(norms.isnan(), torch.inf, norms).topk(min(starts, len(x))).indices
    climbed = ascent.run(x[best], y[best], torch.zeros(len(best), dtype=torch.int64), steps=steps)
    x, y, norms = torch.cat([x, climbed[0]]), torch.cat([y, climbed[1]]), torch.cat([norms, climbed[2][:, 0]])
    i = largest(norms)
    found = [Finding(_CONSTANT, float(norms[i]), limit, "ascent over the logits", x[i], y[i])]
    found += [_in_batches(loss, limit, logits, tried), _coupling(loss, limit, logits, tried)]
    report = Report({f.quantity: f for f in found}, ascent.evaluations, default_tolerance(torch.float64))
    return report.raise_violations() if raise_on_violation else report


def _constant(loss: nn.Module, output_bound: float) -> float:
    constant = getattr(loss, "constant", None)
    value = constant(output_bound) if callable(constant) else getattr(loss, "lipschitz", None)
    if value is None or not 0 < float(value) < math.inf:
        raise LossError(
            f"{type(loss).__name__} states no finite constant (lipschitz={value}); set self.lipschitz, or pass"
            " output_bound= if it depends on the norm of the logits"
        )
    return float(value)


def _check_shape(loss: nn.Module, logits: Tensor, targets: Tensor) -> None:
    values = loss(logits[: len(targets)], targets)
    if values.shape != (min(len(logits), len(targets)),):
        raise LossError(
            f"{type(loss).__name__} returned shape {tuple(values.shape)}; it must return one value per sample"
        )


def _logits(num_outputs: int, starts: int, bound: float, generator: torch.Generator) -> Tensor:
    """Zeros, ties, one large entry, and Gaussian logits of scales 1e-3 to 1e3, none of norm above the bound."""
    gaussian = torch.randn(starts, num_outputs, generator=generator, dtype=torch.float64)
    scaled = torch.logspace(-3, 3, starts, dtype=torch.float64).unsqueeze(1) * gaussian
    ones, eye = torch.ones(2, num_outputs, dtype=torch.float64), torch.eye(num_outputs, dtype=torch.float64)
    signs = ones * torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    rows = torch.cat([0 * ones[:1], signs, 1e3 * signs, 1e3 * eye, -1e3 * eye, scaled])
    norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return rows * (bound / norms.clamp_min(bound))


def _gradients(loss: nn.Module, logits: Tensor, targets: Tensor) -> Tensor:
    with torch.enable_grad():
        leaf = logits.detach().clone().requires_grad_()
        return torch.autograd.grad(loss(leaf, targets).sum(), leaf)[0]


def _in_batches(loss: nn.Module, limit: float, logits: Tensor, targets: Tensor) -> Finding:
    """Rows of the gradient of a summed batch: all of one target but the first (a rare class), and all mixed."""
    size = max(64, len(logits))
    rows = logits.repeat(-(-size // len(logits)), 1)[:size]
    common = [targets[k : k + 1].expand(size, *targets.shape[1:]).clone() for k in range(len(targets))]
    for k, batch in enumerate(common):
        batch[0] = targets[(k + 1) % len(targets)]
    mixed = targets.repeat(-(-size // len(targets)), *[1] * (targets.dim() - 1))[:size]
    worst = Finding(_IN_BATCH, 0.0, limit, "")
    for batch in [*common, mixed]:
        norms = torch.linalg.vector_norm(_gradients(loss, rows, batch), dim=1)
        i = largest(norms)
        finding = Finding(_IN_BATCH, float(norms[i]), limit, "a batch with one rare target", rows[i], batch[i])
        worst = max(worst, finding, key=lambda f: f.ratio)
    return worst


def _coupling(loss: nn.Module, limit: float, logits: Tensor, targets: Tensor) -> Finding:
    """How much the others' values and gradients move when one sample changes: at most rounding."""
    y = targets.repeat(-(-len(logits) // len(targets)), *[1] * (targets.dim() - 1))[: len(logits)]
    moved, other = logits.clone(), y.clone()
    moved[0] = 3 * moved[0].flip(0) + 1
    other[0] = targets[(1 if len(targets) > 1 else 0)]
    changes = {
        "its logits are changed": (moved, y),
        "its target is changed": (logits, other),
        "it is left out": (logits[1:], y[1:]),
    }
    value, gradient = loss(logits, y).detach()[1:], _gradients(loss, logits, y)[1:]
    worst = Finding(_COUPLING, 0.0, 1.0, "")
    for how, (x, t) in changes.items():
        rest = len(logits) - 1
        pairs = ((value, loss(x, t).detach()[-rest:]), (gradient, _gradients(loss, x, t)[-rest:]))
        for what, (before, after) in zip(("value", "gradient"), pairs, strict=True):
            scale = float(before.abs().max()) * 1e-9 + 1e-12 * limit
            change = float((before - after).abs().max())
            finding = Finding(_COUPLING, change, scale, f"another sample's {what} moves when {how}")
            worst = max(worst, finding, key=lambda f: f.ratio)
    return worst
