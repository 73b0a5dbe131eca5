"""What two engines do to one weight: each tells that its account has its own steps alone."""

from __future__ import annotations

import kit
import pytest
import torch
from torch import nn

import lipdp
from lipdp import losses
from lipdp import nn as lnn
from lipdp.errors import PrivacyLeakWarning

pytestmark = pytest.mark.usefixtures("one_thread", "unjudged")


def private(engine, module):
    _, optimizer, loader, _ = engine.make_private(
        module=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.1), criterion=losses.TauCrossEntropy(8.0),
        dataset=kit.table(64), expected_batch_size=32, steps=1, noise_multiplier=2.0,
    )  # fmt: skip
    return optimizer, loader


def one_step(engine, module):
    optimizer, loader = private(engine, module)
    for batch in loader:
        optimizer.zero_grad()
        engine.backward(*batch)
        optimizer.step()
    engine.detach()


@pytest.mark.parametrize("frozen", [False, True])
def test_a_second_account_of_one_model_is_told_of_the_first(frozen):
    model, engine = kit.lipschitz_net(), lipdp.PrivacyEngine()
    private(engine, model)
    engine.detach()  # no step was taken
    engine = lipdp.PrivacyEngine()
    for _ in range(2):  # one account
        one_step(engine, model)
    del engine
    model[1].requires_grad_(not frozen)
    other = nn.Sequential(*model[:3], lnn.SpectralLinear(32, 5)) if frozen else model
    second = lipdp.PrivacyEngine()
    with pytest.warns(PrivacyLeakWarning, match="Use one engine for both"):
        one_step(second, other)
    with pytest.raises(PrivacyLeakWarning, match="another engine"):  # an error, in these tests
        private(lipdp.PrivacyEngine(), other)
    one_step(second, other)


def test_an_engine_without_a_step_hides_no_account():
    model = kit.lipschitz_net()
    one_step(lipdp.PrivacyEngine(), model)
    for _ in range(2):
        engine = lipdp.PrivacyEngine()
        with pytest.warns(PrivacyLeakWarning, match="another engine"):
            private(engine, model)
        engine.detach()


def test_two_engines_at_once_over_one_encoder_are_told():
    encoder = kit.lipschitz_net()[:3]
    heads = [nn.Sequential(*encoder, lnn.SpectralLinear(32, 5)) for _ in range(2)]
    first, second = lipdp.PrivacyEngine(), lipdp.PrivacyEngine()
    private(first, heads[0])
    with pytest.raises(PrivacyLeakWarning, match="another engine trains"):
        private(second, heads[1])
    first.detach()
    private(second, heads[1])
