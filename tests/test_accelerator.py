"""One accelerator used well: nothing waits for the device, nothing is released before its check is read."""

from __future__ import annotations

import json
import math
import time

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import TensorDataset

import lipdp
from lipdp import losses
from lipdp import nn as lnn
from lipdp.errors import EngineError, NonFiniteError
from lipdp.privacy.gate import QuantileGate
from lipdp.timing import UNTIMED
from lipdp.training import Monitor, Trainer, configure
from lipdp.training.profile import PARTS, PartsTimer, StepProfile

pytestmark = pytest.mark.usefixtures("one_thread")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def images(n=128, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(n, 1, 8, 8, generator=generator)
    return TensorDataset(x.to(device), torch.randint(10, (n,), generator=generator).to(device))


def conv_net(**options):
    torch.manual_seed(0)
    return nn.Sequential(
        lnn.InputBound(4.0),
        lnn.SpectralConv2d(1, 8, 3, padding=1, **options),
        lnn.GroupSort2(),
        lnn.ScaledL2NormPool2d(2),
        nn.Flatten(),
        lnn.SpectralLinear(8 * 16, 10, **options),
    )


def private(model=None, *, dataset=None, deferred=None, seed=0, check_every=0, lr=0.5, **options):
    model = conv_net() if model is None else model
    engine = lipdp.PrivacyEngine("rdp", seed=seed, check_every=check_every, deferred=deferred)
    defaults = {
        "expected_batch_size": 32,
        "steps": 5,
        "noise_multiplier": 1.0,
        "criterion": losses.TauCrossEntropy(8.0),
    }
    made = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9),
        dataset=dataset or images(),
        **{**defaults, **options},
    )
    return engine, *made


def take(batch, model, optimizer, criterion):
    x, y = batch
    optimizer.zero_grad()
    criterion(model(x), y).backward()
    optimizer.step()


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


# --- checks whose answer is read later --------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", [None, QuantileGate(0.5, count_std=4.0)])
def test_a_deferred_run_computes_what_an_immediate_one_does(gate):
    ends = []
    for deferred in (False, True):
        _, model, optimizer, loader, criterion = private(deferred=deferred, gate=gate)
        for batch in loader:
            take(batch, model, optimizer, criterion)
        ends.append(weights(model))
    assert torch.equal(*ends)


def spoiled(kind, monkeypatch, **options):
    """A run whose second step was not to be taken."""
    engine, model, optimizer, loader, criterion = private(deferred=True, **options)
    batches = iter(loader)
    take(next(batches), model, optimizer, criterion)
    x, y = next(batches)
    optimizer.zero_grad()
    criterion(model(x), y).backward()
    if kind == "nan":
        model[1].weight.grad[0] = math.nan
    else:  # the bound says that there is no gradient, so there is no noise either
        sweep = engine._run.graph.sweep
        none = {"1.weight": torch.zeros((), dtype=torch.float64)}

        def blind(start):
            found = sweep(start)
            object.__setattr__(found, "parameters", {**found.parameters, **none})
            return found

        monkeypatch.setattr(engine._run.graph, "sweep", blind)
    optimizer.step()
    return engine, model, optimizer, batches, criterion


KINDS = {"nan": (NonFiniteError, r"step 2: NaN .* 1\.weight"), "impossible": (EngineError, r"step 2: 1\.weight has a")}


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_that_was_not_to_be_taken_leaves_nothing_of_the_records(kind, monkeypatch):
    error, message = KINDS[kind]
    engine, model, optimizer, batches, criterion = spoiled(kind, monkeypatch)
    assert all(bool(p.isnan().all()) for p in model.parameters())  # whoever saves them now saves nothing
    assert engine.steps_taken == 2  # and the step is counted
    before = weights(model)
    with pytest.raises(error, match=message + r"(.|\n)*lost.*checkpoint of step 1 or before"):
        take(next(batches), model, optimizer, criterion)
    assert engine.steps_taken == 2
    assert torch.equal(before.isnan(), weights(model).isnan())


@pytest.mark.parametrize("verb", ["state_dict", "settle", "sensitivity", "detach"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_answer_is_read_before_anything_is_saved_or_shown(verb, kind, monkeypatch):
    error, message = KINDS[kind]
    engine, *_ = spoiled(kind, monkeypatch)
    with pytest.raises(error, match=message):
        getattr(engine, verb)()


def test_the_last_step_is_settled_at_once(monkeypatch):
    with pytest.raises(NonFiniteError, match="step 2"):
        spoiled("nan", monkeypatch, steps=2)


def test_at_once_nothing_is_changed(monkeypatch):
    engine, model, optimizer, loader, criterion = private(deferred=False)
    x, y = next(iter(loader))
    criterion(model(x), y).backward()
    model[1].weight.grad[0] = math.nan
    before = weights(model)
    with pytest.raises(NonFiniteError, match=r"step 1: .*nothing was released or changed"):
        optimizer.step()
    assert engine.steps_taken == 0
    assert torch.equal(before, weights(model))


# --- nothing waits for the device -------------------------------------------------------------------------------------


class HostReads(TorchDispatchMode):
    """Counts operations that give the host a number of a tensor."""

    READS = (
        torch.ops.aten._local_scalar_dense,
        torch.ops.aten.is_nonzero,
        torch.ops.aten.equal,
        torch.ops.aten.nonzero,
    )

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in self.READS:
            self.found.append(str(function))
        return function(*args, **(kwargs or {}))


def reads_of_a_step(*, deferred, **options):
    """Host reads in a step after its batch was drawn, and after the answers of the last one were read."""
    engine, model, optimizer, loader, criterion = private(deferred=deferred, **options)
    batches = iter(loader)
    for _ in range(2):
        take(next(batches), model, optimizer, criterion)
    third = next(batches)
    engine.settle()
    with HostReads() as reads:
        take(third, model, optimizer, criterion)
    return len(reads.found)


@pytest.mark.parametrize("allocation", ["per_layer", "global", "min_variance"])
@pytest.mark.parametrize("gate", [None, 0.3, QuantileGate(0.5, count_std=4.0)])
def test_a_step_reads_nothing_of_the_device(gate, allocation):
    assert reads_of_a_step(deferred=True, gate=gate, allocation=allocation) == 0
    assert reads_of_a_step(deferred=False, gate=gate, allocation=allocation) == 1


def test_only_the_look_at_a_few_records_reads():
    assert reads_of_a_step(deferred=True, check_every=2) == 1


def test_the_count_of_reads_counts():
    with HostReads() as reads:
        tensor = torch.ones(2)
        bool(tensor.all())
        float(tensor.sum())
        tensor.sum().item()
    assert len(reads.found) == 3


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("gate", [None, 0.3, QuantileGate(0.5, count_std=4.0)])
def test_a_step_on_cuda_does_not_synchronise(gate):
    _, model, optimizer, loader, criterion = private(conv_net().cuda(), dataset=images(device="cuda"), gate=gate)
    batches = iter(loader)
    for _ in range(2):
        take(next(batches), model, optimizer, criterion)
    batch = next(batches)
    torch.cuda.set_sync_debug_mode("error")
    try:
        take(batch, model, optimizer, criterion)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@needs_cuda
def test_a_bad_step_on_cuda_is_found_at_the_next():
    model = conv_net().cuda()
    _, model, optimizer, loader, criterion = private(model, dataset=images(device="cuda"))
    batches = iter(loader)
    x, y = next(batches)
    criterion(model(x), y).backward()
    model[1].weight.grad[0] = math.nan
    optimizer.step()
    assert bool(weights(model).isnan().all())
    with pytest.raises(NonFiniteError, match="step 1"):
        take(next(batches), model, optimizer, criterion)


# --- where a step's time goes -----------------------------------------------------------------------------------------


def config(**given):
    defaults = {"model": "cnn", "steps": 12, "noise_multiplier": 2.0, "seed": 0, "log_every": 12, "device": "cpu"}
    return configure(**{**defaults, **given})


def test_a_profile_does_not_change_what_is_computed(tmp_path):
    ends = []
    for name, profile in (("without", None), ("with", StepProfile(tmp_path / "with"))):
        trainer = Trainer(config(), out=tmp_path / name, profile=profile)
        trainer.run()
        ends.append((weights(trainer.model), trainer.ema.weights(), trainer.records[-1]["train_loss_not_private"]))
    assert torch.equal(ends[0][0], ends[1][0])
    assert all(torch.equal(ends[0][1][n], ends[1][1][n]) for n in ends[0][1])
    assert ends[0][2] == ends[1][2]
    table = json.loads((tmp_path / "with" / "profile.json").read_text())
    assert table["steps"] == [3, 9]
    assert list(table["parts"]) == list(PARTS)
    assert all(table["parts"][part]["seconds"] > 0 for part in PARTS)
    assert sum(part["seconds"] for part in table["parts"].values()) == pytest.approx(table["step_seconds"], rel=1e-9)
    assert sum(part["share"] for part in table["parts"].values()) == pytest.approx(1.0)
    trace = json.loads((tmp_path / "with" / "trace.json").read_text())
    names = [event.get("name") for event in trace["traceEvents"] if event.get("cat") == "user_annotation"]
    assert {f"lipdp: {part}" for part in PARTS if part != "other"} | {"lipdp: step"} <= set(names)
    assert names.count("lipdp: step") == 3
    assert not (tmp_path / "without" / "profile.json").exists()


def test_parts_within_parts_are_counted_once():
    timer = PartsTimer(torch.device("cpu"))
    for _ in range(2):
        with timer.step(), timer("optimiser"):
            time.sleep(0.002)
            with timer("noise"):
                time.sleep(0.02)
            time.sleep(0.002)
    for parts in timer.read():
        assert set(parts) == {"other", "optimiser", "noise"}
        assert parts["noise"] >= 0.02
        assert parts["optimiser"] >= 0.004


def test_an_error_in_a_traced_step_takes_the_profiler_down(tmp_path):
    profile = StepProfile(tmp_path)
    cpu = torch.device("cpu")
    for done in range(3):
        with profile.step(done, 5, cpu):
            pass
    with pytest.raises(KeyboardInterrupt), profile.step(3, 5, cpu):
        raise KeyboardInterrupt
    assert not torch.autograd._profiler_enabled()


def test_a_resumed_run_is_profiled_from_where_it_goes_on(tmp_path):
    class Stop(Monitor):
        def step(self, step, loss, epsilon):
            if step == 4:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Trainer(config(checkpoint_every=2, log_every=6), out=tmp_path / "run", monitor=Stop()).run()
    profile = StepProfile(tmp_path / "run")
    trainer = Trainer.resume(tmp_path / "run", profile=profile)
    trainer.run()
    whole = Trainer(config(checkpoint_every=2, log_every=6))
    whole.run()
    assert profile.table["steps"][0] == 5
    assert torch.equal(weights(trainer.model), weights(whole.model))


def test_nobody_times_by_default():
    assert UNTIMED("noise") is UNTIMED("bound")
