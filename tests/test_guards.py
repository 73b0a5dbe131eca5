"""The guards of a run: what is changed between steps is refused, what is sound goes on, and looking changes nothing."""

from __future__ import annotations

from functools import partial

import kit
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kit import train
from torch import nn
from torch.utils.data import TensorDataset

import lipdp
from lipdp import losses
from lipdp import nn as lnn
from lipdp.constraints import Constraint, Frobenius, Orthogonal, Spectral
from lipdp.errors import (
    BoundViolation,
    ConstraintError,
    EngineError,
    OptimizerError,
    ParameterError,
    UnsupportedLayerError,
)
from lipdp.nn.constrained import cannot_certify
from lipdp.training.ema import Ema

pytestmark = pytest.mark.usefixtures("one_thread", "unjudged")


def images(n=128, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(
        torch.rand(n, 1, 6, 6, generator=generator, dtype=dtype), torch.randint(4, (n,), generator=generator)
    )


class Net(nn.Module):
    """Something of everything: a convolution, a buffer, lists, tuples and dicts among the attributes, dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.bound = lnn.InputBound(2.0)
        self.conv = lnn.SpectralConv2d(1, 4, 3, padding=1, bias=True)
        self.act = lnn.GroupSort2()
        self.drop = nn.Dropout(0.2)
        self.flat = nn.Flatten()
        self.head = lnn.SpectralLinear(4 * 36, 4, constraint=Spectral())
        self.register_buffer("shift", torch.zeros(4))
        self.sizes = [1.0, 2.0]
        self.options = {"gain": 0.5, "deep": ([1, 2], 3)}

    def forward(self, x):
        x = self.drop(self.act(self.conv(self.bound(x))))
        return self.head(self.flat(x)) * self.options["gain"] + self.shift


private = partial(kit.private, net=Net, data=images, expected_batch_size=32, steps=6)


# --- the model and the loss between steps -----------------------------------------------------------------------------


class Louder(lnn.SpectralLinear):
    def forward(self, input):
        return 3 * super().forward(input)


def replace_parameter(model, optimizer):
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())
    optimizer.param_groups[0]["params"] = list(model.parameters())


def swap_branches(model, optimizer):
    model._modules["act"], model._modules["drop"] = model._modules["drop"], model._modules["act"]


def set_class(model, optimizer):
    model.head.__class__ = Louder


def other_dtype(model, optimizer):
    model.head.weight.data = model.head.weight.data.double()


def replace_activation(model, optimizer):
    model.act = nn.ReLU()


CHANGES = {
    "activation replaced": (replace_activation, "'Net' (Net): act is another object"),
    "parameter replaced": (replace_parameter, "'head' (SpectralLinear): weight is another object"),
    "module added": (lambda m, o: m.add_module("extra", nn.ReLU()), "extra was added"),
    "module deleted": (lambda m, o: delattr(m, "drop"), "drop was removed"),
    "modules swapped": (swap_branches, "is another object"),
    "stride": (
        lambda m, o: setattr(m.conv, "stride", (2, 2)),
        "'conv' (SpectralConv2d): stride was (1, 1), is now (2, 2)",
    ),
    "coefficient": (lambda m, o: setattr(m.head, "scale", 5.0), "scale was 1.0, is now 5.0"),
    "constraint": (lambda m, o: setattr(m.head, "constraint", Spectral(4.0)), "constraint was Spectral(radius=1.0)"),
    "radius": (lambda m, o: object.__setattr__(m.head.constraint, "radius", 4.0), "radius was 1.0, is now 4.0"),
    "input bound": (lambda m, o: setattr(m.bound, "bound", 9.0), "bound was 2.0"),
    "dropout": (lambda m, o: setattr(m.drop, "p", 0.9), "p was 0.2"),
    "a list": (lambda m, o: m.sizes.append(3.0), "2 was added"),
    "a dict": (lambda m, o: m.options.update(gain=50.0), "gain was 0.5, is now 50.0"),
    "a list in a tuple in a dict": (lambda m, o: m.options["deep"][0].pop(), "1 was removed"),
    "attribute added": (lambda m, o: setattr(m, "late", True), "late was added"),
    "forward patched": (
        lambda m, o: setattr(m, "forward", lambda x: 2 * Net.forward(m, x)),
        "forward is another object",
    ),
    "class": (set_class, "'head' is of another class"),
    "forward hook": (lambda m, o: m.conv.register_forward_hook(lambda *a: a[-1] * 9), "'conv' (SpectralConv2d)"),
    "backward hook": (lambda m, o: m.conv.register_full_backward_hook(lambda *a: None), "'conv' (SpectralConv2d)"),
    "gradient hook": (
        lambda m, o: m.head.weight.register_hook(lambda g: 9 * g),
        "'head.weight' carries a gradient hook",
    ),
    "accumulation hook": (
        lambda m, o: m.head.weight.register_post_accumulate_grad_hook(lambda p: p.grad.mul_(9)),
        "'head.weight' carries a gradient hook",
    ),
    "buffer replaced": (lambda m, o: setattr(m, "shift", torch.ones(4)), "shift is another object"),
    "dtype": (other_dtype, "'head.weight' was (4, 144) torch.float32, is now (4, 144) torch.float64"),
    "eval": (lambda m, o: m.eval(), "it is in eval() mode"),
    "eval of a part": (lambda m, o: m.drop.eval(), "'drop' is in eval() mode"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_model_is_refused(change):
    action, named = CHANGES[change]
    engine, model, optimizer, loader, criterion = private(check_every=0)
    train(model, optimizer, loader, criterion, steps=1)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    x, y = next(iter(loader))
    criterion(model(x), y).backward()
    action(model, optimizer)
    with pytest.raises(EngineError, match="has changed since make_private") as caught:
        optimizer.step()
    assert named in str(caught.value)
    assert engine.steps_taken == 1  # nothing was released
    after = dict(model.named_parameters())
    assert all(torch.equal(p.to(after[n].dtype), after[n]) for n, p in before.items())


def test_a_class_whose_forward_is_patched_is_refused(monkeypatch):
    _, model, optimizer, loader, criterion = private()
    original = lnn.SpectralLinear.forward
    monkeypatch.setattr(lnn.SpectralLinear, "forward", lambda self, x: 7 * original(self, x))
    with pytest.raises(EngineError, match="its class has another forward"):
        train(model, optimizer, loader, criterion)


LOSS_CHANGES = {
    "tau": (lambda c: setattr(c.loss, "tau", 100.0), "tau was 8.0, is now 100.0"),
    "constant": (lambda c: setattr(c.loss, "lipschitz", 0.1), "lipschitz was 1.41421"),
    "another": (lambda c: setattr(c, "loss", losses.CategoricalHinge()), "loss is another object"),
    "patched": (lambda c: setattr(c.loss, "forward", lambda z, y: z.sum(1)), "forward was added"),
}


@pytest.mark.parametrize("change", LOSS_CHANGES)
def test_a_changed_loss_is_refused(change):
    action, named = LOSS_CHANGES[change]
    engine, model, optimizer, loader, criterion = private()
    train(model, optimizer, loader, criterion, steps=1)
    action(criterion)
    with pytest.raises(EngineError, match="the criterion has changed") as caught:
        train(model, optimizer, loader, criterion)
    assert named in str(caught.value)
    assert engine.steps_taken == 1


def test_what_is_put_back_is_no_change():
    engine, model, optimizer, loader, criterion = private()
    for x, y in loader:
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        model.eval()
        stride, model.conv.stride = model.conv.stride, (2, 2)
        model.conv.stride = tuple(int(n) for n in stride)  # an equal value, another object
        model.head.scale = float("1.0")
        model.train()
        optimizer.step()
    assert engine.steps_taken == 6


def test_weights_buffers_and_freezing_may_change():
    engine, model, optimizer, loader, criterion = private()
    ema = Ema(model, 0.9)
    saved = {n: t.clone() for n, t in model.state_dict().items()}
    for done, (x, y) in enumerate(loader):
        model.conv.requires_grad_(done % 2 == 0)
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()
        ema.update()
        model.load_state_dict(saved)
        model.shift.fill_(0.1)
        with ema.applied():
            model.eval()(x)
        model.train()
    assert engine.steps_taken == 6


def test_a_model_may_change_its_mode_before_the_first_step_only():
    engine, model, optimizer, loader, criterion = private(Net().eval())
    model.train()
    train(model, optimizer, loader, criterion, steps=2)
    model.eval()
    with pytest.raises(EngineError, match=r"eval\(\) mode"):
        train(model, optimizer, loader, criterion)
    assert engine.steps_taken == 2


def test_unfreezing_what_has_no_bound_is_refused():
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bound = lnn.InputBound(2.0)
            self.flat = nn.Flatten()
            self.head = lnn.SpectralLinear(36, 4)
            self.tail = nn.ParameterList([nn.Parameter(torch.zeros(4, dtype=torch.bfloat16), requires_grad=False)])

        def forward(self, x):
            return self.head(self.flat(self.bound(x))) + self.tail[0]

    engine, model, optimizer, loader, criterion = private(Half(), forward_dtype=torch.float32)
    train(model, optimizer, loader, criterion, steps=1)
    model.tail.requires_grad_(True)
    with pytest.raises(UnsupportedLayerError, match=r"'tail\.0' is torch\.bfloat16"):
        train(model, optimizer, loader, criterion)
    assert engine.steps_taken == 1


def test_optimiser_hooks_in_front_of_the_noise_are_refused():
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.register_step_pre_hook(lambda o, *_: [p.grad.mul_(9) for p in o.param_groups[0]["params"]])
    with pytest.raises(OptimizerError, match="before the noise"):
        private(model, optimizer=optimizer)


def test_a_changed_parameter_list_is_refused():
    engine, model, optimizer, loader, criterion = private()
    train(model, optimizer, loader, criterion, steps=1)
    dropped = optimizer.param_groups[0]["params"].pop()
    with pytest.raises(OptimizerError, match=r"lacks the trainable parameter\(s\) head\.weight"):
        train(model, optimizer, loader, criterion, steps=1)
    optimizer.param_groups[0]["params"] += [dropped, nn.Parameter(torch.zeros(2))]
    with pytest.raises(OptimizerError, match="the model lacks"):
        optimizer.step()
    assert engine.steps_taken == 1


# --- projections ------------------------------------------------------------------------------------------------------

SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 12), st.integers(1, 40))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(SHAPES, st.sampled_from([0.3, 1.0, 7.0]), st.floats(1e-3, 1e3), st.integers(0, 2**31))
@settings(max_examples=25, deadline=None)
def test_what_was_projected_is_certified_and_a_thousandth_more_is_not(dtype, shape, radius, scale, seed):
    raw = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale
    for constraint in (Orthogonal(), Spectral(radius), Frobenius(radius)):
        limit = getattr(constraint, "radius", 1.0)
        weight = constraint.project(raw.to(dtype))
        assert not cannot_certify(weight, limit)
        norm = torch.linalg.matrix_norm(weight.double(), 2).max()
        assert cannot_certify((weight.double() * (1.001 * limit / norm)).to(dtype), limit)
    assert not cannot_certify(torch.zeros(*shape, dtype=dtype), radius)


@given(SHAPES, st.floats(-1e-3, 1e-3), st.integers(0, 2**31))
@settings(max_examples=25, deadline=None)
def test_what_is_certified_has_the_norm(shape, excess, seed):
    """The decision against the exact norm, right at the edge, in float64."""
    raw = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    weight = raw * (1 + excess) / torch.linalg.matrix_norm(raw, 2).max()
    norm = float(torch.linalg.matrix_norm(weight, 2).max())
    if not cannot_certify(weight, 1.0):
        assert norm <= 1 + 1e-11
    elif norm > 0:
        assert norm > 1 - 1e-12


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [(0, 0, 0), (0, 2, 1), (1, 3, 8)])
def test_what_is_not_finite_is_not_certified(bad, place):
    weight = Orthogonal().sample(2, 4, 9)
    weight[place] = bad
    assert cannot_certify(weight, 1.0)


class TooWide(Constraint):
    """Projects a twentieth too far out, once told to."""

    radius, wrong = 1.0, False

    def project(self, matrix):
        return Orthogonal().project(matrix) * (1.05 if TooWide.wrong else 1.0)

    def contains(self, matrix, *, tolerance=None):
        return True


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_a_projection_that_misses_is_refused_before_anything_else_is_released(monkeypatch, optimizer):
    model = nn.Sequential(lnn.InputBound(1.0), nn.Flatten(), lnn.SpectralLinear(36, 4, constraint=TooWide()))
    engine, model, optimizer, loader, criterion = private(model, optimizer=optimizer(model.parameters(), lr=0.1))
    engine._hooks._projection_check.every = 1
    train(model, optimizer, loader, criterion, steps=2)
    monkeypatch.setattr(TooWide, "wrong", True)
    with pytest.raises(ConstraintError, match=r"2\.weight came out of the projection"):
        train(model, optimizer, loader, criterion)
    assert engine.steps_taken == 3
    monkeypatch.setattr(TooWide, "wrong", False)


def test_a_bias_that_is_not_projected_is_seen(monkeypatch):
    model = nn.Sequential(lnn.InputBound(1.0), nn.Flatten(), lnn.SpectralLinear(36, 4, bias=True, bias_radius=0.01))
    monkeypatch.setattr(lnn.SpectralLinear, "project_", lambda self: None)
    _, model, optimizer, loader, criterion = private(model)
    with pytest.raises(ConstraintError, match=r"2\.bias"):
        train(model, optimizer, loader, criterion)


def test_every_projection_is_looked_at_where_that_is_cheap_and_the_last_in_any_case(monkeypatch):
    model = lipdp.models.build("cnn", input_shape=(1, 28, 28), num_classes=10)
    data = TensorDataset(torch.rand(64, 1, 28, 28), torch.randint(10, (64,)))
    engine, *_ = private(model, data, expected_batch_size=64)
    assert engine._hooks._projection_check.every == 1
    wide = nn.Sequential(lnn.InputBound(1.0), nn.Flatten(), lnn.SpectralLinear(36, 36))
    engine, model, optimizer, loader, criterion = private(wide, steps=7)
    assert engine._hooks._projection_check.every > 7
    batches = iter(loader)
    monkeypatch.setattr(lnn.SpectralLinear, "project_", lambda self: self.weight.data.mul_(1.5))
    for step in range(1, 8):
        x, y = next(batches)
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        if step < 7:
            optimizer.step()
            continue
        with pytest.raises(ConstraintError, match=r"2\.weight"):
            optimizer.step()


def test_where_the_answer_is_read_later_nothing_is_released_or_saved_before(monkeypatch):
    """As on a GPU, where a read after the projection would wait for the device."""
    engine, model, optimizer, loader, criterion = private()
    engine._hooks._projection_check._at_once, engine._hooks._projection_check.every = False, 1
    monkeypatch.setattr(lnn.SpectralLinear, "project_", lambda self: self.weight.data.mul_(1.5))
    train(model, optimizer, loader, criterion, steps=1)
    with pytest.raises(ConstraintError, match=r"head\.weight"):
        train(model, optimizer, loader, criterion)
    assert engine.steps_taken == 1
    engine, model, optimizer, loader, criterion = private()
    engine._hooks._projection_check._at_once, engine._hooks._projection_check.every = False, 1
    train(model, optimizer, loader, criterion, steps=1)
    with pytest.raises(ConstraintError, match=r"head\.weight"):
        engine.state_dict()


# --- the gradients of a few records -----------------------------------------------------------------------------------


class Amplify(nn.Module):
    """Multiplies by a number; a rule of its own says by how much."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return x * self.factor


@lipdp.bounds.rule(Amplify)
def _amplify(call):
    return lipdp.bounds.Local(gains=(1.0,))


def amplified(factor, **options):
    """A linear model on inputs of norm 1, where the bound is attained."""
    x, y = images().tensors
    data = TensorDataset(x / x.flatten(1).norm(dim=1).view(-1, 1, 1, 1), y)
    model = nn.Sequential(lnn.InputBound(1.0), nn.Flatten(), lnn.SpectralLinear(36, 4), Amplify(factor))
    return private(model, data, **options)


def test_a_rule_five_percent_too_small_is_caught_at_the_first_step():
    engine, model, optimizer, loader, criterion = amplified(1.05)
    before = model[2].weight.detach().clone()
    with pytest.raises(BoundViolation, match=r"step 1: .* \(2\.weight: 1\.48\d+ > 1\.41\d+\)"):
        train(model, optimizer, loader, criterion)
    assert engine.steps_taken == 0
    assert torch.equal(model[2].weight, before)
    engine, model, optimizer, loader, criterion = amplified(1.0)
    train(model, optimizer, loader, criterion)
    assert engine.steps_taken == 6


def test_a_model_that_goes_wrong_later_is_caught_at_the_next_look():
    model = nn.Sequential(lnn.InputBound(1.0), nn.Flatten(), lnn.SpectralLinear(36, 4), Amplify(1.0))
    engine, model, optimizer, loader, criterion = private(model, check_every=3)
    original = Amplify.forward
    try:
        batches = iter(loader)
        for step in range(1, 5):
            x, y = next(batches)
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            if step < 4:
                optimizer.step()
                if step == 1:
                    engine._hooks._snapshots, engine._hooks._forward._snapshot = (
                        (),
                        None,
                    )  # a change that no attribute shows
                    Amplify.forward = lambda self, x: original(self, x) * 2
                continue
            with pytest.raises(BoundViolation, match="step 4"):
                optimizer.step()
    finally:
        Amplify.forward = original
    assert engine.steps_taken == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_check_can_be_switched_off_and_is_silent_on_sound_models(dtype):
    engine, model, optimizer, loader, criterion = amplified(1.5, check_every=0)
    train(model, optimizer, loader, criterion)
    assert engine.steps_taken == 6
    model = nn.Sequential(
        lnn.InputBound(2.0), lnn.SpectralConv2d(1, 4, 3), lnn.GroupSort2(), nn.Flatten(), lnn.SpectralLinear(64, 4)
    )
    engine, model, optimizer, loader, criterion = private(model, check_every=1, forward_dtype=dtype, steps=8)
    for x, y in loader:
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits = model(x)
        criterion(logits, y).backward()
        optimizer.step()
    assert engine.steps_taken == 8


@pytest.mark.parametrize("shape", [(36,), (1, 6, 6), (1, 8, 8)])
def test_inputs_that_the_loop_turns_into_another_shape(shape):
    """Flat records of an image model are reshaped; cropped ones are replaced by random inputs."""
    x = torch.randint(256, (128, *shape), dtype=torch.uint8)
    model = nn.Sequential(lnn.InputBound(1.0), nn.Flatten(), lnn.SpectralLinear(36, 4), Amplify(1.5))
    data = TensorDataset(x, torch.randint(4, (128,)))
    _, model, optimizer, loader, criterion = private(model, data, input_shape=(1, 6, 6), check_every=1)
    xb, yb = next(iter(loader))
    criterion(model(xb.float().flatten(1)[:, :36].view(-1, 1, 6, 6)), yb).backward()
    with pytest.raises(BoundViolation):
        optimizer.step()


def test_an_empty_batch_has_nothing_to_look_at():
    engine, model, optimizer, loader, criterion = private(check_every=1, expected_batch_size=1, steps=12)
    train(model, optimizer, loader, criterion)
    assert engine.steps_taken == 12


class Noisy(nn.Module):
    """Draws from torch's generator in every forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def forward(self, x):
        return self.net(x)


@pytest.mark.parametrize("gate", [None, lipdp.privacy.QuantileGate(0.5, count_std=4.0)])
def test_a_run_with_the_check_is_bit_identical_to_one_without(gate):
    ends = []
    for every in (0, 1, None):
        torch.manual_seed(2)
        engine, model, optimizer, loader, criterion = private(
            Noisy(), check_every=every, gate=gate, optimizer=None, steps=6
        )
        torch.manual_seed(1)
        grads = []
        for x, y in loader:
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            optimizer.step()
            grads.append([p.grad.clone() for p in model.parameters()])
        ends.append((model.state_dict(), grads, engine.state_dict(), torch.get_rng_state()))
    for model, grads, state, generator in ends[1:]:
        assert all(torch.equal(t, ends[0][0][n]) for n, t in model.items())
        assert all(torch.equal(a, b) for g, h in zip(grads, ends[0][1], strict=True) for a, b in zip(g, h, strict=True))
        assert state == ends[0][2]
        assert torch.equal(generator, ends[0][3])


@pytest.mark.parametrize(
    ("name", "shape"),
    [("linear", (64,)), ("mlp", (1, 8, 8)), ("cnn", (1, 8, 8)), ("vgg", (3, 8, 8)), ("resnet", (3, 8, 8)),
     ("mixer", (3, 8, 8)), ("tabular", (20,))],
)  # fmt: skip
def test_no_false_alarm_on_the_models_of_the_zoo(name, shape):
    model = lipdp.models.build(name, input_shape=shape, num_classes=4)
    data = TensorDataset(torch.rand(64, *shape) * 3, torch.randint(4, (64,)))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)
    engine, model, optimizer, loader, criterion = private(
        model, data, check_every=1, optimizer=optimizer, expected_batch_size=8, noise_multiplier=0.3, steps=4
    )
    engine._hooks._projection_check.every = 1
    train(model, optimizer, loader, criterion)
    assert engine.steps_taken == 4


def test_how_often():
    def every(**options):
        return private(**options)[0]._hooks._gradient_check.every

    assert every() == 667  # one record may cost as much as a step of 32
    assert every(dataset=images(4096), expected_batch_size=4096) == 14
    assert every(check_every=5) == 5
    for bad in (-1, 1.5, True, "often"):
        with pytest.raises(ParameterError, match="check_every"):
            private(check_every=bad)
