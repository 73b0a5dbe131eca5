"""The constant of every loss is attacked, reached, and never stated for a loss that couples samples."""

import math

import pytest
import torch
from deel import torchlip
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lipdp.errors import BoundViolation, LossError, ParameterError
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
from lipdp.testing import example_targets, falsify_loss

pytestmark = pytest.mark.usefixtures("one_thread")

F64 = torch.float64

# name → (loss, outputs, the least ratio an attack must reach)
LOSSES = {
    "cross-entropy": (TauCrossEntropy(), 5, 0.999),
    "cross-entropy, two classes": (TauCrossEntropy(), 2, 0.999),
    "cross-entropy, hot": (TauCrossEntropy(64.0), 10, 0.999),
    "cross-entropy, cold": (TauCrossEntropy(0.01), 3, 0.99),
    "binary": (TauBCEWithLogits(), 1, 0.999),
    "binary, hot": (TauBCEWithLogits(16.0), 1, 0.999),
    "binary, many": (TauBCEWithLogits(2.0, 6), 6, 0.999),
    "hinge": (CategoricalHinge(), 4, 0.999),
    "hinge, two classes": (CategoricalHinge(0.1), 2, 0.999),
    "multiclass hinge": (MulticlassHinge(5), 5, 0.999),
    "multiclass hinge, two classes": (MulticlassHinge(2, margin=3.0), 2, 0.999),
    "cosine": (CosineSimilarity(), 4, 0.99),
    "cosine, low floor": (CosineSimilarity(0.01), 4, 0.99),
    "absolute error": (MeanAbsoluteError(), 1, 0.999),
    "absolute error, many": (MeanAbsoluteError(7), 7, 0.999),
    "Kantorovich-Rubinstein": (HKR([0.2, 0.3, 0.5], alpha=0.0), 3, 0.999),
    "Kantorovich-Rubinstein, rare": (HKR([0.001, 0.999], alpha=0.0), 1, 0.999),
    "HKR": (HKR([0.1, 0.2, 0.3, 0.4], alpha=0.6), 4, 0.999),
    "HKR, one logit": (HKR([0.4, 0.6], alpha=0.5), 1, 0.999),
    "HKR, two logits": (HKR([0.4, 0.6], alpha=0.5), 2, 0.5),
    "hinge of HKR": (HKR([0.25] * 4, alpha=1.0), 4, 0.999),
}


@pytest.mark.parametrize("name", LOSSES)
def test_constant_holds_and_is_reached(name):
    loss, outputs, tight = LOSSES[name]
    report = falsify_loss(loss, outputs)
    assert report.findings["gradient of the logits"].ratio >= tight


@pytest.mark.parametrize("name", LOSSES)
def test_five_percent_less_is_found(name):
    loss, outputs, tight = LOSSES[name]
    if tight < 0.99:
        pytest.skip("with two priors the constant is that of a single logit")
    stated = loss.lipschitz
    try:
        loss.lipschitz = 0.95 * stated
        with pytest.raises(BoundViolation, match="gradient of the logits"):
            falsify_loss(loss, outputs, steps=8)
    finally:
        loss.lipschitz = stated


@pytest.mark.parametrize("bound", [0.1, 3.0, 100.0])
def test_squared_error_holds_within_the_output_bound(bound):
    loss = MeanSquaredError(target_bound=2.0, num_outputs=3)
    report = falsify_loss(loss, 3, output_bound=bound)
    assert report.worst >= 0.99
    with pytest.raises(LossError, match="output_bound"):
        falsify_loss(loss, 3)


@settings(max_examples=80, deadline=None)
@given(st.sampled_from(sorted(LOSSES)), st.integers(0, 2**31), st.floats(-6, 6))
def test_gradients_of_random_logits_stay_within_the_constant(name, seed, log_scale):
    loss, outputs, _ = LOSSES[name]
    generator = torch.Generator().manual_seed(seed)
    targets = example_targets(loss, outputs)
    logits = 10.0**log_scale * torch.randn(len(targets), outputs, generator=generator, dtype=F64)
    logits.requires_grad_()
    values = loss(logits, targets)
    assert values.shape == (len(targets),)
    (grad,) = torch.autograd.grad(values.sum(), logits)
    assert (grad.norm(dim=1) <= loss.lipschitz * (1 + 1e-9)).all()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_empty_batch_has_no_values_and_no_gradient(name, dtype):
    loss, outputs, _ = LOSSES[name]
    logits = torch.zeros(0, outputs, dtype=dtype, requires_grad=True)
    values = loss(logits, example_targets(loss, outputs)[:0])
    assert values.shape == (0,)
    values.sum().backward()
    assert logits.grad.shape == (0, outputs)


@pytest.mark.parametrize("name", LOSSES)
def test_extreme_logits_have_finite_gradients(name):
    loss, outputs, _ = LOSSES[name]
    targets = example_targets(loss, outputs)
    for scale in (0.0, 1e-30, 1e-20, 1.0, 1e20):
        logits = torch.full((len(targets), outputs), scale, requires_grad=True)
        loss(logits, targets).sum().backward()
        assert logits.grad.isfinite().all()


def test_values_agree_with_torch():
    logits, labels = torch.randn(6, 4, dtype=F64), torch.tensor([0, 1, 2, 3, 0, 1])
    expected = nn.functional.cross_entropy(3.0 * logits, labels, reduction="none") / 3.0
    assert torch.allclose(TauCrossEntropy(3.0)(logits, labels), expected)
    targets = torch.rand(6, 4, dtype=F64)
    binary = nn.BCEWithLogitsLoss(reduction="none")(2 * logits, targets).mean(1) / 2
    assert torch.allclose(TauBCEWithLogits(2.0, 4)(logits, targets), binary)
    assert torch.allclose(MeanAbsoluteError(4)(logits, targets), (logits - targets).abs().mean(1))
    assert torch.allclose(MeanSquaredError(9.0, 4)(logits, targets), (logits - targets).square().mean(1))
    by_torchlip = torchlip.functional.hinge_multiclass_loss(logits, nn.functional.one_hot(labels, 4).double(), 1.0)
    assert torch.allclose(MulticlassHinge(4, margin=1.0)(logits, labels).mean(), by_torchlip.mean())
    ours = HKR([0.25] * 4, alpha=0.0)(logits[:4], labels[:4])  # a balanced batch: the batch counts are the priors
    theirs = torchlip.functional.kr_loss(logits[:4], nn.functional.one_hot(labels[:4], 4))
    assert torch.allclose(ours, -theirs)


# --- samples that are coupled ----------------------------------------------------------------------------------------


class Torchlip(nn.Module):
    """A deel-torchlip loss, one value a sample, with the constant it would have if the batch counts were constants."""

    def __init__(self, loss, lipschitz):
        super().__init__()
        self.loss = loss
        self.lipschitz = lipschitz

    def forward(self, logits, target):
        count = logits.shape[1]
        return self.loss(logits, nn.functional.one_hot(target, count) if count > 1 else target.unsqueeze(1))


class Coupled(LipschitzLoss):
    lipschitz = 2.0

    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def forward(self, logits, target):
        values = nn.functional.cross_entropy(logits, target, reduction="none")
        if self.kind == "mean":
            return values / len(values)
        if self.kind == "weights":
            weights = 0.1 * torch.bincount(target, minlength=logits.shape[1])
            return values * weights[target] / weights[target].sum()
        if self.kind == "centred":
            return nn.functional.cross_entropy(logits - logits.mean(0), target, reduction="none")
        return values * (1 + 1e-6 * (target == 0).sum())


def test_kr_with_batch_counts_is_found():
    """2.0 is the constant of balanced batches; one rare sample in a batch of 64 exceeds it 32 times."""
    loss = Torchlip(torchlip.KRLoss(reduction="none"), 2.0)
    report = falsify_loss(loss, 1, targets=torch.tensor([0, 1]), raise_on_violation=False)
    assert report.findings["gradient of the logits, in a batch"].ratio > 10
    assert report.findings["influence of one sample on another"].ratio > 1e6
    with pytest.raises(BoundViolation, match="another sample"):
        falsify_loss(loss, 1, targets=torch.tensor([0, 1]))


def test_hkr_with_batch_counts_is_found():
    loss = Torchlip(torchlip.HKRMulticlassLoss(alpha=0.5, reduction="none"), 4.0)
    with pytest.raises(BoundViolation, match="another sample"):
        falsify_loss(loss, 4)


@pytest.mark.parametrize("kind", ["mean", "weights", "centred", "slightly"])
def test_coupled_samples_are_found(kind):
    with pytest.raises(BoundViolation, match="another sample"):
        falsify_loss(Coupled(kind), 3)


def test_a_loss_without_a_constant_or_with_a_reduction_is_refused():
    with pytest.raises(LossError, match="lipschitz"):
        falsify_loss(nn.CrossEntropyLoss(reduction="none"), 3)
    reduced = nn.CrossEntropyLoss()
    reduced.lipschitz = 2.0
    with pytest.raises(LossError, match="one value per sample"):
        falsify_loss(reduced, 3)


# --- what the losses refuse ------------------------------------------------------------------------------------------


def test_soft_labels_could_have_any_weight_and_are_refused():
    logits = torch.randn(2, 3)
    heavy = torch.tensor([[100.0, 0.0, 0.0], [0.0, 0.0, -50.0]])
    given = logits.requires_grad_()
    (gradient,) = torch.autograd.grad(
        TauCrossEntropy()(given, heavy).sum(), given
    )  # taken as shares of what is positive
    assert gradient.norm(dim=1).max() <= TauCrossEntropy().lipschitz
    for loss in (CategoricalHinge(), MulticlassHinge(3), HKR([0.3, 0.3, 0.4])):
        with pytest.raises(LossError, match="integer labels"):
            loss(logits, heavy)


@pytest.mark.parametrize(
    ("loss", "logits", "target"),
    [
        (TauCrossEntropy(), (2, 3, 4), torch.zeros(2, 4, dtype=torch.int64)),
        (TauCrossEntropy(), (3, 2), torch.zeros(2, dtype=torch.int64)),
        (CategoricalHinge(), (2, 1), torch.zeros(2, dtype=torch.int64)),
        (MulticlassHinge(4), (2, 3), torch.zeros(2, dtype=torch.int64)),
        (CosineSimilarity(), (2, 3), torch.ones(2, 1)),
        (MeanAbsoluteError(2), (4, 2), torch.zeros(2, 4)),
        (MeanAbsoluteError(1), (4, 2), torch.zeros(4, 2)),
        (TauBCEWithLogits(num_outputs=3), (4, 2), torch.zeros(4, 2)),
        (MeanSquaredError(1.0, 3), (4, 3), torch.zeros(4, 2)),
        (HKR([0.5, 0.5]), (4, 3), torch.zeros(4, dtype=torch.int64)),
    ],
)
def test_shapes_the_constant_is_not_for_are_refused(loss, logits, target):
    with pytest.raises(LossError):
        loss(torch.zeros(logits), target)


@pytest.mark.parametrize(
    "make",
    [
        lambda: TauCrossEntropy(0.0),
        lambda: TauBCEWithLogits(math.nan),
        lambda: TauBCEWithLogits(1.0, 0),
        lambda: CategoricalHinge(-1.0),
        lambda: MulticlassHinge(1),
        lambda: CosineSimilarity(0.0),
        lambda: MeanAbsoluteError(0),
        lambda: MeanSquaredError(math.inf),
        lambda: HKR([1.0]),
        lambda: HKR([0.5, 0.6]),
        lambda: HKR([0.0, 1.0]),
        lambda: HKR([0.5, 0.5], alpha=1.5),
    ],
)
def test_arguments_out_of_range_are_refused(make):
    with pytest.raises(ParameterError):
        make()


def test_rare_classes_keep_their_constant_in_float32():
    for rare in (1e-3, 1e-5, 1e-7):
        loss = HKR([rare, 1 - rare], alpha=0.0)
        for outputs in (1, 2):
            logits = torch.zeros(2, outputs, requires_grad=True)
            (grad,) = torch.autograd.grad(loss(logits, torch.tensor([0, 1])).sum(), logits)
            assert grad.double().norm(dim=1).max() <= loss.lipschitz * (1 + 1e-6)


def test_binary_labels_of_any_convention_have_one_constant():
    loss, logits = HKR([0.3, 0.7], alpha=0.4), torch.randn(4, 1, dtype=F64)
    zero_one = loss(logits, torch.tensor([0, 1, 0, 1]))
    assert torch.equal(loss(logits, torch.tensor([-1, 1, -1, 1])), zero_one)
    assert torch.equal(loss(logits, torch.tensor([-5, 7, 0, 2])), zero_one)


# --- torch criteria --------------------------------------------------------------------------------------------------


def test_torch_criteria_with_a_constant_are_taken():
    logits, labels = torch.randn(5, 3), torch.tensor([0, 1, 2, 0, 1])
    ours = as_lipschitz(nn.CrossEntropyLoss())
    assert torch.allclose(ours(logits, labels).mean(), nn.CrossEntropyLoss()(logits, labels))
    assert isinstance(as_lipschitz(nn.BCEWithLogitsLoss()), TauBCEWithLogits)
    assert isinstance(as_lipschitz(nn.L1Loss()), MeanAbsoluteError)
    loss = CategoricalHinge()
    assert as_lipschitz(loss) is loss


class Tenfold(nn.CrossEntropyLoss):
    def forward(self, logits, target):
        return 10 * super().forward(logits, target)


@pytest.mark.parametrize(
    "criterion",
    [
        Tenfold(),
        torchlip.KRLoss(),
        torchlip.HKRLoss(0.5),
        torchlip.HKRMulticlassLoss(0.5),
        lambda logits, target: logits.sum(1),
    ],
)
def test_other_criteria_are_refused(criterion):
    with pytest.raises(LossError):
        as_lipschitz(criterion)
