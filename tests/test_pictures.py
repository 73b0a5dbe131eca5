"""Features from synthetic pictures: norm at most 1 as stored, no record in the statistics, the same bits twice."""

import json
import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lipdp.data import Split
from lipdp.errors import ParameterError, UnboundedError
from lipdp.features import NORM_FLOOR, apply, features
from lipdp.features import pictures as pictures_module
from lipdp.features.blocks import PatchBlock, ScatteringBlock, mirrored_paths
from lipdp.features.pictures import _statistics, _times_triangle
from lipdp.features.scattering import Scattering
from lipdp.features.synthetic import PICTURES
from lipdp.training import Trainer, configure
from lipdp.training.assembly import learning_rate
from lipdp.training.recipes import head_rate

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = {"pairs": 12, "filters": 4}
SHAPES = {"photographs": (3, 12, 12), "objects": (1, 12, 12), "handwriting": (1, 12, 12)}


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LIPDP_CACHE", str(tmp_path / "cache"))
    _statistics.cache_clear()
    yield
    _statistics.cache_clear()


def images(shape, n=20):
    generator = torch.Generator().manual_seed(3)
    smooth = F.interpolate(torch.rand(n, shape[0], 4, 4, generator=generator), size=shape[1:], mode="bilinear")
    return torch.cat((smooth, smooth.round(), torch.zeros(1, *shape), torch.ones(1, *shape)))


# ------------------------------------------------------------------------------------------------------------ pictures


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_follow_from_the_seed_alone(name):
    shape = SHAPES[name]
    with torch.random.fork_rng():
        torch.manual_seed(1)
        once = PICTURES[name](3, shape, 5)
        torch.manual_seed(2)
        state = torch.get_rng_state()
        twice, other = PICTURES[name](3, shape, 5), PICTURES[name](3, shape, 6)
        assert torch.equal(torch.get_rng_state(), state)
    for one, two in zip(once, twice, strict=True):
        assert torch.equal(one, two)
        assert one.shape == (3, *shape)
        assert 0 <= one.min() < one.max() <= 1
    assert not torch.equal(once[0], once[1])  # two views
    assert not torch.equal(once[0], other[0])


def test_pictures_of_other_shapes_and_refused_ones():
    for name in PICTURES:
        assert PICTURES[name](2, (1, 9, 14), 0)[1].shape == (2, 1, 9, 14)
    for count, shape in ((0, (1, 12, 12)), (2, (2, 12, 12)), (2, (12, 12)), (2, (1, 4, 12))):
        with pytest.raises(ParameterError, match="pictures of shape"):
            PICTURES["objects"](count, shape, 0)


# -------------------------------------------------------------------------------------------------------------- blocks


def test_mirror_images_have_mirrored_paths():
    """Exactly so about a pixel where the transform is sampled, such as number 16 of 32, far from the borders."""
    scattering, order = Scattering(), mirrored_paths(Scattering())
    assert order[order].tolist() == list(range(81))
    x = F.pad(torch.rand(2, 1, 8, 8, dtype=torch.float64), (12,) * 4)
    mirrored = x.flip(3).roll(1, 3)  # column j is column 32 − j
    z, turned = scattering(x)[..., 1:], scattering(mirrored)[..., 1:]
    torch.testing.assert_close(turned[:, order].flip(3), z, atol=1e-6, rtol=1e-4)
    assert (turned.flip(3) - z).norm() > 0.1 * z.norm()


@pytest.mark.parametrize("channels", [1, 3])
def test_flips_change_little_in_scattering_and_nothing_in_patches(channels):
    x = images((channels, 16, 16))[:20]
    scattering = ScatteringBlock(2, flips=True)
    assert (scattering(x.flip(3), {}) - scattering(x, {})).norm() < 0.1 * scattering(x, {}).norm()
    assert (scattering(x.flip(2), {}) - scattering(x, {})).norm() > 0.15 * scattering(x, {}).norm()
    block = PatchBlock(1, 6, 2, 8, 3, flips=True)
    fitted = block.fit(x, 0)
    torch.testing.assert_close(block(x.flip(3), fitted), block(x, fitted), atol=1e-5, rtol=1e-5)
    assert block(x, fitted).shape == (20, 2 * 8 * 9)
    directed = replace(block, flips=False)
    assert not torch.allclose(directed(x.flip(3), f := directed.fit(x, 0)), directed(x, f), atol=1e-3)


def test_patch_responses_are_as_declared():
    """Against windows cut out one by one."""
    x = images((3, 12, 12))[:6]
    block = PatchBlock(1, 6, 2, 5, 4, flips=False)
    fitted = block.fit(x, 1)
    windows = F.unfold(255 * x, 6, stride=2).transpose(1, 2)
    centred = windows - windows.mean(2, keepdim=True)
    normal = centred / (centred.square().mean(2, keepdim=True) + 10).sqrt()
    z = normal @ fitted["filters"].flatten(1).T
    both = torch.stack([F.relu(sign * z - fitted["threshold"]) for sign in (1, -1)], 1)
    expected = both.reshape(6, 2, 4, 4, 5).permute(0, 1, 4, 2, 3).flatten(1)
    torch.testing.assert_close(block(x, fitted), expected, atol=2e-3, rtol=1e-3)


@settings(max_examples=5, deadline=None)
@given(size=st.sampled_from([3, 1024, 1025, 1500]), seed=st.integers(0, 99))
def test_product_with_a_triangle(size, seed):
    generator = torch.Generator().manual_seed(seed)
    lower = torch.randn(size, size, generator=generator, dtype=torch.float64).tril()
    z = torch.randn(2, size, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(_times_triangle(z, lower), z @ lower.T)


# ---------------------------------------------------------------------------------------------------------------- norm


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, "float16") for name in PICTURES), ("objects", "float32"),
     *(pytest.param(name, "float32", marks=pytest.mark.slow) for name in PICTURES if name != "objects")],
)  # fmt: skip
def test_norm_never_exceeds_the_bound_of_the_engine(name, dtype, tmp_path):
    """As stored, and as computed in float32: rounding to float16 alone would lift half of the norms above 1."""
    shape = SHAPES[name]
    spec = features(name, **SMALL, dtype=dtype)
    x = images(shape)
    split = Split("x", x, torch.zeros(len(x), dtype=torch.int64), x[:5], torch.zeros(5, dtype=torch.int64), 2, "binary")
    for stored in (spec(x), apply(split, spec, cache_dir=tmp_path).train_x):
        assert stored.dtype == getattr(torch, dtype)
        bound = spec.norm_bound(shape)
        assert bound == 1.0
        assert stored.double().norm(dim=1).max() <= bound
        assert stored.float().norm(dim=1).max() <= bound
        assert stored.double().norm(dim=1)[:-2].min() > 0.997


@settings(max_examples=12, deadline=None)
@given(
    side=st.sampled_from([(1, 1), (1, 3), (8, 8), (50, 100)]),
    seed=st.integers(0, 999), spread=st.sampled_from([0.0, 1.0, 6.0]),
    dtype=st.sampled_from(["float16", "float32"]),
)  # fmt: skip
def test_unit_norm_survives_rounding_for_any_vector(side, seed, spread, dtype):
    generator = torch.Generator().manual_seed(seed)
    z, scale = torch.randn(2, 4, 1, *side, generator=generator)
    z = z * 10 ** (spread * scale)
    found = features("dct", unit_norm=True, dtype=dtype)(z)
    assert found.double().norm(dim=1).max() <= 1
    assert found.float().norm(dim=1).max() <= 1
    assert (found.double().norm(dim=1)[z.flatten(1).norm(dim=1) > 2 * NORM_FLOOR] > 0.997).all()


# ---------------------------------------------------------------------------------------------------------- statistics


def test_no_record_has_a_part_in_the_statistics(tmp_path, monkeypatch):
    """Whatever the records are, the statistics and the features of any other image are the same bits."""
    spec, probe = features("objects", **SMALL), images((1, 12, 12))[:3]
    found = []
    for number, records in enumerate((torch.zeros(4, 1, 12, 12), torch.rand(9, 1, 12, 12))):
        monkeypatch.setenv("LIPDP_CACHE", str(tmp_path / str(number)))
        _statistics.cache_clear()
        y = torch.zeros(len(records), dtype=torch.int64)
        apply(Split("x", records, y, records, y, 2, "binary"), spec)
        found.append((_statistics(spec.map, (1, 12, 12)), spec(probe)))
    assert found[0][0].keys() == found[1][0].keys()
    assert all(torch.equal(found[0][0][name], found[1][0][name]) for name in found[0][0])
    assert torch.equal(found[0][1], found[1][1])


def test_a_record_changes_its_own_features_alone():
    spec, x = features("photographs", **SMALL), images((3, 12, 12))
    other = x.clone()
    other[4] = 1 - other[4]
    changed = (spec(x) != spec(other)).any(1).nonzero().flatten().tolist()
    assert changed == [4]


def test_statistics_are_kept_by_their_key_and_a_damaged_file_is_made_again(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    x = images((1, 12, 12))[:3]
    spec = features("handwriting", **SMALL)
    first = spec(x)
    kept = list((tmp_path / "cache/features").glob("statistics-*.npz"))
    assert len(kept) == 1
    _statistics.cache_clear()
    monkeypatch.setattr(pictures_module, "_fit", lambda *_: pytest.fail("computed again"))
    assert torch.equal(spec(x), first)
    monkeypatch.undo()
    monkeypatch.setenv("LIPDP_CACHE", str(tmp_path / "cache"))
    kept[0].write_bytes(kept[0].read_bytes()[:-50])
    _statistics.cache_clear()
    assert torch.equal(spec(x), first)
    assert "damaged" in caplog.text
    assert not torch.equal(features("handwriting", **SMALL, seed=1)(x), first)
    assert len(list((tmp_path / "cache/features").glob("statistics-*.npz"))) == 2


def test_the_whitening_shrinks_what_nuisances_move():
    """On fresh pictures, two views of one scene are more alike, against other scenes, after the whitening."""
    spec = features("photographs", pairs=60, filters=4)
    a, b = PICTURES["photographs"](40, (3, 12, 12), 77)
    block = spec.map.blocks((3, 12, 12))[0][1]

    def likeness(u, v):
        u, v = (F.normalize(z - z.mean(0), dim=1) for z in (u, v))
        cosines = u @ v.T
        return (cosines.diagonal().mean() - cosines.mean()) / cosines.std()

    plain = [pictures_module._rooted(block(v, {})) for v in (a, b)]
    assert likeness(*(spec(v).double() for v in (a, b))) > likeness(*(v.double() for v in plain))


def test_large_images_cost_no_more_and_others_are_refused():
    spec = features("objects", **SMALL)
    assert spec.output_shape((1, 96, 96)) == spec.output_shape((1, 64, 64)) == spec.output_shape((1, 32, 32))
    for shape in ((2, 32, 32), (1, 8, 8)):
        with pytest.raises(ParameterError, match="C = 1 or 3"):
            spec.output_shape(shape)
    with pytest.raises(UnboundedError, match="no Lipschitz constant"):
        spec.map.lipschitz((1, 28, 28))
    for options in ({"pairs": 1}, {"filters": 0}, {"seed": -1}, {"seed": 0.5}):
        with pytest.raises(ParameterError, match=next(iter(options))):
            features("objects", **options)
    assert features(**json.loads(json.dumps(spec.to_json()))) == spec


# ----------------------------------------------------------------------------------------------------------------- run


def small_run(tmp_path, **given):
    x = (images((1, 12, 12), 150) * 255).byte().float() / 255
    y = (x.mean((1, 2, 3)) > 0.5).long().numpy()
    np.savez(tmp_path / "small.npz", X=x.numpy(), y=y)
    options = {"model": "linear", "features": "objects", "feature_options": SMALL, "seed": 0}
    return configure(dataset=str(tmp_path / "small.npz"), **{**options, **given})


def test_a_head_takes_all_records_at_a_rate_from_the_account(tmp_path):
    trainer = Trainer(small_run(tmp_path, epsilon=8.0, steps=12), out=tmp_path / "run")
    plan = trainer.engine.plan
    assert plan.sampling_rate == 1.0
    assert trainer.split.train_x.dtype == torch.float16
    expected = head_rate(
        noise_multiplier=plan.noise_multiplier, steps=12, batch_size=plan.dataset_size, momentum=0.9, gate=0.55,
        tau=50.0,
    )  # fmt: skip
    assert trainer.optimizer.param_groups[0]["lr"] == expected
    assert learning_rate(replace(trainer.config, lr=0.25), plan, trainer.criterion) == 0.25
    result = trainer.run()
    assert result.epsilon <= 8.0
    (sensitivity,) = trainer.engine.sensitivity().values()
    assert 0.55 <= sensitivity <= 0.55 * 1.05
    stated = json.loads((tmp_path / "run/privacy.json").read_text())["features"]
    assert (stated["name"], stated["seed"], stated["pairs"], stated["learned_from_records"]) == (
        "objects",
        0,
        12,
        False,
    )


def test_noise_alone_moves_a_logit_by_the_declared_deviation():
    sigma, steps, batch, gate, tau = 7.0, 60, 500, 0.3, 50.0
    rate = head_rate(noise_multiplier=sigma, steps=steps, batch_size=batch, momentum=0.9, gate=gate, tau=tau)
    weights = [torch.nn.Parameter(torch.zeros(4000, dtype=torch.float64))]
    optimizer = torch.optim.SGD(weights, lr=rate, momentum=0.9)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        noise = torch.randn(4000, generator=generator, dtype=torch.float64)
        weights[0].grad = sigma * gate * noise / batch
        optimizer.step()
    assert 0.75 < float(tau * weights[0].detach().std()) < 1.0  # a little less: the last steps are not yet multiplied
