"""What the model and the criterion say of a batch is of the batch: what mixes it decides about no record."""

import copy
import io
import math
import pickle
from collections import namedtuple

import kit
import pytest
import torch
from kit import lipschitz_net, private
from torch import nn
from torch.func import functional_call

from lipdp import losses
from lipdp.batches.rows import BatchTensor, known_rows
from lipdp.errors import EngineError

pytestmark = pytest.mark.usefixtures("one_thread", "unjudged")


def without_gradients(model, x):
    with torch.no_grad():
        return model(x)


ANSWERS = {
    "under no_grad": without_gradients,
    "detached": lambda model, x: model(x).detach(),
    "as they are": lambda model, x: model(x),
    "functional_call": lambda model, x: functional_call(model, dict(model.named_parameters()), (x,)).detach(),
    "of a part": lambda model, x: torch.cat([without_gradients(model, x[:3]), without_gradients(model, x[3:])]),
}


@pytest.mark.parametrize("way", ANSWERS)
def test_a_class_is_not_dropped_because_the_model_says_it_most(way):
    """One record decides which class is dropped, so all records of two classes: an excess of 45 with 200 records."""
    _, model, optimizer, loader, criterion = private()
    x, y = next(iter(loader))
    said = ANSWERS[way](model, x).argmax(1)
    most = said.bincount(minlength=5).argmax()
    optimizer.zero_grad()
    criterion(model(x), torch.where(said == most, -100, y)).backward()
    with pytest.raises(EngineError, match="comes from one record"):
        optimizer.step()


@pytest.mark.parametrize("way", ["under no_grad", "detached", "functional_call"])
def test_a_record_may_be_judged_by_its_own_answer(way):
    engine, model, optimizer, loader, criterion = private()
    x, y = next(iter(loader))
    logits = ANSWERS[way](model, x)
    assert known_rows(logits) == known_rows(x)
    optimizer.zero_grad()
    criterion(model(x), torch.where(logits.softmax(1).amax(1) > 0.9, -100, y)).backward()
    optimizer.step()
    assert engine.steps_taken == 1


@pytest.mark.parametrize("gradients", [True, False])
def test_a_loss_decides_about_no_record(gradients):
    _, model, optimizer, loader, criterion = private()
    x, y = next(iter(loader))
    with torch.set_grad_enabled(gradients):
        loss = criterion(model(x), y)
    assert float(loss.detach()) == loss.item()
    optimizer.zero_grad()
    criterion(model(x * (loss.detach() > 1)), y).backward()
    with pytest.raises(EngineError, match="comes from one record"):
        optimizer.step()


def test_public_inputs_have_public_answers():
    _, model, _, loader, criterion = private()
    next(iter(loader))
    x, y = torch.randn(4, 20), torch.arange(4)
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            assert not any(isinstance(t, BatchTensor) for t in (model(x), criterion(model(x), y)))


# --- into what a later gradient depends on ----------------------------------------------------------------------------


class Weighted(losses.TauCrossEntropy):
    """A cross-entropy with public weights of the classes."""

    def __init__(self):
        super().__init__(8.0)
        self.register_buffer("weights", torch.ones(5))
        self.plain = torch.ones(5)

    def forward(self, logits, target):
        return super().forward(logits, target) * self.weights[target] * self.plain[target]


@pytest.mark.parametrize("name", ["weights", "plain"])
def test_a_tensor_of_the_loss_holds_nothing_of_a_batch(name):
    """Weights of the classes from the batch: one record moves all of its class, and a class that it leaves empties."""
    _, model, _, loader, criterion = private(criterion=Weighted())
    x, y = next(iter(loader))
    criterion(model(x), y)
    counts = y.bincount(minlength=5).clamp_min(1)
    getattr(criterion.loss, name).copy_(counts.min() / counts)
    with pytest.raises(EngineError, match="a tensor of the loss was overwritten"):
        criterion(model(x), y)


def test_a_buffer_of_the_model_holds_nothing_of_a_batch():
    shifted = kit.Function(
        lambda module, x: module.linear(x - module.mean), mean=torch.zeros(20), linear=kit.linear(20, 5)
    )
    _, model, _, loader, criterion = private(shifted)
    x, y = next(iter(loader))
    criterion(model(x), y)
    model.mean.mul_(0.9).add_(x.mean(0), alpha=0.1)
    with pytest.raises(EngineError, match="a tensor of the model was overwritten"):
        criterion(model(x), y)


class Twofold(nn.Module):
    """Beside its logits, as bounded, it answers otherwise where it is asked to."""

    def __init__(self):
        super().__init__()
        self.net, self.center = lipschitz_net(), nn.Buffer(torch.zeros(20))
        self.seen = nn.Buffer(torch.zeros(()))

    def forward(self, x, mode="logits"):
        if mode == "mixed":
            return x - x.mean(0)
        if mode == "dict":
            return {"features": x.clone()}
        if mode == "pair":
            return Pair(x.clone(), x.clone())
        if not torch.is_grad_enabled():
            self.center.copy_(x.mean(0))
        return self.net(x - self.center)


Pair = namedtuple("Pair", "one other")


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # of torch's compiler
@pytest.mark.parametrize("mode", ["mixed", "dict", "pair", "compiled"])
def test_only_the_function_that_was_bounded_keeps_rows(mode):
    """Called otherwise, or from within compiled code, its answer was public, or had the rows of its input."""
    inner = lipschitz_net() if mode == "compiled" else Twofold()
    _, model, optimizer, loader, criterion = private(
        torch.compile(inner, backend="eager") if mode == "compiled" else inner
    )
    x, y = next(iter(loader))
    with torch.no_grad():
        said = model(x) if mode == "compiled" else model(x, mode=mode)
    said = {"dict": lambda: said["features"], "pair": lambda: said.one}.get(mode, lambda: said)()
    shift = said.mean(0)[:1] if mode == "compiled" else said if mode == "mixed" else said.mean(0)
    optimizer.zero_grad()
    criterion(model(x - shift), y).backward()
    with pytest.raises(EngineError, match="comes from one record"):
        optimizer.step()


def test_a_buffer_that_a_call_without_gradients_writes_holds_a_batch():
    _, model, _, loader, criterion = private(Twofold())
    x, y = next(iter(loader))
    criterion(model(x), y)
    without_gradients(model, x)
    with pytest.raises(EngineError, match="a tensor of the model was overwritten"):
        criterion(model(x), y)


def test_a_buffer_that_no_gradient_depends_on_may_hold_what_it_likes():
    engine, model, optimizer, loader, criterion = private(Twofold())
    for x, y in loader:
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        optimizer.step()
        model.seen.mul_(0.9).add_(loss.detach(), alpha=0.1)
    assert engine.steps_taken == 5


def test_a_penalty_on_records_is_refused():
    """No noise is added to a penalty."""
    engine, model, optimizer, loader, criterion = private()
    x, y = next(iter(loader))
    engine.add_penalty(lambda model: model(x).square().mean())
    optimizer.zero_grad()
    criterion(model(x), y).backward()
    with pytest.raises(EngineError, match="a penalty was computed from a batch"):
        optimizer.step()


# --- into files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["drawn", "called", "back-propagated"])
def test_no_file_holds_the_batch(stage):
    net = nn.Sequential(*lipschitz_net())
    _, model, optimizer, loader, criterion = private(net)
    x, y = next(iter(loader))
    needle = bytes(x[0].numpy().tobytes())
    if stage != "drawn":
        loss = criterion(model(x), y)
        if stage == "back-propagated":
            loss.backward()
    held = {"criterion": criterion, "model": model, "optimizer": optimizer.state_dict()}
    file = io.BytesIO()
    torch.save(held, file)
    assert needle not in file.getvalue()
    assert needle not in pickle.dumps(held)
    for copied in (pickle.loads(pickle.dumps(criterion)), copy.deepcopy(criterion)):
        assert copied(torch.zeros(4, 5), torch.arange(4)).item() == pytest.approx(math.log(5) / 8)
