"""What the processes of a world do in the tests; each function also runs in one process."""

import kit
import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset, DistributedSampler, Subset, TensorDataset

from lipdp import losses
from lipdp import nn as lnn
from lipdp.distributed.collectives import Alone, current_world
from lipdp.privacy.gate import QuantileGate

N, B = 300, 24


def records(dtype=torch.float64, count=N):
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(count, 6, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randint(3, (count,), generator=generator)


def network(dtype=torch.float64, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return torch.nn.Sequential(
            lnn.InputBound(2.0), lnn.SpectralLinear(6, 8), lnn.GroupSort2(), lnn.SpectralLinear(8, 3)
        ).to(dtype)


class Pairs(Dataset):
    """Not a TensorDataset: read record by record."""

    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return self.x[index], self.y[index]


def private(*, dtype=torch.float64, parts=None, ddp=False, mapped=False, differ=False, **options):
    """(engine, model, optimizer, loader, criterion); `parts` are the sizes of the ranks' parts."""
    world = current_world()
    x, y = records(dtype)
    if parts is not None:
        start = sum(parts[: world.rank])
        x, y = x[start : start + parts[world.rank]], y[start : start + parts[world.rank]]
    model = network(dtype, seed=world.rank if differ else 0)
    return offered(
        DistributedDataParallel(model) if ddp else model, x, y, kind=Pairs if mapped else TensorDataset,
        own_records=parts is not None, **{"seed": 0, "steps": 20, **options},
    )  # fmt: skip


def offered(model, x, y, *, kind=TensorDataset, **options):
    """A model that the engine may refuse."""
    defaults = {"criterion": losses.TauCrossEntropy(4.0), "expected_batch_size": B, "steps": 2}
    return kit.private(model, kind(x, y), **{"lr": 0.3, "momentum": 0.9, "seed": None, **defaults, **options})


def loop(engine, model, optimizer, loader, criterion, *, size=10, skip_empty=True, steps=None):
    """The ordinary loop, in micro-batches; the numbers of rows seen."""
    seen = []
    for x, y in loader:
        optimizer.zero_grad()
        for xb, yb in engine.microbatches(x, y, size):
            if len(xb) or not skip_empty:
                criterion(model(xb), yb).backward()
        optimizer.step()
        seen.append(len(x))
        if steps is not None and len(seen) == steps:
            break
    return seen


def weights(model):
    model = model.module if isinstance(model, DistributedDataParallel) else model
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def train(*, skip_empty=True, **options):
    """Weights, rows seen at every step, ε, and the gate's bound."""
    parts = private(**options)
    seen = loop(*parts, skip_empty=skip_empty)
    engine = parts[0]
    return weights(parts[1]), seen, engine.get_epsilon(1e-5), float(engine.state_dict()["gate"]["bound"])


def train_with_quantile():
    return train(gate=QuantileGate(0.5, count_std=3.0), steps=8)


def half(taken, state=None, **options):
    """Some steps, after a state; what a checkpoint holds."""
    parts = private(**options)
    engine, model, optimizer, _, _ = parts
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        engine.load_state_dict(state["engine"])
    loop(*parts, steps=taken)
    return {
        "model": weights(model),
        "optimizer": optimizer.state_dict(),
        "engine": engine.state_dict(),
        "epsilon": engine.get_epsilon(1e-5),
    }


ONE_STEP = {"lr": 1.0, "expected_batch_size": 4, "steps": 1}


def blank(width):
    return torch.zeros(8, width, dtype=torch.float64), torch.zeros(8, dtype=torch.int64)


def released_noise(*, sigma, width=150_000):
    """What one step releases of a batch without gradient: noise on the *sum*, and the s it should have."""
    world = current_world()
    model = torch.nn.Sequential(lnn.InputBound(1.0), lnn.SpectralLinear(width, 2, bias=False)).double()
    engine, _, optimizer, loader, criterion = offered(model, *blank(width), **ONE_STEP, noise_multiplier=sigma)
    std = engine.noise_stds()["1.weight"]
    x, y = next(iter(loader))
    optimizer.zero_grad()
    released = []
    optimizer.register_step_pre_hook(lambda o, a, k: released.append(model[1].weight.grad * 4))
    if len(x):
        criterion(model(x), y).backward()
    optimizer.step()
    return released[0].flatten(), std, world.rank


def worst_move(sigma=1e-9):
    """By how much the released sum moves, over Δ, when one record joins another process's batch."""
    x = torch.zeros(12, 4, dtype=torch.float64)
    x[:, 0] = 1.0
    moves = []
    for count in (11, 12):
        model = torch.nn.Sequential(lnn.InputBound(1.0), lnn.SpectralLinear(4, 2, bias=False)).double()
        with torch.no_grad():
            model[1].weight.zero_()[1, 0] = -1.0
        engine, _, optimizer, loader, criterion = offered(
            model, x[:count], torch.ones(count, dtype=torch.int64), lr=1e-30, seed=1, expected_batch_size=12,
            dataset_size=12, steps=1, noise_multiplier=sigma, criterion=losses.TauCrossEntropy(50.0),
        )  # fmt: skip
        delta = engine.sensitivity()["1.weight"]
        for xb, yb in loader:
            optimizer.zero_grad()
            if len(xb):
                criterion(model(xb), yb).backward()
            optimizer.step()
        moves.append(model[1].weight.grad * 12)
    return float(torch.linalg.vector_norm(moves[1] - moves[0])), delta


def refused_by_one(rank):
    """One process's records are of another shape; all refuse."""
    world = current_world()
    x, y = records()
    if world.rank == rank:
        x = x[:, :5]
    offered(network(), x, y)


def facts_differ():
    private(noise_multiplier=1.0 + current_world().rank)


def lengths_differ():
    offered(network(), *records(count=N - current_world().rank))


def criterion_forgotten_by(rank):
    """One process trains with a loss of its own."""
    world = current_world()
    _, model, optimizer, loader, criterion = private(expected_batch_size=100, steps=2)
    for x, y in loader:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x), y) if world.rank == rank else criterion(model(x), y)
        loss.backward()
        optimizer.step()


def not_a_number_in(rank):
    world = current_world()
    _, model, optimizer, loader, criterion = private(expected_batch_size=100, steps=2)
    for x, y in loader:
        optimizer.zero_grad()
        if world.rank == rank:
            x.mul_(float("nan"))
        criterion(model(x), y).backward()
        optimizer.step()


def made_before_the_group():
    """As where make_private runs before the launch."""
    _, *made = offered(network(), *records(), world=Alone(), expected_batch_size=100)
    kit.train(*made)


def spread(*, dtype=torch.float64, **options):
    """The same run under `fully_shard`: whole weights, ε, Δ."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    world = current_world()
    model = network(dtype)
    mesh = init_device_mesh("cpu", (world.size,))
    for layer in (model[1], model[3]):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    made = offered(model, *records(dtype), **{"seed": 0, "steps": 20, "gate": 0.8, **options})
    loop(*made, skip_empty=False)
    engine = made[0]
    whole = {name: value.full_tensor().clone() for name, value in model.state_dict().items()}
    return whole, engine.get_epsilon(1e-5), dict(engine.sensitivity())


def spread_noise(*, sigma, width=40_000):
    """What one step on shards releases of a batch without gradient, gathered, and the s it should have."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = torch.nn.Sequential(lnn.InputBound(1.0), lnn.SpectralLinear(width, 5, bias=False)).double()
    fully_shard(model, mesh=init_device_mesh("cpu", (current_world().size,)))
    engine, _, optimizer, loader, criterion = offered(model, *blank(width), **ONE_STEP, noise_multiplier=sigma)
    std = engine.noise_stds()["1.weight"]
    x, y = next(iter(loader))
    released = []
    optimizer.register_step_pre_hook(lambda o, a, k: released.append(model[1].weight.grad.full_tensor() * 4))
    criterion(model(x), y).backward()
    optimizer.step()
    return released[0], std


def sum_in_half_precision():
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model = network(torch.float32)
    fully_shard(model, mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.bfloat16))
    offered(model, *records(torch.float32))


def records_in_another_order():
    """Each process has shuffled its copy by itself."""
    x, y = records()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(current_world().rank))
    offered(network(), x[order], y[order])


def restored_by(rank):
    """One process goes on from a state of another run; the others begin."""
    engine, model, optimizer, loader, criterion = private(seed=None, steps=4)
    if current_world().rank == rank:
        alone, *_ = offered(network(), *records(), world=Alone(chosen=True), steps=4)
        engine.load_state_dict(alone.state_dict())
    loop(engine, model, optimizer, loader, criterion, steps=1)


def owners_differ():
    """Each process has numbered the owners by itself."""
    world = current_world()
    owners = torch.arange(N) // 10 if world.rank else torch.arange(N) % 30
    offered(network(), *records(), expected_batch_size=10, group=owners)


def whole_as_own():
    world = current_world()
    offered(network(), *records(), expected_batch_size=B * world.size, own_records=True)


def padded_parts():
    """DistributedSampler repeats a record where their number is odd."""
    world, whole = current_world(), TensorDataset(*records(count=N + 1))
    part = Subset(whole, list(DistributedSampler(whole, world.size, world.rank, shuffle=False)))
    offered(network(), part, None, kind=lambda x, y: x, own_records=True)


def spread_over_two_meshes():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard

    model = network()
    mesh = init_device_mesh("cpu", (current_world().size,))
    fully_shard(model[1], mesh=mesh)
    fully_shard(model[3], mesh=mesh, shard_placement_fn=lambda parameter: Shard(parameter.ndim - 1))
    offered(model, *records())


def tensor_parallel():
    """Every process would compute a slice of the layers on its own part of the batch: the gradients mix samples."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    model = network()
    mesh = init_device_mesh("cpu", (current_world().size,))
    parallelize_module(model, mesh, {"1": ColwiseParallel(), "3": RowwiseParallel()})
    offered(model, *records())
