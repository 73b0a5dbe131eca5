"""Encoded images (PNG, JPEG, …), decoded where they are read."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lipdp.batches.records import looked_at
from lipdp.data.split import resize
from lipdp.errors import DataError, RecordError

_EIGHT_BITS = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"}


def decoded(
    path: Path, rows: Sequence[int], encoded: Iterable[tuple[str, bytes]], mode: str, size: Sequence[int] | None
) -> Tensor:
    """(n, C, H, W) float32 in [0, 1]."""
    images = [decode(content, mode, where) for where, content in encoded]
    if size is not None:
        images = [resize(image[None], size)[0] for image in images]
    odd = next((i for i, image in enumerate(images) if image.shape != images[0].shape), None)
    if odd is not None:
        this, first = ("×".join(map(str, images[i].shape[1:])) for i in (odd, 0))
        raise RecordError(
            f"{path}: record {rows[odd]} is an image of {this} pixels, record {rows[0]} one of {first}: give"
            " --image-size (image_size=) to bring all images to one size"
        )
    return torch.stack(images)


def decode(content: bytes, mode: str, where: str) -> Tensor:
    """(C, H, W) float32 in [0, 1] from an encoded image (PNG, JPEG, …); RecordError where it is none."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content)) as image:
            if image.mode not in _EIGHT_BITS:
                raise RecordError(
                    f"{where}: pixels of mode {image.mode}, not of 8 bits a channel; convert them to RGB or L"
                )
            pixels = np.array(image.convert(mode))
    except DataError:
        raise
    except Exception as error:  # decoders document no closed list of what they raise on damaged bytes
        raise RecordError(f"{where}: no image can be decoded ({type(error).__name__}: {error})") from error
    planes = torch.from_numpy(pixels)
    return (planes[None] if planes.dim() == 2 else planes.permute(2, 0, 1)).to(torch.float32).div_(255).contiguous()


def usual_mode(path: Path, count: int, content: Callable[[int], bytes]) -> str:
    """What all images are brought to: grey where most of those looked at are, else RGB.

    One record, the first one too, does not decide for all where the others are alike.
    """
    from PIL import Image

    refused, grey = DataError(f"{path} holds no images"), []
    for row in looked_at(count):
        try:
            encoded = content(row)
            decode(encoded, "RGB", f"{path}, record {row}")
        except RecordError as error:
            refused = error
            continue
        with Image.open(io.BytesIO(encoded)) as image:
            grey.append(image.mode in ("1", "L", "LA"))
    if not grey:
        raise refused
    return "L" if 2 * sum(grey) > len(grey) else "RGB"
