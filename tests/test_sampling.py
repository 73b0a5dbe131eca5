"""The batches have the law that the accountant assumes, resume exactly, and reach the loop as they were drawn."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import signal
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kit import FALSE_ALARM
from scipy import stats
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset

from lipdp.accounting.relation import Relation
from lipdp.batches import samplers as sampling
from lipdp.batches.loader import BatchLoader
from lipdp.batches.samplers import FixedSizeSampler, PoissonSampler, Sampler
from lipdp.errors import BudgetSpentWarning, CheckpointError, DataError, EngineError, ParameterError, ResumeError
from lipdp.noise.cipher import keystream, keystream_blocks
from lipdp.noise.ratchet import Ratchet

pytestmark = pytest.mark.usefixtures("one_thread")

# --- the law ----------------------------------------------------------------------------------------------------------


def inclusion(batches, population) -> np.ndarray:
    """(steps, population) of 0/1; duplicates inside a batch would show as 2."""
    table = np.zeros((len(batches), population))
    for row, batch in zip(table, batches, strict=True):
        np.add.at(row, np.asarray(batch), 1)
    return table


def binomial_counts(counts, n, p) -> bool:
    """χ² test that the counts are independent Binomial(n, p), values pooled until 10 are expected in each cell."""
    cumulative = np.concatenate([[0.0], stats.binom.cdf(np.arange(n + 1), n, p)])  # cumulative[k] = P(X < k)
    edges = [0]
    for value in range(1, n + 1):
        left, right = cumulative[value] - cumulative[edges[-1]], 1 - cumulative[value]
        if len(counts) * min(left, right) >= 10:
            edges.append(value)
    edges.append(n + 1)
    expected = len(counts) * np.diff(cumulative[edges])
    observed = np.histogram(counts, bins=np.array(edges) - 0.5)[0]
    return stats.chisquare(observed, expected).pvalue > FALSE_ALARM


def independent_columns(table, p) -> bool:
    """Pairs of centred 0/1 columns: under independence Σ_t a_t b_t / (p(1−p)√T) is N(0, 1); Bonferroni over
    pairs, with 20 % of room for the skewness that a small p leaves at finite T."""
    centred = (table - p) / math.sqrt(p * (1 - p))
    scores = (centred.T @ centred / math.sqrt(len(table)))[np.triu_indices(table.shape[1], 1)]
    mean_is_zero = abs(scores.sum()) / math.sqrt(len(scores)) < stats.norm.isf(FALSE_ALARM / 2)
    return mean_is_zero and np.abs(scores).max() < stats.norm.isf(FALSE_ALARM / 2 / len(scores)) * 1.2


def verdicts(batches, population, q) -> dict[str, bool]:
    """Everything that tells independent Bernoulli inclusions from other ways of making batches."""
    table = inclusion(batches, population)
    return {
        "distinct": table.max() <= 1,
        "sizes": binomial_counts(table.sum(1), population, q),
        "marginals": binomial_counts(table.sum(0), len(batches), q),
        "records": independent_columns(table, q),
        "steps": independent_columns(np.array([table[:-1].ravel(), table[1:].ravel()]).T, q),
    }


def bernoulli(population, q, steps):
    generator = np.random.default_rng(0)
    return [np.flatnonzero(generator.random(population) < q) for _ in range(steps)]


def shuffled_epochs(population, size, steps):
    generator, batches = np.random.default_rng(0), []
    while len(batches) < steps:
        batches += np.array_split(generator.permutation(population), population // size)
    return batches[:steps]


@pytest.mark.statistical
@pytest.mark.parametrize(
    "q", [0.02, 0.2, 0.5]
)  # on both sides of numpy's switch of algorithm, for a large population too
def test_poisson_batches_are_independent_bernoulli_inclusions(q):
    sampler = PoissonSampler(100, sampling_rate=q, steps=4000, seed=1)
    found = verdicts(list(sampler), 100, q)
    assert all(found.values()), found
    reference = verdicts(bernoulli(100, q, 4000), 100, q)
    assert all(reference.values()), reference


@pytest.mark.statistical
def test_the_same_tests_reject_other_batches():
    epochs = verdicts(shuffled_epochs(100, 20, 4000), 100, 0.2)
    assert not any(epochs[test] for test in ("sizes", "marginals", "records", "steps")), epochs
    fixed = verdicts(list(FixedSizeSampler(100, batch_size=20, steps=4000, seed=0)), 100, 0.2)
    assert not fixed["sizes"]
    assert not fixed["records"]
    five_percent_off = verdicts(bernoulli(100, 0.21, 4000), 100, 0.2)
    assert not five_percent_off["sizes"]
    assert not five_percent_off["marginals"]
    with_replacement = [np.random.default_rng(s).integers(0, 100, 20) for s in range(4000)]
    assert not verdicts(with_replacement, 100, 0.2)["distinct"]


@pytest.mark.statistical
@pytest.mark.parametrize("q", [0.04, 0.08])
def test_poisson_batches_of_a_large_population(q):
    """Above 10⁴ records numpy has two algorithms, switching at a twentieth: same checks on 200 groups of records."""
    population, steps = 20_000, 600
    sizes, groups = [], np.zeros(200)
    for batch in PoissonSampler(population, sampling_rate=q, steps=steps, seed=2):
        assert len(batch.unique()) == len(batch)
        sizes.append(len(batch))
        groups += np.bincount(batch.numpy() // 100, minlength=200)
    z = (np.array(sizes) - population * q) / math.sqrt(population * q * (1 - q))
    assert stats.kstest(z, "norm").pvalue > FALSE_ALARM
    assert binomial_counts(groups, 100 * steps, q)


@pytest.mark.statistical
def test_fixed_size_batches_are_uniform_and_independent():
    sampler = FixedSizeSampler(50, batch_size=10, steps=20_000, seed=3)
    table = inclusion(list(sampler), 50)
    assert (table.sum(1) == 10).all()
    assert table.max() == 1
    z = (table.sum(0) - 4000) / math.sqrt(20_000 * 0.2 * 0.8)  # 50 marginals, negatively correlated: Bonferroni
    assert np.abs(z).max() < stats.norm.isf(FALSE_ALARM / 100)
    pair = (10 * 9) / (50 * 49)  # probability that two given records meet
    together = (table.T @ table)[np.triu_indices(50, 1)]
    z = (together - 20_000 * pair) / math.sqrt(20_000 * pair * (1 - pair))
    assert np.abs(z).max() < stats.norm.isf(FALSE_ALARM / 2 / len(z)) * 1.1
    assert independent_columns(np.array([table[:-1].ravel(), table[1:].ravel()]).T, 0.2)


def codes_of(batches):
    """A whole number for every subset."""
    return [int((1 << batch.numpy()).sum()) for batch in batches]


def subset_frequencies(codes, population, q) -> float:
    """p-value of the χ² test of all 2^N subsets against q^|S| (1−q)^(N−|S|), the rarest in one cell."""
    observed = np.bincount(codes, minlength=1 << population).astype(float)
    sizes = np.array([bin(code).count("1") for code in range(1 << population)])
    expected = len(codes) * q**sizes * (1 - q) ** (population - sizes)
    rare = expected < 10
    pool = lambda cells: np.append(cells[~rare], cells[rare].sum()) if rare.any() else cells  # noqa: E731
    return stats.chisquare(pool(observed), pool(expected)).pvalue


@pytest.mark.statistical
@pytest.mark.parametrize("way", ["binomial", "arrivals", "secure"])
def test_every_subset_comes_as_often_as_coin_flips_give_it(way, monkeypatch):
    if way == "arrivals":
        monkeypatch.setattr(sampling, "_MANY", 0)
        monkeypatch.setattr(sampling, "_SPARSE", 1.0)
    if way == "secure":
        pytest.importorskip("cryptography")
    codes = codes_of(PoissonSampler(6, sampling_rate=0.3, steps=20_000, seed=1, secure=way == "secure"))
    assert subset_frequencies(codes, 6, 0.3) > FALSE_ALARM
    for wrong in (0.3 * 0.95, 0.3 * 1.05):
        assert subset_frequencies(codes, 6, wrong) < FALSE_ALARM
    dependent = [torch.arange(6)[torch.rand(1).expand(6) < 0.3] for _ in range(2000)]  # right marginals, all or nothing
    assert subset_frequencies(codes_of(dependent), 6, 0.3) < FALSE_ALARM


@pytest.mark.statistical
def test_the_batches_of_a_very_large_population_are_drawn_otherwise_and_alike(monkeypatch):
    """What serves beyond 2²⁰ records passes every test on 100 records that the binomial draw passes."""
    monkeypatch.setattr(sampling, "_MANY", 0)
    found = verdicts(list(PoissonSampler(100, sampling_rate=0.05, steps=4000, seed=1)), 100, 0.05)
    assert all(found.values()), found
    batches = list(PoissonSampler(100, sampling_rate=0.0525, steps=4000, seed=1))
    assert not verdicts(batches, 100, 0.05)["marginals"]
    monkeypatch.setattr(sampling, "_SPARSE", 1.0)
    assert not verdicts(list(PoissonSampler(100, sampling_rate=0.0525, steps=4000, seed=1)), 100, 0.05)["sizes"]


@pytest.mark.statistical
@pytest.mark.parametrize("population", [2**20 + 1, 10**9, 2**40])
def test_sizes_and_records_of_a_very_large_population(population):
    """Mean, spread and place of 400 batches; each test would notice 5 % in q."""
    q, steps = 4096 / population, 400
    batches = list(PoissonSampler(population, sampling_rate=q, steps=steps, seed=3))
    sizes = np.array([len(batch) for batch in batches])
    z = (sizes.sum() - 4096 * steps) / math.sqrt(4096 * steps * (1 - q))
    assert abs(z) < stats.norm.isf(FALSE_ALARM / 2)
    assert abs(sizes.sum() * 1.05 - 4096 * steps) / math.sqrt(4096 * steps) > stats.norm.isf(FALSE_ALARM / 2)
    spread = ((sizes - 4096) ** 2).sum() / (4096 * (1 - q))
    assert stats.chi2.ppf(FALSE_ALARM / 2, steps) < spread < stats.chi2.isf(FALSE_ALARM / 2, steps)
    groups = np.bincount(np.concatenate([batch.numpy() * 64 // population for batch in batches]), minlength=64)
    assert stats.chisquare(groups).pvalue > FALSE_ALARM
    assert all(bool((batch.diff() > 0).all()) for batch in batches)


@pytest.mark.parametrize("block", [1, 7, 1 << 17])
def test_secure_batches_do_not_depend_on_the_blocks_they_are_drawn_in(block, monkeypatch):
    pytest.importorskip("cryptography")
    monkeypatch.setattr(sampling, "keystream_blocks", lambda key, count: keystream_blocks(key, count, block=block))
    poisson, fixed = (
        PoissonSampler(50, sampling_rate=0.3, steps=5, seed=0, secure=True),
        FixedSizeSampler(50, batch_size=9, steps=5, seed=0, secure=True),
    )
    ratchet = Ratchet("secure sampling", 0)
    for batch, other in zip(poisson, fixed, strict=True):
        words = keystream(ratchet.advance(), 50)
        assert batch.tolist() == np.flatnonzero(words < 0.3 * 2**64).tolist()
        assert other.tolist() == sorted(np.argsort(words)[:9].tolist())


@pytest.mark.parametrize("kind", [PoissonSampler, FixedSizeSampler])
def test_secure_batches_cost_memory_for_a_block_and_the_batch_only(kind):
    pytest.importorskip("cryptography")
    population = 3 * 10**6  # 24 MB of words
    size = {"sampling_rate": 1e-4} if kind is PoissonSampler else {"batch_size": 300}
    sampler = kind(population, steps=2, seed=0, secure=True, **size)
    tracemalloc.start()
    batches = list(sampler)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert all(200 < len(batch) < 400 for batch in batches)
    assert peak < 6e6


@pytest.mark.statistical
@pytest.mark.parametrize("population", [10**9, 2**40])
def test_a_billion_records_cost_no_memory(population):
    seen = []
    sampler = PoissonSampler(population, sampling_rate=4096 / population, steps=20, seed=4)
    tracemalloc.start()
    for batch in sampler:
        assert len(batch.unique()) == len(batch)
        seen.append(batch.numpy() / population)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10e6
    assert stats.kstest(np.concatenate(seen), "uniform").pvalue > FALSE_ALARM


@given(st.integers(1, 300), st.floats(1e-3, 1.0), st.integers(0, 2**64))
@settings(max_examples=60)
def test_batches_are_sorted_sets_of_valid_indices(population, q, seed):
    size = max(1, int(q * population))
    for sampler in (
        PoissonSampler(population, sampling_rate=q, steps=3, seed=seed),
        FixedSizeSampler(population, batch_size=size, steps=3, seed=seed),
    ):
        batches = list(sampler)
        assert len(batches) == 3
        for batch in batches:
            assert batch.dtype == torch.int64
            assert batch.tolist() == sorted(set(batch.tolist()))
            assert all(0 <= index < population for index in batch.tolist())
            assert isinstance(sampler, PoissonSampler) or len(batch) == size


def test_empty_batches_are_batches():
    sampler = PoissonSampler(10, sampling_rate=0.01, steps=200, seed=0)
    sizes = [len(batch) for batch in sampler]
    assert len(sizes) == 200
    assert sizes.count(0) > 150
    assert all(len(batch) == 10 for batch in PoissonSampler(10, sampling_rate=1.0, steps=3))


# --- facts, seeds, states ---------------------------------------------------------------------------------------------


def test_facts_of_the_samplers():
    poisson, fixed = PoissonSampler(8, sampling_rate=0.5, steps=7), FixedSizeSampler(8, batch_size=2, steps=7)
    assert isinstance(poisson, Sampler)
    assert isinstance(fixed, Sampler)
    assert (poisson.relation, fixed.relation) == (Relation.ADD_OR_REMOVE_ONE, Relation.REPLACE_ONE)
    assert (poisson.sampling_rate, fixed.sampling_rate) == (0.5, 0.25)
    assert len(poisson) == len(fixed) == 7
    list(poisson)
    assert (len(poisson), poisson.position, list(poisson)) == (7, 7, [])


def test_seeds():
    def first(seed):
        return next(iter(FixedSizeSampler(10**6, batch_size=5, steps=1, seed=seed))).tolist()

    assert first(1) == first(1) != first(2)
    assert first(None) != first(None)
    assert not PoissonSampler(5, sampling_rate=0.5, steps=1).seeded
    assert PoissonSampler(5, sampling_rate=0.5, steps=1, seed=0).seeded
    with pytest.raises(ParameterError, match="seed"):
        PoissonSampler(5, sampling_rate=0.5, steps=1, seed=-3)


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (PoissonSampler, {"sampling_rate": 0.0}, "sampling_rate"),
        (PoissonSampler, {"sampling_rate": 1.01}, "sampling_rate"),
        (PoissonSampler, {"sampling_rate": math.nan}, "sampling_rate"),
        (PoissonSampler, {"sampling_rate": 0.5, "steps": 0}, "steps"),
        (PoissonSampler, {"sampling_rate": 0.5, "steps": 2.5}, "steps"),
        (PoissonSampler, {"sampling_rate": 0.5, "population": 0}, "population"),
        (FixedSizeSampler, {"batch_size": 2, "population": 0}, "population"),
        (FixedSizeSampler, {"batch_size": 2, "steps": -1}, "steps"),
        (FixedSizeSampler, {"batch_size": 0}, "batch_size"),
        (FixedSizeSampler, {"batch_size": 11}, "more than the 10 records"),
    ],
)
def test_arguments_outside_their_range(kind, arguments, message):
    with pytest.raises(ParameterError, match=message):
        kind(**{"population": 10, "steps": 3, **arguments})


def make_poisson(seed):
    return PoissonSampler(99, sampling_rate=0.3, steps=12, seed=seed)


def make_fixed(seed):
    return FixedSizeSampler(99, batch_size=30, steps=12, seed=seed)


@pytest.mark.parametrize("make", [make_poisson, make_fixed])
@pytest.mark.parametrize("done", [0, 5, 12])
def test_sampler_resumes_exactly(make, done, tmp_path):
    whole = [batch.tolist() for batch in make(5)]
    interrupted = make(5)
    batches = iter(interrupted)
    assert [next(batches).tolist() for _ in range(done)] == whole[:done]
    torch.save(interrupted.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert json.loads(json.dumps(state)) == state
    resumed = make(None)
    resumed.load_state_dict(state)
    assert resumed.position == done
    assert resumed.seeded
    assert [batch.tolist() for batch in resumed] == whole[done:]


def test_a_state_of_other_facts_is_refused():
    state = PoissonSampler(99, sampling_rate=0.3, steps=12).state_dict()
    for other in (
        PoissonSampler(98, sampling_rate=0.3, steps=12),
        PoissonSampler(99, sampling_rate=0.31, steps=12),
        PoissonSampler(99, sampling_rate=0.3, steps=13),
        FixedSizeSampler(99, batch_size=30, steps=12),
    ):
        before = other.state_dict()
        with pytest.raises(ResumeError, match=r"was .* in the saved sampler"):
            other.load_state_dict(state)
        assert other.state_dict() == before
    for damage in ({"position": 13}, {"position": None}, {"ratchet": None}, {"ratchet": {}}):
        with pytest.raises(CheckpointError):
            PoissonSampler(99, sampling_rate=0.3, steps=12).load_state_dict({**state, **damage})


# --- the loader -------------------------------------------------------------------------------------------------------


class Records(Dataset):
    """Record i is (a (2, 3) tensor full of i, the number i)."""

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        if not 0 <= index < self.size:
            raise IndexError(index)
        return torch.full((2, 3), float(index)), index


def as_tensors(size):
    records = [Records(size)[index] for index in range(size)]
    return TensorDataset(torch.stack([x for x, _ in records]), torch.tensor([y for _, y in records]))


def poisson(seed=0, q=0.05, steps=30):
    return PoissonSampler(40, sampling_rate=q, steps=steps, seed=seed)


@pytest.mark.parametrize(
    ("dataset", "workers"),
    [
        (as_tensors(40), 0),
        (as_tensors(40), 2),
        (Records(40), 0),
        (Records(40), 2),
        (Subset(as_tensors(50), range(40)), 0),  # has __getitems__
    ],
    ids=["tensors", "tensors-2", "map", "map-2", "subset"],
)
def test_every_kind_of_dataset_gives_the_drawn_batches(dataset, workers):
    drawn = [batch.tolist() for batch in poisson()]
    assert [] in drawn
    loader = BatchLoader(dataset, poisson(), num_workers=workers, pin_memory=True)
    state = torch.get_rng_state()
    seen = []
    for step, (x, y) in enumerate(loader):
        assert isinstance(x, torch.Tensor)
        assert (x.shape, y.shape) == ((len(drawn[step]), 2, 3), (len(drawn[step]),))
        assert (x.dtype, y.dtype) == (torch.float32, torch.int64)
        assert loader.drawn.rows == len(y)
        assert loader.position == step + 1
        assert torch.equal(x[:, 0, 0].long(), y)
        seen.append(y.tolist())
    assert seen == drawn
    assert len(loader) == 30
    with pytest.warns(BudgetSpentWarning, match="all 30 batches .* more steps"):
        assert list(loader) == []
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("done", [0, 1, 7])
def test_loader_resumes_after_what_was_consumed(workers, done):
    drawn = [batch.tolist() for batch in poisson()]
    loader = BatchLoader(Records(40), poisson(), num_workers=workers)
    assert loader.drawn is None
    batches = iter(loader)
    for _ in range(done):
        next(batches)
    state = json.loads(json.dumps(loader.state_dict()))
    if done:
        assert loader.sampler.position >= done + 2 * workers  # workers have drawn ahead
    resumed = BatchLoader(Records(40), poisson(seed=None), num_workers=workers)
    resumed.load_state_dict(state)
    assert resumed.position == done
    assert [y.tolist() for _, y in resumed] == drawn[done:]
    # Breaking out and iterating again goes on in the same place; the old iteration is dead and disturbs nothing.
    newest = iter(loader)
    again = [next(newest)[1].tolist()]
    if done:
        with pytest.raises(EngineError, match="iterated again"):
            next(batches)
    assert again + [y.tolist() for _, y in newest] == drawn[done:]


def test_loading_a_state_ends_running_iterations():
    loader = BatchLoader(as_tensors(40), poisson())
    state = loader.state_dict()
    batches = iter(loader)
    next(batches)
    loader.load_state_dict(state)
    with pytest.raises(EngineError, match="iterated again"):
        next(batches)
    assert loader.position == 0


def test_records_of_other_shapes():
    class Named(Records):
        def __getitem__(self, index):
            return {"x": np.float32(index), "both": (torch.zeros(2), 1.5)}

    sizes = [len(batch) for batch in poisson()]
    for batch, size in zip(BatchLoader(Named(40), poisson()), sizes, strict=True):
        assert batch["x"].shape == (size,)
        assert batch["both"][0].shape == (size, 2)
        assert batch["both"][1].dtype == torch.float64

    class Text(Records):
        def __getitem__(self, index):
            return torch.zeros(2), "text"

    with pytest.raises(DataError, match="str"):
        list(BatchLoader(Text(40), poisson()))


def test_a_subclass_of_tensor_dataset_keeps_its_own_getitem():
    class Doubled(TensorDataset):
        def __getitem__(self, index):
            x, y = super().__getitem__(index)
            return 2 * x, y

    for x, y in BatchLoader(Doubled(*as_tensors(40).tensors), poisson()):
        assert torch.equal(x[:, 0, 0].long(), 2 * y)


def test_datasets_that_cannot_be_sampled():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(range(40))

    class NoLength(Dataset):
        def __getitem__(self, index):
            return index

    for dataset in (Stream(), NoLength()):
        with pytest.raises(EngineError, match=r"can't be sampled.*map-style"):
            BatchLoader(dataset, poisson())
    with pytest.raises(ParameterError, match="41 records, but the sampler draws from 40"):
        BatchLoader(Records(41), poisson())
    with pytest.raises(ParameterError, match="num_workers"):
        BatchLoader(Records(40), poisson(), num_workers=-1)


def test_a_failing_record_does_not_count_as_consumed():
    class Broken(Records):
        def __getitem__(self, index):
            raise OSError("disk")

    loader = BatchLoader(Broken(40), poisson(q=1.0))
    with pytest.raises(OSError, match="disk"):
        next(iter(loader))
    assert loader.position == 0


class Noisy(Records):
    """Adds a draw of torch's generator to every record."""

    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return x + torch.rand(()), y


def test_what_a_dataset_draws_is_the_same_with_any_number_of_workers_and_on_resume():
    def noise(loader):
        return [(x[:, 0, 0] - y).tolist() for x, y in loader]

    state = torch.get_rng_state()
    alone, helped = (noise(BatchLoader(Noisy(40), poisson(q=0.5), num_workers=n)) for n in (0, 2))
    assert alone == helped
    assert torch.equal(state, torch.get_rng_state())
    drawn = [value for batch in alone for value in batch]
    assert len({round(value, 4) for value in drawn}) > 0.95 * len(drawn)  # fresh for every record and step
    assert 0.4 < np.mean(drawn) < 0.6
    loader = BatchLoader(Noisy(40), poisson(q=0.5))
    batches = iter(loader)
    for _ in range(7):
        next(batches)
    resumed = BatchLoader(Noisy(40), poisson(seed=None, q=0.5), num_workers=2)
    resumed.load_state_dict(loader.state_dict())
    assert noise(resumed) == alone[7:]
    assert noise(BatchLoader(Noisy(40), poisson(seed=1, q=0.5))) != alone


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_of_the_library_in_a_worker_keeps_its_kind_and_message(workers):
    class Refuses(Records):
        def __getitem__(self, index):
            raise DataError("record 3 is no image")

    with pytest.raises(DataError) as caught:
        list(BatchLoader(Refuses(40), poisson(q=1.0), num_workers=workers))
    assert str(caught.value) == "record 3 is no image"


def test_a_worker_that_ends_is_an_error_that_says_what_to_do():
    class Ends(Records):
        def __getitem__(self, index):
            os._exit(1)

    with pytest.raises(DataError, match="Try fewer workers"):
        list(BatchLoader(Ends(40), poisson(q=1.0), num_workers=1))


def test_workers_end_with_the_iteration_and_an_interrupt_is_for_the_process_that_trains():
    def children():
        return set(multiprocessing.active_children())

    before = children()
    batches = iter(BatchLoader(Records(40), poisson(), num_workers=2))
    next(batches), next(batches)  # one of each worker
    started = children() - before
    assert len(started) == 2
    for worker in started:
        os.kill(worker.pid, signal.SIGINT)
    assert len(next(batches)) == 2
    batches.close()
    assert children() == before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_tensors_on_the_gpu_stay_there():
    dataset = TensorDataset(*(tensor.cuda() for tensor in as_tensors(40).tensors))
    for x, y in BatchLoader(dataset, poisson()):
        assert x.is_cuda
        assert torch.equal(x[:, 0, 0].long(), y)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_for_the_gpu_are_pinned_and_those_there_are_left(workers):
    for x, y in BatchLoader(Records(40), poisson(), num_workers=workers, pin_memory=True):
        assert x.is_pinned()
        assert torch.equal(x.to("cuda", non_blocking=True)[:, 0, 0].long().cpu(), y)
    there = TensorDataset(*(tensor.cuda() for tensor in as_tensors(40).tensors))
    assert all(x.is_cuda for x, _ in BatchLoader(there, poisson(), num_workers=workers, pin_memory=True))
