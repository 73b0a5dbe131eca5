"""Attention with a Lipschitz constant: scores of projected queries and keys, so that no probability is near 1."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lipdp.constraints import Constraint, check_positive, check_size
from lipdp.errors import ParameterError
from lipdp.nn.linear import SpectralLinear


class BoundedAttention(nn.Module):
    r"""Y = P V, P = softmax(β q̂ k̂ᵀ) row by row, q̂ = q/max(‖q‖, b) and k̂ alike: β is the largest score there is.

    Dot-product attention has no Lipschitz constant: its scores grow with the square of the input. Here they lie in
    [−β, β], so every row p of P has p_i ≤ e^(2β) p_j. These rows are a polytope, whose vertices have m entries p_max
    and T − m entries e^(−2β) p_max. With ‖V‖ ≤ X over all tokens and heads (the value bound that the graph knows), T
    keys and S queries, let, for every head,

        π = e^(2β)/(e^(2β) + T − 1) ≥ p_j,    J = min(π, ½) ≥ ‖diag(p) − ppᵀ‖₂,
        ρ = max_m (m e^(4β) + T − m)/(m e^(2β) + T − m)² ≥ ‖p‖².

    - In V: ‖P‖₂ ≤ ‖P‖_F ≤ √(S ρ), as ‖p‖² is convex and so largest at a vertex. Reached by equal queries.
    - In q: dy_i = β Vᵀ(diag(p) − ppᵀ) K̂ dq̂_i = β Cov_p(v, k̂) dq̂_i, of norm ≤ β √Var_p(v) √Var_p(k̂) ‖dq̂_i‖ with
      Var_p(v) ≤ J X² and Var_p(k̂) ≤ Σ p_j ‖k̂_j‖² ≤ 1, also ≤ J (X_k/b)². No other token's query is in y_i, and
      ‖dq̂‖ ≤ ‖dq‖/b: (β/b) √J X min(1, √J X_k/b).
    - In k: dy_i = β Vᵀ(diag(p) − ppᵀ) dK̂ q̂_i, of norm ≤ β X J ‖dK̂‖ ‖q̂_i‖, and Σ_i ‖q̂_i‖² ≤ min(S, (X_q/b)²):
      (β/b) J X min(√S, X_q/b).

    For T = 2 all three are reached. A score that rounding moves is still a score in [−β, β], up to the rounding of
    float64: in it all of this is computed, whatever autocast says. These products are small beside the dense layers in
    front.

    Args:
        heads: h; the last axis is cut into h equal parts, each with its own P.
        sharpness: β > 0.
        bound: b > 0, the norm of one head's query or key of one token above which only its direction counts. Tokens
            that share a norm of 1 have about 1/√(h T) each.
    Shapes:
        queries (N, S, h d), keys (N, T, h d), values (N, T, h c), output (N, S, h c).

    >>> x = torch.ones(1, 3, 4)
    >>> BoundedAttention(heads=2, sharpness=1.0, bound=0.5)(x, x, x).shape
    torch.Size([1, 3, 4])

    Source: the problem from Kim, Papamakarios & Mnih (2021), "The Lipschitz constant of self-attention".
    """

    def __init__(self, heads: int = 1, *, sharpness: float = 0.5, bound: float = 1.0) -> None:
        super().__init__()
        check_size("heads", heads)
        self.heads = heads
        self.sharpness, self.bound = check_positive("sharpness", sharpness), check_positive("bound", bound)

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        q = F.normalize(self._split(queries), dim=-1, eps=self.bound)
        k = F.normalize(self._split(keys), dim=-1, eps=self.bound)
        weights = torch.softmax((q * self.sharpness) @ k.transpose(-1, -2), dim=-1)
        return (weights @ self._split(values)).transpose(1, 2).flatten(2).to(values.dtype)

    def _split(self, x: Tensor) -> Tensor:
        """(N, T, h d) to (N, h, T, d), in float64."""
        return x.double().unflatten(2, (self.heads, -1)).transpose(1, 2)

    def extra_repr(self) -> str:
        return f"heads={self.heads}, sharpness={self.sharpness}, bound={self.bound}"


class SpectralAttention(nn.Module):
    r"""Self-attention over tokens (N, T, d): W_o A(W_q x, W_k x, W_v x), A a `BoundedAttention`, the weights of norm 1.

    Tokens of norm ≤ X together; A's gains are a_q, a_k, a_v at value bound X. Then its Lipschitz constant is
    a_q + a_k + a_v, and for cotangents of norm ≤ G

        ‖∇_{W_o}‖ ≤ a_v X G,  ‖∇_{W_v}‖ ≤ a_v X G,  ‖∇_{W_q}‖ ≤ a_q X G,  ‖∇_{W_k}‖ ≤ a_k X G,

    each by Cauchy–Schwarz over the tokens, as in `SpectralLinear`. The graph computes all of that: this module has no
    rule of its own. The constant is above 1 (4.0 for 16 tokens, two heads, β = 0.5 and b = X/√(2T)), so average it with
    a shortcut: `Residual(SpectralAttention(…), weight=0.25)`. Without `InputBound` in front there is none.

    Args:
        width: d.
        heads: h.
        head_width: features of one head; default d/h.
        sharpness, bound: of the scores, see `BoundedAttention`.
        constraint: of the four weights, as in `SpectralLinear`.

    Raises:
        ParameterError: `heads` does not divide `width`, and there is no `head_width`.

    >>> lipdp.nn.SpectralAttention(8, heads=2, bound=0.2)(torch.zeros(2, 5, 8)).shape
    torch.Size([2, 5, 8])

    Source: Vaswani et al. (2017); `BoundedAttention` for the constant.
    """

    def __init__(
        self,
        width: int,
        heads: int = 1,
        *,
        head_width: int | None = None,
        sharpness: float = 0.5,
        bound: float = 1.0,
        constraint: Constraint | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_size("width", width)
        check_size("heads", heads)
        if head_width is None and width % heads:
            raise ParameterError(f"SpectralAttention: {heads} heads do not divide width={width}; give head_width=")
        inner = heads * (width // heads if head_width is None else head_width)

        def dense(inputs: int, outputs: int) -> SpectralLinear:
            return SpectralLinear(inputs, outputs, constraint=constraint, device=device, dtype=dtype)

        self.query, self.key, self.value = dense(width, inner), dense(width, inner), dense(width, inner)
        self.attention = BoundedAttention(heads, sharpness=sharpness, bound=bound)
        self.out = dense(inner, width)

    def forward(self, input: Tensor) -> Tensor:
        return self.out(self.attention(self.query(input), self.key(input), self.value(input)))
