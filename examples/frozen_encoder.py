"""A private linear head on a frozen encoder: `lipdp train --features frozen_encoder:encoder`, from this folder.

With transformers installed the encoder is a small ViT built from a configuration (no download; load your weights
with `from_pretrained`). Without it, a random convolution net stands in. Weights must come from public data, or from
none.

    cd examples && lipdp train --dataset digits --features frozen_encoder:encoder --epsilon 3
"""

from __future__ import annotations

import torch
from torch import nn


def encoder() -> nn.Module:
    """Images (N, 1, 8, 8) to features."""
    torch.manual_seed(0)
    try:
        from transformers import ViTConfig, ViTModel
    except ImportError:
        return nn.Sequential(nn.Conv2d(1, 64, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2))
    size = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    return ViTModel(ViTConfig(image_size=8, patch_size=2, num_channels=1, **size))


if __name__ == "__main__":
    from lipdp.training import configure, train

    result = train(configure(dataset="digits", features="frozen_encoder:encoder", epsilon=3.0, epochs=20))
    print(f"ε = {result.epsilon:.2f}, accuracy {result.metrics['test_accuracy_ema']:.3f}")
