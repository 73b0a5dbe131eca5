"""What every layer with a constrained weight shares: the matrix its weight is, and the projection after a step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lipdp import panels
from lipdp.constraints import BUILT_IN, Constraint, Frobenius, Orthogonal, check_positive
from lipdp.nn.sharded import is_sharded, load_unsharded_, unsharded

_SMALL = 64 * 64  # weights of a layer up to which a CPU projects equal ones as a stack
_STACK = 1 << 22  # weights in a stack: in float64, and with what is computed from them, some 200 MiB


class Constrained(nn.Module):
    """Mixin of a layer that computes y = α W x + b with W in a `Constraint` and b in a ball.

    The weight is a plain `nn.Parameter`: nothing is reparametrised and no buffer is kept, so the same object trains
    under lipdp, under Opacus and without privacy. `project_` is called by the engine after the optimiser's step, where
    it is post-processing.

    Attributes:
        constraint: the set W is projected on.
        scale: α, a constant.
        bias_radius: radius of the ball b is projected on.
        weight_gate: C, the norm that every sample's gradient of W is scaled to at most; None: no gate.
    """

    constraint: Constraint
    scale: float
    bias_radius: float
    weight_gate: float | None
    weight: Tensor
    bias: Any

    def _constrain(
        self,
        constraint: Constraint | None,
        k_coef_lip: float,
        bias_radius: float,
        *,
        overlap: int,
        weight_gate: float | None,
    ) -> None:
        """Set the attributes and sample the first weight; α = k/√m for windows that overlap m times."""
        self.constraint = constraint or Orthogonal()
        self.scale = check_positive("k_coef_lip", k_coef_lip) / math.sqrt(overlap)
        self.bias_radius = check_positive("bias_radius", bias_radius)
        self.weight_gate = None if weight_gate is None else check_positive("weight_gate", weight_gate)
        self.reset_parameters()

    @property
    def effective_gate(self) -> float | None:
        """C/α, the gate at the gradient of α W."""
        return None if self.weight_gate is None else self.weight_gate / self.scale

    def weight_matrix(self) -> Tensor:
        """The weight as the stack of matrices under the constraint: (groups, rows, columns); a view if possible."""
        return self.weight.reshape(1, self.weight.shape[0], -1)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Sample the weight from its constraint; zero the bias."""
        constraint = getattr(self, "constraint", None)
        if constraint is None:  # called by torch's constructor, before the constraint is known
            return
        matrix = self.weight_matrix()
        sampled = constraint.sample(*matrix.shape, dtype=matrix.dtype, device=matrix.device)
        self.weight.copy_(sampled.view(self.weight.shape))
        if self.bias is not None:
            self.bias.zero_()

    @torch.no_grad()
    def project_(self) -> None:
        """Put the trainable weight and bias back in their sets, in place."""
        if self.weight.requires_grad:
            matrix = self.weight_matrix()
            self.constraint.retract_(matrix)
            if matrix.data_ptr() != self.weight.data_ptr():  # channels-last kernels are no matrix in memory
                self.weight.copy_(matrix.view(self.weight.shape))
        self._project_bias_()

    def _project_bias_(self) -> None:
        if self.bias is not None and self.bias.requires_grad:
            self.bias.copy_(Frobenius(self.bias_radius).project(self.bias.view(1, -1)).view(-1))

    @torch.no_grad()
    def uncertified(self) -> dict[str, Tensor]:
        """Name → whether its radius cannot be certified, for the trainable weight and bias. No synchronisation.

        The radius is the constraint's `radius`, and 1 for one that has none, as for `Orthogonal`.
        """
        found: dict[str, Tensor] = {}
        if self.weight.requires_grad:
            found["weight"] = cannot_certify(self.weight_matrix(), getattr(self.constraint, "radius", 1.0))
        if self.bias is not None and self.bias.requires_grad:
            found["bias"] = cannot_certify(self.bias.view(1, -1), self.bias_radius)
        return found


def project_(model: nn.Module, *, batched: bool | None = None) -> None:
    """Project every constrained layer of the model in place (post-processing: costs no privacy).

    Batched, the weights of layers with equal constraints and matrices of one shape are projected as one stack: the same
    matrices up to rounding, in fewer and larger operations.

    Args:
        model: any module.
        batched: None: where it pays. On CUDA a small operation costs its launch. On a CPU stacks of matrices up to
            64 x 64 take four fifths of the time (measured on `mixer`), larger ones as long as one by one.

    >>> layer = lipdp.nn.SpectralLinear(4, 3)
    >>> _ = layer.weight.data.mul_(10)
    >>> lipdp.nn.project_(layer)
    >>> layer.constraint.contains(layer.weight)
    True
    """
    stacks: dict[Any, list[Constrained]] = {}
    for layer in (module for module in model.modules() if isinstance(module, Constrained)):
        if is_sharded(layer):  # gathered, projected and freed, one layer at a time
            gathered = unsharded(layer)
            gathered.project_()
            load_unsharded_(layer, gathered)
        elif (layer.weight.is_cuda or layer.weight.numel() <= _SMALL) if batched is None else batched:
            stacks.setdefault(_stack_key(layer), []).append(layer)
        else:
            layer.project_()
    for layers in stacks.values():
        size = max(1, _STACK // layers[0].weight.numel())
        for start in range(0, len(layers), size):
            _project_stack_(layers[start : start + size])


def _stack_key(layer: Constrained) -> Any:
    """Equal for layers whose weights can be projected as one stack; the layer itself where it goes alone."""
    own = type(layer).project_ is not Constrained.project_ or type(layer.constraint) not in BUILT_IN
    if own or not layer.weight.requires_grad:
        return layer
    return layer.constraint, layer.weight_matrix().shape[-2:], layer.weight.dtype, layer.weight.device


@torch.no_grad()
def _project_stack_(layers: Sequence[Constrained]) -> None:
    if len(layers) == 1:
        layers[0].project_()
        return
    matrices = [layer.weight_matrix() for layer in layers]
    projected = layers[0].constraint.retract(torch.cat(matrices)).split([len(m) for m in matrices])
    for layer, matrix in zip(layers, projected, strict=True):
        layer.weight.copy_(matrix.view(layer.weight.shape))
        layer._project_bias_()


def cannot_certify(matrix: Tensor, radius: float) -> Tensor:
    """Whether ‖W‖₂ ≤ r, up to rounding, *cannot* be certified: one Gram matrix and one Cholesky factor.

    ‖W‖₂ ≤ R exactly if R² I − WWᵀ is positive semidefinite, and a Cholesky factorisation that runs to its end in
    floating point proves that up to its rounding error. It costs a tenth of the projection, uses none of its
    arithmetic, and does not synchronise with a GPU.

    Guarantees: false only if ‖W‖₂ ≤ r (1 + s); never true for a W of norm ≤ r rounded to its dtype. With m ≤ n the
    sizes and ε the spacing of a dtype at 1, rounding moves W by `ε √m ‖W‖ / 2` at most, and the Gram matrix and its
    factor, in float64, err by `(n + m + 1) m ε₆₄ ‖W‖² / 2` in norm; the slack s is twice their sum.

    Returns:
        () bool, true also where an entry is not finite.

    Source: Higham (2002), theorems 10.3 and 10.7; Rump (2006), "Verification of positive definiteness".
    """
    small, large = sorted(matrix.shape[-2:])
    slack = math.sqrt(small) * torch.finfo(matrix.dtype).eps
    slack += (large + small + 1) * max(small, 1) * torch.finfo(torch.float64).eps
    limit = radius * (1 + slack)
    if panels.is_large(matrix):
        return torch.tensor(any(_is_beyond(w, limit) for w in panels.each(matrix)))
    w = matrix.double()
    return _no_factor(w @ w.mT if w.shape[-2] == small else w.mT @ w, limit)


def _is_beyond(w: Tensor, limit: float) -> bool:
    """Of one large matrix on a CPU: a Gram matrix is made only where blocks of it don't show that W is within."""
    near = panels.near_orthogonal(w)
    return (near is None or near > limit) and not panels.is_within(w, limit)


def _no_factor(gram: Tensor, limit: float) -> Tensor:
    """() bool: whether limit² I − G has no Cholesky factor; G is overwritten."""
    gram.neg_().diagonal(dim1=-2, dim2=-1).add_(limit**2)
    return torch.linalg.cholesky_ex(gram).info.any()
