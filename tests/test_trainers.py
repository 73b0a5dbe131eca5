"""The trainers of the comparison: sensitivity, noise, divisor, account, and what they refuse."""

import copy
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from kit import LIGHT
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.utils.data import TensorDataset

import lipdp
from lipdp import losses
from lipdp import nn as lnn
from lipdp.accounting import PrivacyPlan

pytest.importorskip("opacus")
from lipdp.comparison import TRAINERS, Task, get_trainer, with_backprop_clipping
from lipdp.comparison.configs import UtilityConfig
from lipdp.comparison.factors import Automatic, GlobalFlat
from lipdp.comparison.protocol import remove_gates
from lipdp.errors import ParameterError, UnknownNameError, UnsupportedLayerError
from lipdp.testing import falsify

pytestmark = pytest.mark.usefixtures("one_thread")

OPACUS = [n for n in TRAINERS if n not in ("clipless", "non_private", "backprop_clipping", "rgp")]  # rgp: test_rgp
SILENT = 1e-9  # a noise multiplier that leaves the gradient to be seen


def plain_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))


def task(*, records=40, batch_size=20, sigma=1.0, steps=3, lr=1.0, scale=1.0, **options):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(records, 12, generator=generator) * scale
    y = torch.randint(3, (records,), generator=generator)
    optimizer = partial(torch.optim.SGD, lr=lr)
    return Task(dataset=TensorDataset(x, y), loss=losses.TauCrossEntropy(1.0), plan=PrivacyPlan(
                dataset_size=records, expected_batch_size=batch_size, steps=steps, noise_multiplier=sigma),
                optimizer=optimizer, **{"seed": 5, **options})  # fmt: skip


def one_step(name, model, given, batch=None, **settings):
    """The change of the parameters by one step of SGD at lr = 1, times −B: the noisy sum."""
    trainer = replace(get_trainer(name), **settings)
    before = [p.detach().clone() for p in model.parameters()]
    session = trainer.start(model, given)
    x, y = next(iter(session.loader)) if batch is None else batch
    session.step(x, y)
    session.close()
    changes = zip(before, model.parameters(), strict=True)
    return torch.cat([((a - b) * given.batch_size).flatten() for a, b in changes]).detach()


def gradients(model, given):
    """(N, d): every record's gradient, by torch.func."""
    x, y = given.dataset.tensors
    parameters = {n: p.detach() for n, p in model.named_parameters()}

    def loss(p, x, y):
        return given.loss(functional_call(model, p, (x[None],)), y[None]).sum()

    found = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, x, y)
    return torch.cat([found[n].flatten(1) for n in parameters], dim=1)


# --- what each sample contributes ------------------------------------------------------------------------------------

SPREAD = torch.logspace(-1, 1, 40)[:, None]  # records of very different gradients
EXPECTED = {  # (gradients (n, d), their norms (n, 1)) → what each contributes, at C = 1
    "opacus_hooks": lambda g, n: g * (1 / n).clamp(max=1),
    "opacus_functorch": lambda g, n: g * (1 / n).clamp(max=1),
    "opacus_ghost": lambda g, n: g * (1 / n).clamp(max=1),
    "automatic": lambda g, n: g / (n + 0.01),
    "global": lambda g, n: g * (n <= 1),
    "global_scaled": lambda g, n: g * (n <= 2) * 0.5,
    "adaptive": lambda g, n: g * (1 / n).clamp(max=1),
}


@pytest.mark.parametrize("microbatch", [None, 7])
@pytest.mark.parametrize("name", EXPECTED)
def test_the_sum_is_of_clipped_gradients(name, microbatch):
    model, given = plain_model(), task(sigma=SILENT, microbatch=microbatch, scale=SPREAD)
    each = gradients(model, given)
    norms = each.norm(dim=1, keepdim=True)
    assert all(((norms > low) & (norms < high)).any() for low, high in ((0, 0.95), (1.05, 1.9), (2.1, 99)))
    settings = {"threshold": 2.0} if name == "global_scaled" else {}
    seen = one_step(name, model, given, given.dataset.tensors, max_grad_norm=1.0, **settings)
    torch.testing.assert_close(seen, EXPECTED[name](each, norms).sum(0), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("microbatch", [None, 10])
@pytest.mark.parametrize("name", [*(n for n in EXPECTED if n != "opacus_ghost"), "non_private"])
def test_of_several_views_the_mean_is_clipped(name, microbatch):
    """A record's gradient is the mean over its K = 4 views, which are shortened together, never view by view."""
    model, given = plain_model(), task(sigma=SILENT, microbatch=microbatch, views=4, records=160, scale=4)
    x, y = given.dataset.tensors
    labels = y[::4].repeat_interleave(4)
    each = gradients(model, replace(given, dataset=TensorDataset(x, labels))).unflatten(0, (40, 4)).mean(1)
    norms = each.norm(dim=1, keepdim=True)
    assert (norms > 1.05).any()
    plan = replace(given.plan, dataset_size=40)
    given = replace(given, dataset=TensorDataset(x.view(40, 4, -1), y[::4]), plan=plan)
    settings = {"threshold": 2.0} if name == "global_scaled" else {}
    settings |= {} if name == "non_private" else {"max_grad_norm": 1.0}
    seen = one_step(name, model, given, (x, labels), **settings)
    expected = each if name == "non_private" else EXPECTED[name](each, norms)
    torch.testing.assert_close(seen, expected.sum(0), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["clipless", "backprop_clipping"])
def test_views_reach_the_engine(name):
    model, given = plain_model(), task()
    if name == "clipless":
        model = nn.Sequential(lnn.InputBound(1.0), lnn.SpectralLinear(12, 3, bias=False))
    x, y = given.dataset.tensors
    given = replace(given, dataset=TensorDataset(x[:, None].expand(-1, 4, -1), y), views=4, microbatch=10)
    session = get_trainer(name).start(model, given)
    assert session.loader.views == 4
    for batch in session.loader:
        session.step(*batch)
    session.close()


def test_ghost_clipping_refuses_views():
    with pytest.raises(ParameterError, match="mean over 4 views"):
        get_trainer("opacus_ghost").start(plain_model(), task(views=4))


def test_per_layer_clips_every_parameter():
    model, given = plain_model(), task(sigma=SILENT, scale=3.0)
    each = gradients(model, given).split([p.numel() for p in model.parameters()], dim=1)
    share = 0.5 / math.sqrt(len(each))
    expected = torch.cat([(g * (share / g.norm(dim=1, keepdim=True)).clamp(max=1)).sum(0) for g in each])
    seen = one_step("opacus_per_layer", model, given, given.dataset.tensors, max_grad_norm=0.5)
    torch.testing.assert_close(seen, expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", OPACUS)
def test_one_record_moves_the_sum_by_at_most_the_bound(name):
    """The largest contribution over records of all sizes is at most C, and within 5 % of it."""
    lengths = []
    for scale in (0.3, 0.5, 1.0, 10.0, 100.0):
        for i in range(6):
            model, given = plain_model(), task(records=6, batch_size=6, sigma=SILENT, scale=scale)
            record = tuple(t[i : i + 1] for t in given.dataset.tensors)
            if name in ("global", "global_scaled"):  # only what lies just inside the threshold shows C
                norm = gradients(model, given).norm(dim=1)[i].item() * 1.001
                settings = {"threshold": max(norm, 0.7)} if name == "global_scaled" else {"max_grad_norm": norm}
            else:
                settings = {}
            length = one_step(name, model, given, record, **{"max_grad_norm": 0.7, **settings}).norm().item()
            lengths.append(length / settings.get("max_grad_norm", 0.7))
    assert 0.95 < max(lengths) < 1.0 + 1e-3


@pytest.mark.parametrize("name", ["non_private", "opacus_hooks", "opacus_ghost", "adaptive"])
def test_who_clips_is_given_plain_tensors(name):
    """What follows the rows of a batch costs up to half of a small step; the engine alone needs it."""
    model, given = plain_model(), task()
    session = get_trainer(name).start(model, given)
    seen = []
    model.register_forward_pre_hook(lambda module, inputs: seen.append(type(inputs[0])))
    for batch in session.loader:
        session.step(*batch)
    session.close()
    assert set(seen) == {torch.Tensor}
    assert type(batch[0]) is not torch.Tensor


@pytest.mark.parametrize("strategy", [Automatic(0.7), GlobalFlat(0.7, 3.0), GlobalFlat(0.7)])
def test_factors_keep_norms_within_the_bound(strategy):
    norms = torch.logspace(-6, 6, 5000, dtype=torch.float64)[:, None]
    assert (strategy.factors(norms) * norms).max() <= 0.7 * (1 + 1e-12)


# --- noise, divisor, empty batches -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPACUS)
def test_an_empty_batch_is_noise_of_the_right_size(name):
    """2,000 × 60 weights: the sample std is within 1 % of σC (five standard deviations), so 0.95 σ is rejected."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(60, 2000, bias=False))
    given = task(records=40, batch_size=20, sigma=1.5)
    given = replace(given, dataset=TensorDataset(torch.zeros(40, 60), torch.zeros(40, dtype=torch.int64)))
    empty = (torch.zeros(0, 60), torch.zeros(0, dtype=torch.int64))
    noise = one_step(name, model, given, empty, max_grad_norm=0.7).double()
    expected = 1.5 * 0.7
    if (
        name == "adaptive"
    ):  # the count takes a part of the budget, the gradient gets more noise: 1/σ² = 1/σ_g² + 1/(2s)²
        expected = 0.7 / math.sqrt(1 / 1.5**2 - 1 / (2 * 2.5 * 1.5) ** 2)
    assert noise.std().item() == pytest.approx(expected, rel=0.01)
    assert abs(noise.mean().item()) < 6 * expected / math.sqrt(noise.numel())


@pytest.mark.parametrize("name", ["non_private", *OPACUS])  # the engine has its own test
def test_the_divisor_is_public(name):
    """Half the batch moves the weights by half the sum over B, not over its own size."""
    model, given = plain_model(), task(sigma=SILENT, records=8, batch_size=8, scale=0.2)
    x, y = given.dataset.tensors
    x, y = x[:1].repeat(8, 1), y[:1].repeat(8)
    settings = {"threshold": 100.0} if name == "global_scaled" else {}
    settings |= {"max_grad_norm": 100.0} if name in OPACUS else {}
    whole = one_step(name, copy.deepcopy(model), given, (x, y), **settings)
    half = one_step(name, copy.deepcopy(model), given, (x[:4], y[:4]), **settings)
    torch.testing.assert_close(half, whole / 2, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", [n for n in TRAINERS if n != "clipless"])
def test_trains_and_leaves_a_plain_model(name):
    model = plain_model()
    given = replace(task(sigma=0.3, records=60, batch_size=30, steps=4, microbatch=16), seed=None)
    get_trainer(name).train(model, given)
    assert all(not vars(p) for p in model.parameters())
    assert all(not m._forward_hooks and not m._backward_hooks for m in model.modules())
    bounded = nn.Sequential(lnn.InputBound(1.0), lnn.SpectralLinear(12, 3))
    if TRAINERS[name].lipschitz:
        get_trainer(name).train(bounded, given)
        assert lnn.SpectralLinear(12, 3).constraint.contains(bounded[1].weight)  # projected
    get_trainer("clipless").train(bounded, given)  # which refuses hooks


def test_same_noise_multiplier_costs_the_same():
    given = task(records=100, batch_size=10, sigma=1.1)

    def model(plain):
        return plain_model() if plain else nn.Sequential(lnn.InputBound(1.0), lnn.SpectralLinear(12, 3))

    events = [t.start(model(t.plain), given).event for t in TRAINERS.values() if t.private]
    assert set(events) == {given.plan.step_event}
    assert (events[0].sampling_rate, events[0].noise_multiplier) == (0.1, 1.1)
    assert TRAINERS["non_private"].start(plain_model(), given).event is None


def test_unknown_trainer_and_bad_batch_size():
    with pytest.raises(UnknownNameError, match="opacus_ghost"):
        get_trainer("ghost")
    with pytest.raises(ParameterError, match="expected_batch_size=41: a whole number in 1 … N = 40"):
        task(batch_size=41)


def test_every_grid_has_room_for_all_trials():
    assert {len(t.grid["lr"]) for t in TRAINERS.values()} == {17}
    assert UtilityConfig().trials <= 17


@pytest.mark.parametrize("setting", [{"max_grad_norm": 0.1}, {"max_grad_norm": 3.0}, {"threshold": 3.0}])
@pytest.mark.parametrize("name", [n for n in OPACUS if n not in ("opacus_per_layer", "adaptive")])
def test_a_gain_is_what_becomes_of_a_gradient_of_norm_1(name, setting):
    """So a step at the learning rate over the gain does not depend on the clip norm, nor on the threshold."""
    if ("threshold" in setting and name != "global_scaled") or (name == "global" and setting["max_grad_norm"] < 1):
        pytest.skip("there is no such step")
    model, given = plain_model(), task(sigma=SILENT, records=1, batch_size=1)
    norm, loss = gradients(model, given).norm(), given.loss
    given = replace(given, loss=lambda z, y: loss(z, y) / norm)
    seen = one_step(name, model, given, given.dataset.tensors, **setting).norm().item()
    expected = replace(get_trainer(name), **setting).gain
    if name == "automatic" and setting["max_grad_norm"] > 1:
        expected *= setting["max_grad_norm"]  # C is not searched there
    assert seen == pytest.approx(expected, rel=0.02)


# --- ghost clipping and gates ----------------------------------------------------------------------------------------


def gated():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 8), lnn.GradientGate(0.01), nn.Linear(8, 3))


def test_gates_are_taken_out_while_clipping():
    model = gated()
    for name in ("opacus_ghost", "opacus_hooks", "non_private"):
        session = get_trainer(name).start(model, task())
        assert not any(isinstance(m, lnn.GradientGate) for m in model.modules())
        session.close()
        assert isinstance(model[1], lnn.GradientGate)


def test_a_gate_would_break_ghost_clipping(monkeypatch):
    """Why: weighting a sample's loss by C/‖g‖ does not weight what comes out of a gate."""
    import lipdp.comparison.trainers.opacus as module

    given = task(sigma=SILENT, records=6, batch_size=6, scale=100.0)
    record = tuple(t[:1] for t in given.dataset.tensors)
    assert one_step("opacus_ghost", gated(), given, record, max_grad_norm=0.1).norm() < 0.1001
    monkeypatch.setattr(module, "remove_gates", lambda model: [])
    assert one_step("opacus_ghost", gated(), given, record, max_grad_norm=0.1).norm() > 0.12


def test_removing_gates_changes_no_output():
    model = gated()
    x = torch.randn(5, 12)
    before = model(x)
    assert len(remove_gates(model)) == 1
    torch.testing.assert_close(model(x), before)


# --- adaptive --------------------------------------------------------------------------------------------------------


def test_the_clip_norm_follows_its_quantile():
    """From 100 times too large and too small, with no secret size in the divisor, C comes near the median."""
    for start in (100.0, 0.01):
        model, given = plain_model(), task(sigma=0.01, records=400, batch_size=400, steps=60, lr=1e-6)
        trainer = replace(get_trainer("adaptive"), max_grad_norm=start, learning_rate=0.3)
        session = trainer.train(model, given)
        median = gradients(model, given).norm(dim=1).median().item()
        assert session.private.max_grad_norm == pytest.approx(median, rel=0.25)


def test_the_count_is_centred_and_divided_by_the_public_size():
    """Half a batch, all unclipped: release/B + 1/2 = (n/2)/B + 1/2 = 3/4, where the realised size would say 1."""
    model, given = plain_model(), task(sigma=SILENT, records=8, batch_size=8)
    trainer = replace(get_trainer("adaptive"), max_grad_norm=1e5, quantile=0.5, learning_rate=1.0)
    session = trainer.start(model, given)
    session.private.unclipped_num_std = 1e-6
    x, y = given.dataset.tensors
    session.step(x[:4], y[:4])
    assert math.log(session.private.max_grad_norm / 1e5) == pytest.approx(-(0.75 - 0.5), abs=1e-3)


@pytest.mark.statistical
def test_the_count_of_adaptive_clipping_has_its_noise():
    """900 empty batches: the std is within ± 9.2 % but with probability 1e-4, 0.83 or 1.2 of it would be refused."""
    model, given = plain_model(), task(sigma=1.0, records=8, batch_size=8, steps=900)
    trainer = replace(get_trainer("adaptive"), max_grad_norm=1.0, quantile=0.5, learning_rate=1e-3)
    torch.manual_seed(0)
    session = trainer.start(model, given)
    x, y = given.dataset.tensors
    moves = []
    for _ in range(900):
        before = session.private.max_grad_norm
        session.step(x[:0], y[:0])
        moves.append(math.log(session.private.max_grad_norm / before))
    std = torch.tensor(moves, dtype=torch.float64).std() * 8 / 1e-3
    assert float(std) == pytest.approx(2.5, rel=0.092)


# --- backpropagation clipping ----------------------------------------------------------------------------------------


def conv_model(bias=True):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1, bias=bias), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(27, 5, bias=bias),
        nn.Tanh(), nn.Linear(5, 3, bias=bias),
    )  # fmt: skip


def test_backprop_clipping_bounds():
    """Δ = X C for dense layers, √m X C for a convolution with windows overlapping m-fold, √positions C for a bias."""
    model = with_backprop_clipping(conv_model(), 3.0, [0.1, 0.2, 0.3])
    s = lipdp.sensitivity(model, losses.TauCrossEntropy(), input_shape=(1, 6, 6))
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in conv_model().named_parameters()]
    expected = {
        "0.weight": 3 * 3 * 0.1,
        "0.bias": 6 * 0.1,
        "4.weight": 0.6,
        "4.bias": 0.2,
        "6.weight": 5**0.5 * 0.3,
        "6.bias": 0.3,
    }
    for name, value in expected.items():  # (five tanh have norm √5 < 3)
        assert s[name] == pytest.approx(value, rel=1e-3)
        assert s[name] >= value


def test_backprop_clipping_cannot_be_falsified():
    model = with_backprop_clipping(conv_model(), 0.5, 0.05).double()
    report = falsify(model, losses.TauCrossEntropy(4.0), (1, 6, 6), **LIGHT)
    assert 0.95 < report.worst <= 1.0 + 1e-9  # the dense layers reach their bound


def test_backprop_clipping_shares_parameters_and_leaves_the_model_alone():
    plain = conv_model()
    clipped = with_backprop_clipping(plain, 1e6, 1e6)
    x = torch.rand(4, 1, 6, 6)
    torch.testing.assert_close(clipped(x), plain(x))
    assert {id(p) for p in clipped.parameters()} == {id(p) for p in plain.parameters()}
    assert len(plain) == 7
    single = with_backprop_clipping(nn.Linear(4, 3), 1.0, 1.0)
    assert lipdp.sensitivity(single, losses.TauCrossEntropy(), input_shape=(4,)).total < 2


@pytest.mark.parametrize(
    ("model", "bounds", "error", "message"),
    [
        (nn.Sequential(nn.Linear(3, 3), nn.PReLU()), (1.0, 1.0), UnsupportedLayerError, "PReLU"),
        (conv_model(), ([1.0, 2.0], 1.0), ParameterError, "2 bounds for 3"),
        (conv_model(), (0.0, 1.0), ParameterError, "positive"),
        (lnn.HouseHolder(4), (1.0, 1.0), UnsupportedLayerError, "HouseHolder"),
    ],
)
def test_backprop_clipping_refuses(model, bounds, error, message):
    with pytest.raises(error, match=message):
        with_backprop_clipping(model, *bounds)


def test_opacus_refuses_buffers_with_a_named_error():
    class Buffered(nn.Linear):
        def __init__(self):
            super().__init__(12, 3)
            self.register_buffer("seen", torch.zeros(1))

    with pytest.raises(UnsupportedLayerError, match="buffers"):
        get_trainer("opacus_hooks").start(nn.Sequential(Buffered()), task())
