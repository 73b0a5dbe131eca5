"""A private run of a small convolutional network, by the engine and by the trainer."""

from __future__ import annotations

from functools import partial

import kit
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from lipdp import nn as lnn
from lipdp.training import configure

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def images(n=128, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(n, 1, 8, 8, generator=generator)
    return TensorDataset(x.to(device), torch.randint(10, (n,), generator=generator).to(device))


def conv_net(**options):
    torch.manual_seed(0)
    return nn.Sequential(
        lnn.InputBound(4.0),
        lnn.SpectralConv2d(1, 8, 3, padding=1, **options),
        lnn.GroupSort2(),
        lnn.ScaledL2NormPool2d(2),
        nn.Flatten(),
        lnn.SpectralLinear(8 * 16, 10, **options),
    )


private = partial(kit.private, net=conv_net, data=images, expected_batch_size=32, momentum=0.9, check_every=0)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def config(**given):
    small = {"model": "cnn", "model_options": {"width": 8}, "steps": 12, "noise_multiplier": 2.0, "seed": 0}
    return configure(**{**small, "log_every": 12, "device": "cpu", **given})
