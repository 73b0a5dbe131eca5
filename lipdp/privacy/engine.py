"""The engine: a torch model, optimiser and dataset in, the same objects out, and every step private."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from lipdp.accounting.accountants import get_accountant
from lipdp.accounting.events import Ledger
from lipdp.accounting.plan import PrivacyPlan
from lipdp.batches.inputs import Fields, InputKind, as_records
from lipdp.batches.loader import BatchLoader
from lipdp.batches.population import Group, Population, check_records, first_records
from lipdp.batches.samplers import FixedSizeSampler, PoissonSampler, Sampler
from lipdp.bounds import BoundGraph
from lipdp.distributed.collectives import World, current_world
from lipdp.distributed.wrappers import check_alike, own_reduction, plan_together, warm_up_shards
from lipdp.errors import EngineError, ParameterError
from lipdp.losses import as_lipschitz
from lipdp.nn.sharded import is_sharded, local_tensor
from lipdp.noise.allocation import Allocation, get_allocation
from lipdp.noise.gaussian import GaussianNoise
from lipdp.noise.secure import SecureGaussianNoise
from lipdp.privacy.criterion import PrivateCriterion
from lipdp.privacy.free_weights import note_free_weights
from lipdp.privacy.gate import FixedGate, QuantileGate
from lipdp.privacy.hooks import StepHooks
from lipdp.privacy.loss_check import check_loss
from lipdp.privacy.passes import StepInProgress
from lipdp.privacy.sums import Gradients, OwnGradients, SealedGradients
from lipdp.sensitivity import Sensitivity
from lipdp.timing import Clock, Timer


class PrivacyEngine:
    """Makes an ordinary training loop differentially private, without clipping.

    Each step releases (Σ_{i ∈ batch} ∇_l ℓ_i + Z_l)/B for all parameters l at once, with Z_l ~ N(0, s_l² I) and Σ_l
    Δ_l²/s_l² = 1/σ²: one Gaussian mechanism of noise multiplier σ on one subsample. The Δ_l are recomputed at every
    step from the certified norms of the weights then. Noise enters in the optimiser's step pre-hook and the projection
    on the constraints in its post-hook, so no step is without noise; all that follows (momentum, schedules, averaging)
    is post-processing.

    Args:
        accountant: "prv" (default), "pld" or "rdp".
        seed: makes the draws repeatable, for tests: a seeded run is NOT private and says so.
        secure: batches and noise from a cipher, seeded from the operating system, and noise whose low bits tell
            nothing: `SecureGaussianNoise` says what that defends and what not. Needs the extra "secure".
        check_every: steps between looks at the gradients of a few records (`GradientCheck`); 0 never, None where it
            costs 0.3 % of the run.
        deferred: whether the checks of a step leave their answers on the device, to be read at the next step, so that
            no step waits for the device; see `settle`. None: on a CPU at once, elsewhere deferred.
        world: the processes that train together; by default all of torch.distributed's default group. They share one
            account: one draw of the batch, of which each process takes its part, gradients summed, one draw of the
            noise.

    Raises:
        EngineError, OptimizerError, BoundViolation, ConstraintError: from `optimizer.step()`, before anything is
            released: the model, the loss or the optimiser is not the one that was bounded any more, the loop would
            count a record twice or skip a batch, a gradient is longer than its bound, or a projection missed.

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

    def __init__(
        self,
        accountant: str = "prv",
        *,
        seed: int | None = None,
        secure: bool = False,
        check_every: int | None = None,
        deferred: bool | None = None,
        world: World | None = None,
    ) -> None:
        self.accountant = get_accountant(accountant)
        self._world = world
        self.seed, self.secure, self.check_every, self.deferred = seed, secure, check_every, deferred
        self.ledger = Ledger()
        self._hooks: StepHooks | None = None

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
        noise_multiplier: float | None,
        sampling: str = "poisson",
        dataset_size: int | None = None,
        group: Group | None = None,
        shards: bool = False,
        target_epsilon: float | None = None,
        target_delta: float | None = None,
        fields: Fields | None = None,
        **options: Any,
    ) -> tuple[nn.Module, torch.optim.Optimizer, BatchLoader, PrivateCriterion]:
        """`make_private_with_plan`, of the plan that these numbers make.

        Args:
            expected_batch_size: B, the divisor of the noisy sum.
            steps: T, how many batches the loader will yield; a step more is refused.
            noise_multiplier: the joint σ; None takes the smallest whose ε after all steps is at most the target.
            sampling: "poisson" (relation: add or remove one) or "fixed_size" (relation: replace one).
            dataset_size: N, a public constant, from which q = B/N; by default the dataset's length, which the account
                then treats as public. With `group`, of owners.
            target_epsilon, target_delta: the budget, where there is one.
            module, optimizer, criterion, dataset, fields, group, shards and the other options: see
                `make_private_with_plan`.

        Raises:
            CalibrationError: no σ reaches the target; and what `make_private_with_plan` raises.
        """
        world, dataset = self._world or current_world(), as_records(dataset, fields)
        population = Population.of(dataset, world, group=group, shards=shards)
        plan = plan_together(
            world,
            dataset_size=population.present if dataset_size is None else dataset_size,
            expected_batch_size=expected_batch_size,
            steps=steps,
            sampling=sampling,
            unit=population.unit,
            noise_multiplier=noise_multiplier,
            target_epsilon=target_epsilon,
            target_delta=target_delta,
            accountant=self.accountant.name,
        )
        return self.make_private_with_plan(
            plan,
            module=module,
            optimizer=optimizer,
            criterion=criterion,
            dataset=dataset,
            group=group,
            shards=shards,
            **options,
        )

    def make_private_with_epsilon(
        self, *, target_epsilon: float, target_delta: float, **options: Any
    ) -> tuple[nn.Module, torch.optim.Optimizer, BatchLoader, PrivateCriterion]:
        """`make_private` with the smallest σ whose ε after all steps is at most the target.

        Args:
            target_epsilon, target_delta: the budget.
            options: all but the noise multiplier that `make_private` takes.

        Raises:
            CalibrationError: no σ reaches the target; and what `make_private` raises.
        """
        return self.make_private(
            noise_multiplier=None, target_epsilon=target_epsilon, target_delta=target_delta, **options
        )

    def make_private_with_plan(
        self,
        plan: PrivacyPlan,
        *,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        criterion: nn.Module,
        dataset: Dataset[Any],
        fields: Fields | None = None,
        allocation: str | Allocation = "per_layer",
        gate: float | FixedGate | QuantileGate | None = None,
        input_shape: tuple[int, ...] | None = None,
        forward_dtype: torch.dtype | None = None,
        group: Group | None = None,
        multiplicity: int = 1,
        shards: bool = False,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> tuple[nn.Module, torch.optim.Optimizer, BatchLoader, PrivateCriterion]:
        """Attach noise and projection to the optimiser; return the same model and optimiser, a loader and a criterion.

        Args:
            plan: N, B, T, σ, and what is protected. Its allocation, gate, seed and cipher are filled in here.
            module, optimizer, criterion: the user's own objects; the model and the optimiser are returned as they are.
                The model may be compiled: bounds are derived from what `torch.compile` was given.
            dataset: map-style, of (input, target) records; a pair of arrays, or a DataLoader for its data set.
                Inputs reach the model in its dtype, tokens that it does not know as 0.
            fields: of tables and of records with names or more parts, those of input and target: ("image", "label").
            allocation: "per_layer", "global" or "min_variance", or an object with `stds`.
            gate: a lower cotangent gate at the logits: a number, or a `QuantileGate`.
            group: (N,) the owner of every record. Then owners are drawn, B of them expected, each with all records, of
                whose gradients an owner contributes the mean, and ε protects the owner (`Owners`). The loader yields
                (x, y, weight), for criterion(model(x), y, weight).
            multiplicity: K: an input in the dataset is K views of its record, (K, *features), and contributes the mean
                of their gradients, at the same Δ. The loader yields the views as K rows.
            shards: where several processes train together: each has records that no other has. By default each has
                the whole dataset, and reads its part of every batch.
            input_shape: of one sample; by default that of record 0.
            forward_dtype: `torch.bfloat16` if the forward pass will run under autocast.
            num_workers, pin_memory: of the loader.

        Raises:
            ParameterError, UnknownNameError: an argument out of range. OptimizerError: an optimiser that is not
            exactly over the model's trainable parameters. LossError, UnboundedError, UnsupportedOperationError, …: no
            bound exists.
        """
        if self._hooks is not None:
            raise EngineError(
                "this engine already made a model private; use one PrivacyEngine per run, or detach() first"
            )
        if type(multiplicity) is not int or multiplicity < 1:
            raise ParameterError(f"multiplicity={multiplicity!r}: how many views of a record are averaged, 1 or more")
        world, dataset = self._world or current_world(), as_records(dataset, fields)
        population = Population.of(dataset, world, group=group, shards=shards)
        self._check_fits(plan, population)
        gate = gate if isinstance(gate, (FixedGate, QuantileGate)) else FixedGate(math.inf if gate is None else gate)
        plan = replace(
            plan,
            allocation=getattr(get_allocation(allocation), "name", type(allocation).__name__),
            gate=repr(gate),
            seeded=self.seed is not None,
            secure=self.secure,
        )
        check_alike(world, plan, multiplicity=multiplicity)
        x, targets = first_records(dataset, world, shards=shards)
        check_records(dataset, world, shards=shards)
        inner = own_reduction(module, world)
        world.broadcast_([t for t in (*inner.parameters(), *inner.buffers()) if local_tensor(t) is t])
        with world.fail_together():
            shape = tuple(input_shape or x.shape[1 if multiplicity == 1 else 2 :])
            warm_up_shards(inner, shape)
            graph = BoundGraph(inner, shape, dtype=forward_dtype, gated=group is None)
            loss = as_lipschitz(criterion, graph.output_shape)
            check_loss(loss, targets.to(graph.device), graph.output_shape)
            note_free_weights(graph)
            state, clock = gate.start(), Clock()
            step = StepInProgress(_gradients(inner, optimizer), grouped=group is not None, forgotten=state.forget)
            loader = BatchLoader(
                dataset,
                self._sampler(plan, population.present),
                part=population.part,
                owners=population.owners,
                views=multiplicity,
                records=population.records,
                empty=[x[:1], targets[:1]],
                kind=InputKind(torch.int64 if graph.vocabulary else graph.own_dtype, graph.vocabulary),
                num_workers=num_workers,
                pin_memory=pin_memory,
                listener=step,
                clock=clock,
            )
            private = PrivateCriterion(loss, graph, state, step)
            run = StepHooks(
                inner,
                optimizer,
                outer=module,
                criterion=private,
                graph=graph,
                gate=state,
                gate_multiplier=gate.noise_multiplier,
                step=step,
                loader=loader,
                plan=plan,
                allocation=get_allocation(allocation),
                noise=(SecureGaussianNoise if self.secure else GaussianNoise)(self.seed, device=graph.device),
                ledger=self.ledger,
                check_every=self.check_every,
                deferred=self.deferred,
                world=world,
                clock=clock,
            )
        run.share_keys()
        self._hooks = run
        return module, optimizer, loader, private

    def _check_fits(self, plan: PrivacyPlan, population: Population) -> None:
        """Refuse a plan made for other units, or for another account."""
        if plan.unit != population.unit:
            raise ParameterError(
                f"the plan protects each {plan.unit} and the batches would be drawn of {population.unit}s: pass group="
                " with a plan for owners, and only then"
            )
        if plan.accountant != self.accountant.name:
            raise ParameterError(
                f"the plan is by the accountant {plan.accountant!r} and the engine has {self.accountant.name!r}: take"
                " one"
            )
        if plan.sampling == "fixed_size" and plan.dataset_size != population.present:
            raise ParameterError(
                f"dataset_size={plan.dataset_size} but the dataset has {population.present} {plan.unit}s: with batches"
                " of a fixed size q = B/N is exact, and N is public; leave dataset_size out"
            )

    def _sampler(self, plan: PrivacyPlan, population: int) -> Sampler:
        options: dict[str, Any] = {"steps": plan.steps, "seed": self.seed, "secure": self.secure}
        if plan.sampling == "poisson":
            return PoissonSampler(population, sampling_rate=plan.sampling_rate, **options)
        return FixedSizeSampler(population, batch_size=plan.expected_batch_size, **options)

    # -- during and after training -------------------------------------------------------------------------------------

    def microbatches(
        self, x: Tensor, y: Tensor, size: int, weight: Tensor | None = None
    ) -> Iterator[tuple[Tensor, ...]]:
        """The logical batch in pieces of at most `size`: one `backward` each, then one `optimizer.step()`.

        An empty batch gives one empty piece. With `weight`, pieces of (x, y, weight). Where parameters are spread by
        `fully_shard`, whose passes all processes take part in, those with fewer pieces get empty ones: run them too.
        """
        if size < 1:
            raise ParameterError(f"a micro-batch has at least one sample, got size={size}")
        columns = [part.split(size) for part in (x, y, weight) if part is not None]
        run = self._current()
        most = max(run.world.gather(len(columns[0]))) if run.is_sharded else 0
        yield from zip(*columns, strict=True)
        yield from [tuple(column[0][:0] for column in columns)] * (most - len(columns[0]))

    def backward(self, x: Tensor, y: Tensor, weight: Tensor | None = None, *, microbatch: int | None = None) -> Tensor:
        """Forward pass, loss and backward pass of one batch from the loader: the closed door.

        Nothing between the loader and the step can then be wrong; `criterion(model(x), y).backward()` does the same.

        Args:
            x, y, weight: what the loader yielded.
            microbatch: at most so many rows at a time; by default all at once.

        Returns:
            () the summed loss of the batch, which ε does not cover.

        >>> x, y = torch.randn(64, 4), torch.randint(3, (64,))
        >>> model = torch.nn.Sequential(lipdp.nn.InputBound(1.0), lipdp.nn.SpectralLinear(4, 3))
        >>> engine = lipdp.PrivacyEngine()
        >>> model, optimizer, loader, criterion = engine.make_private(
        ...     module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        ...     criterion=lipdp.losses.TauCrossEntropy(8.0), dataset=torch.utils.data.TensorDataset(x, y),
        ...     expected_batch_size=16, steps=3, noise_multiplier=2.0)
        >>> for batch in loader:
        ...     optimizer.zero_grad(); _ = engine.backward(*batch, microbatch=8); optimizer.step()
        >>> engine.steps_taken
        3
        """
        run = self._current()
        total = torch.zeros((), device=run.graph.device)
        with torch.enable_grad():
            for piece in self.microbatches(x, y, microbatch or max(len(x), 1), weight):
                inputs, *others = (part.to(run.graph.device, non_blocking=True) for part in piece)
                value = run.criterion(run.module(inputs), *others)
                value.backward()
                total = total + value.detach()
        return total

    def skip_batch(self) -> int:
        """Give up the batches drawn since the last step: each counts as a step of the account, nothing is released.

        For an interrupted loop, or a batch that a script does not want: that it was given up may depend on its records.

        Returns:
            How many steps were counted.
        """
        return self._current().skip_batch()

    def add_penalty(self, penalty: Callable[[nn.Module], Tensor]) -> None:
        """Add a term that depends on the weights alone: its gradient is added to the noisy one at every step, for free.

        Args:
            penalty: of the model, in units of the *mean* loss: λ Σ‖W‖² is not to be divided by the batch size.

        >>> engine = lipdp.PrivacyEngine()
        >>> l1 = lambda model: 1e-4 * sum(p.abs().sum() for p in model.parameters())  # engine.add_penalty(l1)
        """
        self._current().penalties.append(penalty)

    def get_epsilon(self, delta: float) -> float:
        """An upper bound on ε at δ for the steps taken so far, under the run's relation."""
        return self.accountant.epsilon(self.ledger.events, delta).epsilon

    @property
    def plan(self) -> PrivacyPlan:
        """What ε depends on."""
        return self._current().plan

    @property
    def steps_taken(self) -> int:
        """Noisy steps so far."""
        return self.ledger.steps

    @property
    def steps_left(self) -> int:
        """Steps that the plan has left."""
        run = self._current()
        return run.plan.steps - (self.ledger.steps - run.before)

    @property
    def world(self) -> World:
        """The processes that take part."""
        return self._current().world

    @property
    def attached(self) -> bool:
        """Whether a model is private now: after `make_private`, before `detach`."""
        return self._hooks is not None

    def is_private(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether the steps of this optimiser are the noisy ones."""
        return self._hooks is not None and self._hooks.optimizer is optimizer

    def sensitivity(self) -> Sensitivity:
        """Δ per parameter at the weights as they are."""
        return self._current().sensitivity()

    def noise_stds(self) -> dict[str, float]:
        """Standard deviation of the noise on each parameter's *summed* gradient: as the last step drew it.

        Before the first step, and before the first after `load_state_dict`: of a step at the weights as they are.
        """
        return self._current().noise_stds()

    def settle(self) -> None:
        """Read what the checks of the last step found, where they are deferred; then the weights may be saved or shown.

        A step that was not to be taken leaves NaN behind, so weights that are saved too early are lost but tell
        nothing. The next step, the last of the budget, `state_dict`, `sensitivity` and `detach` settle by themselves.

        Raises:
            NonFiniteError, EngineError, ConstraintError: from the checks of the last step.
        """
        self._current().settle()

    def time_with(self, timer: Timer) -> None:
        """Name the parts of the following steps to `timer`: sampler, bound, checks, noise, projection."""
        self._current().clock.timer = timer

    def detach(self) -> None:
        """Remove the hooks: what remains is the plain torch model and optimiser."""
        self._current().detach()
        self._hooks = None

    def state_dict(self) -> dict[str, Any]:
        """What a resume needs besides model and optimiser: plain values, for `torch.load(weights_only=True)`."""
        return self._current().state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue a saved run, after the same `make_private`.

        Raises:
            ResumeError: the plan differs. CheckpointError: not a state of an engine.
        """
        run = self._current()
        run.load_state_dict(state)
        self.ledger = run.ledger

    def _current(self) -> StepHooks:
        if self._hooks is None:
            raise EngineError("call make_private or make_private_with_epsilon first")
        return self._hooks


def _gradients(module: nn.Module, optimizer: torch.optim.Optimizer) -> Gradients:
    """How the sum of a step is formed: by the engine, or under `fully_shard` by the pass itself."""
    if is_sharded(module):
        return SealedGradients(lambda: (p for group in optimizer.param_groups for p in group["params"]))
    return OwnGradients()
