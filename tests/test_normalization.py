"""Claims that hold in exact arithmetic must hold in float32: normalisations, projections, sums over a batch."""

import math

import pytest
import torch
from deel import torchlip
from torch import nn
from torch.nn import functional as F

import lipdp
from lipdp import nn as lnn
from lipdp.bounds import Local
from lipdp.bounds.rounding import batch_slack
from lipdp.bounds.rules import _RULES
from lipdp.certify import certify
from lipdp.errors import LipdpError, UnboundedError, UnsupportedLayerError, UnsupportedOperationError
from lipdp.nn.gates import clip_norm
from lipdp.testing.inputs import ProbeLoss

pytestmark = pytest.mark.usefixtures("one_thread")


# --- records at which torch's kernels cancel -------------------------------------------------------------------------


def worst_records(shape):
    """Large means, constants, huge identifiers, 8-bit pixels: (N, *shape)."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(shape, generator=generator)
    ones = torch.ones(shape)
    one_pixel = ones.clone() * 254
    one_pixel.view(-1)[0] = 255
    ids = 1e7 + torch.arange(noise.numel(), dtype=torch.float32).view(shape)
    records = [254 * ones, (254 + noise).round(), one_pixel, 1e6 * ones, 1e6 * ones + noise, ids, -ids, 3e4 * noise]
    return torch.stack([*records, 1e-20 * noise, 1e12 * ones + 1e5 * noise, 0 * ones, noise])


def layouts(x):
    """The same records in memory as users hold them."""
    strided = torch.stack([x, -x], -1)[..., 0]
    yield from (x, strided, x.flip(0).transpose(0, 1).contiguous().transpose(0, 1))
    if x.dim() == 4 and x.shape[1] > 1:
        yield x.to(memory_format=torch.channels_last)


def ratio(model, x, declared, *, autocast=False):
    """The largest per-record gradient of any parameter over Δ, for two cotangents of norm 1."""
    worst = 0.0
    for record in x.split(1):
        record = record.requires_grad_()  # without its gradient torch 2.13 crashes in GroupNorm in channels_last
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = model(record).flatten(1)
        wrt = [record, *model.parameters()]
        for sign in (False, True):
            cotangent = torch.ones_like(out)
            cotangent[:, ::2] *= -1 if sign else 1
            cotangent /= out.shape[1] ** 0.5 * (1.01 if autocast else 1)
            grads = torch.autograd.grad(out, wrt, cotangent, retain_graph=not sign)[1:]
            for (name, _), g in zip(model.named_parameters(), grads, strict=True):
                worst = max(worst, float(g.double().norm() / declared[name]))
    return worst


def network(norm, shape, bound=None):
    torch.manual_seed(0)
    head = nn.Sequential(nn.Flatten(), lnn.SpectralLinear(math.prod(shape), 4, bias=True))
    return nn.Sequential(*([] if bound is None else [lnn.InputBound(bound)]), norm, head)


SAFE = {
    "GroupNorm": (lambda eps: lnn.GroupNorm(1, 3, eps), (3, 8, 8)),
    "GroupNorm without parameters": (lambda eps: lnn.GroupNorm(3, 3, eps, affine=False), (3, 8, 8)),
    "LayerNorm": (lambda eps: lnn.LayerNorm(24, eps), (24,)),
    "LayerNorm of tokens": (lambda eps: lnn.LayerNorm((4, 6), eps), (5, 4, 6)),
}
TORCH = {
    "GroupNorm": (lambda eps: nn.GroupNorm(1, 3, eps), (3, 8, 8)),
    "LayerNorm": (lambda eps: nn.LayerNorm(24, eps), (24,)),
    "InstanceNorm": (lambda eps: nn.InstanceNorm2d(3, eps, affine=True), (3, 8, 8)),
}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("eps", [1e-12, 1e-5, pytest.param(1.0, marks=pytest.mark.slow)])  # the smaller, the worse
@pytest.mark.parametrize("name", SAFE)
def test_the_normalisations_of_lipdp_hold_at_every_record(name, eps, autocast):
    make, shape = SAFE[name]
    for bound in (None, 255 * math.prod(shape) ** 0.5):
        model = network(make(eps), shape, bound)
        dtype = torch.bfloat16 if autocast else None
        declared = lipdp.sensitivity(model, ProbeLoss(), shape, forward_dtype=dtype)
        cap = next(node.value for node in declared.nodes if node.kind in ("GroupNorm", "LayerNorm"))
        for x in layouts(worst_records(shape)):
            with torch.no_grad():
                assert model[:-1](x).double().flatten(1).norm(dim=1).max() <= cap
            assert ratio(model, x, declared, autocast=autocast) <= 1


@pytest.mark.parametrize("eps", [1e-5, pytest.param(0.1, marks=pytest.mark.slow), 10.0])
@pytest.mark.parametrize("name", TORCH)
def test_the_normalisations_of_torch_hold_or_are_refused(name, eps):
    """The old rule accepted all of these, and 8-bit pixels in channels_last broke it by more than a hundred."""
    make, shape = TORCH[name]
    accepted = []
    for bound in (0.01, 1.0, 30.0, 255 * math.prod(shape) ** 0.5, 1e7 * math.prod(shape) ** 0.5):
        model = network(make(eps), shape, bound)
        try:
            declared = lipdp.sensitivity(model, ProbeLoss(), shape)
        except UnsupportedLayerError as refusal:
            assert "lipdp.nn." in str(refusal)  # noqa: PT017
            continue
        accepted.append(bound)
        for x in layouts(worst_records(shape)):
            assert ratio(model, x, declared) <= 1
    assert accepted[:1] == [0.01]
    assert len(accepted) < 4
    with pytest.raises(UnsupportedLayerError, match=r"lipdp\.nn\."):
        lipdp.sensitivity(network(make(eps), shape, 0.01), ProbeLoss(), shape, forward_dtype=torch.bfloat16)


def test_a_norm_of_torch_behind_a_layer_is_bounded_by_what_the_layer_lets_through():
    for bound, fine in ((0.01, True), (1e4, False)):
        model = nn.Sequential(lnn.InputBound(bound), lnn.SpectralLinear(6, 6), nn.LayerNorm(6))
        if fine:
            assert lipdp.sensitivity(model, ProbeLoss(), (6,)).total < math.inf
        else:
            with pytest.raises(UnboundedError):
                lipdp.sensitivity(model, ProbeLoss(), (6,))
    with pytest.raises(UnboundedError):
        lipdp.sensitivity(nn.Sequential(nn.LayerNorm(6), lnn.SpectralLinear(6, 6)), ProbeLoss(), (6,))


@pytest.mark.parametrize("function", ["layer_norm", "group_norm"])
def test_functional_normalisations_have_no_rule(function):
    class Functional(nn.Module):
        def forward(self, x):
            return F.layer_norm(x, (3, 4)) if function == "layer_norm" else F.group_norm(x, 1)

    with pytest.raises(UnsupportedOperationError, match=function):
        lipdp.lipschitz_constant(Functional(), (3, 4))


def test_they_compute_what_torch_computes_and_are_converted():
    x = torch.randn(5, 6, 4, 4)
    pairs = [(nn.GroupNorm(2, 6), x), (nn.LayerNorm((4, 4), bias=False), x), (nn.InstanceNorm2d(6, affine=True), x)]
    for plain, inputs in [*pairs, (nn.GroupNorm(6, 6, affine=False), x), (nn.LayerNorm(4), x)]:
        for parameter in plain.parameters():
            nn.init.normal_(parameter)
        ours = lnn.from_torchlip(plain)
        assert type(ours) in (lnn.GroupNorm, lnn.LayerNorm)
        assert torch.allclose(ours(inputs), plain(inputs), atol=1e-5)
        assert torch.allclose(lnn.to_torch(ours)(inputs), plain(inputs), atol=1e-5)
    with pytest.raises(LipdpError):
        lnn.from_torchlip(nn.InstanceNorm2d(3, track_running_stats=True))
    for wrong in (lambda: lnn.LayerNorm(4, eps=0.0), lambda: lnn.GroupNorm(1, 2, eps=-1.0)):
        with pytest.raises(LipdpError):
            wrong()
    for layer in (lnn.LayerNorm(4), lnn.GroupNorm(1, 3)):
        with pytest.raises(LipdpError, match="is for inputs"):
            layer(torch.zeros(2, 5))


def test_certificates_behind_a_normalisation_hold():
    """The same model with torch's GroupNorm had a radius of 11 and flipped at a distance of 0.0003."""
    torch.manual_seed(1)
    pixels = (250 + 4 * torch.rand(24, 3, 8, 8)).round()
    y = torch.zeros(24, dtype=torch.long)
    plain = network(nn.GroupNorm(1, 3), (3, 8, 8), 255 * 192**0.5)
    with pytest.raises(UnsupportedLayerError, match=r"lipdp\.nn\."):
        certify(plain, pixels, y)
    for bound in (None, 255 * 192**0.5):
        model = network(lnn.GroupNorm(1, 3, eps=1e2), (3, 8, 8), bound).eval()
        with torch.no_grad():
            y = model(pixels).argmax(1)
        certificate = certify(model, pixels, y)
        assert certificate.radii.max() > 0.01
        for x in layouts(pixels):
            for _ in range(20):
                step = torch.randn(pixels.shape, dtype=torch.float64)
                step *= (certificate.radii / step.flatten(1).norm(dim=1) * (1 - 1e-4)).view(-1, 1, 1, 1)
                if torch.equal(x, pixels):
                    with torch.no_grad():
                        assert torch.equal(model((x + step).float()).argmax(1), y)


# --- how a rule sums -------------------------------------------------------------------------------------------------


class Scaled(nn.Module):
    """A layer of a user: x · gain."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(6))

    def forward(self, x):
        return x.float() * self.gain


class Shifted(nn.Module):
    """A parameter that the graph meets by itself."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.ones(6))

    def forward(self, x):
        return x + self.shift


class Joined(nn.Module):
    def __init__(self):
        super().__init__()
        self.join = lnn.LipResidual()

    def forward(self, x):
        return self.join(x, x.neg())


IN_LOW_PRECISION = {
    nn.Linear: lambda: nn.Linear(6, 6),
    nn.Conv1d: lambda: nn.Sequential(nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 1, 1)),
    nn.Conv2d: lambda: nn.Sequential(nn.Unflatten(1, (1, 6, 1)), nn.Conv2d(1, 1, 1)),
    nn.Conv3d: lambda: nn.Sequential(nn.Unflatten(1, (1, 6, 1, 1)), nn.Conv3d(1, 1, 1)),
    nn.ConvTranspose1d: lambda: nn.Sequential(nn.Unflatten(1, (1, 6)), nn.ConvTranspose1d(1, 1, 1)),
    nn.ConvTranspose2d: lambda: nn.Sequential(nn.Unflatten(1, (1, 6, 1)), nn.ConvTranspose2d(1, 1, 1)),
    nn.ConvTranspose3d: lambda: nn.Sequential(nn.Unflatten(1, (1, 6, 1, 1)), nn.ConvTranspose3d(1, 1, 1)),
    nn.RMSNorm: lambda: nn.RMSNorm(6, eps=1e-2),
    nn.PReLU: nn.PReLU,
    torchlip.LPReLU: lnn.LPReLU,
    torchlip.HouseHolder: lambda: lnn.HouseHolder(6),
    torchlip.LayerCentering: lambda: torchlip.LayerCentering(1, dim=(-1,)),
    lnn.LayerCentering: lambda: lnn.LayerCentering(1, dim=(-1,), bias=True),
    torchlip.LipResidual: Joined,
    "a parameter of the graph": Shifted,
    "a user's rule": Scaled,
}
IN_FLOAT32 = {
    lnn.SpectralLinear: lambda: lnn.SpectralLinear(6, 6, True),
    lnn.SpectralConv1d: lambda: nn.Sequential(nn.Unflatten(1, (1, 6)), lnn.SpectralConv1d(1, 1, 1, bias=True)),
    lnn.SpectralConv2d: lambda: nn.Sequential(nn.Unflatten(1, (1, 6, 1)), lnn.SpectralConv2d(1, 1, 1, bias=True)),
    lnn.LayerNorm: lambda: lnn.LayerNorm(6),
    lnn.GroupNorm: lambda: lnn.GroupNorm(2, 6),
}
REFUSED = (nn.LayerNorm, nn.GroupNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)  # altogether


def scaled(sums_in):
    def bound(call):
        gain = call.module.gain.detach().abs().max().double()
        return Local(gains=(gain,), parameters={"gain": call.x.value}, sums_in=sums_in, fan_in=call.x.numel)

    return bound


def test_every_rule_with_parameters_is_below():
    """A rule added for a module with parameters must be put into one of the tables."""
    known = {kind for kind in (*IN_LOW_PRECISION, *IN_FLOAT32, *REFUSED) if isinstance(kind, type)}
    words = ("parameters", "_dense", "_convolution", "_of_patches")
    found = {
        kind
        for kind, found in _RULES.items()
        if (
            isinstance(kind, type)
            and any(word in found.__code__.co_names + found.__code__.co_varnames for word in words)
        )
        or (isinstance(kind, type) and "parameters" in str(found.__code__.co_consts))
    }
    assert {kind for kind in found if kind.__module__.split(".")[0] in ("lipdp", "torch", "deel")} <= known


@pytest.mark.parametrize("kind", IN_LOW_PRECISION, ids=str)
def test_a_sum_in_low_precision_is_refused_by_default(kind, monkeypatch):
    monkeypatch.setitem(_RULES, Scaled, scaled(None))
    model = nn.Sequential(lnn.InputBound(1.0), IN_LOW_PRECISION[kind](), nn.Flatten())
    assert lipdp.sensitivity(model, ProbeLoss(), (6,)).total > 0
    for dtype in (torch.bfloat16, torch.float16):
        with pytest.raises(UnsupportedLayerError, match="sums its gradient over the batch"):
            lipdp.sensitivity(model, ProbeLoss(), (6,), forward_dtype=dtype)
    model.requires_grad_(False)
    assert lipdp.lipschitz_constant(model, (6,), forward_dtype=torch.bfloat16) > 0


@pytest.mark.parametrize("kind", [*IN_FLOAT32, Scaled], ids=str)
def test_a_layer_that_sums_in_float32_does(kind, monkeypatch):
    """16,450 equal records and one more: a sum in bfloat16 moved by 82 Δ."""
    monkeypatch.setitem(_RULES, Scaled, scaled(torch.float32))
    torch.manual_seed(0)
    model = nn.Sequential(lnn.InputBound(1.0), IN_FLOAT32.get(kind, Scaled)(), nn.Flatten())
    declared = lipdp.sensitivity(model, ProbeLoss(), (6,), forward_dtype=torch.bfloat16)
    x = torch.randn(1, 6).repeat(16450, 1)

    def total(x):
        with torch.autocast("cpu", torch.bfloat16):
            out = model(x)
        cotangent = torch.full_like(out, 0.99 / out.shape[1] ** 0.5)
        return torch.autograd.grad(out, list(model.parameters()), cotangent)

    for (name, _), a, b in zip(model.named_parameters(), total(x), total(x[1:]), strict=True):
        assert (a.double() - b.double()).norm() <= declared[name] * 1.01


# --- projections -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("entries", [1, 10, 1000, 100_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("bound", [1.0, 0.1, 7.3, 1e3])
def test_a_projection_keeps_its_bound_as_computed(entries, bound, dtype):
    generator = torch.Generator().manual_seed(entries)
    rows = torch.stack([torch.ones(entries), torch.randn(entries, generator=generator), torch.rand(entries)])
    for norm in (0.999, 1.0, 1.0001, 1.7, 3.3, 100.0):
        x = (rows / rows.norm(dim=1, keepdim=True) * norm * bound).to(dtype)
        if not x.isfinite().all():
            continue
        out = clip_norm(x, bound).double().norm(dim=1)
        assert (out <= bound * (1 + 1e-12)).all()
        assert (clip_norm(x, bound, 2.0).double().norm(dim=1) <= 2 * (1 + 1e-12)).all()
        if norm > 1:
            assert (out >= bound * (1 - 4 * torch.finfo(dtype).eps) - entries**0.5 * 1e-7 * (dtype.itemsize < 4)).all()


def test_huge_and_tiny_records_are_projected():
    """In float32 the squares of 1e30 overflow and those of 1e-25 vanish: such a record passed a bound of 1e-30."""
    for size in (1e30, 1e20, 3e38, 1e-25, 1e-40):
        for bound in (1.0, 1e-3, 1e-30):
            out = lnn.InputBound(bound)(torch.full((1, 4), size)).double().norm()
            assert out <= bound
            if 2 * size > bound and size / bound < 1e37:
                assert out >= bound * (1 - 1e-6)


# --- sums over a batch -----------------------------------------------------------------------------------------------


def moves(records, others):
    """How far one record of norm 1 moves the float32 sum of all, by a product and by `sum`, first or last removed."""
    ones = torch.ones(len(records), others)
    whole, plain = ones.T @ records, records.sum(0)
    for keep in (slice(1, None), slice(None, -1)):
        yield float((whole - ones[keep].T @ records[keep]).double().norm()) / others**0.5
        yield float((plain - records[keep].sum(0)).double().norm())


@pytest.mark.parametrize("records", [2**k for k in (1, 4, 8, 10, 12, 14, 17)])
def test_the_slack_of_a_batch_covers_aligned_records(records):
    torch.manual_seed(records)
    slack = batch_slack(records, torch.float32)
    for _ in range(3):
        row = torch.rand(64) + 0.5
        row /= row.norm() * (1 + 1e-6)
        for batch in (row.repeat(records, 1), row * (0.9 + 0.1 * torch.rand(records, 1))):
            assert max(moves(batch, 8)) <= slack


def test_records_made_to_be_rounded_exceed_it_as_documented():
    """Half the batch takes the sum just above a power of two; the rest is rounded up with the record, else to 0."""
    records, worst = 4096, 0.0
    for power in range(int(math.log2(records)) - 6, int(math.log2(records))):
        spacing = 2.0**power * torch.finfo(torch.float32).eps
        batch = torch.full((records, 8), 0.51 * spacing)
        batch[: 2**power] = 1.0
        worst = max(worst, *(m / 8**0.5 for m in moves(batch, 8)))
    assert worst < 1.3
    double = torch.finfo(torch.float64).eps * records**2
    assert double < 1e-8  # the same attack on a sum in float64


def test_the_slack_of_a_batch_grows():
    assert batch_slack(1, torch.float64) < 1 + 1e-14
    assert batch_slack(256, torch.float32) < 1.0001 < batch_slack(4096, torch.float32) < 1.001
