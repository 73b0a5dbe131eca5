"""The zoo: shapes, constants, joints, twins, models of one's own; and that no bound is 5 % too small."""

from __future__ import annotations

import doctest
import importlib
import math
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jacrev, vmap
from torch.nn import functional as F

import lipdp
from lipdp import errors, models
from lipdp import nn as lnn
from lipdp.bounds.attention import spread
from lipdp.losses import TauBCEWithLogits, TauCrossEntropy

pytestmark = pytest.mark.usefixtures("one_thread")

IMAGES = ("cnn", "mixer", "resnet", "transformer", "vgg")
SMALL = {  # options that make every model cheap on 1x8x8
    "cnn": {"width": 4, "hidden": 8},
    "linear": {},
    "mixer": {"width": 8, "depth": 1},
    "mlp": {"width": 8},
    "resnet": {"width": 4, "depth": 2},
    "transformer": {"width": 4},
    "vgg": {"width": 4, "depth": 2, "hidden": 8},
}
JOINTS = {"cnn": 3, "linear": 0, "mixer": 2, "mlp": 2, "resnet": 2, "transformer": 2, "vgg": 3}  # of the small ones
SIZES = {
    ("cnn", (1, 28, 28)): 28_880,
    ("cnn", (3, 32, 32)): 34_480,
    ("cnn", (1, 8, 8)): 14_480,
    ("linear", (1, 28, 28)): 7_840,
    ("linear", (3, 32, 32)): 30_720,
    ("mixer", (1, 28, 28)): 58_568,
    ("mixer", (3, 32, 32)): 76_800,
    ("mlp", (1, 28, 28)): 118_016,
    ("mlp", (3, 32, 32)): 410_880,
    ("mlp", (1, 8, 8)): 25_856,
    ("resnet", (1, 28, 28)): 125_712,
    ("resnet", (3, 32, 32)): 130_480,
    ("vgg", (1, 28, 28)): 297_504,
    ("vgg", (3, 32, 32)): 307_040,
}


def small(name, shape=(1, 8, 8), **options):
    return models.build(name, input_shape=shape, num_classes=3, **{**SMALL[name], **options}).double()


def gradients(model, loss, x, y):
    """Per-sample gradients through torch.func: name → (N, *shape)."""
    params = {k: p.detach() for k, p in model.named_parameters()}

    def one(params, x, y):
        return loss(functional_call(model, params, (x[None],)), y[None])[0]

    return vmap(grad(one), in_dims=(None, 0, 0))(params, x, y)


def norms(per_sample):
    return {k: g.flatten(1).norm(dim=1) for k, g in per_sample.items()}


def hard_inputs(radius, shape, count=8):
    """On the sphere: noise, a constant, a checkerboard, a spike, noise far outside the ball, zero."""
    n = math.prod(shape)
    checker = torch.ones(n).double()
    checker[1::2] = -1
    spike = torch.zeros(n).double()
    spike[n // 2] = 1
    rows = [*torch.randn(count, n).double(), torch.ones(n).double(), checker, spike]
    x = torch.stack([radius * r / r.norm() for r in rows] + [100 * radius * rows[0], torch.zeros(n).double()])
    return x.view(-1, *shape)


# --- every model ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "shape"), SIZES, ids=str)
def test_default_sizes(name, shape):
    model = models.build(name, input_shape=shape, num_classes=10)
    assert sum(p.numel() for p in model.parameters()) == SIZES[name, shape]
    assert model(torch.rand(2, *shape)).shape == (2, 10)
    assert model[0].bound == models.default_input_bound(shape)
    s = lipdp.sensitivity(model, TauCrossEntropy(), input_shape=shape)
    assert s.lipschitz <= 1.03 / model[0].bound
    assert set(s) == {k for k, _ in model.named_parameters()}
    assert all(0 < delta <= 1.03 * math.sqrt(2) for delta in s.values())
    assert s.output_bound <= 1.03


def test_a_transformer_is_looser_by_its_attention():
    model = models.build("transformer", input_shape=(1, 28, 28), num_classes=10)
    assert sum(p.numel() for p in model.parameters()) == 9_632
    s = lipdp.sensitivity(model, TauCrossEntropy(), input_shape=(1, 28, 28))
    assert 1 < s.lipschitz * model[0].bound < 1.8  # 1 − λ + λ a
    assert all(0 < delta < 1.8 * math.sqrt(2) for delta in s.values())
    assert s["3.block.out.weight"] == pytest.approx(0.25 * math.sqrt(2 * 49 * spread(0.5, 49)[1]), rel=0.01)
    with pytest.raises(errors.ParameterError, match="3 heads"):
        models.build("transformer", input_shape=(1, 8, 8), num_classes=2, heads=3)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("perturbed", [False, True])
def test_no_gradient_exceeds_its_bound(name, perturbed):
    model = small(name, bias=True)
    if perturbed:  # what a noisy step and the projection behind it leave
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
        lnn.project_(model)
    loss = TauCrossEntropy(tau=50.0)
    s = lipdp.sensitivity(model, loss, input_shape=(1, 8, 8))
    x = hard_inputs(model[0].bound, (1, 8, 8))
    wrong = model(x).argmin(1)
    for key, norm in norms(gradients(model, loss, x, wrong)).items():
        assert norm.max() <= s[key], key
    jacobian = vmap(jacrev(lambda v: model(v[None])[0].flatten()))(x[:4]).flatten(2)
    assert torch.linalg.matrix_norm(jacobian, 2).max() <= s.lipschitz


def test_the_bound_of_the_linear_model_is_reached():
    model = small("linear", shape=(16,))
    model[2].reset_parameters()  # the zoo starts it at zero
    s = lipdp.sensitivity(model, TauCrossEntropy(tau=1e3), input_shape=(16,))
    x = torch.randn(64, 16).double() * 100  # outside the ball: projected on the sphere
    measured = norms(gradients(model, TauCrossEntropy(1e3), x, model(x).argmin(1)))["2.weight"].max()
    assert 0.99 * s["2.weight"] <= measured <= s["2.weight"]


@pytest.mark.parametrize("name", SMALL)
def test_works_on_empty_batches_and_keeps_samples_apart(name):
    model = small(name)
    empty = model(torch.zeros(0, 1, 8, 8).double())
    assert empty.shape == (0, 3)
    empty.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
    x = torch.rand(5, 1, 8, 8).double()
    assert torch.allclose(model(x)[2:3], model(x[2:3]), atol=1e-12)


@pytest.mark.parametrize("name", SMALL)
def test_per_sample_gradients_sum_to_the_batch_gradient(name):
    model, loss = small(name), TauCrossEntropy(8.0)
    x, y = torch.rand(6, 1, 8, 8).double(), torch.tensor([0, 1, 2, 0, 1, 2])
    loss(model(x), y).sum().backward()
    per_sample = gradients(model, loss, x, y)
    for key, p in model.named_parameters():
        assert torch.allclose(per_sample[key].sum(0), p.grad, atol=1e-12), key


@pytest.mark.parametrize("name", SMALL)
def test_learns(name):
    """A few projected steps on a separable toy problem: the loss falls, and the weights stay in their sets."""
    model = small(name)
    y = torch.arange(60) % 3
    bright = F.one_hot(y, 4).repeat_interleave(2, 1)[:, None, :, None]  # two rows of the image, by class
    x = 0.5 * bright.double().expand(-1, -1, -1, 8) + 0.02 * torch.rand(60, 1, 8, 8).double()
    loss, optimizer = TauCrossEntropy(20.0), torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.5)
    history = []
    for _ in range({"resnet": 60, "vgg": 60}.get(name, 30)):
        optimizer.zero_grad()
        value = loss(model(x), y).mean()
        value.backward()
        optimizer.step()
        lnn.project_(model)
        history.append(value.item())
    assert history[-1] < 0.7 * history[0]
    assert all(m.constraint.contains(m.weight_matrix()) for m in model.modules() if isinstance(m, lnn.Constrained))


def test_single_logit():
    model = models.build("mlp", input_shape=(7,), num_classes=1, depth=1)
    s = lipdp.sensitivity(model, TauBCEWithLogits(), input_shape=(7,))
    assert model(torch.randn(4, 7)).shape == (4, 1)
    assert all(0.9 <= delta <= 1.03 for delta in s.values())


@pytest.mark.parametrize("name", IMAGES)
def test_rectangular_images(name):
    model = models.build(name, input_shape=(2, 8, 12), num_classes=3, **SMALL[name])
    assert model(torch.rand(2, 2, 8, 12)).shape == (2, 3)
    largest = 1.8 if name == "transformer" else 1.03
    assert lipdp.lipschitz_constant(model, input_shape=(2, 8, 12)) <= largest / model[0].bound


# --- input bound, joints ----------------------------------------------------------------------------------------------


def test_the_input_bound_sets_the_scale():
    model = models.build("linear", input_shape=(9,), num_classes=2, input_bound=0.5)
    model[2].reset_parameters()  # the zoo starts it at zero
    assert isinstance(model[0], lnn.InputBound)
    assert 1.9 <= lipdp.lipschitz_constant(model, input_shape=(9,)) < 2.01
    x = torch.ones(1, 9)
    assert torch.allclose(model(x), model(7 * x))
    assert model(x).norm() <= 1 + 1e-5


@pytest.mark.parametrize("name", SMALL)
def test_joints_take_clips_and_gates(name):
    count = JOINTS[name]
    plain, both = small(name), small(name, clips=0.5, gates=[0.1] * count)
    found = [type(m).__name__ for m in both if isinstance(m, (lnn.ValueClip, lnn.GradientGate))]
    assert found == ["InputBound", *["GradientGate", "ValueClip"] * count]
    with pytest.raises(errors.ParameterError, match=f"has {count} joints"):
        small(name, gates=[0.1] * (count + 1))
    if not count:
        return
    loose = lipdp.sensitivity(plain, TauCrossEntropy(), input_shape=(1, 8, 8))
    tight = lipdp.sensitivity(both, TauCrossEntropy(), input_shape=(1, 8, 8))
    assert next(iter(tight.values())) <= 0.1 * 1.001  # input norm 1 times the first gate
    assert list(tight.values())[-1] <= 1.001 * math.sqrt(2)  # the unit ball times the loss's constant
    assert tight.total < 0.75 * loose.total


def test_one_joint_only():
    model = models.build("mlp", input_shape=(4,), num_classes=2, gates=(None, 0.25), clips=(0.5, None))
    kinds = [type(m).__name__ for m in model]
    assert kinds[4:] == ["ValueClip", "SpectralLinear", "GroupSort2", "GradientGate", "SpectralLinear"]


def test_the_bound_between_two_joints_is_reached():
    """A dense layer between a clip and a gate that both bite: ‖∇_W‖ = ‖x‖‖g‖ = 1 · gate exactly."""
    model = small("mlp", shape=(16,), width=16, clips=(0.01, None), gates=(None, 0.001))
    loss = TauCrossEntropy(tau=1e3)
    s = lipdp.sensitivity(model, loss, input_shape=(16,))
    middle = [k for k, _ in model.named_parameters()][1]
    assert s[middle] == pytest.approx(1e-3, rel=1e-3)
    x = torch.randn(32, 16).double()
    wrong = model(x).argmin(1)
    measured = norms(gradients(model, loss, x, wrong))[middle]
    assert 0.99 * s[middle] <= measured.max() <= s[middle]


# --- twins ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SMALL)
def test_the_twin_has_the_same_parameters_and_no_constraint(name):
    options = {**SMALL[name], "clips": 0.5, "gates": 0.1}
    ours = models.build(name, input_shape=(1, 8, 8), num_classes=3, **options)
    twin = models.build(name, input_shape=(1, 8, 8), num_classes=3, twin=True, **options)
    shapes = [{k: tuple(p.shape) for k, p in m.named_parameters()} for m in (ours, twin)]
    assert shapes[0] == shapes[1]
    assert not any(type(m).__module__.startswith(("lipdp.nn", "deel")) for m in twin.modules())
    assert twin(torch.rand(2, 1, 8, 8)).shape == (2, 3)


# --- names, options, models of one's own ------------------------------------------------------------------------------


def test_unknown_names_list_the_known():
    with pytest.raises(errors.UnknownNameError, match=r"did you mean 'cnn'.*mixer.*module:function"):
        models.build("cnnn", input_shape=(1, 8, 8), num_classes=3)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("cnn", {"widht": 3}, "no option 'widht'; its own options are: width, hidden, kernel_size"),
        ("linear", {"width": 3}, "own options are: radius"),
        ("cnn", {"hidden": 7}, "hidden is a positive even integer, got 7"),
        ("cnn", {"kernel_size": 4}, "kernel_size is a positive odd integer, got 4"),
        ("mlp", {"depth": 0}, "depth is a positive integer, got 0"),
        ("mlp", {"depth": True}, "depth is a positive integer, got True"),
        ("mixer", {"patch": 5}, "patches of 5x5 do not tile 28x28"),
        ("vgg", {"depth": 5}, "28x28 is smaller than 32x32"),
        ("resnet", {"residual_weight": 1.5}, "weight lies in"),
        ("cnn", {"input_bound": -1.0}, "input_bound is a positive finite number"),
        ("cnn", {"gates": 0.0}, "bound is a positive finite number"),
        ("cnn", {"num_classes": 0}, "num_classes is a positive integer, got 0"),
        ("cnn", {"input_shape": (784,)}, r"takes images.*got \(784,\)"),
        ("mlp", {"input_shape": ()}, "input_shape is empty"),
        ("mlp", {"input_shape": (3, -1)}, "an entry of input_shape is a positive integer, got -1"),
    ],
)
def test_bad_arguments_are_named(name, options, message):
    with pytest.raises(errors.ParameterError, match=message):
        models.build(name, **{"input_shape": (1, 28, 28), "num_classes": 10, **options})


OWN = """
from torch import nn
def net(input_shape, num_classes, hidden=4):
    return nn.Sequential(nn.Flatten(), nn.Linear(9, hidden), nn.Linear(hidden, num_classes))
def anything(**options):
    return nn.Linear(9, options["num_classes"])
def three(input_shape, num_classes):
    return 3
def bare():
    return nn.Identity()
"""


def test_a_model_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lipdp_own_model.py").write_text(OWN)
    path, arguments = list(sys.path), {"input_shape": (9,), "num_classes": 2}
    assert models.build("lipdp_own_model:net", **arguments)(torch.zeros(1, 9)).shape == (1, 2)
    assert models.build("lipdp_own_model:net", hidden=6, **arguments)[1].out_features == 6
    assert isinstance(models.build("lipdp_own_model:anything", depth=3, **arguments), nn.Linear)
    assert sys.path == path
    with pytest.raises(errors.UnknownNameError, match=r"unknown function.*'nett'; did you mean 'net'"):
        models.build("lipdp_own_model:nett", **arguments)
    with pytest.raises(errors.ParameterError, match="returned a int; it must return a torch"):
        models.build("lipdp_own_model:three", **arguments)
    with pytest.raises(errors.ParameterError, match="must take the arguments input_shape, num_classes"):
        models.build("lipdp_own_model:bare", **arguments)
    with pytest.raises(errors.ParameterError, match="no option 'twin'"):
        models.build("lipdp_own_model:net", twin=True, **arguments)
    with pytest.raises(errors.ParameterError, match=r"cannot import 'lipdp_no_such' \(ModuleNotFoundError"):
        models.build("lipdp_no_such:net", **arguments)
    (tmp_path / "lipdp_broken.py").write_text("def net(:\n")
    with pytest.raises(errors.ParameterError, match=r"cannot import 'lipdp_broken' \(SyntaxError"):
        models.build("lipdp_broken:net", **arguments)
    with pytest.raises(errors.ParameterError, match="cannot import ''"):
        models.build(":net", **arguments)


def test_installed_as_lipdp_models(tmp_path):
    code = "import lipdp; print(lipdp.models.build('linear', input_shape=(2,), num_classes=2)[2].out_features)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "2"


@pytest.mark.parametrize("name", ["", ".stages", ".families", *(f".{n}" for n in models.names())])
def test_doctests(name):
    result = doctest.testmod(
        importlib.import_module(f"lipdp.models{name}"), extraglobs={"lipdp": lipdp, "torch": torch}
    )
    assert not result.failed
