"""Attention with bounded scores: each gain is held against the Jacobian at its worst, and reached for two tokens."""

import math

import pytest
import torch
from torch import nn
from torch.func import jacrev, vmap

import lipdp
from lipdp import losses
from lipdp import nn as lnn
from lipdp.bounds import BoundGraph
from lipdp.bounds.attention import spread
from lipdp.bounds.rules import Call, Input, find_module_rule
from lipdp.errors import ParameterError, UnboundedError, UnsupportedOperationError
from lipdp.testing import falsify

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS = {  # (tokens, heads, features of a head, β, b)
    "two tokens": (2, 1, 2, 0.5, 0.4),
    "two tokens, sharp": (2, 1, 2, 3.0, 0.7),
    "two heads": (3, 2, 2, 0.5, 0.3),
    "six tokens": (6, 1, 3, 1.0, 0.4),
}


def gains(layer, tokens, width, bounds):
    """What the rule says for queries, keys and values of these norms."""
    inputs = tuple(Input((tokens, width), bound) for bound in bounds)
    call = Call("attention", layer, inputs, (tokens, width), inputs, {}, torch.float64)
    return [float(gain) for gain in find_module_rule(layer)(call).gains]


def steepest(layer, which, starts, bounds, *, steps):
    """The largest norm of the Jacobian in one input, over inputs of norm ≤ their bounds, by ascent from these."""
    points = [torch.stack(parts).requires_grad_() for parts in zip(*starts, strict=True)]
    optimiser, best = torch.optim.Adam(points, lr=0.02), 0.0
    jacobians = vmap(jacrev(lambda *parts: layer(*(part.unsqueeze(0) for part in parts))[0].flatten(), argnums=which))
    for _ in range(steps):
        optimiser.zero_grad()
        inside = [
            x * (b / x.flatten(1).norm(dim=1).clamp_min(b)).view(-1, 1, 1) for x, b in zip(points, bounds, strict=True)
        ]
        norms = torch.linalg.matrix_norm(jacobians(*inside).flatten(2), 2).nan_to_num()
        best = max(best, float(norms.detach().max()))
        (-norms.sum()).backward()
        for point in points:
            if point.grad is not None:
                point.grad.nan_to_num_()
        optimiser.step()
    return best


def starts(tokens, width, bound):
    """Gaussian ones, and the worst of the proofs: equal queries, opposite keys, values of two tokens."""
    generator = torch.Generator().manual_seed(0)
    found = [torch.randn(3, tokens, width, generator=generator, dtype=torch.float64) for _ in range(3)]
    axis = torch.zeros(tokens, width, dtype=torch.float64)
    axis[:, 0] = 1.0
    sign = torch.ones(tokens, 1, dtype=torch.float64)
    sign[1:] = -1.0
    inside, outside, tiny = 0.99 * bound * axis, 2.0 * axis, 1e-4 * axis
    one = torch.zeros(tokens, width, dtype=torch.float64)
    one[0, 0] = 1.0
    two = one.clone()
    two[1, 0] = -1.0
    found += [
        (q, k, v) for q in (inside, outside, tiny) for k in (inside * sign, outside * sign, tiny) for v in (one, two)
    ]
    return found


@pytest.mark.parametrize("which", range(3), ids=("queries", "keys", "values"))
@pytest.mark.parametrize("name", SETTINGS)
def test_no_jacobian_exceeds_the_gain_and_two_tokens_reach_it(name, which):
    tokens, heads, features, sharpness, bound = SETTINGS[name]
    layer = lnn.BoundedAttention(heads, sharpness=sharpness, bound=bound)
    bounds = (9.0, 9.0, 1.0)
    declared = gains(layer, tokens, heads * features, bounds)[which]
    found = steepest(layer, which, starts(tokens, heads * features, bound), bounds, steps=15)
    print(f"attention, {name:20s} {('queries', 'keys', 'values')[which]:8s} {found / declared:.4f}")
    assert found <= declared * (1 + 1e-9)
    if tokens == 2 or which == 2:
        assert found > 0.953 * declared


def test_short_queries_and_keys_have_smaller_gains():
    layer = lnn.BoundedAttention(sharpness=0.5, bound=0.5)
    loose, tight = gains(layer, 9, 3, (9.0, 9.0, 1.0)), gains(layer, 9, 3, (0.5, 0.1, 1.0))
    assert tight[0] < loose[0]
    assert tight[1] < loose[1]
    for which in range(2):
        assert steepest(layer, which, starts(9, 3, 0.5), (0.5, 0.1, 1.0), steps=10) <= tight[which] * (1 + 1e-9)


@pytest.mark.parametrize(("sharpness", "keys"), [(0.1, 5), (0.5, 16), (1.0, 2), (2.0, 7), (30.0, 3)])
def test_no_row_of_probabilities_is_longer_or_varies_more(sharpness, keys):
    variance, square = spread(sharpness, keys)
    generator = torch.Generator().manual_seed(0)
    scores = (2 * torch.rand(4000, keys, generator=generator, dtype=torch.float64) - 1) * sharpness
    high = (torch.arange(keys) < torch.arange(1, keys + 1).unsqueeze(1)).double()
    scores = torch.cat([scores, scores.sign() * sharpness, (2 * high - 1) * sharpness])
    p = scores.softmax(1)
    longest = float(p.square().sum(1).max())
    assert 0.999 * square < longest <= square * (1 + 1e-12)
    jacobians = torch.diag_embed(p) - p.unsqueeze(1) * p.unsqueeze(2)
    assert float(torch.linalg.eigvalsh(jacobians).max()) <= variance * (1 + 1e-12)


def block(tokens=4, width=4, **options):
    return nn.Sequential(
        lnn.InputBound(1.0),
        lnn.Residual(lnn.SpectralAttention(width, bound=0.4, **options), weight=0.5),
        nn.Flatten(),
        lnn.SpectralLinear(tokens * width, 3),
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_no_record_of_a_transformer_exceeds_its_bound(dtype):
    torch.manual_seed(0)
    report = falsify(
        block(heads=2), losses.TauCrossEntropy(8.0), (4, 4), dtype=dtype, starts=3, climbs=1, steps=8,
        weights=("given", "noisy steps", "scaled"),
    )  # fmt: skip
    print({name: round(ratio, 3) for name, ratio in report.ratios.items()})
    assert min(report.ratios.values()) > 0.2


def test_without_a_value_bound_there_is_no_constant():
    model = nn.Sequential(lnn.SpectralAttention(4, bound=0.4), nn.Flatten(), lnn.SpectralLinear(16, 3))
    assert BoundGraph(model, (4, 4)).lipschitz() == math.inf
    with pytest.raises(UnboundedError, match="InputBound"):
        lipdp.sensitivity(model, losses.TauCrossEntropy(), (4, 4))
    with pytest.raises(UnboundedError, match="no finite Lipschitz constant"):
        lipdp.certify.certify(model.eval(), torch.randn(3, 4, 4), torch.tensor([0, 1, 2]))


def test_certified_radii_hold_under_attack():
    torch.manual_seed(0)
    model = block().eval()
    x = torch.randn(12, 4, 4)
    y = model(x).argmax(1)
    radii = lipdp.certify.certify(model, x, y).radii.to(x.dtype)
    assert radii.min() >= 0
    assert radii.max() > 0
    for _ in range(20):
        moved = x.clone().requires_grad_()
        logits = model(moved)
        others = logits.masked_fill(nn.functional.one_hot(y, 3).bool(), -math.inf).amax(1)
        (others - logits.gather(1, y.unsqueeze(1)).squeeze(1)).sum().backward()
        direction = moved.grad / moved.grad.flatten(1).norm(dim=1).view(-1, 1, 1).clamp_min(1e-30)
        step = 0.999 * radii.view(-1, 1, 1) * (direction + 0.1 * torch.randn_like(direction))
        step = step * (radii / step.flatten(1).norm(dim=1).clamp_min(1e-30)).clamp(max=1).view(-1, 1, 1)
        assert torch.equal(model(x + step).argmax(1), y)


def test_heads_must_divide_the_width():
    with pytest.raises(ParameterError, match="head_width"):
        lnn.SpectralAttention(5, 2)
    assert lnn.SpectralAttention(5, 2, head_width=3)(torch.zeros(1, 2, 5)).shape == (1, 2, 5)


class LearntKeys(nn.Module):
    """Queries of the records, keys and values of the model; or records with an axis too many."""

    def __init__(self, *, axis=False):
        super().__init__()
        self.bound, self.query, self.axis = lnn.InputBound(3.0), lnn.SpectralLinear(4, 4), axis
        self.keys, self.values = (nn.Parameter(torch.randn(1, 5, 4)) for _ in range(2))
        self.attention = lnn.BoundedAttention(sharpness=1.0, bound=0.1)

    def forward(self, x):
        q = self.query(self.bound(x))
        return self.attention(q, q, q) if self.axis else self.attention(q, self.keys, self.values)


def test_keys_of_the_model_are_counted_as_they_are():
    torch.manual_seed(0)
    model = LearntKeys()
    bounds = BoundGraph(model, (6, 4)).sweep(1.0).parameters
    for _ in range(20):
        out = model(torch.randn(1, 6, 4) * 10)
        for parameter in model.parameters():
            parameter.grad = None
        along = torch.randn(out.shape)
        (out * along / along.norm()).sum().backward()
        for name, parameter in model.named_parameters():
            assert 0 < parameter.grad.norm() <= bounds[name]


def test_tokens_have_two_axes():
    with pytest.raises(UnsupportedOperationError, match=r"tokens \(N, S, d\)"):
        BoundGraph(LearntKeys(axis=True), (1, 6, 4)).sweep(1.0)
