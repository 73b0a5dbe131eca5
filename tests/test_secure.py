"""Randomness from a cipher: the right law, nothing in the low bits, exact resume; and digests that show every edit."""

from __future__ import annotations

import io
import json
import math
import shutil
import signal
import sys
from functools import partial

import kit
import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from kit import FALSE_ALARM, has_std, train
from scipy import stats
from torch import nn
from torch.utils.data import TensorDataset

import lipdp
from lipdp import losses
from lipdp import nn as lnn
from lipdp.accounting.digest import check_digest, digest, with_digest
from lipdp.batches.samplers import FixedSizeSampler, PoissonSampler
from lipdp.cli import main
from lipdp.errors import CheckpointError, ParameterError, ResumeError
from lipdp.noise.cipher import ChaChaSource, keystream
from lipdp.noise.gaussian import GaussianNoise, RatchetSource
from lipdp.noise.secure import SecureGaussianNoise
from lipdp.privacy.gate import QuantileGate
from lipdp.training import Interrupted, Trainer, configure

pytestmark = pytest.mark.usefixtures("one_thread", "unjudged")


# --- the cipher -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 10_001])
def test_the_keystream_is_chacha20(count):
    key = int.from_bytes(bytes(range(32)), "little")
    expected = Cipher(algorithms.ChaCha20(bytes(range(32)), bytes(16)), mode=None).encryptor().update(bytes(8 * count))
    assert keystream(key, count).tobytes() == expected


def test_words_are_uniform_and_never_repeat():
    source = ChaChaSource(seed=0)
    words = source.words(10**5)
    kit.assert_all_bits_are_fair(words)
    assert len(torch.cat([words, source.words(10**5), source.words(1)]).unique()) == 2 * 10**5 + 1


def test_seeds_and_states():
    assert not ChaChaSource().seeded
    assert ChaChaSource(seed=1).seeded
    assert torch.equal(ChaChaSource(seed=1).words(5), ChaChaSource(seed=1).words(5))
    assert not torch.equal(ChaChaSource().words(5), ChaChaSource().words(5))
    assert not torch.equal(ChaChaSource(seed=1).words(5), ChaChaSource(seed=2).words(5))
    source, states = ChaChaSource(), []
    for _ in range(20):
        states.append(source.state_dict()["key"])
        source.words(3)
    assert len(set(states)) == 20  # a hash forward: the state holds nothing of the words before it
    with pytest.raises(CheckpointError, match="secure noise"):
        source.load_state_dict(RatchetSource(0).state_dict())
    with pytest.raises(CheckpointError, match="noise"):
        RatchetSource(0).load_state_dict(source.state_dict())


def test_without_the_package_the_reason_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.ciphers", None)
    for make in (
        ChaChaSource,
        SecureGaussianNoise,
        lambda: PoissonSampler(10, sampling_rate=0.5, steps=1, secure=True),
        lambda: private(secure=True),
    ):
        with pytest.raises(ParameterError, match=r'pip install "lipdp\[secure\]"'):
            make()


# --- the law of the draws ---------------------------------------------------------------------------------------------


@pytest.mark.statistical
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_drawn_std_is_the_one_asked_for(dtype):
    stds, shapes = torch.tensor([0.0123, 3.7]), [(500, 1000), (50, 10_000)]
    gradients = [torch.full(shape, 3.0, dtype=dtype) for shape in shapes]
    SecureGaussianNoise(seed=1).add_(gradients, stds)
    for gradient, std in zip(gradients, stds.tolist(), strict=True):
        kit.assert_only_this_std(gradient.flatten().double() - 3.0, std)


@pytest.mark.statistical
def test_draws_are_normal_to_the_tails():
    z = SecureGaussianNoise(seed=2).normal(10**6 + 1, dtype=torch.float64).numpy()
    assert len(z) == 10**6 + 1
    kit.assert_normal_to_the_tails(z)
    pairs = [(z[:-1], z[1:]), (z[: 1 << 13], z[1 << 13 : 1 << 14]), (z[: 1 << 14], z[1 << 14 : 1 << 15])]
    for a, b in pairs:  # neighbours, halves of a block (the two of a pair), blocks
        for x, y in ((a, b), (a**2, b**2)):
            assert abs(np.corrcoef(x, y)[0, 1]) * math.sqrt(len(x)) < stats.norm.isf(FALSE_ALARM / 2)


def test_a_normal_is_made_of_four_of_separate_pairs():
    noise, taken = SecureGaussianNoise(seed=3), []
    words = noise.source.words
    noise.source.words = lambda count: (taken.append(count), words(count))[1]
    z = noise.normal(1000, dtype=torch.float64)
    assert taken == [1000] * 4  # 64 bits for every one of the four, each quarter under a key of its own
    again = ChaChaSource(seed=3)
    quarters = [lipdp.noise.gaussian.normals_from_words_(again.words(1000), dtype=torch.float64) for _ in range(4)]
    assert torch.allclose(z, sum(quarters) / 2, rtol=0, atol=1e-14)


# --- the low bits -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("std", [1e-100, 1e-12, 0.3, 0.5, 1.0, 7.0, 1e9])
def test_what_is_released_is_on_a_grid_that_the_std_alone_decides(std, dtype):
    grid = 2.0 ** (math.floor(math.log2(std)) - 10)
    if std < torch.finfo(dtype).tiny:
        return
    for scale in (0.0, 1e-3, math.pi, 1e3):
        tensor = (torch.randn(1000, dtype=torch.float64) * scale * std).to(dtype)
        SecureGaussianNoise(seed=4).add_([tensor], torch.tensor([std], dtype=torch.float64))
        steps = tensor.double() / grid
        if dtype != torch.bfloat16:  # which rounds once more what is on the grid
            assert torch.equal(steps, steps.round())
        assert len(tensor.unique()) > 100


def finer_than(released: torch.Tensor, spacing: float) -> float:
    """Share of values that are no multiple of `spacing`: zero where something of that spacing's size was added."""
    steps = released.double() / spacing
    return float((steps != steps.round()).double().mean())


@pytest.mark.parametrize("noise", [GaussianNoise, SecureGaussianNoise])
def test_the_attack_on_low_bits_works_on_the_default_and_not_on_the_secure_noise(noise):
    """Mironov (2012): neighbours whose sums are 0 and 1; a float32 above 1 has no bits below 2⁻²³ to give away."""
    zero, one = torch.zeros(4000), torch.ones(4000)
    for tensor in (zero, one):
        noise(seed=5).add_([tensor], torch.tensor([1 / 16]))
    told = finer_than(zero, 2**-25), finer_than(one, 2**-25)
    if noise is GaussianNoise:
        assert told[0] > 0.8
        assert told[1] == 0.0  # one released value decides between the neighbours
    else:
        assert told == (0.0, 0.0)


def test_layouts_zero_stds_and_counts():
    weight = torch.zeros(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    transposed, frozen, empty, scalar = torch.zeros(3, 2).T, torch.full((4,), 0.1), torch.zeros(0), torch.zeros(())
    tensors = [weight, transposed, frozen, empty, nn.Parameter(scalar)]
    SecureGaussianNoise(seed=8).add_(tensors, torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0]))
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(frozen, torch.full((4,), 0.1))
    assert all((t != 0).any() for t in (weight, transposed, scalar))
    SecureGaussianNoise(seed=8).add_([], torch.zeros(0))
    with pytest.raises(lipdp.errors.EngineError, match="shape"):
        SecureGaussianNoise(seed=8).add_([weight], torch.ones(2))


@pytest.mark.parametrize("steps_before", [0, 3])
def test_noise_resumes_bit_identical(steps_before):
    stds, noise, resumed = torch.tensor([0.5, 2.0]), SecureGaussianNoise(), SecureGaussianNoise(seed=9)
    for _ in range(steps_before):
        noise.add_([torch.zeros(40_001), torch.zeros(13)], stds)
    state = json.loads(json.dumps(noise.state_dict()))
    resumed.load_state_dict(state)
    assert not resumed.seeded
    for _ in range(2):
        a, b = ([torch.zeros(40_001), torch.zeros(13)] for _ in range(2))
        noise.add_(a, stds)
        resumed.add_(b, stds)
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# --- batches ----------------------------------------------------------------------------------------------------------


@pytest.mark.statistical
@pytest.mark.parametrize("q", [0.03, 0.5])
def test_every_record_is_in_a_secure_poisson_batch_with_probability_q(q):
    population, steps = 500, 2000
    sampler = PoissonSampler(population, sampling_rate=q, steps=steps, seed=0, secure=True)
    counts, sizes = np.zeros(population), []
    for batch in sampler:
        assert batch.dtype == torch.int64
        assert bool((batch.diff() > 0).all())
        counts[batch.numpy()] += 1
        sizes.append(len(batch))
    low, high = stats.binom.ppf([FALSE_ALARM / 2, 1 - FALSE_ALARM / 2], population * steps, q)
    assert low <= sum(sizes) <= high
    assert not low <= sum(sizes) * 1.05 <= high
    each = ((counts - q * steps) ** 2 / (q * (1 - q) * steps)).sum()
    assert stats.chi2.ppf(FALSE_ALARM / 2, population) <= each <= stats.chi2.ppf(1 - FALSE_ALARM / 2, population)
    spread = ((np.array(sizes) - q * population) ** 2).sum() / (q * (1 - q) * population)
    assert stats.chi2.ppf(FALSE_ALARM / 2, steps) <= spread <= stats.chi2.ppf(1 - FALSE_ALARM / 2, steps)


def test_secure_batches_at_the_edges():
    assert [len(b) for b in PoissonSampler(7, sampling_rate=1.0, steps=2, secure=True)] == [7, 7]
    assert [len(b) for b in PoissonSampler(7, sampling_rate=1e-18, steps=2, secure=True)] == [0, 0]
    for size in (1, 4, 10):
        sampler = FixedSizeSampler(10, batch_size=size, steps=5, seed=0, secure=True)
        assert [len(set(batch.tolist())) for batch in sampler] == [size] * 5


@pytest.mark.statistical
def test_secure_fixed_batches_are_uniform():
    counts = np.zeros((6, 6))
    for batch in FixedSizeSampler(6, batch_size=2, steps=6000, seed=0, secure=True):
        counts[tuple(batch.tolist())] += 1
    seen = counts[np.triu_indices(6, 1)]
    assert seen.sum() == 6000
    assert stats.chisquare(seen).pvalue > FALSE_ALARM


def test_secure_batches_resume_and_do_not_mix_with_others():
    options = {"sampling_rate": 0.3, "steps": 6}
    sampler = PoissonSampler(50, secure=True, **options)
    first = iter(sampler)
    next(first)
    state = sampler.state_dict()
    rest = [batch.tolist() for batch in first]
    again = PoissonSampler(50, secure=True, seed=1, **options)
    again.load_state_dict(state)
    assert [batch.tolist() for batch in again] == rest
    with pytest.raises(CheckpointError, match="sampling"):
        PoissonSampler(50, **options).load_state_dict(state)


# --- runs -------------------------------------------------------------------------------------------------------------

private = partial(kit.private, secure=True, seed=None, momentum=0.9)


@pytest.mark.parametrize(("seed", "sampling"), [(0, "poisson"), (None, "fixed_size")])
def test_a_secure_run_resumes_bit_identical(seed, sampling):
    options = {"seed": seed, "sampling": sampling, "gate": QuantileGate(0.5, count_std=4.0)}
    engine, model, optimizer, loader, criterion = private(**options)
    assert (engine.plan.secure, engine.plan.seeded) == (True, seed is not None)
    train(model, optimizer, loader, criterion, steps=2)
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict(), engine.state_dict()], file)
    train(model, optimizer, loader, criterion)
    file.seek(0)
    weights, moments, state = torch.load(file, weights_only=True)
    again, model2, optimizer2, loader2, criterion2 = private(**options)
    model2.load_state_dict(weights)
    optimizer2.load_state_dict(moments)
    again.load_state_dict(state)
    train(model2, optimizer2, loader2, criterion2)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), model2.parameters(), strict=True))
    assert engine.state_dict() == again.state_dict()
    with pytest.raises(ResumeError, match="secure was True, is now False"):
        private(secure=False, **options)[0].load_state_dict(state)


@pytest.mark.statistical
def test_the_noise_on_the_weights_is_what_epsilon_was_computed_from():
    model = nn.Sequential(lnn.InputBound(1.0), nn.Linear(100, 300, bias=False))
    dataset = TensorDataset(torch.randn(64, 100), torch.randint(300, (64,)))
    engine, model, optimizer, loader, criterion = kit.private(
        model, dataset, secure=True, lr=1.0, expected_batch_size=16, steps=2, noise_multiplier=1.7,
        criterion=losses.TauCrossEntropy(),
    )  # fmt: skip
    start, std = model[1].weight.detach().clone(), engine.noise_stds()["1.weight"]
    assert std == pytest.approx(1.7 * math.sqrt(2), rel=1e-3)
    for x, y in loader:
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        summed = model[1].weight.grad.double()
        optimizer.step()
        drawn = (start.double() - model[1].weight.detach().double()) * 16 - summed
        assert has_std(drawn, std)
        assert not has_std(drawn * 0.95, std)
        model[1].weight.data.copy_(start)


# --- digests ----------------------------------------------------------------------------------------------------------

EDITS = {
    "plan": lambda s: s["plan"].update(steps=7),
    "ledger": lambda s: s["ledger"]["events"][0].update(steps=1),
    "before": lambda s: s.update(before=1),
    "position": lambda s: s["loader"].update(position=1),
    "noise key": lambda s: s["noise"].update(key="00" * 32),
    "sampling key": lambda s: s["loader"]["ratchet"].update(key="00" * 32),
    "seeded": lambda s: s["noise"].update(seeded=False),
    "gate": lambda s: s["gate"].update(bound=0.1),
}


@pytest.fixture(scope="module")
def engine_state():
    """JSON of one that is taken as it is."""
    engine, model, optimizer, loader, criterion = private(secure=False, seed=0)
    train(model, optimizer, loader, criterion, steps=2)
    state = json.dumps(engine.state_dict())
    private(secure=False, seed=0)[0].load_state_dict(json.loads(state))
    return state


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_engine_state_is_refused(edit, engine_state):
    state = json.loads(engine_state)
    EDITS[edit](state)
    with pytest.raises(ResumeError):
        private(secure=False, seed=0)[0].load_state_dict(state)


def test_digests():
    values = with_digest({"a": 0.1, "b": {"c": [1, None, True]}})
    check_digest(values, "it")
    check_digest(json.loads(json.dumps(values, indent=2)), "it")
    assert digest({"b": 1, "a": 2}) == digest({"a": 2, "b": 1})
    for edited in ({**values, "a": 0.2}, {**values, "e": 1}, {k: v for k, v in values.items() if k != "digest"}):
        with pytest.raises(ResumeError, match="it was changed after it was written"):
            check_digest(edited, "it")


QUICK = {"model": "linear", "steps": 8, "batch_size": 128, "noise_multiplier": 2.0, "accountant": "rdp"}


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory, one_thread):
    folder = tmp_path_factory.mktemp("secure") / "run"
    with pytest.raises(Interrupted):
        Trainer(
            configure(**QUICK, checkpoint_every=2, secure=True), out=folder, monitor=kit.Raises(4, signal.SIGINT)
        ).run()
    return folder


@pytest.fixture
def stopped(interrupted, tmp_path):
    return shutil.copytree(interrupted, tmp_path / "run")


def test_a_secure_run_says_so_and_goes_on(stopped):
    report = json.loads((stopped / "privacy.json").read_text())
    assert (report["secure"], report["seeded"]) == (True, False)
    assert report["digest"] == digest(report)
    assert Trainer.resume(stopped, check_every=1).run().steps == 8
    report = json.loads((stopped / "privacy.json").read_text())
    assert report["digest"] == digest(report)
    assert report["steps"] == 8


@pytest.mark.parametrize(
    ("name", "value"),
    [("epsilon", 0.01), ("noise_multiplier", 9.0), ("seeded", True), ("steps", 1), ("delta", 1e-9), ("secure", False)],
)
def test_an_edited_privacy_json_is_refused(name, value, stopped):
    path = stopped / "privacy.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
    with pytest.raises(ResumeError, match=r"privacy\.json was changed after it was written"):
        Trainer.resume(stopped)


@pytest.mark.parametrize(
    ("name", "value"), [("secure", False), ("seed", 0), ("noise_multiplier", 9.0), ("delta", 1e-9)]
)
def test_an_edited_config_is_refused(name, value, stopped):
    path = stopped / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
    with pytest.raises(ResumeError, match=f"{name} was {value}"):
        Trainer.resume(stopped)


CHECKPOINT_EDITS = {
    "plan": lambda c: c["plan"].update(noise_multiplier=9.0),
    "plan of the engine": lambda c: c["resume"]["engine"]["plan"].update(delta=9.0),
    "ledger": lambda c: c["resume"]["engine"]["ledger"]["events"][0].update(steps=1),
    "a larger sigma in it": lambda c: c["resume"]["engine"]["ledger"]["events"][0].update(noise_multiplier=9.0),
    "noise key": lambda c: c["resume"]["engine"]["noise"].update(key="00" * 32),
    "config": lambda c: c["config"].update(batch_size=64),
}


@pytest.mark.parametrize("edit", CHECKPOINT_EDITS)
def test_an_edited_checkpoint_is_refused(edit, stopped):
    saved = torch.load(stopped / "checkpoint.pt", weights_only=True)
    CHECKPOINT_EDITS[edit](saved)
    torch.save(saved, stopped / "checkpoint.pt")
    with pytest.raises(ResumeError):
        Trainer.resume(stopped)


def test_the_command_has_both_flags(tmp_path, capsys):
    settings = ["--model", "linear", "--steps", "4", "--batch-size", "128", "--noise-multiplier", "2"]
    out = str(tmp_path / "run")
    assert main(["train", *settings, "--accountant", "rdp", "--secure", "--check-every", "2", "--out", out]) == 0
    assert "NOT private" not in capsys.readouterr().out
    report = json.loads((tmp_path / "run" / "privacy.json").read_text())
    assert (report["secure"], report["seeded"]) == (True, False)
    out = str(tmp_path / "seeded")
    assert main(["train", *settings, "--accountant", "rdp", "--secure", "--seed", "1", "--out", out]) == 0
    assert "NOT private" in capsys.readouterr().out
    assert json.loads((tmp_path / "seeded" / "privacy.json").read_text())["seeded"] is True
    assert main(["train", *settings, "--check-every", "-1", "--out", str(tmp_path / "bad")]) == 2


@pytest.mark.parametrize("given", [{"secure": 1}, {"secure": "yes"}, {"check_every": -1}, {"check_every": True}])
def test_settings_out_of_range(given):
    with pytest.raises(ParameterError, match=next(iter(given))):
        configure(**QUICK, **given)
