"""Allocations share exactly one σ; draws have the std that was asked for, and the tests notice when they have not."""

from __future__ import annotations

import json
import math

import kit
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kit import FALSE_ALARM, has_std
from scipy import optimize, stats

from lipdp.accounting import joint_noise_multiplier
from lipdp.errors import CheckpointError, EngineError, ParameterError, UnknownNameError
from lipdp.noise import gaussian as noise_module
from lipdp.noise.allocation import (
    Allocation,
    GlobalAllocation,
    MinVarianceAllocation,
    PerLayerAllocation,
    get_allocation,
    rescaled,
)
from lipdp.noise.gaussian import _CPU_BLOCK, GaussianNoise, RatchetSource, _box_muller_torch, normals_from_words_
from lipdp.noise.ratchet import Ratchet
from lipdp.noise.secure import SecureGaussianNoise

ALLOCATIONS = [GlobalAllocation(), PerLayerAllocation(), MinVarianceAllocation()]

blocks = st.lists(
    st.tuples(st.one_of(st.just(0.0), st.floats(1e-6, 1e6)), st.integers(1, 10**7)), min_size=1, max_size=12
).filter(lambda pairs: any(delta > 0 for delta, _ in pairs))


def split(pairs):
    delta, size = zip(*pairs, strict=True)
    return torch.tensor(delta, dtype=torch.float64), torch.tensor(size)


def joint(delta, std):
    return joint_noise_multiplier(*(s / d for d, s in zip(delta.tolist(), std.tolist(), strict=True) if d > 0))


# --- allocations ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("allocation", ALLOCATIONS, ids=lambda a: a.name)
@given(blocks, st.floats(0.01, 100))
def test_every_allocation_has_exactly_the_joint_noise_multiplier(allocation, pairs, sigma):
    delta, size = split(pairs)
    std = allocation.stds(delta, size, sigma)
    assert std.dtype == torch.float64
    assert std.shape == delta.shape
    assert torch.equal(std > 0, delta > 0)  # no noise where nothing depends on the data, some wherever it does
    assert joint(delta, std) == pytest.approx(sigma, rel=1e-12)


@pytest.mark.parametrize("allocation", ALLOCATIONS, ids=lambda a: a.name)
def test_five_percent_less_noise_is_seen(allocation):
    delta, size = torch.tensor([1.0, 3.0, 0.5]), torch.tensor([10, 1000, 3])
    std = 0.95 * allocation.stds(delta, size, 2.0)
    assert joint(delta, std) == pytest.approx(1.9, rel=1e-12)
    assert joint(delta, rescaled(std, delta, 2.0)) == pytest.approx(2.0, rel=1e-12)


@given(blocks, st.floats(0.01, 100), st.integers(0, 2**32 - 1))
def test_min_variance_has_the_least_energy_of_all_with_that_sigma(pairs, sigma, seed):
    delta, size = split(pairs)
    energy = (size * MinVarianceAllocation().stds(delta, size, sigma).square()).sum().item()
    assert energy == pytest.approx((sigma * (delta * size.double().sqrt()).sum().item()) ** 2, rel=1e-9)
    rivals = [GlobalAllocation().stds(delta, size, sigma), PerLayerAllocation().stds(delta, size, sigma)]
    shape = torch.from_numpy(np.random.default_rng(seed).lognormal(0, 2, len(delta))) * (delta > 0)
    rivals.append(rescaled(shape, delta, sigma))
    for rival in rivals:
        assert energy <= (size * rival.square()).sum().item() * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_min_variance_is_what_a_numerical_optimiser_finds(seed):
    generator = np.random.default_rng(seed)
    delta, size = generator.lognormal(0, 1.5, 6), generator.integers(1, 10**5, 6).astype(float)
    sigma = 1.7
    closed = MinVarianceAllocation().stds(torch.from_numpy(delta), torch.from_numpy(size), sigma).numpy()

    def energy(logs):  # stds on the surface Σ Δ²/s² = 1/σ² by rescaling, free of the closed form
        shape = np.exp(logs)
        shape = shape * sigma * math.sqrt(((delta / shape) ** 2).sum())
        return math.log((size * shape**2).sum()), shape

    found = optimize.minimize(lambda logs: energy(logs)[0], np.zeros(6), method="BFGS", options={"gtol": 1e-9})
    assert energy(found.x)[0] == pytest.approx(math.log((size * closed**2).sum()), abs=1e-9)
    np.testing.assert_allclose(energy(found.x)[1], closed, rtol=1e-3)


@pytest.mark.parametrize("allocation", ALLOCATIONS, ids=lambda a: a.name)
def test_zero_blocks_neither_get_nor_cost_noise(allocation):
    delta, size = torch.tensor([0.0, 1.0, 0.0, 2.0]), torch.tensor([5, 7, 9, 11])
    kept = torch.tensor([1, 3])
    std = allocation.stds(delta, size, 1.3)
    assert torch.equal(std[kept], allocation.stds(delta[kept], size[kept], 1.3))
    nothing = allocation.stds(torch.zeros(3), torch.ones(3), 1.3)
    assert torch.equal(nothing, torch.zeros(3, dtype=torch.float64))
    assert torch.equal(rescaled(nothing, torch.zeros(3), 1.3), nothing)
    assert not rescaled(torch.zeros(1), torch.ones(1), 1.3).isfinite().any()  # no noise where some is due
    assert allocation.stds(torch.ones(1), torch.zeros(1), 1.0).isfinite().all()  # a parameter without elements


@pytest.mark.parametrize("allocation", ALLOCATIONS, ids=lambda a: a.name)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_sensitivity_that_is_not_finite_never_becomes_a_finite_std(allocation, bad):
    std = allocation.stds(torch.tensor([1.0, bad]), torch.tensor([4, 4]), 1.0)
    assert not std[1].isfinite()


def test_allocations_by_name_and_object():
    assert [get_allocation(a.name) for a in ALLOCATIONS] == ALLOCATIONS
    assert get_allocation(ALLOCATIONS[0]) is ALLOCATIONS[0]
    assert all(isinstance(a, Allocation) for a in ALLOCATIONS)
    with pytest.raises(UnknownNameError, match="did you mean 'per_layer'"):
        get_allocation("perlayer")
    with pytest.raises(UnknownNameError):
        get_allocation(GlobalAllocation)  # the class, not an object
    with pytest.raises(UnknownNameError):
        get_allocation(3)


@pytest.mark.parametrize("sigma", [0.0, -1.0, math.inf, math.nan])
def test_noise_multiplier_must_be_positive(sigma):
    with pytest.raises(ParameterError, match="noise_multiplier"):
        GlobalAllocation().stds(torch.ones(2), torch.ones(2), sigma)


def test_allocation_shapes():
    with pytest.raises(ParameterError, match=r"\(2,\).*\(3,\)"):
        GlobalAllocation().stds(torch.ones(2), torch.ones(3), 1.0)


class NoSync(torch.utils._python_dispatch.TorchDispatchMode):
    """Fails on the operations that read a value back to the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("allocation", ALLOCATIONS, ids=lambda a: a.name)
def test_no_value_is_read_back_to_the_host(allocation):
    delta, gradient = torch.tensor([1.0, 0.0]), [torch.zeros(3), torch.zeros(2)]
    noise = GaussianNoise(seed=0)
    with NoSync():
        noise.add_(gradient, allocation.stds(delta, torch.tensor([3, 2]), 1.0))
    with pytest.raises(AssertionError), NoSync():
        delta[0].item()


# --- the law of the draws ---------------------------------------------------------------------------------------------


def uncorrelated(a: torch.Tensor, b: torch.Tensor) -> bool:
    """√n times the correlation of independent samples is N(0, 1) up to O(1/√n)."""
    correlation = torch.corrcoef(torch.stack([a.double(), b.double()]))[0, 1].item()
    return abs(correlation) * math.sqrt(a.numel()) < stats.norm.isf(FALSE_ALARM / 2)


@pytest.mark.statistical
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("allocation", ALLOCATIONS, ids=lambda a: a.name)
def test_drawn_std_is_the_calibrated_one(allocation, dtype):
    delta, shapes = torch.tensor([0.01, 0.3, 2.0]), [(1000, 1000), (10**6,), (100, 100, 100)]
    std = allocation.stds(delta, torch.tensor([math.prod(shape) for shape in shapes]), 1.1)
    gradients = [torch.full(shape, 3.0, dtype=dtype) for shape in shapes]
    GaussianNoise(seed=1).add_(gradients, std)
    for gradient, s in zip(gradients, std.tolist(), strict=True):
        kit.assert_only_this_std(gradient.flatten().double() - 3.0, s)


@pytest.mark.statistical
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_draws_are_normal_to_the_tails(dtype):
    z = GaussianNoise(seed=2).normal(10**6 + 1, dtype=dtype).double().numpy()
    assert len(z) == 10**6 + 1
    kit.assert_normal_to_the_tails(z)


@pytest.mark.statistical
def test_blocks_steps_and_the_two_of_a_pair_are_independent():
    noise = GaussianNoise(seed=3)
    first, second = torch.zeros(2, 10**6), torch.zeros(2, 10**6)
    for step in (first, second):
        noise.add_(list(step), torch.ones(2))
    paired = noise.normal(1 << 21).view(-1, 2, _CPU_BLOCK)  # cosines, then sines with the same radii
    pairs = [(first[0], first[1]), (first[0], second[0]), (first[1], second[0]), (first[0, 1:], first[0, :-1])]
    for a, b in [*pairs, (paired[:, 0].flatten(), paired[:, 1].flatten())]:
        assert uncorrelated(a, b)
        assert uncorrelated(a.square(), b.square())
    assert not uncorrelated(first[0], first[1] + 0.01 * first[0])


@pytest.mark.statistical
def test_the_words_of_other_devices_are_uniform():
    """The branch for accelerators, driven on the CPU: torch fills all 64 bits."""
    words = torch.empty(10**5, dtype=torch.int64).random_(-(2**63), None, generator=torch.Generator().manual_seed(0))
    assert has_std(normals_from_words_(words.clone()), 1.0)
    kit.assert_all_bits_are_fair(words)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_box_muller_of_numpy_and_of_torch_are_the_same(dtype):
    words = RatchetSource(0).words(_CPU_BLOCK)
    other = words.clone()
    _box_muller_torch(other, dtype)
    torch.testing.assert_close(normals_from_words_(words, dtype=dtype), other.view(dtype), rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.statistical
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_cuda_draws(dtype):
    noise = GaussianNoise(seed=4, device="cuda")
    gradient = torch.zeros(10**6, device="cuda", dtype=dtype)
    state = noise.state_dict()
    noise.add_([gradient], torch.tensor([0.7], device="cuda"))
    assert has_std(gradient.cpu(), 0.7) or dtype == torch.bfloat16
    again = torch.zeros_like(gradient)
    noise.load_state_dict(state)
    noise.add_([again], torch.tensor([0.7], device="cuda"))
    assert torch.equal(gradient, again)


def test_every_word_gives_finite_noise_within_the_stated_radius():
    extremes = [0, -1, 2**63 - 1, -(2**63), 2**40 - 1, 2**40, -(2**40), 1]
    single = normals_from_words_(torch.tensor(extremes)).view(2, -1)
    assert single.isfinite().all()
    radius = single.double().pow(2).sum(0).sqrt()
    assert radius.max().item() == pytest.approx(math.sqrt(2 * 41 * math.log(2)), rel=1e-6)
    assert radius.min().item() > 0  # no pair is released without noise
    double = normals_from_words_(torch.tensor(extremes), dtype=torch.float64)
    assert double.isfinite().all()
    assert double.norm().item() < 8 * math.sqrt(2 * 53 * math.log(2))


# --- adding -----------------------------------------------------------------------------------------------------------


def test_half_precision_sums_are_made_in_float32():
    for dtype in (torch.bfloat16, torch.float16):
        values = torch.linspace(-4, 4, 1001).to(dtype)
        noised, reference = values.clone(), values.float()
        GaussianNoise(seed=5).add_([noised], torch.tensor([0.01]))
        GaussianNoise(seed=5).add_([reference], torch.tensor([0.01]))
        assert torch.equal(noised, reference.to(dtype))


def test_float64_gradients_get_float64_noise():
    gradient = torch.zeros(1000, dtype=torch.float64)
    GaussianNoise(seed=6).add_([gradient, torch.zeros(5)], torch.tensor([1.0, 1.0]))
    assert torch.equal(gradient, GaussianNoise(seed=6).normal(1005, dtype=torch.float64)[:1000])


@given(st.floats(1e-30, 1e30))
@settings(max_examples=30)
def test_the_std_is_never_rounded_down(std):
    stds = torch.tensor([std], dtype=torch.float64)
    one = GaussianNoise(seed=7).normal(64)
    gradient = torch.zeros(64)
    GaussianNoise(seed=7).add_([gradient], stds)
    scale = (gradient.double() / one.double()).median().item()
    assert std * (1 - 2**-24) <= scale <= std * (1 + 2**-21)


def test_layouts_and_zero_stds():
    weight = torch.zeros(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    transposed, plain, frozen, empty = torch.zeros(3, 2).T, torch.zeros(2, 3), torch.ones(4), torch.zeros(0)
    parameter = torch.nn.Parameter(torch.zeros(()))
    tensors = [weight, transposed, plain, frozen, empty, parameter]
    GaussianNoise(seed=8).add_(tensors, torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0, 1.0]))
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert len(torch.cat([t.detach().flatten() for t in (weight, transposed, plain, parameter)]).unique()) == 133
    assert torch.equal(frozen, torch.ones(4))
    GaussianNoise(seed=8).add_([], torch.zeros(0))


@settings(deadline=None, max_examples=50)
@given(
    shapes=st.lists(st.lists(st.integers(0, 9), max_size=4).map(tuple), min_size=1, max_size=6), room=st.integers(1, 60)
)
def test_a_draw_in_parts_reaches_every_entry_once(shapes, room):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(noise_module, "DRAW", room)
        tensors = [torch.zeros(shape) for shape in shapes]
        tensors = [t.to(memory_format=torch.channels_last) if t.dim() == 4 else t for t in tensors]
        rows = max([t[0].numel() for t in tensors if t.ndim and len(t)], default=1)
        for group in noise_module.groups(tensors):
            assert sum(part.numel() for _, part in group) <= max(room, rows)
            for index, part in group:
                part += index + 1
    assert all(bool((tensor == i + 1).all()) for i, tensor in enumerate(tensors))


@pytest.mark.statistical
@pytest.mark.parametrize("kind", [GaussianNoise, SecureGaussianNoise])
def test_draws_in_parts_have_the_std_and_are_independent(kind, monkeypatch):
    """As one vector of 2 x 64 parts: its std within 1 %, no two parts alike, no correlation from one to the next."""
    if kind is SecureGaussianNoise:
        pytest.importorskip("cryptography")
    monkeypatch.setattr(noise_module, "DRAW", 1000)
    first, second = torch.zeros(64, 1000), torch.zeros(64000)
    kind(seed=0).add_([first, second], torch.tensor([2.0, 3.0]))
    for parts in (first / 2, second.view(64, 1000) / 3):
        assert chi_square_accepts(parts.double())
        assert not chi_square_accepts(0.97 * parts.double())
        correlation = float((parts[1:] * parts[:-1]).mean()) * math.sqrt(parts[1:].numel())
        assert abs(correlation) < stats.norm.isf(FALSE_ALARM / 2)
    assert abs(float((first.view(-1) * second).mean()) / 6) * math.sqrt(64000) < stats.norm.isf(FALSE_ALARM / 2)


def test_a_small_model_is_still_one_draw(monkeypatch):
    """The draw of up to 4 M weights is what it was before it came in parts."""
    noise, whole = GaussianNoise(seed=3), GaussianNoise(seed=3)
    tensors = [torch.zeros(30, 5), torch.zeros(7)]
    noise.add_(tensors, torch.ones(2))
    drawn = whole.normal(157) * torch.tensor(1.0 + 2.0**-23)
    assert torch.equal(torch.cat([tensor.view(-1) for tensor in tensors]), drawn)


def chi_square_accepts(z):
    """Whether Σz² is what as many standard normals have."""
    total, count = float(z.square().sum()), z.numel()
    return FALSE_ALARM / 2 < stats.chi2.sf(total, count) < 1 - FALSE_ALARM / 2


def test_refusals_leave_the_gradients_alone():
    gradient = torch.zeros(3)
    noise = GaussianNoise(seed=0)
    bad = {
        "shape": ([gradient], torch.ones(2)),
        "sparse": ([gradient, torch.eye(2).to_sparse()], torch.ones(2)),
        "int64": ([gradient, torch.ones(2, dtype=torch.int64)], torch.ones(2)),
        "meta": ([gradient, torch.ones(2, device="meta")], torch.ones(2)),
    }
    for message, (tensors, stds) in bad.items():
        with pytest.raises(EngineError, match=message):
            noise.add_(tensors, stds)
    assert torch.equal(gradient, torch.zeros(3))
    with pytest.raises(ParameterError, match="source"):
        GaussianNoise(seed=0, source=RatchetSource(0))


# --- seeds and states -------------------------------------------------------------------------------------------------


def test_unseeded_noise_differs_and_says_so():
    a, b = GaussianNoise(), GaussianNoise()
    assert not a.seeded
    assert GaussianNoise(seed=0).seeded
    assert not torch.equal(a.normal(10), b.normal(10))
    assert not torch.equal(a.normal(10), a.normal(10))


@pytest.mark.parametrize("steps_before", [0, 1, 5])
def test_resume_is_bit_identical(steps_before, tmp_path):
    sizes, stds = [70_001, 13], torch.tensor([0.5, 2.0])
    noise, resumed = GaussianNoise(), GaussianNoise(seed=99)
    for _ in range(steps_before):
        noise.add_([torch.zeros(n) for n in sizes], stds)
    torch.save(noise.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert json.loads(json.dumps(state)) == state
    resumed.load_state_dict(state)
    assert not resumed.seeded
    for _ in range(3):
        a, b = [torch.zeros(n) for n in sizes], [torch.zeros(n) for n in sizes]
        noise.add_(a, stds)
        resumed.add_(b, stds)
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_draws_do_not_depend_on_the_number_of_threads():
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = GaussianNoise(seed=9).normal(300_001)
        torch.set_num_threads(2)
        two = GaussianNoise(seed=9).normal(300_001)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one, two)


def test_draws_leave_the_global_generators_alone():
    state = torch.get_rng_state()
    GaussianNoise(seed=0).normal(100)
    assert torch.equal(state, torch.get_rng_state())


def test_ratchet_goes_forward_only_and_separates_purposes():
    ratchet = Ratchet("noise", 0)
    states, outs = [], []
    for _ in range(50):
        states.append(ratchet.state_dict()["key"])
        outs.append(ratchet.advance())
    assert len(set(states) | {f"{out:064x}" for out in outs}) == 100  # no key or output repeats another
    assert Ratchet("sampling", 0).advance() != outs[0]
    assert Ratchet("noise", 1).advance() != outs[0]
    assert ratchet.state_dict().keys() == {"purpose", "key", "seeded"}  # nothing that an earlier step could be made of


@pytest.mark.parametrize("seed", [-1, 0.5, "a"])
def test_bad_seeds(seed):
    with pytest.raises(ParameterError, match="seed"):
        GaussianNoise(seed=seed)


@pytest.mark.parametrize(
    "state",
    [
        None,
        {},
        {"key": "zz", "seeded": True, "purpose": "noise"},
        {"key": "00", "seeded": True, "purpose": "noise"},
        Ratchet("sampling", 0).state_dict(),
    ],
)
def test_damaged_states(state):
    with pytest.raises(CheckpointError, match="noise"):
        GaussianNoise(seed=0).load_state_dict(state)
