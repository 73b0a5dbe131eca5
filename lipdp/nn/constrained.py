"""What every layer with a constrained weight shares: the matrix its weight is, and the projection after a step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lipdp.constraints import Constraint, Frobenius
from lipdp.errors import ParameterError


class Constrained(nn.Module):
    r"""Mixin of a layer that computes :math:`y = \alpha W x + b` with W in a `Constraint` and b in a ball.

    The weight is a plain `nn.Parameter`: nothing is reparametrised and no buffer is kept, so the same object trains
    under lipdp, under Opacus and without privacy. `project_` is called by the engine after the optimiser's step, where
    it is post-processing.

    Attributes:
        constraint: the set W is projected on.
        scale: α, a constant.
        bias_radius: radius of the ball b is projected on.
    """

    constraint: Constraint
    scale: float
    bias_radius: float
    weight: Tensor
    bias: Any

    def weight_matrix(self) -> Tensor:
        """A view of the weight as the stack of matrices the constraint speaks of: (groups, rows, columns)."""
        return self.weight.view(1, self.weight.shape[0], -1)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Sample the weight from its constraint; zero the bias."""
        constraint = getattr(self, "constraint", None)
        if constraint is None:  # called by torch's constructor, before the constraint is known
            return
        matrix = self.weight_matrix()
        matrix.copy_(constraint.sample(*matrix.shape, dtype=matrix.dtype, device=matrix.device))
        if self.bias is not None:
            self.bias.zero_()

    @torch.no_grad()
    def project_(self) -> None:
        """Put the trainable weight and bias back in their sets, in place."""
        if self.weight.requires_grad:
            matrix = self.weight_matrix()
            matrix.copy_(self.constraint.project(matrix))
        if self.bias is not None and self.bias.requires_grad:
            self.bias.copy_(Frobenius(self.bias_radius).project(self.bias.view(1, -1)).view(-1))


def project_(model: nn.Module) -> None:
    """Project every constrained layer of the model in place (post-processing: costs no privacy).

    >>> layer = lipdp.nn.SpectralLinear(4, 3)
    >>> _ = layer.weight.data.mul_(10)
    >>> lipdp.nn.project_(layer)
    >>> layer.constraint.contains(layer.weight)
    True
    """
    for module in model.modules():
        if isinstance(module, Constrained):
            module.project_()


def check_positive(name: str, value: float) -> float:
    """`value` if it is a positive finite number, else a `ParameterError` that names it."""
    if not 0 < value < float("inf"):
        raise ParameterError(f"{name} is a positive finite number, got {value}")
    return float(value)
