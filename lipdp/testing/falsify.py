"""Try to break a bound: of a model, of one layer, of a loss."""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lipdp.accounting.relation import Relation
from lipdp.bounds import BoundGraph
from lipdp.bounds.probe import probe_input, sample_shape, vocabulary_of
from lipdp.bounds.sensitivity import Sensitivity, read_sweep
from lipdp.errors import ParameterError, UnknownNameError
from lipdp.losses import LipschitzLoss, as_lipschitz
from lipdp.nn.gates import InputBound
from lipdp.testing.attack import INPUT, Ascent, Objective, findings
from lipdp.testing.inputs import (
    WEIGHTS,
    ProbeLoss,
    example_targets,
    input_radius,
    starting_inputs,
    starting_tokens,
    targets_for,
    weight_settings,
)
from lipdp.testing.nodes import autocast, batch_findings, node_findings, pair_findings
from lipdp.testing.report import Finding, Report, default_tolerance


@dataclass(frozen=True)
class Effort:
    """How hard to look: see `falsify`; at most `targets` targets are tried from every start."""

    starts: int = 8
    climbs: int = 3
    steps: int = 15
    targets: int = 12

    def __post_init__(self) -> None:
        for name in ("starts", "climbs", "steps", "targets"):
            if getattr(self, name) < (0 if name in ("starts", "steps") else 1):
                raise ParameterError(f"falsify: {name}={getattr(self, name)} is too small")


def falsify(
    model: nn.Module,
    loss: nn.Module,
    input_shape: tuple[int, ...],
    *,
    weights: Sequence[str] = tuple(WEIGHTS),
    starts: int = 8,
    climbs: int = 3,
    steps: int = 15,
    targets: Tensor | None = None,
    radius: float | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    forward_dtype: torch.dtype | None = None,
    raise_on_violation: bool = True,
) -> Report:
    """Search for a record whose gradient exceeds `lipdp.sensitivity(model, loss, input_shape)`.

    For every setting of the weights and every trainable parameter, the ratio ‖∇_θ ℓ(x, y)‖ / Δ_θ of one sample is
    maximised over inputs x in all of Rⁿ and over targets y: patterns (constant, checkerboard, borders, single entries,
    zero, tiny, huge) and Gaussian starts with every target, then gradient ascent from the best. The same inputs are
    held against X and G of every operation and against the Lipschitz constant (input gradients and pairs). The worst
    samples are added to a batch, whose summed gradient must not move by more than Δ.

    It proves nothing when it finds nothing; it is a test of rules, as a fuzzer is a test of parsers. The model given is
    not touched: the attack works on a copy.

    Args:
        model: as for `sensitivity`; begins with `InputBound`.
        loss: as for `sensitivity`.
        input_shape: of one sample.
        weights: settings to attack, names in `lipdp.testing.WEIGHTS`: "given", "sampled" from the constraint, after 50
            "noisy steps" with projection, "constant" and "rank one" kernels, "scaled" beyond the constraint.
        starts: Gaussian starting inputs, beside about a dozen patterns.
        climbs, steps: ascents per parameter, and the length of each.
        targets: (n, ...) targets to try; default: `example_targets(loss, number of outputs)`.
        radius: norm of the starting inputs; default: that of the first `InputBound` or `ValueClip`.
        dtype: float64, or float32 to include its rounding.
        forward_dtype: attack the forward pass under autocast to this dtype (the model is then float32).

    Returns:
        `Report`: per quantity the worst ratio and the input that reached it.

    Raises:
        BoundViolation: a ratio above 1 (+ 1e-9 in float64, + 1e-5 in float32), unless `raise_on_violation=False`.

    >>> model = torch.nn.Sequential(lipdp.nn.InputBound(1.0), lipdp.nn.SpectralLinear(4, 3))
    >>> report = lipdp.testing.falsify(model, lipdp.losses.CategoricalHinge(), (4,), steps=5)
    >>> 0.99 < report.ratios["1.weight"] <= 1
    True
    """
    unknown = [name for name in weights if name not in WEIGHTS]
    if unknown:
        raise UnknownNameError("setting of the weights", unknown[0], WEIGHTS)
    if not sample_shape(input_shape):
        raise ParameterError("falsify: the samples need an axis; give e.g. input_shape=(1,)")
    copied = copy.deepcopy(model).to(torch.float32 if forward_dtype is not None else dtype)
    graph = BoundGraph(copied, sample_shape(input_shape), dtype=forward_dtype or dtype)
    criterion = as_lipschitz(loss, graph.output_shape)
    tried = targets_for(criterion, graph.output_shape) if targets is None else targets
    generator = torch.Generator().manual_seed(seed)
    effort = Effort(starts, climbs, steps)
    weights = weights if any(True for _ in copied.parameters()) else ("given",)
    attack = _ModelAttack(graph, criterion, tried, radius or input_radius(copied), effort, forward_dtype, generator)
    report = Report({}, 0, default_tolerance(graph.dtype))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        for name in weight_settings(copied, tuple(weights), generator):
            report = report.merged(attack.run(name))
            if raise_on_violation:
                report.raise_violations()
    return report


@dataclass(frozen=True)
class _ModelAttack:
    """Everything that stays the same while the weights change."""

    graph: BoundGraph
    loss: LipschitzLoss
    targets: Tensor
    radius: float
    effort: Effort
    autocast: torch.dtype | None
    generator: torch.Generator

    def declared(self, loss: LipschitzLoss) -> Sensitivity:
        start = float(loss.constant(float(self.graph.output_bound())))
        return read_sweep(self.graph.sweep(start), start, Relation.ADD_OR_REMOVE_ONE)

    def run(self, weights: str) -> Report:
        """One setting of the weights."""
        declared = self.declared(self.loss)
        tokens = self.graph.vocabulary is not None
        bounds = dict(declared) | ({} if tokens else {INPUT: declared.lipschitz * declared.loss_constant})
        found, x, y, how, evaluations = self.climb(self.loss, self.targets, bounds, weights)
        with autocast(self.graph.device, self.autocast):
            found |= node_findings(self.graph, self.loss, declared, x, y, how)
            found |= pair_findings(self.graph.model, declared.lipschitz, x, self.radius)
            by_parameter = {q: f for q, f in found.items() if q.startswith("gradient of")}
            found |= batch_findings(self.graph.model, self.loss, declared, by_parameter, x[:8], y[:8])
        if not isinstance(self.loss, ProbeLoss) and not tokens:
            probe = ProbeLoss()
            directions = example_targets(probe, self.graph.num_outputs).to(x.dtype)
            more = self.climb(probe, directions, {INPUT: declared.lipschitz}, weights)
            quantity = "Lipschitz constant (of the network alone)"
            found[quantity] = replace(next(iter(more[0].values())), quantity=quantity)
            evaluations += more[4]
        return Report(found, evaluations, default_tolerance(self.graph.dtype))

    def climb(
        self, loss: LipschitzLoss, targets: Tensor, bounds: dict[str, float], weights: str
    ) -> tuple[dict[str, Finding], Tensor, Tensor, list[str], int]:
        """Findings of an ascent, and the inputs it went through: (findings, x, y, how, evaluations)."""
        objective = Objective(self.graph.model, loss, tuple(bounds), self.autocast)
        dtype = torch.float64 if self.graph.dtype == torch.float64 else torch.float32
        limits = torch.tensor([b if b > 0 else 1e-300 for b in bounds.values()], dtype=torch.float64)
        ascent = Ascent(objective, limits, self.radius)
        shape, tokens, count = self.graph.input_shape, self.graph.vocabulary, self.effort.starts
        if tokens is None:
            points = starting_inputs(shape, self.radius, random=count, generator=self.generator)
        else:
            points = starting_tokens(shape, tokens, random=count, generator=self.generator)
        tried = targets.to(dtype) if targets.is_floating_point() else targets
        tried = tried[torch.randperm(len(tried), generator=self.generator)[: self.effort.targets]]
        x = torch.stack(list(points.values())).to(torch.int64 if tokens is not None else dtype)
        x = x.repeat_interleave(len(tried), 0)
        y = tried.repeat(len(points), *[1] * (tried.dim() - 1))
        how = [f"weights: {weights}, start: {name}" for name in points for _ in range(len(tried))]
        norms = ascent.norms(x, y)
        if tokens is not None or not bounds:  # nothing to climb along
            return findings(objective, limits, norms, x, y, how), x, y, how, ascent.evaluations
        climbs = min(self.effort.climbs, len(x))
        ratios = torch.nan_to_num(norms.double() / limits, nan=math.inf)
        best = ratios.topk(climbs, dim=0).indices.T.reshape(-1)  # the best starts of every parameter
        which = torch.arange(len(limits)).repeat_interleave(climbs)
        inside = x[best] * (1 - 1e-6)  # off the sphere, where the projection hides the radial part of the gradient
        climbed_x, climbed_y, climbed = ascent.run(inside, y[best], which, steps=self.effort.steps)
        pushed = climbed_x * 1.01  # on the sphere exactly, for what was inside it
        x, y = torch.cat([x, climbed_x, pushed]), torch.cat([y, climbed_y, climbed_y])
        norms = torch.cat([norms, climbed, ascent.norms(pushed, climbed_y)])
        how += [f"{how[int(i)]}, after {self.effort.steps} steps of ascent" for i in best] * 2
        return findings(objective, limits, norms, x, y, how), x, y, how, ascent.evaluations


def falsify_layer(
    layer: nn.Module,
    input_shape: tuple[int, ...],
    *,
    radius: float = 1.0,
    raise_on_violation: bool = True,
    **options: object,
) -> Report:
    """Search for an input of norm ≤ `radius` and a cotangent of norm ≤ 1 that break the rule of one layer.

    The layer stands between `InputBound(radius)` and the loss ⟨u, y⟩ with a free unit vector u, so that all that is
    tested is its own rule: the bounds of its value, of the cotangent it hands on, and of its parameters. Options and
    errors are those of `falsify`.

    >>> lipdp.testing.falsify_layer(lipdp.nn.SpectralLinear(4, 3, bias=True), (4,), steps=5).worst <= 1
    True
    """
    probe = probe_input(layer, sample_shape(input_shape))
    front = nn.Identity() if vocabulary_of(layer, probe) is not None else InputBound(radius)
    model = nn.Sequential(OrderedDict(bound=front, layer=layer))
    return falsify(model, ProbeLoss(), input_shape, raise_on_violation=raise_on_violation, **options)  # type: ignore[arg-type]


def tightness(model: nn.Module, loss: nn.Module, input_shape: tuple[int, ...], **options: object) -> float:
    """The share of its bound that an attack reaches on every parameter: 1 means that no bound can be lowered.

    The smallest, over the parameters, of the largest ratio that `falsify` finds at the weights given.

    >>> model = torch.nn.Sequential(lipdp.nn.InputBound(1.0), lipdp.nn.SpectralLinear(4, 4))
    >>> lipdp.testing.tightness(model, lipdp.losses.CategoricalHinge(), (4,)) > 0.99
    True
    """
    options = {"weights": ("given",), **options}
    return min(falsify(model, loss, input_shape, **options).ratios.values())  # type: ignore[arg-type]
