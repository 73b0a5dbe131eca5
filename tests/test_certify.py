"""Certificates of networks: an attack breaks none, and breaks what is 10 % too large."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from certificates import attacked, certified, predicted

import lipdp
from lipdp import nn as lnn
from lipdp.certify import Network, certify
from lipdp.certify.run import assess
from lipdp.constraints import Orthogonal
from lipdp.data import Clip
from lipdp.errors import BoundViolation, DataError, MixesSamplesError, ParameterError, UnboundedError

pytestmark = pytest.mark.usefixtures("one_thread")


# --- networks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [1, 3])
def test_of_a_linear_model_the_certificate_is_the_distance_and_ten_per_cent_more_is_broken(classes):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(12, classes, bias=True))
    x = torch.randn(150, 12)
    certificate = certified(model, x)
    weight, bias, z = model[0].weight.double(), model[0].bias.double(), model(x).detach().double()
    if classes == 1:
        distance = z[:, 0].abs() / weight.norm()
    else:
        gap = z.amax(1, keepdim=True) - z
        distance = gap / torch.cdist(weight[z.argmax(1)][:, None], weight[None])[:, 0].clamp_min(1e-300)
        distance = distance.scatter(1, z.argmax(1, keepdim=True), math.inf).amin(1)
    distance = distance.detach()
    assert bias.shape == (classes,)
    assert bool((certificate.radii <= distance).all())
    assert bool((certificate.radii >= distance * (1 - 1e-4) - 1e-4).all())
    assert attacked(model, x, certificate)[0] == 0
    broken, count = attacked(model, x, certificate, factor=1.1)
    assert broken > 0.9 * count  # so is a certificate from half of K, or from a K 10 % too small


def test_outside_the_input_ball_the_certificate_is_tight_too():
    """Samples far outside, close to the boundary: 5 % more than the exact modulus allows is broken."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(lnn.InputBound(1.0), torch.nn.Linear(12, 1, bias=False))
    x = 10 * torch.nn.functional.normalize(torch.randn(150, 12), dim=1)
    certificate = certified(model, x)
    close = certificate.radii < 3
    certificate = dataclasses.replace(certificate, radii=torch.where(close, certificate.radii, 0.0))
    assert float(certificate.radii.max()) > 2  # the global constant 1 gives a tenth of it
    assert attacked(model, x, certificate)[0] == 0
    broken, count = attacked(model, x, certificate, factor=1.05)
    assert count > 40
    assert broken > 0.9 * count


def mlp_with_clips(clip, *, bias=False):
    return torch.nn.Sequential(
        lnn.InputBound(2.0),
        lnn.SpectralLinear(10, 16, bias=bias),
        lnn.GroupSort2(),
        lnn.ValueClip(clip, radius=1.0),
        lnn.GradientGate(0.1),
        lnn.SpectralLinear(16, 16, bias=bias),
        lnn.GroupSort2(),
        lnn.ValueClip(0.9, radius=3.0),
        lnn.SpectralLinear(16, 4, bias=bias),
        lnn.GradientGate(0.1),
    )


@pytest.mark.parametrize(
    ("clip", "scale"),
    [(0.2, 1.0), (0.2, 10.0), (1.5, 1.0), (50.0, 0.1), (50.0, 10.0),
     *(pytest.param(*case, marks=pytest.mark.slow) for case in ((0.2, 0.1), (1.5, 0.1), (1.5, 10.0), (50.0, 1.0)))],
)  # fmt: skip
def test_nothing_inside_the_radii_of_random_networks_with_clips_gives_way(scale, clip):
    torch.manual_seed(3)
    model = mlp_with_clips(clip, bias=True)
    for module in model.modules():
        if getattr(module, "bias", None) is not None and isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.bias, std=0.1)
    x = scale * torch.randn(60, 10)
    certificate = certified(model, x)
    broken, count = attacked(model, x, certificate, steps=25)
    assert broken == 0
    assert count > 50


def test_a_clip_that_shortens_gives_more_than_its_global_constant():
    torch.manual_seed(0)
    model, x = mlp_with_clips(0.2), 3 * torch.randn(200, 10)
    certificate = certified(model, x)
    top = model(x).detach().double().topk(2).values
    loose = (top[:, 0] - top[:, 1]) / (math.sqrt(2) * certificate.lipschitz)
    assert float((certificate.radii / loose).median()) > 10
    network = Network(model.eval(), (10,))
    stretches, _ = network.analyse()
    assert [s.clip for s in stretches] == [2.0, 0.2, 0.9]
    assert stretches[2].constant == pytest.approx(5.0, rel=1e-3)  # from the scaling 1/0.2


def test_a_clip_with_a_path_around_it_keeps_its_global_constant():
    class Skip(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.block = torch.nn.Sequential(lnn.SpectralLinear(6, 6), lnn.ValueClip(0.1))
            self.head = lnn.SpectralLinear(6, 3)

        def forward(self, x):
            return self.head(x + self.block(x))

    torch.manual_seed(0)
    model = Skip()
    network = Network(model.eval(), (6,))
    network.input_bound = 10.0
    stretches, head = network.analyse()
    assert stretches == []
    assert head.constant == pytest.approx(2.0, rel=1e-3)
    x = torch.randn(80, 6)
    assert attacked(model, x, certified(model, x))[0] == 0


class Doubled(torch.nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class DoubledConv(torch.nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("own", [Doubled, DoubledConv])
def test_a_layer_of_your_own_is_bounded_by_its_own_rule(own, monkeypatch):
    """It looks like a dense layer or a convolution, and computes something else."""
    from lipdp.bounds import Local, rule
    from lipdp.bounds.rules import _RULES

    monkeypatch.setitem(_RULES, own, None)
    rule(own)(lambda call: Local(gains=(2 * float(torch.linalg.matrix_norm(call.module.weight.flatten(1), ord=2)),)))
    torch.manual_seed(0)
    if own is Doubled:
        model, x = torch.nn.Sequential(lnn.SpectralLinear(6, 6), Doubled(6, 3)), torch.randn(60, 6)
    else:
        layers = (DoubledConv(1, 4, 1, bias=False), torch.nn.Flatten(), lnn.SpectralLinear(36, 3))
        model, x = torch.nn.Sequential(*layers), torch.randn(60, 1, 3, 3)
    model.requires_grad_(False)
    assert attacked(model, x, certified(model, x))[0] == 0


def test_a_scale_counts_only_where_the_forward_pass_multiplies_by_it():
    class Unscaled(lnn.Constrained, torch.nn.Linear):
        """A weight under a constraint, multiplied by torch's own forward: without α."""

        constraint, scale, bias_radius = Orthogonal(), 0.1, 1.0

    torch.manual_seed(0)
    model, x = torch.nn.Sequential(lnn.SpectralLinear(6, 6), Unscaled(6, 3)), torch.randn(60, 6)
    model.requires_grad_(False)
    assert attacked(model, x, certified(model, x))[0] == 0
    head = Network(model.eval(), (6,)).analyse()[1]
    assert head.pair_norms[0, 1] == pytest.approx(float((model[1].weight[0] - model[1].weight[1]).norm()), rel=1e-5)


def test_a_clip_that_nothing_reads_plays_no_part():
    class Idle(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.clip = torch.nn.Linear(6, 3), lnn.ValueClip(1e-3)

        def forward(self, x):
            z = self.head(x)
            self.clip(z)
            return z

    torch.manual_seed(0)
    model, x = Idle(), torch.randn(60, 6)
    assert Network(model.eval(), (6,)).analyse()[0] == []
    assert attacked(model, x, certified(model, x))[0] == 0


@pytest.mark.parametrize("name", ["cnn", "resnet", "mixer", "transformer", "vgg"])
def test_the_zoo_is_certified_and_holds(name):
    torch.manual_seed(0)
    model = lipdp.models.build(name, input_shape=(1, 16, 16), num_classes=5)
    x = torch.rand(12, 1, 16, 16) ** 4
    for options in ({"convolution": "reshaped"}, {}):
        certificate = certified(model, x, [Clip()], **options)
        assert attacked(model, x, certificate, maps=[Clip()], steps=8, restarts=1)[0] == 0
    assert certificate.lipschitz <= lipdp.lipschitz_constant(model.eval(), (1, 16, 16)) * (1 + 1e-9)


@pytest.mark.parametrize("name", ["cnn", "mlp"])
@pytest.mark.parametrize("twin", [False, True])
def test_the_rounding_error_of_the_logits_is_bounded(name, twin):
    """float32 against float64, at many inputs; the difference of two logits, as the margin uses it."""
    torch.manual_seed(0)
    model = lipdp.models.build(
        name, input_shape=(1, 16, 16), num_classes=5, twin=twin, **({} if twin else {"clips": 0.3})
    )
    if twin:
        for parameter in model.parameters():
            parameter.data.abs_()  # no cancellation: sums as large as their terms
    network = Network(model.eval(), (1, 16, 16))
    x = torch.rand(300, 1, 16, 16)
    network.input_bound = float(x.flatten(1).norm(dim=1).max())
    stretches, head = network.analyse()
    norms = network.run(x, stretches)[1]
    with torch.no_grad():
        z = model(x).double()
        exact = model.double()(x.double())
    exact_norms = Network(model, (1, 16, 16)).run(x.double(), [])[1]
    assert exact_norms == []
    off = (z - exact)[:, :, None] - (z - exact)[:, None]
    largest = off.abs().amax(0)
    assert float(largest.max()) > 0
    assert bool((largest <= head.pair_errors).all())
    assert float(head.pair_errors.max()) < 1e5 * float(largest.max())
    assert all(bool((norm > 0).all()) for norm in norms)


def test_margins_within_rounding_certify_nothing():
    model = torch.nn.Sequential(lnn.InputBound(1.0), torch.nn.Linear(400, 2, bias=False))
    model[1].weight.data = torch.ones(2, 400)
    model[1].weight.data[0, 0] += 1e-5
    x = torch.ones(3, 400)
    assert certify(model, x, torch.zeros(3, dtype=torch.long)).radii.tolist() == [0, 0, 0]
    assert certify(model.double(), x.double(), torch.zeros(3, dtype=torch.long)).radii.min() > 0


def test_wrong_predictions_have_no_radius_and_count_as_errors():
    model = torch.nn.Sequential(lnn.InputBound(1.0), torch.nn.Linear(2, 2, bias=False))
    model[1].weight.data = torch.eye(2)
    certificate = certify(model, torch.tensor([[0.8, 0.0], [0.8, 0.0], [0.1, 0.0]]), torch.tensor([0, 1, 0]))
    assert certificate.correct.tolist() == [True, False, True]
    assert certificate.radii[1] == 0
    assert [certificate.accuracy(r) for r in (0.0, 0.05, 0.5, 3.0)] == pytest.approx([2 / 3, 2 / 3, 1 / 3, 0.0])


def test_the_model_is_left_as_it_was():
    model = torch.nn.Sequential(lnn.InputBound(1.0), torch.nn.Dropout(0.5), lnn.SpectralLinear(4, 3)).train()
    weight = model[2].weight.detach().clone()
    x = torch.randn(20, 4)
    state = torch.get_rng_state()
    certificate = certify(model, x, torch.zeros(20, dtype=torch.long))
    attacked(model.eval(), x, certificate)
    assert certificate.lipschitz < 1.001  # dropout does nothing in evaluation mode
    assert torch.equal(model.train()[2].weight, weight)
    assert model[2].weight.grad is None
    assert model[2].weight.requires_grad
    assert torch.equal(torch.get_rng_state(), state)


# --- what has no certificate ------------------------------------------------------------------------------------------


class Square(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(4, 2)

    def forward(self, x):
        return self.head(x * x)


def test_an_unbounded_model_says_so():
    x, y = torch.randn(5, 4), torch.zeros(5, dtype=torch.long)
    with pytest.raises(UnboundedError, match="no finite Lipschitz constant"):
        certify(Square(), x, y)
    assert certify(torch.nn.Sequential(lnn.InputBound(1.0), Square()), x, y).lipschitz < math.inf
    with pytest.raises(MixesSamplesError, match="statistics of the batch"):
        certify(torch.nn.Sequential(torch.nn.Linear(4, 2), torch.nn.BatchNorm1d(2)), x, y)


def test_a_map_without_a_constant_is_refused():
    model, x, y = torch.nn.Linear(4, 2), torch.randn(5, 4), torch.zeros(5, dtype=torch.long)
    with pytest.raises(UnboundedError, match="no finite Lipschitz constant"):
        certify(model, x, y, maps=[torch.sin])


def test_arguments_that_are_none_are_refused():
    model, x, y = torch.nn.Linear(4, 2), torch.randn(5, 4), torch.zeros(5, dtype=torch.long)
    with pytest.raises(DataError, match="one class index an input"):
        certify(model, x, y[:3])
    with pytest.raises(DataError, match="floating-point"):
        certify(model, x.long(), y)
    with pytest.raises(DataError, match="2 classes apart"):
        certify(model, x, y + 2)
    with pytest.raises(ParameterError, match="fourier or reshaped"):
        certify(model, x, y, convolution="exact")
    certificate = certify(model, x, y)
    with pytest.raises(ParameterError, match="at least 0"):
        certificate.accuracy(-1.0)
    with pytest.raises(DataError, match="two classes"):
        certificate.auroc(0.1)


# --- trained models ---------------------------------------------------------------------------------------------------


def test_an_attack_inside_a_certified_radius_is_an_error(monkeypatch):
    """The alarm goes off: with a network whose constant is said to be half of what it is."""
    monkeypatch.setattr(Network, "analyse", lambda self: _halved(analyse(self)))
    torch.manual_seed(0)
    model, x = torch.nn.Linear(6, 3), torch.randn(50, 6)
    with pytest.raises(BoundViolation, match="inside their certified radius"):
        assess(model, x, predicted(model, x), radii=[0.1], attack=True)


analyse = Network.analyse


def _halved(found):
    stretches, head = found
    return stretches, dataclasses.replace(head, constant=head.constant / 2)
