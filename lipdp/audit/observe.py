"""The adversary at work: train with the real engine, read every release, and turn what is read into scores."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils.data import TensorDataset

from lipdp.accounting.plan import PrivacyPlan
from lipdp.audit.experiments import Experiment
from lipdp.batches.loader import BatchLoader
from lipdp.errors import CannotLearnWarning, ParameterError
from lipdp.privacy.criterion import PrivateCriterion
from lipdp.privacy.engine import PrivacyEngine

Array = NDArray[np.float64]
Tensors = dict[str, Tensor]
Progress = Callable[[int, int], None]
"""Is told how many steps are taken, and of how many."""

_MOST_GAMES = 10_000_000
_CHUNK_WEIGHTS = 2**23  # per-sample gradients held at once


@dataclass(frozen=True)
class Setting:
    """How the engine is asked to protect one run; `progress` is told of every step."""

    plan: PrivacyPlan
    allocation: str = "per_layer"
    seed: int | None = None
    progress: Progress = field(default=lambda done, total: None, compare=False)


class Training:
    """One engine, its loop, and what everybody who sees the weights of every step can compute."""

    def __init__(self, experiment: Experiment, setting: Setting, included: Tensor, *, runs: int = 1) -> None:
        self.experiment = experiment
        self._progress, self._total = setting.progress, setting.plan.steps * runs
        self.model = experiment.fresh_model()
        # the mechanism is audited, not the guard that would stop a run with a wrong bound
        self.engine = PrivacyEngine(setting.plan.accountant, seed=setting.seed, check_every=0)
        self.optimizer: torch.optim.Optimizer = torch.optim.SGD(self.model.parameters(), lr=experiment.learning_rate)
        self.loader: BatchLoader
        self.criterion: PrivateCriterion
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CannotLearnWarning)  # nobody wants this model to learn
            _, self.optimizer, self.loader, self.criterion = self.engine.make_private_with_plan(
                replace(setting.plan, steps=setting.plan.steps * runs),
                module=self.model,
                optimizer=self.optimizer,
                criterion=experiment.loss,
                dataset=TensorDataset(*experiment.records(included)),
                allocation=setting.allocation,
            )
        self.parameters = {n: p for n, p in self.model.named_parameters() if p.requires_grad}

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Those of the loader, counted."""
        for done, (x, y) in enumerate(self.loader):
            self._progress(done, self._total)
            yield x, y
        self._progress(self._total, self._total)

    def claimed_epsilon(self, delta: float) -> float:
        """What the engine's accountant says of one run of T steps."""
        event = self.engine.plan.step_event.with_steps(self.experiment.steps)
        return self.engine.accountant.epsilon([event], delta).epsilon

    def step(self, x: Tensor, y: Tensor) -> None:
        """One step of an ordinary loop; afterwards every `p.grad` is what was released."""
        self.optimizer.zero_grad()
        self.criterion(self.model(x), y).backward()
        self.optimizer.step()

    def gradient(self, x: Tensor, y: Tensor) -> Tensors:
        """Sum of the records' gradients at the weights as they are; the private criterion is not asked."""
        loss = self.experiment.loss(self.model(x), y).sum()
        found = torch.autograd.grad(loss, list(self.parameters.values()), allow_unused=True)
        pairs = zip(self.parameters.items(), found, strict=True)
        return {n: torch.zeros_like(p) if g is None else g for (n, p), g in pairs}


def _flat(tensors: Tensors) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors.values()])


def _log_likelihood(projection: Tensor, shift: Tensor, q: float) -> Tensor:
    """log(1 − q + q·e^{⟨r, a⟩ − ‖a‖²/2}): a step's likelihood ratio of in over out, r with unit noise, a the canary."""
    exponent = projection - shift.square() / 2
    if q == 1.0:
        return exponent
    terms = torch.stack([torch.full_like(exponent, np.log1p(-q)), exponent + np.log(q)])
    return torch.logsumexp(terms, 0)


def repeated(
    experiment: Experiment, setting: Setting, *, included: bool, runs: int
) -> tuple[dict[str, Array], Training]:
    """Scores of `runs` runs of T steps with the one canary in all of them, or in none. The weights must stand still.

    The runs follow each other in one engine: samples and noise are drawn afresh at every step, and nothing else is
    carried over when the weights stand still. Scores, by name:

    - likelihood: of the claimed mechanism, canary in over out (optimal against it when the other records are silent);
    - one step: the same if the canary takes another record's place in exactly one step, not known which;
    - energy: of the release across the canary's direction, in units of the claimed noise.
    """
    training = Training(experiment, setting, torch.tensor([included]), runs=runs)
    stds = training.engine.noise_stds()
    entries = _flat({n: torch.full_like(p, 1.0 / stds[n]) for n, p in training.parameters.items()})
    canary = _flat(training.gradient(*experiment.canaries)) * entries
    shift = torch.linalg.vector_norm(canary)
    direction = canary / shift
    expected = setting.plan.sampling_rate * _flat(training.gradient(*experiment.others)) * entries
    scale = entries * experiment.expected_batch_size
    along, energy = torch.empty(runs * experiment.steps), torch.empty(runs * experiment.steps)
    for step, (x, y) in enumerate(training.batches()):
        training.step(x, y)
        release = _flat({n: p.grad for n, p in training.parameters.items() if p.grad is not None}) * scale - expected
        along[step] = along_step = direction @ release
        energy[step] = release @ release - along_step.square()
    along, energy = along.double().view(runs, -1), energy.double().view(runs, -1)
    shift = shift.double()
    scores = {"likelihood": _log_likelihood(along * shift, shift, setting.plan.sampling_rate).sum(1)}
    if experiment.steps > 1:
        scores["one step"] = torch.logsumexp(2 * shift * along, 1)
    scores["energy"] = energy.mean(1)
    return {name: values.numpy() for name, values in scores.items()}, training


def simultaneous(experiment: Experiment, setting: Setting, included: Tensor) -> tuple[dict[str, Array], Training]:
    """Scores of the m canaries in one run; the other records' gradient, which is known, is taken off in expectation.

    - likelihood: of the claimed mechanism, this canary in over out, summed over the steps: the others are noise.
    - joint: the coins of all canaries estimated together, where they are not orthogonal.
    """
    training = Training(experiment, setting, included)
    scorer: _Orthogonal | _Joint = (_Orthogonal if experiment.saturated else _Joint)(experiment, setting)
    for x, y in training.batches():
        weights = {n: p.detach().clone() for n, p in training.parameters.items()}
        expected = training.gradient(*experiment.others)
        training.step(x, y)
        stds = training.engine.noise_stds()
        release = {}
        for name, parameter in training.parameters.items():
            released = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            centred = experiment.expected_batch_size * released - setting.plan.sampling_rate * expected[name]
            release[name] = centred / stds[name]
        scorer.see(training.model, weights, release, stds)
    return {name: values.numpy() for name, values in scorer.scores().items()}, training


class _Orthogonal:
    """Canaries that meet every bound and are orthogonal: the release is projected on all of them at once."""

    def __init__(self, experiment: Experiment, setting: Setting) -> None:
        self._experiment, self._plan = experiment, setting.plan
        self._shift = torch.tensor(1.0 / setting.plan.noise_multiplier, dtype=torch.float64)
        self._total = torch.zeros(len(experiment.canaries[0]), dtype=torch.float64)

    def see(self, model: nn.Module, weights: Tensors, release: Tensors, stds: dict[str, float]) -> None:
        """Take in one step: the weights in front of it, and the release in units of the noise."""
        x, y = self._experiment.canaries
        wanted = {n: w.requires_grad_() for n, w in weights.items()}
        share = torch.zeros(len(x), requires_grad=True)
        losses = self._experiment.loss(functional_call(model, wanted, (x,)), y)
        # Σ_j share_j ⟨∇ℓ_j, direction⟩ is linear in the shares: its slopes are the projections
        mixed = torch.autograd.grad(losses, list(wanted.values()), share, create_graph=True)
        total = sum(
            ((g * r).sum() / stds[n] for g, (n, r) in zip(mixed, release.items(), strict=True)), torch.zeros(())
        )
        (along,) = torch.autograd.grad(total, share)
        self._total += _log_likelihood(along.double(), self._shift, self._plan.sampling_rate)

    def scores(self) -> dict[str, Tensor]:
        return {"likelihood": self._total}


class _Joint:
    """Any canaries, by their per-sample gradients a_j in units of the noise.

    With coins b, one step releases r = q Σ b_j a_j + noise, in expectation over the batch. For coins of mean ½ and
    variance ¼, taken as Gaussian, the posterior mean solves (M + 4 I)(b − ½) = v − M ½ with M = Σ_t q² A Aᵀ and v = Σ_t
    q A r.
    """

    def __init__(self, experiment: Experiment, setting: Setting) -> None:
        count = len(experiment.canaries[0])
        self._experiment, self._plan = experiment, setting.plan
        self._total = torch.zeros(count, dtype=torch.float64)
        self._gram, self._seen = torch.zeros(count, count, dtype=torch.float64), torch.zeros(count, dtype=torch.float64)

    def see(self, model: nn.Module, weights: Tensors, release: Tensors, stds: dict[str, float]) -> None:
        loss, q = self._experiment.loss, self._plan.sampling_rate

        def value(w: Tensors, x: Tensor, y: Tensor) -> Tensor:
            return loss(functional_call(model, w, (x.unsqueeze(0),)), y.unsqueeze(0)).sum()

        def one(x: Tensor, y: Tensor) -> Tensor:
            return _flat({n: g / stds[n] for n, g in grad(value)(weights, x, y).items()})

        size = sum(w.numel() for w in weights.values())
        with torch.no_grad():
            rows = vmap(one, chunk_size=max(1, _CHUNK_WEIGHTS // size))(*self._experiment.canaries)
            flat = _flat(release)
            along = (rows @ flat).double()
            self._total += _log_likelihood(along, torch.linalg.vector_norm(rows, dim=1).double(), q)
            self._gram += q * q * (rows @ rows.T).double()
            self._seen += q * along

    def scores(self) -> dict[str, Tensor]:
        prior = 4.0 * torch.eye(len(self._seen), dtype=torch.float64)
        joint = torch.linalg.solve(self._gram + prior, self._seen - self._gram.sum(1) / 2)
        return {"likelihood": self._total, "joint": joint}


def worlds(experiment: Experiment, setting: Setting, coins: NDArray[np.bool_]) -> tuple[dict[str, Array], Training]:
    """Scores of independent runs, run i with the canary in where `coins[i]`: two engines, one for each dataset.

    Returns:
        name → (len(coins),) float64, and the training with the canary.
    """
    parts = {}
    trainings: list[Training] = []
    steps, outside = setting.plan.steps, int((~coins).sum())
    for world in (False, True):
        seed = None if setting.seed is None else 2 * setting.seed + world
        count = int((coins == world).sum())
        before = steps * outside if world else 0
        own = replace(setting, seed=seed, progress=partial(_shifted, setting.progress, before, steps * len(coins)))
        parts[world], training = repeated(experiment, own, included=world, runs=max(1, count))
        trainings.append(training)
    scores = {}
    for name in parts[True]:
        scores[name] = np.empty(len(coins))
        for world, part in parts.items():
            scores[name][coins == world] = part[name][: int((coins == world).sum())]
    return scores, trainings[-1]


def _shifted(progress: Progress, before: int, total: int, done: int, _: int) -> None:
    progress(before + done, total)


def fair_coins(count: int, seed: int | None) -> NDArray[np.bool_]:
    """(count,) independent fair coins, one a game."""
    if not 40 <= count <= _MOST_GAMES:
        raise ParameterError(
            f"{count} games (runs, or canaries of one run): 40 to {_MOST_GAMES} are needed, and thousands for a useful"
            " bound"
        )
    check_seed(seed)
    return np.random.default_rng(seed).integers(0, 2, size=count).astype(bool)


def check_seed(seed: int | None) -> None:
    """ParameterError where it is not None or one that every generator takes."""
    if seed is not None and not 0 <= seed < 2**62:
        raise ParameterError(f"seed={seed}: a whole number from 0 to 2^62 - 1 is needed, or none")
