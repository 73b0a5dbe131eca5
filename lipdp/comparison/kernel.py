"""The empirical neural tangent kernel of a model on a probe batch, and the spectrum of a matrix made of it.

Everything is in float64, on a copy of the model in evaluation mode. `dynamics` has the mathematics.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vjp, vmap

from lipdp.errors import LossError, NonFiniteError, ParameterError, UnsupportedLayerError
from lipdp.nn import GradientGate

PerSampleLoss = Callable[[Tensor, Tensor], Tensor]
"""(outputs (n, C), targets) to one loss a sample (n,): one of `lipdp.losses`, or of torch with reduction="none"."""

TOLERANCE = 1e-10
"""What counts as zero, relative to ‖M‖₂: far above float64's rounding, far below what is found at real weights."""


@dataclass(frozen=True)
class Ntk:
    """Empirical neural tangent kernel of a model at its present weights on a probe batch of n samples with C outputs.

    `blocks`: parameter name → H_r = J_r J_rᵀ, (n·C, n·C) float64; row i·C + k is output k of sample i.
    """

    blocks: Mapping[str, Tensor]
    samples: int
    outputs: int

    @property
    def total(self) -> Tensor:
        """H = Σ_r H_r."""
        return torch.stack(list(self.blocks.values())).sum(0)

    def gradient_norms(self, cotangents: Tensor) -> Tensor:
        """‖g_{i,r}‖ (n, D): the square is u_iᵀ H_r^{ii} u_i, with H_r^{ii} the block of sample i on the diagonal."""
        n, c = self.samples, self.outputs
        squares = [
            torch.einsum("ia,abi,ib->i", cotangents, h.view(n, c, n, c).diagonal(dim1=0, dim2=2), cotangents)
            for h in self.blocks.values()
        ]
        return torch.stack(squares, 1).clamp_min(0).sqrt()

    def flow_matrix(self, factors: Tensor) -> Tensor:
        """M = Σ_r H_r C_r, (n·C, n·C), for factors (n, D)."""
        columns = factors.repeat_interleave(self.outputs, 0)
        return torch.stack([h * columns[:, r] for r, h in enumerate(self.blocks.values())]).sum(0)


class Probe:
    """A float64 copy of the model in evaluation mode, as a function of its trainable parameters and one sample."""

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        gates = [
            name
            for name, module in model.named_modules()
            if isinstance(module, GradientGate) or getattr(module, "weight_gate", None) is not None
        ]
        if gates:
            raise UnsupportedLayerError(
                f"{', '.join(gates)}: a gate's backward pass is not its Jacobian's, so there is no kernel;"
                " build the model without gates"
            )
        if not len(x):
            raise ParameterError("the probe batch is empty; give at least one sample")
        self.model = copy.deepcopy(model).double().eval()
        self.x = x.detach().to(next(iter(self.model.parameters()), x).device, torch.float64)
        self.parameters = {k: p.detach() for k, p in self.model.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise ParameterError("the model has no trainable parameter, so it has no gradient flow")

    def one(self, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        """Outputs (C,) of one sample."""
        return functional_call(self.model, {**self.parameters, **parameters}, (x[None],)).flatten()

    def outputs(self, parameters: dict[str, Tensor]) -> Tensor:
        """(n, C)."""
        return vmap(self.one, in_dims=(None, 0))(parameters, self.x)

    def losses(self, parameters: dict[str, Tensor], y: Tensor, loss: PerSampleLoss) -> tuple[Tensor, Tensor]:
        """ℓ (n,) and u = ∂Σℓ/∂f (n, C)."""
        with torch.enable_grad():
            outputs = self.outputs(parameters).detach().requires_grad_()
            values = loss(outputs, y.to(outputs.device))
            if values.shape != (len(self.x),):
                raise LossError(
                    f"the loss returned shape {tuple(values.shape)} for {len(self.x)} samples; it must return one"
                    ' value per sample (reduction="none")'
                )
            (cotangents,) = torch.autograd.grad(values.sum(), outputs)
        if not bool(torch.isfinite(values).all() and torch.isfinite(cotangents).all()):
            raise NonFiniteError("the loss or its gradient is not finite on the probe batch")
        return values.detach(), cotangents

    def sample_gradients(self, parameters: dict[str, Tensor], cotangents: Tensor) -> dict[str, Tensor]:
        """g_{i,r}, by block, with the samples first."""

        def pull_back(x: Tensor, u: Tensor) -> dict[str, Tensor]:
            return vjp(lambda p: self.one(p, x), parameters)[1](u)[0]

        return vmap(pull_back)(self.x, cotangents)


def ntk(model: nn.Module, x: Tensor) -> Ntk:
    """The empirical neural tangent kernel of the model's trainable parameters, one Gram matrix a parameter.

    Memory: D matrices of (n·C)² numbers, and the Jacobian of one block at a time.

    Source: Jacot, Gabriel & Hongler (2018).
    """
    return kernel_of(Probe(model, x))


def kernel_of(probe: Probe) -> Ntk:
    blocks = {}
    for name, parameter in probe.parameters.items():
        jacobian = vmap(jacrev(lambda p, x, name=name: probe.one({name: p}, x)), in_dims=(None, 0))(parameter, probe.x)
        rows = jacobian.flatten(2)
        samples, outputs = rows.shape[:2]
        rows = rows.flatten(0, 1)
        blocks[name] = rows @ rows.mT
        if not bool(torch.isfinite(blocks[name]).all()):
            raise NonFiniteError(
                f"the kernel of {name} is not finite: look for NaN or infinity in the weights and the inputs"
            )
    return Ntk(blocks, samples, outputs)


# -------------------------------------------------------------------------------------------------------- its spectrum


@dataclass(frozen=True)
class Spectrum:
    """What the matrix M of a gradient flow is like. Zero means within `TOLERANCE`·‖M‖₂.

    Attributes:
        norm: ‖M‖₂.
        asymmetry: ‖M − Mᵀ‖_F / ‖M‖_F, between 0 and 2.
        smallest_form: the least eigenvalue of (M + Mᵀ)/2, the least uᵀMu over unit vectors u.
        negative_forms: how many eigenvalues of (M + Mᵀ)/2 are negative.
        smallest_real: the least real part of an eigenvalue of M.
        negative_reals: how many eigenvalues of M have a negative real part.
        largest_imaginary: the largest imaginary part.
    """

    norm: float
    asymmetry: float
    smallest_form: float
    negative_forms: int
    smallest_real: float
    negative_reals: int
    largest_imaginary: float

    @property
    def symmetric(self) -> bool:
        """M = Mᵀ."""
        return self.asymmetry <= TOLERANCE

    @property
    def positive_form(self) -> bool:
        """uᵀMu ≥ 0 for every u, so the loss falls whatever the residuals are."""
        return self.negative_forms == 0

    @property
    def positive_eigenvalues(self) -> bool:
        """All eigenvalues of M are real and ≥ 0."""
        return self.negative_reals == 0 and self.largest_imaginary <= TOLERANCE * self.norm


def spectrum(matrix: Tensor) -> Spectrum:
    """Symmetry, quadratic form and eigenvalues of a square float64 matrix."""
    if not bool(torch.isfinite(matrix).all()):
        raise NonFiniteError("the matrix of the flow has entries that are not finite")
    norm = float(torch.linalg.matrix_norm(matrix, 2))
    frobenius = float(torch.linalg.matrix_norm(matrix))
    forms = torch.linalg.eigvalsh((matrix + matrix.mT) / 2)
    values = torch.linalg.eigvals(matrix)
    zero = TOLERANCE * norm
    return Spectrum(
        norm=norm,
        asymmetry=float(torch.linalg.matrix_norm(matrix - matrix.mT)) / frobenius if frobenius else 0.0,
        smallest_form=float(forms[0]),
        negative_forms=int((forms < -zero).sum()),
        smallest_real=float(values.real.min()),
        negative_reals=int((values.real < -zero).sum()),
        largest_imaginary=float(values.imag.abs().max()),
    )
