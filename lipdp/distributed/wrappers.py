"""What data-parallel wrappers do to gradients, and how the engine takes their sum over itself."""

from __future__ import annotations

from typing import Any

import numpy
import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from lipdp.accounting.plan import PrivacyPlan
from lipdp.bounds.probe import probe_input, untouched
from lipdp.distributed.collectives import World
from lipdp.errors import EngineError
from lipdp.nn.compiled import original
from lipdp.nn.sharded import is_dtensor, is_fully_sharded, is_sharded


def own_reduction(module: nn.Module, world: World) -> nn.Module:
    """The model inside a wrapper, whose reduction is switched off for good: the engine sums, once a step.

    Then a process with an empty batch need not run a backward pass, the number of micro-batches may differ, and no
    communication hook rounds or averages on the way.

    Raises:
        EngineError: `DataParallel`, which copies the model within one process; parameters sharded otherwise than by
            `fully_shard`; what `fully_shard` would round or leave out.
    """
    wrapper = original(module)  # torch.compile's is around DistributedDataParallel's
    if isinstance(wrapper, DataParallel):
        raise EngineError(
            "DataParallel runs copies of the model that the engine cannot bound; start one process per device with"
            " torchrun, and pass the model itself, or in DistributedDataParallel"
        )
    shards = [inner for inner in wrapper.modules() if is_fully_sharded(inner)]
    if shards:
        _sum_shards(wrapper, shards, world)
        return module
    if is_sharded(wrapper):
        raise EngineError(
            "the parameters are sharded by something else than fully_shard (tensor parallelism?): processes that"
            " compute slices of a layer need the same batch, and the engine gives each its own. Use fully_shard, or"
            " unsharded parameters"
        )
    if isinstance(wrapper, DistributedDataParallel):
        wrapper.require_backward_grad_sync = False
        return wrapper.module
    return module


def _sum_shards(module: nn.Module, shards: list[Any], world: World) -> None:
    """`fully_shard` reduces in every backward pass, which the engine cannot do instead: make it sum, not average."""
    for shard in shards:
        policy = getattr(shard._get_fsdp_state(), "_mp_policy", None)
        for dtype in (getattr(policy, "param_dtype", None), getattr(policy, "reduce_dtype", None)):
            if dtype is not None and dtype.itemsize < 4:
                raise EngineError(
                    f"fully_shard sums gradients in {dtype}: rounding moves the sum by more than one record can. Leave"
                    " the mixed-precision policy out, and run the forward pass under torch.autocast with"
                    f" make_private(forward_dtype={dtype})"
                )
        shard.set_gradient_divide_factor(1.0)
    sharded: list[Any] = [p for p in module.parameters() if is_dtensor(p)]
    meshes = {p.device_mesh.size() for p in sharded}
    if len({(p.device_mesh, p.placements) for p in sharded}) > 1:
        raise EngineError(
            "fully_shard shards parameters over different meshes, or along different dimensions. Processes that hold"
            " the same entries must draw the same noise, and here they differ from parameter to parameter. Use one mesh"
            " and one placement for all"
        )
    if meshes != {world.size}:
        raise EngineError(
            f"fully_shard shards parameters over {sorted(meshes)} of {world.size} processes: the gradients of the"
            " others would be missing from the sum. Use one mesh of all processes"
        )


@torch.no_grad()
def warm_up_shards(module: nn.Module, input_shape: tuple[int, ...]) -> None:
    """Run a model under `fully_shard` once: its first pass rearranges its hooks, which the engine then watches."""
    if is_sharded(module):
        with untouched(module):
            module(probe_input(module, input_shape))
        for inner in module.modules():
            if is_fully_sharded(inner):
                inner.reshard()  # type: ignore[operator]  # without a backward pass the outermost stays gathered


def plan_together(world: World, *, noise_multiplier: float | None, **given: Any) -> PrivacyPlan:
    """`PrivacyPlan.of`, where the first process alone looks for σ: other processors could round another way."""
    if noise_multiplier is None:
        found = 0.0
        with world.fail_together():
            if world.rank == 0:
                found = PrivacyPlan.of(**given).noise_multiplier
        noise_multiplier = world.broadcast(found)
    with world.fail_together():
        return PrivacyPlan.of(noise_multiplier=noise_multiplier, **given)


def check_alike(world: World, plan: PrivacyPlan, **others: Any) -> None:
    """Refuse processes that would not draw the same batches and noise."""
    own = {**plan.as_dict(), **others, "torch": str(torch.__version__), "numpy": numpy.__version__}
    for rank, other in enumerate(world.gather(own)):
        different = [
            f"{name} is {value!r} here, {other[name]!r} there" for name, value in own.items() if value != other[name]
        ]
        if different:
            raise EngineError(
                f"process {world.rank} and process {rank} would not train the same model: {'; '.join(different)}"
            )


@torch.no_grad()
def check_same_weights(world: World, model: nn.Module) -> None:
    """Refuse to go on where processes hold different weights.

    They start from the same, and add the same numbers; processors of different kinds round differently.
    """
    if world.size == 1:
        return
    own = [(float(p.double().sum()), float(p.double().square().sum())) for p in model.parameters()]
    for rank, other in enumerate(world.gather(own)):
        if other != own:
            raise EngineError(
                f"the weights of process {world.rank} differ from those of process {rank}. Run all processes on the"
                " same kind of processor with the same libraries, and continue from the last checkpoint"
            )
