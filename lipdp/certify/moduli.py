"""How far a sample can move behind a map when it moves by at most r in front of it: certified moduli of continuity.

A modulus states, for a map f and sample i, a non-decreasing ω_i with

    ‖f(x') − f(x_i)‖ ≤ ω_i(r)   for every x' with ‖x' − x_i‖ ≤ r,

and its inverse ρ ↦ sup{r : ω_i(r) ≤ ρ}. Both compose along a chain of maps, the inverse from last to first, so that a
margin at the logits becomes a radius in the raw input. A Lipschitz constant is one modulus; a projection on a ball and
a normalisation have much better ones at samples they shorten.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


class Modulus(ABC):
    """One map's modulus at each of N samples; radii are (N,) float64, negative where a budget is overdrawn."""

    @abstractmethod
    def after(self, before: Tensor) -> Tensor:
        """ω(r): the largest move behind the map for a move of at most r in front of it."""

    @abstractmethod
    def before(self, after: Tensor) -> Tensor:
        """The largest r with ω(r) ≤ ρ, never negative."""


def sample_norms(x: Tensor) -> Tensor:
    """(N,) float64 on the CPU: the norm of every sample of (N, …)."""
    return torch.linalg.vector_norm(x.double().flatten(1), dim=1).cpu()


def push(moduli: Sequence[Modulus], before: Tensor) -> Tensor:
    """The move behind a chain of maps."""
    for modulus in moduli:
        before = modulus.after(before)
    return before


def pull(moduli: Sequence[Modulus], after: Tensor) -> Tensor:
    """The radius in front of a chain of maps for a radius behind it."""
    for modulus in reversed(moduli):
        after = modulus.before(after)
    return after


@dataclass(frozen=True)
class Lipschitz(Modulus):
    """ω(r) = K r + e: a K-Lipschitz map whose two computed values are each off by e/2 at most."""

    constant: float
    rounding: float | Tensor = 0.0

    def after(self, before: Tensor) -> Tensor:
        return (self.constant * before if self.constant > 0 else torch.zeros_like(before)) + self.rounding

    def before(self, after: Tensor) -> Tensor:
        left = (after - self.rounding).clamp_min(0.0)
        return left / self.constant if self.constant > 0 else torch.where(left > 0, torch.inf, 0.0)


@dataclass(frozen=True)
class Confined(Modulus):
    """The identity, for moves of at most `limit`: what follows was bounded for those alone."""

    limit: Tensor

    def after(self, before: Tensor) -> Tensor:
        return torch.where(before <= self.limit, before, torch.inf)

    def before(self, after: Tensor) -> Tensor:
        return torch.minimum(after, self.limit).clamp_min(0.0)


@dataclass(frozen=True)
class Projection(Modulus):
    """The exact modulus of P(x) = x min(1, c/‖x‖), the projection on the ball of radius c, at a point of norm a.

    **a ≤ c.** P is 1-Lipschitz and the identity at x, so ω(r) = r.

    **a > c.** Px = c e with x = a e. Let x' be a nearest point to x among those with ‖Px' − Px‖ ≥ ρ, and θ the angle
    between x' and x. Write θ_ρ for the angle with 2c sin(θ_ρ/2) = ρ, that is cos θ_ρ = 1 − ρ²/(2c²).

    - x' inside the ball, P x' = x': on the circle ‖x' − ce‖ = s ≥ ρ, ‖x' − ae‖² = (a−c)² + s² − 2(a−c)⟨x' − ce, e⟩
      falls with ⟨x', e⟩, which is largest where the circle leaves the ball, so x' lies on the sphere too.
    - x' on or outside the sphere, ‖Px' − Px‖ = 2c sin(θ/2): θ ≥ θ_ρ. Of the points of a ray at angle θ that are not in
      the ball, the nearest to x is the foot of the perpendicular, at distance a sin θ, if that foot is outside,
      a cos θ ≥ c, and else the point c of the ray, at distance √(a² + c² − 2ac cos θ); both grow with θ, so θ = θ_ρ.

    Hence the distance, with cos θ_ρ put in, is

        R(ρ) = (a/c) ρ √(1 − ρ²/(4c²))       if a (1 − ρ²/(2c²)) ≥ c,
        R(ρ) = √((a−c)² + (a/c) ρ²)          else, for ρ ≤ 2c; ∞ for ρ > 2c: two points of the ball are 2c apart.

    R is the inverse of ω, continuous, R(ρ) ≥ ρ, and grows with a, so that a lower bound of the norm may be given for a.
    In two dimensions or more both are attained. (The bound 2c/(‖x‖ + ‖x'‖) on how a segment is lengthened gives the
    smaller 2aρ/(2c + ρ), and less than the global constant 1 does where a is near c.)

    Attributes:
        bound: c > 0.
        norms: a, (N,) float64, lower bounds.

    Source: elementary geometry, given here; for the segment bound Dunkl & Williams (1964).
    """

    bound: float
    norms: Tensor

    def before(self, after: Tensor) -> Tensor:
        c, a = self.bound, self.norms.clamp_min(self.bound)
        rho = after.clamp_min(0.0)
        share = (rho / (2 * c)) ** 2
        foot = a / c * rho * (1 - share).clamp_min(0.0).sqrt()
        corner = ((a - c) ** 2 + a / c * rho**2).sqrt()
        radius = torch.where(a * (1 - 2 * share) >= c, foot, corner)
        return torch.where(rho > 2 * c, torch.inf, radius)

    def after(self, before: Tensor) -> Tensor:
        c, a = self.bound, self.norms.clamp_min(self.bound)
        r = before.clamp_min(0.0)
        share = (r / a).clamp(max=1.0) ** 2
        foot = c * (2 * share / (1 + (1 - share).sqrt())).sqrt()  # 2c sin(½ arcsin(r/a))
        corner = ((r**2 - (a - c) ** 2).clamp_min(0.0) * (c / a)).sqrt()
        return torch.where(r**2 <= a**2 - c**2, foot, corner).clamp(max=2 * c)


@dataclass(frozen=True)
class GroupNormalisation(Modulus):
    """The modulus of (z_g − mean)/√(var + ε) in each of G groups of n entries, at a sample.

    With v = z_g − mean, an orthogonal projection of z_g, a group's output is √n v/√(‖v‖² + nε): √n times the first
    entries of w/‖w‖, w = (v, √(nε)), and w moves no further than z_g. Its norm at the sample is a_g. A move of d < a_g
    turns w by an angle θ ≤ arcsin(d/a_g), so the output moves by at most √n 2 sin(θ/2), whose square is φ_g(d²),

        φ_g(t) = 2n (1 − √(1 − t/a_g²)),

    convex on [0, a_g²], zero at 0, and smaller for larger a_g. Over all groups, Σ d_g² ≤ r² < a², a = min a_g, gives
    Σ φ_g(d_g²) ≤ Σ φ_a(d_g²) ≤ φ_a(r²) (convex and zero at zero: superadditive): the worst is to move the flattest
    group alone. For r ≥ a the bound is that of two outputs of norm √(nG) each. Hence with s = ρ/√n

        ω(r) = √n √(2 − 2√(1 − r²/a²)),      R(ρ) = a s √(1 − s²/4) for s ≤ √2, a for √2 < s ≤ 2√G.

    Attributes:
        entries, groups: n and G.
        norms: a, (N,) float64, lower bounds.

    Source: derived here.
    """

    entries: int
    groups: int
    norms: Tensor

    def before(self, after: Tensor) -> Tensor:
        s = after.clamp_min(0.0) / self.entries**0.5
        turned = self.norms * s * (1 - s**2 / 4).clamp_min(0.0).sqrt()
        radius = torch.where(s <= 2**0.5, turned, self.norms)
        return torch.where(s > 2 * self.groups**0.5, torch.inf, radius)

    def after(self, before: Tensor) -> Tensor:
        share = (before.clamp_min(0.0) / self.norms) ** 2
        turned = (2 * share / (1 + (1 - share).clamp_min(0.0).sqrt())).sqrt()
        return self.entries**0.5 * torch.where(share < 1, turned, 2 * self.groups**0.5)
