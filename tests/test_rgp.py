"""RGP: what it projects, the bound of its sum, its noise, and what it leaves behind. Its account: test_trainers."""

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

pytest.importorskip("opacus")
from test_trainers import SILENT, gradients, plain_model, task

import lipdp
from lipdp.accounting import PrivacyPlan
from lipdp.comparison import get_trainer
from lipdp.data import load
from lipdp.errors import ParameterError, UnsupportedLayerError
from lipdp.training.evaluation import evaluate

pytestmark = pytest.mark.usefixtures("one_thread")


def conv_model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Unflatten(1, (3, 2, 2)), nn.Conv2d(3, 6, 2, stride=2, padding=1), nn.Tanh(), nn.Conv2d(6, 6, 2, groups=2),
        nn.Flatten(), nn.Linear(6, 3, bias=False),
    )  # fmt: skip


def double(model, **options):
    """A model, and its task, in float64."""
    given = task(**options)
    x, y = given.dataset.tensors
    return model().double(), replace(given, dataset=TensorDataset(x.double(), y))


def released(session, x, y):
    """One step, and what it releases: the noisy sum of all that is clipped, before the projection."""
    seen = []

    def keep(optimizer):
        seen.extend(p.grad.detach().clone().flatten() for p in session.parameters)
        session._divide(optimizer)

    session.private.attach_step_hook(keep)
    session.step(x, y)
    return torch.cat(seen)


@pytest.mark.parametrize("microbatch", [None, 7])
@pytest.mark.parametrize("rank", [2, 99])
@pytest.mark.parametrize("make", [plain_model, conv_model])
def test_a_step_is_the_projection_of_the_gradient(make, rank, microbatch):
    """LLᵀG + G RᵀR − LLᵀG RᵀR, which at full rank is G; at random L and R, then at those of an update."""
    model, given = double(make, sigma=SILENT, microbatch=microbatch)
    before = copy.deepcopy(model)
    session = replace(get_trainer("rgp"), rank=rank, max_grad_norm=100.0).start(model, given)
    carriers = {carriers.weight: carriers for carriers in session.carriers}
    assert len(carriers) == 2
    for _ in range(2):
        before.load_state_dict({name: model.get_parameter(name) for name in before.state_dict()})
        sizes = [p.numel() for p in before.parameters()]
        sums = gradients(before, given).sum(0).split(sizes)
        session.step(*given.dataset.tensors)
        for (name, old), true in zip(before.named_parameters(), sums, strict=True):
            weight, expected = model.get_parameter(name), true.view_as(old)
            if weight in carriers and rank == 2:
                left, right = (m.weight.flatten(1) for m in (carriers[weight].left, carriers[weight].right))
                g, p, q = expected.flatten(1), left @ left.mT, right.mT @ right
                torch.testing.assert_close(p @ left, left)  # orthonormal
                torch.testing.assert_close(right @ q, right)
                expected = (p @ g + g @ q - p @ g @ q).view_as(old)
            torch.testing.assert_close((old - weight) * given.batch_size, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("make", [plain_model, conv_model])
def test_one_record_moves_the_sum_by_at_most_the_bound(make):
    """Batches with and without it, after a step in common: of carriers and biases together at most C, and within 5 %
    of it. So neither L nor R depends on the batch; else the other records' gradients would differ too."""
    lengths = []
    for scale in (0.01, 1.0, 100.0):
        for i in range(6):
            sums = []
            for present in ([*range(6)], [j for j in range(6) if j != i]):
                model, given = double(make, records=6, batch_size=6, sigma=SILENT, scale=scale)
                session = replace(get_trainer("rgp"), rank=2, max_grad_norm=0.7).start(model, given)
                x, y = given.dataset.tensors
                session.step(x, y)
                sums.append(released(session, x[present], y[present]))
            lengths.append((sums[0] - sums[1]).norm().item())
    assert 0.7 / 1.05 < max(lengths) <= 0.7 * (1 + 1e-7)


def test_every_coordinate_has_noise_of_the_clip_norm():
    """153,600 coordinates: the sample std is within 1 % of σC (five standard deviations), so 0.95 σ is rejected."""
    model, given = nn.Sequential(nn.Linear(400, 2000, bias=False)), task(sigma=1.5)
    given = replace(given, dataset=TensorDataset(torch.zeros(40, 400), torch.zeros(40, dtype=torch.int64)))
    session = replace(get_trainer("rgp"), rank=64, max_grad_norm=0.7).start(model, given)
    noise = released(session, torch.zeros(0, 400), torch.zeros(0, dtype=torch.int64)).double()
    assert noise.shape == (64 * 2400,)
    for part in noise.split(64 * 2000):  # L, then R
        assert part.std().item() == pytest.approx(1.5 * 0.7, rel=0.03)
    assert noise.std().item() == pytest.approx(1.5 * 0.7, rel=0.01)


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_learns_digits_without_noise(name):
    split = load("digits")
    torch.manual_seed(0)
    model = lipdp.models.build(name, input_shape=split.input_shape, num_classes=10, twin=True)
    plan = PrivacyPlan(dataset_size=len(split.train_y), expected_batch_size=128, steps=60, noise_multiplier=SILENT)
    data, sgd = TensorDataset(split.train_x, split.train_y), partial(torch.optim.SGD, lr=0.3, momentum=0.9)
    given = replace(task(), dataset=data, plan=plan, optimizer=sgd)
    session = replace(get_trainer("rgp"), max_grad_norm=10.0).train(model, given)
    assert len(session.carriers) == sum(isinstance(m, (nn.Linear, nn.Conv2d)) for m in model.modules())
    assert evaluate(model, split.test_x, split.test_y)["accuracy"] > 0.8


def test_the_layers_compute_what_they_did_and_are_left_as_they_were():
    model, given = plain_model(), task()
    x, y = given.dataset.tensors
    session = get_trainer("rgp").start(model, given)
    session.step(x, y)
    during = model(x)
    session.close()
    assert torch.equal(model(x), during)
    assert all(p.requires_grad and not vars(p) for p in model.parameters())
    assert list(model.state_dict()) == list(plain_model().state_dict())
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_weight_that_layers_share_has_no_carriers():
    """Two pairs of carriers would give it one of its two gradients."""

    def tied():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 12, bias=False), nn.Tanh(), nn.Linear(12, 12), nn.Linear(12, 3, bias=False))
        model[2].weight = model[0].weight
        return model

    model, given = double(tied, sigma=SILENT)
    before = copy.deepcopy(model)
    x, y = given.dataset.tensors
    session = replace(get_trainer("rgp"), rank=99, max_grad_norm=100.0).start(model, given)
    assert [carriers.layer for carriers in session.carriers] == [model[3]]
    session.step(x, y)
    given.loss(before(x), y).sum().backward()
    for name, old in before.named_parameters():
        moved = (old - model.get_parameter(name)) * given.batch_size
        torch.testing.assert_close(moved, old.grad, atol=1e-5, rtol=1e-5)


def test_refusals():
    for rank in (0, 1.5):
        with pytest.raises(ParameterError, match=f"rank={rank}"):
            replace(get_trainer("rgp"), rank=rank)
    model = plain_model()
    model[1].register_buffer("seen", torch.zeros(1))
    with pytest.raises(UnsupportedLayerError, match="rgp cannot train this model"):
        get_trainer("rgp").start(model, task())
    assert [p.requires_grad for p in model.parameters()] == 4 * [True]  # and no carriers are left
