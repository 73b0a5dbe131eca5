"""What the adversary sets up: a model, the records that are always there, and the canaries that may be."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, grad_and_value, vmap

from lipdp.accounting.plan import whole
from lipdp.bounds.sensitivity import sensitivity
from lipdp.data import bound_inputs, default_bounding, load
from lipdp.errors import ParameterError
from lipdp.losses import LipschitzLoss, MeanAbsoluteError, TauCrossEntropy
from lipdp.models import build
from lipdp.nn.gates import InputBound, clip_norm, per_sample_norm

_FAR = 1e6  # a target out of reach: the absolute error's gradient is then ±1/C whatever the weights
_MOST_CANARIES = 2**18


@dataclass(frozen=True)
class Experiment:
    """A private training that the adversary knows, except which canaries take part.

    Attributes:
        name: for the report.
        model: as it is before the first step; every run starts from a copy.
        loss: per sample.
        others: (x, y) of the records in every run.
        canaries: (x, y) of the m canaries.
        dataset_size: N, the public constant.
        expected_batch_size: B.
        steps: T of one run.
        learning_rate: of plain SGD. With 0 the weights stand still: ε holds at every learning rate, and what a canary
            adds to the release is then the same at every step.
        saturated: every canary's gradient meets the bound of every parameter exactly.
        bands: b, over how many steps noise is correlated; set by `in_bands`.
    """

    name: str
    model: nn.Module
    loss: LipschitzLoss
    others: tuple[Tensor, Tensor]
    canaries: tuple[Tensor, Tensor]
    dataset_size: int
    expected_batch_size: int
    steps: int = 1
    learning_rate: float = 0.0
    saturated: bool = True
    bands: int = 1

    def in_bands(self, bands: int) -> Experiment:
        """The same with noise over b steps, N and T b times as large: a record is used as often as before."""
        b = whole("bands", bands)
        return replace(self, dataset_size=b * self.dataset_size, steps=b * self.steps, bands=b)

    def records(self, included: Tensor) -> tuple[Tensor, Tensor]:
        """(x, y) of the dataset with the canaries that `included`, (m,) bool, marks."""
        x, y = (torch.cat([o, c[included]]) for o, c in zip(self.others, self.canaries, strict=True))
        return x, y

    def fresh_model(self) -> nn.Module:
        """A copy of the model."""
        return copy.deepcopy(self.model)


class _Witness(nn.Module):
    """A convolution with a bias, and a dense layer, side by side: one record meets the bounds of all three at once.

    On s × s images, circular padding: a constant image of norm c and a constant cotangent of norm G give every kernel
    entry the gradient Σ_pos g·x = c·G, so ‖∇_W‖ = k c G = √m X G; ‖∇_b‖ = s G = √(H'W') G; and ‖∇_dense‖ = c G.
    """

    def __init__(self, size: int, kernel: int) -> None:
        super().__init__()
        self.bound = InputBound(1.0)
        self.conv = nn.Conv2d(1, 1, kernel, padding=kernel // 2, padding_mode="circular")
        self.flatten = nn.Flatten()
        self.dense = nn.Linear(size * size, size * size, bias=False)
        nn.init.zeros_(self.conv.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        x = self.bound(x)
        return self.flatten(self.conv(x)) + self.dense(self.flatten(x))


def worst_case(
    *,
    steps: int = 1,
    sampling_rate: float = 1.0,
    records: int = 4,
    opposed: bool = False,
    size: int = 5,
    kernel: int = 5,
) -> Experiment:
    r"""One canary whose gradient is exactly at the bound of a convolution, of its bias and of a dense layer.

    The joint shift of the release, √(Σ_l Δ_l²/s_l²) = 1/σ, is the worst that the claim allows. The
    records that are always there are fitted exactly, so that their gradient is zero (the absolute error at 0), or with
    `opposed` have the canary's gradient with the other sign: they then show batches of a fixed size, in which a canary
    takes the place of another record. There are few records and about 650 weights, so that dividing by the number of
    records drawn shows in the noise.

    Args:
        steps: T of a run.
        sampling_rate: q; `records`·q is a whole number.
        records: N.
        opposed: see above.
        size, kernel: of the images and the kernel; the kernel is odd and no larger than the image.
    """
    batch = round(sampling_rate * records)
    if records < 1 or batch < 1 or abs(batch - sampling_rate * records) > 1e-9:
        raise ParameterError(f"sampling_rate={sampling_rate} of records={records}: a whole number ≥ 1 is needed")
    if kernel % 2 == 0 or not 1 <= kernel <= size:
        raise ParameterError(f"kernel={kernel}: an odd number of at most size={size} is needed")
    outputs = size * size
    bright = torch.full((1, 1, size, size), 1.0 / size)
    far = torch.full((1, outputs), _FAR)
    x = bright if opposed else torch.zeros_like(bright)
    y = -far if opposed else torch.zeros_like(far)
    return Experiment(
        name="opposed records" if opposed else "worst-case record",
        model=_Witness(size, kernel),
        loss=MeanAbsoluteError(outputs),
        others=(x.expand(records, -1, -1, -1).clone(), y.expand(records, -1).clone()),
        canaries=(bright, far),
        dataset_size=records,
        expected_batch_size=batch,
        steps=steps,
    )


class _TwoBlocks(nn.Module):
    """W₁x + 2 W₂x: two parameter blocks with Δ₂ = 2 Δ₁."""

    def __init__(self, features: int, outputs: int) -> None:
        super().__init__()
        self.bound = InputBound(1.0)
        self.first = nn.Linear(features, outputs, bias=False)
        self.second = nn.Linear(features, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bound(x)
        return self.first(x) + 2.0 * self.second(x)


def gradient_canaries(count: int, *, steps: int = 1, sampling_rate: float = 1.0) -> Experiment:
    r"""Canaries whose gradients are orthogonal to each other and exactly at the bound of either parameter block.

    Canary (i, k) has input e_i, of norm 1, and a target out of reach in the direction of row k of a Hadamard matrix, so
    that its gradient is h_k e_iᵀ/C in the first block and twice that in the second, of norms Δ₁ and Δ₂, at any weights:
    in the basis h_k e_iᵀ/√C a Dirac in each block.

    Args:
        count: m from 2 to 2^18 (then 1 GB); rounded up to a power of two.
        steps: T.
        sampling_rate: q.
    """
    if not 2 <= count <= _MOST_CANARIES:
        raise ParameterError(f"canaries={count}: 2 to {_MOST_CANARIES} are needed")
    power = math.ceil(math.log2(count))
    outputs, features = 2 ** (power // 2), 2 ** (power - power // 2)
    hadamard = torch.ones(1, 1)
    while len(hadamard) < outputs:
        hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)])
    x = torch.eye(features).repeat_interleave(outputs, 0)
    y = (_FAR * hadamard).repeat(features, 1)
    records = max(1, len(x) // 2)
    return Experiment(
        name="gradient canaries",
        model=_TwoBlocks(features, outputs),
        loss=MeanAbsoluteError(outputs),
        others=(torch.zeros(1, features), torch.zeros(1, outputs)),
        canaries=(x, y),
        dataset_size=records,
        expected_batch_size=max(1, round(sampling_rate * records)),
        steps=steps,
    )


def input_canaries(
    count: int,
    *,
    dataset: str = "digits",
    data_dir: str | None = None,
    model: str = "mlp",
    steps: int = 20,
    batch_size: int | None = None,
    learning_rate: float = 0.5,
    climb: int = 10,
) -> Experiment:
    """Mislabelled records, moved within the input bound to where their gradient is largest, in an ordinary training.

    Each canary is a training record of its own with the label after its true one; then `climb` steps of ascent on the
    joint size Σ_l ‖g_l‖²/Δ_l² of its gradient. The remaining records train the model with it.

    Args:
        count: m, less than the number of training records.
        dataset, data_dir: as `lipdp.data.load`.
        model: as `lipdp.models.build`.
        steps, batch_size, learning_rate: T, B (default: N, full batches) and of plain SGD.
        climb: steps of ascent; 0 leaves the records as they are.
    """
    split = load(dataset, data_dir=data_dir)
    split = bound_inputs(split, default_bounding(split))
    if not 2 <= count < len(split.train_x):
        raise ParameterError(
            f"input_canaries={count}: 2 … {len(split.train_x) - 1} of the records of {dataset} can be canaries"
        )
    net = build(model, input_shape=split.input_shape, num_classes=split.num_classes)
    loss = TauCrossEntropy(8.0)
    order = torch.randperm(len(split.train_x))
    chosen, rest = order[:count], order[count:]
    x, y = split.train_x[chosen], (split.train_y[chosen] + 1) % split.num_classes
    x = _climbed(net, loss, x, y, split.input_shape, climb)
    records = len(rest) + count // 2
    return Experiment(
        name="input canaries",
        model=net,
        loss=loss,
        others=(split.train_x[rest], split.train_y[rest]),
        canaries=(x, y),
        dataset_size=records,
        expected_batch_size=batch_size or records,
        steps=steps,
        learning_rate=learning_rate,
        saturated=False,
    )


def _climbed(net: nn.Module, loss: LipschitzLoss, x: Tensor, y: Tensor, shape: tuple[int, ...], steps: int) -> Tensor:
    """The records after `steps` steps of ascent within the input bound; a step that does not help is halved."""
    deltas = sensitivity(net, loss, shape)
    weights = {n: p.detach() for n, p in net.named_parameters() if p.requires_grad}
    radius = next(float(m.bound) for m in net.modules() if isinstance(m, InputBound))

    def value(w: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return loss(functional_call(net, w, (x.unsqueeze(0),)), y.unsqueeze(0)).sum()

    def strength(x: Tensor, y: Tensor) -> Tensor:
        gradients = grad(value)(weights, x, y)
        return torch.stack([(g / deltas[n]).square().sum() for n, g in gradients.items()]).sum()

    rate = torch.full((len(x), *[1] * len(shape)), radius)
    slopes, best = vmap(grad_and_value(strength))(x, y)
    for _ in range(steps):
        moved = clip_norm(x + rate * slopes / per_sample_norm(slopes).to(x.dtype).clamp_min(1e-30), radius)
        new_slopes, reached = vmap(grad_and_value(strength))(moved, y)
        better = (reached > best).view_as(rate)
        x, slopes, best = torch.where(better, moved, x), torch.where(better, new_slopes, slopes), best.maximum(reached)
        rate = torch.where(better, rate, rate / 2)
    return x.detach()
