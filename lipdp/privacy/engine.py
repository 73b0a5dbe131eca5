"""The engine: a torch model, optimiser and dataset in, the same objects out, and every step private."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from lipdp.bounds import BoundGraph
from lipdp.errors import EngineError, ParameterError, UnknownNameError
from lipdp.losses import as_lipschitz
from lipdp.privacy.accounting import get_accountant
from lipdp.privacy.calibration import calibrate
from lipdp.privacy.criterion import PrivateCriterion, check_loss
from lipdp.privacy.events import Ledger
from lipdp.privacy.facts import PrivacyFacts
from lipdp.privacy.gate import FixedGate, QuantileGate
from lipdp.privacy.loader import BatchLoader
from lipdp.privacy.noise import Allocation, GaussianNoise, get_allocation
from lipdp.privacy.run import Run
from lipdp.privacy.sampling import FixedSizeSampler, PoissonSampler, Sampler
from lipdp.privacy.secure import SecureGaussianNoise
from lipdp.relation import Relation
from lipdp.sensitivity import Sensitivity
from lipdp.timing import Timer

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
        secure: batches and noise from a cipher, seeded from the operating system, and noise whose low bits tell nothing:
            `SecureGaussianNoise` says what that defends and what not. Needs the extra "secure".
        check_every: steps between looks at the gradients of a few records (`GradientCheck`); 0 never, None where it
            costs 0.3 % of the run.
        deferred: whether the checks of a step leave their answers on the device, to be read at the next step, so that no step
            waits for the device; see `settle`. None: on a CPU at once, elsewhere deferred.

    Raises:
        EngineError, OptimizerError, BoundViolation, ConstraintError: from `optimizer.step()`, before anything is released:
            the model, the loss or the optimiser is not the one that was bounded any more, the loop would count a record
            twice or skip a batch, a gradient is longer than its bound, or a projection missed.

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
    ) -> None:
        self.accountant = get_accountant(accountant)
        self.seed, self.secure, self.check_every, self.deferred = seed, secure, check_every, deferred
        self.ledger = Ledger()
        self._run: Run | None = None

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
            secure=self.secure,
        )
        facts.step_event  # noqa: B018  (refuses a σ or q out of range)
        sampler = self._sampler(facts, _length(dataset))
        loader = BatchLoader(dataset, sampler, num_workers=num_workers, pin_memory=pin_memory)
        x, targets = _first_records(dataset)
        graph = BoundGraph(module, tuple(input_shape or x.shape[1:]), dtype=forward_dtype)
        loss = as_lipschitz(criterion)
        check_loss(loss, targets.to(graph.device), graph.num_outputs)
        private = PrivateCriterion(loss, graph, gate.start(), loader)
        self._run = Run(
            module,
            optimizer,
            criterion=private,
            loader=loader,
            facts=facts,
            allocation=get_allocation(allocation),
            gate=gate,
            noise=(SecureGaussianNoise if self.secure else GaussianNoise)(self.seed, device=graph.device),
            ledger=self.ledger,
            check_every=self.check_every,
            deferred=self.deferred,
        )
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
        options: dict[str, Any] = {"steps": facts.steps, "seed": self.seed, "secure": self.secure}
        if facts.sampling == "poisson":
            return PoissonSampler(population, sampling_rate=facts.sampling_rate, **options)
        return FixedSizeSampler(population, batch_size=facts.expected_batch_size, **options)

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

    def settle(self) -> None:
        """Read what the checks of the last step found, where they are deferred; then the weights may be saved or shown.

        A step that was not to be taken leaves NaN behind, so weights that are saved too early are lost but tell nothing. The
        next step, the last of the budget, `state_dict`, `sensitivity` and `detach` settle by themselves.

        Raises:
            NonFiniteError, EngineError, ConstraintError: from the checks of the last step.
        """
        self._current().settle()

    def time_with(self, timer: Timer) -> None:
        """Name the parts of the following steps to `timer`: sampler, bound, checks, noise, projection."""
        run = self._current()
        run.timer = run.loader.timer = timer

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
        run = self._current()
        run.load_state_dict(state)
        self.ledger = run.ledger

    def _current(self) -> Run:
        if self._run is None:
            raise EngineError("call make_private or make_private_with_epsilon first")
        return self._run


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
