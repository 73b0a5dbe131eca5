"""What the engine refuses: gradients changed before the step, foreign optimisers, coupled losses, NaN."""

from __future__ import annotations

import gc
import math

import pytest
import torch
from kit import lipschitz_net, private, table, train, weights
from torch import nn

from lipdp import losses
from lipdp.errors import (
    EngineError,
    LossError,
    NonFiniteError,
    OptimizerError,
    ParameterError,
    UnboundedError,
    UnknownNameError,
)

pytestmark = pytest.mark.usefixtures("one_thread")

# --- between backward and step ----------------------------------------------------------------------------------------


def clip_norm(model, optimizer):
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)


def clip_value(model, optimizer):
    nn.utils.clip_grad_value_(model.parameters(), 0.1)


def replace(model, optimizer):
    model[1].weight.grad = model[1].weight.grad * 2


def drop(model, optimizer):
    optimizer.zero_grad()


def add(model, optimizer):
    model[3].weight.grad.add_(1.0)


def shrink_weights(model, optimizer):
    with torch.no_grad():
        model[3].weight.mul_(0.1)


@pytest.mark.parametrize("change", [clip_norm, clip_value, replace, drop, add, shrink_weights])
@pytest.mark.parametrize("parts", [1, 3])
def test_what_backward_left_is_what_the_step_must_find(change, parts):
    engine, model, optimizer, loader, criterion = private(steps=3)
    batches = iter(loader)
    x, y = next(batches)
    for xb, yb in engine.microbatches(x, y, math.ceil(len(x) / parts)):
        criterion(model(xb), yb).backward()
    change(model, optimizer)
    with pytest.raises(EngineError, match="were changed between"):
        optimizer.step()
    assert engine.steps_taken == 0


@pytest.mark.parametrize("again", [clip_norm, add])
def test_a_refused_step_vouches_for_no_gradient_that_is_changed_later(again):
    engine, model, optimizer, loader, criterion = private()
    x, y = next(iter(loader))
    criterion(model(x), y).backward()
    before = weights(model)
    for change in (clip_norm, again):  # a script that catches the error and tries again
        change(model, optimizer)
        with pytest.raises(EngineError, match="were changed between"):
            optimizer.step()
        model[3].weight.grad.add_(1e-3)
    assert engine.steps_taken == 0
    assert all(torch.equal(w, before[name]) for name, w in weights(model).items())
    optimizer.zero_grad()
    criterion(model(x), y).backward()
    optimizer.step()
    assert engine.steps_taken == 1


def test_a_gradient_changed_between_two_parts_of_a_batch_is_refused():
    engine, model, optimizer, loader, criterion = private()
    x, y = next(iter(loader))
    first, second = engine.microbatches(x, y, math.ceil(len(x) / 2))
    criterion(model(first[0]), first[1]).backward()
    clip_norm(model, optimizer)
    criterion(model(second[0]), second[1]).backward()
    with pytest.raises(EngineError, match="were changed between"):
        optimizer.step()
    assert engine.steps_taken == 0


def test_why_clipping_a_sum_is_refused():
    """Layer 0 of one record, at its bound, changes what clipping leaves of layer 1 by far more than layer 1's bound."""
    deltas = torch.tensor([10.0, 0.01])
    others = torch.tensor([0.0, 5.0])  # what the other records sum to

    def clipped(total, limit=5.0):
        return total * min(1.0, limit / float(total.norm()))

    moved = (clipped(others + torch.tensor([10.0, 0.0])) - clipped(others)).abs()
    assert moved[1] > 100 * deltas[1]
    stds = torch.tensor([2**0.5 * 10.0, 2**0.5 * 0.01])  # per layer, joint σ = 1
    assert (moved / stds).norm() > 100  # where σ = 1 allows 1


def test_weights_may_change_between_the_steps_and_gradients_after_the_noise():
    engine, model, optimizer, loader, criterion = private(steps=4)
    optimizer.register_step_pre_hook(lambda *_: clip_norm(model, optimizer) and None)  # sees the noisy gradients
    for set_to_none, (x, y) in zip((True, False, False, True), loader, strict=True):
        criterion(model(x), y)  # a look with gradients, unused
        with torch.no_grad():
            model[3].weight.mul_(0.9)
        optimizer.zero_grad(set_to_none=set_to_none)
        criterion(model(x), y).backward()
        optimizer.step()
    assert engine.steps_taken == 4


def test_a_fused_optimiser_under_a_scaler_is_refused():
    model = lipschitz_net()
    engine, model, optimizer, loader, criterion = private(
        model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    )
    scaler = torch.amp.GradScaler("cpu")
    x, y = next(iter(loader))
    scaler.scale(criterion(model(x), y)).backward()
    with pytest.raises(OptimizerError, match="bf16"):
        scaler.step(optimizer)
    assert engine.steps_taken == 0


# --- optimisers, layers, losses and arguments -------------------------------------------------------------------------


def test_an_optimiser_over_other_parameters_is_refused():
    model = lipschitz_net()
    with pytest.raises(OptimizerError, match="1 parameter"):
        private(model, optimizer=torch.optim.SGD([*model.parameters(), nn.Parameter(torch.zeros(2))], lr=0.1))
    with pytest.raises(OptimizerError, match=r"lacks the trainable parameter\(s\) 3\.weight"):
        private(model, optimizer=torch.optim.SGD([model[1].weight], lr=0.1))
    engine, model, optimizer, loader, criterion = private(model)
    with pytest.raises(OptimizerError, match="already private"):
        private(model, optimizer=optimizer)
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    with pytest.raises(OptimizerError, match="the model lacks"):
        train(model, optimizer, loader, criterion)
    assert engine.steps_taken == 0
    frozen = lipschitz_net().requires_grad_(False)
    with pytest.raises(OptimizerError, match="no trainable"):
        private(frozen)


class CountWeighted(losses.TauCrossEntropy):
    """Weights by the class counts of the batch, as the published KR losses do."""

    def forward(self, logits, target):
        counts = torch.bincount(target, minlength=logits.shape[1])
        return super().forward(logits, target) / counts[target]


class Averaged(losses.TauCrossEntropy):
    def forward(self, logits, target):
        return super().forward(logits, target).mean()


class DividedByBatch(losses.TauCrossEntropy):
    def forward(self, logits, target):
        return super().forward(logits, target) / len(logits)


@pytest.mark.parametrize("loss", [CountWeighted(), Averaged(), DividedByBatch()])
def test_a_loss_that_couples_samples_is_refused(loss):
    with pytest.raises(LossError, match=r"couples|without reduction"):
        private(criterion=loss)


class Weighted(losses.TauCrossEntropy):
    """Weights that are computed from the batch."""

    def __init__(self, weights):
        super().__init__(8.0)
        self._weights = (weights,)

    def forward(self, logits, target):
        values = super().forward(logits, target)
        return values * self._weights[0](values.detach(), target)


def counts(target):
    return torch.bincount(target, minlength=5)[target]


COUPLED = {
    "frequent classes weigh a fifth": lambda v, y: torch.where(counts(y) > 20, 0.2, 1.0),
    "rare classes are left out": lambda v, y: counts(y) >= 5,
    "by the largest loss": lambda v, y: v / v.max().clamp_min(1e-9),
    "clamped at mean + 2 std": lambda v, y: ((v.mean() + 2 * v.std(correction=0)) / v).clamp(max=1.0),
    "the easiest 80 %": lambda v, y: v <= v.quantile(0.8),
    "in batches over 64": lambda v, y: counts(y) / len(y) if len(y) > 64 else 1.0,
}


@pytest.mark.parametrize("name", COUPLED)
def test_a_loss_that_weights_by_counts_ranks_or_extremes_of_the_batch_is_refused(name):
    with pytest.raises(LossError, match="couples the samples"):
        private(criterion=Weighted(COUPLED[name]))


@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize("parts", [1, 2])
def test_a_loss_that_couples_only_batches_like_the_real_ones_is_refused_at_a_step_that_is_looked_at(deferred, parts):
    """None of the probes of `make_private` has 521 rows or more."""
    hidden = Weighted(lambda v, y: counts(y) / len(y) if len(y) > 520 else 1.0)
    engine, model, optimizer, loader, criterion = private(
        dataset=table(1400), criterion=hidden, expected_batch_size=1300, deferred=deferred, check_every=2, steps=3
    )
    x, y = next(iter(loader))
    for xb, yb in engine.microbatches(x, y, math.ceil(len(x) / parts)):
        criterion(model(xb), yb).backward()
    if deferred:
        optimizer.step()
    with pytest.raises(LossError, match=r"step 1: Weighted couples the samples .* half of the batch"):
        engine.settle() if deferred else optimizer.step()
    assert all(bool(w.isnan().all()) for w in weights(model).values()) == deferred


@pytest.mark.parametrize("forward_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_losses_of_one_sample_each_are_taken_in_every_precision(forward_dtype, scale):
    """Rounding, in a loss a thousand times as steep or as flat, is no coupling."""
    engine, model, optimizer, loader, criterion = private(
        criterion=losses.TauCrossEntropy(8.0 * scale), forward_dtype=forward_dtype, check_every=1, steps=4
    )
    before = torch.get_rng_state()
    with torch.autocast("cpu", torch.bfloat16, enabled=forward_dtype is torch.bfloat16):
        train(model, optimizer, loader, criterion)
    assert engine.steps_taken == 4
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("options", "error", "named"),
    [
        ({"expected_batch_size": 0}, ParameterError, "expected_batch_size"),
        ({"expected_batch_size": 257}, ParameterError, "N = 256"),
        ({"steps": 0}, ParameterError, "steps"),
        ({"steps": 2.5}, ParameterError, "steps"),
        ({"noise_multiplier": 0.0}, ParameterError, "noise_multiplier"),
        ({"noise_multiplier": math.nan}, ParameterError, "noise_multiplier"),
        ({"gate": -1.0}, ParameterError, "gate"),
        ({"allocation": "per_block"}, UnknownNameError, "per_layer"),
        ({"sampling": "shuffle"}, UnknownNameError, "poisson"),
        ({"criterion": nn.PoissonNLLLoss()}, LossError, "PoissonNLLLoss"),
        ({"model": nn.Linear(20, 5)}, UnboundedError, "InputBound"),
        ({"dataset": [torch.zeros(20) for _ in range(64)]}, EngineError, "pairs"),
    ],
)
def test_bad_arguments_are_named(options, error, named):
    with pytest.raises(error, match=named):
        private(**options)


# --- numbers that are not finite --------------------------------------------------------------------------------------


def test_a_bad_weight_stops_the_run():
    engine, model, optimizer, loader, criterion = private()
    train(model, optimizer, loader, criterion, steps=2)
    model[3].weight.data[0, 0] = math.nan
    with pytest.raises(NonFiniteError, match=r"step 3: .*1\.weight"):
        train(model, optimizer, loader, criterion)
    assert engine.steps_taken == 2
    with pytest.raises(NonFiniteError, match="weight is NaN"):
        engine.sensitivity()


# --- other optimisers, beside and after the run -----------------------------------------------------------------------


def one_pass(engine, model, optimizer, loader, criterion):
    x, y = next(iter(loader))
    criterion(model(x), y).backward()


def frozen_first():
    model = lipschitz_net()
    model[1].requires_grad_(False)
    return model


def assert_unmoved(parameters, other):
    before = [p.detach().clone() for p in parameters]
    other.step()
    assert all(torch.equal(p, b) for p, b in zip(parameters, before, strict=True))


def test_a_part_of_a_model_that_is_freed_keeps_no_gradient():
    part = lipschitz_net()[1]
    one_pass(*private(nn.Sequential(lipschitz_net()[0], part, *lipschitz_net()[2:])))
    assert part.weight.grad is not None
    gc.collect()
    assert_unmoved([part.weight], torch.optim.SGD(part.parameters(), lr=0.1))


def test_a_part_that_outlives_a_finished_run_is_its_owners():
    """The collector may free the rest at any time, in the middle of a step of another training."""
    part = lipschitz_net()[1]
    _, model, *rest = private(nn.Sequential(lipschitz_net()[0], part, *lipschitz_net()[2:]), steps=2)
    train(model, *rest)
    del model, rest
    part(torch.randn(4, 20)).sum().backward()
    gc.collect()
    assert part.weight.grad is not None


@pytest.mark.parametrize("end", ["detach", "skip_batch"])
def test_what_was_unfrozen_for_a_pass_keeps_no_gradient(end):
    engine, model, *rest = private(frozen_first())
    model[1].requires_grad_(True)
    one_pass(engine, model, *rest)
    getattr(engine, end)()
    assert_unmoved(list(model.parameters()), torch.optim.SGD(model.parameters(), lr=0.1))


def test_what_is_frozen_again_before_the_step_keeps_no_gradient():
    model = frozen_first()
    engine, model, optimizer, *rest = private(model, optimizer=torch.optim.SGD(model[3].parameters(), lr=0.1))
    model[1].requires_grad_(True)
    one_pass(engine, model, optimizer, *rest)
    model[1].requires_grad_(False)
    optimizer.step()
    assert_unmoved(list(model[1].parameters()), torch.optim.SGD(model[1].parameters(), lr=0.1))


def test_what_is_frozen_between_two_pieces_moves_by_no_other_optimiser():
    _, model, _, loader, criterion = private()
    x, y = next(iter(loader))
    criterion(model(x[:1]), y[:1]).backward()
    model[1].requires_grad_(False)
    criterion(model(x[1:]), y[1:]).backward()
    model[3].zero_grad()
    with pytest.raises(OptimizerError, match="without noise"):
        torch.optim.SGD(model[1].parameters(), lr=0.1).step()


def test_a_look_in_the_middle_of_a_pass_forgets_nothing():
    """As the step of an unrelated optimiser takes it in another thread, before autograd has filled `p.grad`."""
    engine, model, optimizer, loader, criterion = private()
    x, y = next(iter(loader))
    criterion(model(x), y).backward()
    gradients = [p.grad for p in model.parameters()]
    optimizer.zero_grad()
    torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=0.1).step()
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        parameter.grad = gradient
    with pytest.raises(OptimizerError, match="without noise"):
        torch.optim.SGD(model.parameters(), lr=0.1).step()
    optimizer.step()
    assert engine.steps_taken == 1


class Allocated:
    """An allocation of somebody's own."""

    name = "mine"

    def __init__(self, stds):
        self._stds = stds

    def __repr__(self):
        return "Allocated()"

    def stds(self, sensitivities, sizes, noise_multiplier):
        return self._stds(sensitivities)


WITHOUT_NOISE = {
    "zero": lambda d: torch.cat([0 * d[:1], d[1:]]),
    "NaN": lambda d: d * math.nan,
    "negative": torch.neg,
    "infinite": lambda d: torch.cat([d[:1] / 0, d[1:]]),
}


@pytest.mark.parametrize("stds", WITHOUT_NOISE.values(), ids=WITHOUT_NOISE)
def test_an_allocation_without_noise_is_named(stds):
    run = private(lipschitz_net(), allocation=Allocated(stds))
    with pytest.raises(
        EngineError, match=r"allocation=Allocated\(\) gave a standard deviation that is not finite, neg"
    ):
        train(*run[1:])


def test_an_allocation_of_too_few_parameters_is_named():
    with pytest.raises(ParameterError, match=r"gave standard deviations of shape \(1,\); .* 2 parameters"):
        private(lipschitz_net(), allocation=Allocated(lambda d: d[:1]))
