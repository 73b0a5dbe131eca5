"""From what `make_private` was given to a run: model and data checked and bounded, loader, criterion, hooks."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace

import torch
from torch import Tensor, nn

from lipdp.accounting.plan import PrivacyPlan
from lipdp.batches.inputs import InputKind
from lipdp.batches.loader import BatchLoader
from lipdp.batches.population import Population, check_records, first_records
from lipdp.batches.reading_check import check_reading
from lipdp.bounds import BoundGraph
from lipdp.distributed.collectives import World
from lipdp.distributed.wrappers import check_alike, own_reduction, warm_up_shards
from lipdp.errors import CannotLearnWarning, EngineError, ParameterError, outside
from lipdp.losses import as_lipschitz
from lipdp.nn.compiled import original
from lipdp.nn.sharded import is_sharded, local_tensor
from lipdp.noise.allocation import get_allocation
from lipdp.passes.step import StepInProgress
from lipdp.passes.sums import Gradients, OwnGradients, WatchedGradients
from lipdp.privacy.criterion import PrivateCriterion
from lipdp.privacy.free_weights import note_free_weights
from lipdp.privacy.hooks import StepHooks
from lipdp.privacy.loss_check import check_loss
from lipdp.privacy.options import Draws, Request
from lipdp.suggestion.joints import place_joints
from lipdp.suggestion.learning import drowned, misfit, noise_moves, signals
from lipdp.suggestion.probe import gradient_norms, public_inputs
from lipdp.timing import Clock


def attach(request: Request, plan: PrivacyPlan, draws: Draws, world: World) -> StepHooks:
    """Check and bound what is to be private, then put the hooks on the optimiser."""
    if type(request.views) is not int or request.views < 1:
        raise ParameterError(f"views={request.views!r}: how many views of a record are averaged, 1 or more")
    population = Population.of(request.dataset, world, group=request.group, own_records=request.own_records)
    plan = _completed(plan, request, draws, population, world.size)
    check_alike(world, plan, views=request.views)
    draws.ledger.protect(population.protected)
    records = first_records(request.dataset, world, own_records=request.own_records)
    check_records(request.dataset, world, own_records=request.own_records)
    with world.fail_together():
        check_reading(request.dataset)
    inner = own_reduction(request.module, world)
    world.broadcast_([t for t in (*inner.parameters(), *inner.buffers()) if local_tensor(t) is t])
    with world.fail_together():
        shape = tuple(request.input_shape or records[0].shape[1 if request.views == 1 else 2 :])
        place_joints(original(inner), request.joints)
        warm_up_shards(inner, shape)
        graph = BoundGraph(inner, shape, dtype=request.forward_dtype, gated=request.group is None)
        run = _hooked(request, plan, draws, world, population, inner, graph, records)
    run.share_keys()
    return run


def _completed(
    plan: PrivacyPlan, request: Request, draws: Draws, population: Population, world_size: int
) -> PrivacyPlan:
    """The plan with what the mechanism adds to it; refused if it is of other units, or for another account."""
    if plan.unit != population.unit:
        raise ParameterError(
            f"the plan protects each {plan.unit}, but batches would be drawn from {population.unit}s: pass group= if"
            " the plan is for owners, and only then"
        )
    if plan.accountant != draws.accountant:
        raise ParameterError(
            f"the plan was made by the accountant {plan.accountant!r}, but the engine has {draws.accountant!r}: use one"
            " for both"
        )
    if plan.sampling == "fixed_size" and plan.dataset_size != population.present:
        raise ParameterError(
            f"dataset_size={plan.dataset_size} but the dataset has {population.present} {plan.unit}s: with batches"
            " of a fixed size q = B/N is exact, and N is public; leave dataset_size out"
        )
    if plan.truncated_batch_size is not None and (world_size > 1 or population.present > plan.dataset_size):
        raise ParameterError(
            "truncated_batch_size is for one process: leave it out, or train with one"
            if world_size > 1
            else f"dataset_size={plan.dataset_size} but the dataset has {population.present} records: how often batches"
            " are cut depends on it, and the account is for at most dataset_size; leave it out"
        )
    return replace(
        plan,
        allocation=getattr(get_allocation(request.allocation), "name", type(request.allocation).__name__),
        gate=str(request.gating),
        seeded=draws.seed is not None,
        secure=draws.secure,
    )


def _hooked(
    request: Request,
    plan: PrivacyPlan,
    draws: Draws,
    world: World,
    population: Population,
    inner: nn.Module,
    graph: BoundGraph,
    records: tuple[Tensor, Tensor],
) -> StepHooks:
    """The loss checked, the loader and the criterion made, the optimiser hooked."""
    if request.piece is not None and is_sharded(inner):
        raise EngineError(
            "under fully_shard all processes take part in every pass, but with piece= some would read more pieces than"
            " others: leave it out, and cut batches with engine.microbatches"
        )
    x, targets = records
    loss = as_lipschitz(request.criterion, graph.output_shape)
    check_loss(loss, targets.to(graph.device), graph.output_shape)
    note_free_weights(graph)
    state, clock = request.gating.start(), Clock()
    step = StepInProgress(
        _gradients(inner, request.optimizer), grouped=request.group is not None, forgotten=state.forget
    )
    loader = BatchLoader(
        request.dataset,
        draws.sampler(plan, population.present),
        part=population.part,
        owners=population.owners,
        views=request.views,
        records=population.records,
        empty=[x[:1], targets[:1]],
        kind=_kind(graph),
        num_workers=request.num_workers,
        pin_memory=request.pin_memory,
        listener=step,
        clock=clock,
        passes=request.passes,
        piece=request.piece,
        rows=plan.truncated_batch_size,
    )
    private = PrivateCriterion(loss, graph, state, step)
    typical = _probed(original(inner), graph, min(float(private.constant()), float(state.bound)))
    run = StepHooks(
        request, plan, draws, world, inner=inner, graph=graph, criterion=private, gate=state, step=step, loader=loader,
        clock=clock,
    )  # fmt: skip
    try:
        run.account.open_for(run.module)
        _judge(run, request.optimizer, typical)
    except BaseException:  # a warning that is an error: the optimiser and the model stay as they were
        run.detach()
        raise
    return run


def _judge(run: StepHooks, optimizer: torch.optim.Optimizer, typical: dict[str, float]) -> None:
    """Warn where the run can hardly learn."""
    stds, parameters, plan = run.noise_stds(), dict(run.module.named_parameters()), run.plan
    run.signals = signals(stds, typical, parameters, plan)
    moves = noise_moves(optimizer, stds, parameters, plan)
    run.advice = drowned(run.signals) or misfit(optimizer, moves, run.signals, plan.steps)
    if run.advice:
        warnings.warn(run.advice, CannotLearnWarning, stacklevel=outside())


def _kind(graph: BoundGraph) -> InputKind | None:
    """The inputs that the model takes; as they are where its parameters have several dtypes."""
    if graph.vocabulary is not None:
        return InputKind(torch.int64, graph.vocabulary)
    dtypes = {p.dtype for p in graph.model.parameters() if p.is_floating_point()}
    return InputKind(dtypes.pop()) if len(dtypes) == 1 else None


def _probed(model: nn.Module, graph: BoundGraph, start: float) -> dict[str, float]:
    """Norms of gradients over public inputs, before the hooks; none where processes hold parts of the model."""
    if is_sharded(model) or graph.vocabulary is not None or not start < math.inf:
        return {}
    return gradient_norms(model, public_inputs(graph.input_shape), start)


def _gradients(module: nn.Module, optimizer: torch.optim.Optimizer) -> Gradients:
    """How the sum of a step is formed: by the engine, or under `fully_shard` by the pass itself."""
    if is_sharded(module):
        return WatchedGradients(lambda: (p for group in optimizer.param_groups for p in group["params"]))
    return OwnGradients()
