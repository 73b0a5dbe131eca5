"""What people bring to private training, one line each: it works, or is refused in one line that says why.

docs/models.md counts them.
"""

import math
import random
import warnings

import kit
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

import lipdp
from lipdp import losses
from lipdp import nn as lnn
from lipdp.bounds import BoundGraph
from lipdp.errors import LipdpError
from lipdp.losses import as_lipschitz

pytestmark = pytest.mark.usefixtures("one_thread")

WORKS = None


class Of(nn.Module):
    """A forward as a function of the module, with layers and parameters by name."""

    def __init__(self, function, **parts):
        super().__init__()
        self.functions = [function]
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.functions[0](self, x)


def weight(*shape):
    return nn.Parameter(torch.randn(shape) / 4)


def arguments(body):
    """A class with the forward's further arguments as they are written."""
    space: dict[str, object] = {"torch": torch, "F": F}
    exec(f"def forward(self, x{body}", space)
    made = type("Model", (nn.Module,), {"forward": space["forward"]})()
    made.fc = lnn.SpectralLinear(4, 3)
    return made


dense = lnn.SpectralLinear
SHARP = {"q": dense(4, 4), "k": dense(4, 4), "v": dense(4, 4)}

MODELS = {  # name → (model behind InputBound, shape, None or what the refusal says)
    "mask=None": (lambda: arguments(", mask=None):\n return self.fc(x if mask is None else x * mask)"), (4,), WORKS),
    "return_features=False": (
        lambda: arguments(", return_features=False):\n y = self.fc(x)\n return (x, y) if return_features else y"),
        *((4,), WORKS),
    ),
    "scale=1.0": (lambda: arguments(", scale=1.0):\n return scale * self.fc(x)"), (4,), WORKS),
    "**kwargs": (lambda: arguments(", **kwargs):\n return self.fc(x)"), (4,), WORKS),
    "assert x.dim()": (lambda: arguments("):\n assert x.dim() == 2\n return self.fc(x)"), (4,), WORKS),
    "if x.shape[1] > 4": (
        lambda: arguments("):\n if x.shape[1] > 4:\n  x = x[:, :4]\n return self.fc(x)"),
        *((4,), WORKS),
    ),
    "x.size(0)": (lambda: arguments("):\n return self.fc(x.view(x.size(0), -1))"), (2, 2), WORKS),
    "F.linear(x, W)": (lambda: Of(lambda m, x: F.linear(x, m.w), w=weight(3, 4)), (4,), WORKS),
    "x @ W": (lambda: Of(lambda m, x: x @ m.w, w=weight(4, 3)), (4,), WORKS),
    "torch.matmul": (lambda: Of(lambda m, x: torch.matmul(x, m.w), w=weight(4, 3)), (4,), WORKS),
    "einsum": (lambda: Of(lambda m, x: torch.einsum("bti,ij->btj", x, m.w), w=weight(4, 3)), (2, 4), WORKS),
    "F.conv1d": (lambda: Of(lambda m, x: F.conv1d(x, m.w), w=weight(2, 1, 3)), (1, 6), WORKS),
    "F.conv2d": (lambda: Of(lambda m, x: F.conv2d(x, m.w, padding=1), w=weight(2, 1, 3, 3)), (1, 4, 4), WORKS),
    "tied autoencoder": (
        lambda: Of(lambda m, x: F.linear(F.relu(F.linear(x, m.w, m.c)), m.w.t()), w=weight(2, 4), c=weight(2)),
        *((4,), WORKS),
    ),
    "class token and positions": (
        lambda: Of(
            lambda m, x: m.fc((torch.cat([m.token.expand(x.shape[0], -1, -1), x], 1) + m.positions)[:, 0]),
            **{"token": weight(1, 1, 4), "positions": weight(1, 4, 4), "fc": dense(4, 3)},
        ),
        *((3, 4), WORKS),
    ),
    "low-rank adapter": (
        lambda: Of(
            lambda m, x: m.w(x) + m.up(m.down(x)),
            **{"w": dense(4, 3).requires_grad_(False), "down": nn.Linear(4, 1), "up": nn.Linear(1, 3)},
        ),
        *((4,), WORKS),
    ),
    "merged W + BA": (
        lambda: Of(lambda m, x: F.linear(x, m.w + m.b @ m.a), w=weight(3, 4), a=weight(1, 4), b=weight(3, 1)),
        *((4,), WORKS),
    ),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(2, 3, 2), (2, 4), WORKS),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(2, 3, 2, stride=2), (2, 4, 4), WORKS),
    "nearest Upsample": (lambda: nn.Upsample(scale_factor=2), (1, 3, 3), WORKS),
    "bilinear Upsample": (lambda: nn.Upsample(scale_factor=2, mode="bilinear"), (1, 3, 3), "nearest"),
    "dilation": (lambda: nn.Conv2d(1, 2, 3, dilation=2), (1, 6, 6), WORKS),
    "Conv3d": (lambda: nn.Conv3d(1, 2, 2), (1, 3, 3, 3), WORKS),
    "MaxPool1d": (lambda: nn.MaxPool1d(2), (1, 4), WORKS),
    "AvgPool3d": (lambda: nn.AvgPool3d(2), (1, 2, 2, 2), WORKS),
    "AdaptiveMaxPool2d": (lambda: nn.AdaptiveMaxPool2d(1), (1, 4, 4), WORKS),
    "ZeroPad2d": (lambda: nn.ZeroPad2d(1), (1, 3, 3), WORKS),
    "ReflectionPad2d": (lambda: nn.ReflectionPad2d(1), (1, 3, 3), WORKS),
    "ReplicationPad1d": (lambda: nn.ReplicationPad1d(2), (1, 3), WORKS),
    "Unfold": (lambda: nn.Unfold(2), (1, 3, 3), WORKS),
    "LogSoftmax": (lambda: nn.LogSoftmax(1), (4,), WORKS),
    "F.normalize": (lambda: Of(lambda m, x: F.normalize(x, dim=1)), (4,), WORKS),
    "RMSNorm": (lambda: nn.RMSNorm(4, eps=1e-5), (4,), WORKS),
    "BatchNorm": (lambda: nn.BatchNorm1d(4), (4,), "LayerCentering"),
    "SELU": (nn.SELU, (4,), WORKS),
    "CELU": (nn.CELU, (4,), WORKS),
    "Hardswish": (nn.Hardswish, (4,), WORKS),
    "Hardsigmoid": (nn.Hardsigmoid, (4,), WORKS),
    "LogSigmoid": (nn.LogSigmoid, (4,), WORKS),
    "GLU": (lambda: nn.GLU(1), (4,), WORKS),
    "clamp": (lambda: Of(lambda m, x: x.clamp(-1, 1)), (4,), WORKS),
    "spatial shift": (lambda: lnn.SpatialShift(1), (4, 3, 3), WORKS),
    "β-Abs": (lambda: lnn.BetaAbs(0.5), (4,), WORKS),
    "SpectralAttention": (lambda: lnn.SpectralAttention(4, 2, bound=0.4), (3, 4), WORKS),
    "the zoo's transformer": (
        lambda: lipdp.models.build("transformer", input_shape=(1, 8, 8), num_classes=3),
        *((1, 8, 8), WORKS),
    ),
    "softmax attention by hand": (
        lambda: Of(lambda m, x: torch.softmax(m.q(x) @ m.k(x).transpose(1, 2) / 2, -1) @ m.v(x), **SHARP),
        *((3, 4), WORKS),
    ),
    "scaled_dot_product_attention": (
        lambda: Of(lambda m, x: F.scaled_dot_product_attention(m.q(x), m.k(x), m.v(x)), **SHARP),
        *((3, 4), "square of its input.*SpectralAttention"),
    ),
    "MultiheadAttention": (
        lambda: Of(lambda m, x: m.a(x, x, x)[0], a=nn.MultiheadAttention(4, 2, batch_first=True)),
        *((3, 4), "square of its input.*SpectralAttention"),
    ),
    "TransformerEncoderLayer": (
        lambda: nn.TransformerEncoderLayer(4, 2, 8, batch_first=True),
        *((3, 4), "square of its input.*SpectralAttention"),
    ),
    "GRU": (lambda: Of(lambda m, x: m.a(x)[0], a=nn.GRU(4, 4, batch_first=True)), (3, 4), "recurrent.*SpectralConv1d"),
    "LSTM": (
        lambda: Of(lambda m, x: m.a(x)[0], a=nn.LSTM(4, 4, batch_first=True)),
        *((3, 4), "recurrent.*SpectralConv1d"),
    ),
    "GRUCell": (lambda: nn.GRUCell(4, 4), (4,), "recurrent.*SpectralConv1d"),
    "stochastic depth": (
        lambda: Of(lambda m, x: x if random.random() < 0.5 else m.fc(x), fc=dense(4, 4)),
        *((4,), "draws random numbers"),
    ),
    "lnn.constrain": (
        lambda: lnn.constrain(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))),
        *((4,), WORKS),
    ),
    "two inputs": (
        lambda: arguments(", other):\n return self.fc(x + other)"),
        *((4,), "other have no default.*a record is one tensor"),
    ),
    "a tuple": (
        lambda: arguments("):\n a, b = x\n return self.fc(a + b)"),
        *((4,), r"apart as x\[0\].*a record is one tensor"),
    ),
    "a dict": (
        lambda: arguments("):\n return self.fc(x['image'])"),
        *((4,), r"apart as x\['image'\].*a record is one tensor"),
    ),
}

TOKENS = {  # name → (model, None or what the refusal says); five tokens
    "Embedding": (lambda: nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), dense(20, 3)), WORKS),
    "frozen Embedding": (
        lambda: nn.Sequential(nn.Embedding(9, 4).requires_grad_(False), nn.Flatten(), dense(20, 3)),
        WORKS,
    ),
    "EmbeddingBag": (lambda: nn.Sequential(nn.EmbeddingBag(9, 4), dense(4, 3)), WORKS),
    "mean of embeddings": (lambda: Of(lambda m, x: m.fc(m.e(x).mean(1)), e=nn.Embedding(9, 4), fc=dense(4, 3)), WORKS),
    "max_norm": (lambda: nn.Sequential(nn.Embedding(9, 4, max_norm=1.0), nn.Flatten(), dense(20, 3)), "max_norm"),
    "scale_grad_by_freq": (lambda: nn.EmbeddingBag(9, 4, scale_grad_by_freq=True), "couples records"),
    "sparse": (lambda: nn.Sequential(nn.Embedding(9, 4, sparse=True), nn.Flatten(), dense(20, 3)), "sparse"),
}

PUBLIC = torch.tensor([0.5, 2.0, 1.0])
LOSSES = {  # name → (criterion, outputs, None or what the refusal says)
    "TauCrossEntropy(weight)": (lambda: losses.TauCrossEntropy(8.0, weight=[0.5, 2.0, 1.0]), (3,), WORKS),
    "TauCrossEntropy(label_smoothing)": (lambda: losses.TauCrossEntropy(label_smoothing=0.1), (3,), WORKS),
    "TauCrossEntropy(ignore_index)": (lambda: losses.TauCrossEntropy(ignore_index=1), (3,), WORKS),
    "CrossEntropyLoss(label_smoothing)": (lambda: nn.CrossEntropyLoss(label_smoothing=0.1), (3,), WORKS),
    "CrossEntropyLoss(weight, sum)": (lambda: nn.CrossEntropyLoss(PUBLIC, reduction="sum"), (3,), WORKS),
    "CrossEntropyLoss(weight)": (lambda: nn.CrossEntropyLoss(PUBLIC), (3,), "sum"),
    "BCEWithLogitsLoss(pos_weight)": (lambda: nn.BCEWithLogitsLoss(pos_weight=torch.tensor([3.0])), (1,), WORKS),
    "BCEWithLogitsLoss of C labels": (nn.BCEWithLogitsLoss, (5,), WORKS),
    "HuberLoss": (lambda: nn.HuberLoss(delta=0.5), (4,), WORKS),
    "SmoothL1Loss": (nn.SmoothL1Loss, (4,), WORKS),
    "MultiMarginLoss": (nn.MultiMarginLoss, (4,), WORKS),
    "SoftMarginLoss": (nn.SoftMarginLoss, (4,), WORKS),
    "NLLLoss": (nn.NLLLoss, (4,), WORKS),
    "MSELoss": (nn.MSELoss, (1,), "MeanSquaredError"),
    "MSE with bounded targets": (lambda: losses.MeanSquaredError(1.0), (1,), WORKS),
    "per-pixel cross-entropy": (nn.CrossEntropyLoss, (3, 4, 4), WORKS),
    "soft labels": (losses.SoftCrossEntropy, (3,), WORKS),
}

X = torch.randn(24, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(24) % 3
TABLE = np.zeros(24, dtype=[("a", "f4"), ("b", "f8"), ("c", "f4"), ("d", "f4"), ("y", "i8")])


class Records(Dataset):
    def __init__(self, record):
        self.record = record

    def __len__(self):
        return 24

    def __getitem__(self, index):
        return self.record(index)


def frame():
    return pytest.importorskip("pandas").DataFrame(TABLE)


def hugging_face():
    data = pytest.importorskip("datasets")
    return data.Dataset.from_dict({"image": X.tolist(), "label": Y.tolist()})


def picture(i):
    return pytest.importorskip("PIL.Image").new("L", (2, 2)), int(Y[i])


RECORDS = {  # name → (data set, fields, None or what the refusal says)
    "float64": (lambda: TensorDataset(X.double(), Y), None, WORKS),
    "float16": (lambda: TensorDataset(X.half(), Y), None, WORKS),
    "uint8": (lambda: TensorDataset(X.abs().to(torch.uint8), Y), None, WORKS),
    "int": (lambda: TensorDataset(X.long(), Y), None, WORKS),
    "dict": (lambda: Records(lambda i: {"image": X[i], "label": int(Y[i])}), ("image", "label"), WORKS),
    "dict without fields": (lambda: Records(lambda i: {"image": X[i], "label": int(Y[i])}), None, "fields="),
    "Hugging Face": (hugging_face, ("image", "label"), WORKS),
    "(x, y, id)": (lambda: Records(lambda i: (X[i], int(Y[i]), i)), (0, 1), WORKS),
    "pandas": (frame, (list("abcd"), "y"), WORKS),
    "structured array": (lambda: TABLE, (list("abcd"), "y"), WORKS),
    "PIL": (lambda: Records(picture), None, "tensor of the image"),
    "text labels": (lambda: Records(lambda i: (X[i], "abc"[Y[i]])), None, "public list"),
    "DataLoader": (lambda: DataLoader(TensorDataset(X, Y), batch_size=4), None, WORKS),
    "two inputs in a record": (lambda: Records(lambda i: ((X[i, :2], X[i, 2:]), int(Y[i]))), *(None, "record 0")),
}


def judge(says, use):
    """Run it, or hold the refusal against what it should say: one error of lipdp, in one line."""
    if says is WORKS:
        use()
        return
    with pytest.raises(LipdpError, match=says) as raised:
        use()
    assert "\n" not in str(raised.value)


def bounded(model, shape, **options):
    sweep = BoundGraph(model, shape, **options).sweep(1.0)
    assert all(math.isfinite(float(delta)) for delta in sweep.parameters.values())


@pytest.mark.parametrize("name", MODELS)
def test_models(name):
    make, shape, says = MODELS[name]
    judge(says, lambda: bounded(make(), shape, input_bound=1.0))


@pytest.mark.parametrize("name", TOKENS)
def test_models_of_tokens(name):
    make, says = TOKENS[name]
    judge(says, lambda: bounded(make(), (5,)))


@pytest.mark.parametrize("name", LOSSES)
def test_losses(name):
    make, outputs, says = LOSSES[name]
    judge(says, lambda: as_lipschitz(make(), outputs).constant(1.0))


def private(model, dataset, **options):
    _, *made = kit.private(model, dataset, expected_batch_size=8, steps=1, **options)
    kit.train(*made)


@pytest.mark.parametrize("name", RECORDS)
def test_records(name):
    make, fields, says = RECORDS[name]
    model = nn.Sequential(lnn.InputBound(1.0), dense(4, 3))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*sampler")
        judge(says, lambda: private(model, make(), **({} if fields is None else {"fields": fields})))


def test_a_plain_net_trains_and_is_told_that_nothing_bounds_it():
    model = nn.Sequential(lnn.InputBound(1.0), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    with pytest.warns(UserWarning, match="constrain"):
        private(model, TensorDataset(X, Y))


def test_frozen_parameters_are_attacked_around():
    model = nn.Sequential(lnn.InputBound(1.0), dense(4, 4).requires_grad_(False), dense(4, 3))
    report = lipdp.testing.falsify(
        model, losses.TauCrossEntropy(), (4,), starts=1, climbs=1, steps=1, weights=("given",)
    )
    assert set(report.ratios) == {"2.weight"}
