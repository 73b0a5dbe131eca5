"""A test case to inherit from: implement `make_layer` and `input_shape`, and a layer is put through every check."""

from __future__ import annotations

import copy
import io
import math
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn

from lipdp.bounds import BoundGraph
from lipdp.errors import BoundViolation, UnsupportedLayerError
from lipdp.nn.constrained import Constrained
from lipdp.testing.falsify import falsify_layer
from lipdp.testing.inputs import starting_inputs
from lipdp.testing.report import Report


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise BoundViolation(message)


class LayerTestCase(ABC):
    """Everything a layer owes the library, as tests that pytest (or anything that calls `test_*`) runs.

    Implement `make_layer` and `input_shape`. The class attributes below say what does not apply.

    Attributes:
        radius: bound of the input norm in the attacks (and 30 times it, for all settings of the weights but the first).
        tight: the least ratio an attack must reach on every parameter and on the Lipschitz constant; 0: not checked.
        gates_gradients: the backward pass is not the derivative of the forward pass (a gate), on purpose.
        weights: settings of the weights that are attacked.
        effort: options of `falsify` for the attack in float64; the others repeat it with less.

    >>> class TestHalf(LayerTestCase):
    ...     input_shape = (4,)
    ...     def make_layer(self):
    ...         return torch.nn.ReLU()
    >>> TestHalf().run()
    """

    input_shape: ClassVar[tuple[int, ...]]
    radius: ClassVar[float] = 1.0
    tight: ClassVar[float] = 0.0
    gates_gradients: ClassVar[bool] = False
    weights: ClassVar[tuple[str, ...]] = ("given", "constant")
    effort: ClassVar[dict[str, int]] = {"starts": 4, "climbs": 2, "steps": 8}

    @abstractmethod
    def make_layer(self) -> nn.Module:
        """A new layer, in float32."""

    def run(self) -> None:
        """Every check, one after the other."""
        for name in dir(self):
            if name.startswith("test_"):
                getattr(self, name)()

    # -- helpers -------------------------------------------------------------------------------------------------------

    def _layer(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        return self.make_layer().to(dtype)

    def _batch(self, count: int, dtype: torch.dtype = torch.float64) -> Tensor:
        generator = torch.Generator().manual_seed(count)
        return torch.randn(count, *self.input_shape, generator=generator, dtype=torch.float64).to(dtype)

    def _gradients(self, layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Output, input gradient and parameter gradients of a fixed linear function of every sample's output."""
        torch.manual_seed(0)
        x = x.detach().clone().requires_grad_()
        parameters = [p for p in layer.parameters() if p.requires_grad]
        out = layer(x)
        rows = out.flatten(1) if out.dim() > 1 else out.unsqueeze(1)
        total = (rows * torch.linspace(-1, 1, rows.shape[1], dtype=rows.dtype)).sum()
        grads = torch.autograd.grad(total, [x, *parameters], allow_unused=True)
        filled = [torch.zeros_like(t) if g is None else g for t, g in zip([x, *parameters], grads, strict=True)]
        return out.detach(), filled[0], filled[1:]

    def _attack(self, dtype: torch.dtype, **options: object) -> Report:
        settings = {"radius": self.radius, "starts": 2, "climbs": 1, "steps": 3, **options}
        return falsify_layer(self.make_layer(), self.input_shape, dtype=dtype, **settings)  # type: ignore[arg-type]

    # -- the bounds ----------------------------------------------------------------------------------------------------

    def test_bounds_hold_in_float64(self) -> None:
        """Parameters, value, cotangent, Lipschitz constant, batch difference: several weights, two input norms."""
        first, *others = self.weights
        report = self._attack(torch.float64, weights=(first,), **self.effort)
        if others:
            far = self._attack(torch.float64, weights=tuple(others), radius=30 * self.radius, **self.effort)
            report = report.merged(far)
        if self.tight:
            single = {
                q: f.ratio for q, f in report.findings.items() if q.startswith(("gradient of", "Lipschitz constant (g"))
            }
            loose = {q: ratio for q, ratio in single.items() if ratio < self.tight}
            _require(not loose, f"the bound is looser than {self.tight}: {loose}")

    def test_bounds_hold_in_float32(self) -> None:
        """The same with the rounding of float32."""
        self._attack(torch.float32, weights=("scaled",))

    def test_bounds_hold_under_autocast(self) -> None:
        """The same with a forward pass in bfloat16, unless the rule refuses that: its layer sums in low precision."""
        try:
            self._attack(torch.float32, weights=("given",), forward_dtype=torch.bfloat16)
        except UnsupportedLayerError:
            return

    def test_bounds_are_finite_and_for_trainable_parameters_only(self) -> None:
        """In both modes alike; `requires_grad_(False)` takes a parameter out and changes nothing else."""
        layer = self._layer()
        graph = BoundGraph(layer, self.input_shape, input_bound=self.radius)
        sweep, trainable = graph.sweep(1.0), {n for n, p in layer.named_parameters() if p.requires_grad}
        _require(set(sweep.parameters) == trainable, f"bounds for {set(sweep.parameters)}, parameters {trainable}")
        _require(all(math.isfinite(float(d)) for d in sweep.parameters.values()), f"not finite: {sweep.parameters}")
        layer.eval()
        _require(graph.sweep(1.0).parameters == sweep.parameters, "the bounds depend on the mode")
        layer.requires_grad_(False)
        frozen = graph.sweep(1.0)
        _require(not frozen.parameters, f"bounds of frozen parameters: {dict(frozen.parameters)}")
        _require(bool(frozen.lipschitz == sweep.lipschitz), "freezing changed the Lipschitz constant")

    # -- samples -------------------------------------------------------------------------------------------------------

    def test_samples_stay_apart(self) -> None:
        """Changing one sample changes no other output and no other gradient."""
        layer, x = self._layer(), self._batch(5)
        moved = x.clone()
        moved[2] = 3 * moved[2].flip(-1) + 1
        rest = [0, 1, 3, 4]
        for mode in (True, False):
            first, second = self._gradients(layer.train(mode), x), self._gradients(layer, moved)
            for what, a, b in zip(("output", "gradient"), first[:2], second[:2], strict=True):
                _require(torch.allclose(a[rest], b[rest], atol=1e-10), f"a sample changed the {what} of others")

    def test_a_batch_is_its_samples(self) -> None:
        """A batch computes what its samples compute one by one, and sums their gradients."""
        layer, x = self._layer().eval(), self._batch(3)
        out, _, grads = self._gradients(layer, x)
        alone = [self._gradients(layer, x[i : i + 1]) for i in range(3)]
        _require(torch.allclose(out, torch.cat([a[0] for a in alone]), atol=1e-10), "outputs depend on the batch")
        for k, whole in enumerate(grads):
            total = sum(a[2][k] for a in alone)
            _require(
                torch.allclose(whole, torch.as_tensor(total), atol=1e-9), "the batch gradient is no sum over samples"
            )

    def test_vmap_computes_the_same(self) -> None:
        """`torch.func` sees the per-sample gradients of autograd (custom backward passes must agree under vmap)."""
        layer, x = self._layer().eval(), self._batch(3)
        named: dict[str, Tensor] = {n: p for n, p in layer.named_parameters() if p.requires_grad}

        def total(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
            out = torch.func.functional_call(layer, parameters, (x.unsqueeze(0),)).reshape(-1)
            return (out * torch.linspace(-1, 1, len(out), dtype=out.dtype)).sum()

        by_vmap, inputs = torch.func.vmap(torch.func.grad(total, argnums=(0, 1)), in_dims=(None, 0))(named, x)
        _, expected, grads = self._gradients(layer, x)
        _require(torch.allclose(inputs, expected, atol=1e-10), "vmap disagrees on the input gradient")
        for (name, _), grad in zip(named.items(), grads, strict=True):
            _require(torch.allclose(by_vmap[name].sum(0), grad, atol=1e-9), f"vmap disagrees on the gradient of {name}")

    def test_an_empty_batch_works(self) -> None:
        """An empty Poisson batch goes forwards and backwards, with gradient zero."""
        layer = self._layer()
        expected = layer.eval()(self._batch(1)).shape[1:]
        out, _, grads = self._gradients(layer.train(), self._batch(0))
        _require(out.shape == (0, *expected), f"an empty batch gives {tuple(out.shape)}, not {(0, *expected)}")
        _require(all(not g.any() for g in grads), "an empty batch has a gradient")

    # -- numbers -------------------------------------------------------------------------------------------------------

    def test_gradients_are_right(self) -> None:
        """The backward pass is the derivative of the forward pass (finite differences)."""
        if self.gates_gradients:
            return
        layer, x = self._layer().eval(), self._batch(2).requires_grad_()
        named = {n: p.detach().clone().requires_grad_() for n, p in layer.named_parameters()}

        def forward(x: Tensor, *parameters: Tensor) -> Tensor:
            return torch.func.functional_call(layer, dict(zip(named, parameters, strict=True)), (x,))

        torch.autograd.gradcheck(forward, (x, *named.values()), atol=1e-6, rtol=1e-4)

    def test_every_input_gives_finite_gradients(self) -> None:
        """Zeros, ties, tiny and huge inputs: no NaN, forwards or backwards."""
        layer = self._layer(torch.float32)
        generator = torch.Generator().manual_seed(0)
        inputs = torch.stack(list(starting_inputs(self.input_shape, 1.0, random=1, generator=generator).values()))
        for scale in (1e-30, 1e-21, 1e-12, 1.0, 1e6):
            out, by_input, by_parameters = self._gradients(layer, (inputs * scale).float())
            finite = all(bool(t.isfinite().all()) for t in (out, by_input, *by_parameters))
            _require(finite, f"an input of norm {scale:g} gives NaN or infinity")

    def test_dtype_moves_with_the_layer(self) -> None:
        """`.to(dtype)` is enough."""
        for dtype in (torch.float32, torch.float64):
            _require(self._layer(dtype)(self._batch(2, dtype)).dtype == dtype, f"the output is not {dtype}")

    def test_state_is_in_the_state_dict(self) -> None:
        """A copy, and a fresh layer with the saved state, compute the same; saving needs no pickle of code."""
        layer, x = self._layer().eval(), self._batch(2)
        file = io.BytesIO()
        torch.save(layer.state_dict(), file)
        file.seek(0)
        other = self._layer().eval()
        other.load_state_dict(torch.load(file, weights_only=True))
        for same in (other, copy.deepcopy(layer)):
            _require(torch.equal(same(x), layer(x)), "a copy computes something else")

    # -- constraints ---------------------------------------------------------------------------------------------------

    def _constrained(self, dtype: torch.dtype = torch.float64) -> list[Constrained]:
        return [m for m in self._layer(dtype).modules() if isinstance(m, Constrained)]

    def test_weights_begin_inside_their_constraint(self) -> None:
        """At initialisation."""
        for module in self._constrained(torch.float32):
            _require(module.constraint.contains(module.weight_matrix()), "the initial weight is outside its constraint")

    def test_projection_reaches_the_constraint_and_stays(self) -> None:
        """After a step of noise, `project_` brings weight and bias back, and a second time changes nothing."""
        generator = torch.Generator().manual_seed(0)
        for module in self._constrained():
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
            module.project_()
            once = [p.detach().clone() for p in module.parameters()]
            _require(module.constraint.contains(module.weight_matrix()), "a projected weight is outside its constraint")
            if module.bias is not None:
                _require(bool(module.bias.norm() <= module.bias_radius * (1 + 1e-6)), "a projected bias is too long")
            module.project_()
            for parameter, before in zip(module.parameters(), once, strict=True):
                _require(torch.allclose(parameter, before, atol=1e-9), "the projection is not idempotent")

    def test_norm_bound_is_certified(self) -> None:
        """Never below the largest singular value."""
        for module in self._constrained():
            for factor in (1.0, 1e-3, 1e3):
                matrix = module.weight_matrix().detach() * factor
                true = torch.linalg.svdvals(matrix)[..., 0]
                _require(bool((module.constraint.norm_bound(matrix) >= true).all()), "norm_bound is below the norm")
