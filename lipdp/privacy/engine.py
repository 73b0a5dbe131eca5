"""The engine: a torch model, optimiser and dataset in, the same objects out, and every step private."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from lipdp.bounds import BoundGraph
from lipdp.errors import CheckpointError, EngineError, NonFiniteError, OptimizerError, ParameterError, UnknownNameError
from lipdp.losses import as_lipschitz
from lipdp.nn import project_
from lipdp.privacy.accounting import get_accountant
from lipdp.privacy.calibration import calibrate
from lipdp.privacy.criterion import PrivateCriterion, check_loss
from lipdp.privacy.events import Ledger, remaining_noise_multiplier
from lipdp.privacy.facts import PrivacyFacts
from lipdp.privacy.gate import FixedGate, QuantileGate
from lipdp.privacy.noise import Allocation, GaussianNoise, get_allocation, joint_noise_multiplier
from lipdp.privacy.sampling import BatchLoader, FixedSizeSampler, PoissonSampler, Sampler
from lipdp.relation import Relation
from lipdp.sensitivity import Sensitivity, read_sweep

_RELATIONS = {"poisson": Relation.ADD_OR_REMOVE_ONE, "fixed_size": Relation.REPLACE_ONE}


class PrivacyEngine:
    r"""Makes an ordinary training loop differentially private, without clipping.

    Each step releases :math:`(\sum_{i \in \text{batch}} \nabla_l \ell_i + Z_l)/B` for all parameters l at once, with
    Z_l ~ N(0, s_l² I) and :math:`\sum_l \Delta_l^2/s_l^2 = 1/\sigma^2`: one Gaussian mechanism of noise multiplier σ on one
    subsample. The Δ_l are recomputed at every step from the certified norms of the weights then. Noise enters in the
    optimiser's step pre-hook and the projection on the constraints in its post-hook, so no step is without noise; all
    that follows (momentum, schedules, averaging) is post-processing.

    Args:
        accountant: "prv" (default), "pld" or "rdp".
        seed: makes the draws repeatable, for tests: a seeded run is NOT private and says so.

    >>> x, y = torch.randn(64, 4), torch.randint(3, (64,))
    >>> model = torch.nn.Sequential(lipdp.nn.InputBound(1.0), lipdp.nn.SpectralLinear(4, 3))
    >>> engine = lipdp.PrivacyEngine()
    >>> model, optimizer, loader, criterion = engine.make_private(
    ...     module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
    ...     criterion=lipdp.losses.TauCrossEntropy(8.0), dataset=torch.utils.data.TensorDataset(x, y),
    ...     expected_batch_size=16, steps=3, noise_multiplier=2.0)
    >>> for xb, yb in loader:
    ...     optimizer.zero_grad(); criterion(model(xb), yb).backward(); optimizer.step()
    >>> 0 < engine.get_epsilon(delta=1e-3) < 2
    True

    Source: Béthune et al. (2024), algorithm 2; Abadi et al. (2016) for the mechanism.
    """

    def __init__(self, accountant: str = "prv", *, seed: int | None = None) -> None:
        self.accountant = get_accountant(accountant)
        self.seed = seed
        self.ledger = Ledger()
        self._run: _Run | None = None

    # -- entry ---------------------------------------------------------------------------------------------------------

    def make_private(
        self,
        *,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        criterion: nn.Module,
        dataset: Dataset[Any],
        expected_batch_size: int,
        steps: int,
        noise_multiplier: float,
        allocation: str | Allocation = "per_layer",
        sampling: str = "poisson",
        gate: float | FixedGate | QuantileGate | None = None,
        dataset_size: int | None = None,
        input_shape: tuple[int, ...] | None = None,
        forward_dtype: torch.dtype | None = None,
        num_workers: int = 0,
        pin_memory: bool = False,
        target_epsilon: float | None = None,
        target_delta: float | None = None,
    ) -> tuple[nn.Module, torch.optim.Optimizer, BatchLoader, PrivateCriterion]:
        """Attach noise and projection to the optimiser; return the same model and optimiser, a loader and a criterion.

        Args:
            module, optimizer, criterion: the user's own objects; the model and the optimiser are returned as they are.
            dataset: map-style, of (input, target) records.
            expected_batch_size: B, the divisor of the noisy sum.
            steps: T, how many batches the loader will yield; a step more is refused.
            noise_multiplier: the joint σ.
            allocation: "per_layer", "global" or "min_variance", or an object with `stds`.
            sampling: "poisson" (relation: add or remove one) or "fixed_size" (relation: replace one).
            gate: a lower cotangent gate at the logits: a number, or a `QuantileGate`.
            dataset_size: N, a public constant, from which q = B/N; by default the dataset's length, which the account
                then treats as public.
            input_shape: of one sample; by default that of record 0.
            forward_dtype: `torch.bfloat16` if the forward pass will run under autocast.
            num_workers, pin_memory: of the loader.

        Raises:
            ParameterError, UnknownNameError: an argument out of range. OptimizerError: an optimiser that is not exactly over
            the model's trainable parameters. LossError, UnboundedError, UnsupportedOperationError, …: no bound exists.
        """
        if self._run is not None:
            raise EngineError(
                "this engine already made a model private; use one PrivacyEngine per run, or detach() first"
            )
        if sampling not in _RELATIONS:
            raise UnknownNameError("sampling", sampling, _RELATIONS)
        relation = _RELATIONS[sampling]
        population = dataset_size if dataset_size is not None else _length(dataset)
        if not 0 < expected_batch_size <= population:
            raise ParameterError(f"expected_batch_size lies in 1 … N = {population}, got {expected_batch_size}")
        if relation is Relation.REPLACE_ONE and population != _length(dataset):
            raise ParameterError(
                f"dataset_size={population} but the dataset has {_length(dataset)} records: with batches of a fixed size"
                " q = B/N is exact, and N is public; leave dataset_size out"
            )
        gate = gate if isinstance(gate, (FixedGate, QuantileGate)) else FixedGate(math.inf if gate is None else gate)
        facts = PrivacyFacts(
            noise_multiplier=float(noise_multiplier),
            sampling_rate=expected_batch_size / population,
            steps=steps,
            expected_batch_size=expected_batch_size,
            dataset_size=population,
            relation=relation.value,
            sampling=sampling,
            allocation=getattr(get_allocation(allocation), "name", type(allocation).__name__),
            gate=repr(gate),
            accountant=self.accountant.name,
            target_epsilon=target_epsilon,
            target_delta=target_delta,
            seeded=self.seed is not None,
        )
        facts.step_event  # noqa: B018  (refuses a σ or q out of range)
        sampler = self._sampler(facts, _length(dataset))
        loader = BatchLoader(dataset, sampler, num_workers=num_workers, pin_memory=pin_memory)
        x, targets = _first_records(dataset)
        graph = BoundGraph(module, tuple(input_shape or x.shape[1:]), dtype=forward_dtype)
        loss = as_lipschitz(criterion)
        check_loss(loss, targets.to(graph.device), graph.num_outputs)
        private = PrivateCriterion(loss, graph, gate.start(), loader)
        self._run = _Run(self, module, optimizer, private, loader, facts, get_allocation(allocation), gate)
        return module, optimizer, loader, private

    def make_private_with_epsilon(
        self,
        *,
        target_epsilon: float,
        target_delta: float,
        dataset: Dataset[Any],
        expected_batch_size: int,
        steps: int,
        sampling: str = "poisson",
        dataset_size: int | None = None,
        **options: Any,
    ) -> tuple[nn.Module, torch.optim.Optimizer, BatchLoader, PrivateCriterion]:
        """`make_private` with the smallest σ whose ε after all steps is at most the target.

        Args:
            target_epsilon, target_delta: the budget.
            dataset, expected_batch_size, steps, sampling, dataset_size and the other options: see `make_private`.

        Raises:
            CalibrationError: no σ reaches the target; and what `make_private` raises.
        """
        if sampling not in _RELATIONS:
            raise UnknownNameError("sampling", sampling, _RELATIONS)
        population = dataset_size if dataset_size is not None else _length(dataset)
        if not 0 < expected_batch_size <= population:
            raise ParameterError(f"expected_batch_size lies in 1 … N = {population}, got {expected_batch_size}")
        sigma = calibrate(
            target_epsilon=target_epsilon,
            sampling_rate=expected_batch_size / population,
            steps=steps,
            delta=target_delta,
            accountant=self.accountant.name,
            relation=_RELATIONS[sampling],
        )
        return self.make_private(
            dataset=dataset,
            expected_batch_size=expected_batch_size,
            steps=steps,
            noise_multiplier=sigma,
            sampling=sampling,
            dataset_size=dataset_size,
            target_epsilon=target_epsilon,
            target_delta=target_delta,
            **options,
        )

    def _sampler(self, facts: PrivacyFacts, population: int) -> Sampler:
        if facts.sampling == "poisson":
            return PoissonSampler(population, sampling_rate=facts.sampling_rate, steps=facts.steps, seed=self.seed)
        return FixedSizeSampler(population, batch_size=facts.expected_batch_size, steps=facts.steps, seed=self.seed)

    # -- during and after training -------------------------------------------------------------------------------------

    def microbatches(self, x: Tensor, y: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The logical batch in pieces of at most `size`: one `backward` each, then one `optimizer.step()`, one noise draw.

        An empty batch gives one empty piece.
        """
        if size < 1:
            raise ParameterError(f"a micro-batch has at least one sample, got size={size}")
        yield from zip(x.split(size), y.split(size), strict=True)

    def get_epsilon(self, delta: float) -> float:
        """An upper bound on ε at δ for the steps taken so far, under the run's relation."""
        return self.accountant.epsilon(self.ledger.events, delta).epsilon

    @property
    def facts(self) -> PrivacyFacts:
        """What ε depends on."""
        return self._current().facts

    @property
    def steps_taken(self) -> int:
        """Noisy steps so far."""
        return self.ledger.steps

    def sensitivity(self) -> Sensitivity:
        """Δ per parameter at the weights as they are."""
        return self._current().sensitivity()

    def noise_stds(self) -> dict[str, float]:
        """Standard deviation of the noise on each parameter's *summed* gradient, at the weights as they are."""
        return self._current().noise_stds()

    def detach(self) -> None:
        """Remove the hooks: what remains is the plain torch model and optimiser."""
        self._current().detach()
        self._run = None

    def state_dict(self) -> dict[str, Any]:
        """Everything a resume needs besides model and optimiser: plain values, safe for `torch.load(weights_only=True)`."""
        return self._current().state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue a saved run, after the same `make_private`.

        Raises:
            ResumeError: a privacy fact differs. CheckpointError: not a state of an engine.
        """
        self._current().load_state_dict(state)

    def _current(self) -> _Run:
        if self._run is None:
            raise EngineError("call make_private or make_private_with_epsilon first")
        return self._run


class _Run:
    """The hooks on one optimiser, and what they need at every step."""

    def __init__(
        self,
        engine: PrivacyEngine,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        criterion: PrivateCriterion,
        loader: BatchLoader,
        facts: PrivacyFacts,
        allocation: Allocation,
        gate: FixedGate | QuantileGate,
    ) -> None:
        self.engine, self.module, self.criterion, self.loader = engine, module, criterion, loader
        self.facts, self.allocation = facts, allocation
        self.graph, self.gate = criterion._graph, criterion._gate
        _refuse_private(optimizer)
        self.names, self.parameters, self.sizes = self._trainable(optimizer)
        self.factor = Relation(facts.relation).sensitivity_factor
        # what is left for the gradient when the gate releases a count of its own on the same subsample
        others = [gate.noise_multiplier] if gate.noise_multiplier < math.inf else []
        self.gradient_multiplier = remaining_noise_multiplier(facts.noise_multiplier, *others)
        self.noise = GaussianNoise(engine.seed, device=self.graph.device)
        self.sensitivity()  # refuses what is unbounded before anything is attached
        self.before = engine.ledger.steps  # of an earlier run of this engine: they count for ε, not for this budget
        self._taken_at = loader.position
        self.gate.unused = lambda: all(p.grad is None for p in self.parameters)
        self._handles = [
            optimizer.register_step_pre_hook(self._add_noise),
            optimizer.register_step_post_hook(self._project),
        ]

    # -- bounds --------------------------------------------------------------------------------------------------------

    def _trainable(self, optimizer: torch.optim.Optimizer) -> tuple[list[str], list[nn.Parameter], Tensor]:
        """Names, parameters and sizes of what the next step releases: looked up at every step, for (un)freezing."""
        names, parameters = _matched_parameters(self.module, optimizer)
        sizes = torch.tensor([float(p.numel()) for p in parameters], dtype=torch.float64)
        return names, parameters, sizes.to(self.graph.device, non_blocking=True)

    def _start(self, output_bound: Tensor) -> Tensor:
        constant = self.criterion.loss.constant(output_bound)
        return torch.as_tensor(constant, dtype=torch.float64, device=self.graph.device).clamp(max=self.gate.bound)

    def _deltas_and_stds(self) -> tuple[Tensor, Tensor]:
        """Δ_l and s_l as float64 tensors, scaled so that the joint noise multiplier is exact whatever the allocation."""
        swept = self.graph.sweep(self._start).parameters
        deltas = torch.stack([swept[n] for n in self.names]) * self.factor
        stds = self.allocation.stds(deltas, self.sizes, self.gradient_multiplier)
        return deltas, stds * (self.gradient_multiplier / joint_noise_multiplier(deltas, stds))

    def sensitivity(self) -> Sensitivity:
        start = float(self._start(self.graph.output_bound()))
        return read_sweep(self.graph.sweep(self._start), start, Relation(self.facts.relation))

    def noise_stds(self) -> dict[str, float]:
        return dict(zip(self.names, self._deltas_and_stds()[1].tolist(), strict=True))

    # -- the two hooks -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _add_noise(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Before the step: check, account, add noise to the summed gradients, divide by the public batch size."""
        if any(a is not None for a in (*args[1:], *kwargs.values())):  # args[0] is the optimiser
            raise OptimizerError(
                "a closure re-evaluates the gradient after the noise was added; call optimizer.step() without one"
            )
        self._check_order()
        self.names, self.parameters, self.sizes = self._trainable(optimizer)
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients: list[Tensor] = [p.grad for p in self.parameters if p.grad is not None]
        deltas, stds = self._deltas_and_stds()
        self._check_gradients(gradients, deltas, stds)
        self.engine.ledger.append(self.facts.step_event)  # before the draw: a step is never under-counted
        self.noise.add_(gradients, stds)
        torch._foreach_mul_(gradients, 1.0 / self.facts.expected_batch_size)
        self.gate.release(self.noise, self.facts.expected_batch_size, self.factor)
        self._taken_at = self.loader.position

    def _project(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """After the step: weights back in their constraints (post-processing)."""
        project_(self.module)

    def _check_order(self) -> None:
        """One step per drawn batch, and each record of it at most once."""
        if self.engine.ledger.steps - self.before >= self.facts.steps:
            raise EngineError(f"all {self.facts.steps} steps of the budget are taken; a further one would exceed ε")
        batches = self.loader.position - self._taken_at
        if batches < 1:
            raise EngineError(
                "step() without a new batch from the loader: every noisy step needs its own random subsample. Take one step per"
                " batch; for parts of a batch use engine.microbatches"
            )
        first = self.engine.ledger.steps == self.before  # before it, a look at a batch is harmless
        if batches > 1 and not (first and set(self.gate.samples) <= {self.loader.position}):
            raise EngineError(
                f"{batches} batches were drawn since the last step: their gradients may have been added up, or one was skipped,"
                " which tells that it was empty. Take one step per batch, also when it is empty"
            )
        drawn, seen = self.loader.last_batch_size or 0, self.gate.samples.total()
        if seen > drawn:
            raise EngineError(
                f"the criterion saw {seen} samples since the last step but the batch has {drawn}: a record would count more"
                " than once. Evaluate the criterion once per record and step (under torch.no_grad() for metrics)"
            )
        if drawn > 0 and seen == 0:
            raise EngineError(
                f"the batch has {drawn} samples but no gradient went through the criterion that make_private returned; train with"
                " that one, criterion(model(x), y).backward(): only there is every sample's gradient bounded"
            )

    def _check_gradients(self, gradients: list[Tensor], deltas: Tensor, stds: Tensor) -> None:
        """Refuse what is not finite, and a gradient where the bound says that there is none. One read of the device."""
        wide = [g if g.dtype == torch.float64 else g.float() for g in gradients]
        norms = torch.stack([torch.linalg.vector_norm(g).double() for g in wide])
        finite = torch.isfinite(norms + stds)
        possible = (deltas > 0) | (norms == 0)
        if bool((finite & possible).all()):
            return
        step = self.engine.ledger.steps + 1
        bad = [n for n, ok in zip(self.names, finite.tolist(), strict=True) if not ok]
        if bad:
            raise NonFiniteError(
                f"step {step}: NaN or infinity in the gradient or the bound of {', '.join(bad)}; nothing was released or"
                " changed. Look for NaN in the inputs, or lower the learning rate and resume from the last checkpoint"
            )
        bad = [n for n, ok in zip(self.names, possible.tolist(), strict=True) if not ok]
        raise EngineError(
            f"step {step}: {', '.join(bad)} has a gradient, but nothing leads from it to the output in the model as it was"
            " traced by make_private; the model computes something else now (train() against eval()?)"
        )

    # -- state ---------------------------------------------------------------------------------------------------------

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()

    def state_dict(self) -> dict[str, Any]:
        return {
            "facts": self.facts.as_dict(),
            "ledger": self.engine.ledger.state_dict(),
            "before": self.before,
            "loader": self.loader.state_dict(),
            "noise": self.noise.state_dict(),
            "gate": self.gate.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        missing = {"facts", "ledger", "before", "loader", "noise", "gate"} - set(state)
        if missing:
            raise CheckpointError(f"not the state of a privacy engine: {', '.join(sorted(missing))} missing")
        self.facts.check_same(state["facts"])
        ledger = Ledger.from_state(state["ledger"])
        self.loader.load_state_dict(state["loader"])
        self.noise.load_state_dict(state["noise"])
        self.gate.load_state_dict(state["gate"])
        self.engine.ledger, self.before = ledger, int(state["before"])
        self._taken_at = self.loader.position


def _length(dataset: Any) -> int:
    if not hasattr(dataset, "__len__"):
        raise EngineError(
            f"{type(dataset).__name__} has no length: sampling needs a map-style dataset (e.g. a TensorDataset)"
        )
    return len(dataset)


def _first_records(dataset: Any) -> tuple[Tensor, Tensor]:
    """Up to four records, for shapes and for the check that the loss keeps samples apart."""
    records = [dataset[i] for i in range(min(4, len(dataset)))]
    if not records or any(not isinstance(r, (tuple, list)) or len(r) != 2 for r in records):
        raise EngineError("the dataset must hold (input, target) pairs, and at least one")
    inputs, targets = zip(*records, strict=True)
    return torch.stack([torch.as_tensor(x) for x in inputs]), torch.stack([torch.as_tensor(y) for y in targets])


def _matched_parameters(module: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[list[str], list[nn.Parameter]]:
    """Names and parameters, once the optimiser is found to hold exactly the model's trainable parameters.

    It may hold frozen ones too; a gradient left on one of those, from before it was frozen, is dropped.
    """
    held = {id(p): p for group in optimizer.param_groups for p in group["params"]}
    trainable = {n: p for n, p in module.named_parameters() if p.requires_grad}
    foreign = set(held) - {id(p) for p in module.parameters()}
    missing = [n for n, p in trainable.items() if id(p) not in held]
    if foreign:
        raise OptimizerError(
            f"the optimiser holds {len(foreign)} parameter(s) that the model lacks: they would be updated without a bound. Build it"
            " with model.parameters()"
        )
    if missing:
        raise OptimizerError(
            f"the optimiser lacks the trainable parameter(s) {', '.join(missing)}: freeze them with requires_grad_(False), or build"
            " it with model.parameters()"
        )
    if not trainable:
        raise OptimizerError("the model has no trainable parameter")
    for parameter in held.values():
        if not parameter.requires_grad:
            parameter.grad = None
    return list(trainable), list(trainable.values())


def _refuse_private(optimizer: torch.optim.Optimizer) -> None:
    hooks = optimizer._optimizer_step_pre_hooks.values()
    if any(isinstance(getattr(hook, "__self__", None), _Run) for hook in hooks):
        raise OptimizerError("this optimiser is already private; detach() the engine that holds it first")
