"""One record is in the sum once: copies by memory, by table and by process, indices that change, reading in batches."""

import random
from functools import partial

import kit
import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, Dataset, DistributedSampler, Subset, TensorDataset

from lipdp.batches import population
from lipdp.batches.copies import check_copies
from lipdp.batches.population import check_records
from lipdp.batches.reading_check import check_reading
from lipdp.distributed.collectives import Alone
from lipdp.errors import EngineError

pytestmark = pytest.mark.usefixtures("one_thread", "unjudged")

N, FEATURES = 200, 20
X, Y = kit.table(N).tensors


def run(dataset, **options):
    return kit.private(dataset=dataset, expected_batch_size=N // 2, steps=2, **options)


# --- copies -----------------------------------------------------------------------------------------------------------

WHOLE = TensorDataset(X, Y)
COPIES = {
    "expanded, with own targets": TensorDataset(X[:1].expand(N, FEATURES), Y),
    "the same tensors": ConcatDataset([WHOLE, TensorDataset(X, Y)]),
    "a slice of the same tensors": ConcatDataset([WHOLE, TensorDataset(X[5:20], Y[5:20].clone())]),
    "windows of a series": TensorDataset(X.flatten().unfold(0, FEATURES, 1)[:N], Y),
    "windows that step by half": TensorDataset(X.flatten().unfold(0, FEATURES, 10)[:N], Y),
    "a subset of windows": Subset(TensorDataset(X.flatten().unfold(0, FEATURES, 1)[:N], Y), range(100)),
}


@pytest.mark.parametrize("name", COPIES)
def test_copies_that_share_memory_are_refused(name):
    with pytest.raises(EngineError, match=r"holds one record at .* group=.* overlap in memory"):
        run(COPIES[name])


APART = {
    "transposed": lambda: X.t().contiguous().t(),
    "cut": lambda: X.repeat(1, 3)[:, 2:],
    "every second": lambda: X.repeat(2, 1)[::2],
    "channels expanded": lambda: X[:, None].expand(-1, 3, -1),
    "windows side by side": lambda: X.flatten().unfold(0, 2, 2)[:N],
    "channels first": lambda: torch.randn(3, N, FEATURES).permute(1, 0, 2),
    "windows within a row": lambda: torch.randn(5, N).unfold(0, 3, 1).permute(1, 0, 2),
    "windows within a contiguous row": lambda: X.unfold(1, 3, 1),
    "numbers": lambda: X[:, 0],
}


@pytest.mark.parametrize("name", APART)
def test_rows_that_do_not_meet_in_memory_are_no_copies(name):
    view = APART[name]()
    check_copies(TensorDataset(view, Y))
    check_copies(ConcatDataset([TensorDataset(view[:50], Y[:50]), TensorDataset(view[50:], Y[50:])]))


def test_windows_of_one_owner_are_taken():
    windows = TensorDataset(X.flatten().unfold(0, FEATURES, 1)[:N], Y)
    check_copies(windows, [0] * N)
    with pytest.raises(EngineError, match="holds one record at 99 and at 100"):
        check_copies(windows, [0] * 100 + [1] * 100)


@pytest.mark.parametrize("how", ["select", "concatenate"])
def test_copies_in_tables_of_hugging_face_are_refused(how):
    datasets = pytest.importorskip("datasets")
    whole = datasets.Dataset.from_dict({"x": X.tolist(), "y": Y.tolist()}).with_format("torch")
    twice = whole.select([0, 0, *range(1, N)]) if how == "select" else datasets.concatenate_datasets([whole, whole])
    with pytest.raises(EngineError, match="holds one record at 0 and at"):
        run(twice, fields=("x", "y"))
    for halves in (
        [whole.select(range(N // 2)), whole.select(range(N // 2, N))],
        [whole.select(range(0, N, 2)), whole.select(range(1, N, 2))],
    ):
        run(datasets.concatenate_datasets(halves), fields=("x", "y"))
    kit.train(*run(whole.shuffle(seed=0), fields=("x", "y"))[1:])


def test_a_table_sampled_with_replacement_is_refused_unless_copies_have_one_owner():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(X.numpy(), columns=[f"c{i}" for i in range(FEATURES)]).assign(y=Y.numpy())
    fields = tuple(frame.columns[:-1]), "y"
    sampled = frame.sample(N, replace=True, random_state=0)
    for group in (None, list(range(N))):
        with pytest.raises(EngineError, match=r"holds one record at .* reset_index"):
            run(sampled, fields=fields, group=group)
    kit.private(dataset=sampled, fields=fields, group=sampled.index.to_numpy(), expected_batch_size=20)
    run(frame.sample(N // 2, random_state=0), fields=fields)
    run(pandas.concat([frame, frame + 1]).reset_index(drop=True), fields=fields)


# --- indices that change ----------------------------------------------------------------------------------------------


def mined(subset):
    subset.indices = [0] * 16 + list(range(1, N - 15))


def mined_in_place(subset):
    subset.indices[1:16] = [0] * 15


def replaced(subset):
    subset.dataset = Subset(subset.dataset, [0] * N)


@pytest.mark.parametrize("change", [mined, mined_in_place, replaced])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("between_passes", [False, True])
def test_indices_that_change_after_make_private_are_refused(change, nested, between_passes):
    """Mining the hardest records: one that is read 16 times moves the sum by 16 Δ."""
    subset = Subset(TensorDataset(X, Y), list(range(N)))
    other = TensorDataset(X.clone(), Y)
    dataset = ConcatDataset([Subset(subset, range(100)), other]) if nested else subset
    engine, model, optimizer, loader, criterion = kit.private(
        dataset=dataset, expected_batch_size=len(dataset), steps=4, sampling="fixed_size"
    )
    batches = iter(loader)
    kit.step(next(batches), model, optimizer, criterion)
    change(subset)
    with pytest.raises(EngineError, match=r"other records in its places .*Subset\.indices"):
        next(iter(loader) if between_passes else batches)
    assert engine.steps_taken == 1


@pytest.mark.parametrize("workers", [0, 1])
def test_data_sets_that_stay_as_they_are_are_read_to_the_end(workers):
    parts = [Subset(TensorDataset(X, Y), torch.randperm(N)), [(x, y) for x, y in zip(X + 1, Y, strict=True)]]
    engine, *made = run(
        ConcatDataset([*parts, Subset(TensorDataset(X + 2, Y), np.arange(N)[::-1])]), num_workers=workers
    )
    kit.train(*made)
    assert engine.steps_taken == 2


# --- parts of one data set in several processes -----------------------------------------------------------------------


class Playing(Alone):
    """One of several processes; what the others say is found here."""

    def __init__(self, parts, rank):
        super().__init__()
        self.rank, self.size, self._parts = rank, len(parts), parts

    def gather(self, value):
        say = partial(population.glance, inputs=True) if isinstance(value, str) else population._parts
        said = [say(part) for part in self._parts]
        assert str(said[self.rank]) == str(value)
        return said


def padded(dataset, rank):
    return Subset(dataset, list(DistributedSampler(dataset, 2, rank, shuffle=False)))


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("parts", "twice"),
    [
        (lambda d: [padded(d, 0), padded(d, 1)], 1),
        (lambda d: [Subset(d, range(120)), Subset(d, range(100, 199))], 20),
        (lambda d: [Subset(Subset(d, range(50, 150)), range(60)), Subset(d, [*range(20), 109])], 1),
        (lambda d: [ConcatDataset([d, TensorDataset(X + 1, Y)]), ConcatDataset([Subset(d, [7, -1]), d.extra])], 2),
    ],
)
def test_own_records_in_the_parts_of_two_processes_are_refused(rank, parts, twice):
    dataset = TensorDataset(X[:199], Y[:199])
    dataset.extra = TensorDataset(X - 1, Y)
    parts = parts(dataset)
    with pytest.raises(EngineError, match=f"but {twice} records of process 1 are records of a process before it"):
        check_records(parts[rank], Playing(parts, rank), own_records=True)


@pytest.mark.parametrize("rank", [0, 1])
def test_own_records_in_parts_that_do_not_meet_are_taken(rank):
    dataset = TensorDataset(X[:199], Y[:199])
    for parts in (
        [Subset(dataset, range(0, 199, 2)), Subset(dataset, range(1, 199, 2))],
        [TensorDataset(X[:100], Y[:100]), TensorDataset(X[100:], Y[100:])],
        [Subset(TensorDataset(X + 1, Y), range(50)), Subset(dataset, range(50))],
    ):
        check_records(parts[rank], Playing(parts, rank), own_records=True)


# --- records read together --------------------------------------------------------------------------------------------


class Read(Dataset):
    """Whole batches by one function of the inputs."""

    def __init__(self, prepare):
        self.prepare = prepare

    def __len__(self):
        return N

    def __getitem__(self, index):
        return self.__getitems__([index])[0]

    def __getitems__(self, indices):
        return list(zip(self.prepare(X[indices]), Y[indices], strict=True))


DRAWS = np.random.default_rng(0)


MIXED = {
    "standardised": lambda x: (x - x.mean(0)) / (x.std(0, correction=0) + 0.1) if len(x) > 1 else x,
    "by the largest": lambda x: x / x.abs().max(),
    "by their number": lambda x: x / len(x),
    "every second flipped": lambda x: torch.where(torch.arange(len(x))[:, None] % 2 == 1, x.flip(-1), x),
    "random, then centred": lambda x: x * torch.rand(len(x), 1) - x.mean(0),
    "mixed up": lambda x: x + 0.1 * x[torch.randperm(len(x))],
    "random by numpy, then centred": lambda x: x * np.random.rand() - x.mean(0),  # noqa: NPY002
}
EACH = {
    "as it is": lambda x: x,
    "softmax": lambda x: x.softmax(1),
    "one matrix product": lambda x: x @ X[:FEATURES],
    "random, drawn for the batch": lambda x: x * (torch.rand(len(x), 1) < 0.5) + torch.randn(len(x), FEATURES),
    "random, drawn one by one": lambda x: torch.stack([r.flip(0) if torch.rand(()) < 0.5 else r for r in x]),
    "random by numpy": lambda x: x + float(np.random.rand()),  # noqa: NPY002
    "random by Python": lambda x: x.flip(-1) if random.random() < 0.5 else x,
    "a generator of its own": lambda x: x + torch.from_numpy(DRAWS.normal(size=x.shape)),
}


@pytest.mark.parametrize("name", MIXED)
@pytest.mark.parametrize("outer", [lambda d: d, lambda d: Subset(d, range(20, 100))])
def test_a_data_set_that_mixes_the_records_it_reads_together_is_refused(name, outer):
    with pytest.raises(EngineError, match="otherwise beside others than alone"):
        check_reading(outer(Read(MIXED[name])))


@pytest.mark.parametrize("name", EACH)
def test_a_data_set_that_treats_each_record_by_itself_is_taken_and_no_generator_moves(name):
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002
    for _ in range(5):
        check_reading(Read(EACH[name]))
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())  # noqa: NPY002


def test_the_engine_looks_at_it_before_the_first_step():
    with pytest.raises(EngineError, match="otherwise beside others than alone"):
        run(Read(MIXED["standardised"]))
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict({"x": X.tolist(), "y": Y.tolist()})
    table.set_transform(lambda b: {"x": list(MIXED["standardised"](torch.tensor(b["x"]))), "y": b["y"]})
    with pytest.raises(EngineError, match="otherwise beside others than alone"):
        check_reading(table)
    run(table, fields=("x", "y"))  # by `fields`, records are read one by one
