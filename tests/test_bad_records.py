"""One record can't stop a run or show itself; no run dies of a metric; copies and losses that learn are refused."""

import json
import logging
import math

import kit
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import ConcatDataset, Dataset, StackDataset, Subset, TensorDataset

from lipdp import nn as lnn
from lipdp.batches import BatchLoader, PoissonSampler, in_order
from lipdp.batches.records import NO_LABEL, finite, look, no_label
from lipdp.cli import main
from lipdp.data import load
from lipdp.errors import BudgetSpentWarning, DataError, EngineError, LossError, ParameterError, RecordError
from lipdp.losses import (
    HKR,
    CategoricalHinge,
    CosineSimilarity,
    LipschitzLoss,
    MeanAbsoluteError,
    MeanSquaredError,
    MulticlassHinge,
    TauBCEWithLogits,
    TauCrossEntropy,
    as_lipschitz,
)
from lipdp.report.reading import read_run
from lipdp.report.tensorboard import TensorBoard
from lipdp.training import Trainer, configure
from lipdp.training import trainer as trainer_module

pytestmark = pytest.mark.usefixtures("one_thread", "unjudged")

N, FEATURES, CLASSES = 200, 6, 3


def table():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(N, FEATURES, generator=generator)
    return x, torch.randint(CLASSES, (N,), generator=generator)


def run(dataset, *, loss=None, steps=3, num_workers=0, outputs=CLASSES, **options):
    """A whole private run; returns the engine and the weights at its end."""
    torch.manual_seed(0)
    model = nn.Sequential(lnn.InputBound(1.0), lnn.SpectralLinear(FEATURES, 8), lnn.GroupSort2(), nn.Linear(8, outputs))
    options = {"criterion": loss or TauCrossEntropy(8.0), "num_workers": num_workers, **options}
    engine, *made = kit.private(model, dataset, seed=3, expected_batch_size=100, steps=steps, **options)
    kit.train(*made)
    assert engine.steps_taken == steps
    return engine, torch.cat([p.detach().flatten() for p in model.parameters()])


class Files(Dataset):
    """Records read one by one; some can't be."""

    def __init__(self, x, y, bad=(), how="raise"):
        self.x, self.y, self.bad, self.how = x, y, frozenset(bad), how

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        if index in self.bad and self.how == "raise":
            raise ValueError("no image can be decoded")
        if index in self.bad and self.how == "disk":
            raise OSError(5, "Input/output error")
        if index in self.bad and self.how == "shape":
            return self.x[index][:-1], self.y[index]
        if index in self.bad and self.how == "dtype":
            return self.x[index].double(), self.y[index]
        return self.x[index], self.y[index]


# --- inputs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", [TensorDataset, Files])
def test_an_entry_that_is_not_finite_is_zero(value, kind):
    x, y = table()
    bad, zero = x.clone(), x.clone()
    bad[::3, 1], zero[::3, 1] = value, 0.0
    assert torch.equal(run(kind(bad, y))[1], run(kind(zero, y))[1])


def test_the_largest_numbers_stop_nothing():
    x, y = table()
    x[50:60] = torch.finfo(torch.float32).max
    assert run(TensorDataset(x, y))[1].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_what_is_finite_keeps_its_bits(dtype):
    x = torch.tensor([0.0, -0.0, 1e-7, -3.5, 6e4], dtype=dtype)
    assert finite(x) is x
    mapped = finite(torch.cat([x, torch.tensor([math.nan, math.inf], dtype=dtype)]))
    assert torch.equal(mapped[:5].signbit(), x.signbit())
    assert torch.equal(mapped, torch.cat([x, torch.zeros(2, dtype=dtype)]))
    assert finite(torch.arange(3)).tolist() == [0, 1, 2]


# --- records that can't be read ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("how", ["raise", "shape"])
def test_a_record_that_cannot_be_read_is_the_zero_record_without_loss(how, workers):
    x, y = table()
    bad = range(21, 61, 2)
    zero, none = x.clone(), y.clone()
    zero[list(bad)], none[list(bad)] = 0.0, NO_LABEL
    found, wanted = run(Files(x, y, bad, how), num_workers=workers)[1], run(Files(zero, none))[1]
    assert torch.equal(found, wanted)


def test_a_record_of_another_dtype_changes_no_other():
    x, y = table()
    assert torch.equal(run(Files(x, y, range(20, 60), "dtype"))[1], run(Files(x, y))[1])


@pytest.mark.parametrize("many", ["read_batch", "__getitems__"])
def test_a_record_that_a_data_set_gives_twice_is_counted_once(many):
    """Without a look at the rows, both copies went into the sum: an excess of 2."""
    x, y = table()
    whole = {
        "read_batch": lambda self, picked: [x[picked].repeat(2, 1), y[picked].repeat(2)],
        "__getitems__": lambda self, picked: [(x[i], y[i]) for i in picked * (2 if len(picked) > 1 else 1)],
    }
    twice = type("Twice", (Files,), {many: whole[many]})(x, y)
    if many == "read_batch":
        with pytest.raises(RecordError, match="2 rows where 1"):
            run(twice)
    else:
        assert torch.equal(run(twice)[1], run(Files(x, y))[1])


def test_a_bad_record_is_read_in_evaluation_as_in_training():
    x, y = table()
    batches = list(in_order(Files(x, y, [0, 7]), 50))
    assert torch.equal(torch.cat([b[0] for b in batches])[1:7], x[1:7])
    assert not batches[0][0][[0, 7]].any()
    assert batches[0][1][[0, 7]].tolist() == [NO_LABEL] * 2


def test_a_broken_machine_stops_the_run():
    x, y = table()
    with pytest.raises(OSError, match="Input/output"):
        run(Files(x, y, range(20, 60), "disk"))
    with pytest.raises(ValueError, match="decoded"):  # all records of a batch
        list(in_order(Files(x, y, range(100, 200)), 50))


def test_one_bad_record_is_not_refused_beforehand_and_two_are():
    x, y = table()
    for how in ("raise", "shape"):
        assert len(look(Files(x, y, [0], how))) == len(look(Files(x, y))) - 1
        with pytest.raises((ValueError, DataError), match=r"decoded|different shapes"):
            run(Files(x, y, [0, 1], how))
    with pytest.raises(LossError, match="0 … 2"):
        run(TensorDataset(x, y + 1))  # classes numbered from 1


# --- targets ----------------------------------------------------------------------------------------------------------

OF_LABELS = [
    TauCrossEntropy(4.0), CategoricalHinge(), MulticlassHinge(3), CosineSimilarity(0.5), HKR([0.2, 0.3, 0.5]),
    as_lipschitz(nn.CrossEntropyLoss()),
]  # fmt: skip
OF_NUMBERS = [TauBCEWithLogits(num_outputs=3), MeanAbsoluteError(3), MeanSquaredError(1.0, 3), CosineSimilarity(0.5)]


def gradient(loss, logits, target):
    leaf = logits.clone().requires_grad_()
    values = loss(leaf, target)
    return values.detach(), torch.autograd.grad(values.sum(), leaf)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("loss", OF_LABELS + OF_NUMBERS, ids=lambda loss: type(loss).__name__)
def test_a_target_that_is_none_has_loss_zero_and_gradient_zero(loss, dtype):
    logits = torch.randn(7, 3, generator=torch.Generator().manual_seed(2)).to(dtype)
    if loss in OF_LABELS and not (loss in OF_NUMBERS and dtype is torch.float64):
        good, bad = torch.tensor([0, 1, 2]), torch.tensor([-1, 3, NO_LABEL, 10**9])
    else:
        good = torch.rand(3, 3, generator=torch.Generator().manual_seed(3))
        bad = torch.tensor([[math.nan, 0, 0], [0, math.inf, 0], [-math.inf, 1, 0], [math.nan] * 3])
    values, grads = gradient(loss, logits, torch.cat([good, bad]))
    alone = gradient(loss, logits[:3], good)
    assert torch.equal(values[:3], alone[0])
    assert torch.equal(grads[:3], alone[1])
    assert (values[3:] == 0).all()
    assert (grads[3:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32, torch.float32, torch.bool])
def test_no_label_is_none_in_any_dtype(dtype):
    target = torch.full((2,), no_label(dtype), dtype=dtype)
    if dtype is not torch.bool:
        loss = MeanAbsoluteError() if dtype.is_floating_point else TauCrossEntropy()
        assert not loss.knows(torch.zeros(2, 3), target).any()


def test_a_loss_of_ones_own_never_sees_a_target_that_is_not_finite():
    class Own(LipschitzLoss):
        lipschitz = 1.0

        def forward(self, logits, target):
            assert target.isfinite().all()
            return (logits[:, 0] - target).abs()

    values, grads = gradient(Own(), torch.zeros(2, 1), torch.tensor([math.nan, 2.0]))
    assert (values.tolist(), grads.tolist()) == ([0.0, 2.0], [[0.0], [-1.0]])


@pytest.mark.parametrize("label", [-1, CLASSES, 10**6, NO_LABEL])
def test_a_label_out_of_range_leaves_the_run_as_without_the_record(label):
    x, y = table()
    bad = y.clone()
    bad[40] = label  # alone; the record is drawn, and adds nothing
    engine, found = run(TensorDataset(x, bad))
    assert found.isfinite().all()
    zero = x.clone()
    zero[40] = 123.0
    assert torch.equal(run(TensorDataset(zero, bad))[1], found)
    assert "bad" not in json.dumps(engine.plan.as_dict())


# --- the budget is spent ----------------------------------------------------------------------------------------------


def test_a_second_epoch_explains_itself():
    dataset = TensorDataset(*table())
    loader = BatchLoader(dataset, PoissonSampler(N, sampling_rate=0.1, steps=3, seed=0))
    assert len(list(loader)) == 3
    with pytest.warns(BudgetSpentWarning, match=r"all 3 batches .* more steps") as caught:
        assert list(loader) == []
    assert caught[0].filename == __file__


# --- copies -----------------------------------------------------------------------------------------------------------


def copies():
    x, y = table()
    whole, record = TensorDataset(x, y), (torch.ones(FEATURES), 1)
    return {
        "a record 32 times": Subset(whole, [0] * 32 + list(range(1, N))),
        "counted from the end": Subset(whole, [0, N - 1, -1] * 40),
        "a subset of a subset": Subset(Subset(whole, [5, 5, *range(6, N)]), range(N - 5)),
        "twice the same": ConcatDataset([whole, whole]),
        "subsets that overlap": ConcatDataset([Subset(whole, range(120)), Subset(whole, range(119, N))]),
        "a list": [record] * N,
        "stacked": StackDataset(Subset(x, [0] * N), Subset(y, [0] * N)),
        "expanded": TensorDataset(torch.ones(FEATURES).expand(N, FEATURES), torch.tensor(1).expand(N)),
    }


@pytest.mark.parametrize("name", copies())
def test_copies_of_a_record_are_refused(name):
    with pytest.raises(EngineError, match=r"holds one record at .* group="):
        run(copies()[name])


def test_copies_with_one_owner_and_subsets_without_copies_are_taken():
    whole = TensorDataset(*table())
    twice = Subset(whole, [0, 0, *range(1, N)])
    run(twice, group=[0, 0, *range(1, N)])
    with pytest.raises(EngineError, match="holds one record"):
        run(twice, group=list(range(N + 1)))
    run(Subset(Subset(whole, [3, 3, *range(4, N)]), range(1, N - 3)))
    run(ConcatDataset([Subset(whole, range(0, N, 2)), Subset(whole, range(1, N, 2))]))


# --- losses that learn or remember ------------------------------------------------------------------------------------


class Own(LipschitzLoss):
    lipschitz = 2.0**0.5

    def __init__(self, kind):
        super().__init__()
        self.kind, self.calls = kind, 0
        self.register_buffer("seen", torch.zeros(CLASSES))
        if kind == "learns":
            self.scale = nn.Parameter(torch.ones(()))

    def forward(self, logits, target):
        if self.kind == "buffer under grad" and torch.is_grad_enabled():
            self.seen += torch.bincount(target, minlength=CLASSES)
        if self.kind == "buffer replaced":
            self.seen = self.seen + 1
        if self.kind == "counts":
            self.calls += 1
        values = nn.functional.cross_entropy(logits, target, reduction="none")
        if self.kind == "coupled gradient":
            return values.detach() + (values - values.detach()) * (target == 0).sum()
        if self.kind == "learns":
            return values * self.scale
        return values


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("learns", "trainable parameters .*scale"),
        ("buffer under grad", "changes when it is called .*seen"),
        ("buffer replaced", "changes when it is called .*seen"),
        ("counts", "changes when it is called .*calls"),
        ("coupled gradient", "another sample's gradient"),
    ],
)
def test_losses_that_learn_remember_or_couple_are_refused(kind, says):
    with pytest.raises(LossError, match=says):
        run(TensorDataset(*table()), loss=Own(kind))


def test_a_loss_that_does_neither_is_taken():
    run(TensorDataset(*table()), loss=Own("plain"))
    frozen = Own("learns")
    frozen.requires_grad_(False)
    run(TensorDataset(*table()), loss=frozen)


# --- metrics ----------------------------------------------------------------------------------------------------------

QUICK = {
    "model": "linear",
    "steps": 4,
    "batch_size": 100,
    "noise_multiplier": 4.0,
    "accountant": "rdp",
    "seed": 0,
    "log_every": 1,
}


def rare(tmp_path):
    """A table whose test part has no positives."""
    rng = np.random.default_rng(0)
    y = (rng.random(N) < 0.1).astype(np.int64)
    arrays = {
        "X": rng.normal(size=(N, 4)),
        "y": y,
        "X_test": rng.normal(size=(20, 4)),
        "y_test": np.zeros(20, np.int64),
    }
    np.savez(tmp_path / "rare.npz", **arrays)
    return str(tmp_path / "rare.npz")


def test_a_rare_class_without_positives_in_the_test_part_stops_nothing(tmp_path, caplog, capsys):
    options = [
        "--steps",
        "4",
        "--batch-size",
        "50",
        "--noise-multiplier",
        "4",
        "--accountant",
        "rdp",
        "--log-every",
        "2",
    ]
    out = tmp_path / "run"
    assert main(["train", "--dataset", rare(tmp_path), *options, "--out", str(out)]) == 0
    assert "test auroc none" in capsys.readouterr().out
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["test_auroc"] for line in lines] == [None, None]
    assert all(0 <= line["test_accuracy"] <= 1 for line in lines)
    assert read_run(out).metric == "accuracy"  # the one that there is
    assert main(["report", str(out), "--out", str(tmp_path / "report")]) == 0


def test_an_evaluation_that_fails_is_null_with_a_warning(tmp_path, monkeypatch, caplog):
    trainer = Trainer(configure(dataset="digits", **QUICK), out=tmp_path)

    def failing(*given, **options):
        raise RuntimeError("the disk of the test part is gone")

    monkeypatch.setattr(trainer_module, "answers", failing)
    with caplog.at_level(logging.WARNING):
        result = trainer.run()
    assert result.metrics["test_accuracy"] is None
    assert "no test metric (RuntimeError: the disk of the test part is gone)" in caplog.text


def test_what_fails_already_before_the_first_step_is_refused_there(tmp_path):
    split = load("digits")
    wide = type(split)(**{**vars(split), "test_x": torch.zeros(360, 1, 9, 9)})
    with pytest.raises(RuntimeError):
        Trainer(configure(dataset="digits", **QUICK), out=tmp_path, split=wide).run()
    assert not (tmp_path / "privacy.json").exists()


def test_a_full_disk_of_tensorboard_stops_nothing(tmp_path, caplog, monkeypatch):
    pytest.importorskip("torch.utils.tensorboard")
    board = TensorBoard(tmp_path)
    trainer = Trainer(configure(dataset="digits", **QUICK), out=tmp_path, monitor=board)
    monkeypatch.setattr(
        board._writer_type, "add_scalar", lambda *given, **options: (_ for _ in ()).throw(OSError(28, "No space left"))
    )
    with caplog.at_level(logging.WARNING):
        assert trainer.run().steps == QUICK["steps"]
    assert caplog.text.count("no more figures are written") == 1


def test_a_folder_of_tensorboard_that_cannot_be_made_is_refused_before_the_first_step(tmp_path):
    pytest.importorskip("torch.utils.tensorboard")
    (tmp_path / "tensorboard").write_text("a file")
    trainer = Trainer(configure(dataset="digits", **QUICK), out=tmp_path, monitor=TensorBoard(tmp_path))
    with pytest.raises(ParameterError, match="can't write to"):
        trainer.run()
    assert not (tmp_path / "privacy.json").exists()
