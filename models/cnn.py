"""A small convolution net of LeNet's shape."""

from __future__ import annotations

from torch import nn

from .families import Family
from .stages import Stages, count, head, image
from .starts import cosine, haar


def cnn(layers: Family, *, width: int = 16, hidden: int | None = None, kernel_size: int = 5) -> Stages:
    """Two convolutions (w and 2w channels) with 2x2 norm pooling, then a dense layer.

    A convolution, the norm of each window, and the channels' mean taken off: the pooling is the only non-linearity, as
    in a scattering transform (a modulus and an average), and keeps norms better than with an activation in front of it.
    The first convolution starts from the smoothest cosine filters, which keep most of an image's energy.

    Joints: behind the first convolution's pooling, the second's, and the hidden dense layer if there is one.

    Args:
        width: channels w of the first convolution.
        hidden: neurons of a hidden dense layer, even, or None.
        kernel_size: k, odd.

    Parameters: c w k² + 2 w² k² + 2 w ⌊H/4⌋⌊W/4⌋ C; 28 880 on 1x28x28, 34 480 on 3x32x32, 14 480 on 1x8x8, ten classes.

    >>> model = lipdp.models.build("cnn", input_shape=(1, 28, 28), num_classes=10, clips=(0.7, 0.14), gates=(0.05, 0.1))
    >>> sum(p.numel() for p in model.parameters())
    28880

    Source: LeCun et al. (1998), LeNet; Bruna & Mallat (2013), scattering.
    """
    channels, height, columns = image("cnn", layers.input_shape, halvings=2)
    width, kernel_size = count("width", width), count("kernel_size", kernel_size, odd=True)
    features = 2 * width * (height // 4) * (columns // 4)
    return [
        [layers.conv(channels, width, kernel_size, lipschitz=layers.gain, start=cosine), *layers.magnitude(2)],
        [layers.conv(width, 2 * width, kernel_size, start=haar), *layers.magnitude(2), nn.Flatten()],
        *head(layers, features, hidden=hidden),
    ]
