"""Models whose records' gradients Opacus does not find are refused; and what clipping would let through if not."""

import pytest
import torch
from torch import nn

pytest.importorskip("opacus")
from test_trainers import SILENT, one_step, plain_model, task

import lipdp.comparison.trainers.opacus as opacus
from lipdp.comparison import get_trainer
from lipdp.errors import UnsupportedLayerError

pytestmark = pytest.mark.usefixtures("one_thread")


class Folded(nn.Sequential):
    """Four tokens of a record as four rows, added up behind the layers."""

    def forward(self, x):
        return super().forward(x.view(-1, 3)).view(len(x), 4, 3).sum(1)


class Permuted(nn.Sequential):
    """Images with their channels last, seen as images with channels first."""

    def forward(self, x):
        return super().forward(x.view(-1, 2, 2, 3).permute(0, 3, 1, 2))


class UsedTwice(nn.Sequential):
    """A weight that is used beside its layer too."""

    def forward(self, x):
        return super().forward(torch.tanh(nn.functional.linear(x, self[0].weight)))


def conv(padding=0, **options):
    size = 2 * padding + 1
    layers = nn.Conv2d(3, 6, 2, padding=padding, **options), nn.Tanh(), nn.Flatten(), nn.Linear(6 * size**2, 3)
    return nn.Sequential(nn.Unflatten(1, (3, 2, 2)), *layers)


WRONG = {
    "folded": lambda: Folded(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3)),
    "normalised": lambda: nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8, affine=False), nn.Linear(8, 3)),
    "circular": lambda: conv(1, padding_mode="circular"),
    "permuted": lambda: Permuted(*conv()[1:]),
    "used twice": lambda: UsedTwice(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 3)),
}
LETS_THROUGH = {
    ("folded", "opacus_hooks"): 1.5,
    ("folded", "rgp"): 1.5,
    ("normalised", "opacus_hooks"): 1.2,
    ("normalised", "rgp"): 1.04,
    ("normalised", "opacus_ghost"): 1.2,
    ("circular", "opacus_ghost"): 1.03,
    ("permuted", "opacus_ghost"): 1.03,
    ("used twice", "opacus_ghost"): 1.1,
}
"""(model, trainer) → a multiple of C by which one record is known to move the sum."""


def built(name):
    torch.manual_seed(0)
    return WRONG[name]()


@pytest.mark.parametrize(("model", "trainer"), LETS_THROUGH)
def test_a_model_under_which_clipping_fails_is_refused(model, trainer):
    refused = built(model)
    with pytest.raises(UnsupportedLayerError, match=f"{trainer} cannot train this model"):
        get_trainer(trainer).start(refused, task())
    for module in refused.modules():
        assert not module._forward_hooks | module._backward_hooks
        assert "forward" not in vars(module)
        assert not {"activations", "max_batch_len"} & set(vars(module))
    assert all(p.requires_grad and not vars(p) and p.grad is None for p in refused.parameters())
    before = built(model).state_dict()
    assert refused.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in refused.state_dict().items())


@pytest.mark.parametrize("trainer", ["opacus_hooks", "opacus_ghost"])
def test_a_gradient_that_is_no_number_is_refused(trainer):
    given = task()
    given.dataset.tensors[0][1, 0] = torch.nan
    with pytest.raises(UnsupportedLayerError, match="not finite"):
        get_trainer(trainer).start(plain_model(), given)


@pytest.mark.parametrize("short", [0.95, 1.05])
def test_a_norm_that_is_five_percent_off_is_refused(short, monkeypatch):
    true = opacus.OpacusSession.norms
    monkeypatch.setattr(opacus.OpacusSession, "norms", lambda session: [short * norms for norms in true(session)])
    with pytest.raises(UnsupportedLayerError, match="is not its gradient"):
        get_trainer("opacus_ghost").start(plain_model(), task())


def test_what_is_refused_trains_once_it_is_mended():
    model = plain_model()
    model.beside = nn.Linear(2, 2)
    model.forward = lambda x: nn.Sequential(*list(model)[:4])(x)
    with pytest.raises(UnsupportedLayerError, match="beside"):
        get_trainer("opacus_hooks").start(model, task())
    model.beside.requires_grad_(False)
    given = task()
    session = get_trainer("opacus_hooks").start(model, given)
    session.model.train()
    session.step(*(t[:9] for t in given.dataset.tensors))
    session.close()


@pytest.mark.parametrize(("model", "trainer"), LETS_THROUGH)
def test_why(model, trainer, monkeypatch):
    """Without the check a record, alone or beside others, moves the sum by more than C."""
    monkeypatch.setattr(opacus, "probe", lambda session: None)
    given, longest = task(records=6, batch_size=6, sigma=SILENT, scale=2.0), 0.0
    x, y = given.dataset.tensors
    for i in range(6):
        others = [j for j in range(6) if j != i]
        sums = [one_step(trainer, built(model), given, (x[k], y[k]), max_grad_norm=0.7) for k in (range(6), others)]
        longest = max(longest, (sums[0] - sums[1]).norm().item())
    assert longest > LETS_THROUGH[model, trainer] * 0.7


@pytest.mark.parametrize("model", ["circular", "permuted"])
def test_functorch_knows_any_padding_and_order(model):
    get_trainer("opacus_functorch").start(built(model), task()).close()


@pytest.mark.parametrize("trainer", ["opacus_hooks", "opacus_functorch", "opacus_ghost", "rgp"])
def test_what_opacus_cannot_train_is_refused_in_one_message(trainer):
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.cells, self.head = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 3)

        def forward(self, x):
            return self.head(self.cells(x.view(-1, 4, 3))[0][:, -1])

    unused, frozen = plain_model(), plain_model().requires_grad_(False)
    unused.beside = nn.Linear(2, 2)
    unused.forward = lambda x: nn.Sequential(*list(unused)[:4])(x)
    reasons = ((Recurrent(), "DPLSTM"), (unused, "does not depend on .*beside"), (frozen, "no weight"))
    for model, reason in reasons:
        with pytest.raises(UnsupportedLayerError, match=f"{trainer} cannot train this model: .*({reason})"):
            get_trainer(trainer).start(model, task())


@pytest.mark.parametrize("trainer", ["opacus_hooks", "opacus_ghost"])
def test_dropout_is_not_refused_and_its_random_numbers_are_not_used_up(trainer):
    model = nn.Sequential(nn.Linear(12, 8), nn.Dropout(0.5), nn.Linear(8, 3)).eval()
    before = torch.get_rng_state()
    session = get_trainer(trainer).start(model, task())
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.grad is None and p.grad_sample is None for p in model.parameters())
    session.close()
