"""From public facts to settings: N, shapes, the architecture, ε, δ and a budget of passes; no record is read."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lipdp.accounting.plan import PrivacyPlan, whole
from lipdp.bounds.sensitivity import Sensitivity, sensitivity
from lipdp.constraints import is_positive
from lipdp.distributed.collectives import Alone, World
from lipdp.distributed.wrappers import plan_together
from lipdp.errors import ParameterError
from lipdp.losses import LipschitzLoss, TauBCEWithLogits, TauCrossEntropy, as_lipschitz
from lipdp.noise.allocation import Allocation, get_allocation
from lipdp.noise.banded import accumulation
from lipdp.suggestion.joints import Joint, gateable, joint_layers, place_joints, without_joints
from lipdp.suggestion.learning import signals
from lipdp.suggestion.probe import gradient_norms, output_shape, public_inputs, typical
from lipdp.suggestion.settings import BlockSetting, Settings

TAU, MOST_TAU = 16.0, 1e9  # the first over what logits can reach; τz must not leave float32 when weights grow
GATE = 0.3 / math.sqrt(2)  # of the loss's constant
CLIP_AT = 0.7  # of the typical norm of values
GATE_AT = 0.03  # of the typical norm of cotangents
LOOSE = 1.5  # a bound of this many times a weight's typical gradient gets a gate at what is typical
NOISE = 1.6  # the spectral norm that noise alone may reach, of the radius of the weights
MOMENTUM = 0.9
PASSES, MOST_PASSES = 5.0, 60.0
SAMPLES = 100_000
BATCH = 1024


def suggest(
    model: nn.Module,
    *,
    input_shape: tuple[int, ...],
    dataset_size: int,
    target_epsilon: float | None = None,
    target_delta: float | None = None,
    noise_multiplier: float | None = None,
    expected_batch_size: int | None = None,
    steps: int | None = None,
    epochs: float | None = None,
    sampling: str = "poisson",
    bands: int = 1,
    truncated_batch_size: int | None = None,
    unit: str = "record",
    accountant: str = "prv",
    criterion: nn.Module | None = None,
    gate: float | None = None,
    allocation: str | Allocation | None = None,
    joints: tuple[Joint, ...] | None = None,
    public: Tensor | None = None,
    world: World | None = None,
) -> Settings:
    r"""Settings for a private run, from public facts alone: what is given stays, what is not is chosen.

    - *Passes, B and T*: see `budget`.
    - *Criterion*: `TauCrossEntropy`(τ), `TauBCEWithLogits` for one output, with τ = 16 over what logits can reach, the
      longest ‖∂z/∂W‖ r of `public` inputs, r the norm of a weight W. A network of constant 1 has short logits, one with
      joints or many layers shorter ones; while τ times them is below 1, the loss is linear and no record is done with.
      The gate at the logits is a fifth of the loss's constant, so that it shortens nearly all cotangents at the
      beginning and Δ is tight.
    - *Joints*: a pass of `public` inputs through the model as it is gives typical norms X and G in front of each layer
      with weights; there a clip at 0.7 X and a gate at 0.03 G are placed, so that bounds are those of typical samples
      and not of the worst. None in dense models and those of two layers, whose bounds are tight without.
    - *Gates at weights*: where the bound of a weight's gradient is still more than 1.5 times what is typical, as in
      convolutions, a gate at what is typical takes its place (docs/settings.md says what it costs).
    - *Learning rates*: T steps at a rate that falls linearly from lr, with momentum β, move an m x n weight by noise of
      spectral norm about lr √(T/3) (s/B) (√m + √n)/(1 − β). It is set to 1.6 of the weight's own.

    Args:
        model: constrained; it is left as it is.
        input_shape: of one sample.
        dataset_size: N, a public constant.
        target_epsilon, target_delta: the budget; or `noise_multiplier`.
        expected_batch_size, steps, epochs, sampling, bands, truncated_batch_size, unit, accountant, criterion, gate,
            allocation: as for `PrivacyEngine.make_private`.
        joints: clips and gates between layers and at weights; () places none.
        public: (n, *input_shape) samples that no record has a part in, of a public data set say; by default 1/f noise
            for images and normal rows for tables.
        world: the processes that train together; the first one decides.

    Raises:
        ParameterError, CalibrationError: a number out of range, no σ. UnboundedError, …: no bound exists.

    >>> model = lipdp.nn.from_torch(torch.nn.Sequential(torch.nn.Linear(8, 3)), (8,))
    >>> settings = lipdp.suggest(
    ...     model, input_shape=(8,), dataset_size=50_000, target_epsilon=1.0, target_delta=1e-5, epochs=2)
    >>> settings.criterion, settings.plan.steps
    (TauCrossEntropy(tau=16.0), 98)

    Source: ours; the spectral norm of a Gaussian matrix as in Davidson & Szarek (2001).
    """
    if not (gate is None or gate == math.inf or is_positive(gate)):
        raise ParameterError(f"gate={gate!r}: a number > 0 is needed")
    world = world or Alone()
    batch, epochs = budget(whole("dataset_size", dataset_size), expected_batch_size, steps=steps, epochs=epochs)
    plan = plan_together(
        world,
        dataset_size=dataset_size,
        expected_batch_size=batch,
        steps=steps,
        epochs=epochs,
        sampling=sampling,
        bands=bands,
        truncated_batch_size=truncated_batch_size,
        unit=unit,
        noise_multiplier=noise_multiplier,
        target_epsilon=target_epsilon,
        target_delta=target_delta,
        accountant=accountant,
    )
    x = public_inputs(input_shape) if public is None else public
    trial = without_joints(model)
    outputs = output_shape(trial, x)
    loss = _criterion(outputs, TAU) if criterion is None else as_lipschitz(criterion, outputs)
    if gate is None and loss.lipschitz < math.inf:
        gate = GATE * loss.lipschitz
    start = min(math.inf if gate is None else gate, loss.lipschitz)
    limit = math.inf if gate is None else gate
    if joints is None:
        joints = _joints(trial, x, 1.0 if start == math.inf else start)
        weights = gateable(trial) if _shares_weights(trial, x) else {}
        place_joints(trial, joints)
        joints += _weight_gates(trial, x, weights, sensitivity(trial, loss, input_shape, gate=limit))
    place_joints(trial, joints)
    allocation = "min_variance" if allocation is None else allocation
    bounds = sensitivity(trial, loss, input_shape, gate=limit)
    norms = gradient_norms(trial, x, bounds.loss_constant)
    if criterion is None:
        loss = _criterion(outputs, _temperature(trial, norms, bounds.loss_constant))
    settings = Settings(
        plan=plan,
        criterion=loss,
        gate=gate,
        allocation=allocation,
        joints=joints,
        blocks=_blocks(trial, norms, bounds, plan, get_allocation(allocation)),
        momentum=MOMENTUM,
    )
    return world.broadcast(settings)


def budget(
    dataset_size: int, expected_batch_size: int | None = None, *, steps: int | None, epochs: float | None
) -> tuple[int, float | None]:
    """B, and how many passes over the data, where they are not given.

    Passes over few records cost little and are worth their noise: so many that 100,000 samples are seen, 5 to 60.

    >>> budget(60_000, steps=None, epochs=None)
    (1024, 5.0)
    """
    batch = min(dataset_size, BATCH) if expected_batch_size is None else expected_batch_size
    if steps is None and epochs is None:
        epochs = min(MOST_PASSES, max(PASSES, SAMPLES / dataset_size))
    return batch, epochs


def _criterion(outputs: tuple[int, ...], tau: float) -> LipschitzLoss:
    return TauBCEWithLogits(tau) if math.prod(outputs) == 1 else TauCrossEntropy(tau)


def _temperature(model: nn.Module, norms: dict[str, float], start: float) -> float:
    """`TAU` over how far a weight can carry the logits, to two digits; norms: of gradients of `start` cotangents."""
    named = dict(model.named_parameters())
    reach = max((norm * _radius(named[name]) / start for name, norm in norms.items()), default=0.0)
    return min(float(f"{TAU / reach:.2g}"), MOST_TAU) if 0 < reach < math.inf else TAU


def _radius(parameter: Tensor) -> float:
    """The spectral norm of a weight, 1 where it is 0, infinite where an entry is."""
    matrix = _matrix(parameter).double()
    return float(torch.linalg.matrix_norm(matrix, 2)) or 1.0 if bool(matrix.isfinite().all()) else math.inf


def _matrix(parameter: Tensor) -> Tensor:
    return parameter.detach().reshape(parameter.shape[0] if parameter.dim() > 1 else 1, -1)


def _joints(model: nn.Module, x: Tensor, start: float) -> tuple[Joint, ...]:
    """Clips and gates at shares of what is typical; none where nothing flows, or where bounds are tight without.

    They are tight where no weight is used at several positions: on tables, and between two layers only.
    """
    layers = joint_layers(model) if _shares_weights(model, x) else []
    found = typical(model, x, layers, start) if len(layers) > 1 else {}
    return tuple(
        Joint(name, clip=CLIP_AT * seen.value, gate=GATE_AT * seen.cotangent)
        for name, seen in found.items()
        if seen.value > 0 and seen.cotangent > 0
    )


def _shares_weights(model: nn.Module, x: Tensor) -> bool:
    """Whether a weight is used at several positions: tokens, or the pixels of a convolution."""
    return x.dim() == 3 or any(p.dim() > 2 for p in model.parameters())


def _weight_gates(model: nn.Module, x: Tensor, weights: dict[str, str], bounds: Sensitivity) -> tuple[Joint, ...]:
    """Gates at the weights whose bound is loose; `model` has the other joints already."""
    norms = gradient_norms(model, x, bounds.loss_constant)
    return tuple(
        Joint(layer, weight=norms[name]) for name, layer in weights.items() if bounds[name] > LOOSE * norms[name] > 0
    )


def _blocks(
    model: nn.Module, norms: dict[str, float], bounds: Sensitivity, plan: PrivacyPlan, allocation: Allocation
) -> tuple[BlockSetting, ...]:
    """A learning rate per parameter, and what its signal is over its noise."""
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    deltas = torch.tensor([bounds[n] for n in named], dtype=torch.float64) * plan.relation.sensitivity_factor
    sizes = torch.tensor([p.numel() for p in named.values()])
    stds = dict(zip(named, allocation.stds(deltas, sizes, plan.noise_multiplier).tolist(), strict=True))
    strengths = signals(stds, norms, named, plan)
    blocks = []
    for name, parameter in named.items():
        noise = accumulation(plan.bands) * math.sqrt(plan.steps / 3) * stds[name] / plan.expected_batch_size
        noise *= sum(map(math.sqrt, _matrix(parameter).shape))
        rate = NOISE * _radius(parameter) * (1 - MOMENTUM) / noise if noise else 1.0
        blocks.append(BlockSetting(name, rate, strengths[name]))
    return tuple(blocks)
