"""Calibration of distributions whose figures are known, of models that are wrong in a known way, and of real ones."""

import math
import sys

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss
from torch import nn
from torch.nn import functional as F

import lipdp
from lipdp.comparison.calibration import calibration, reliability_diagram
from lipdp.errors import DataError, NonFiniteError, ParameterError

pytestmark = pytest.mark.usefixtures("one_thread")

F64 = torch.float64


def drawn(count, classes, *, seed=0):
    """Logits of true conditional probabilities, and labels drawn from them: perfectly calibrated."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(count, classes, generator=generator, dtype=F64)
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator).squeeze(1)
    return logits, labels


def sure_to(share, count, classes=2):
    """Logits that give class 0 the probability `share`, and the others equal parts."""
    rest = math.log((1 - share) / (classes - 1))
    return torch.tensor([[math.log(share)] + [rest] * (classes - 1)], dtype=F64).expand(count, classes)


def right(count, hits):
    """Labels that make the first `hits` predictions of class 0 right."""
    return (torch.arange(count) >= hits).long()


# ------------------------------------------------------------------------------------------------- known distributions


@pytest.mark.parametrize("classes", [2, 10])
def test_a_calibrated_model_has_no_error(classes):
    logits, labels = drawn(20_000, classes)
    report = calibration(nn.Identity(), logits, labels)
    assert 0 < report.ece < math.sqrt(15 / 20_000)  # twice the most that its expectation can be
    assert report.confidence == pytest.approx(report.accuracy, abs=0.02)


@pytest.mark.parametrize("factor", [0.25, 4.0])
def test_a_wrong_temperature_is_found_and_the_right_one_repairs_it(factor):
    logits, labels = drawn(20_000, 5)
    wrong = calibration(nn.Identity(), factor * logits, labels)
    repaired = calibration(nn.Identity(), factor * logits, labels, temperature=1 / factor)
    assert wrong.ece > 0.15
    assert (wrong.confidence > wrong.accuracy) == (factor > 1)
    assert repaired.ece < 0.02
    assert repaired.temperature == 1 / factor
    assert repaired.accuracy == wrong.accuracy
    assert repaired.nll < wrong.nll
    assert repaired.brier < wrong.brier


@pytest.mark.parametrize(("share", "hits"), [(0.9, 60), (0.7, 95), (0.55, 55), (0.999, 0)])
def test_one_confidence_has_the_gap_worked_out_by_hand(share, hits):
    report = calibration(nn.Identity(), sure_to(share, 100), right(100, hits))
    rate = hits / 100
    assert report.ece == pytest.approx(abs(share - rate), abs=1e-5)
    assert report.mce == pytest.approx(report.ece, abs=1e-5)
    assert report.nll == pytest.approx(-rate * math.log(share) - (1 - rate) * math.log(1 - share))
    assert report.brier == pytest.approx(rate * (1 - share) ** 2 + (1 - rate) * share**2)
    assert report.accuracy == rate


def test_two_confidences_weigh_by_count_and_the_maximum_does_not():
    logits = torch.cat([sure_to(0.95, 90), sure_to(0.6, 10)])
    labels = torch.cat([right(90, 81), right(10, 1)])
    report = calibration(nn.Identity(), logits, labels, bins=10)
    assert report.ece == pytest.approx(0.9 * 0.05 + 0.1 * 0.5, abs=1e-5)
    assert report.mce == pytest.approx(0.5, abs=1e-5)
    assert [b.count for b in report.bins] == [0, 0, 0, 0, 0, 0, 10, 0, 0, 90]  # 0.6 in float32 begins a bin
    assert report.bins[9].gap == pytest.approx(0.05)


def test_brier_of_many_classes_sums_over_the_classes():
    report = calibration(nn.Identity(), sure_to(0.7, 10, classes=4), right(10, 6))
    expected = 0.6 * (0.3**2 + 3 * 0.1**2) + 0.4 * (0.7**2 + 0.9**2 + 2 * 0.1**2)
    assert report.brier == pytest.approx(expected)


def test_a_sure_and_wrong_model_has_the_largest_errors():
    report = calibration(nn.Identity(), torch.tensor([[1000.0, 0.0]] * 8), torch.ones(8, dtype=torch.int64))
    assert (report.ece, report.mce, report.brier, report.accuracy) == pytest.approx((1.0, 1.0, 1.0, 0.0), abs=1e-6)
    assert report.nll == 1000  # scikit-learn's log_loss stops at 36
    assert report.bins[-1].count == 8


# ------------------------------------------------------------------------------------------------------- the bins


@pytest.mark.parametrize("bins", [1, 7, 15, 100])
@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
def test_the_bins_give_the_errors_again(bins, scale):
    logits, labels = drawn(3000, 3, seed=bins)
    report = calibration(nn.Identity(), scale * logits, labels, bins=bins)
    assert len(report.bins) == bins
    assert sum(b.count for b in report.bins) == report.records == 3000
    assert sum(b.count * abs(b.gap) for b in report.bins) / 3000 == pytest.approx(report.ece, abs=1e-5)
    assert max(abs(b.gap) for b in report.bins) == pytest.approx(report.mce, abs=1e-5)
    assert sum(b.count * b.accuracy for b in report.bins) / 3000 == pytest.approx(report.accuracy)
    assert report.confidence == pytest.approx(float((scale * logits).softmax(1).amax(1).mean()), abs=1e-6)
    assert all(b.lower <= b.confidence <= b.upper for b in report.bins if b.count)


def test_a_confidence_of_one_is_in_the_last_bin():
    """Half of it exactly 1 and right, half 0.99 and wrong: one bin, whose gaps cancel in part."""
    logits = torch.cat([torch.tensor([[900.0, 0.0]] * 4, dtype=F64), sure_to(0.99, 4)])
    report = calibration(nn.Identity(), logits, right(8, 4), bins=10)
    assert report.bins[-1].count == 8
    assert report.ece == pytest.approx(0.995 - 0.5, abs=1e-6)


def test_the_log_likelihood_is_that_of_scikit_learn():
    logits, labels = drawn(500, 4)
    report = calibration(nn.Identity(), logits, labels)
    assert report.nll == pytest.approx(log_loss(labels.numpy(), logits.softmax(1).numpy(), labels=range(4)))


# ------------------------------------------------------------------------------------------------------- models


@pytest.mark.parametrize("shape", [(-1,), (-1, 1)])
def test_one_logit_is_two_classes(shape):
    logits, labels = drawn(400, 2)
    one = calibration(nn.Identity(), (logits[:, 1] - logits[:, 0]).view(shape), labels)
    two = calibration(nn.Identity(), logits, labels)
    for name in ("ece", "mce", "nll", "brier", "accuracy"):
        assert getattr(one, name) == pytest.approx(getattr(two, name), abs=1e-6)


def test_a_lipschitz_model_on_digits_needs_its_temperature():
    """Trained with CE(τ z)/τ, so that softmax(τ z) fits the digits and softmax(z) hardly leaves 1/C."""
    split = lipdp.data.load("digits")
    torch.manual_seed(0)
    model = lipdp.models.build("mlp", input_shape=(1, 8, 8), num_classes=10)
    loss = lipdp.losses.TauCrossEntropy(tau=16.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=2.0)
    for _ in range(30):
        optimizer.zero_grad()
        loss(model(split.train_x), split.train_y).mean().backward()
        optimizer.step()
    lipdp.nn.project_(model)
    with torch.no_grad():
        expected = 16 * float(loss(model(split.test_x), split.test_y).mean())
    model.train()
    right_one = calibration(model, split.test_x, split.test_y, temperature=loss.tau, batch_size=100)
    without = calibration(model, split.test_x, split.test_y)
    assert right_one.nll == pytest.approx(expected, rel=1e-5)
    assert right_one.accuracy == without.accuracy > 0.85
    assert without.ece > right_one.ece + 0.3
    assert model.training


def test_batches_move_nothing_and_the_model_is_evaluated_in_evaluation_mode():
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 3)).double()
    logits, labels = drawn(90, 6)
    labels = labels % 3
    whole, cut, single = (
        calibration(model, logits, labels),
        calibration(model, logits, labels, batch_size=7),
        calibration(model, logits.float(), labels),
    )
    assert model.training
    with torch.no_grad():
        expected = float(F.cross_entropy(model.eval()(logits), labels))
    assert whole.nll == pytest.approx(expected)
    assert cut.nll == pytest.approx(expected)
    assert single.nll == pytest.approx(expected, rel=1e-5)


# ------------------------------------------------------------------------------------------------------- the picture


def test_the_diagram_draws_the_bins(tmp_path):
    logits, labels = drawn(2000, 3)
    report = calibration(nn.Identity(), 3 * logits, labels, bins=10)
    figure = reliability_diagram(report, title="three times too sure")
    above, below = figure.axes
    filled = [b for b in report.bins if b.count]
    bars = above.containers[0].patches
    assert [bar.get_height() for bar in bars] == [b.accuracy for b in filled]
    assert [bar.get_height() for bar in above.containers[1].patches] == pytest.approx([b.gap for b in filled])
    assert sum(bar.get_height() for bar in below.containers[0].patches) == pytest.approx(1)
    assert f"{report.ece:.3f}" in above.get_title()
    assert above.get_title().startswith("three times too sure")
    assert not [name for name in sys.modules if name == "matplotlib.pyplot" and sys.modules[name].get_fignums()]
    figure.savefig(tmp_path / "reliability.png")
    assert (tmp_path / "reliability.png").stat().st_size > 5000


# ------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1, 3], "from 0 to 3; the model has the classes 0 to 2"),
        ([-1, 1, 2], "from -1 to 2"),
        ([0.5, 1.0, 2.0], "from 0.5"),
        ([0, 1], r"shape \(2,\)"),
        ([[0], [1], [2]], r"shape \(3, 1\)"),
    ],
)
def test_labels_that_are_no_classes_are_refused(labels, message):
    with pytest.raises(DataError, match=message):
        calibration(nn.Identity(), torch.eye(3), torch.tensor(labels))


@pytest.mark.parametrize(
    "options",
    [{"bins": 0}, {"bins": 2.5}, {"bins": True}, {"temperature": 0.0}, {"temperature": math.nan}, {"batch_size": 0}],
)  # fmt: skip
def test_numbers_out_of_range_are_refused(options):
    with pytest.raises(ParameterError, match=next(iter(options))):
        calibration(nn.Identity(), torch.eye(3), torch.arange(3), **options)


def test_no_records_and_no_numbers_are_refused():
    with pytest.raises(DataError, match="no records"):
        calibration(nn.Identity(), torch.zeros(0, 3), torch.zeros(0))
    nothing = nn.Linear(2, 2)
    nn.init.constant_(nothing.weight, math.nan)
    with pytest.raises(NonFiniteError):
        calibration(nothing, torch.tensor([[1.0, 0.0]]), torch.tensor([0]))


def test_without_torchmetrics_the_message_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics.functional.classification", None)
    with pytest.raises(ParameterError, match=r"lipdp\[comparison\]"):
        calibration(nn.Identity(), torch.eye(3), torch.arange(3))


def test_bins_are_values_that_json_can_hold():
    report = calibration(nn.Identity(), torch.eye(3), torch.arange(3))
    kinds = {type(value) for b in report.bins for value in (b.lower, b.upper, b.count, b.confidence, b.accuracy)}
    assert kinds == {float, int}
    assert not any(isinstance(value, np.generic) for value in vars(report).values())
