"""A compiled model trains like the model as written, and within its bounds."""

from __future__ import annotations

import shutil
import sys

import kit
import pytest
import torch
from small_convnet import config, conv_net, private, weights
from torch import nn
from torch.utils.data import TensorDataset

import lipdp
from lipdp import losses
from lipdp import nn as lnn
from lipdp.errors import BoundViolation, EngineError, ParameterError, UnsupportedLayerError
from lipdp.suggestion.joints import Joint
from lipdp.training import Trainer
from lipdp.training.forward import Forward

pytestmark = pytest.mark.usefixtures("one_thread")


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
        kit.train(trained, optimizer, loader, criterion)
        ends.append(weights(model))
    assert bounds[0] == bounds[1]
    assert list(bounds[1]) == ["1.weight", "5.weight"]
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-6)


@torchs_own_warnings
def test_what_is_chosen_for_a_compiled_model_is_placed_in_the_model():
    """Its names were not found; and code that was compiled before joints were placed must not run without them."""
    outputs, signals = [], []
    x = torch.randn(4, 20, generator=torch.Generator().manual_seed(1))
    for kind in ("as written", "wrapped"):
        torch.manual_seed(0)
        layers = [
            lnn.SpectralLinear(20, 16),
            lnn.GroupSort2(),
            lnn.SpectralLinear(16, 16),
            lnn.GroupSort2(),
            lnn.SpectralLinear(16, 5),
        ]
        model = compiled(nn.Sequential(lnn.InputBound(1.0), *layers), kind)
        model(x)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        joints = (Joint("3", clip=0.1, gate=0.1),)
        engine, trained, *rest = kit.private(model, optimizer=optimizer, criterion=None, joints=joints)
        outputs.append(trained(x).detach())
        signals.append(engine.signals)
        kit.train(trained, *rest, steps=2)
    torch.testing.assert_close(*outputs)
    assert signals[0] == signals[1]


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
        kit.train(forward, optimizer, loader, criterion)
        ends.append(weights(model))
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-5)
    model, dataset = tight()
    forward = Forward(model, compiled=True)
    engine, *_, criterion = private(forward.module, dataset=dataset, expected_batch_size=8)
    longest, bound = longest_gradient(forward, model, criterion, dataset), engine.sensitivity()["1.weight"]
    assert 0.96 * bound < longest <= bound
