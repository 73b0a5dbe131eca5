r"""What clipping does to the gradient flow: the empirical neural tangent kernel under every kind of clipping factor.

**The flow.** Stack the n·C outputs of a probe batch in f, let u = ∂(Σ_i ℓ_i)/∂f, J_r the Jacobian of f by parameter
block r and H_r = J_r J_rᵀ, H = Σ_r H_r. Sample i contributes g_{i,r} = J_{i,r}ᵀ u_i to block r. Full-batch DP gradient
descent without its noise and in the limit of small steps is ẇ_r = −(1/n) Σ_i c_{i,r} g_{i,r}, so with
C_r = diag(c_{1,r}, …, c_{n,r}) ⊗ I and the mean loss L = (1/n) Σ_i ℓ_i

    ḟ = −M u / n,   dL/dt = −uᵀ M u / n²,   M = Σ_r H_r C_r.

**What holds** (each statement is attacked in tests/test_dynamics.py):

1. *Factors common to all samples*, c_{i,r} = a_r ≥ 0 (no clipping, or global clipping that drops nobody): M = Σ_r a_r
   H_r is symmetric positive semi-definite, and dL/dt = −Σ_r a_r ‖J_rᵀ u‖² / n² ≤ 0 for every u: the loss falls
   monotonically.
2. *Factors of a sample common to all blocks*, M = H C (flat clipping, local or global): AB and BA have the same
   characteristic polynomial, so the spectrum is that of C^½ H C^½: real and ≥ 0. M is symmetric only if H_ij = 0
   wherever c_i ≠ c_j, as (HC)_ij = H_ij c_j. Its quadratic form can be negative, and the loss can rise.
3. *A dropped sample*, c_{j,r} = 0 for all r: the symmetric part (M + Mᵀ)/2 has the block 0 on its diagonal at j, and
   c_i H_ij/2 beside it where the factors are those of case 2. A positive semi-definite matrix with a zero on its
   diagonal has zeros in that whole row, so **one dropped sample whose kernel H_ij with a kept one is not zero makes M
   asymmetric and its form indefinite**: uᵀ M u < 0 for some u, at which the loss rises. The spectrum is still real and
   ≥ 0.
4. *Factors that differ by sample and by block* (per-layer clipping): nothing is left, the spectrum included. With
   H_1 = vvᵀ, v = (1, 1), C_1 = I and H_2 = wwᵀ, w = (1, 2), C_2 = diag(1, 1/10), M = (v w) (C_1 v, C_2 w)ᵀ and
   det M = det(v w) · det(C_1 v, C_2 w) = 1 · (−4/5) < 0: one eigenvalue is negative.

So what is claimed of global clipping (symmetric, positive, monotone) is case 1 and **needs every sample kept**: the
threshold Z must bound every norm, all along the flow. Otherwise it is case 3 (flat) or 4 (per layer), and only the mean
loss over the samples kept falls: with P the projection on them, P M P = (C/Z) P H P is symmetric and positive (flat).
The later definition 1(‖g_i‖ ≤ C) is the first one, (C/Z) 1(‖g_i‖ ≤ Z), at Z = C: it drops whatever C would have
clipped.

Everything is computed in float64 on a copy of the model in evaluation mode.

Source: Bu, Wang, Dai & Long (2021, 2023), "On the convergence and calibration of deep learning with differential
privacy".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from lipdp.comparison.factors import Clipping, Flat, GlobalFlat, GlobalPerLayer, PerLayer, Unclipped
from lipdp.comparison.kernel import PerSampleLoss, Probe, Spectrum, kernel_of, spectrum
from lipdp.comparison.results import markdown as table
from lipdp.constraints import check_positive
from lipdp.errors import ParameterError

# ------------------------------------------------------------------------------------------------------------- the flow


@dataclass(frozen=True)
class Flow:
    """A gradient flow under clipping, followed with Euler steps of full batches, without noise.

    Attributes:
        losses: the mean loss before each step and at the end, (steps + 1,).
        rates: dL/dt before each step, (steps,): exact there, so that its sign does not depend on the step size.
        kept: the share of samples and blocks whose factor is not zero, (steps,).
        parameters: where the flow ended.
    """

    losses: Tensor
    rates: Tensor
    kept: Tensor
    parameters: Mapping[str, Tensor]

    @property
    def largest_rise(self) -> float:
        """The most that the loss is ever above what it had been before."""
        return float((self.losses - self.losses.cummin(0).values).max())

    @property
    def monotone(self) -> bool:
        """dL/dt ≤ 0 at every point visited: what Euler's steps add of their own does not count."""
        return float(self.rates.max()) <= 0


def gradient_flow(
    model: nn.Module, x: Tensor, y: Tensor, *, loss: PerSampleLoss, clipping: Clipping, step_size: float, steps: int
) -> Flow:
    """Follow dw_r/dt = −(1/n) Σ_i c_{i,r} g_{i,r} with Euler steps, in float64, on a copy of the model.

    At each point dL/dt = −Σ_r ⟨∇_r L, (1/n) Σ_i c_{i,r} g_{i,r}⟩.

    Args:
        model: see `ntk`; it is not changed.
        x, y: the whole batch; memory for n gradients.
        loss: one value a sample.
        clipping: the factors.
        step_size: small enough that Euler's method follows the flow: well below 2 over the largest curvature.
        steps: how many.

    Raises:
        ParameterError, UnsupportedLayerError: as `ntk`; a step size or a number of steps that is not positive.
        LossError: not one loss a sample.
        NonFiniteError: the loss stopped being finite, as with a step size far too large.

    >>> flow = gradient_flow(torch.nn.Linear(1, 1), torch.ones(1, 1), torch.ones(1, 1), step_size=0.1, steps=50,
    ...                      loss=lambda f, y: (f - y).square().sum(1), clipping=Unclipped())
    >>> flow.monotone
    True
    """
    step_size = check_positive("step_size", step_size)
    if steps < 1:
        raise ParameterError(f"steps={steps}: give at least one")
    probe = Probe(model, x)
    weights = dict(probe.parameters)
    losses, rates, kept = [], [], []
    for _ in range(steps):
        values, cotangents = probe.losses(weights, y, loss)
        gradients = probe.sample_gradients(weights, cotangents)
        norms = torch.stack([torch.linalg.vector_norm(g.flatten(1), dim=1) for g in gradients.values()], 1)
        factors = clipping.factors(norms)
        rate = values.new_zeros(())
        for r, (name, g) in enumerate(gradients.items()):
            velocity = torch.einsum("i,i...->...", factors[:, r], g) / len(g)
            rate -= (velocity * g.mean(0)).sum()
            weights[name] = weights[name] - step_size * velocity
        losses.append(values.mean())
        rates.append(rate)
        kept.append((factors > 0).double().mean())
    losses.append(probe.losses(weights, y, loss)[0].mean())
    return Flow(torch.stack(losses), torch.stack(rates), torch.stack(kept), weights)


# ------------------------------------------------------------------------------------------------------------ the table


@dataclass(frozen=True)
class Claim:
    """What is said to hold at all weights and along every flow."""

    symmetric: bool
    positive_form: bool
    positive_eigenvalues: bool
    monotone: bool


PUBLISHED: Mapping[str, Claim] = {
    Unclipped.name: Claim(True, True, True, True),
    Flat.name: Claim(False, False, True, False),
    PerLayer.name: Claim(False, False, False, False),
    GlobalFlat.name: Claim(True, True, True, True),
    GlobalPerLayer.name: Claim(True, True, True, True),
}
"""By kind of clipping: table 1 of Bu et al. (2023) for none and local, what their first version claims for global."""


@dataclass(frozen=True)
class ClippingRow:
    """One kind of clipping at the weights and the batch given: what is claimed, and what was measured."""

    clipping: Clipping
    published: Claim
    spectrum: Spectrum
    flow: Flow

    @property
    def measured(self) -> Claim:
        """The same four properties, here."""
        s = self.spectrum
        return Claim(s.symmetric, s.positive_form, s.positive_eigenvalues, self.flow.monotone)

    @property
    def refuted(self) -> tuple[str, ...]:
        """Which claimed properties are false here."""
        claimed, found = asdict(self.published), asdict(self.measured)
        return tuple(name for name in claimed if claimed[name] and not found[name])


def published_table(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    loss: PerSampleLoss,
    bound: float | None = None,
    drop: float = 0.15,
    step_size: float = 0.05,
    steps: int = 200,
) -> tuple[ClippingRow, ...]:
    """The four published cases, on a model and a batch, all at the same sensitivity C, hence under the same noise.

    Seven rows: no clipping; local flat and per-layer; global flat and per-layer with thresholds twice the largest norms
    at the start, which drop nobody; and the same with thresholds that drop the share `drop` of the samples at the
    start.

    Args:
        bound: C; by default half the median norm of the per-sample gradients, so that local clipping clips most.
        drop: in (0, 1).
        Others, and errors: as `gradient_flow`.
    """
    if not 0 < drop < 1:
        raise ParameterError(f"drop={drop}: give a share of the samples, in (0, 1)")
    probe = Probe(model, x)
    kernel = kernel_of(probe)
    norms = kernel.gradient_norms(probe.losses(probe.parameters, y, loss)[1])
    whole = torch.linalg.vector_norm(norms, dim=1)
    c = check_positive("bound (half the median gradient norm by default)", bound or float(whole.median()) / 2)
    shares = norms.new_full((norms.shape[1],), c / norms.shape[1] ** 0.5)

    def thresholds(flat: Tensor, blocks: Tensor) -> tuple[Clipping, Clipping]:
        per_block = tuple(torch.maximum(blocks, shares).tolist())
        return GlobalFlat(c, max(c, float(flat))), GlobalPerLayer(tuple(shares.tolist()), per_block)

    keeping = thresholds(2 * whole.max(), 2 * norms.amax(0))
    dropping = thresholds(whole.quantile(1 - drop), norms.quantile(1 - drop, 0))
    return tuple(
        ClippingRow(
            clipping=clipping,
            published=PUBLISHED[clipping.name],
            spectrum=spectrum(kernel.flow_matrix(clipping.factors(norms))),
            flow=gradient_flow(model, x, y, loss=loss, clipping=clipping, step_size=step_size, steps=steps),
        )
        for clipping in (Unclipped(), Flat(c), PerLayer(c), *keeping, *dropping)
    )


def markdown(rows: Sequence[ClippingRow]) -> str:
    """The table as markdown: what was measured, with what is claimed in brackets where it differs."""

    def cell(row: ClippingRow, name: str, figure: str) -> str:
        found, claimed = getattr(row.measured, name), getattr(row.published, name)
        said = "" if found == claimed else " (claimed: yes)" if claimed else " (no claim)"
        return f"{'yes' if found else '**no**'}{said}, {figure}"

    header = [
        "clipping",
        "kept, least",
        "symmetric: ‖M−Mᵀ‖/‖M‖",
        "form ≥ 0: λmin/‖M‖",
        "eigenvalues real, ≥ 0: min Re, max Im /‖M‖",
        "loss monotone: largest dL/dt",
        "L from, to",
    ]
    body = []
    for row in rows:
        s, flow = row.spectrum, row.flow
        scale = s.norm or 1.0
        cells = [
            row.clipping.name,
            f"{float(flow.kept.min()):.0%}",
            cell(row, "symmetric", f"{s.asymmetry:.1e}"),
            cell(row, "positive_form", f"{s.smallest_form / scale:.1e}"),
            cell(row, "positive_eigenvalues", f"{s.smallest_real / scale:.1e}, {s.largest_imaginary / scale:.1e}"),
            cell(row, "monotone", f"{float(flow.rates.max()):.1e}"),
            f"{float(flow.losses[0]):.3f}, {float(flow.losses[-1]):.3f}",
        ]
        body.append(cells)
    return table(header, body)
