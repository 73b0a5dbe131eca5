"""A batch that is read in pieces: the same draws, rows and weights as in one part, never held at once."""

import kit
import pytest
import torch
from torch.utils.data import Dataset, TensorDataset

import lipdp
from lipdp.batches.loader import BatchLoader
from lipdp.batches.owners import Owners
from lipdp.batches.rows import known_rows
from lipdp.batches.samplers import FixedSizeSampler, PoissonSampler
from lipdp.errors import LipdpError, ParameterError

COUNT = 60


class Counted(Dataset):
    """Reads, and says what it read; draws while it reads."""

    def __init__(self, noise=False):
        self.most, self.noise = 0, noise

    def __len__(self):
        return COUNT

    def __getitem__(self, index):
        raise AssertionError("a whole batch is read at a time")

    def __getitems__(self, indices):
        self.most = max(self.most, len(indices))
        draws = [float(torch.rand(())) if self.noise else 0.0 for _ in indices]
        return [(torch.tensor([float(i), d]), i % 3) for i, d in zip(indices, draws, strict=True)]


def loader(dataset=None, **options):
    sampler = PoissonSampler(COUNT, sampling_rate=0.4, steps=4, seed=1)
    return BatchLoader(dataset or TensorDataset(torch.arange(COUNT), torch.arange(COUNT)), sampler, **options)


@pytest.mark.parametrize("piece", [1, 7, 1000])
@pytest.mark.parametrize("workers", [0, 2])
def test_pieces_are_the_batch_in_order(piece, workers):
    whole = [(x, y) for x, y in loader()]
    cut = loader(piece=piece) if not workers else loader(Counted(), piece=piece, num_workers=workers)
    for (x, _), pieces in zip(whole, cut, strict=True):
        parts, at = [], 0
        for part, _ in pieces:
            rows = known_rows(part)
            assert (rows.batch, rows.start, rows.stop) == (cut.drawn.key, at, at + len(part))
            assert len(part) <= piece
            at += len(part)
            parts.append(part[:, 0].long() if workers else part)
        assert at == cut.drawn.rows == len(x)
        assert torch.equal(torch.cat([torch.as_tensor(p).clone() for p in parts]), x)


def test_what_is_read_at_once_is_bounded_and_drawn_afresh():
    dataset = Counted(noise=True)
    drawn = torch.cat([part[:, 1] for pieces in loader(dataset, piece=5) for part, _ in pieces])
    assert dataset.most == 5
    assert len(drawn.unique()) == len(drawn)
    again = torch.cat([part[:, 1] for pieces in loader(dataset, piece=5) for part, _ in pieces])
    assert torch.equal(drawn, again)


def test_pieces_that_nobody_asks_for_do_not_reach_the_next_batch():
    whole = [x for x, _ in loader()]
    cut = loader(piece=4)
    for x, pieces in zip(whole, cut, strict=True):
        assert torch.equal(next(pieces)[0], x[:4])
    assert cut.position == 4


def test_an_old_batch_gives_no_pieces_any_more():
    cut = iter(loader(piece=4))
    old = next(cut)
    next(cut)
    with pytest.raises(LipdpError, match="given up"):
        next(old)


def test_a_resumed_loader_goes_on_after_the_batch():
    whole = [x for x, _ in loader()]
    first = loader(piece=3)
    iterator = iter(first)
    list(next(iterator))
    second = loader(piece=9)
    second.load_state_dict(first.state_dict())
    (x, _), *_ = next(iter(second))
    assert torch.equal(x, whole[1][:9])


def test_weights_of_owners_and_views_are_cut_with_their_rows():
    group = torch.arange(COUNT) // 2
    data = TensorDataset(torch.arange(COUNT).view(-1, 1, 1).expand(-1, 2, 1), torch.arange(COUNT))

    def made(**options):
        owners = Owners(group)
        return BatchLoader(data, FixedSizeSampler(COUNT // 2, batch_size=5, steps=2, seed=0), owners=owners, views=2,
                           **options)  # fmt: skip

    for (x, y, w), pieces in zip(made(), made(piece=3), strict=True):
        parts = [[t.clone() for t in piece] for piece in pieces]
        for whole, column in zip((x, y, w), zip(*parts, strict=True), strict=True):
            assert torch.equal(torch.cat(column), whole)


def test_a_piece_holds_a_record_at_least():
    with pytest.raises(ParameterError, match="at least one"):
        loader(piece=0)


def private(**options):
    torch.manual_seed(0)
    model = torch.nn.Sequential(lipdp.nn.InputBound(1.0), lipdp.nn.SpectralLinear(4, 3))
    dataset = TensorDataset(torch.randn(COUNT, 4), torch.arange(COUNT) % 3)
    return kit.private(model, dataset, expected_batch_size=30, steps=3, **options)


def test_a_run_in_pieces_is_the_run_in_one_part():
    engine, whole, optimizer, batches, _ = private()
    for batch in batches:
        optimizer.zero_grad()
        engine.backward(*batch, microbatch=7)
        optimizer.step()
    engine, cut, optimizer, batches, _ = private(piece=7)
    for pieces in batches:
        optimizer.zero_grad()
        for piece in pieces:
            engine.backward(*piece)
        optimizer.step()
    assert engine.steps_taken == 3
    assert torch.equal(whole[1].weight, cut[1].weight)


@pytest.mark.parametrize("wrong", ["first alone", "twice", "of the last batch"])
def test_a_step_on_other_rows_than_those_of_the_batch_is_refused(wrong):
    engine, _, optimizer, batches, _ = private(piece=7)
    iterator = iter(batches)
    kept = list(next(iterator))
    for piece in kept:
        engine.backward(*piece)
    optimizer.step()
    optimizer.zero_grad()
    pieces = next(iterator)
    if wrong == "first alone":
        engine.backward(*next(pieces))
    elif wrong == "twice":
        for piece in [*pieces, kept[0]][:-1] * 2:
            engine.backward(*piece)
    else:
        for piece in kept:
            engine.backward(*piece)
    with pytest.raises(LipdpError):
        optimizer.step()
