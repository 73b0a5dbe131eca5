"""One accelerator used well: nothing waits for the device, nothing is released before its check is read."""

from __future__ import annotations

import json
import math
import shutil
import sys
import time
from functools import partial

import kit
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import TensorDataset

import lipdp
from lipdp import constraints, losses
from lipdp import nn as lnn
from lipdp.cli import main
from lipdp.constraints import Orthogonal
from lipdp.errors import (
    BoundViolation,
    EngineError,
    NonFiniteError,
    ParameterError,
    UnknownNameError,
    UnsupportedLayerError,
)
from lipdp.nn.constrained import cannot_certify
from lipdp.privacy.deferred import DeferredRead
from lipdp.privacy.gate import QuantileGate
from lipdp.timing import UNTIMED
from lipdp.training import Trainer, assembly, configure
from lipdp.training.forward import Forward
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


private = partial(kit.private, net=conv_net, data=images, expected_batch_size=32, momentum=0.9, check_every=0)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


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


@pytest.mark.parametrize("allocation", ["per_layer", "global", "min_variance"])
@pytest.mark.parametrize("gate", [None, 0.3, QuantileGate(0.5, count_std=4.0)])
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
        trainer._take_step(*next(batches))
    third = next(batches)
    trainer.engine.settle()
    shown = []
    monkeypatch.setattr(
        DeferredRead, "read", lambda self: shown.append(self) or torch.zeros(self._value.shape, dtype=bool) == 0
    )
    with HostReads() as reads:
        trainer._take_step(*third)
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


# --- where a step's time goes -----------------------------------------------------------------------------------------


def config(**given):
    small = {"model": "cnn", "model_options": {"width": 8}, "steps": 12, "noise_multiplier": 2.0, "seed": 0}
    return configure(**{**small, "log_every": 12, "device": "cpu", **given})


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
    assert all(part["processor_seconds"] >= 0 for part in table["parts"].values())
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
    with pytest.raises(KeyboardInterrupt):
        Trainer(
            config(checkpoint_every=2, log_every=6), out=tmp_path / "run", monitor=kit.Raises(4, KeyboardInterrupt())
        ).run()
    profile = StepProfile(tmp_path / "run")
    trainer = Trainer.resume(tmp_path / "run", profile=profile)
    trainer.run()
    whole = Trainer(config(checkpoint_every=2, log_every=6))
    whole.run()
    assert profile.table["steps"][0] == 5
    assert torch.equal(weights(trainer.model), weights(whole.model))


def test_nobody_times_by_default():
    assert UNTIMED("noise") is UNTIMED("bound")


# --- compiled ---------------------------------------------------------------------------------------------------------


torchs_own_warnings = pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning", "ignore:The .grad attribute of a Tensor:UserWarning"
)


def compiled(model, how):
    if how == "wrapped":
        return torch.compile(model, backend="aot_eager")
    if how == "in place":
        model.compile(backend="eager")
    return model


@pytest.fixture(autouse=True)
def _forget_what_was_compiled():
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@torchs_own_warnings
@pytest.mark.parametrize("how", ["wrapped", "in place"])
def test_a_users_compiled_module_trains_like_the_module(how):
    ends, bounds = [], []
    for kind in ("as written", how):
        model = conv_net()
        engine, trained, optimizer, loader, criterion = private(compiled(model, kind), check_every=2, steps=3)
        bounds.append(dict(engine.sensitivity()))
        for batch in loader:
            kit.step(batch, trained, optimizer, criterion)
        ends.append(weights(model))
    assert bounds[0] == bounds[1]
    assert list(bounds[1]) == ["1.weight", "5.weight"]
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-6)


@torchs_own_warnings
def test_a_compiled_model_that_changes_is_refused():
    model = conv_net()
    _, trained, optimizer, loader, criterion = private(compiled(model, "wrapped"), seed=1)
    batches = iter(loader)
    kit.step(next(batches), trained, optimizer, criterion)
    model[1].scale *= 2
    with pytest.raises(EngineError, match="scale was"):
        kit.step(next(batches), trained, optimizer, criterion)
    model[1].scale /= 2
    trained.register_forward_hook(lambda module, inputs, output: 2 * output)
    with pytest.raises(EngineError, match="has changed since make_private"):
        optimizer.step()
    with pytest.raises(UnsupportedLayerError, match="hooks"):
        lipdp.sensitivity(trained, losses.TauCrossEntropy(), (1, 8, 8))


def test_parts_are_compiled_in_place_or_refused():
    inner = torch.compile(lnn.SpectralLinear(16, 4), backend="aot_eager")
    model = nn.Sequential(lnn.InputBound(1.0), nn.Flatten(), inner)
    with pytest.raises(UnsupportedLayerError, match="compile the whole model"):
        lipdp.sensitivity(model, losses.TauCrossEntropy(), (1, 4, 4))
    model = nn.Sequential(lnn.InputBound(1.0), nn.Flatten(), inner._orig_mod)
    model[2].compile(backend="aot_eager")
    assert lipdp.sensitivity(model, losses.TauCrossEntropy(), (1, 4, 4)).total > 0
    assert model[2]._compiled_call_impl is not None


def test_a_module_that_only_looks_compiled_is_bounded_as_it_is():
    class Loud(nn.Module):
        def __init__(self):
            super().__init__()
            self._orig_mod = nn.Sequential(lnn.InputBound(1.0), lnn.SpectralLinear(4, 4))

        def forward(self, x):
            return self._orig_mod(x) * 3.0

    assert lipdp.lipschitz_constant(Loud(), (4,)) >= 3.0


@torchs_own_warnings
def test_poisson_batches_do_not_compile_anew():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    model = conv_net()
    forward = Forward(model, compiled=True, backend=backend)
    for size in (29, 41, 2, 30, 17, 1, 64, 3):
        x = torch.rand(size, 1, 8, 8)
        torch.testing.assert_close(forward(x), model(x))
    assert 1 <= len(graphs) <= 2  # small batches may have kernels of their own


def tight():
    """A layer and records whose gradients are as long as their bound, but for rounding."""
    torch.manual_seed(0)
    x = 10 * torch.randn(16, 20)  # the input bound brings them to norm 1; behind a loss times 1000 the gate is at work
    return nn.Sequential(lnn.InputBound(1.0), lnn.SpectralLinear(20, 5)), TensorDataset(x, torch.arange(16) % 5)


class Steep(losses.TauCrossEntropy):
    """Longer cotangents than it says, so that the gate decides."""

    def forward(self, logits, target):
        return 1000.0 * super().forward(logits, target)


def longest_gradient(forward, model, criterion, dataset):
    """Over the records, each beside a copy."""
    norms = []
    for x, y in dataset:
        (gradient,) = torch.autograd.grad(
            criterion(forward(torch.stack([x, x])), torch.stack([y, y])), list(model.parameters())
        )
        norms.append(float(gradient.double().norm()) / 2)
    return max(norms)


@torchs_own_warnings
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("how", [False, True])
def test_bounds_hold_for_compiled_code_and_in_bf16(how, autocast):
    model, dataset = tight()
    forward = Forward(model, compiled=how, autocast=autocast, backend="aot_eager")
    options = {"dataset": dataset, "expected_batch_size": 8, "forward_dtype": autocast, "criterion": Steep(8.0)}
    engine, *_, criterion = private(forward.module, **options)
    longest, bound = longest_gradient(forward, model, criterion, dataset), engine.sensitivity()["1.weight"]
    exact = 2**0.5
    if autocast is None:
        assert 0.96 * bound < longest <= bound  # 5 % less would be no bound
    else:
        assert exact * (1 + 1e-3) < longest <= bound  # nor would one that allows for no rounding


@torchs_own_warnings
def test_a_compiler_that_computes_another_function_is_found():
    def wrong(graph, inputs):
        return lambda *args: tuple(1.5 * value for value in graph(*args))

    model, dataset = tight()
    forward = Forward(model, compiled=True, backend=wrong)
    options = {"dataset": dataset, "expected_batch_size": 8, "check_every": 1}
    _, trained, optimizer, loader, criterion = private(forward.module, **options)
    x, y = next(iter(loader))
    criterion(trained(x), y).backward()
    with pytest.raises(BoundViolation, match=r"1\.weight"):
        optimizer.step()


@torchs_own_warnings
def test_where_nothing_can_be_compiled_the_reason_is_given():
    def broken(graph, inputs):
        raise RuntimeError("no compiler here")

    with pytest.raises(ParameterError, match=r"(?s)no compiler here.*leave --compile out"):
        Forward(conv_net(), compiled=True, backend=broken)(torch.rand(4, 1, 8, 8))


@torchs_own_warnings
def test_a_compiled_run_is_checkpointed_under_the_models_names(tmp_path, monkeypatch):
    monkeypatch.setattr(Forward.__init__, "__kwdefaults__", {**Forward.__init__.__kwdefaults__, "backend": "aot_eager"})
    ends = []
    for name, compile in (("eager", False), ("compiled", True)):
        trainer = Trainer(config(compile=compile, steps=3, check_every=2), out=tmp_path / name)
        trainer.run()
        ends.append(torch.load(tmp_path / name / "checkpoint.pt", weights_only=True))
    assert list(ends[1]["model"]) == list(ends[0]["model"])
    assert "_orig_mod" not in str([list(part) for part in (ends[1]["model"], ends[1]["ema"])])
    for name, value in ends[0]["model"].items():
        torch.testing.assert_close(ends[1]["model"][name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="inductor needs g++")
@pytest.mark.filterwarnings("ignore")  # inductor's own
def test_inductor_trains_like_eager():
    ends = []
    for compile in (False, True):
        model = conv_net()
        forward = Forward(model, compiled=compile)
        _, _, optimizer, loader, criterion = private(forward.module, check_every=2, steps=4)
        for batch in loader:
            kit.step(batch, forward, optimizer, criterion)
        ends.append(weights(model))
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-5)
    model, dataset = tight()
    forward = Forward(model, compiled=True)
    engine, *_, criterion = private(forward.module, dataset=dataset, expected_batch_size=8)
    longest, bound = longest_gradient(forward, model, criterion, dataset), engine.sensitivity()["1.weight"]
    assert 0.96 * bound < longest <= bound


# --- memory format and precision --------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["cnn", "vgg", "resnet", "mixer"])
def test_channels_last_computes_the_same(model):
    options = {"width": 8} if model != "mixer" else {}
    ends = []
    for last in (False, True):
        trainer = Trainer(config(model=model, model_options=options, steps=3, channels_last=last))
        trainer.run()
        ends.append(weights(trainer.model))
        filters = [p for p in trainer.model.parameters() if p.dim() == 4 and min(p.shape[1:]) > 1]
        assert all(p.is_contiguous(memory_format=torch.channels_last) == last for p in filters)
        layers = [m for m in trainer.model.modules() if isinstance(m, lnn.Constrained)]
        assert all(m.constraint.contains(m.weight_matrix()) for m in layers)
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-5)


def test_autocast_enlarges_the_bound_and_leaves_the_account(tmp_path):
    plain, low = (Trainer(config(autocast=name, steps=3)) for name in (None, "bf16"))
    assert low.planned.epsilon == plain.planned.epsilon
    before, after = plain.engine.sensitivity(), low.engine.sensitivity()
    assert all(after[name] > before[name] for name in before)
    low.run()
    assert low.engine.steps_taken == 3


def test_runtime_settings_may_change_at_a_resume(tmp_path):
    given = config(checkpoint_every=2, log_every=6, autocast="bf16", channels_last=True)
    with pytest.raises(KeyboardInterrupt):
        Trainer(given, out=tmp_path, monitor=kit.Raises(4, KeyboardInterrupt())).run()
    trainer = Trainer.resume(tmp_path, autocast="off", channels_last=False)
    assert trainer.forward.autocast is None
    trainer.run()
    assert trainer.engine.get_epsilon(trainer.delta) == pytest.approx(trainer.planned.epsilon)


def test_an_unknown_precision_is_refused(capsys):
    with pytest.raises(UnknownNameError, match="bf16, off"):
        configure(autocast="fp8")
    assert main(["train", "--autocast", "fp8", "--steps", "1"]) == 2
    assert "bf16, off" in capsys.readouterr().err


# --- projection -------------------------------------------------------------------------------------------------------


def moved(model, size=0.05):
    """The model after a step: weights near their constraints."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(size * torch.randn(p.shape, generator=generator))
    return model


def zoo(name):
    torch.manual_seed(0)
    return lipdp.models.build(name, input_shape=(3, 16, 16), num_classes=10)


@pytest.mark.parametrize("name", ["mixer", "resnet", "cnn", "mlp"])
def test_layers_of_one_shape_are_projected_together(name, monkeypatch):
    one_by_one, together, default = (moved(zoo(name)) for _ in range(3))
    lnn.project_(one_by_one, batched=False)
    with monkeypatch.context() as patched:
        patched.setattr("lipdp.nn.constrained._STACK", 3 * 64 * 64)  # a stack in several parts
        lnn.project_(together, batched=True)
    lnn.project_(default)
    for other in (together, default):
        torch.testing.assert_close(weights(one_by_one), weights(other), rtol=0, atol=2e-6)


def test_what_projects_itself_and_what_is_frozen_goes_alone():
    class Own(lnn.SpectralLinear):
        def project_(self):
            self.weight.data.fill_(0.5)

    model = moved(nn.Sequential(*(lnn.SpectralLinear(8, 8, bias=True) for _ in range(3)), Own(8, 8)), size=2.0)
    model[1].weight.requires_grad_(False)
    frozen = model[1].weight.clone()
    lnn.project_(model, batched=True)
    assert torch.equal(model[1].weight, frozen)
    assert bool((model[3].weight == 0.5).all())
    assert all(layer.constraint.contains(layer.weight) for layer in (model[0], model[2]))
    assert all(float(layer.bias.detach().norm()) <= 1 + 1e-6 for layer in model[:3])


SHAPES = [(16, 27), (64, 576), (96, 96), (10, 2048), (40, 7)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [1e-4, 1e-2, 0.3, 2.0, None])
def test_iterations_in_bfloat16_end_certified(shape, size, monkeypatch):
    """As on a GPU: whatever the low precision did, the norm of what comes out is at most 1, by `cannot_certify`."""
    monkeypatch.setattr(constraints, "_low_precision", lambda matrix: torch.bfloat16)
    generator = torch.Generator().manual_seed(2)
    orthogonal = Orthogonal()
    start = orthogonal.sample(3, *shape, generator=generator)
    noise = torch.randn(3, *shape, generator=generator) / max(shape) ** 0.5
    matrix = noise if size is None else start + size * noise
    out = orthogonal.retract(matrix)
    assert not bool(cannot_certify(out, 1.0))
    assert bool(cannot_certify(out * (1 + 1e-5), 1.0))  # it could have been seen
    exact = orthogonal.project(matrix)
    if float(torch.linalg.cond(matrix).max()) < 20:  # the rest rises to 1 over several steps
        assert orthogonal.contains(out)
        assert (out - exact).norm() <= 0.01 * (exact - matrix).norm() + 1e-6 * exact.norm()
    if size is None or size >= 0.3:  # it is the finish that does it
        monkeypatch.setattr(constraints, "_FINISH", ())
        assert not orthogonal.contains(orthogonal.retract(matrix), tolerance=1e-6)


def test_a_matrix_without_full_rank_comes_out_within_the_norm(monkeypatch):
    monkeypatch.setattr(constraints, "_low_precision", lambda matrix: torch.bfloat16)
    matrix = torch.zeros(2, 8, 12)
    matrix[0, 0, 0], matrix[0, 1, 1] = 5.0, 1e-3
    out = Orthogonal().retract(matrix)
    assert not bool(cannot_certify(out, 1.0))
    assert out[0, 0, 0] == pytest.approx(1.0, abs=1e-5)
    assert bool((out[1] == 0).all())
    assert bool(Orthogonal().retract(matrix * math.nan).isnan().any())


def test_a_run_with_bfloat16_projections_is_certified_at_every_step(monkeypatch):
    monkeypatch.setattr(constraints, "_low_precision", lambda matrix: torch.bfloat16)
    engine, model, optimizer, loader, criterion = private(steps=12, lr=2.0)
    engine._hooks._projections.every = 1
    for batch in loader:
        kit.step(batch, model, optimizer, criterion)
    assert lipdp.lipschitz_constant(model, (1, 8, 8)) < 1 + 1e-3
    assert all(m.constraint.contains(m.weight_matrix()) for m in model.modules() if isinstance(m, lnn.Constrained))


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("name", ["mixer", "resnet"])
def test_projection_on_cuda_agrees_with_the_cpu(name):
    expected, model = moved(zoo(name)), moved(zoo(name)).cuda()
    before = weights(expected)
    lnn.project_(expected)
    torch.cuda.set_sync_debug_mode("error")
    try:
        lnn.project_(model)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    move = (weights(expected) - before).norm()
    assert (weights(model).cpu() - weights(expected)).norm() <= 0.01 * move
    assert not any(bool(a) for m in model.modules() if isinstance(m, lnn.Constrained) for a in m.uncertified().values())
