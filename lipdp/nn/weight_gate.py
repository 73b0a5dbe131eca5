"""A gate at the weight gradient of one layer: per-layer clipping, fused into the layer's backward pass.

A sample's gradient of a weight that is used at T positions is ∇_i = Σ_t g_t p_tᵀ, with p_t what the weight is applied
to at position t (a token, a patch) and g_t the cotangent of what comes out. A layer with `weight_gate=C` hands on to
its weight `Σ_i ∇_i min(1, C/‖∇_i‖_F)`, and to its input the same cotangent as without. So one record moves the sum by
at most C, whatever the rest of the network is: Δ = min(P·G, C) for each use of the layer, where P·G is the bound of the
sweep. In deep networks with shared weights, whose gradients reach a few hundredths of P·G, that is what the noise is
calibrated to.

It is per-layer clipping, with its bias: longer gradients count less than they should. What is free of clipping is no
longer free of it; bounds on values, and so certificates of robustness, stay as they are.

Cost: dense layers on single rows, whose ∇_i = g xᵀ has the norm ‖g‖‖x‖, next to nothing. Others form the ∇_i of a chunk
of samples (64 MiB at most, or one sample), in as many multiplications as the gradient of the batch takes without;
a convolution writes out its patches too, k_h k_w times its input.

Source: ours; per-layer clipping as in McMahan et al. (2018), and He et al. (2023), "Exploring the limits of
differentially private deep learning with group-wise clipping".
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from lipdp.nn.gates import clip_norm, per_sample_norm

_CHUNK = 1 << 24  # numbers: 64 MiB of float32


def patches(x: Tensor, kernel: Sequence[int], stride: Sequence[int], groups: int) -> Tensor:
    """What a kernel is applied to at its T positions: (N, groups, in/groups · kernel size, T).

    >>> patches(torch.arange(4.0).view(1, 1, 4), (2,), (1,), 1)[0, 0]
    tensor([[0., 1., 2.],
            [1., 2., 3.]])
    """
    size = x.shape[1] // groups * math.prod(kernel)
    if len(kernel) == 1:
        x, kernel, stride = x.unsqueeze(2), (1, *kernel), (1, *stride)
    columns = F.unfold(x, tuple(kernel), stride=tuple(stride))
    return columns.reshape(len(x), groups, size, columns.shape[-1])


def gated_sum(g: Tensor, p: Tensor, bound: float) -> Tensor:
    """Σ_i ∇_i min(1, C/‖∇_i‖_F), with ∇_i = g_i p_iᵀ.

    Guarantee: each term, as computed, has norm at most C up to the rounding of the sum (`clip_norm`).

    Args:
        g: (N, groups, out, T), cotangents.
        p: (N, groups, in, T), what the weight was applied to.
        bound: C > 0.

    Returns:
        (groups, out, in).

    >>> gated_sum(torch.tensor([[[[3.0], [4.0]]]]), torch.ones(1, 1, 1, 1), 1.0)
    tensor([[[0.6000],
             [0.8000]]])
    """
    if g.shape[1] == 1 and g.shape[-1] == 1:
        g, p = g[:, 0, :, 0], p[:, 0, :, 0]
        most = (bound / per_sample_norm(p)).clamp_max(torch.finfo(torch.float64).max)  # of ‖g‖; finite where p = 0
        return (clip_norm(g, most).mT @ p)[None]
    size = max(1, _CHUNK // max(1, g.shape[1] * g.shape[2] * p.shape[2]))
    total = g.new_zeros(g.shape[1], g.shape[2], p.shape[2])
    for some, of in zip(g.split(size), p.split(size), strict=True):
        total = total + clip_norm(some @ of.mT, bound).sum(0)
    return total
