"""Tokens, and parameters that functions use: every bound holds, and 5 % less would be broken."""

import random

import numpy
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lipdp
from lipdp import losses
from lipdp import nn as lnn
from lipdp.bounds import BoundGraph
from lipdp.errors import MixesSamplesError, UnsupportedLayerError, UnsupportedOperationError
from lipdp.testing import falsify, falsify_layer

pytestmark = pytest.mark.usefixtures("one_thread")


class Of(nn.Module):
    """A function of the input and of the parameters `w`, `v`, …, filled with orthogonal columns or with ones."""

    def __init__(self, function, *, fill=None, **shapes):
        super().__init__()
        self.functions = [function]
        for name, shape in shapes.items():
            made = torch.randn(shape) if fill is None else torch.full(shape, fill)
            if fill is None and len(shape) > 1:
                for block in made.view(-1, *shape[-2:]):
                    nn.init.orthogonal_(block)
            self.register_parameter(name, nn.Parameter(made))

    def forward(self, x):
        return self.functions[0](self, x)


def reached(report, quantity):
    ratios = [f.ratio for q, f in report.findings.items() if q.startswith(quantity) and "bound" not in q]
    return max(ratios)


GAIN = "Lipschitz constant (gradient"
W, B = "gradient of layer.w", "gradient of layer.b"

# name → (layer, shape, radius, what an attack must reach to 95 %)
LAYERS = {
    "F.linear": (lambda: Of(lambda m, x: F.linear(x, m.w, m.b), w=(4, 4), b=(4,)), (4,), (GAIN, W, B)),
    "F.linear rows": (lambda: Of(lambda m, x: F.linear(x, m.w, m.b), w=(3, 3), b=(3,)), (5, 3), (GAIN, W, B)),
    "x @ w": (lambda: Of(lambda m, x: x @ m.w, w=(4, 4)), (4,), (GAIN, W)),
    "w @ x": (lambda: Of(lambda m, x: m.w @ x, w=(3, 3)), (3, 2), (GAIN, W)),
    "heads": (lambda: Of(lambda m, x: x.unsqueeze(1) @ m.w, w=(3, 4, 4), fill=1.0), (2, 4), (GAIN, W)),
    "w of every head": (lambda: Of(lambda m, x: x @ m.w, w=(3, 4, 4)), (3, 2, 4), (GAIN, W)),
    "einsum": (lambda: Of(lambda m, x: torch.einsum("bti,ij->btj", x, m.w), w=(3, 3)), (2, 3), (GAIN, W)),
    "einsum ...": (lambda: Of(lambda m, x: torch.einsum("...i,ji->...j", x, m.w), w=(3, 3)), (2, 3), (GAIN, W)),
    "einsum heads": (lambda: Of(lambda m, x: torch.einsum("bhi,hij->bhj", x, m.w), w=(2, 3, 3)), (2, 3), (GAIN, W)),
    "einsum all": (
        lambda: Of(lambda m, x: torch.einsum("bij,ijk->bk", x, m.w), w=(2, 3, 1), fill=1.0),
        (2, 3),
        (GAIN, W),
    ),
    "F.conv1d": (
        lambda: Of(lambda m, x: F.conv1d(x, m.w, m.b, padding="same"), w=(1, 1, 1), b=(1,)),
        (1, 6),
        (GAIN, W, B),
    ),
    "F.conv2d": (
        lambda: Of(lambda m, x: F.conv2d(x, m.w, stride=2, dilation=1), w=(2, 1, 2, 2)),
        *((1, 4, 4), (GAIN, W)),
    ),
    "tied": (lambda: Of(lambda m, x: F.linear(F.linear(x, m.w), m.w.t()), w=(4, 4)), (4,), (GAIN, W)),
    "low rank": (lambda: Of(lambda m, x: F.linear(x, m.w @ m.b), w=(4, 4), b=(4, 4)), (4,), (GAIN, W, B)),
    "frozen + low rank": (
        lambda: Of(lambda m, x: F.linear(x, 0 * torch.eye(4, dtype=x.dtype) + 2 * (m.w @ m.b)), w=(4, 1), b=(1, 4)),
        *((4,), (GAIN, W, B)),
    ),
    "multiple": (lambda: Of(lambda m, x: x @ (m.w / 4 * 3).mT, w=(3, 3)), (3,), (GAIN, W)),
    "slice": (lambda: Of(lambda m, x: x @ m.w[1:], w=(5, 4)), (4,), (W,)),
    "widened": (lambda: Of(lambda m, x: x + m.w.unsqueeze(0).expand(1, 3, 4), w=(1, 4)), (3, 4), (GAIN, W)),
    "class token": (lambda: Of(lambda m, x: m.w.expand(x.shape[0], 3, 4) + x, w=(1, 1, 4)), (3, 4), (GAIN, W)),
    "class token, repeat": (
        lambda: Of(lambda m, x: torch.cat([m.w.repeat(x.size(0), 2, 1), x], 1), w=(1, 1, 4)),
        (3, 4),
        (W,),
    ),
    "expand": (lambda: Of(lambda m, x: x.expand(-1, 3, 4)), (1, 4), (GAIN, "value of expand")),
    "repeat": (lambda: Of(lambda m, x: x.repeat(1, 3)), (2,), (GAIN, "value of repeat")),
    "matmul of activations": (lambda: Of(lambda m, x: x @ x.transpose(1, 2)), (1, 1), (GAIN, "value of matmul")),
    "square": (lambda: Of(lambda m, x: x**2), (1,), (GAIN, "value of pow_1")),
    "norm": (lambda: Of(lambda m, x: x.norm(dim=1, keepdim=True)), (3,), (GAIN, "value of steady_norm")),
    "RMSNorm": (lambda: nn.RMSNorm(3, eps=100.0), (3,), (GAIN, "gradient of layer.weight")),
    "erf": (lambda: Of(lambda m, x: torch.erf(0.05 * x)), (2,), (GAIN, "value of erf")),
    "atan": (lambda: Of(lambda m, x: torch.atan(0.05 * x.clone())), (2,), (GAIN, "value of atan")),
    "double": (lambda: Of(lambda m, x: x.double()), (2,), ("value of double",)),
    "maximum": (lambda: Of(lambda m, x: torch.maximum(x, -x)), (3,), ("cotangent at neg",)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_no_attack_breaks_a_bound_and_one_reaches_it(name):
    make, shape, quantities = LAYERS[name]
    torch.manual_seed(0)
    layer = make().double()
    report = falsify_layer(layer, shape, weights=("given",), starts=6, climbs=3, steps=12)
    print(f"{name:28s} {report.worst:.6f}")
    for quantity in quantities:
        assert reached(report, quantity) > 0.953, (quantity, {q: f.ratio for q, f in report.findings.items()})
    weights = ("given", "noisy steps", "rank one") if list(layer.parameters()) else ("given",)
    falsify_layer(layer, shape, dtype=torch.float32, weights=weights, starts=2, climbs=1, steps=0)


TABLES = {
    "Embedding": (lambda: nn.Embedding(6, 4), (5,)),
    "Embedding, two axes": (lambda: nn.Embedding(6, 3), (2, 3)),
    "EmbeddingBag mean": (lambda: nn.EmbeddingBag(6, 4), (5,)),
    "EmbeddingBag sum": (lambda: nn.EmbeddingBag(6, 4, mode="sum", padding_idx=1), (5,)),
    "EmbeddingBag max": (lambda: nn.EmbeddingBag(6, 4, mode="max"), (5,)),
    "F.embedding": (lambda: Of(lambda m, x: F.embedding(x, m.weight), weight=(6, 4)), (5,)),
    "positions": (lambda: Positions(), (3, 4)),
}


class Positions(nn.Module):
    """A trained table of positions, of which one is used twice."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(5, 4)
        self.register_buffer("places", torch.tensor([0, 1, 1]))

    @property
    def weight(self):
        return self.table.weight

    def forward(self, x):
        return x + self.table(self.places).unsqueeze(0)


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_bounded_and_an_attack_reaches_it(name):
    make, shape = TABLES[name]
    torch.manual_seed(0)
    layer = make().double()
    with torch.no_grad():
        layer.weight.copy_(0.1 * torch.randn_like(layer.weight))
        layer.weight[0] = 0.5  # the longest row, and one along which all entries are the widest
    report = falsify_layer(layer, shape, weights=("given",))
    print(f"{name:28s} {report.worst:.6f}")
    assert max(f.ratio for q, f in report.findings.items() if q.startswith("gradient of")) > 0.953
    if name != "positions":
        assert max(f.ratio for q, f in report.findings.items() if q.startswith("value of")) > 0.953
    falsify_layer(layer, shape, dtype=torch.float32, weights=("given", "noisy steps"), starts=2)


def test_a_frozen_table_and_the_layers_behind_it():
    torch.manual_seed(0)
    table = nn.Embedding(20, 6)
    model = nn.Sequential(table, nn.Flatten(), lnn.SpectralLinear(24, 8), lnn.GroupSort2(), lnn.SpectralLinear(8, 3))
    assert falsify(model, losses.TauCrossEntropy(), (4,), starts=4).worst <= 1
    table.requires_grad_(False)
    report = falsify(model, losses.TauCrossEntropy(), (4,), starts=4)
    assert "gradient of 0.weight" not in report.findings
    assert report.worst <= 1
    assert lipdp.lipschitz_constant(model, (4,)) >= 2 * float(table.weight.norm(dim=1).max()) * 0.999


@pytest.mark.parametrize(
    ("layer", "shape", "reason"),
    [
        (nn.Embedding(5, 2, max_norm=1.0), (3,), "max_norm"),
        (nn.Embedding(5, 2, scale_grad_by_freq=True), (3,), "couples records"),
        (nn.EmbeddingBag(5, 2, sparse=True), (3,), "sparse"),
        (Of(lambda m, x: F.linear(x, torch.exp(m.w)), w=(3, 3)), (3,), "before they meet"),
        (Of(lambda m, x: F.linear(x, 1.0 / m.w), w=(3, 3)), (3,), "before they meet"),
        (Of(lambda m, x: F.linear(x, m.w * m.w), w=(3, 3)), (3,), "before they meet"),
        (Of(lambda m, x: F.linear(x, m.w[torch.tensor([0, 0, 0])]), w=(3, 3)), (3,), "before they meet"),
        (Of(lambda m, x: x @ x.t()), (3,), "first axis"),
        (Of(lambda m, x: x**3), (3,), "squares"),
        (Of(lambda m, x: torch.einsum("bi,bj->ij", x, x)), (3,), "first axis"),
        (Of(lambda m, x: torch.einsum("bi,ij->b", x, m.w), w=(3, 3)), (3,), "sums over a label"),
    ],
)
def test_what_has_no_bound_is_refused_with_the_reason(layer, shape, reason):
    with pytest.raises((UnsupportedLayerError, UnsupportedOperationError, MixesSamplesError), match=reason):
        BoundGraph(layer, shape, input_bound=1.0)


def test_weights_met_by_functions_are_refused_where_sums_are_in_bfloat16():
    model = nn.Sequential(lnn.InputBound(1.0), Of(lambda m, x: F.linear(x, m.w.t()), w=(3, 3)))
    with pytest.raises(UnsupportedLayerError, match="bfloat16"):
        BoundGraph(model, (3,), dtype=torch.bfloat16)


def test_einsums_of_operands_with_one_entry_for_many_are_refused():
    layer = Of(lambda m, x: torch.einsum("bhi,hij->bhj", x, m.w), w=(2, 3, 3))
    with pytest.raises(UnsupportedOperationError, match="sizes"):
        BoundGraph(layer, (1, 3), input_bound=1.0)


@pytest.mark.parametrize("rows", [[0, 0, 0, 0], ([1, 1], slice(None))])
def test_a_row_that_a_list_may_name_twice_is_refused(rows):
    """Four uses of one row make its gradient twice as long; by entries alone, as of a slice, the gain would be 1."""

    class Picked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(10, 8))

        def forward(self, x):
            return x @ self.weight[rows].t()

    with pytest.raises(UnsupportedOperationError, match="before they meet the input"):
        lipdp.sensitivity(nn.Sequential(lnn.InputBound(1.0), Picked()), lipdp.losses.TauCrossEntropy(1.0), (8,))


class Depth(nn.Module):
    """Stochastic depth by a number that Python or torch draws."""

    def __init__(self, drawn):
        super().__init__()
        self.branch, self.drawn = lnn.SpectralLinear(3, 3), [drawn]

    def forward(self, x):
        return x if self.training and self.drawn[0]() < 0.5 else x + self.branch(x)


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.layer = kind(3, 3, batch_first=True)

    def forward(self, x):
        return self.layer(x)[0][:, -1]


@pytest.mark.parametrize(
    "drawn",
    [random.random, lambda: float(torch.rand(())), lambda: numpy.random.rand()],  # noqa: NPY002  (as scripts do)
    ids=["python", "torch", "numpy"],
)
def test_random_numbers_drawn_in_the_forward_pass_are_named(drawn):
    state = random.getstate()
    with pytest.raises(UnsupportedOperationError, match="draws random numbers"):
        BoundGraph(Depth(drawn), (3,), input_bound=1.0)
    assert random.getstate() == state


@pytest.mark.parametrize(
    ("layer", "shape", "reason"),
    [
        (Recurrent(nn.GRU), (4, 3), "recurrent"),
        (Recurrent(nn.LSTM), (4, 3), "recurrent"),
        (nn.GRUCell(3, 3), (3,), "recurrent"),
        (nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), (3, 4), "dot-product attention"),
        (nn.RMSNorm(3, eps=0.0), (3,), "eps > 0"),
    ],
)
def test_layers_without_a_bound_say_why(layer, shape, reason):
    with pytest.raises(UnsupportedLayerError, match=reason):
        BoundGraph(nn.Sequential(layer), shape, input_bound=1.0)
