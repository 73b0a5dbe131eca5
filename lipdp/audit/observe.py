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
from lipdp.audit.likelihood import Likelihood, log_likelihood
from lipdp.batches.loader import BatchLoader
from lipdp.batches.samplers import CyclicPoissonSampler
from lipdp.errors import CannotLearnWarning, ParameterError
from lipdp.noise.banded import Whitened, coefficients
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

    def __init__(self, experiment: Experiment, setting: Setting, included: Tensor, *, steps: int | None = None) -> None:
        self.experiment = experiment
        plan = setting.plan if steps is None else replace(setting.plan, steps=steps)
        self._progress, self._total = setting.progress, plan.steps
        self.model = experiment.fresh_model()
        # the mechanism is audited, not the guard that would stop a run with a wrong bound
        self.engine = PrivacyEngine(setting.plan.accountant, seed=setting.seed, check_every=0)
        self.optimizer: torch.optim.Optimizer = torch.optim.SGD(self.model.parameters(), lr=experiment.learning_rate)
        self.loader: BatchLoader
        self.criterion: PrivateCriterion
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CannotLearnWarning)  # nobody wants this model to learn
            _, self.optimizer, self.loader, self.criterion = self.engine.make_private_with_plan(
                plan,
                module=self.model,
                optimizer=self.optimizer,
                criterion=experiment.loss,
                dataset=TensorDataset(*experiment.records(included)),
                allocation=setting.allocation,
            )
        self.parameters = {n: p for n, p in self.model.named_parameters() if p.requires_grad}

    @property
    def groups(self) -> Tensor:
        """(records,) of the dataset's records: with b bands each is used in the batches of its own group only."""
        sampler = self.loader.sampler
        if isinstance(sampler, CyclicPoissonSampler):
            return torch.from_numpy(sampler.groups).long()
        return torch.zeros(sampler.population, dtype=torch.long)

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


def repeated(
    experiment: Experiment, setting: Setting, *, included: bool, runs: int
) -> tuple[dict[str, Array], Training]:
    """Scores of `runs` runs of T steps with the one canary in all of them, or in none. The weights must stand still.

    The runs follow each other in one engine: samples and noise are drawn afresh at every step, and nothing else is
    carried over when the weights stand still. With b bands the noise is, but not in v = C y (`Whitened`), and neither
    is the canary if a run begins with a use of it: any T consecutive steps are a run. Scores, by name:

    - likelihood: of the claimed mechanism, canary in over out (optimal against it when the other records are silent);
    - one step: the same if the canary takes another record's place in exactly one use, not known which;
    - energy: of the release across the canary's direction, in units of the claimed noise.
    """
    plan, length = setting.plan, runs * experiment.steps
    training = Training(experiment, setting, torch.tensor([included]), steps=length + plan.bands - 1)
    _refuse_dealt(training)
    stds = training.engine.noise_stds()
    entries = _flat({n: torch.full_like(p, 1.0 / stds[n]) for n, p in training.parameters.items()})
    canary = _flat(training.gradient(*experiment.canaries)) * entries
    shift = torch.linalg.vector_norm(canary)
    direction = canary / shift
    expected = plan.sampling_rate * _flat(training.gradient(*experiment.others)) * entries
    scale = entries * experiment.expected_batch_size
    along, energy = torch.empty(2, length + plan.bands - 1)
    bands = coefficients(plan.bands)
    whitened = Whitened(bands)
    for step, (x, y) in enumerate(training.batches()):
        training.step(x, y)
        release = _flat({n: p.grad for n, p in training.parameters.items() if p.grad is not None}) * scale - expected
        row = whitened(release)
        along[step] = along_step = direction @ row
        energy[step] = row @ row - along_step.square()
    first = int(training.groups[-1]) if included else 0
    along, energy = (rows[first : first + length].double().view(runs, -1, plan.bands) for rows in (along, energy))
    along, shift = along @ torch.tensor(bands, dtype=along.dtype), shift.double()
    scores = {"likelihood": log_likelihood(along * shift, shift.square(), plan.step_event.sampling_rate).sum(1)}
    if along.shape[1] > 1:
        scores["one step"] = torch.logsumexp(2 * shift * along, 1)
    scores["energy"] = energy.mean((1, 2))
    return {name: values.numpy() for name, values in scores.items()}, training


def _refuse_dealt(training: Training) -> None:
    """The records beside the canary must be silent with bands: all runs of an engine would share how they are dealt."""
    others = zip(*training.experiment.others, strict=True) if training.engine.plan.bands > 1 else ()
    if any(bool(g.any()) for x, y in others for g in training.gradient(x.unsqueeze(0), y.unsqueeze(0)).values()):
        raise ParameterError(
            f"bands={training.engine.plan.bands}, {training.experiment.name}: records that are always there must have"
            " no gradient; they are dealt to groups once, so that runs would not be independent"
        )


def simultaneous(experiment: Experiment, setting: Setting, included: Tensor) -> tuple[dict[str, Array], Training]:
    """Scores of the m canaries in one run; the other records' gradient, which is known, is taken off in expectation.

    - likelihood: of the claimed mechanism, this canary in over out, summed over its uses: the others are noise.
    - joint: the coins of all canaries estimated together, where they are not orthogonal.
    """
    training, bands = Training(experiment, setting, included), setting.plan.bands
    rate = setting.plan.step_event.sampling_rate
    dealt = training.groups[: len(experiment.others[0])]
    seed = None if setting.seed is None else [setting.seed, 1]  # not that of the coins
    groups = torch.from_numpy(np.random.default_rng(seed).integers(bands, size=len(included)))
    groups[included] = training.groups[len(dealt) :]  # one left out has a group as well, which so tells nothing
    likelihood = Likelihood(groups, bands, rate)
    scorer: _Orthogonal | _Joint = (
        _Orthogonal(experiment, likelihood, setting.plan.noise_multiplier)
        if experiment.saturated
        else _Joint(experiment, likelihood)
    )
    whitened = {name: Whitened(coefficients(bands)) for name in training.parameters}
    for row, (x, y) in enumerate(training.batches()):
        weights = {n: p.detach().clone() for n, p in training.parameters.items()}
        expected = training.gradient(*(t[dealt == row % bands] for t in experiment.others))
        training.step(x, y)
        stds = training.engine.noise_stds()
        release = {}
        for name, parameter in training.parameters.items():
            released = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            centred = experiment.expected_batch_size * released - rate * expected[name]
            release[name] = whitened[name](centred / stds[name])
        scorer.see(training.model, weights, release, stds)
    return {name: values.numpy() for name, values in scorer.scores().items()}, training


class _Orthogonal:
    """Canaries that meet every bound and are orthogonal: the release is projected on all of them at once."""

    def __init__(self, experiment: Experiment, likelihood: Likelihood, noise_multiplier: float) -> None:
        self._experiment, self._likelihood = experiment, likelihood
        self._square = torch.tensor(noise_multiplier**-2.0, dtype=torch.float64)

    def see(self, model: nn.Module, weights: Tensors, release: Tensors, stds: dict[str, float]) -> None:
        """Take in one step: the weights in front of it, and the row of v = C y, y the release in units of the noise."""
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
        self._likelihood.add(along.double(), self._square)

    def scores(self) -> dict[str, Tensor]:
        return {"likelihood": self._likelihood.total}


class _Joint:
    """Any canaries, by their per-sample gradients a_j in units of the noise.

    With coins b, a row of v = C y is p Σ b_j w_j a_j + noise, in expectation over the batch, with the weight w_j of the
    last use (`Likelihood`) and its gradient a_j. For coins of mean ½ and variance ¼, taken as Gaussian, the posterior
    mean solves (M + 4 I)(b − ½) = s − M ½ with M = Σ_t p² A Aᵀ and s = Σ_t p A v, the rows of A being w_j a_j.
    """

    def __init__(self, experiment: Experiment, likelihood: Likelihood) -> None:
        count = len(experiment.canaries[0])
        self._experiment, self._likelihood, self._rows = experiment, likelihood, torch.empty(0)
        self._gram, self._seen = torch.zeros(count, count, dtype=torch.float64), torch.zeros(count, dtype=torch.float64)

    def see(self, model: nn.Module, weights: Tensors, release: Tensors, stds: dict[str, float]) -> None:
        loss, rate, begins = self._experiment.loss, self._likelihood.rate, self._likelihood.begins

        def value(w: Tensors, x: Tensor, y: Tensor) -> Tensor:
            return loss(functional_call(model, w, (x.unsqueeze(0),)), y.unsqueeze(0)).sum()

        def one(x: Tensor, y: Tensor) -> Tensor:
            return _flat({n: g / stds[n] for n, g in grad(value)(weights, x, y).items()})

        size = sum(w.numel() for w in weights.values())
        with torch.no_grad():
            if not len(self._rows):
                self._rows = torch.zeros(len(begins), size)
            if begins.any():
                own = (t[begins] for t in self._experiment.canaries)
                self._rows[begins] = vmap(one, chunk_size=max(1, _CHUNK_WEIGHTS // size))(*own)
            along, share = (self._rows @ _flat(release)).double(), self._likelihood.weights
            self._likelihood.add(along, self._rows.square().sum(1).double())
            self._gram += rate**2 * torch.outer(share, share) * (self._rows @ self._rows.T).double()
            self._seen += rate * share * along

    def scores(self) -> dict[str, Tensor]:
        prior = 4.0 * torch.eye(len(self._seen), dtype=torch.float64)
        joint = torch.linalg.solve(self._gram + prior, self._seen - self._gram.sum(1) / 2)
        return {"likelihood": self._likelihood.total, "joint": joint}


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
    progress(min(before + done, total), total)  # with bands a few steps more are taken


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
