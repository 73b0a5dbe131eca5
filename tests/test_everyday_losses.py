"""The options people give to losses: constants that are attacked, reached and the same as torch's values."""

import pytest
import torch
from torch import nn

from lipdp import losses, sensitivity
from lipdp import nn as lnn
from lipdp.errors import BoundViolation, LossError, ParameterError
from lipdp.testing import falsify, falsify_loss

pytestmark = pytest.mark.usefixtures("one_thread")

F64 = torch.float64
WEIGHT = [0.5, 2.0, 1.0]

# name → (loss, outputs, constant, criterion of torch with the same values or None)
LOSSES = {
    "weighted": (
        losses.TauCrossEntropy(weight=WEIGHT),
        *(3, 2.0**0.5 * 2, nn.CrossEntropyLoss(torch.tensor(WEIGHT, dtype=F64), reduction="none")),
    ),
    "smoothed": (
        losses.TauCrossEntropy(label_smoothing=0.1),
        *(10, 1.81**0.5, nn.CrossEntropyLoss(label_smoothing=0.1, reduction="none")),
    ),
    "weighted and smoothed": (
        losses.TauCrossEntropy(weight=WEIGHT, label_smoothing=0.3),
        *(3, 5.46**0.5, nn.CrossEntropyLoss(torch.tensor(WEIGHT, dtype=F64), label_smoothing=0.3, reduction="none")),
    ),
    "ignoring": (
        losses.TauCrossEntropy(ignore_index=1, label_smoothing=0.2),
        *(4, 1.64**0.5, nn.CrossEntropyLoss(ignore_index=1, label_smoothing=0.2, reduction="none")),
    ),
    "soft labels": (losses.SoftCrossEntropy(), 4, 2.0**0.5, None),
    "likelihood": (
        losses.NegativeLogLikelihood(weight=WEIGHT),
        *(3, 2.0, nn.NLLLoss(torch.tensor(WEIGHT, dtype=F64), reduction="none")),
    ),
    "likelihood, ignoring": (
        losses.NegativeLogLikelihood(ignore_index=0),
        *(3, 1.0, nn.NLLLoss(ignore_index=0, reduction="none")),
    ),
    "binary, weight": (
        losses.TauBCEWithLogits(pos_weight=3.0),
        *(1, 3.0, nn.BCEWithLogitsLoss(pos_weight=torch.tensor([3.0], dtype=F64), reduction="none")),
    ),
    "binary, weights": (
        losses.TauBCEWithLogits(num_outputs=3, pos_weight=WEIGHT),
        *(3, 6.0**0.5 / 3, nn.BCEWithLogitsLoss(pos_weight=torch.tensor(WEIGHT, dtype=F64), reduction="none")),
    ),
    "soft margin": (losses.SoftMargin(4), 4, 0.5, nn.SoftMarginLoss(reduction="none")),
    "Huber": (losses.Huber(0.3, 4), 4, 0.15, nn.HuberLoss(delta=0.3, reduction="none")),
    "Huber, wide": (losses.Huber(30.0), 1, 30.0, nn.HuberLoss(delta=30.0, reduction="none")),
    "smooth L1": (losses.SmoothL1(0.2, 4), 4, 0.5, nn.SmoothL1Loss(beta=0.2, reduction="none")),
    "multi-margin": (losses.MultiMargin(5), 5, 0.8**0.5, nn.MultiMarginLoss(reduction="none")),
    "multi-margin, weighted": (
        losses.MultiMargin(3, 0.4, weight=WEIGHT),
        *(3, 2 * (2 / 3) ** 0.5, nn.MultiMarginLoss(1, 0.4, torch.tensor(WEIGHT, dtype=F64), reduction="none")),
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_constant_holds_and_five_percent_less_is_found(name):
    loss, outputs, constant, _ = LOSSES[name]
    assert loss.lipschitz == pytest.approx(constant, rel=1e-4)
    assert falsify_loss(loss, outputs).findings["gradient of the logits"].ratio > 0.99
    try:
        loss.lipschitz = 0.95 * constant
        with pytest.raises(BoundViolation, match="gradient of the logits"):
            falsify_loss(loss, outputs, steps=8)
    finally:
        loss.lipschitz = constant


@pytest.mark.parametrize("name", LOSSES)
def test_values_are_those_of_torch(name):
    loss, outputs, _, criterion = LOSSES[name]
    if criterion is None:
        criterion = nn.CrossEntropyLoss(reduction="none")
    logits = torch.randn(6, outputs, dtype=F64)
    target = torch.arange(6) % outputs
    if isinstance(loss, losses.SoftCrossEntropy):
        target = torch.rand(6, outputs, dtype=F64).softmax(1)
    elif hasattr(loss, "num_outputs"):
        target = (torch.rand(6, outputs, dtype=F64) > 0.5).double()
        target = 2 * target - 1 if isinstance(loss, losses.SoftMargin) else target
    expected = criterion(logits, target)
    assert torch.allclose(loss(logits, target), expected.mean(1) if expected.dim() > 1 else expected)


@pytest.mark.parametrize("name", LOSSES)
def test_no_target_stops_the_run(name):
    loss, outputs, _, _ = LOSSES[name]
    logits = torch.randn(3, outputs, requires_grad=True)
    if hasattr(loss, "num_outputs") or isinstance(loss, losses.SoftCrossEntropy):
        target = torch.tensor([float("nan"), float("inf"), -1e30]).unsqueeze(1).expand(3, outputs)
    else:
        target = torch.tensor([-1, 10**9, torch.iinfo(torch.int64).min])
    values = loss(logits, target)
    values.sum().backward()
    assert not values[:2].any()
    assert not logits.grad[:2].any()
    assert logits.grad.isfinite().all()


def test_an_ignored_label_is_known_and_weighs_nothing():
    for loss in (
        losses.TauCrossEntropy(ignore_index=0, label_smoothing=0.5),
        losses.NegativeLogLikelihood(ignore_index=0),
    ):
        logits, target = torch.randn(3, 4, requires_grad=True), torch.tensor([0, 1, 0])
        assert loss.knows(logits, target).all()
        loss(logits, target).sum().backward()
        assert logits.grad.norm(dim=1).gt(0).tolist() == [False, True, False]


def test_soft_labels_of_any_weight_keep_the_constant():
    logits = torch.zeros(3, 2, requires_grad=True)
    target = torch.tensor([[100.0, 0.0], [-5.0, 0.2], [3.0, 3.0]])
    losses.SoftCrossEntropy()(logits, target).sum().backward()
    assert torch.allclose(logits.grad, torch.tensor([[-0.5, 0.5], [0.1, -0.1], [0.0, 0.0]]))


@pytest.mark.parametrize(
    "make",
    [
        lambda: losses.TauCrossEntropy(weight=[1.0, -1.0]),
        lambda: losses.TauCrossEntropy(weight=torch.tensor([1.0, float("nan")])),
        lambda: losses.TauCrossEntropy(weight=[0.0, 0.0]),
        lambda: losses.TauCrossEntropy(label_smoothing=1.5),
        lambda: losses.TauBCEWithLogits(num_outputs=2, pos_weight=[1.0, 2.0, 3.0]),
        lambda: losses.Huber(0.0),
        lambda: losses.SmoothL1(-1.0),
        lambda: losses.MultiMargin(1),
        lambda: losses.MultiMargin(3, weight=[1.0]),
    ],
)
def test_options_out_of_range_are_refused(make):
    with pytest.raises(ParameterError):
        make()


# --- criteria of torch -----------------------------------------------------------------------------------------------

W = torch.tensor([1.0, 3.0])
CRITERIA = [
    (nn.CrossEntropyLoss(label_smoothing=0.1), 2, 1.81**0.5),
    (nn.CrossEntropyLoss(W, reduction="sum"), 2, 3 * 2**0.5),
    (nn.CrossEntropyLoss(ignore_index=0, reduction="sum"), 2, 2**0.5),
    (nn.NLLLoss(), 2, 1.0),
    (nn.BCEWithLogitsLoss(pos_weight=torch.tensor([3.0])), 1, 3.0),
    (nn.BCEWithLogitsLoss(), 4, 0.5),
    (nn.BCEWithLogitsLoss(pos_weight=W), 2, 10**0.5 / 2),
    (nn.L1Loss(), 4, 0.5),
    (nn.HuberLoss(delta=2.0), 4, 1.0),
    (nn.SmoothL1Loss(beta=0.0), 4, 0.5),
    (nn.SmoothL1Loss(), 4, 0.5),
    (nn.SoftMarginLoss(), 4, 0.5),
    (nn.MultiMarginLoss(), 2, 0.5**0.5),
]


@pytest.mark.parametrize(("criterion", "outputs", "constant"), CRITERIA)
def test_criteria_of_torch_have_their_constant_for_the_outputs_of_the_model(criterion, outputs, constant):
    model = nn.Sequential(lnn.InputBound(1.0), lnn.SpectralLinear(3, outputs))
    assert sensitivity(model, criterion, (3,)).loss_constant == pytest.approx(constant)
    falsify(model, criterion, (3,), weights=("given",), starts=2, climbs=1, steps=3)


@pytest.mark.parametrize(
    ("criterion", "reason"),
    [
        (nn.CrossEntropyLoss(W), "class weights and reduction='mean'"),
        (nn.CrossEntropyLoss(ignore_index=0), "ignore_index and reduction='mean'"),
        (nn.NLLLoss(W), "class weights and reduction='mean'"),
        (nn.BCEWithLogitsLoss(weight=W), "broadcast over the batch"),
        (nn.BCEWithLogitsLoss(reduction="sum", pos_weight=W), "adds up the 2 outputs"),
        (nn.MultiMarginLoss(p=2), "grows with the logits"),
        (nn.MultiMarginLoss(), "known number of classes"),
        (nn.MSELoss(), "target_bound"),
        (nn.BCELoss(), "1/p"),
        (nn.KLDivLoss(), "SoftCrossEntropy"),
        (nn.PoissonNLLLoss(), "exp"),
        (nn.GaussianNLLLoss(), "variance"),
        (nn.TripletMarginLoss(), "no known Lipschitz constant"),
    ],
)
def test_the_reason_given_is_the_one_that_applies(criterion, reason):
    with pytest.raises(LossError, match=reason):
        losses.as_lipschitz(criterion)


def test_targets_of_the_other_kind_name_the_loss_for_them():
    logits, shares = torch.zeros(2, 3), torch.full((2, 3), 1 / 3)
    for of_labels in (losses.TauCrossEntropy(weight=WEIGHT), losses.TauCrossEntropy(label_smoothing=0.1)):
        with pytest.raises(LossError, match="SoftCrossEntropy"):
            of_labels(logits, shares)
    assert torch.equal(losses.TauCrossEntropy(2.0)(logits, shares), losses.SoftCrossEntropy(2.0)(logits, shares))
    for target, says in (
        (torch.zeros(2), "y.long"),
        (torch.tensor([[0], [1]]), "squeeze"),
        (torch.eye(3)[:2].long(), "argmax"),
    ):
        with pytest.raises(LossError, match=says):
            losses.TauCrossEntropy()(logits, target)
    with pytest.raises(LossError, match="TauCrossEntropy"):
        losses.SoftCrossEntropy()(logits, torch.tensor([0, 1]))
    with pytest.raises(LossError, match="3 class weights"):
        losses.TauCrossEntropy(weight=WEIGHT)(torch.zeros(2, 4), torch.tensor([0, 1]))


class Pixels(nn.Module):
    """Logits of 2 × 2 positions, as many as inputs."""

    def forward(self, x):
        return x.unflatten(1, (3, 2, 2))


def test_a_loss_of_every_position_holds_and_five_percent_less_is_found():
    loss = losses.as_lipschitz(nn.CrossEntropyLoss(), (3, 2, 2))
    assert loss.lipschitz == pytest.approx(2**0.5 / 2)
    model = nn.Sequential(lnn.InputBound(40.0), Pixels())
    assert falsify(model, loss, (12,), starts=4, climbs=2, steps=20).worst <= 1 + 1e-9
    logits = torch.zeros(1, 3, 2, 2, dtype=F64)
    target = torch.tensor([[[0, 1], [2, 0]]])
    worst = logits.clone()
    for row in range(2):
        for column in range(2):
            worst[0, (int(target[0, row, column]) + 1) % 3, row, column] = 60.0
    worst.requires_grad_()
    loss(worst, target).sum().backward()
    assert 0.953 * loss.lipschitz < float(worst.grad.norm()) <= loss.lipschitz
    assert float(loss(logits, target)) == pytest.approx(float(nn.CrossEntropyLoss()(logits, target)))


def test_positions_without_a_label_weigh_nothing_and_others_are_refused():
    loss = losses.as_lipschitz(losses.TauCrossEntropy(ignore_index=255), (3, 2))
    logits = torch.randn(2, 3, 2)
    known = loss.knows(logits, torch.tensor([[0, 255], [1, 7]]))
    assert known.tolist() == [True, False]
    assert float(loss(logits, torch.tensor([[255, 255], [1, 7]])).sum()) == 0
    with pytest.raises(LossError, match="2 positions"):
        loss(logits, torch.zeros(2, 5, dtype=torch.int64))
    with pytest.raises(LossError, match="adds up"):
        losses.as_lipschitz(nn.CrossEntropyLoss(reduction="sum"), (3, 2))
    with pytest.raises(LossError, match="class labels"):
        losses.PerPixel(losses.Huber(), 4)
