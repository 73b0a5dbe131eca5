"""The kernel is the Jacobian's, the flow is the kernel's, and each published property is shown true or shown false."""

import contextlib
import io
import math
import re
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lipdp
from lipdp.comparison.dynamics import (
    Flat,
    GlobalFlat,
    GlobalPerLayer,
    PerLayer,
    Unclipped,
    gradient_flow,
    markdown,
    published_table,
)
from lipdp.comparison.kernel import Ntk, ntk, spectrum
from lipdp.errors import LossError, NonFiniteError, ParameterError, UnsupportedLayerError

pytestmark = pytest.mark.usefixtures("one_thread")

F64 = torch.float64
CE = lipdp.losses.TauCrossEntropy()


def squared(outputs, target):
    return (outputs[:, 0] - target).square() / 2


def digits(n):
    split = lipdp.data.load("digits")
    return split.train_x[:n].double(), split.train_y[:n].clone()


def zoo(name, *, twin=True, **options):
    return lipdp.models.build(name, input_shape=(1, 8, 8), num_classes=10, twin=twin, **options).double()


def separate_gradients(model, x, y, loss):
    """g_{i,r} by plain autograd, one sample at a time: a list over r of (n, d_r)."""
    rows = [
        torch.autograd.grad(loss(model(x[i : i + 1]), y[i : i + 1]).sum(), list(model.parameters()))
        for i in range(len(x))
    ]
    return [torch.stack([row[r].flatten() for row in rows]) for r in range(len(rows[0]))]


# ------------------------------------------------------------------------------------------------- kernel and factors


@pytest.mark.parametrize(("name", "twin"), [("mlp", True), ("cnn", True), ("cnn", False), ("mixer", True)])
def test_kernel_is_that_of_the_jacobian(name, twin):
    model, (x, _) = zoo(name, twin=twin, bias=True), digits(3)
    kernel = ntk(model, x)
    assert list(kernel.blocks) == [name for name, _ in model.named_parameters()]
    outputs = model(x).flatten()
    rows = [torch.autograd.grad(value, list(model.parameters()), retain_graph=True) for value in outputs]
    for r, block in enumerate(kernel.blocks.values()):
        jacobian = torch.stack([row[r].flatten() for row in rows])
        torch.testing.assert_close(block, jacobian @ jacobian.mT)
    torch.testing.assert_close(kernel.total, sum(kernel.blocks.values()))


def test_norms_from_the_kernel_are_those_of_the_gradients():
    model, (x, y) = zoo("cnn", bias=True), digits(5)
    logits = model(x).detach().requires_grad_()
    (cotangents,) = torch.autograd.grad(CE(logits, y).sum(), logits)
    expected = torch.stack([g.norm(dim=1) for g in separate_gradients(model, x, y, CE)], 1)
    torch.testing.assert_close(ntk(model, x).gradient_norms(cotangents), expected)


norms_strategy = st.lists(
    st.lists(st.floats(0, 1e3), min_size=3, max_size=3), min_size=1, max_size=6
).map(lambda rows: torch.tensor(rows, dtype=F64))  # fmt: skip
positive = st.floats(1e-2, 1e2)


@settings(deadline=None)
@given(norms=norms_strategy, bound=positive, ratio=st.floats(1, 50))
def test_factors_keep_every_gradient_within_its_bound(norms, bound, ratio):
    whole, share, slack = norms.norm(dim=1), bound / math.sqrt(3), 1 + 1e-12
    flat = [Flat(bound), GlobalFlat(bound), GlobalFlat(bound, ratio * bound)]
    blocks = [PerLayer(bound), GlobalPerLayer(bound), GlobalPerLayer(bound, ratio * bound)]
    for clipping in [*flat, *blocks]:
        factors = clipping.factors(norms)
        assert factors.shape == norms.shape
        assert bool(((factors >= 0) & (factors <= 1)).all())
        assert bool(((factors * norms).norm(dim=1) <= bound * slack).all()), clipping
    for clipping in blocks:
        assert bool((clipping.factors(norms) * norms <= share * slack).all())
    torch.testing.assert_close(Flat(bound).factors(norms)[:, 0], (bound / whole).clamp(max=1))  # no more than needed
    torch.testing.assert_close(PerLayer(bound).factors(norms), (share / norms).clamp(max=1))
    assert torch.equal(GlobalFlat(bound, ratio * bound).factors(norms)[:, 0] > 0, whole <= ratio * bound)
    assert torch.equal(GlobalFlat(bound, bound).factors(norms), GlobalFlat(bound).factors(norms))


CLIPPINGS = [
    Unclipped(),
    Flat(0.8),
    PerLayer(0.8),
    PerLayer((0.1, 0.2, 0.3)),
    GlobalFlat(0.8, 9.0),
    GlobalFlat(1.4),
    GlobalPerLayer(0.8, 9.0),
    GlobalPerLayer((0.7, 0.9, 0.7), (0.9, 0.95, 0.9)),
]


@pytest.mark.parametrize("clipping", CLIPPINGS, ids=repr)
def test_matrix_and_flow_agree_with_gradients_clipped_one_by_one(clipping):
    """Three routes to dL/dt: −uᵀMu/n², the flow's own rate, and a finite difference along the clipped gradients."""
    model, (x, y) = zoo("mlp", width=8), digits(12)
    kernel = ntk(model, x)
    logits = model(x).detach().requires_grad_()
    (u,) = torch.autograd.grad(CE(logits, y).sum(), logits)
    matrix = kernel.flow_matrix(clipping.factors(kernel.gradient_norms(u)))
    flow = gradient_flow(model, x, y, loss=CE, clipping=clipping, step_size=1e-6, steps=1)

    gradients = separate_gradients(model, x, y, CE)
    factors = clipping.factors(torch.stack([g.norm(dim=1) for g in gradients], 1))
    start = float(CE(model(x), y).mean().detach())
    with torch.no_grad():
        for r, parameter in enumerate(model.parameters()):
            parameter -= 1e-6 * (factors[:, r : r + 1] * gradients[r]).mean(0).view_as(parameter)
        end = float(CE(model(x), y).mean())

    rate = float(flow.rates[0])
    assert rate == pytest.approx(float(-(u.flatten() @ matrix @ u.flatten())) / 12**2, rel=1e-9)
    assert rate == pytest.approx((end - start) / 1e-6, rel=1e-3)
    assert flow.losses.tolist() == pytest.approx([start, end], rel=1e-12)
    for (name, _), parameter in zip(model.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(flow.parameters[name], parameter.detach())


# ---------------------------------------------------------------------------------------- what holds, and what does not


def random_kernel(seed, *, samples=4, outputs=2, blocks=3, rank=3):
    generator = torch.Generator().manual_seed(seed)
    jacobians = torch.randn(blocks, samples * outputs, rank, generator=generator, dtype=F64)
    return Ntk({str(r): j @ j.mT for r, j in enumerate(jacobians)}, samples, outputs), generator


@settings(deadline=None)
@given(seed=st.integers(0, 10**6))
def test_factors_common_to_the_samples_are_symmetric_and_positive(seed):
    kernel, generator = random_kernel(seed)
    common = torch.rand(3, generator=generator, dtype=F64).expand(4, 3)
    report = spectrum(kernel.flow_matrix(common))
    assert report.symmetric
    assert report.positive_form
    assert report.positive_eigenvalues


@settings(deadline=None)
@given(seed=st.integers(0, 10**6))
def test_factors_common_to_the_blocks_have_a_positive_spectrum_and_no_symmetry(seed):
    kernel, generator = random_kernel(seed)
    factors = torch.rand(4, 1, generator=generator, dtype=F64)
    factors[0] = 0.01
    matrix = kernel.flow_matrix(factors.expand(4, 3))
    assert spectrum(matrix).positive_eigenvalues
    assert not spectrum(matrix).symmetric
    columns = factors.repeat_interleave(2)
    same = torch.linalg.eigvalsh(columns.sqrt()[:, None] * kernel.total * columns.sqrt())
    torch.testing.assert_close(torch.linalg.eigvals(matrix).real.sort().values, same, atol=1e-9, rtol=1e-9)


@settings(deadline=None)
@given(seed=st.integers(0, 10**6))
def test_one_dropped_sample_is_enough_to_lose_symmetry_and_positivity(seed):
    kernel, _ = random_kernel(seed)
    kept = torch.ones(4, 3, dtype=F64)
    kept[2] = 0
    matrix = kernel.flow_matrix(kept)
    report = spectrum(matrix)
    assert not report.symmetric
    assert report.negative_forms > 0
    assert report.positive_eigenvalues
    among_kept = kept[:, 0].repeat_interleave(2)[:, None] * matrix
    assert spectrum(among_kept).symmetric
    assert spectrum(among_kept).positive_form


def test_dropping_is_harmless_only_without_a_shared_kernel():
    kernel = Ntk({"w": torch.block_diag(torch.ones(2, 2), torch.ones(2, 2)).to(F64)}, 2, 2)
    report = spectrum(kernel.flow_matrix(torch.tensor([[1.0], [0.0]], dtype=F64)))
    assert report.symmetric
    assert report.positive_form


def test_per_layer_factors_can_make_an_eigenvalue_negative():
    v, w = torch.tensor([1.0, 1.0], dtype=F64), torch.tensor([1.0, 2.0], dtype=F64)
    kernel = Ntk({"v": torch.outer(v, v), "w": torch.outer(w, w)}, 2, 1)
    matrix = kernel.flow_matrix(torch.tensor([[1.0, 1.0], [1.0, 0.1]], dtype=F64))
    assert float(torch.linalg.det(matrix)) == pytest.approx(-0.8)
    report = spectrum(matrix)
    assert report.negative_reals == 1
    assert not report.positive_eigenvalues
    flat = spectrum(kernel.flow_matrix(torch.tensor([[1.0, 1.0], [0.1, 0.1]], dtype=F64)))
    assert flat.positive_eigenvalues


@pytest.mark.parametrize(
    ("matrix", "expected"),
    [
        ([[2.0, 1.0], [1.0, 2.0]], (True, True, True)),
        ([[1.0, 2.0], [2.0, 1.0]], (True, False, False)),
        ([[0.0, 1.0], [-1.0, 0.0]], (False, True, False)),  # a rotation: u never grows, eigenvalues ±i
        ([[1.0, 9.0], [0.0, 2.0]], (False, False, True)),
        ([[0.0, 0.0], [0.0, 0.0]], (True, True, True)),
    ],
)
def test_spectrum_of_known_matrices(matrix, expected):
    report = spectrum(torch.tensor(matrix, dtype=F64))
    assert (report.symmetric, report.positive_form, report.positive_eigenvalues) == expected


# ------------------------------------------------------------------------------------------------------------- the flow

ONES, OUTLIER = torch.ones(4, 1, dtype=F64), torch.tensor([0.0, 0.0, 0.0, 10.0], dtype=F64)


def follow(clipping, *, start, steps=400):
    """Fit one number to (0, 0, 0, 10) from `start`: the mean loss is least at 2.5."""
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(model.weight, start)
    flow = gradient_flow(model, ONES, OUTLIER, loss=squared, clipping=clipping, step_size=0.1, steps=steps)
    return flow, float(flow.parameters["weight"])


def test_flat_clipping_ends_above_where_it_began():
    """It weighs the outlier no more than the others: the clipped sum vanishes at 3 w = 1/2, at a larger loss."""
    flow, end = follow(Flat(0.5), start=2.0)
    assert end == pytest.approx(1 / 6, abs=1e-6)
    assert float(flow.rates[0]) == pytest.approx(-(2.0 - 2.5) * (3 - 1) * 0.5 / 4)  # −L'(2) · mean clipped gradient
    assert float(flow.losses[-1]) > float(flow.losses[0]) + 1
    assert bool((flow.losses.diff()[:100] > 0).all())
    assert not flow.monotone


def test_global_clipping_that_drops_a_sample_raises_the_loss_too():
    flow, end = follow(GlobalFlat(0.5, 5.0), start=2.0, steps=800)
    assert float(flow.kept.max()) == 0.75
    assert end == pytest.approx(0, abs=1e-2)  # the mean of those kept
    assert not flow.monotone
    assert float(flow.losses[-1]) > float(flow.losses[0]) + 1


@pytest.mark.parametrize("clipping", [Unclipped(), GlobalFlat(5.0, 20.0), GlobalPerLayer(5.0, 20.0), GlobalFlat(20.0)])
def test_global_clipping_that_keeps_all_is_monotone_and_finds_the_minimum(clipping):
    flow, end = follow(clipping, start=2.0)
    assert bool((flow.kept == 1).all())
    assert end == pytest.approx(2.5, abs=1e-3)
    assert bool((flow.losses.diff() <= 1e-14).all())
    assert flow.monotone
    assert flow.largest_rise <= 1e-14


class TwoBlocks(nn.Module):
    """One weight all samples share, and one for each sample."""

    def __init__(self):
        super().__init__()
        self.shared, self.own = nn.Linear(1, 1, bias=False), nn.Linear(3, 1, bias=False)
        nn.init.zeros_(self.shared.weight)
        nn.init.zeros_(self.own.weight)

    def forward(self, x):
        return self.shared(x[:, :1]) + self.own(x[:, 1:])


def test_per_layer_clipping_raises_a_loss_that_flat_clipping_lowers():
    """All whole gradients have norm 5, so flat factors are common to the samples and the loss falls, whatever C is. In
    the shared block the gradients are −4, 1.5, 1.5: their sum is −1, and clipped to norm 1 it is +1."""
    shared = torch.tensor([-4.0, 1.5, 1.5], dtype=F64)
    own = (25 - shared.square()).sqrt()
    x = torch.cat([shared[:, None], own.diag()], 1)
    y = torch.full((3,), -1.0, dtype=F64)  # u = f − y = 1
    for bound in (0.01, 0.1, 1.0, 4.99, 10.0):
        flat = gradient_flow(TwoBlocks(), x, y, loss=squared, clipping=Flat(bound), step_size=1e-3, steps=1)
        assert float(flat.rates[0]) < 0
    flow = gradient_flow(TwoBlocks(), x, y, loss=squared, clipping=PerLayer((1.0, 0.01)), step_size=1e-3, steps=20)
    assert float(flow.rates[0]) == pytest.approx((1 - 0.01 * float(own.sum())) / 9)
    assert bool((flow.losses.diff() > 0).all())
    assert not flow.monotone


# ------------------------------------------------------------------------------------------------- the table, on digits


PAGE = (Path(__file__).parent.parent / "docs" / "dynamics.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """The example of the page: a narrow network, fitted to digits of which every eighth has a wrong label."""
    names = {}
    with contextlib.redirect_stdout(io.StringIO()), pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("page"))
        for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
            exec(block, names)
    return names["rows"]


def test_the_page_shows_what_it_prints(table):
    """Word by word; figures of two digits may differ in the last with the machine, rounding by more."""
    shown = [line for line in PAGE.splitlines() if line.startswith("| ") and "temperature" not in line][
        : 1 + len(table)
    ]
    printed = [line for line in markdown(table).splitlines() if not line.startswith("|---")]
    number = r"-?\d+\.\d+(?:e[-+]\d+)?"
    for here, there in zip(shown, printed, strict=True):
        assert re.sub(number, "#", here) == re.sub(number, "#", there)
        figures = [[float(value) for value in re.findall(number, line)] for line in (here, there)]
        assert figures[0] == pytest.approx(figures[1], rel=0.1, abs=1e-12)


def test_the_published_table_where_nobody_is_dropped(table):
    for row in table[:5]:
        assert bool((row.flow.kept == 1).all())
        assert row.measured == row.published, row.clipping
        assert row.refuted == ()


def test_the_published_table_where_samples_are_dropped(table):
    flat, layers = table[5:]
    assert flat.refuted == ("symmetric", "positive_form", "monotone")
    assert layers.refuted == ("symmetric", "positive_form", "positive_eigenvalues", "monotone")
    for row in (flat, layers):
        assert 0.5 < float(row.flow.kept[0]) < 1
        assert row.flow.largest_rise > 1e-3


def test_all_rows_have_the_same_sensitivity_and_one_line(table):
    bound = table[1].clipping.bound
    for row in table[2:]:
        shares = row.clipping.bound
        assert (math.hypot(*shares) if isinstance(shares, tuple) else shares) == pytest.approx(bound)
    lines = markdown(table).splitlines()
    assert len(lines) == 2 + len(table)
    assert [line.count("|") for line in lines] == [8] * len(lines)
    assert [line.count("(claimed: yes)") for line in lines[2:]] == [len(row.refuted) for row in table]
    assert set(asdict(table[0].published).values()) == {True}


# ------------------------------------------------------------------------------------------------------------- refusals


def test_the_model_is_left_as_it_was():
    model = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 2))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    x, y = torch.randn(6, 2), torch.tensor([0, 1] * 3)
    published_table(model, x, y, loss=CE, steps=2)
    assert model.training
    assert model[0].weight.dtype == torch.float32
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_frozen_parameters_are_no_block():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    model[0].requires_grad_(False)
    assert list(ntk(model, torch.ones(1, 2)).blocks) == ["1.weight", "1.bias"]
    with pytest.raises(ParameterError, match="no trainable parameter"):
        ntk(model.requires_grad_(False), torch.ones(1, 2))


def test_what_has_no_kernel_is_refused():
    with pytest.raises(UnsupportedLayerError, match="1: a gate"):
        ntk(nn.Sequential(nn.Linear(2, 2), lipdp.nn.GradientGate(1.0)), torch.ones(1, 2))
    with pytest.raises(ParameterError, match="empty"):
        ntk(nn.Linear(2, 2), torch.ones(0, 2))
    with pytest.raises(NonFiniteError, match="weight"):
        ntk(nn.Linear(2, 2), torch.tensor([[math.nan, 1.0]]))
    with pytest.raises(NonFiniteError):
        spectrum(torch.tensor([[math.inf]]))


def flow_with(**changes):
    arguments = {"loss": CE, "clipping": Flat(1.0), "step_size": 0.1, "steps": 3, **changes}
    return gradient_flow(nn.Linear(2, 2), torch.eye(2), torch.tensor([0, 1]), **arguments)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"loss": nn.CrossEntropyLoss()}, LossError, "one value per"),
        ({"step_size": 0.0}, ParameterError, "step_size"),
        ({"steps": 0}, ParameterError, "steps=0"),
        ({"clipping": PerLayer((1.0, 1.0, 1.0))}, ParameterError, "3 entries for 2 parameter blocks"),
        ({"clipping": GlobalPerLayer(1.0, (2.0, 0.1))}, ParameterError, "below bound"),
        ({"step_size": 1e38, "steps": 9, "clipping": Unclipped(), "loss": squared}, NonFiniteError, "not finite"),
    ],
)
def test_flows_that_cannot_be_followed_are_refused(changes, error, message):
    with pytest.raises(error, match=message):
        flow_with(**changes)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Flat(0.0),
        lambda: Flat(math.inf),
        lambda: PerLayer((1.0, -1.0)),
        lambda: GlobalFlat(2.0, 1.0),
        lambda: GlobalPerLayer(1.0, 0.0),
    ],
)
def test_bounds_that_are_none_are_refused(make):
    with pytest.raises(ParameterError):
        make()


def test_a_share_to_drop_is_below_one():
    with pytest.raises(ParameterError, match=r"drop=1\.0"):
        published_table(nn.Linear(2, 2), torch.eye(2), torch.tensor([0, 1]), loss=CE, drop=1.0)
