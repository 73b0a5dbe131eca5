"""What a certificate needs of a network: its constants between its clips, its rounding error, its last layer."""

from __future__ import annotations

import copy
import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from lipdp.bounds import BoundGraph, Call, ForwardSweep, Local, Rounding, Step
from lipdp.bounds.sensitivity import HOW_TO_BOUND
from lipdp.certify.convolution import is_convolution, scale_of, tightened
from lipdp.certify.moduli import Lipschitz, Modulus, Projection, sample_norms
from lipdp.errors import NonFiniteError, ParameterError, UnboundedError
from lipdp.nn.gates import GradientGate, ValueClip
from lipdp.nn.linear import SpectralLinear

CONVOLUTIONS = ("fourier", "reshaped")
_UPWARDS = 1.0 + 1e-9  # covers the float64 rounding of the formulas here


@dataclass(frozen=True)
class Stretch:
    """A stretch of the network that ends at a clip: a K-Lipschitz map, whose computed value is off by `error`."""

    end: fx.Node
    constant: float
    error: float
    clip: float


@dataclass(frozen=True)
class Head:
    """The last layer as far as margins go: the logits move by at most ‖w_i − w_j‖ times the move of its input.

    Attributes:
        constant: K_f, of the stretch from the last clip to its input.
        pair_norms: ‖w_i − w_j‖, (C, C); for a single logit ‖w‖, (1, 1). Where the last layer is not dense, K_f goes up
            to the logits and a difference of two of them moves by √2.
        pair_errors: how far z_i − z_j, or a single logit z, as computed may be off, of the same shape.
    """

    constant: float
    pair_norms: Tensor
    pair_errors: Tensor


class Network(BoundGraph):
    """The model's graph in evaluation mode, with certified constants and certified rounding errors.

    **Local constants at clips.** A clip that every path from the input to the logits goes through cuts the network into
    stretches. Each is bounded by its global constant, each clip by `Projection`, its exact modulus at the value the
    sample has there. Clips with a path around them (inside a residual block) keep their global constant.

    **Rounding.** Beside K, an error E with ‖fl(v) − v‖ ≤ E at every node is propagated, E_v = Σ L_j E_j + γ A_v. An
    operation that sums n terms in a precision with spacing ε is off by γ = (n + 8) ε/2 (and a little, for γ's higher
    powers), relative to A_v, a bound on the same operation done with absolute values: ‖|W|‖₂ X + ‖b‖ for dense and
    convolutional layers, the norms of inputs and output elsewhere. Sums in any order are covered; transforms that trade
    accuracy for speed (Winograd, FFT) are not. An operation of your own is taken to be as accurate as its rule's
    `fan_in` says.

    Args:
        model: a module torch.fx can trace, in evaluation mode.
        input_shape: of one sample.
        convolution: "fourier", the smaller of two bounds for each convolution, or "reshaped", the one training uses.

    Source: Higham (2002), lemma 3.1 and section 3.5, for γ.
    """

    def __init__(self, model: nn.Module, input_shape: tuple[int, ...], *, convolution: str = "fourier") -> None:
        if convolution not in CONVOLUTIONS:
            raise ParameterError(f"convolution={convolution!r}: give {' or '.join(CONVOLUTIONS)}")
        super().__init__(model, input_shape)
        self.steps = [_for_evaluation(step, fourier=convolution == "fourier") for step in self.steps]
        self.nodes = {index: node for node, index in self.index.items()}

    @torch.no_grad()
    def analyse(self) -> tuple[list[Stretch], Head]:
        """The stretches in front of the clips, and the head.

        Raises:
            UnboundedError: no finite constant. NonFiniteError: a weight is NaN.
        """
        forward = self.forward_sweep()
        constants = [1.0] * len(self.index)
        errors = [0.0] * len(self.index)
        for node in self.constants:
            constants[self.index[node]] = 0.0
        stretches: list[Stretch] = []
        last = self._last_dense(forward)
        for step, call, local, factor in forward.calls:
            slack = float(factor)
            i, source = step.index, step.sources[0]
            inputs = [float(forward.values[j]) for j in step.sources]
            gain = float(step.combine(local, [constants[j] for j in step.sources])) * slack
            constants[i] = gain
            if isinstance(step.module, ValueClip) and self._is_cut(step):
                stretches.append(Stretch(self.nodes[source], constants[source], errors[source], step.module.bound))
                constants[i] = float(local.gains[0]) * slack
            if step is not last:
                size = _magnitude(step, call, local, inputs, float(forward.values[i]))
                carried = float(step.combine(local, [errors[j] for j in step.sources]))
                errors[i] = carried + (
                    0.0 if local.exact else relative_error(forward.rounding, _terms(step, local)) * size
                )
        end = self.output_index if last is None else last.sources[0]
        head = self._head(forward, last, constants[end] * _UPWARDS, errors[end])
        self._check(float(forward.lipschitz[self.output_index]), stretches, head)
        return stretches, head

    def moduli(self, stretches: list[Stretch], norms: list[Tensor]) -> list[Modulus]:
        """The chain from the model's input to the last clip, at samples with these norms in front of the clips."""
        chain: list[Modulus] = []
        for stretch, norm in zip(stretches, norms, strict=True):
            lower = (norm / _UPWARDS - stretch.error).clamp_min(0.0)
            chain += [Lipschitz(stretch.constant * _UPWARDS), Projection(stretch.clip, lower)]
        return chain

    def run(self, x: Tensor, stretches: list[Stretch]) -> tuple[Tensor, list[Tensor]]:
        """Logits (N, C) in float64, and per stretch the norms (N,) of the values in front of its clip."""
        recorder = _Norms(self.module, [stretch.end for stretch in stretches])
        with torch.no_grad():
            logits = recorder.run(x)
        return logits.double().reshape(len(x), -1), [recorder.norms[stretch.end] for stretch in stretches]

    # -- the clips and the head ----------------------------------------------------------------------------------------

    def _is_cut(self, clip: Step) -> bool:
        """Whether every path from the input to the logits goes through the clip."""
        if clip.index > self.output_index:
            return False
        fixed = {self.index[node] for node in self.constants}
        later = [step for step in self.steps if step.index > clip.index]
        return all(source >= clip.index or source in fixed for step in later for source in step.sources)

    def _last_dense(self, forward: ForwardSweep) -> Step | None:
        """The dense layer with one row a sample whose output is the logits, gates and rearrangements aside."""
        by_index = {step.index: (step, call) for step, call, _, _ in forward.calls}
        index = self.output_index
        while index in by_index:
            step, call = by_index[index]
            if _is_dense(step.module):
                return step if call.x.numel == step.module.in_features else None  # type: ignore[union-attr]
            if not isinstance(step.module, (nn.Identity, GradientGate)):
                return None
            index = step.sources[0]
        return None

    def _head(self, forward: ForwardSweep, last: Step | None, constant: float, error: float) -> Head:
        if last is None:
            count = self.num_outputs
            norms = (
                (1 - torch.eye(count, dtype=torch.float64)) * math.sqrt(2) if count > 1 else torch.ones(1, 1).double()
            )
            return Head(constant, norms * _UPWARDS, norms * error)
        layer: nn.Linear = last.module  # type: ignore[assignment]
        weight = layer.weight.double().cpu() * scale_of(layer)
        rows = torch.linalg.vector_norm(weight, dim=1)
        bias = torch.zeros_like(rows) if layer.bias is None else layer.bias.double().cpu().abs()
        own = relative_error(forward.rounding, layer.in_features) * (
            rows * float(forward.values[last.sources[0]]) + bias
        )
        if len(weight) == 1:
            norms, sums = rows[:, None], own[:, None]
        else:
            norms = torch.cdist(weight, weight, compute_mode="donot_use_mm_for_euclid_dist")
            sums = own[:, None] + own[None]
        return Head(constant, norms * _UPWARDS, norms * error + sums)

    def _check(self, total: float, stretches: list[Stretch], head: Head) -> None:
        numbers = [total, head.constant, *(s.constant for s in stretches)]
        if any(math.isnan(n) for n in numbers) or bool(head.pair_norms.isnan().any()):
            raise NonFiniteError("NaN in the network's Lipschitz constant: a weight is NaN or infinite")
        if any(math.isinf(n) for n in numbers) or bool(head.pair_norms.isinf().any()):
            raise UnboundedError(
                "the network has no finite Lipschitz constant, so no radius can be certified: it multiplies values"
                f" without a bound, or a weight is infinite. {HOW_TO_BOUND}"
            )


class _Norms(fx.Interpreter):
    """Runs the graph and keeps the norms of each sample at some nodes."""

    def __init__(self, module: fx.GraphModule, nodes: list[fx.Node]) -> None:
        super().__init__(module)
        self.norms = {node: torch.empty(0) for node in nodes}

    def run_node(self, n: fx.Node) -> object:
        value = super().run_node(n)
        if n in self.norms:
            self.norms[n] = sample_norms(value)
        return value


def relative_error(rounding: Rounding, terms: float) -> float:
    """γ of a sum of that many products, with the few operations around it.

    >>> relative_error(Rounding(torch.float32, torch.device("cpu")), 100) < 1e-5
    True
    """
    products = (float(rounding.slack(0)) - 1.0) / 4  # the spacing of the products' format, 0 if it is that of the sums
    spacing = float(rounding.slack(1) - rounding.slack(0)) / 8
    roundoff = (terms + 8) * spacing / 2
    return 1.1 * (roundoff / (1 - roundoff) + products) if roundoff < 1 else math.inf


def _is_dense(module: nn.Module | None) -> bool:
    """Whether it computes what torch's or this library's dense layers do."""
    return isinstance(module, nn.Linear) and type(module).forward in (nn.Linear.forward, SpectralLinear.forward)


def _terms(step: Step, local: Local) -> float:
    """How many terms an output entry sums, going forwards."""
    if _is_dense(step.module) or is_convolution(step.module):
        return int(step.module.weight[0].numel())  # type: ignore[union-attr, index]
    return float(local.fan_in) / (2 if isinstance(step.module, ValueClip) else 1)  # under a root an error is halved


def _magnitude(step: Step, call: Call, local: Local, inputs: list[float], output: float) -> float:
    """A: a bound on the operation done with absolute values."""
    if isinstance(step.module, ValueClip):
        return output  # a sample is multiplied by one number, which is off by γ
    if step.module is None or not (_is_dense(step.module) or is_convolution(step.module)):
        return output + float(step.combine(local, inputs))
    absolute = copy.copy(step.module)
    parameters = {n: None if p is None else nn.Parameter(p.detach().abs()) for n, p in step.module._parameters.items()}
    absolute.__dict__["_parameters"] = parameters
    upper = step.rule(dataclasses.replace(call, module=absolute))
    return float(upper.gains[0]) * inputs[0] + float(upper.offset)


def _for_evaluation(step: Step, *, fourier: bool) -> Step:
    """Dropout does nothing in evaluation mode, a gate nothing forwards; convolutions have a tighter bound."""
    if isinstance(step.module, (nn.Dropout, nn.Dropout1d, nn.Dropout2d, GradientGate)):
        return dataclasses.replace(step, rule=lambda call: Local(exact=True))
    if fourier and is_convolution(step.module):
        return dataclasses.replace(step, rule=tightened(step.rule))
    return step
