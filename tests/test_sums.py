"""A large sum of gradients is held once: nothing can be written to it unseen, and nothing else is written with it."""

import kit
import pytest
import torch
from torch import nn

import lipdp
from lipdp.errors import LipdpError
from lipdp.passes import sums

pytestmark = pytest.mark.usefixtures("one_thread", "unjudged")

ROWS = 24


@pytest.fixture(autouse=True)
def every_sum_is_large(monkeypatch):
    monkeypatch.setattr(sums, "_LARGE", 1)
    monkeypatch.setattr(sums, "_PIECE", 7)


def private(seed=0, **options):
    torch.manual_seed(0)
    model = nn.Sequential(
        lipdp.nn.InputBound(1.0), lipdp.nn.SpectralLinear(4, 6, bias=True), lipdp.nn.GroupSort2(), nn.Linear(6, 3)
    )
    dataset = torch.utils.data.TensorDataset(torch.randn(ROWS, 4), torch.arange(ROWS) % 3)
    defaults = {"expected_batch_size": 12, "steps": 3, "lr": 0.1, "momentum": 0.9, "sampling": "fixed_size"}
    return kit.private(model, dataset, seed=seed, criterion=lipdp.losses.TauCrossEntropy(4.0), **defaults, **options)


def steps(one_pass):
    engine, model, optimizer, loader, criterion = private()
    for x, y in loader:
        optimizer.zero_grad()
        one_pass(engine, model, criterion, x, y)
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def whole(engine, model, criterion, x, y):
    criterion(model(x), y).backward()


def pieces(engine, model, criterion, x, y):
    for xb, yb in engine.microbatches(x, y, 5):
        criterion(model(xb), yb).backward()


def together(engine, model, criterion, x, y):
    (criterion(model(x[:5]), y[:5]) + criterion(model(x[5:]), y[5:])).backward()


@pytest.mark.parametrize("one_pass", [whole, pieces, together])
def test_shared_memory_gives_the_same_weights_bit_for_bit(one_pass, monkeypatch):
    shared = steps(one_pass)
    monkeypatch.setattr(sums, "_LARGE", 10**9)
    for a, b in zip(shared, steps(one_pass), strict=True):
        assert torch.equal(a, b)


def test_the_sum_is_the_memory_of_grad():
    _, model, _, loader, criterion = private()
    x, y = next(iter(loader))
    criterion(model(x), y).backward()
    held = criterion._step.gradients._sums
    assert any(held[p].data_ptr() == p.grad.data_ptr() for p in model.parameters())
    assert len({held[p].data_ptr() for p in model.parameters()}) == len(list(model.parameters()))


@pytest.mark.parametrize(
    "write",
    [
        lambda p: p.grad.mul_(0.5),
        lambda p: p.grad.data.mul_(0.5),
        lambda p: p.grad.numpy().__setitem__(0, 0.25),
        lambda p: p.grad.data.view(-1)[-1:].add_(1e-3),
        lambda p: p.grad.data.copy_(p.grad.data.flip(0)),
        lambda p: p.grad.data.neg_(),
        lambda p: p.grad.data[:2].neg_(),
        lambda p: p.grad.data.mul_(2.0**8),
        lambda p: setattr(p, "grad", p.grad * 2),
        lambda p: setattr(p, "grad", None),
    ],
)
@pytest.mark.parametrize("index", [0, 1])
def test_whatever_is_written_to_grad_is_refused(write, index):
    _, model, optimizer, loader, criterion = private()
    x, y = next(iter(loader))
    criterion(model(x), y).backward()
    before = [p.detach().clone() for p in model.parameters()]
    write(list(model.parameters())[index])
    with pytest.raises(LipdpError, match="changed between"):
        optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_mark_sees_signs_scales_and_order(dtype):
    """An even number of signs in float64 cancels in a sum of odd multiples of the bits."""
    s = torch.randn(8, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    signs = [s * torch.tensor([1.0] * (6 - k) + [-1.0] * k).to(dtype) for k in range(7)]
    changed = [*signs, s.abs(), s.flip(0), s.roll(1), *(s * 2.0**k for k in (-4, 1, 3))]
    assert len({int(sums._mark(each.contiguous())) for each in changed}) == len(changed)


def test_a_write_by_code_that_the_step_calls_is_refused():
    """After `claims` was asked, before the noise: an allocation of the user's."""
    held = []

    class Writes:
        name = "writes"

        def stds(self, deltas, sizes, noise_multiplier):
            for grad in held:
                grad.mul_(2)
            return deltas * noise_multiplier * len(deltas) ** 0.5

    _, model, optimizer, loader, criterion = private(allocation=Writes())
    x, y = next(iter(loader))
    criterion(model(x), y).backward()
    held.append(next(model.parameters()).grad.detach())
    with pytest.raises(LipdpError, match="changed between"):
        optimizer.step()


def test_a_write_between_two_passes_is_refused():
    _, model, optimizer, loader, criterion = private()
    x, y = next(iter(loader))
    criterion(model(x[:5]), y[:5]).backward()
    next(model.parameters()).grad.data.mul_(0.5)
    criterion(model(x[5:]), y[5:]).backward()
    with pytest.raises(LipdpError, match="changed between"):
        optimizer.step()


def products():
    return {0: torch.ones(3, 4), 1: (torch.ones(4, 2) @ torch.ones(2, 3)).t().contiguous(), 2: torch.ones(3, 4).mT}


def test_memory_that_others_use_is_not_shared():
    """Held by a list, by a graph, as a part or as the whole: counted."""
    for key in (0, 1):
        found = products()
        assert sums._is_alone(found, key)
        held = [found[key]]
        assert not sums._is_alone(found, key)
        held = [found[key].view(-1)]
        assert not sums._is_alone(found, key)
        held = [found[key].untyped_storage()]
        assert not sums._is_alone(found, key)
        held = [(found[key].clone().requires_grad_() * found[key]).sum()]  # saved by a node
        assert not sums._is_alone(found, key)
        del held
        assert sums._is_alone(found, key)
    whole = torch.ones(4, 3)
    assert not sums._is_alone({0: whole[:2]}, 0)
    assert not sums._is_alone({0: whole.view(3, 4)}, 0)
    assert sums._is_alone({0: torch.ones(4, 3).view(3, 4)}, 0)
    assert not sums._is_alone({0: torch.ones(1).expand(5)}, 0)
    twice = torch.ones(2, 2)
    both = {0: twice, 1: twice}
    del twice
    assert not sums._is_alone(both, 0)


def test_a_gradient_that_is_the_cotangent_of_another_is_copied():
    """y = a + b + c x: the gradients of a and b are one tensor."""

    class Sum(torch.autograd.Function):
        @staticmethod
        def forward(ctx, a, b):
            return a + b

        @staticmethod
        def backward(ctx, g):
            return g, g

    a, b = nn.Parameter(torch.zeros(1, 3)), nn.Parameter(torch.zeros(1, 3))
    out = Sum.apply(a, b)
    call = sums.ModelCall(out, torch.zeros(1), None, [a, b], [], cotangent=torch.ones(1, 3))
    own = sums.OwnGradients()
    own.add(call)
    held = [own._sums[a], own._sums[b], call.cotangent]
    assert len({t.data_ptr() for t in held}) == 3


def test_a_mark_sees_any_entry_and_any_order():
    x = torch.randn(50)
    mark = sums._mark(x)
    for i in range(50):
        y = x.clone()
        y[i] = torch.nextafter(y[i], torch.tensor(9.0))
        assert sums._mark(y) != mark
    assert sums._mark(x.flip(0)) != mark
    assert sums._mark(x.clone()) == mark
