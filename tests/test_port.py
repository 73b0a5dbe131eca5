"""from_torch and constrain: plain nets become constrained ones with sound, finite bounds, and what can't is named."""

from __future__ import annotations

import copy
import math
import pickle

import kit
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lipdp
from lipdp import errors, losses, testing
from lipdp import nn as lnn
from lipdp.nn.counterparts import COUNTERPARTS
from lipdp.nn.port import porting_table

pytestmark = pytest.mark.usefixtures("one_thread")


class LeNet(nn.Module):
    """As scripts write it: functions, a view, dropout, log-probabilities."""

    def __init__(self, dense=16):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 4, 5), nn.Conv2d(4, 6, 3, padding=1)
        self.drop = nn.Dropout2d()
        self.fc1, self.fc2 = nn.Linear(6 * 3 * 3, dense), nn.Linear(dense, 10)

    def forward(self, x):
        x = F.relu(F.max_pool2d(self.conv1(x), 2))
        x = F.relu(F.max_pool2d(self.drop(self.conv2(x)), 2))
        x = x.view(x.size(0), -1)
        x = F.dropout(F.relu(self.fc1(x)), training=self.training)
        return F.log_softmax(self.fc2(x), dim=1)


def vgg():
    blocks = []
    for c, d in ((3, 4), (4, 8)):
        blocks += [nn.Conv2d(c, d, 3, padding=1), nn.BatchNorm2d(d), nn.ReLU(inplace=True), nn.MaxPool2d(2)]
    head = nn.Sequential(nn.Linear(8, 8), nn.ReLU(True), nn.Dropout(), nn.Linear(8, 10))
    return nn.Sequential(nn.Sequential(*blocks), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)


class Block(nn.Module):
    def __init__(self, c, d, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(c, d, 3, stride, 1, bias=False), nn.BatchNorm2d(d)
        self.conv2, self.bn2 = nn.Conv2d(d, d, 3, 1, 1, bias=False), nn.BatchNorm2d(d)
        self.relu = nn.ReLU(inplace=True)
        self.down = nn.Sequential(nn.Conv2d(c, d, 1, stride, bias=False), nn.BatchNorm2d(d)) if c != d else None

    def forward(self, x):
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += x if self.down is None else self.down(x)
        return self.relu(out)


class ResNet8(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.bn, self.relu = nn.Conv2d(3, 4, 3, 1, 1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.layers = nn.Sequential(Block(4, 4, 1), Block(4, 6, 2), Block(6, 8, 2))
        self.fc = nn.Linear(8, 10)

    def forward(self, x):
        x = self.layers(self.pool(self.relu(self.bn(self.stem(x)))))
        return self.fc(x.mean((2, 3)))


def mlp():
    return nn.Sequential(
        *(nn.BatchNorm1d(12), nn.Linear(12, 8), nn.LayerNorm(8), nn.GELU(), nn.Dropout(0.1)),
        *(nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 10), nn.Softmax(dim=1)),
    )


def series():
    return nn.Sequential(
        *(nn.Conv1d(2, 4, 3, padding="same", padding_mode="reflect"), nn.GroupNorm(2, 4), nn.LeakyReLU()),
        *(nn.MaxPool1d(2), nn.Conv1d(4, 6, 3, groups=2), nn.ELU(), nn.AdaptiveAvgPool1d(1), nn.Flatten()),
        nn.Linear(6, 10),
    )


class Tokens(nn.Module):
    """Dense layers on (N, T, d), a concatenation, one layer used twice."""

    def __init__(self):
        super().__init__()
        self.embed, self.mix, self.norm, self.head = (
            nn.Linear(4, 6),
            nn.Linear(6, 6),
            nn.LayerNorm(6),
            nn.Linear(12, 10),
        )

    def forward(self, x):
        x = F.gelu(self.embed(x))
        x = x + self.mix(F.gelu(self.mix(self.norm(x))))
        return self.head(torch.cat([x.mean(1), x.mean(dim=1)], 1))


NETS = {
    "lenet": (LeNet, (1, 16, 16)),
    "vgg": (vgg, (3, 8, 8)),
    "resnet8": (ResNet8, (3, 16, 16)),
    "mlp": (mlp, (12,)),
    "series": (series, (2, 10)),
    "tokens": (Tokens, (5, 4)),
}


@pytest.fixture(params=NETS)
def net(request):
    make, shape = NETS[request.param]
    torch.manual_seed(1)
    return make(), shape


def test_a_ported_net_has_finite_bounds_and_the_constant_1_over_c(net):
    model, shape = net
    ported = lnn.from_torch(model, input_shape=shape)
    c = lipdp.models.default_input_bound(shape)
    assert lipdp.lipschitz_constant(ported, input_shape=shape) <= (1 + 1e-3) / c
    bounds = lipdp.sensitivity(ported, losses.TauCrossEntropy(8.0), input_shape=shape)
    assert 0 < bounds.total < 100
    assert all(0 < delta <= 2.001 for delta in bounds.values())
    assert ported(torch.randn(0, *shape)).shape == (0, 10)


def test_no_attack_breaks_a_ported_nets_bounds(net):
    model, shape = net
    ported = lnn.from_torch(model, input_shape=shape, bias=True)
    loss = losses.TauCrossEntropy(8.0)
    testing.falsify(ported, loss, shape, weights=("given",), targets=torch.arange(3), starts=2, climbs=1, steps=2)


def test_a_ported_net_trains_privately(net):
    model, shape = net
    before = copy.deepcopy(model.state_dict())
    ported = lnn.from_torch(model, input_shape=shape)
    data = torch.utils.data.TensorDataset(torch.randn(64, *shape), torch.randint(10, (64,)))
    engine, *made = kit.private(ported, data, expected_batch_size=16, steps=3)
    kit.train(*made)
    assert engine.steps_taken == 3
    layers = [m for m in ported.modules() if isinstance(m, lnn.Constrained)]
    assert layers
    assert all(m.constraint.contains(m.weight_matrix()) for m in layers)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_ported_net_is_exported_and_pickled_as_any_other(net):
    model, shape = net
    ported = lnn.from_torch(model, input_shape=shape).double()
    x = torch.rand(3, *shape, dtype=torch.float64)
    torch.testing.assert_close(lnn.to_torch(ported)(x), ported(x), atol=1e-4, rtol=0)
    assert torch.equal(pickle.loads(pickle.dumps(ported))(x), ported(x))


class Reshaped(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.how, self.conv, self.fc = how, nn.Conv2d(1, 2, 3), nn.Linear(8, 3)

    def forward(self, x):
        return self.fc(self.how(self.conv(x)))


@pytest.mark.parametrize(
    "how",
    [
        lambda x: x.view(-1, 8), lambda x: x.view(x.shape[0], -1), lambda x: x.reshape(x.size()[0], 8),
        lambda x: torch.flatten(x, 1), lambda x: x.flatten(start_dim=1), lambda x: torch.reshape(x, (x.size(0), -1)),
    ],
)  # fmt: skip
def test_every_way_to_flatten_takes_an_empty_batch_then(how):
    ported = lnn.from_torch(Reshaped(how), input_shape=(1, 4, 4))
    assert [type(m).__name__ for m in ported][2] == "Flatten"
    assert ported(torch.rand(0, 1, 4, 4)).shape == (0, 3)


def test_weights_are_the_nearest_ones_and_names_stay():
    model = ResNet8()
    ported = lnn.from_torch(model, input_shape=(3, 16, 16))
    new = ported.get_submodule("layers.1.down.0")
    kernel = model.layers[1].down[0].weight
    expected = lipdp.constraints.Orthogonal().project(kernel.detach().view(6, 4))
    torch.testing.assert_close(new.weight.view(6, 4), expected)
    kept = {name for name, p in model.named_parameters() if p.dim() > 1}
    assert kept == {name for name, _ in ported.named_parameters()}


def test_a_chain_comes_back_as_a_sequential_that_prints():
    ported = lnn.from_torch(LeNet(), input_shape=(1, 16, 16), input_bound=3.0)
    assert isinstance(ported, nn.Sequential)
    assert ported.input_bound.bound == 3.0
    kinds = [type(m).__name__ for m in ported]
    assert kinds[1:4] == ["SpectralConv2d", "ScaledL2NormPool2d", "LayerCentering"]
    assert "Dropout" not in str(ported)
    assert not any("Softmax" in k for k in kinds)
    same = copy.deepcopy(ported)
    x = torch.rand(2, 1, 16, 16)
    assert torch.equal(same(x), ported(x))


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_kept_and_the_function_is_1_over_c_lipschitz_where_it_is_tried(training):
    model = ResNet8().train(training)
    ported = lnn.from_torch(model, input_shape=(3, 16, 16), input_bound=2.0).double()
    assert all(m.training == training for m in ported.modules())
    x = torch.randn(64, 3, 16, 16, dtype=torch.float64)
    y = x + 0.1 * torch.randn_like(x)
    moved = (ported(x) - ported(y)).norm(dim=1) / (x - y).flatten(1).norm(dim=1)
    assert 0 < moved.max() <= 0.5


def test_the_table_says_what_became_what_and_why():
    lines = {line.split()[0]: line for line in str(porting_table(ResNet8(), (3, 16, 16))).splitlines()}
    assert "shortens inputs longer than" in lines["input_bound"]
    assert "no bias, which costs noise" in lines["stem"]
    assert "overlap" in lines["pool"]
    assert "ScaledL2NormPool2d" in lines["pool"]
    assert "LayerCentering" in lines["layers.0.bn1"]
    assert "averaged" in lines["add"]
    assert lines["relu"].split()[2] == "left"
    assert lines["layers.0.relu"].split()[2] == "GroupSort2"
    odd = {r.name: r for r in porting_table(LeNet(dense=15), (1, 16, 16)).rows}
    assert odd["relu_2"].becomes == "ReLU"
    assert "15 channels are odd" in odd["relu_2"].why
    assert odd["drop"].becomes == odd["log_softmax"].becomes == "left out"


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.up, self.wide = nn.LSTM(4, 4), nn.ConvTranspose1d(3, 3, 2), nn.Conv1d(3, 3, 2, dilation=2)

    def forward(self, x):
        return torch.fft.fft(self.wide(self.up(self.rnn(x)[0]))).real


def test_all_that_has_no_counterpart_is_named_in_one_error():
    with pytest.raises(errors.UnsupportedOperationError) as caught:
        lnn.from_torch(Odd(), input_shape=(3, 4))
    for part in ("'rnn' (LSTM)", "'up' (ConvTranspose1d)", "'wide' (Conv1d): dilation=(2,)", "fft_fft", "keep="):
        assert part in str(caught.value)


class Branches(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class Holder(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.fc = inner, nn.Linear(4, 4)

    def forward(self, x):
        return self.fc(self.inner(x))


class Third(nn.Module):
    def forward(self, x):
        return x / (3 + x.abs().sum(1, keepdim=True) * 0)


def test_what_cannot_be_ported_is_refused_by_name():
    with pytest.raises(errors.UnsupportedOperationError, match=r"cannot trace 'inner' \(Branches\)"):
        lnn.from_torch(Holder(Branches()), input_shape=(4,))
    with pytest.raises(errors.ParameterError, match=r"does not take inputs of shape \(5,\)"):
        lnn.from_torch(Holder(nn.Identity()), input_shape=(5,))
    with pytest.raises(errors.ParameterError, match="sizes of one sample"):
        lnn.from_torch(Holder(nn.Identity()), input_shape=4)
    hooked = Holder(nn.ReLU())
    hooked.fc.register_forward_hook(lambda *args: None)
    with pytest.raises(errors.UnsupportedLayerError, match=r"'fc'.*hooks"):
        lnn.from_torch(hooked, input_shape=(4,))
    spectral = Holder(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)))
    for port in (lambda: lnn.from_torch(spectral, input_shape=(4,)), lambda: lnn.constrain(spectral)):
        with pytest.raises(errors.UnsupportedLayerError, match="reparametrised"):
            port()


def test_a_kept_module_and_layers_of_lipdp_stay():
    ported = lnn.from_torch(Holder(Third()), input_shape=(4,), keep=[Third])
    assert type(ported.inner) is Third
    own = nn.Sequential(lnn.InputBound(2.0), lnn.Residual(nn.Sequential(nn.Linear(4, 4), nn.ReLU())), nn.Linear(4, 3))
    ported = lnn.from_torch(own, input_shape=(4,))
    assert [type(m).__name__ for m in ported] == ["InputBound", "Residual", "SpectralLinear"]
    assert isinstance(ported[1].block[0], lnn.SpectralLinear)
    assert lipdp.lipschitz_constant(ported, input_shape=(4,)) <= 1 + 1e-3


@pytest.mark.parametrize(("pool", "factor"), [(nn.MaxPool2d(2, 1), 0.5), (nn.AvgPool2d(3, 1, 1), 1.0)])
def test_pooling_that_overlaps_is_scaled_to_1(pool, factor):
    ported = lnn.from_torch(nn.Sequential(pool), input_shape=(2, 6, 6), input_bound=1.0)
    assert ported[2].factor == factor
    assert lipdp.lipschitz_constant(ported, input_shape=(2, 6, 6)) <= 1 + 1e-3


def test_products_are_kept_and_said_to_raise_the_constant():
    class Doubled(nn.Module):
        def forward(self, x):
            return 2 * x

    ported = lnn.from_torch(Doubled(), input_shape=(4,), input_bound=1.0)
    assert 2 <= lipdp.lipschitz_constant(ported, input_shape=(4,)) < 2.001
    assert "may exceed 1/c" in str(porting_table(Doubled(), (4,)))


def test_constrain_keeps_the_architecture():
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Sequential(nn.Linear(4, 3)))
    inner = model[2]
    weight = model[0].weight.detach().clone()
    same = lnn.constrain(model, input_shape=(6,))
    assert same is model
    assert model[3] is inner
    assert model[0].bound == lipdp.models.default_input_bound((6,))
    torch.testing.assert_close(model[1].weight, lipdp.constraints.Orthogonal().project(weight))
    assert isinstance(inner[0], lnn.SpectralLinear)
    assert model[1].bias is not None
    assert lnn.constrain(model) is model
    assert len(model) == 4
    assert lipdp.lipschitz_constant(model, input_shape=(6,)) <= 1 + 1e-3
    wrapped = lnn.constrain(Holder(nn.Conv1d(2, 2, 1)))
    assert wrapped.input_bound.bound == 1.0
    assert isinstance(wrapped.model.inner, lnn.SpectralConv1d)


@pytest.mark.parametrize("order", ["relu pool", "pool relu"])
@pytest.mark.parametrize("shape", [(4, 6, 6), (4, 6)])
def test_an_activation_beside_a_norm_pooling_is_left_out(order, shape):
    pool = nn.MaxPool2d(2) if len(shape) == 3 else nn.MaxPool1d(2)
    layers = {"relu": nn.ReLU(), "pool": pool}
    model = nn.Sequential(*(layers[name] for name in order.split()), nn.Dropout(), nn.Flatten(), nn.ReLU())
    ported = lnn.from_torch(model, input_shape=shape)
    kinds = [type(m).__name__ for m in ported]
    assert "ScaledL2NormPool2d" in kinds
    assert "GroupSort2" not in kinds
    assert ported(torch.rand(2, *shape)).shape == model(torch.rand(2, *shape)).shape


def test_every_counterpart_is_1_lipschitz():
    """A layer of each class between two dense ones, where it takes vectors."""
    tried = 0
    for kind in COUNTERPARTS:
        try:
            layer = kind()
        except TypeError:
            continue
        with torch.random.fork_rng():
            model = nn.Sequential(nn.Linear(4, 4), layer, nn.Linear(4, 4))
            try:
                ported = lnn.from_torch(model, input_shape=(4,), input_bound=1.0)
            except (errors.UnsupportedOperationError, errors.ParameterError):
                continue
        assert lipdp.lipschitz_constant(ported, input_shape=(4,)) <= 1 + 1e-3, kind
        tried += 1
    assert tried > 15


def test_constrain_refuses_what_it_would_have_to_change():
    with pytest.raises(errors.UnsupportedLayerError, match=r"'0' \(Conv1d\): padding_mode='reflect'"):
        lnn.constrain(nn.Sequential(nn.Conv1d(1, 1, 3, padding=1, padding_mode="reflect")))
    with pytest.raises(errors.UnsupportedLayerError, match="dilation"):
        lnn.constrain(nn.Sequential(nn.Conv1d(1, 1, 3, dilation=2)))


def test_the_twins_of_the_zoo_can_be_ported():
    for name in ("cnn", "resnet", "mixer"):
        twin = lipdp.models.build(name, input_shape=(1, 8, 8), num_classes=4, twin=True)
        ported = lnn.from_torch(twin, input_shape=(1, 8, 8), input_bound=1.0)
        assert lipdp.lipschitz_constant(ported, input_shape=(1, 8, 8)) <= 1 + 1e-3, name


def test_errors_that_find_no_bound_name_both():
    with pytest.raises(errors.UnboundedError, match=r"lipdp.nn.from_torch\(model, input_shape=.*lipdp.nn.constrain"):
        lipdp.sensitivity(nn.Linear(4, 3), losses.TauCrossEntropy(), input_shape=(4,))


@pytest.mark.parametrize(
    ("shape", "options", "centred", "bound"),
    [
        ((64,), {}, True, 2.0),
        ((8,), {}, False, math.sqrt(8) / 2),
        ((1, 8, 8), {}, False, 2.0),
        ((1, 8, 8), {"centre": True}, True, 2.0),
        ((64,), {"input_bound": 3.0}, False, 3.0),
        ((64,), {"centre": False}, False, 4.0),
    ],
)
def test_wide_rows_are_centred_in_front_of_the_bound(shape, options, centred, bound):
    net = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), 4))
    ported = lnn.from_torch(net, shape, **options)
    assert ported.input_bound.bound == pytest.approx(bound)
    assert any(isinstance(m, lnn.LayerCentering) for m in ported) is centred
    assert lipdp.lipschitz_constant(ported, shape) <= 1.001 / bound
    huge = torch.full((2, *shape), 1e30)
    assert bool(ported(huge).isfinite().all())
    if centred:
        x = torch.randn(5, *shape)
        assert torch.allclose(ported(x), ported(x + 0.1), atol=1e-5)
