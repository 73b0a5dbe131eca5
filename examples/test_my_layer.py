"""A layer, a rule and a loss of your own, held against their bounds: `pytest examples/test_my_layer.py`.

The right ones pass. The wrong ones make the mistakes that published code makes, and the kit finds each.
"""

import math

import pytest
import torch

import lipdp
from lipdp.bounds import Local, rule
from lipdp.errors import BoundViolation


class TokenBias(torch.nn.Module):
    """y = x + b, the same b at each of the T tokens of a sample (T, d)."""

    def __init__(self, width):
        super().__init__()
        self.bias = torch.nn.Parameter(torch.randn(width))

    def forward(self, x):
        return x + self.bias


class ForgetfulBias(TokenBias):
    """The same layer, with a rule that forgets that b is used T times."""


@rule(TokenBias)
def token_bias(call):
    used = math.sqrt(call.output_shape[0])  # ∂y/∂b repeats the identity T times: its norm is √T
    return Local(offset=used * call.module.bias.detach().norm().double(), parameters={"bias": used})


@rule(ForgetfulBias)
def forgetful_bias(call):
    return Local(offset=3.0 * call.module.bias.detach().norm().double(), parameters={"bias": 1.0})


class Margin(lipdp.losses.LipschitzLoss):
    """ℓ = max(0, 1 − (z_y − max z_j)): one entry of z goes up and one down, so the constant is √2."""

    lipschitz = math.sqrt(2)

    def forward(self, logits, target):
        chosen = torch.nn.functional.one_hot(target, logits.shape[1]).bool()
        return (1 - logits[chosen] + logits.masked_fill(chosen, -torch.inf).max(1).values).clamp(min=0)


class OptimisticMargin(Margin):
    """The same loss, said to be 1-Lipschitz."""

    lipschitz = 1.0


class BatchMargin(Margin):
    """The same loss, centred on the mean of the batch, so that each record moves the gradient of all."""

    def forward(self, logits, target):
        return super().forward(logits - logits.mean(0, keepdim=True), target)


# --- the three lines --------------------------------------------------------------------------------------------------


def test_my_layer():
    lipdp.testing.falsify_layer(TokenBias(4), input_shape=(9, 4))


def test_my_loss():
    lipdp.testing.falsify_loss(Margin(), num_outputs=5)


def test_my_model():
    model = torch.nn.Sequential(
        lipdp.nn.InputBound(2.0), TokenBias(4), torch.nn.Flatten(), lipdp.nn.SpectralLinear(36, 5)
    )
    lipdp.testing.falsify(model, Margin(), input_shape=(9, 4), weights=("given", "constant"), steps=8)


class TestMyLayer(lipdp.testing.LayerTestCase):
    """Everything a layer owes: samples apart, empty batches, dtypes, saved state, vmap, and its bounds."""

    input_shape = (9, 4)

    def make_layer(self):
        torch.manual_seed(0)
        return TokenBias(4)


# --- and what they find -----------------------------------------------------------------------------------------------


def test_a_rule_that_forgets_a_factor_is_found():
    with pytest.raises(BoundViolation, match=r"gradient of layer.bias: .* is 3 times its bound 1 "):
        lipdp.testing.falsify_layer(ForgetfulBias(4), input_shape=(9, 4))


def test_a_constant_that_is_too_small_is_found():
    with pytest.raises(BoundViolation, match=r"gradient of the logits: 1\.41421 is 1\.41421 times its bound 1 "):
        lipdp.testing.falsify_loss(OptimisticMargin(), num_outputs=5)


def test_a_loss_that_looks_at_the_batch_is_found():
    with pytest.raises(BoundViolation, match="influence of one sample on another"):
        lipdp.testing.falsify_loss(BatchMargin(), num_outputs=5)
