"""Certified robustness: L2 radii per sample, certified accuracy and AUROC."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from lipdp.bounds.trace import mode
from lipdp.certify.inputs import InputMap, apply_maps, moduli_of_maps
from lipdp.certify.moduli import Confined, Lipschitz, Modulus, pull, push, sample_norms
from lipdp.certify.network import Head, Network, Stretch
from lipdp.errors import DataError, NonFiniteError, ParameterError

IMAGE_RADII = (36 / 255, 72 / 255, 108 / 255, 255 / 255)
"""The radii at which certified accuracy on images is published, for pixels in [0, 1]."""

_DOWNWARDS = 1.0 - 1e-9  # covers the float64 rounding of the formulas


def table_radii(x: Tensor) -> tuple[float, ...]:
    """Radii for a table, (N, d): a tenth, a quarter, a half and all of a column's spread, two digits each.

    The spread is the median over the columns of their standard deviation; columns differ in their units, and pixels'
    radii mean nothing there.

    >>> table_radii(torch.tensor([[0.0, 0.0], [20.0, 400.0], [40.0, 0.0]]))
    (2.0, 5.0, 10.0, 20.0)
    """
    spread = float(x.double().std(0).nan_to_num().median()) or 1.0
    return tuple(float(f"{share * spread:.2g}") for share in (0.1, 0.25, 0.5, 1.0))


@dataclass(frozen=True)
class _Piece:
    """A batch: its logits, and the chain of moduli from the raw input to the last layer's input."""

    logits: Tensor
    chain: tuple[Modulus, ...]

    def move(self, radius: float) -> Tensor:
        """How far the last layer's input can move."""
        return push(self.chain, torch.full((len(self.logits),), radius, dtype=torch.float64))


@dataclass(frozen=True)
class Certificate:
    """The certified radius of each sample, in units of the raw input.

    Guarantee: for every x' with ‖x' − x_i‖₂ ≤ radii[i], the model as computed (rounding included) gives x' the label of
    x_i, deterministically and with certainty; nothing is sampled.

    Attributes:
        radii: (N,) float64, 0 where the prediction is wrong or nothing is certified.
        correct: (N,) bool, whether the prediction is right.
        lipschitz: the network's global constant, from the model's input to the logits.
        method: how it was computed, in words.
        seconds: it took.
    """

    radii: Tensor
    correct: Tensor
    lipschitz: float
    method: str
    seconds: float
    _labels: Tensor = field(repr=False)
    _pieces: tuple[_Piece, ...] = field(repr=False)
    _head: Head = field(repr=False)

    def __len__(self) -> int:
        return len(self.radii)

    def accuracy(self, radius: float = 0.0) -> float:
        """Certified accuracy: the share of samples that are right and stay so within the radius; at 0, the accuracy."""
        return float((self.correct & (self.radii >= _non_negative(radius))).double().mean())

    def auroc(self, radius: float = 0.0) -> float:
        """Certified area under the ROC curve, for two classes: every score moves the wrong way as far as it can.

        The score s (the single logit, or z₁ − z₀) of a record that moves by r at most moves by Δ_i = ‖w‖ ω_i(r) at
        most, and 2e more by rounding. A positive and a negative record are in the right order for sure if
        s_p − Δ_p > s_n + Δ_n, and at worst tied where both are equal. So the AUROC of the scores s ∓ Δ is a lower bound
        of every AUROC that an adversary who moves each record by at most r can leave.

        Raises:
            DataError: more than two classes, or labels of one class only.
        """
        if not self.is_binary:
            raise DataError("a certified AUROC needs two classes, both among the labels")
        logits = torch.cat([piece.logits for piece in self._pieces])
        scores = logits[:, 0] if logits.shape[1] == 1 else logits[:, 1] - logits[:, 0]
        positive = self._labels.bool()
        if _non_negative(radius) > 0:
            moves = torch.cat([piece.move(radius) for piece in self._pieces]) * self._head.pair_norms[0, -1]
            moves = (moves + 2 * self._head.pair_errors[0, -1]) / _DOWNWARDS
            scores = torch.where(positive, scores - moves, scores + moves).clamp(-1e300, 1e300)
        return float(roc_auc_score(positive.numpy(), scores.numpy()))

    @property
    def is_binary(self) -> bool:
        """Whether there is an AUROC: two classes, both among the labels."""
        return self._pieces[0].logits.shape[1] <= 2 and len(self._labels.unique()) == 2

    @property
    def seconds_per_10_000(self) -> float:
        """Time for 10 000 samples at the same pace."""
        return self.seconds * 10_000 / max(len(self), 1)


def certify(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    maps: Sequence[InputMap] = (),
    convolution: str = "fourier",
    batch_size: int = 1024,
) -> Certificate:
    """Certified L2 radius of every sample, from certified constants of the network as it is.

    The margin z_y − z_j, less twice its rounding error e, is spent on the last layer's input: that may move by
    ρ = min_j (z_y − z_j − 2e_yj) / ‖w_y − w_j‖ before the class changes. (A single logit: |z| and ‖w‖.) A move in front
    of a K-Lipschitz stretch of the network may be ρ/K; in front of a clip, and of a normalisation of the inputs, what
    the exact modulus at the sample allows (`moduli.Projection`, `moduli.GroupNormalisation`), which for samples outside
    the clip's ball is more than ρ. So back to the raw input.

    Args:
        model: any module torch.fx can trace, trained in any way; evaluated in evaluation mode and left as it was.
        x: raw inputs (N, …).
        y: labels (N,).
        maps: what turns raw inputs into the model's, in order; radii are in front of the first.
        convolution: "fourier" or "reshaped", see `Network`.
        batch_size: of the forward passes.

    Raises:
        UnboundedError, UnsupportedOperationError, UnsupportedLayerError, MixesSamplesError: no certified constant.
        DataError, NonFiniteError, ParameterError: inputs or labels that are none.

    >>> model = torch.nn.Sequential(lipdp.nn.InputBound(1.0), torch.nn.Linear(2, 2, bias=False))
    >>> _ = model[1].weight.data.copy_(torch.eye(2))
    >>> certificate = certify(model, torch.tensor([[0.6, 0.0], [6.0, 0.0]]), torch.tensor([0, 0]))
    >>> [round(r, 3) for r in certificate.radii.tolist()]                  # the diagonal is 0.424 and 4.243 away
    [0.424, 3.969]

    Source: Tsuzuku, Sato & Sugiyama (2018), proposition 1; Singla, Singla & Feizi (2022) for ‖w_y − w_j‖.
    """
    started = time.perf_counter()
    labels = _check(x, y)
    with mode(model, False), torch.no_grad():
        sample = apply_maps(maps, x[:1], torch.float32)
        network = Network(model, tuple(sample.shape[1:]), convolution=convolution)
        stretches, head = network.analyse()
        if not bool(head.pair_errors.isfinite().all()):  # nothing bounds the values: bound the inputs instead
            inputs = (apply_maps(maps, batch, network.dtype) for batch in x.split(batch_size))
            network.input_bound = 2 * max(float(sample_norms(batch).max()) for batch in inputs)
            stretches, head = network.analyse()
        batches = zip(x.split(batch_size), labels.split(batch_size), strict=True)
        pieces = [_piece(network, stretches, head, maps, *batch) for batch in batches]
        lipschitz = float(network.lipschitz())
    verdicts = [_verdict(piece, own, head) for piece, own in zip(pieces, labels.split(batch_size), strict=True)]
    return Certificate(
        radii=torch.cat([radii for _, radii in verdicts]),
        correct=torch.cat([correct for correct, _ in verdicts]),
        lipschitz=lipschitz,
        method=f"last layer by ‖w_y − w_j‖; exact moduli of {len(stretches)} clip(s); convolutions: {convolution}",
        seconds=time.perf_counter() - started,
        _labels=labels,
        _pieces=tuple(pieces),
        _head=head,
    )


def _piece(
    network: Network, stretches: list[Stretch], head: Head, maps: Sequence[InputMap], raw: Tensor, labels: Tensor
) -> _Piece:
    """Run a batch through the maps and the network, and note its moduli on the way."""
    raw = raw.to(network.device)
    inputs = apply_maps(maps, raw, network.dtype)
    logits, norms = network.run(inputs, stretches)
    if int(labels.max()) >= max(logits.shape[1], 2):
        raise DataError(
            f"the model tells {max(logits.shape[1], 2)} classes apart, but there is a label {int(labels.max())}"
        )
    if not bool(logits.isfinite().all()):
        raise NonFiniteError("the model's outputs are not finite")
    chain = moduli_of_maps(maps, raw, network.dtype)
    if network.input_bound < math.inf:
        chain.append(Confined(network.input_bound * _DOWNWARDS - sample_norms(inputs)))
    return _Piece(logits.cpu(), (*chain, *network.moduli(stretches, norms), Lipschitz(head.constant)))


def _verdict(piece: _Piece, labels: Tensor, head: Head) -> tuple[Tensor, Tensor]:
    """Which predictions are right, and the radius in which they stay so."""
    logits = piece.logits
    if logits.shape[1] == 1:
        correct = (logits[:, 0] > 0) == labels.bool()
        margins = logits[:, 0].abs()[:, None]
        norms, errors = head.pair_norms, head.pair_errors
    else:
        correct = logits.argmax(1) == labels
        margins = logits.gather(1, labels[:, None]) - logits
        norms, errors = head.pair_norms[labels], head.pair_errors[labels]
        margins = margins.scatter(1, labels[:, None], torch.inf)
    left = margins - 2 * errors
    budget = torch.where(norms > 0, left / norms, torch.where(left > 0, torch.inf, 0.0)).amin(1)
    return correct, torch.where(correct, pull(piece.chain, budget) * _DOWNWARDS, 0.0)


def _non_negative(radius: float) -> float:
    if not radius >= 0:
        raise ParameterError(f"a radius is a number of at least 0, got {radius}")
    return radius


def _check(x: Tensor, y: Tensor) -> Tensor:
    """The labels, (N,) int64 on the CPU."""
    if not x.is_floating_point() or x.dim() < 2 or not len(x):
        raise DataError(f"inputs are floating-point (N, …) with N ≥ 1, got {x.dtype} {tuple(x.shape)}")
    if y.shape != (len(x),) or y.is_floating_point() or int(y.min()) < 0:
        raise DataError(f"{len(x)} inputs have labels {y.dtype} {tuple(y.shape)}; give one class index an input, (N,)")
    return y.detach().cpu().long()
