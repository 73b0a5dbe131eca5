"""The falsifier itself: it finds every bound that is too small, and leaves the model as it was."""

import copy
import dataclasses
import math

import pytest
import torch
from deel import torchlip
from test_layers import CASES
from torch import Tensor, nn

import lipdp
from lipdp import nn as lnn
from lipdp.bounds import BoundGraph, Local
from lipdp.bounds import propagate as propagate_module
from lipdp.bounds.rules import _RULES, find_module_rule
from lipdp.errors import BoundViolation, ParameterError, UnboundedError, UnknownNameError
from lipdp.losses import CategoricalHinge, LipschitzLoss, TauCrossEntropy
from lipdp.testing import (
    WEIGHTS,
    Finding,
    LayerTestCase,
    ProbeLoss,
    Report,
    example_targets,
    falsify,
    falsify_layer,
    tightness,
)
from lipdp.testing.inputs import starting_inputs, weight_settings

pytestmark = pytest.mark.usefixtures("one_thread")


def scaled(local, factor):
    """Every bound of a rule times the factor."""
    return dataclasses.replace(
        local,
        gains=tuple(g * factor for g in local.gains),
        offset=local.offset * factor,
        parameters={k: p * factor for k, p in local.parameters.items()},
        value_cap=local.value_cap * factor,
        cotangent_cap=local.cotangent_cap * factor,
        parameter_caps={k: c * factor for k, c in local.parameter_caps.items()},
    )


def mutate(monkeypatch, module, change):
    """Replace the rule of the module's class by `change(local, call)`."""
    original = find_module_rule(module)
    target = next(base for base in type(module).__mro__ if _RULES.get(base) is original)
    monkeypatch.setitem(_RULES, target, lambda call: change(original(call), call))


# --- five per cent ---------------------------------------------------------------------------------------------------

TIGHT = [
    n for n, (make, _, attributes) in CASES.items() if attributes.get("tight", 0) > 0.96 and find_module_rule(make())
]


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("name", TIGHT)
def test_a_bound_five_per_cent_too_small_is_found(name, monkeypatch):
    make, shape, attributes = CASES[name]
    layer = make()
    mutate(monkeypatch, layer, lambda local, call: scaled(local, 0.95))
    effort = {"starts": 4, "climbs": 2, "steps": 8, **attributes.get("effort", {})}
    weights = attributes.get("weights", ("given", "constant"))
    with pytest.raises(BoundViolation):
        falsify_layer(layer, shape, radius=attributes.get("radius", 1.0), weights=weights, **effort)


# --- a factor that was forgotten -------------------------------------------------------------------------------------


def without(name, factor):
    """The parameter's bound divided by what published code forgets."""
    return lambda local, call: dataclasses.replace(
        local, parameters={k: p / factor(call) if k == name else p for k, p in local.parameters.items()}
    )


def root_positions(call):
    return math.sqrt(math.prod(call.output_shape[1:]))


def gains(factor):
    return lambda local, call: dataclasses.replace(local, gains=tuple(g * factor for g in local.gains))


MUTATIONS = {
    "convolution without √m": (
        lnn.SpectralConv2d(1, 3, 3, padding=1),
        (1, 6, 6),
        lambda local, call: dataclasses.replace(
            without("weight", lambda c: 3.0)(local, call), gains=(local.gains[0] / 3,)
        ),
    ),
    "convolution's weight divided by k": (
        lnn.SpectralConv2d(1, 3, 3, padding=1),
        (1, 6, 6),
        without("weight", lambda c: 3),
    ),
    "convolution's bias without √(HW)": (
        lnn.SpectralConv2d(1, 3, 3, padding=1, bias=True),
        (1, 6, 6),
        without("bias", root_positions),
    ),
    "overlap assumed, not counted": (
        lnn.SpectralConv2d(1, 2, 3, padding=3, padding_mode="circular"),
        (1, 4, 4),
        lambda local, call: dataclasses.replace(local, gains=(local.gains[0] / 2,)),
    ),
    "mean number of patches per pixel": (
        lnn.SpectralConv2d(1, 2, 3, padding=1),
        (1, 20, 20),
        gains((58 / 20) / 3),  # along an axis of 20 there are 20·3 − 2 entries in windows
    ),
    "tokens' bias without √T": (lnn.SpectralLinear(4, 3, True), (5, 4), without("bias", lambda c: math.sqrt(5))),
    "value offset of the bias": (
        lnn.SpectralLinear(4, 3, True),
        (5, 4),
        lambda local, call: dataclasses.replace(local, offset=local.offset / math.sqrt(5)),
    ),
    "scale left out of the weight": (
        lnn.SpectralLinear(4, 3, k_coef_lip=2.0),
        (4,),
        without("weight", lambda call: call.module.scale),
    ),
    "centering bias without √P": (lnn.LayerCentering(2, bias=True), (2, 3, 3), without("bias", lambda c: 3.0)),
    "ties of torchlip's pairs": (torchlip.GroupSort2(), (4,), gains(1 / math.sqrt(2))),
    "GELU as 1-Lipschitz": (nn.GELU(), (2,), gains(1 / 1.129)),
    "softplus through 0": (nn.Softplus(), (4,), lambda local, call: dataclasses.replace(local, offset=0.0)),
    "sigmoid through 0": (nn.Sigmoid(), (4,), lambda local, call: dataclasses.replace(local, offset=0.0)),
    "overlapping maxima without √m": (nn.MaxPool2d(3, 1, 1), (1, 5, 5), gains(1 / 3)),
    "overlapping averages without √m": (nn.AvgPool2d(3, 1, 1), (1, 7, 7), gains(1 / 3)),
    "average pooling as scaled": (lnn.ScaledAvgPool2d(2), (1, 4, 4), gains(1 / 2)),
    "dropout as identity": (nn.Dropout(0.5), (6,), gains(0.5)),
    "PReLU's slope": (nn.PReLU(init=2.0), (6,), without("weight", lambda c: 2.0)),
    "normalised inputs as norm 1": (lnn.GroupNorm(1, 6, eps=1e-3), (6,), without("weight", lambda c: math.sqrt(6))),
    "leaky slope beyond 1": (nn.LeakyReLU(3.0), (6,), gains(1 / 3)),
    "a gate that is not there": (nn.Sequential(nn.Identity()), (6,), None),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_forgotten_factor_is_found(name, monkeypatch):
    layer, shape, change = MUTATIONS[name]
    if change is None:
        layer = layer[0]
        change = lambda local, call: dataclasses.replace(local, cotangent_cap=0.5)  # noqa: E731
    mutate(monkeypatch, layer, change)
    radius = 3.0 if isinstance(layer, nn.GELU) else 1.0
    weights = ("given", "constant")
    with pytest.raises(BoundViolation) as caught:
        falsify_layer(layer, shape, radius=radius, weights=weights, starts=4, climbs=2, steps=10)
    assert "times its bound" in str(caught.value)
    assert "weights:" in str(caught.value) or "pairs" in str(caught.value)


def test_cotangents_that_do_not_add_are_found(monkeypatch):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.bound = lnn.InputBound(1.0)
            self.first = lnn.SpectralLinear(4, 4)

        def forward(self, x):
            y = self.first(self.bound(x))
            return y + torch.relu(y)

    falsify(Model(), ProbeLoss(), (4,), weights=("given",), steps=4)
    for target in list(_RULES):
        if getattr(target, "__name__", target) == "add":
            original = _RULES[target]
            monkeypatch.setitem(
                _RULES, target, lambda call, rule=original: dataclasses.replace(rule(call), gains=(1.0, 0.0))
            )
    with pytest.raises(BoundViolation, match=r"first\.weight"):
        falsify(Model(), ProbeLoss(), (4,), weights=("given",), steps=4)


class AddsTheBatch(nn.Module):
    def forward(self, x):
        return x + x.sum(dim=0, keepdim=True)


def test_samples_that_mix_are_found_even_where_the_static_checks_are_off(monkeypatch):
    monkeypatch.setitem(_RULES, AddsTheBatch, lambda call: Local())
    monkeypatch.setattr(propagate_module, "check_samples_apart", lambda model, x: None)
    model = nn.Sequential(lnn.InputBound(1.0), lnn.SpectralLinear(4, 3), AddsTheBatch(), nn.LeakyReLU(0.1))
    model.append(lnn.SpectralLinear(3, 3))
    with pytest.raises(BoundViolation, match=r"batch gradient of 1\.weight with and without one sample"):
        falsify(model, CategoricalHinge(10.0), (4,), weights=("given",), steps=8)


class Amplifies(LipschitzLoss):
    lipschitz = 1.0

    def forward(self, logits, target):
        return 1.3 * logits.gather(1, target.unsqueeze(1)).squeeze(1)


def test_a_wrong_loss_constant_is_found():
    model = nn.Sequential(lnn.InputBound(1.0), lnn.SpectralLinear(4, 4))
    with pytest.raises(BoundViolation) as caught:
        falsify(model, Amplifies(), (4,), weights=("given",), steps=5)
    assert "gradient of 1.weight: 1.3 is 1.3 times its bound 1" in str(caught.value)


class InfiniteAtZero(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * x.sign() / x.sign()


class NanAtZero(nn.Module):
    def forward(self, x):
        return InfiniteAtZero.apply(x)


def test_a_gradient_of_nan_is_a_violation(monkeypatch):
    monkeypatch.setitem(_RULES, NanAtZero, lambda call: Local())
    with pytest.raises(BoundViolation, match="inf"):
        falsify_layer(NanAtZero(), (4,), steps=2)


# --- operations that torch.func cannot take --------------------------------------------------------------------------


class OldStyle(torch.autograd.Function):
    """Without setup_context: torch.func refuses it."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * (x > 0)


class OnceOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return 2 * g


class Custom(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = [function]

    def forward(self, x):
        return self.function[0].apply(x)


@pytest.mark.parametrize(("function", "gain"), [(OldStyle, 1.0), (OnceOnly, 2.0)])
def test_custom_functions_are_attacked_one_by_one(function, gain, monkeypatch):
    model = nn.Sequential(lnn.InputBound(1.0), lnn.SpectralLinear(4, 4), Custom(function))
    monkeypatch.setitem(_RULES, Custom, lambda call: Local(gains=(gain,)))
    effort = {"weights": ("given",), "starts": 1, "climbs": 1, "steps": 3}
    assert falsify(model, ProbeLoss(), (4,), **effort).ratios["1.weight"] > 0.5
    monkeypatch.setitem(_RULES, Custom, lambda call: Local(gains=(0.5 * gain,)))
    with pytest.raises(BoundViolation):
        falsify(model, ProbeLoss(), (4,), **effort)


# --- the report ------------------------------------------------------------------------------------------------------


def test_report_names_the_worst():
    model = nn.Sequential(
        lnn.InputBound(2.0), lnn.SpectralLinear(6, 6, True), lnn.GroupSort2(), lnn.SpectralLinear(6, 3)
    )
    report = falsify(model, TauCrossEntropy(8.0), (6,), starts=4, steps=4, climbs=1, weights=("given", "scaled"))
    assert set(report.ratios) == {"1.weight", "1.bias", "3.weight"}
    assert report.worst == max(f.ratio for f in report.findings.values()) <= 1 + 1e-9
    assert report.worst_input.shape == (6,)
    assert report.evaluations > 100
    assert report.violations == ()
    assert report.raise_violations() is report
    assert "gradient of 1.weight" in str(report)
    for finding in report.findings.values():
        assert finding.ratio <= 1 + 1e-9
    worst = report.findings["gradient of 3.weight"]
    assert worst.input.shape == (6,)
    assert worst.target.shape == ()


def test_violations_can_be_reported_instead_of_raised():
    model = nn.Sequential(lnn.InputBound(1.0), lnn.SpectralLinear(4, 4))
    report = falsify(model, Amplifies(), (4,), weights=("given",), steps=3, raise_on_violation=False)
    assert report.worst == pytest.approx(1.3)
    assert report.violations[0].ratio == report.worst
    with pytest.raises(BoundViolation):
        report.raise_violations()


def test_findings_of_degenerate_bounds():
    assert Finding("q", 0.0, 0.0, "").ratio == 0
    assert Finding("q", 1.0, 0.0, "").ratio == math.inf
    assert Finding("q", math.nan, 1.0, "").ratio == math.inf
    merged = Report({"q": Finding("q", 1.0, 2.0, "a")}, 3, 0.0).merged(
        Report({"q": Finding("q", 3.0, 2.0, "b")}, 4, 0.0)
    )
    assert (merged.worst, merged.evaluations, merged.worst_finding.how) == (1.5, 7, "b")


def test_the_ratio_is_the_gradient_of_the_input_it_names():
    """What the report says can be checked by hand with plain autograd."""
    model = nn.Sequential(
        lnn.InputBound(1.0), lnn.SpectralLinear(6, 6, True), lnn.GroupSort2(), lnn.SpectralLinear(6, 3)
    )
    model = model.double()
    loss = TauCrossEntropy(8.0)
    report = falsify(model, loss, (6,), weights=("given",), steps=5)
    declared = lipdp.sensitivity(model, loss, (6,))
    for name, p in model.named_parameters():
        finding = report.findings[f"gradient of {name}"]
        value = loss(model(finding.input.unsqueeze(0)), finding.target.unsqueeze(0)).sum()
        (grad,) = torch.autograd.grad(value, p)
        assert float(grad.norm()) == pytest.approx(finding.measured, rel=1e-9)
        assert finding.bound == pytest.approx(declared[name], rel=1e-12)


def test_the_model_is_left_as_it_was():
    model = nn.Sequential(
        lnn.InputBound(1.0), lnn.SpectralLinear(4, 4, True), nn.Dropout(0.2), lnn.SpectralLinear(4, 3)
    )
    before, generator = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    falsify(model, TauCrossEntropy(), (4,), starts=2, steps=2, climbs=1)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(p.grad is None and p.dtype == torch.float32 for p in model.parameters())


def test_the_same_seed_finds_the_same():
    model = nn.Sequential(lnn.InputBound(1.0), lnn.SpectralLinear(4, 4), nn.ReLU(), lnn.SpectralLinear(4, 3))
    first, second = (falsify(model, TauCrossEntropy(), (4,), steps=3, weights=("sampled",), seed=s) for s in (5, 5))
    assert {q: f.ratio for q, f in first.findings.items()} == {q: f.ratio for q, f in second.findings.items()}


def test_settings_of_the_weights_stay_inside_the_constraints():
    model = nn.Sequential(lnn.SpectralConv2d(2, 3, 3, bias=True, groups=1), lnn.SpectralLinear(4, 3, True)).double()
    before = copy.deepcopy(model.state_dict())
    generator = torch.Generator().manual_seed(0)
    seen = []
    for name in weight_settings(model, tuple(WEIGHTS), generator):
        seen.append(name)
        norms = [float(torch.linalg.matrix_norm(m.weight_matrix().detach(), 2).max()) for m in model]
        if name == "scaled":
            assert min(norms) == pytest.approx(3.0)
        else:
            assert max(norms) <= 1 + 1e-6
            assert all(float(m.bias.detach().norm()) <= 1 + 1e-9 for m in model)
    assert seen == list(WEIGHTS)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("shape", [(1,), (5,), (3, 4), (1, 1, 1), (2, 5, 4)])
def test_starting_inputs_have_the_radius(shape):
    points = starting_inputs(shape, 3.0, random=2, generator=torch.Generator().manual_seed(0))
    assert all(x.shape == shape and x.isfinite().all() for x in points.values())
    for name in ("constant", "first entry", "last entry", "Gaussian 0", "Gaussian 1"):
        assert float(points[name].norm()) == pytest.approx(3.0)


def test_unknown_settings_and_sizes_are_refused():
    model = nn.Sequential(lnn.InputBound(1.0), lnn.SpectralLinear(4, 4))
    with pytest.raises(UnknownNameError, match="constant"):
        falsify(model, ProbeLoss(), (4,), weights=("constants",))
    with pytest.raises(ParameterError, match="climbs"):
        falsify(model, ProbeLoss(), (4,), climbs=0)
    with pytest.raises(UnboundedError):
        falsify(model[1:], ProbeLoss(), (4,))


def test_targets_of_ones_own():
    class OneSided(LipschitzLoss):
        lipschitz = 1.0

        def forward(self, logits: Tensor, target: Tensor) -> Tensor:
            return logits[:, 0] * target.clamp(-1, 1)

    model = nn.Sequential(lnn.InputBound(1.0), lnn.SpectralLinear(4, 4))
    given = falsify(model, OneSided(), (4,), targets=torch.tensor([0.5, -1.0]), weights=("given",), steps=3)
    assert given.ratios["1.weight"] > 0.99
    example_targets.register(OneSided, lambda loss, num_outputs: torch.tensor([0.25]))
    assert falsify(model, OneSided(), (4,), weights=("given",), steps=0).ratios["1.weight"] == pytest.approx(
        0.25, rel=1e-3
    )


def test_tightness_is_the_loosest_of_the_parameters():
    tight = nn.Sequential(lnn.InputBound(1.0), lnn.SpectralLinear(4, 4))
    loose = nn.Sequential(lnn.InputBound(1.0), lnn.SpectralLinear(4, 4), nn.Sigmoid())
    assert tightness(tight, CategoricalHinge(10.0), (4,)) > 0.999
    assert tightness(loose, CategoricalHinge(10.0), (4,)) < 0.999


# --- the test case ---------------------------------------------------------------------------------------------------


class Good(LayerTestCase):
    input_shape = (4,)
    tight = 0.99

    def make_layer(self):
        return lnn.SpectralLinear(4, 4, True)


def test_a_good_layer_passes_every_check():
    Good().run()


class Half(nn.Module):
    """A layer of a user, with one fault after the other."""

    def __init__(self, fault=""):
        super().__init__()
        self.fault = fault
        self.gain = nn.Parameter(torch.tensor(1.5))
        self.calls = 0

    def forward(self, x):
        y = x * self.gain
        if self.fault == "mixes":
            y = y - 0.1 * x.mean(0, keepdim=True)
        if self.fault == "empty":
            y = y + 0 * x[0]
        if self.fault == "nan":
            y = y * x.norm(dim=1, keepdim=True) / x.norm(dim=1, keepdim=True)
        if self.fault == "dtype":
            y = y.float()
        if self.fault == "state":
            y = y * self.hidden
        return y


class HalfCase(LayerTestCase):
    input_shape = (4,)

    def __init__(self, fault="", gain=1.0):
        self.fault, self.gain = fault, gain

    def make_layer(self):
        layer = Half(self.fault)
        layer.hidden = float(torch.rand(()))
        return layer

    def rule(self, call):
        size = call.module.gain.detach().abs().double()
        return Local(gains=(size * self.gain,), parameters={"gain": call.x.value * self.gain}, fan_in=call.x.numel,
                     sums_in=torch.float32)  # fmt: skip


@pytest.mark.parametrize(
    ("fault", "gain", "check"),
    [
        ("", 0.95, "test_bounds_hold_in_float64"),
        ("", 0.95, "test_bounds_hold_in_float32"),
        ("", 0.9, "test_bounds_hold_under_autocast"),
        ("mixes", 1.0, "test_samples_stay_apart"),
        ("mixes", 1.0, "test_a_batch_is_its_samples"),
        ("empty", 1.0, "test_an_empty_batch_works"),
        ("nan", 1.0, "test_every_input_gives_finite_gradients"),
        ("dtype", 1.0, "test_dtype_moves_with_the_layer"),
        ("state", 1.0, "test_state_is_in_the_state_dict"),
    ],
)
def test_every_fault_of_a_layer_has_a_check_that_finds_it(fault, gain, check, monkeypatch):
    case = HalfCase(fault, gain)
    monkeypatch.setitem(_RULES, Half, case.rule)
    with pytest.raises((BoundViolation, IndexError)):
        getattr(case, check)()
    good = HalfCase()
    monkeypatch.setitem(_RULES, Half, good.rule)
    getattr(good, check)()


def test_a_case_that_asks_for_more_tightness_than_there_is():
    class Loose(Good):
        def make_layer(self):
            return nn.Sequential(lnn.SpectralLinear(4, 4), lnn.LayerNorm(4, eps=0.01))

    with pytest.raises(BoundViolation, match="looser"):
        Loose().test_bounds_hold_in_float64()


# --- the zoo ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["linear", "mlp", "tabular", "cnn", "vgg", "resnet", "mixer", "transformer"])
def test_models_of_the_zoo_hold(name):
    models = pytest.importorskip("lipdp.models")
    shape = (20,) if name in ("tabular",) else (1, 8, 8)
    narrow = {"width": 4} if name in ("vgg", "resnet") else {}
    model = models.build(name, input_shape=shape, num_classes=5, **narrow)
    effort = {"starts": 6, "climbs": 2, "steps": 20}
    for dtype in (torch.float64, torch.float32):
        report = falsify(model, TauCrossEntropy(32.0), shape, dtype=dtype, **effort)
        print(f"{name:10s} {dtype!s:14s} {report.evaluations:7d} {max(report.ratios.values()):.9f} {report.worst:.9f}")
    falsify(model, TauCrossEntropy(32.0), shape, forward_dtype=torch.bfloat16, weights=("given", "scaled"), **effort)


def test_the_kit_needs_no_trace_twice():
    """The graph that is attacked is the graph that is declared."""
    model = nn.Sequential(lnn.InputBound(1.0), lnn.SpectralLinear(4, 4))
    assert set(BoundGraph(model, (4,)).sweep(1.0).parameters) == set(falsify(model, ProbeLoss(), (4,), steps=0).ratios)


def test_an_identity_in_one_of_two_branches_is_no_violation():
    """It returns the very tensor that the other branch reads, whose cotangent is the sum of both."""
    report = falsify_layer(lnn.Concat(lnn.SpectralLinear(4, 4), nn.Identity()), (4,), starts=8, climbs=4)
    assert 0.99 < report.worst <= 1 + report.tolerance


def test_a_narrow_peak_is_climbed():
    """Of width 1e-5: an ascent that ends at a coarse step stays at 0.38 of this bound."""
    torch.manual_seed(3)
    model = torch.nn.Sequential(lipdp.nn.InputBound(1.0), lipdp.nn.SpectralLinear(2, 2, bias=True))
    with torch.no_grad():
        model[1].bias.copy_(0.2 * torch.randn(2))
    report = lipdp.testing.falsify(model, lipdp.losses.CosineSimilarity(1e-5), (2,), weights=("given",), steps=60)
    assert report.ratios["1.bias"] > 0.953
