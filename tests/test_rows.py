"""Which operations keep the rows of a batch: each on tensors of 6 records, checked against what a changed record changes."""

from __future__ import annotations

import copy
import gc
import weakref

import kit
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import lipdp
from lipdp.batches.per_record import per_record
from lipdp.batches.row_rules import Rows
from lipdp.batches.rows import BatchTensor, known_rows
from lipdp.errors import EngineError
from lipdp.privacy.optimizers import Guard

N, BATCH = 6, "a batch"
WHOLE = Rows(BATCH, 0, N)


def batch(*shape: int, change: int | None = None) -> BatchTensor:
    """(6, *shape) of a batch, in which one record may be another."""
    x = torch.rand(N, *shape, generator=torch.Generator().manual_seed(0))
    if change is not None:
        x[change] += 1.0
    return BatchTensor.of(x, WHOLE)


def set_at(x, index, value):
    x[index] = value
    return x


def in_place(x, change):
    change(x)
    return x


IMAGE, SQUARE = (3, 6, 6), (6,)
KEPT = {
    "arithmetic": (IMAGE, lambda x: (x - torch.ones(3, 1, 1)) / 2, WHOLE),
    "BGR": (IMAGE, lambda x: x[:, [2, 1, 0]], WHOLE),
    "a public index": (IMAGE, lambda x: x[1:3, torch.tensor([2, 1])], Rows(BATCH, 1, 3)),
    "a crop": (IMAGE, lambda x: F.pad(x, [1] * 4)[..., 1:5, 2:6], WHOLE),
    "a negative pad": (IMAGE, lambda x: F.pad(x, [-1] * 4), WHOLE),
    "cut out": (IMAGE, lambda x: set_at(x, (slice(None), slice(None), slice(1, 3)), torch.zeros(())), WHOLE),
    "a mask of its own": (SQUARE, lambda x: set_at(x, x < 0.5, 0), WHOLE),
    "channels expanded": (IMAGE, lambda x: x[:, :1].expand(-1, 3, -1, -1), WHOLE),
    "channels repeated": (IMAGE, lambda x: x[:, :1].repeat(1, 3, 1, 1), WHOLE),
    "channels joined": (IMAGE, lambda x: torch.cat([x, torch.zeros(N, 1, 6, 6), x], dim=1), WHOLE),
    "stacked behind": (SQUARE, lambda x: torch.stack([x, x], -1), WHOLE),
    "copied into new memory": (SQUARE, lambda x: torch.empty(N, 6).copy_(x), WHOLE),
    "a norm": (SQUARE, lambda x: x / torch.linalg.vector_norm(x, dim=1, keepdim=True), WHOLE),
    "a matrix": (SQUARE, lambda x: x @ torch.ones(6, 6), WHOLE),
    "sorted": (SQUARE, lambda x: x.sort(-1).values, WHOLE),
    "rolled": (IMAGE, lambda x: torch.roll(x, (1, 1), (-2, -1)), WHOLE),
    "a view changed by itself": (SQUARE, lambda x: in_place(x, lambda v: v[:, 1:].mul_(v[:, :1])), WHOLE),
    "narrowed": (SQUARE, lambda x: x.narrow(0, -4, 2), Rows(BATCH, 2, 4)),
    "split in order": (SQUARE, lambda x: x.tensor_split((2, 4))[1], Rows(BATCH, 2, 4)),
    "a table": (SQUARE, lambda x: torch.eye(3)[(x[:, 0] * 3).long().clamp(0, 2)], WHOLE),
    "one hot": (SQUARE, lambda x: F.one_hot((x[:, 0] * 3).long().clamp(0, 2), 3).float(), WHOLE),
    "an empty piece": (SQUARE, lambda x: x[4:2], Rows(BATCH, 4, 4)),
    "a shallow copy": (SQUARE, copy.copy, WHOLE),
    "layer norm by keyword": (SQUARE, lambda x: torch.layer_norm(x, normalized_shape=[6]), WHOLE),
}


@pytest.mark.parametrize("case", KEPT)
def test_rows_are_kept_and_a_record_changes_its_row_alone(case):
    shape, operation, rows = KEPT[case]
    made = operation(batch(*shape))
    assert known_rows(made) == rows
    assert len(made) == len(rows)
    for record in range(N):
        moved = operation(batch(*shape, change=record))
        others = [row for row in range(len(rows)) if row + rows.start != record]
        assert torch.equal(torch.Tensor(made)[others], torch.Tensor(moved)[others])


MIXED = {
    "indexed": (SQUARE, lambda x: x[[0] * N]),
    "reversed": (SQUARE, lambda x: x.flip((1, np.int64(0)))),
    "rolled by a numpy axis": (SQUARE, lambda x: x.roll((0, 1), (1, np.int64(0)))),
    "permuted by a numpy axis": (SQUARE, lambda x: x.permute(np.int64(1), 0)),
    "rolled without an axis": (SQUARE, lambda x: x.roll(1)),
    "several picks": (IMAGE, lambda x: x[:, [0] * N, :, [0] * N]),
    "several numpy picks": (IMAGE, lambda x: x[:, np.zeros(N, int), :, np.zeros(N, int)]),
    "an Ellipsis at the first axis": (SQUARE, lambda x: x[..., 0, :]),
    "a batch of matrices": (SQUARE, lambda x: x @ torch.ones(N, 6, 6)),
    "an embedding in the batch": (SQUARE, lambda x: torch.embedding(x, torch.zeros(N, dtype=torch.int64))),
    "an unbatched convolution": (SQUARE, lambda x: F.conv1d(x, torch.ones(N, N, 1))),
    "a bare transpose": (SQUARE, lambda x: x.mT),
    "statistics": (SQUARE, lambda x: x - x.mean(dim=None)),
    "joined at the first axis": (SQUARE, lambda x: torch.cat([x[:3], x[:3]])),
    "joined of other rows": (SQUARE, lambda x: torch.cat([x[:3], x[3:]], 1)),
    "pieces out of order": (SQUARE, lambda x: x.tensor_split((5, 0))[2]),
    "values by a mask": (SQUARE, lambda x: set_at(x, x > 0.5, torch.arange(int((x > 0.5).sum())).float())),
    "features by the batch": (SQUARE, lambda x: set_at(x, (slice(None), x.mean(0) > 0.5), 0)),
    "a transposed view": (SQUARE, lambda x: in_place(x, lambda v: v.T.sub_(v.T.mean(1, keepdim=True)))),
    "rows of their own": (SQUARE, lambda x: in_place(x, lambda v: [r.copy_(v[0]) for r in v.unbind()])),
    "every other row": (SQUARE, lambda x: in_place(x, lambda v: v[::2].sub_(v.mean(0)))),
    "strides": (SQUARE, lambda x: in_place(x, lambda v: v.as_strided((N, 6), (6, 1)).sub_(v.mean(0)))),
    "a list operation": (SQUARE, lambda x: in_place(x, lambda v: torch._foreach_sub_([v], [v.mean(0)]))),
    "an operator": (SQUARE, lambda x: in_place(x, lambda v: torch.ops.aten.sub_.Tensor(v, v.mean(0)))),
    "sorted out of place": (SQUARE, lambda x: in_place(x, lambda v: torch.sort(v, 0, out=(v, torch.empty(0).long())))),
    "other data": (SQUARE, lambda x: in_place(x, lambda v: setattr(v, "data", v - v.mean(0)))),
    "another class": (SQUARE, lambda x: x - x.as_subclass(torch.Tensor).mean(0)),
    "memory written through a view": (SQUARE, lambda x: (lambda m: (m[0].copy_(x.mean(0)), x - 2 * m[0])[1])(torch.zeros(2, 6))),
    "memory seen through an older view": (
        SQUARE, lambda x: (lambda m: (lambda v: (m.copy_(x.mean(0)), x - v)[1])(m[:]))(torch.zeros(6))
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MIXED)
def test_rows_that_may_be_mixed_are_not_known(case):
    shape, operation = MIXED[case]
    assert known_rows(operation(batch(*shape))) is None


def test_per_record_takes_a_function_of_one_record():
    seen, total = [], torch.zeros(6)
    mean = batch(6).mean(0)
    for function in (
        lambda r: r - mean,
        lambda r: total.add_(r).clone(),
        lambda r: (seen.append(r), torch.stack(seen).sum(0))[1],
        lambda r: (seen.append(r), seen[0])[1],
    ):
        with pytest.raises(EngineError, match="function of one record"):
            per_record(function, batch(6))


def test_numbers_can_be_printed():
    assert f"{batch(6).mean() * 0:.2f}" == "0.00"


class _Watched(TensorDataset):
    """Notes, whenever a batch is read, which of the earlier ones are still alive."""

    def __init__(self, *tensors):
        super().__init__(*tensors)
        self.handed, self.alive = [], []

    def __getitems__(self, indices):
        self.alive.append(sum(batch() is not None for batch in self.handed))
        return [self[i] for i in indices]


@pytest.mark.parametrize("looks", [None, 1])
def test_a_batch_that_the_loop_lets_go_is_freed_before_the_next_one_is_read(looks):
    """Full batches of 2.4 GB, two at a time, were 8.2 GB of a run."""
    data = _Watched(torch.randn(64, 4), torch.randint(3, (64,)))
    model = nn.Sequential(lipdp.nn.InputBound(1.0), lipdp.nn.SpectralLinear(4, 3))
    _, optimizer, loader, criterion = lipdp.PrivacyEngine("rdp", check_every=looks).make_private(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), noise_multiplier=2.0, steps=4,
        criterion=lipdp.losses.TauCrossEntropy(8.0), expected_batch_size=32, dataset=data,
    )  # fmt: skip
    data.alive.clear()
    for x, y in loader:
        data.handed.append(weakref.ref(x.untyped_storage()))
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()
        del x, y
    assert data.alive == [0] * 4


@pytest.mark.parametrize("looks", [None, 1])
def test_a_batch_is_freed_when_the_next_one_is_drawn(looks):
    """Without Python's collector: full batches of a gigabyte, held in a circle, filled 24 GB in 14 steps."""
    gc.collect()
    gc.disable()
    try:
        engine = lipdp.PrivacyEngine("rdp", check_every=looks)
        model = nn.Sequential(lipdp.nn.InputBound(1.0), lipdp.nn.SpectralLinear(4, 3))
        _, optimizer, loader, criterion = engine.make_private(
            module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), noise_multiplier=2.0, steps=6,
            criterion=lipdp.losses.TauCrossEntropy(8.0), expected_batch_size=16,
            dataset=TensorDataset(torch.randn(64, 4), torch.randint(3, (64,))),
        )  # fmt: skip
        seen = []
        for x, y in loader:
            assert sum(batch() is not None for batch in seen) <= 1  # the one before, until this line
            seen.append(weakref.ref(x))
            optimizer.zero_grad()
            if len(seen) % 2:
                engine.backward(x, y, microbatch=5)
            else:
                criterion(model(x), y).backward()
            optimizer.step()
    finally:
        gc.enable()


def test_a_run_that_nobody_holds_is_freed_and_its_guard_with_it():
    """The guards watch every optimiser of the process: thousands of runs made each step of any other slower."""
    gc.collect()  # what other tests left
    before = len(Guard._all)
    runs = []
    for _ in range(3):
        engine, model, *rest = kit.private()
        runs += [weakref.ref(engine), weakref.ref(model)]
        assert len(Guard._all) == before + 1
        del engine, model, rest
        gc.collect()
    assert all(run() is None for run in runs)
    assert len(Guard._all) == before
