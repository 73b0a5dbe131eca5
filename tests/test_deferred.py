"""Nothing waits for the device, and nothing is released before its check is read."""

from __future__ import annotations

import math
from functools import partial

import kit
import pytest
import torch
from small_convnet import config, conv_net, images, needs_cuda, private, weights
from torch.utils._python_dispatch import TorchDispatchMode

import lipdp
from lipdp.errors import EngineError, NonFiniteError
from lipdp.privacy.deferred import DeferredRead
from lipdp.privacy.gate import QuantileGate
from lipdp.training import Trainer, assembly

pytestmark = pytest.mark.usefixtures("one_thread", "unjudged")


# --- checks whose answer is read later --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gate", [None, QuantileGate(0.5, count_std=4.0)])
def test_a_deferred_run_computes_what_an_immediate_one_does(gate, dtype):
    ends = []
    for deferred in (False, True):
        _, model, optimizer, loader, criterion = private(conv_net(dtype=dtype), deferred=deferred, gate=gate)
        for x, y in loader:
            kit.step((x.to(dtype), y), model, optimizer, criterion)
        ends.append(weights(model))
    assert torch.equal(*ends)


def spoiled(kind, monkeypatch, **options):
    """A run whose second step was not to be taken."""
    engine, model, optimizer, loader, criterion = private(deferred=True, **options)
    batches = iter(loader)
    kit.step(next(batches), model, optimizer, criterion)
    x, y = next(batches)
    if kind == "nan":
        x.mul_(math.nan)
    optimizer.zero_grad()
    criterion(model(x), y).backward()
    if kind == "impossible":  # the bound says that there is no gradient, so there is no noise either
        sweep = engine._hooks.graph.sweep
        none = {"1.weight": torch.zeros((), dtype=torch.float64)}

        def blind(start):
            found = sweep(start)
            object.__setattr__(found, "parameters", {**found.parameters, **none})
            return found

        monkeypatch.setattr(engine._hooks.graph, "sweep", blind)
    optimizer.step()
    return engine, model, optimizer, batches, criterion


KINDS = {
    "nan": (NonFiniteError, r"step 2: NaN .* 1\.weight"),
    "impossible": (EngineError, r"step 2: the gradient of 1\.weight is longer"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_that_was_not_to_be_taken_leaves_nothing_of_the_records(kind, monkeypatch):
    error, message = KINDS[kind]
    engine, model, optimizer, batches, criterion = spoiled(kind, monkeypatch)
    assert all(bool(p.isnan().all()) for p in model.parameters())  # whoever saves them now saves nothing
    assert engine.steps_taken == 2  # and the step is counted
    before = weights(model)
    with pytest.raises(error, match=message + r"(.|\n)*lost.*checkpoint of step 1 or before"):
        kit.step(next(batches), model, optimizer, criterion)
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
    x.mul_(math.nan)
    criterion(model(x), y).backward()
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
        kit.step(next(batches), model, optimizer, criterion)
    third = next(batches)
    engine.settle()
    with HostReads() as reads:
        kit.step(third, model, optimizer, criterion)
    return len(reads.found)


@pytest.mark.parametrize(
    ("gate", "allocation"),
    [(None, "per_layer"), (0.3, "global"), (QuantileGate(0.5, count_std=4.0), "min_variance"),
     *(pytest.param(gate, allocation, marks=pytest.mark.slow)
       for gate, allocation in ((None, "global"), (None, "min_variance"), (0.3, "per_layer"), (0.3, "min_variance"),
                                (QuantileGate(0.5, count_std=4.0), "per_layer"),
                                (QuantileGate(0.5, count_std=4.0), "global")))],
)  # fmt: skip
def test_a_step_reads_nothing_of_the_device(gate, allocation):
    assert reads_of_a_step(deferred=True, gate=gate, allocation=allocation) == 0
    assert reads_of_a_step(deferred=False, gate=gate, allocation=allocation) == 1


def test_only_the_look_at_a_few_records_reads():
    assert reads_of_a_step(deferred=True, check_every=2) == 1


@pytest.mark.parametrize("options", [{}, {"gate_quantile": 0.5}, {"optimizer": "adam"}, {"microbatch": 100}])
def test_a_step_of_the_trainer_reads_only_the_answers_of_the_last_one(options, monkeypatch):
    monkeypatch.setattr(assembly, "PrivacyEngine", partial(lipdp.PrivacyEngine, deferred=True))
    trainer = Trainer(config(steps=5, check_every=0, **options))
    trainer.model.train()
    batches = iter(trainer.loader)
    for _ in range(2):
        trainer._take_step(next(batches))
    third = iter(list(next(batches)))  # read before: the loader looks at what it reads
    trainer.engine.settle()
    shown = []
    monkeypatch.setattr(
        DeferredRead, "read", lambda self: shown.append(self) or torch.zeros(self._value.shape, dtype=bool) == 0
    )
    with HostReads() as reads:
        trainer._take_step(third)
    counters = len(list(trainer.model.parameters())) if "optimizer" in options else 0  # Adam's are on the host
    assert len(shown) == 1  # the loss that the monitor is shown, of the step before
    assert len(reads.found) == 1 + counters


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
        kit.step(next(batches), model, optimizer, criterion)
    batch = next(batches)
    torch.cuda.set_sync_debug_mode("error")
    try:
        kit.step(batch, model, optimizer, criterion)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@needs_cuda
def test_a_bad_step_on_cuda_is_found_at_the_next():
    model = conv_net().cuda()
    _, model, optimizer, loader, criterion = private(model, dataset=images(device="cuda"))
    batches = iter(loader)
    x, y = next(batches)
    x[0] = math.nan
    kit.step((x, y), model, optimizer, criterion)
    assert bool(weights(model).isnan().all())
    with pytest.raises(NonFiniteError, match="step 1"):
        kit.step(next(batches), model, optimizer, criterion)
