"""Optional arguments and branches on shapes: traced with the defaults, decided by the shape of one sample."""

import pytest
import torch
from torch import nn

from lipdp import nn as lnn
from lipdp.bounds import BoundGraph
from lipdp.errors import MixesSamplesError, UnsupportedOperationError
from lipdp.testing import ProbeLoss, falsify

pytestmark = pytest.mark.usefixtures("one_thread")


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.bound = lnn.InputBound(1.0)
        self.a, self.b = lnn.SpectralLinear(4, 4), lnn.SpectralLinear(4, 3)


class Optional(Model):
    def forward(self, x, mask=None, *, scale=2.0, return_features=False, **kwargs):
        features = scale * torch.relu(self.a(self.bound(x)))
        if mask is not None:
            features = features * mask
        if return_features or kwargs:
            return features, self.b(features)
        return self.b(features)


class Asserts(Model):
    def forward(self, x):
        assert x.dim() == 2 and x.ndim == 2  # noqa: PT018
        batch, size = x.shape
        assert size == 4, f"expected 4 features, got {size}"
        if x.shape[1] > 4 or x.size(-1) != 4 or x.shape[1:] != (4,):
            x = 100 * x
        x = self.a(self.bound(x)).view(x.size(0), -1)
        while x.dim() < 4:
            x = x.unsqueeze(-1)
        if x.ndim == 4 and self.a.weight.shape[0] == 4:
            x = x.flatten(1)
        return self.b(x.view(batch, size))


@pytest.mark.parametrize(("make", "lipschitz"), [(Optional, 2.0), (Asserts, 1.0)])
def test_everyday_forwards_are_traced_with_their_defaults_and_shapes(make, lipschitz):
    model = make()
    assert float(BoundGraph(model, (4,)).lipschitz()) == pytest.approx(lipschitz, rel=1e-3)
    falsify(model, ProbeLoss(), (4,), weights=("given",), starts=2, climbs=1, steps=5)


def branching(condition):
    class Branching(Model):
        def forward(self, x):
            x = self.a(self.bound(x))
            if condition(x):
                return 1000 * self.b(x)
            return self.b(x)

    return Branching()


@pytest.mark.parametrize(
    "condition",
    [
        lambda x: x.sum() > 0,
        lambda x: x.sum().item() > 1e9,
        lambda x: x[0, 0] > 0,
        lambda x: x.shape[0] > 100,
        lambda x: x.shape[-2] > 100,
        lambda x: x.size(0) == 7,
        lambda x: x.size(dim=-2) == 7,
        lambda x: len(x) > 50,
        lambda x: x.numel() > 5000,
        lambda x: x.shape == (64, 4),
        lambda x: x.shape[:1] == (64,),
        lambda x: x.shape[::-1] == (4, 64),
        lambda x: x.shape[:2][0] > 100,
        lambda x: x.shape.numel() > 1000,
        lambda x: sum(x.shape[i] for i in range(2)) > 100,
        lambda x: x.T.shape[1] > 100,
        lambda x: torch.numel(x) > 5000,
        lambda x: x.flatten().shape[0] > 5000,
        lambda x: x.flatten().size(-1) > 5000,
        lambda x: x.transpose(0, 1).shape[1] > 100,
        lambda x: x.isnan().any(),
        lambda x: x[:, x.shape[0] // 50 :].shape[1] < 4,
    ],
)
def test_branches_on_entries_and_on_the_number_of_samples_are_refused(condition):
    with pytest.raises((UnsupportedOperationError, MixesSamplesError)):
        BoundGraph(branching(condition), (4,))


def test_the_mode_may_not_choose_a_branch_by_the_shape():
    class ByMode(Model):
        def forward(self, x):
            return self.b(self.a(self.bound(x))) * (2 if self.training and x.shape[1] == 4 else 1)

    with pytest.raises(UnsupportedOperationError, match="training"):
        BoundGraph(ByMode(), (4,))


def test_a_second_input_without_a_default_is_named():
    class Two(Model):
        def forward(self, x, other):
            return self.b(x + other)

    with pytest.raises(UnsupportedOperationError, match="other have no default"):
        BoundGraph(Two(), (4,))


@pytest.mark.parametrize(
    "hidden",
    [
        lambda h, n: h * (1 + n // 50),
        lambda h, n: h.view(n - n // 1000 * 500, -1).view(n, -1),
        lambda h, n: h - torch.cat((h[n // 1000 :], h[: n // 1000])),
        lambda h, n: h.roll(n // 1000, 0),
        lambda h, n: h.unflatten(0, (-1, 1 + n // 1000)).flatten(0, 1),
    ],
)
def test_what_is_computed_with_the_batch_size_is_refused_though_small_batches_show_nothing(hidden):
    """At 1,000 records each of these scales all gradients or mixes records; at the trial's sizes it does nothing."""

    class Jumps(Model):
        def forward(self, x):
            return self.b(hidden(self.a(self.bound(x)), x.shape[0]))

    with pytest.raises(UnsupportedOperationError, match="number of samples of a batch"):
        BoundGraph(Jumps(), (4,))


def test_the_batch_size_may_be_the_first_size_of_a_view():
    class Views(Model):
        def forward(self, x):
            h = self.bound(x).reshape(x.shape[:1] + (2, 2)).view(x.size(0), -1)  # noqa: RUF005
            return self.b(self.a(h.view(x.shape)))

    BoundGraph(Views(), (4,))
