"""Records as people have them: they train, or one line says what record 0 is."""

from typing import NamedTuple

import kit
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from lipdp import losses
from lipdp import nn as lnn
from lipdp.errors import DataError, EngineError, LossError, ParameterError

pytestmark = pytest.mark.usefixtures("one_thread")

X = torch.randn(32, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(32) % 3
ROW = np.zeros(32, dtype=[("a", "f4"), ("b", "f8"), ("y", "i8")])


class Of(Dataset):
    def __init__(self, record):
        self.record = record

    def __len__(self):
        return 32

    def __getitem__(self, index):
        return self.record(index)


def net(features=6):
    torch.manual_seed(0)
    return nn.Sequential(lnn.InputBound(1.0), lnn.SpectralLinear(features, 3))


def train(dataset, model=None, **options):
    options = {"criterion": losses.TauCrossEntropy(), **options}
    engine, _, optimizer, loader, _ = kit.private(
        model or net(), dataset, lr=0.1, expected_batch_size=8, steps=4, **options
    )
    seen = []
    for batch in loader:
        optimizer.zero_grad()
        seen.append(engine.backward(*batch).item())
        optimizer.step()
    return seen


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.uint8, torch.int64, torch.bool])
def test_inputs_reach_the_model_in_its_dtype(dtype):
    whole = (4 * X).round().clamp(0, 1)  # the same numbers in every dtype
    assert train(TensorDataset(whole.to(dtype), Y)) == train(TensorDataset(whole, Y))
    assert train(Of(lambda i: (whole[i].to(dtype), Y[i]))) == train(TensorDataset(whole, Y))


def test_a_number_that_float32_does_not_hold_is_zero():
    x = X.double()
    x[:, 0] = 1e300
    zeroed = X.clone()
    zeroed[:, 0] = 0
    assert train(TensorDataset(x, Y)) == train(TensorDataset(zeroed, Y))


def test_tokens_that_the_model_does_not_know_are_token_0():
    def table():
        torch.manual_seed(0)
        return nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), lnn.SpectralLinear(20, 3))

    tokens = torch.randint(9, (32, 5), generator=torch.Generator().manual_seed(1))
    outside = tokens.int()
    outside[7, 0], outside[9, 1], outside[11, 4] = 9, -1, 2**31 - 1
    zeroed = torch.where((outside < 0) | (outside > 8), 0, outside)
    assert train(TensorDataset(outside, Y), table()) == train(TensorDataset(zeroed, Y), table())


def test_records_with_names_and_further_parts():
    expected = train(TensorDataset(X, Y))
    assert train(Of(lambda i: {"image": X[i], "label": int(Y[i])}), fields=("image", "label")) == expected
    assert train(Of(lambda i: (X[i], int(Y[i]), i)), fields=(0, 1)) == expected
    assert train(Of(lambda i: {"image": X[i].tolist(), "label": int(Y[i])}), fields=("image", "label")) == expected
    split = Of(lambda i: {**{f"c{j}": float(X[i, j]) for j in range(6)}, "y": int(Y[i])})
    assert train(split, fields=([f"c{j}" for j in range(6)], "y")) == expected
    assert train((X, Y)) == expected
    assert train((X.numpy(), Y.numpy())) == expected


def test_tables_in_memory():
    pandas = pytest.importorskip("pandas")
    table = ROW.copy()
    table["a"], table["b"], table["y"] = X[:, 0], X[:, 1], Y
    expected = train(TensorDataset(X[:, :2], Y), net(2))
    assert train(table, net(2), fields=(("a", "b"), "y")) == pytest.approx(expected, rel=1e-5)
    assert train(pandas.DataFrame(table), net(2), fields=(["a", "b"], "y")) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(DataError, match=r"columns a, b, y.*fields="):
        train(table)
    with pytest.raises(DataError, match="no column 'c'"):
        train(table, fields=(("a", "c"), "y"))
    with pytest.raises(ParameterError, match="two are needed"):
        train(table, fields=("a", "b", "y"))


def test_hugging_face_data_sets():
    datasets = pytest.importorskip("datasets")
    dataset = datasets.Dataset.from_dict({"image": X.tolist(), "label": Y.tolist()})
    for form in (dataset, dataset.with_format("torch")):
        assert train(form, fields=("image", "label")) == pytest.approx(train(TensorDataset(X, Y)), rel=1e-5)


def test_a_data_loader_gives_its_data_set():
    with pytest.warns(UserWarning, match="sampler, batch size and collate_fn are not used"):
        seen = train(DataLoader(TensorDataset(X, Y), batch_size=4, shuffle=True))
    assert seen == train(TensorDataset(X, Y))


@pytest.mark.parametrize(
    ("record", "says"),
    [
        (lambda i: {"image": X[i], "label": int(Y[i])}, "fields=\\('image', 'label'\\)"),
        (lambda i: (X[i], int(Y[i]), i), "fields=\\(0, 1\\)"),
        (lambda i: (X[i], "abc"[Y[i]]), "public list"),
        (lambda i: ("some words", int(Y[i])), "public list of words"),
        (lambda i: X[i], "pair \\(input, target\\)"),
        (lambda i: (object(), int(Y[i])), "record 0 is \\(object, int\\)"),
    ],
)
def test_one_line_says_what_record_0_is(record, says):
    with pytest.raises((EngineError, DataError), match=says) as raised:
        train(Of(record))
    assert "\n" not in str(raised.value)
    assert "some words" not in str(raised.value)


@pytest.mark.parametrize("labels", [Y + 1, Y * 2 - 1], ids=["from 1", "signs"])
def test_labels_that_are_numbered_otherwise_are_refused(labels):
    with pytest.raises(LossError, match=r"in 0 … 2.*Subtract 1 from labels that count from 1"):
        train(TensorDataset(X, labels))


def test_images_of_pil():
    image = pytest.importorskip("PIL.Image")
    with pytest.raises(DataError, match="tensor of the image"):
        train(Of(lambda i: (image.new("L", (4, 4)), int(Y[i]))))


def test_copies_of_a_record_are_seen_behind_fields():
    twice = Subset(Of(lambda i: {"x": X[i], "y": int(Y[i])}), [0, 1, 1])
    with pytest.raises(EngineError, match="holds one record at"):
        train(twice, fields=("x", "y"))


class Named(NamedTuple):
    """A record whose parts have names, and places too."""

    image: torch.Tensor
    label: int


def test_records_of_named_parts_are_pairs():
    x, y = kit.table().tensors
    engine, *run = kit.private(dataset=[Named(*record) for record in zip(x, y.tolist(), strict=True)])
    kit.train(*run, steps=1)
    assert engine.steps_taken == 1
