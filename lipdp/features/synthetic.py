"""Synthetic images, drawn from a public seed: what the statistics of `lipdp.features` are taken of.

No record and no downloaded image has a part in them. Each function gives pairs of views: two random renderings of the
same scene, so that their difference is a nuisance, not content.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lipdp.errors import ParameterError

VERSION = 1
"""Of the pictures; raise it when the same seed would give others."""

_BATCH = 250
_LEAVES = 100
_TEXTURES = 64

Pair = tuple[Tensor, Tensor]
"""Two views (n, C, H, W) in [0, 1] of the same n scenes."""


class Draws:
    """Random numbers of a seed, on the CPU."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """In [low, high)."""
        return low + (high - low) * torch.rand(shape, generator=self.generator)

    def normal(self, *shape: int, std: float = 1.0) -> Tensor:
        """Of mean 0."""
        return std * torch.randn(shape, generator=self.generator)

    def below(self, limit: int, *shape: int) -> Tensor:
        """Whole numbers from 0 to limit − 1."""
        return torch.randint(limit, shape, generator=self.generator)

    def coins(self, *shape: int) -> Tensor:
        """±1."""
        return 2.0 * self.below(2, *shape) - 1.0


def dead_leaves(count: int, shape: Sequence[int], seed: int) -> Pair:
    """Photograph-like pictures: ellipses, rectangles and triangles that hide each other, and two views of each.

    Radii have the density r⁻³, so that the pictures look alike at every scale. Each shape has a colour, in which
    luminance dominates, a 1/f texture and a shade; the whole is blurred at random.

    Guarantees: no record and no downloaded picture has a part in them; the same seed gives the same pictures.

    Args:
        count: n ≥ 1, of the scenes; about 12 ms each at 3x32x32.
        shape: (C, H, W), C = 1 or 3, H and W ≥ 8.
        seed: public.

    Returns:
        Two views (n, C, H, W), float32 in [0, 1].

    Raises:
        ParameterError: another shape, or no picture.

    >>> first, second = lipdp.features.dead_leaves(2, (3, 16, 16), seed=0)
    >>> first.shape, bool((first != second).any())
    (torch.Size([2, 3, 16, 16]), True)

    Source: Lee, Mumford & Huang (2001), Occlusion models for natural images; Baradad et al. (2021), Learning to see by
    looking at noise.
    """

    def canvas(draws: Draws, n: int, side: int, channels: int) -> Tensor:
        textures = _one_over_f(draws, side)
        picture = _colours(draws, n, channels) + _textured(draws, textures, n)
        largest = side / 2
        for _ in range(_LEAVES):
            least = (1 - (1 - (1.5 / largest) ** 2) * draws.uniform(n, 1, 1)).rsqrt()  # r⁻³ between 1.5 and largest
            radius = (1.5 * least).clamp(max=largest)
            middle = draws.uniform(n, 2, 1, 1, high=float(side))
            mask, across = _shape(draws, side, middle, radius)
            paint = _colours(draws, n, channels) + _textured(draws, textures, n)
            paint = paint + draws.normal(n, 1, 1, 1, std=0.1) * across[:, None]
            picture = picture + mask[:, None] * (paint - picture)
        blurred = F.avg_pool2d(F.pad(picture, (1, 1, 1, 1), mode="reflect"), 3, stride=1)
        share = draws.uniform(n, 1, 1, 1)
        return (picture + share * (blurred - picture)).clamp(0, 1)

    return _in_batches(count, shape, seed, canvas)


def objects(count: int, shape: Sequence[int], seed: int) -> Pair:
    """Pictures of things on black: each a union of two to nine textured shapes near the centre. See `dead_leaves`."""

    def canvas(draws: Draws, n: int, side: int, channels: int) -> Tensor:
        textures = _one_over_f(draws, side)
        picture = torch.zeros(n, channels, side, side)
        parts = 2 + draws.below(8, n)
        base = draws.uniform(n, 1, 1, 1, low=0.2, high=0.95)
        unit = side / 1.5 / 28
        for part in range(9):
            radius = draws.uniform(n, 1, 1, low=2.5, high=11.0) * unit
            middle = side / 2 + draws.uniform(n, 2, 1, 1, low=-8.0, high=8.0) * unit
            mask, across = _shape(draws, side, middle, radius)
            mask = mask * (part < parts)[:, None, None]
            paint = base + draws.normal(n, 1, 1, 1, std=0.15) + _textured(draws, textures, n, scale=2.0)
            paint = paint + draws.normal(n, 1, 1, 1, std=0.1) * across[:, None]
            picture = picture + mask[:, None] * (paint.clamp(0.05, 1) - picture)
        return picture.clamp(0, 1)

    return _in_batches(count, shape, seed, canvas)


def strokes(count: int, shape: Sequence[int], seed: int) -> Pair:
    """Handwriting-like pictures: one to three joined Bézier strokes or arcs, fitted to 5/7 of the picture's side.

    Each skeleton is drawn twice, with another rotation, shear, scale, shift, smooth displacement and pen width.
    """
    _check(count, shape)
    draws, (channels, height, width) = Draws(seed), shape
    views: tuple[list[Tensor], list[Tensor]] = [], []
    for start in range(0, count, _BATCH):
        points, drawn = _skeletons(draws, min(_BATCH, count - start))
        for view in views:
            ink = _inked(draws, points, drawn, height, width)
            view.append(ink[:, None].expand(-1, channels, -1, -1))
    return torch.cat(views[0]), torch.cat(views[1])


PICTURES: dict[str, Callable[[int, Sequence[int], int], Pair]] = {
    "photographs": dead_leaves,
    "objects": objects,
    "handwriting": strokes,
}

# ---------------------------------------------------------------------------------------------------- parts of pictures


def _check(count: int, shape: Sequence[int]) -> None:
    if count < 1 or len(shape) != 3 or shape[0] not in (1, 3) or min(shape[1:]) < 8:
        raise ParameterError(
            f"{count} pictures of shape {tuple(shape)}: at least 1 of (C, H, W) is needed, C = 1 or 3, H and W ≥ 8"
        )


def _in_batches(count: int, shape: Sequence[int], seed: int, canvas: Callable[[Draws, int, int, int], Tensor]) -> Pair:
    _check(count, shape)
    draws, (channels, height, width) = Draws(seed), shape
    side = math.ceil(1.5 * max(height, width))
    views: tuple[list[Tensor], list[Tensor]] = [], []
    for start in range(0, count, _BATCH):
        picture = canvas(draws, min(_BATCH, count - start), side, channels)
        for view in views:
            view.append(_view(draws, picture, height, width))
    return torch.cat(views[0]), torch.cat(views[1])


def _view(draws: Draws, picture: Tensor, height: int, width: int) -> Tensor:
    """A random look at the middle of a canvas: flip, rotation ±12°, scale ±15 %, shift ±3/32 of the side, brightness,
    contrast, colour, noise."""
    n, channels, side, _ = picture.shape
    angle = draws.uniform(n, low=-1.0, high=1.0) * math.radians(12)
    scale = draws.uniform(n, low=0.85, high=1.15)
    shift = draws.uniform(n, 2, low=-1.0, high=1.0) * 2 * 3 / 32 * min(height, width) / side
    cosine, sine = angle.cos() * scale, angle.sin() * scale
    flip = draws.coins(n)
    rows = torch.stack((cosine * flip * width, -sine * height, shift[:, 0] * side), 1)
    columns = torch.stack((sine * flip * width, cosine * height, shift[:, 1] * side), 1)
    seen = F.affine_grid(torch.stack((rows, columns), 1) / side, [n, channels, height, width], align_corners=False)
    view = F.grid_sample(picture, seen, align_corners=False)
    contrast = draws.uniform(n, 1, 1, 1, low=0.75, high=1.25)
    empty = picture.flatten(1).min(1).values.reshape(-1, 1, 1, 1) == 0  # things on black stay on black
    pivot = torch.where(empty, 0.0, 0.5)
    tint = draws.normal(n, 1, 1, 1, std=0.08) + draws.normal(n, channels, 1, 1, std=0.03) * (channels > 1)
    view = pivot + contrast * (view - pivot) + tint * torch.where(empty, view, 1.0)
    noise = draws.normal(*view.shape) * draws.uniform(n, 1, 1, 1, high=0.03)
    return (view + noise * torch.where(empty, (view > 0).float(), 1.0)).clamp(0, 1)


def _shape(draws: Draws, side: int, middle: Tensor, radius: Tensor) -> Pair:
    """Soft masks (n, side, side) of random ellipses, rectangles and triangles, and the coordinate across each."""
    n = len(middle)
    axis = torch.arange(side) + 0.5
    dx, dy = axis - middle[:, 0], axis[:, None] - middle[:, 1]
    angle = draws.uniform(n, 1, 1, high=2 * math.pi)
    aspect = draws.uniform(n, 1, 1, low=0.35)
    u = (angle.cos() * dx + angle.sin() * dy) / radius
    v = (angle.cos() * dy - angle.sin() * dx) / (radius * aspect)
    kind = draws.below(3, n, 1, 1)
    ellipse, rectangle = (u * u + v * v).sqrt(), 1.1 * torch.maximum(u.abs(), v.abs())
    triangle = torch.maximum(-2 * v, v + math.sqrt(3) * u.abs())
    level = torch.where(kind == 0, ellipse, torch.where(kind == 1, rectangle, triangle))
    return ((1 - level) * radius * aspect + 0.5).clamp(0, 1), u.clamp(-1, 1)


def _colours(draws: Draws, n: int, channels: int) -> Tensor:
    """(n, C, 1, 1): a luminance in [0, 1] and, in colour, two smaller opponent parts (R − G and B − (R + G)/2)."""
    luminance = draws.uniform(n)
    red_green, blue_yellow = draws.normal(n, std=0.12), draws.normal(n, std=0.15)
    if channels == 1:
        return luminance.reshape(n, 1, 1, 1)
    red, green = (luminance - blue_yellow / 3 + sign * red_green / 2 for sign in (1, -1))
    return torch.stack((red, green, luminance + 2 * blue_yellow / 3), 1)[..., None, None]


def _one_over_f(draws: Draws, side: int) -> Tensor:
    """(textures, side, side) of mean 0 and variance 1, with amplitudes f⁻ᵃ, a in [0.5, 1.5]."""
    frequency = torch.fft.fftfreq(side)
    radial = (frequency[:, None].square() + frequency.square()).sqrt()
    radial[0, 0] = math.inf
    power = draws.uniform(_TEXTURES, 1, 1, low=0.5, high=1.5)
    spectrum = torch.fft.fft2(draws.normal(_TEXTURES, side, side)) * radial**-power
    texture = torch.fft.ifft2(spectrum).real
    return texture / texture.std((1, 2), keepdim=True)


def _textured(draws: Draws, textures: Tensor, n: int, scale: float = 1.0) -> Tensor:
    """(n, 1, side, side): a texture each, of random strength."""
    return draws.normal(n, 1, 1, 1, std=0.07 * scale) * textures[draws.below(len(textures), n)][:, None]


# ------------------------------------------------------------------------------------------------------------- strokes

_POINTS = 48
_STROKES = 3


def _skeletons(draws: Draws, n: int) -> Pair:
    """Points (n, strokes · points, 2) in [−½, ½]², fitted; and which of them are drawn (n, strokes · points)."""
    t = torch.linspace(0, 1, _POINTS)[None, :, None]
    parts: list[Tensor] = []
    number = 1 + draws.below(_STROKES, n)
    for _ in range(_STROKES):
        corners = draws.uniform(n, 4, 1, 2, low=-0.5, high=0.5)
        weights = ((1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3)
        bezier = sum((w * corners[:, i] for i, w in enumerate(weights)), torch.zeros(()))
        radius = draws.uniform(n, 1, 2, low=0.15, high=0.5)
        turn = draws.uniform(n, 1, 1, high=2 * math.pi)
        sweep = draws.uniform(n, 1, 1, low=0.5 * math.pi, high=2.1 * math.pi) * draws.coins(n, 1, 1)
        angle = turn + sweep * t
        arc = radius * torch.cat((angle.cos(), angle.sin()), 2)
        stroke = torch.where(draws.uniform(n, 1, 1) < 0.55, bezier, arc)
        if parts:  # most begin where, or somewhere along which, the one before was
            before = parts[-1]
            at = torch.where(draws.uniform(n) < 0.6, _POINTS - 1, draws.below(_POINTS, n))
            joint = before[torch.arange(n), at][:, None]
            joined = draws.uniform(n, 1, 1) < 0.85
            stroke = torch.where(joined, stroke - stroke[:, :1] + joint, stroke)
        parts.append(stroke)
    drawn = (torch.arange(_STROKES) < number[:, None]).repeat_interleave(_POINTS, 1)
    points = torch.cat(parts, 1)
    low = torch.where(drawn[..., None], points, math.inf).amin(1, keepdim=True)
    high = torch.where(drawn[..., None], points, -math.inf).amax(1, keepdim=True)
    return (points - (low + high) / 2) / (high - low).amax(2, keepdim=True).clamp_min(1e-3), drawn


def _inked(draws: Draws, points: Tensor, drawn: Tensor, height: int, width: int) -> Tensor:
    """(n, H, W): the skeletons, moved at random, drawn with a round pen."""
    n, side = len(points), min(height, width)
    x, y = points[..., 0], points[..., 1]
    for axis in (0, 1):  # a smooth field
        wave = 2 * math.pi * draws.uniform(n, 2, 1, low=-1.0, high=1.0)
        moved = draws.normal(n, 1, std=0.05) * (wave[:, 0] * x + wave[:, 1] * y + 6.3 * draws.uniform(n, 1)).sin()
        x, y = (x + moved, y) if axis == 0 else (x, y + moved)
    angle = draws.normal(n, 1, std=math.radians(10))
    shear = draws.normal(n, 1, std=0.15)
    x = x + shear * y
    x, y = angle.cos() * x - angle.sin() * y, angle.sin() * x + angle.cos() * y
    unit = side / 28
    size = 20 * unit * draws.uniform(n, 2, 1, low=0.85, high=1.1)
    shift = draws.normal(n, 2, 1, std=1.0) * unit
    x, y = width / 2 + size[:, 0] * x + shift[:, 0], height / 2 + size[:, 1] * y + shift[:, 1]
    x = torch.where(drawn, x, 1e4)
    columns, rows = (torch.arange(width) + 0.5)[:, None], (torch.arange(height) + 0.5)[:, None]
    dx, dy = (columns - x[:, None]).square(), (rows - y[:, None]).square()  # (n, W or H, points)
    nearest = torch.stack([(dx + dy[:, row : row + 1]).amin(2) for row in range(height)], 1).sqrt()
    pen = draws.uniform(n, 1, 1, low=0.6, high=1.6) * unit
    return (0.5 + (pen - nearest) / unit).clamp(0, 1)
