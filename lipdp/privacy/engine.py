"""The engine: a torch model, optimiser and dataset in, the same objects out, and every step private."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lipdp.accounting.accountants import get_accountant
from lipdp.accounting.events import Ledger
from lipdp.accounting.plan import PrivacyPlan
from lipdp.batches.copies import check_index
from lipdp.batches.inputs import Fields, as_records
from lipdp.batches.loader import BatchLoader
from lipdp.batches.population import Population, first_records
from lipdp.bounds.sensitivity import Sensitivity
from lipdp.distributed.collectives import World, current_world
from lipdp.distributed.wrappers import own_reduction
from lipdp.errors import CheckpointError, EngineError, ParameterError
from lipdp.files import write_bytes
from lipdp.nn.compiled import original
from lipdp.noise.allocation import Allocation
from lipdp.privacy.attach import attach
from lipdp.privacy.complete import complete
from lipdp.privacy.criterion import PrivateCriterion
from lipdp.privacy.gate import FixedGate, QuantileGate
from lipdp.privacy.hooks import StepHooks
from lipdp.privacy.options import Draws, Given, Options, Request, refuse_unknown
from lipdp.suggestion.joints import Joint
from lipdp.suggestion.settings import Settings
from lipdp.timing import Timer

if TYPE_CHECKING:
    from typing_extensions import Unpack


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
        EngineError, OptimizerError, BoundViolation, NonFiniteError: from `optimizer.step()`, before anything is
            released: the model, the loss or the optimiser is not the one that was bounded any more, the loop would
            count a record twice or skip a batch, or a gradient is longer than its bound or not finite (deferred checks
            answer at the next step: see `settle`).
        ConstraintError: after the step, whose ε holds: a projection missed its constraint.

    >>> x, y = torch.randn(64, 4), torch.randint(3, (64,))
    >>> model = torch.nn.Sequential(lipdp.nn.InputBound(1.0), lipdp.nn.SpectralLinear(4, 3))
    >>> engine = lipdp.PrivacyEngine()
    >>> model, optimizer, loader, criterion = engine.make_private(
    ...     module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
    ...     criterion=lipdp.losses.TauCrossEntropy(8.0), dataset=torch.utils.data.TensorDataset(x, y),
    ...     expected_batch_size=16, steps=3, noise_multiplier=2.0)
    >>> for xb, yb in loader:                               # or: _ = engine.backward(xb, yb)
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
        **unknown: Any,
    ) -> None:
        refuse_unknown("PrivacyEngine", unknown)
        self.accountant = get_accountant(accountant)
        self._world = world
        self.seed, self.secure, self.check_every, self.deferred = seed, secure, check_every, deferred
        self._ledger = Ledger()
        self._measured: list[str] = []
        self._hooks: StepHooks | None = None
        self._settings: Settings | None = None

    # -- entry ---------------------------------------------------------------------------------------------------------

    def make_private(
        self,
        *,
        module: nn.Module,
        dataset: Dataset[Any] | DataLoader[Any] | None = None,
        noise_multiplier: float | None,
        optimizer: torch.optim.Optimizer | None = None,
        criterion: nn.Module | None = None,
        expected_batch_size: int | None = None,
        steps: int | None = None,
        epochs: float | None = None,
        sampling: str = "poisson",
        bands: int = 1,
        truncated_batch_size: int | None = None,
        dataset_size: int | None = None,
        target_epsilon: float | None = None,
        target_delta: float | None = None,
        fields: Fields | None = None,
        gate: float | FixedGate | QuantileGate | None = None,
        allocation: str | Allocation | None = None,
        joints: tuple[Joint, ...] | None = None,
        **options: Unpack[Options],
    ) -> tuple[nn.Module, torch.optim.Optimizer, BatchLoader, PrivateCriterion]:
        """`make_private_with_plan`, of the plan that these numbers make; what is left out is chosen.

        Without an optimiser everything that is not given is chosen together, by `lipdp.suggest`, from public facts: the
        optimiser with a learning rate for each parameter, criterion, B, passes, gate, allocation, and clips and gates
        that are placed in the model. `settings` says what. With an optimiser of your own the rest is chosen, and the
        learning rate is yours; with a criterion of your own besides, only B and the passes are.

        Args:
            expected_batch_size: B, the divisor of the noisy sum.
            steps: T, how many batches the loader will yield in one iteration; a step more is refused.
            epochs: T as a number of passes over the data, T = epochs N/B, of which one iteration of the loader is one.
            noise_multiplier: the σ; None takes the smallest whose ε after all steps is at most the target.
            sampling: "poisson" (relation: add or remove one) or "fixed_size" (relation: replace one).
            bands: b > 1 for noise that is correlated over b steps, and batches of every b-th part of the units.
            truncated_batch_size: C ≥ B: of a Poisson batch at most C records take part, and all batches have C rows,
                some of them empty: one shape for compiled graphs. C = B + 5√B costs nearly nothing.
            dataset_size: N, a public constant, from which q = B/N; by default the dataset's length, which the account
                then treats as public. With `group`, of owners.
            target_epsilon, target_delta: the budget, where there is one.
            dataset: the training records; of a torch `DataLoader` its data set is taken, and nothing else.
            module, optimizer, criterion, gate, allocation, joints, options: see `make_private_with_plan`. One that is
                not there is refused, with what stands for an argument of Opacus.

        Raises:
            CalibrationError: no σ reaches the target; and what `make_private_with_plan` raises.
        """
        refuse_unknown("make_private", options, Options)
        if dataset is None:
            raise ParameterError("make_private needs dataset=: the training records, or a torch DataLoader of them")
        self._refuse_second()
        world, group, own = self._world or current_world(), options.get("group"), options.get("own_records", False)
        check_index(dataset, group)
        dataset = as_records(dataset, fields)
        population = Population.of(dataset, world, group=group, own_records=own)
        shape = options.get("input_shape")
        if shape is None:
            views = options.get("views", 1) != 1
            shape = tuple(first_records(dataset, world, own_records=own)[0].shape[2 if views else 1 :])
        options["input_shape"] = shape
        plan, chosen, settings = complete(
            original(own_reduction(module, world)),
            optimizer,
            input_shape=shape,
            expected_batch_size=expected_batch_size,
            steps=steps,
            epochs=epochs,
            criterion=criterion,
            gate=gate,
            allocation=allocation,
            joints=joints,
            world=world,
            dataset_size=population.present if dataset_size is None else dataset_size,
            sampling=sampling,
            bands=bands,
            truncated_batch_size=truncated_batch_size,
            unit=population.unit,
            noise_multiplier=noise_multiplier,
            target_epsilon=target_epsilon,
            target_delta=target_delta,
            accountant=self.accountant.name,
        )
        made = self.make_private_with_plan(plan, module=module, dataset=dataset, passes=epochs, **chosen, **options)
        self._settings = settings
        return made

    def make_private_with_epsilon(
        self, *, target_epsilon: float, target_delta: float, **given: Unpack[Given]
    ) -> tuple[nn.Module, torch.optim.Optimizer, BatchLoader, PrivateCriterion]:
        """`make_private` with the smallest σ whose ε after all steps is at most the target.

        Args:
            target_epsilon, target_delta: the budget.
            given: module, dataset and the other options of `make_private`.

        Raises:
            CalibrationError: no σ reaches the target; and what `make_private` raises.

        >>> x, y = torch.randn(500, 8), torch.randint(3, (500,))
        >>> model = lipdp.nn.from_torch(torch.nn.Sequential(torch.nn.Linear(8, 3)), input_shape=(8,))
        >>> engine = lipdp.PrivacyEngine()
        >>> model, optimizer, loader, criterion = engine.make_private_with_epsilon(
        ...     module=model, dataset=torch.utils.data.TensorDataset(x, y), target_epsilon=3.0, target_delta=1e-4)
        >>> criterion.loss
        TauCrossEntropy(tau=16.0)
        """
        refuse_unknown("make_private_with_epsilon", given, Given)
        return self.make_private(
            noise_multiplier=None, target_epsilon=target_epsilon, target_delta=target_delta, **given
        )

    def make_private_with_plan(
        self,
        plan: PrivacyPlan,
        *,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        criterion: nn.Module,
        dataset: Dataset[Any] | DataLoader[Any],
        fields: Fields | None = None,
        gate: float | FixedGate | QuantileGate | None = None,
        allocation: str | Allocation = "per_layer",
        joints: tuple[Joint, ...] = (),
        passes: float | None = None,
        **options: Unpack[Options],
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
            joints: clips and gates to be placed in front of layers of the model, which then has them.
            group: (N,) the owner of every record. Then owners are drawn, B of them expected, each with all records, of
                whose gradients an owner contributes the mean, and ε protects the owner (`Owners`). The loader yields
                (x, y, weight), for criterion(model(x), y, weight).
            views: K: an input in the dataset is K views of its record, (K, *features), and contributes the mean
                of their gradients, at the same Δ. The loader yields the views as K rows.
            own_records: where several processes train together: each has records that no other has. By default each
                has the whole dataset, and reads its part of every batch.
            passes: how many iterations of the loader the T steps are spread over; by default one.
            input_shape: of one sample; by default that of record 0.
            forward_dtype: `torch.bfloat16` if the forward pass will run under autocast.
            num_workers, pin_memory: of the loader.
            piece: records read at a time, where a whole batch is too large for memory: `for pieces in loader:` gives
                an iterator of (x, y), each for one `backward`, before one `step()`. Not under `fully_shard`.

        Raises:
            ParameterError, UnknownNameError: an argument out of range. OptimizerError: an optimiser that is not
            exactly over the model's trainable parameters. LossError, UnboundedError, UnsupportedOperationError, …: no
            bound exists.
        """
        self._refuse_second()
        refuse_unknown("make_private_with_plan", options, Options)
        check_index(dataset, options.get("group"))
        request = Request(
            module=module,
            optimizer=optimizer,
            criterion=criterion,
            dataset=as_records(dataset, fields),
            allocation=allocation,
            gate=gate,
            joints=tuple(joints),
            passes=passes,
            **options,
        )
        draws = Draws(
            accountant=self.accountant.name,
            seed=self.seed,
            secure=self.secure,
            check_every=self.check_every,
            deferred=self.deferred,
            ledger=self._ledger,
            measured=self._measured,
        )
        run = attach(request, plan, draws, self._world or current_world())
        self._hooks, self._settings = run, None
        return module, optimizer, run.loader, run.criterion

    def _refuse_second(self) -> None:
        if self._hooks is not None:
            raise EngineError(
                "this engine already made a model private; use one PrivacyEngine per run, or detach() first"
            )

    # -- during and after training -------------------------------------------------------------------------------------

    def microbatches(
        self, x: Tensor, y: Tensor, size: int, weight: Tensor | None = None
    ) -> Iterator[tuple[Tensor, ...]]:
        """The logical batch in pieces of at most `size`: one `backward` each, then one `optimizer.step()`.

        An empty batch gives one empty piece. With `weight`, pieces of (x, y, weight). Where parameters are sharded by
        `fully_shard`, whose passes all processes take part in, those with fewer pieces get empty ones: run them too.
        """
        if size < 1:
            raise ParameterError(f"a micro-batch has at least one sample, got size={size}")
        columns = [c.split(size) if len(c) > size else (c,) for c in (x, y, weight) if c is not None]
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
            () the mean loss of the batch, which ε does not cover.
        """
        run = self._current()
        total = torch.zeros((), device=run.graph.device)
        with torch.enable_grad():
            for piece in self.microbatches(x, y, microbatch or max(len(x), 1), weight):
                inputs, *others = (part.to(run.graph.device, non_blocking=True) for part in piece)
                value = run.criterion(run.module(inputs), *others)
                value.backward()
                total = total + value.detach() * (len(others[0]) if len(others) == 1 else others[1].sum())
        return total / (max(len(x), 1) if weight is None else weight.sum().clamp_min(1e-30))

    def measure_(self, name: str, total: Tensor, *, sensitivity: float) -> float:
        r"""Release a sum over all records once, as the plan says: an event of the same account, with the run's noise.

        If neighbours move the sum by `Δ` at most (by 2Δ where a record is replaced), `total + N(0, s² I)` with
        `s = σ Δ` (2σΔ) is the Gaussian mechanism with the noise multiplier σ of that measurement.

        Args:
            name: of a measurement of the plan; each can be taken once.
            total: any shape, on the engine's device; noise is added in place, and all processes get the first one's.
            sensitivity: Δ > 0, a bound on the Euclidean norm of what one unit adds. It is yours to prove.

        Returns:
            s.

        Raises:
            UnknownNameError: the plan has no such measurement. EngineError: it was taken, or the sum is not finite, or
            in less than float32.
        """
        return self._current().measure_(name, total, sensitivity)

    @property
    def measured(self) -> tuple[str, ...]:
        """What was released beside the steps so far."""
        return tuple(self._measured)

    def skip_batch(self) -> int:
        """Give up the batches drawn since the last step: each counts as a step of the account, nothing is released.

        For an interrupted loop, or a batch that a script does not want: that it was given up may depend on its records.
        Returns how many steps were counted.
        """
        return self._current().skip_batch()

    def add_penalty(self, penalty: Callable[[nn.Module], Tensor]) -> None:
        """Add a term that depends on the weights alone: its gradient is added to the noisy one at every step, for free.

        Args:
            penalty: of the model, such as an L1 norm, in units of the *mean* loss: it is not divided by the batch size.
        """
        self._current().penalties.append(penalty)

    def get_epsilon(self, delta: float) -> float:
        """An upper bound on ε at δ for the steps taken so far, under the run's relation."""
        return self.accountant.epsilon(self.ledger.events, delta).epsilon

    @property
    def ledger(self) -> Ledger:
        """What was released so far: every step is added to this one object."""
        return self._ledger

    @property
    def plan(self) -> PrivacyPlan:
        """What ε depends on."""
        return self._current().plan

    @property
    def settings(self) -> Settings | None:
        """What was chosen for the run, to be printed as a table; None where optimiser and criterion were given."""
        self._current()
        return self._settings

    @property
    def signals(self) -> dict[str, float]:
        """By parameter, the most that all steps can add up to over the noise that they add up: public, of the start."""
        return self._current().signals

    @property
    def advice(self) -> str:
        """Why the run can hardly learn, as `CannotLearnWarning` said it; empty where nothing speaks against it."""
        return self._current().advice

    @property
    def steps_taken(self) -> int:
        """Noisy steps on this engine's account, those of earlier runs included; measurements are none."""
        return self.ledger.steps - len(self._measured)

    @property
    def steps_left(self) -> int:
        """Steps that the plan has left."""
        return self._current().count.left

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

        Before the first step, and before the first after `load_state_dict`: of a step at the weights as they are. With
        bands, of the noise before it is correlated.
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
        self._hooks = self._settings = None

    def state_dict(self) -> dict[str, Any]:
        """What a resume needs besides model and optimiser: plain values, for `torch.load(weights_only=True)`."""
        return self._current().state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue a saved run, after the same `make_private`.

        Raises:
            ResumeError: the plan differs. CheckpointError: not a state of an engine.
        """
        self._current().load_state_dict(state)

    def save_checkpoint(self, path: str | os.PathLike[str], *, extra: dict[str, Any] | None = None) -> None:
        """Write model, optimiser and account to one file, whole or not at all.

        It holds the noise to come: keep it as secret as the data, and continue it once.

        Args:
            path: of the file.
            extra: plain values and tensors of your own, such as the state of a scheduler.

        Raises:
            CheckpointError: the file cannot be written.
        """
        run = self._current()
        state = {"model": run.module.state_dict(), "optimizer": run.optimizer.state_dict(), "engine": self.state_dict()}
        buffer = io.BytesIO()
        torch.save({**state, "extra": extra or {}}, buffer)
        write_bytes(Path(path), buffer.getvalue())

    def load_checkpoint(self, path: str | os.PathLike[str]) -> dict[str, Any]:
        """Continue from a file of `save_checkpoint`, after the same `make_private`.

        Returns:
            what was given as `extra`.

        Raises:
            CheckpointError: no such file, or another one. ResumeError: the plan differs.
        """
        run = self._current()
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises whatever the broken file makes it raise
            raise CheckpointError(f"{path} cannot be read as a checkpoint ({type(error).__name__})") from error
        if not isinstance(state, dict) or {"model", "optimizer", "engine"} - set(state):
            raise CheckpointError(f"{path} is no checkpoint of a private run: engine.save_checkpoint writes them")
        self.load_state_dict(state["engine"])
        run.module.load_state_dict(state["model"])
        run.optimizer.load_state_dict(state["optimizer"])
        extra: dict[str, Any] = state["extra"]
        return extra

    def __getstate__(self) -> dict[str, Any]:
        if self._hooks is not None:
            raise EngineError(
                "an engine in use can't be copied or pickled: the copy would draw the same batches and noise, which two"
                " releases must not share. Use save_checkpoint, or copy the model"
            )
        return self.__dict__.copy()

    def _current(self) -> StepHooks:
        if self._hooks is None:
            raise EngineError("call make_private or make_private_with_epsilon first")
        return self._hooks
