"""Feature maps: their constants are attacked, normalisation is per sample, their cache is trusted only if whole."""

from __future__ import annotations

import json
import math
import os
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lipdp.data import Split, load
from lipdp.errors import DataError, ParameterError, UnknownNameError
from lipdp.features import Dct, Energies, FeatureSpec, apply, features
from lipdp.features import cache as features_module
from lipdp.features.scattering import Scattering, _kymatio, _padding, frame_bound, padded_bound

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def digits() -> Split:
    split = load("digits")
    return replace(split, train_x=split.train_x[:40], train_y=split.train_y[:40], test_x=split.test_x[:9])


# --------------------------------------------------------------------------------------------------------------- DCT


@pytest.mark.parametrize(("height", "width"), [(8, 8), (28, 28), (5, 7), (1, 3)])
def test_dct_is_orthonormal(height, width):
    pixels = torch.eye(height * width, dtype=torch.float64).reshape(-1, 1, height, width)
    matrix = Dct()(pixels).flatten(1)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(height * width, dtype=torch.float64))


def test_dct_is_scipys():
    from scipy.fft import dctn

    x = torch.randn(4, 3, 9, 6, dtype=torch.float64)
    torch.testing.assert_close(Dct()(x), torch.from_numpy(dctn(x.numpy(), axes=(2, 3), norm="ortho")))
    torch.testing.assert_close(Dct(keep=7)(x), Dct()(x)[:, :, :7, :7])
    assert Dct(keep=7).output_shape((3, 9, 6)) == (3, 7, 6)
    constant = Dct(keep=1)(torch.ones(1, 1, 8, 8))
    assert constant.item() == pytest.approx(8.0)  # all the energy of a constant image: the constant 1 is reached


# ---------------------------------------------------------------------------------------------------------- energies


def moved(spec: Energies, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """By how much the map stretches the way from x to y."""
    return (spec(x) - spec(y)).flatten(1).norm(dim=1) / (x - y).flatten(1).norm(dim=1)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 12, 12), (1, 13, 10)])
def test_energies_stretch_nothing_and_some_ways_not_at_all(shape):
    """Away from grey the map is homogeneous and keeps norms (where the stride divides the sides): 1 is attained."""
    spec = Energies(pictures="objects")
    x = torch.rand(30, *shape, dtype=torch.float64)
    assert spec(x).shape[1:] == spec.output_shape(shape)
    for y in (torch.rand_like(x), x + 1e-4 * torch.randn_like(x), 1 - x, torch.full_like(x, 0.5)):
        assert moved(spec, x, y).max() <= 1 + 1e-9
    if all(side % spec.stride == 0 for side in shape[1:]):
        assert moved(spec, x, 0.5 + 0.9 * (x - 0.5)).min() >= 1 - 1e-9


@pytest.mark.parametrize("options", [{"patch": 4, "stride": 1}, {"patch": 4, "stride": 2, "window": 1}, {"stride": 8}])
def test_energies_keep_norms_at_every_overlap(options):
    spec, x = Energies(pictures="objects", **options), torch.rand(5, 1, 16, 16, dtype=torch.float64)
    assert spec(x).shape[1:] == spec.output_shape((1, 16, 16))
    grey = torch.full_like(x, 0.5)
    torch.testing.assert_close(moved(spec, x, grey), torch.ones(5, dtype=torch.float64))


def test_energies_refuse():
    with pytest.raises(UnknownNameError, match="pictures"):
        Energies(pictures="cats")
    with pytest.raises(ParameterError, match="stride=3 does not divide patch=8"):
        Energies(stride=3)
    with pytest.raises(ParameterError, match="1 or 3 channels"):
        features("energies").output_shape((2, 8, 8))


# -------------------------------------------------------------------------------------------------------- scattering


def test_scattering_shapes():
    assert Scattering()(torch.rand(2, 1, 28, 28)).shape == (2, 81, 7, 7)
    for scattering, shape in [
        (Scattering(), (3, 32, 32)),
        (Scattering(J=1), (1, 8, 8)),
        (Scattering(order=1, L=4), (2, 9, 13)),
        (Scattering(J=3), (1, 8, 8)),
    ]:
        assert scattering(torch.rand(2, *shape)).shape == (2, *scattering.output_shape(shape))


def test_scattering_treats_channels_and_records_apart():
    x = torch.rand(5, 3, 8, 8, dtype=torch.float64)
    whole = Scattering()(x)
    alone = Scattering()(x[3:4, 1:2])
    torch.testing.assert_close(whole[3:4, 81:162], alone)
    assert torch.equal(Scattering()(x), whole)


@pytest.mark.parametrize(
    ("scattering", "side"), [(Scattering(), 8), (Scattering(J=1), 6), (Scattering(order=1, L=4), 9)]
)
def test_scattering_constant_is_not_exceeded_by_ascent(scattering, side):
    """Gradient ascent on the ratio, over images and small and large differences; 8 × 8 is where the padding hurts."""
    bound = scattering.lipschitz((1, side, side))
    assert bound <= 1.0
    torch.manual_seed(0)
    scale = torch.tensor([1e-3, 1.0, 1.0, 10.0], dtype=torch.float64).reshape(-1, 1, 1, 1)
    x = torch.rand(4, 1, side, side, dtype=torch.float64)
    x[2] = 0.0  # differences from the zero image
    d = scale * torch.randn_like(x)
    d[1] = 1.0
    worst = 0.0
    for _ in range(12):
        x.requires_grad_()
        d.requires_grad_()
        ratio = (scattering(x + d) - scattering(x)).flatten(1).norm(dim=1) / d.flatten(1).norm(dim=1)
        worst = max(worst, ratio.max().item())
        gradient_x, gradient_d = torch.autograd.grad(ratio.log().sum(), (x, d))
        with torch.no_grad():
            x = x + 0.3 * scale * gradient_x / gradient_x.abs().amax((1, 2, 3), keepdim=True).clamp_min(1e-12)
            d = d + 0.1 * scale * gradient_d / gradient_d.abs().amax((1, 2, 3), keepdim=True).clamp_min(1e-12)
    assert 0.35 * bound < worst <= bound


@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 10**6), spread=st.sampled_from([1e-4, 1e-2, 1.0, 100.0]))
def test_scattering_is_non_expansive_at_28(seed, spread):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(2, 1, 28, 28, dtype=torch.float64, generator=generator)
    other = x + spread * torch.randn(2, 1, 28, 28, dtype=torch.float64, generator=generator)
    moved = (Scattering()(other) - Scattering()(x)).flatten(1).norm(dim=1)
    assert (moved <= 0.4872 * (other - x).flatten(1).norm(dim=1) * (1 + 1e-9)).all()


@pytest.mark.slow
def test_scattering_constants_of_the_usual_sizes():
    assert Scattering().lipschitz((1, 28, 28)) == pytest.approx(0.4872, abs=1e-4)
    assert Scattering().lipschitz((3, 32, 32)) < 0.49
    assert Scattering().lipschitz((1, 40, 40)) == pytest.approx(0.7141, abs=1e-3)  # the coarser bound of large images
    assert Scattering(J=1).lipschitz((1, 28, 28)) < 1


def _subsampled(weighted, rows, columns, crop=slice(None)):
    """The matrix of u ↦ √w ↓k (h ⋆ u), u with the pixels read at rows × columns."""
    weight, response, k = weighted
    height, width = max(rows) + 1, max(columns) + 1
    images = np.eye(height * width).reshape(-1, height, width)[:, rows][:, :, columns]
    outputs = np.sqrt(weight) * np.fft.ifft2(np.fft.fft2(images) * response)[:, ::k, ::k][:, crop, crop]
    return outputs.reshape(height * width, -1)


@pytest.mark.parametrize("seed", range(4))
def test_layer_bounds_are_operator_norms(seed):
    """Against a dense matrix of the same operator, for random filters: exact, so neither too small nor too large."""
    rng = np.random.default_rng(seed)
    filters = [(rng.uniform(0.1, 2), rng.normal(size=(8, 12)), k) for k in (4, 1, 2, 1, 2)]
    complex_images = np.concatenate([_subsampled(f, range(8), range(12)) for f in filters], axis=1)
    assert frame_bound(filters) == pytest.approx(np.linalg.norm(complex_images, 2) ** 2, rel=1e-9)
    rows, columns = _padding(4, 8), _padding(9, 12)
    parts = [_subsampled(filters[0], rows, columns, slice(1, -1))]
    parts += [_subsampled(f, rows, columns) for f in filters[1:]]
    real_images = np.concatenate([f(part) for part in parts for f in (np.real, np.imag)], axis=1)
    exact = np.linalg.norm(real_images, 2) ** 2
    assert padded_bound(filters[0], filters[1:], rows, columns) == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize(("scales", "side"), [(1, 6), (1, 9), (2, 8), (2, 10)])
def test_bound_of_order_0_is_kymatios_operator_norm(scales, side):
    """Order 0 is linear: its norm read off the transform itself is the bound of its layer, to float32 filters."""
    pixels = torch.eye(side**2, dtype=torch.float64).reshape(-1, 1, side, side)
    matrix = Scattering(J=scales, order=1)(pixels)[:, 0].flatten(1)
    padded = ((side + 2**scales) // 2**scales + 1) * 2**scales
    low_pass = _kymatio()[1](padded, padded, scales, 8)["phi"]["levels"][0]
    bound = padded_bound((1.0, low_pass, 2**scales), [], *[_padding(side, padded)] * 2)
    assert math.sqrt(bound) == pytest.approx(torch.linalg.matrix_norm(matrix, 2).item(), rel=1e-6)


def test_scattering_refuses():
    for options in ({"J": 0}, {"J": 9}, {"L": 0}, {"order": 3}):
        with pytest.raises(ParameterError):
            Scattering(**options)
    with pytest.raises(ParameterError, match="smaller than"):
        Scattering(J=4).output_shape((1, 8, 8))


def test_kymatio_comes_without_its_broken_module():
    Scattering()(torch.rand(1, 1, 8, 8))
    assert "kymatio.scattering3d.filter_bank" not in sys.modules


# -------------------------------------------------------------------------------------------------------------- spec


def test_defaults_and_json():
    assert features("scattering") == FeatureSpec(Scattering(2, 8, 2), group_norm=27, unit_norm=True)
    assert features("dct") == FeatureSpec(Dct())
    for spec in (features("scattering", J=1, group_norm=3, dtype="float16"), features("dct", keep=5, unit_norm=True)):
        assert features(**json.loads(json.dumps(spec.to_json()))) == spec
    assert len({features("dct"), features("dct"), features("dct", keep=3)}) == 2  # hashable


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("scattering", {"keep": 3}, "no option 'keep'"),
        ("dct", {"J": 3}, "no option 'J'; its own options are: keep, group_norm"),
        ("dct", {"keep": 0}, "keep=0"),
        ("dct", {"group_norm": 0}, "group_norm=0"),
        ("dct", {"eps": 0.0}, "eps"),
        ("dct", {"dtype": "int8"}, "float16"),
    ],
)
def test_bad_options(name, options, says):
    with pytest.raises(ParameterError, match=says):
        features(name, **options)


def test_unknown_name_lists_the_known():
    with pytest.raises(
        UnknownNameError,
        match=r"did you mean 'scattering'\? Known: dct, energies, handwriting, module:function, objects, photographs,"
        " scattering",
    ):
        features("scatering")


def test_normalisation_is_per_sample_and_as_declared():
    x = torch.rand(6, 3, 8, 8, dtype=torch.float64) * torch.logspace(-3, 2, 6)[:, None, None, None].double()
    spec = features("scattering", group_norm=9, unit_norm=False, eps=1e-9)
    raw = Scattering()(x)
    groups = raw.reshape(6, 9, -1)
    expected = (groups - groups.mean(2, keepdim=True)) / (groups.var(2, unbiased=False, keepdim=True) + 1e-9).sqrt()
    features_module_output = replace(spec, dtype="float32")(x)
    torch.testing.assert_close(features_module_output, expected.reshape(6, -1).float())
    unit = replace(spec, unit_norm=True)(x)
    torch.testing.assert_close(unit.norm(dim=1), torch.ones(6))
    torch.testing.assert_close(unit[2:3], replace(spec, unit_norm=True)(x[2:3]))
    assert torch.equal(features("dct", unit_norm=True)(torch.zeros(2, 1, 8, 8)), torch.zeros(2, 64))
    assert features("dct", dtype="float16")(torch.rand(2, 1, 8, 8)).dtype == torch.float16


@pytest.mark.parametrize(
    "spec",
    [
        features("dct"),
        features("dct", keep=3),
        features("dct", group_norm=1),
        features("energies", pictures="objects"),
        features("scattering"),
        features("scattering", unit_norm=False),
        features("scattering", group_norm=None, unit_norm=False),
    ],
    ids=str,
)
def test_norm_bound_holds_on_images(spec):
    bound = spec.norm_bound((1, 8, 8))
    images = torch.cat([torch.ones(1, 1, 8, 8), torch.rand(20, 1, 8, 8), torch.rand(20, 1, 8, 8).round()])
    norms = spec(images).norm(dim=1)
    assert norms.max() <= bound * (1 + 1e-6)
    assert norms.max() >= 0.3 * bound
    assert math.isinf(spec.lipschitz((1, 8, 8))) == bool(spec.group_norm or spec.unit_norm)


def test_group_count_must_divide_the_channels(digits):
    with pytest.raises(
        ParameterError, match=r"group_norm=10 does not divide 81 channels: give one of \[1, 3, 9, 27, 81\]"
    ):
        apply(digits, features("scattering", group_norm=10))


# ------------------------------------------------------------------------------------------------------------- apply


SPECS = [features("dct", keep=4), features("scattering"), features("dct", dtype="float16")]


@pytest.mark.parametrize("spec", SPECS, ids=["dct", "scattering", "float16"])
def test_apply_computes_batches_once(digits, spec, tmp_path, monkeypatch):
    monkeypatch.setattr(features_module, "_BATCH", 16)
    calls: list[tuple[int, int]] = []
    first = apply(digits, spec, cache_dir=tmp_path, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(16, 49), (32, 49), (40, 49), (49, 49)]
    assert first.input_shape == spec.output_shape(digits.input_shape)
    torch.testing.assert_close(first.train_x, spec(digits.train_x))
    torch.testing.assert_close(first.test_x, spec(digits.test_x))
    assert torch.equal(first.train_y, digits.train_y)
    assert (first.name, first.num_classes, first.task) == (digits.name, digits.num_classes, digits.task)
    monkeypatch.setattr(features_module, "_write", lambda *_: pytest.fail("computed again"))
    calls.clear()
    second = apply(digits, spec, cache_dir=tmp_path, progress=lambda done, total: calls.append((done, total)))
    assert torch.equal(first.train_x, second.train_x)
    assert torch.equal(first.test_x, second.test_x)
    assert calls == [(40, 49), (49, 49)]
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".json", ".npy", ".npy"]


def test_default_cache_folder(digits, tmp_path, monkeypatch):
    monkeypatch.setenv("LIPDP_CACHE", str(tmp_path))
    apply(digits, features("dct"))
    files = list((tmp_path / "features").iterdir())
    assert len(files) == 4
    assert all(file.stat().st_mode & 0o077 == 0 for file in files)  # features of private records: for the owner alone


def test_writing_to_the_result_leaves_the_cache_alone(digits, tmp_path):
    apply(digits, features("dct"), cache_dir=tmp_path).train_x.zero_()
    assert apply(digits, features("dct"), cache_dir=tmp_path).train_x.abs().sum() > 0


def test_key_sees_data_spec_and_version(digits, tmp_path, monkeypatch):
    def files() -> int:
        return len(list(tmp_path.glob("*.npy")))

    apply(digits, features("dct"), cache_dir=tmp_path)
    assert files() == 2
    moved = digits.train_x.clone()
    moved[17, 0, 3, 3] += 2**-20
    result = apply(replace(digits, train_x=moved), features("dct"), cache_dir=tmp_path)
    assert files() == 3
    torch.testing.assert_close(result.train_x, features("dct")(moved))
    wide = digits.train_x.reshape(40, 1, 4, 16)
    apply(replace(digits, train_x=wide, test_x=digits.test_x.reshape(9, 1, 4, 16)), features("dct"), cache_dir=tmp_path)
    assert files() == 5
    apply(digits, features("dct", group_norm=1), cache_dir=tmp_path)
    assert files() == 7
    monkeypatch.setattr(Dct, "version", lambda self: "another")
    apply(digits, features("dct"), cache_dir=tmp_path)
    assert files() == 9


def _flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _swap(path):
    others = [other for other in path.parent.glob("*.npy") if other != path]
    path.write_bytes(others[0].read_bytes())


@pytest.mark.parametrize(
    "damage",
    [
        _flip,
        _swap,
        lambda path: path.write_bytes(path.read_bytes()[:-7]),
        lambda path: path.write_bytes(path.read_bytes() + b"tail"),
        lambda path: path.write_bytes(b""),
        lambda path: path.unlink(),
        lambda path: path.with_suffix(".json").unlink(),
        lambda path: path.with_suffix(".json").write_bytes(b""),
        lambda path: path.with_suffix(".json").write_bytes(b"\xff\xfe{"),
        lambda path: path.with_suffix(".json").write_text("[1, 2]"),
        lambda path: path.with_suffix(".json").write_text('{"sha256": 3}'),
    ],
)
def test_damaged_cache_is_computed_again(digits, tmp_path, damage):
    good = apply(digits, features("dct"), cache_dir=tmp_path)
    expected = good.train_x.clone(), good.test_x.clone()
    for path in sorted(tmp_path.glob("*.npy")):
        damage(path)
    again = apply(digits, features("dct"), cache_dir=tmp_path)
    assert torch.equal(again.train_x, expected[0])
    assert torch.equal(again.test_x, expected[1])


def test_interrupted_computation_goes_on_where_it_was(digits, tmp_path, monkeypatch):
    monkeypatch.setattr(features_module, "_BATCH", 8)
    whole = apply(digits, features("dct"), cache_dir=tmp_path / "whole").train_x.clone()

    def stop(done: int, total: int) -> None:
        if done > 16:
            raise KeyboardInterrupt

    folder = tmp_path / "cut"
    with pytest.raises(KeyboardInterrupt):
        apply(digits, features("dct"), cache_dir=folder, progress=stop)
    left = sorted(folder.iterdir())
    assert [path.suffix for path in left] == [".part0", ".part1", ".part2"]
    assert all(file.stat().st_mode & 0o077 == 0 for file in left)
    _flip(left[0])
    left[1].write_bytes(left[1].read_bytes()[:-3])
    computed = []
    original = FeatureSpec.__call__
    monkeypatch.setattr(FeatureSpec, "__call__", lambda self, x: computed.append(len(x)) or original(self, x))
    again = apply(digits, features("dct"), cache_dir=folder)
    assert torch.equal(again.train_x, whole)
    assert computed == [8, 8, 8, 8, 8, 1]  # two damaged parts and two that were missing; then the test part
    assert sorted(path.suffix for path in folder.iterdir()) == [".json", ".json", ".npy", ".npy"]


def test_bad_inputs_and_folders(digits, tmp_path):
    bad = digits.train_x.clone()
    bad[21, 0, 0, 0] = float("nan")
    zero = torch.where(bad.isnan(), 0.0, bad)
    found, wanted = (apply(replace(digits, train_x=x), features("dct"), cache_dir=tmp_path) for x in (bad, zero))
    assert torch.equal(found.train_x, wanted.train_x)
    table = replace(digits, train_x=digits.train_x.flatten(1), test_x=digits.test_x.flatten(1))
    for name in ("dct", "scattering"):
        with pytest.raises(ParameterError, match=r"for images \(C, H, W\)"):
            apply(table, features(name), cache_dir=tmp_path)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DataError, match="LIPDP_CACHE"):
        apply(digits, features("dct"), cache_dir=tmp_path / "file" / "deeper")


@pytest.mark.skipif(os.name != "posix", reason="needs a POSIX memory map")
def test_result_is_memory_mapped(digits, tmp_path):
    path = tmp_path / "cache"
    result = apply(digits, features("dct"), cache_dir=path)
    with open("/proc/self/maps") as maps:
        assert any(str(path) in line for line in maps)
    assert result.train_x.is_contiguous()
