"""The hooks on one optimiser, and what they need at every step."""

from __future__ import annotations

import hashlib
import json
import math
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lipdp.accounting.digest import check_digest, with_digest
from lipdp.accounting.events import Ledger, remaining_noise_multiplier
from lipdp.accounting.plan import PrivacyPlan
from lipdp.batches.loader import BatchLoader
from lipdp.batches.rows import BatchTensor
from lipdp.bounds import BoundGraph, Sweep
from lipdp.bounds.rounding import batch_slack
from lipdp.bounds.sensitivity import Sensitivity, read_sweep
from lipdp.distributed.collectives import World
from lipdp.errors import CheckpointError, EngineError, ParameterError, UnknownNameError
from lipdp.nn import project_
from lipdp.nn.compiled import original
from lipdp.nn.sharded import is_dtensor, local_tensor, shard_index
from lipdp.noise.allocation import get_allocation, rescaled
from lipdp.passes.forward import PrivateForward
from lipdp.passes.snapshot import Snapshot
from lipdp.passes.step import StepInProgress
from lipdp.privacy.accounts import Account
from lipdp.privacy.checks import GradientCheck, ProjectionCheck, StepCheck
from lipdp.privacy.correlated import Correlated
from lipdp.privacy.criterion import PrivateCriterion
from lipdp.privacy.gate import GateState
from lipdp.privacy.optimizers import (
    Evaluated,
    Guard,
    closure_of,
    matched_parameters,
    refuse_reevaluating,
    refuse_unsuitable,
)
from lipdp.privacy.options import Draws, Request
from lipdp.privacy.step_count import STEPS_TAKEN, StepCount
from lipdp.suggestion.learning import GrowthWatch
from lipdp.timing import Clock


class StepHooks:
    """The hooks on one optimiser, and what they need at every step."""

    def __init__(
        self, request: Request, plan: PrivacyPlan, draws: Draws, world: World, *, inner: nn.Module, graph: BoundGraph,
        criterion: PrivateCriterion, gate: GateState, step: StepInProgress, loader: BatchLoader, clock: Clock,
    ) -> None:  # fmt: skip
        module, optimizer = inner, request.optimizer
        self.world, self.clock = world, clock
        self.module, self.criterion, self.loader = original(module), criterion, loader
        self.optimizer, self.step_in_progress = optimizer, step
        self.plan, self.allocation = plan, get_allocation(request.allocation)
        self.noise, self.measured = draws.noise(graph.device), draws.measured
        self.count = StepCount(plan, draws.ledger, loader)
        self.graph, self.gate = graph, gate
        self.penalties: list[Callable[[nn.Module], Tensor]] = []
        self.signals: dict[str, float] = {}
        self.advice = ""
        self._growth = GrowthWatch()
        refuse_unsuitable(self.module, optimizer, StepHooks._before_step)
        refuse_reevaluating(optimizer)
        self.names, self.parameters, self.sizes = self._trainable(optimizer)
        self._vetted = set(self.names)
        self._stepping = threading.RLock()  # of two threads that step at once, the second finds the batch used
        self._sharded = [p for p in module.parameters() if is_dtensor(p)]
        self._sharded_grads = torch.empty(0)
        unproven = {
            "fully_shard": bool(self._sharded),
            "own_records=True": request.own_records,
            "a QuantileGate": gate.moves,
        }
        self.correlated = Correlated.of(
            plan, request, self.noise, self.names, owners=loader.owners, steps=self.count.before,
            beside=[name for name in unproven if unproven[name]],
        )  # fmt: skip
        self._drawn: tuple[list[str], Tensor] | None = None  # parameters and s_l of the last step
        batch_size = plan.expected_batch_size
        self._gradient_check = GradientCheck(
            module, self.graph, criterion.loss, batch_size=batch_size, every=0 if self._sharded else draws.check_every
        )
        self.deferred = self.graph.device.type != "cpu" if draws.deferred is None else draws.deferred
        self._step_check = StepCheck(deferred=self.deferred)
        self._projection_check = ProjectionCheck(
            self.graph, batch_size=batch_size, steps=plan.steps, deferred=self.deferred
        )
        self._slack = batch_slack(batch_size, min((p.dtype for p in self.parameters), key=lambda d: d.itemsize))
        self.factor = plan.relation.sensitivity_factor
        # what is left for the gradient when the gate releases a count of its own on the same subsample
        counted = request.gating.noise_multiplier
        others = [counted] if counted < math.inf else []
        self.gradient_multiplier = remaining_noise_multiplier(plan.noise_multiplier, *others)
        self.sensitivity()  # refuses what is unbounded before anything is attached
        self._forward = PrivateForward(
            self.module, graph, step, sharded=bool(self._sharded), outer=request.module, first=self._measure_records
        )
        self._snapshots = Snapshot(module, "the model"), Snapshot(criterion, "the criterion", mode=False)
        self._handles: list[RemovableHandle | Guard] = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._project),
            optimizer.register_state_dict_pre_hook(self.count.stamp),
            Guard(self.module, optimizer, step),
        ]
        self.account = Account(weakref.ref(draws.ledger))

    @property
    def is_sharded(self) -> bool:
        """Whether processes hold different parts of the parameters."""
        return bool(self._sharded)

    # -- bounds --------------------------------------------------------------------------------------------------------

    def _trainable(self, optimizer: torch.optim.Optimizer) -> tuple[list[str], list[nn.Parameter], Tensor]:
        """Names, parameters and sizes of what the next step releases: looked up at every step, for (un)freezing."""
        names, parameters = matched_parameters(self.module, optimizer)
        sizes = torch.tensor([float(p.numel()) for p in parameters], dtype=torch.float64)
        return names, parameters, sizes.to(self.graph.device, non_blocking=True)

    def _start(self, output_bound: Tensor) -> Tensor:
        constant = self.criterion.loss.constant(output_bound)
        if not isinstance(constant, Tensor):  # `full`, which copies nothing from the host
            constant = torch.full((), constant, dtype=torch.float64, device=self.graph.device)
        return constant.to(self.graph.device, torch.float64).clamp(max=self.gate.bound)

    def _deltas_and_stds(self) -> tuple[Tensor, Tensor]:
        """Δ_l and s_l as float64 tensors; the noise multiplier is exact whatever the allocation."""
        return self._shared(self._deltas(self.graph.sweep(self._start)))

    def _deltas(self, sweep: Sweep) -> Tensor:
        return torch.stack([sweep.parameters[n] for n in self.names]) * (self.factor * self._slack)

    def _shared(self, deltas: Tensor) -> tuple[Tensor, Tensor]:
        stds = self.allocation.stds(deltas, self.sizes, self.gradient_multiplier)
        if stds.shape != deltas.shape:
            raise ParameterError(
                f"allocation={self.allocation!r} gave standard deviations of shape {tuple(stds.shape)}; one for each of"
                f" the {len(deltas)} parameters is needed, {tuple(deltas.shape)}"
            )
        return deltas, rescaled(stds, deltas, self.gradient_multiplier)

    def sensitivity(self) -> Sensitivity:
        self.settle()
        start = float(self._start(self.graph.output_bound()))
        return read_sweep(self.graph.sweep(self._start), start, self.plan.relation)

    def noise_stds(self) -> dict[str, float]:
        """Of the last step, as drawn; of a step at the weights as they are, where none was."""
        names, stds = self._drawn or (self.names, self._deltas_and_stds()[1])
        return dict(zip(names, stds.tolist(), strict=True))

    # -- the hooks -----------------------------------------------------------------------------------------------------

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> Any:
        """Evaluate a closure, once; then the noise. The step itself is given the closure's value, not the closure."""
        closure = closure_of(args, kwargs)
        with self._stepping:
            if closure is None:
                self._add_noise(optimizer)
                return None
            with torch.enable_grad():
                value = closure()
            self._add_noise(optimizer)
        return (args[0], Evaluated(value)), {}  # args[0] is the optimiser

    @torch.no_grad()
    def measure_(self, name: str, total: Tensor, sensitivity: float) -> float:
        """Account and noise of one measurement of the plan; see `PrivacyEngine.measure_`."""
        planned = {m.name: m for m in self.plan.measurements}
        if name not in planned:
            raise UnknownNameError("measurement of the plan", name, planned)
        if name in self.measured:
            raise EngineError(f"{name} was measured already; a second release would exceed ε")
        if not (sensitivity > 0 and bool(total.isfinite().all())):
            raise EngineError(
                f"{name} has sensitivity {sensitivity}, or entries that are not finite; bound its records"
            )
        if not total.is_floating_point() or total.dtype.itemsize < 4:
            raise EngineError(
                f"{name} is summed in {total.dtype}, where one record moves the rounded sum by more than its own part;"
                " sum in float64 or float32"
            )
        self.count.add_measurement(planned[name].event(self.plan.relation))  # before the draw: never under-counted
        self.measured.append(name)
        std = planned[name].noise_multiplier * self.factor * sensitivity
        self.noise.add_([total], torch.tensor([std], dtype=torch.float64))
        self.world.broadcast_([total])
        return std

    @torch.no_grad()
    def _add_noise(self, optimizer: torch.optim.Optimizer) -> None:
        """Before the step: check, account, add noise to the summed gradients, divide by the public batch size."""
        with self.clock("checks"), self.world.fail_together():
            self.world.check()
            self.count.check_order()
            self.count.check_account(optimizer)
            self.settle()
            self._check_unchanged(optimizer)
            claims = self.step_in_progress.check(self.parameters)
        self._check_alike()
        with self.clock("bound"):
            sweep = self.graph.sweep(self._start)
            deltas, stds = self._shared(self.world.all_reduce_max(self._deltas(sweep)))
            wrong = "a standard deviation that is not finite, negative, or 0 where Δ is not"
            claims.append(((stds.isfinite() & (stds >= 0)).all(), f"allocation={self.allocation!r} gave {wrong}"))
        gradients = self._summed_gradients()
        with self.clock("checks"):
            if not self.gate.moves:
                self._growth.look(deltas)
            self._check_gradients(sweep)
            units = self.step_in_progress.drawn.units if self.step_in_progress.drawn is not None else 0
            sound = self._step_check.look(
                self.names,
                gradients,
                deltas,
                step=self.count.ledger.steps + 1,
                records=sum(self.world.gather(units)) if self.world.size > 1 else units,
                claims=claims,
                combine=self._combined,
            )
        self.count.add_step()  # before the draw: a step is never under-counted
        self.account.used = True
        self._drawn = self.names, stds
        with self.clock("noise"):
            self._draw(gradients, stds)
            share = self._step_check.scale(sound, 1.0 / self.plan.expected_batch_size, gradients[0].dtype)
            torch._foreach_mul_(gradients, share)
            self.gate.release(
                self.noise, self.plan.expected_batch_size, self.factor, self.world, views=self.loader.views
            )
        self._add_penalties()
        self.step_in_progress.forget()
        self.count.use_batch()

    def _add_penalties(self) -> None:
        """Gradients of penalties on the weights: computed from released weights alone, so free."""
        for penalty in self.penalties:
            with torch.enable_grad():
                value = penalty(self.module)
                if isinstance(value, BatchTensor):
                    raise EngineError(
                        "a penalty was computed from a batch; no noise is added to it. It is a function of the weights"
                        " alone: put what depends on records into the model or the loss"
                    )
                found = torch.autograd.grad(value, self.parameters, allow_unused=True)
            for parameter, gradient in zip(self.parameters, found, strict=True):
                if gradient is not None and parameter.grad is not None:
                    parameter.grad.add_(gradient)

    def _summed_gradients(self) -> list[Tensor]:
        r"""Σ over the batch of all processes, each record's the mean over its views.

        Every process brings the sum over its own part of the batch, whatever a wrapper did to `p.grad`.
        """
        self.step_in_progress.gradients.take(self.parameters)
        held = [p.grad for p in self.parameters if p.grad is not None]
        gradients = [local_tensor(g) for g in held]
        self._sharded_grads = torch.tensor([is_dtensor(g) for g in held])
        with self.clock("exchange"):
            self.world.all_reduce_([own for g, own in zip(held, gradients, strict=True) if own is g])
        if self.loader.views > 1:
            torch._foreach_mul_(gradients, 1.0 / self.loader.views)
        return gradients

    def _draw(self, gradients: list[Tensor], stds: Tensor) -> None:
        """Noise, of one draw for the world; on shards, independent draws of their processes."""
        if self.correlated is not None:
            self.correlated.add_(gradients, stds, batch=self.loader.position)
            return
        if not self._sharded:
            self.noise.add_(gradients, stds)
            return
        sharded = self._sharded_grads.tolist()
        for noise, wanted in ((self.noise, False), (self.noise.lane(shard_index(self._sharded)), True)):
            chosen = [i for i, own in enumerate(sharded) if own == wanted]
            noise.add_([gradients[i] for i in chosen], stds[chosen])

    def _combined(self, norms: Tensor) -> Tensor:
        """Norms of gradients, from those of the parts that processes hold."""
        if not self._sharded:
            return norms
        parts = norms.square()
        self.world.all_reduce_([parts])
        return torch.where(self._sharded_grads.to(norms.device), parts.sqrt(), norms)

    def _project(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """After the step: weights back in their constraints (post-processing)."""
        with self.clock("projection"):
            project_(self.module)
        with self.clock("checks"):
            self._projection_check.look(self.count.step)
            if not self.count.left:
                self.settle()

    def settle(self) -> None:
        """Read what the deferred checks of the last step found."""
        self._step_check.read()
        self._projection_check.read()

    # -- what is checked at every step ---------------------------------------------------------------------------------

    def _check_unchanged(self, optimizer: torch.optim.Optimizer) -> None:
        """The optimiser, the model and the loss are those that were bounded, weights and freezing excepted."""
        self.names, self.parameters, self.sizes = self._trainable(optimizer)
        if self.correlated is not None:
            self.correlated.check(self.names)
        for snapshot in self._snapshots:
            snapshot.check()
        if not self._vetted.issuperset(self.names):  # a parameter is trained that was frozen when the model was traced
            BoundGraph(self.module, self.graph.input_shape, dtype=self.graph.dtype, input_bound=self.graph.input_bound)
            self._vetted.update(self.names)

    def _check_alike(self) -> None:
        """All processes are at the same step of the same run: else each draws batches and noise of its own."""
        if self.world.size == 1:
            return
        at: list[Any] = [self.count.state_dict(), self.loader.state_dict(), self.noise.state_dict()]
        if self.correlated is not None:
            at.append(self.correlated.mark)
        hashed = hashlib.blake2b(json.dumps(at, sort_keys=True).encode(), digest_size=7).digest()
        if not self.world.all_equal(int.from_bytes(hashed, "little")):
            raise EngineError(
                "the processes are not at the same point of the same run: their accounts or keys differ, so that each"
                " would draw batches and noise of its own. Restore the same state on all of them"
                " (engine.load_state_dict)"
            )

    def _check_gradients(self, sweep: Sweep) -> None:
        """Every so often: the gradients of a few records are within their bounds."""
        step = self.count.step
        if not self._gradient_check.due(step):
            return
        bounds = {n: sweep.parameters[n] for n in self.names}
        with self.world.fail_together():
            batch = self.step_in_progress.records()
            if batch is not None:
                self._gradient_check.check(batch, self._start(sweep.output), bounds, self.parameters, step=step)

    def _measure_records(self) -> None:
        """For `_check_gradients`, in front of the first private call of a batch."""
        step, batch = self.count.step, self.step_in_progress.records()
        due = self._gradient_check.due(step)
        self.step_in_progress.looked_at = step if due else None
        if batch is not None and due:
            limit = self._start(self.graph.sweep(self._start).output)
            self._gradient_check.look(batch, limit, self.parameters, step=step)

    def skip_batch(self) -> int:
        """Give up the batches drawn since the last step: each counts as a step, and nothing of them is released."""
        self._drop_gradients()
        skipped = self.count.skip()
        if self.correlated is not None:
            self.correlated.skip_(self.loader.position)
        return skipped

    def _drop_gradients(self) -> None:
        """Gradients that no noise was added to must not outlive their step, of whatever was trained for a pass."""
        for parameter in self.module.parameters():
            parameter.grad = None
        self.step_in_progress.forget()

    # -- state ---------------------------------------------------------------------------------------------------------

    def share_keys(self) -> None:
        """Every process draws with the keys of the first."""
        if self.world.size > 1:
            loader, noise = self.world.broadcast((self.loader.state_dict(), self.noise.state_dict()))
            self.loader.load_state_dict(loader)
            self.noise.load_state_dict(noise)

    def detach(self) -> None:
        if self.step_in_progress.pending or self.step_in_progress.without_noise:
            self._drop_gradients()
        self.optimizer.param_groups[0].pop(STEPS_TAKEN, None)
        for handle in self._handles:
            handle.remove()
        self._forward.remove()
        self.account.open = False
        self.settle()

    def state_dict(self) -> dict[str, Any]:
        self.settle()
        state: dict[str, Any] = {
            "plan": self.plan.as_dict(),
            **self.count.state_dict(),
            "measured": list(self.measured),
            "loader": self.loader.state_dict(),
            "noise": self.noise.state_dict(),
            "gate": self.gate.state_dict(),
        }
        if self.correlated is not None:
            over = self.loader.position == self.plan.steps
            state["correlated"] = self.correlated.state_dict(over=over)
        return with_digest(state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        missing = {"plan", "ledger", "before", "unused", "measured", "loader", "noise", "gate", "digest"} - set(state)
        if missing:
            raise CheckpointError(f"not the state of a privacy engine: {', '.join(sorted(missing))} missing")
        self.plan.check_same(state["plan"])
        check_digest(state, "the saved state of the engine")
        ledger, before = Ledger.from_state(state["ledger"]), int(state["before"])
        self.count.check_state(ledger, before, same_noise=state["noise"] == self.noise.state_dict())
        if self.correlated is not None:
            self.correlated.load_state_dict(state.get("correlated"))
        if self.step_in_progress.pending or self.step_in_progress.without_noise:
            self._drop_gradients()
        self.loader.load_state_dict(state["loader"])
        self.noise.load_state_dict(state["noise"])
        self.gate.load_state_dict(state["gate"])
        self.measured[:] = state["measured"]
        self._drawn = None
        self.count.go_on_from(ledger, before, int(state["unused"]))
        if self.correlated is not None:
            self.correlated.skip_(self.loader.position)
