"""What a checkpoint keeps for a resume, and how a run takes it up again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lipdp.accounting.digest import check_digest, with_digest
from lipdp.accounting.events import Ledger
from lipdp.distributed.collectives import World
from lipdp.errors import CheckpointError, FinishedError, LipdpError, ResumeError
from lipdp.privacy.engine import PrivacyEngine
from lipdp.training.assembly import Assembly, decided
from lipdp.training.checkpoint import RunFolder, load_optimizer, plain_number
from lipdp.training.config import TrainConfig, config_from_dict
from lipdp.training.progress import Progress
from lipdp.training.runtime import own_random_state, random_state


def saved_state(parts: Assembly, progress: Progress) -> dict[str, Any]:
    """What a checkpoint holds beside the weights."""
    return {
        "optimizer": parts.optimizer.state_dict(),
        "scheduler": parts.scheduler.state_dict(),
        "ema": parts.ema.state_dict(),
        "engine": parts.engine.state_dict(),
        "table": None if parts.table is None else parts.table.preconditioner.state_dict(),
        "random": random_state(parts.device),
        "records": progress.records,
        "noise_stds": progress.noise_stds(parts.engine),
        "progress": [progress.step, progress.seconds, float(progress.loss), progress.samples],
    }


def read_checkpoint(
    folder: RunFolder, given: Mapping[str, Any], world: World
) -> tuple[TrainConfig, dict[str, Any] | None]:
    """The settings of the run to go on with, and its checkpoint; None where no step was taken."""
    config = config_from_dict(folder.config())
    if folder.is_unstarted():
        return config.resumed(given), None
    checkpoint = folder.load()
    if "resume" not in checkpoint:
        if world.rank == 0:
            folder.drop_keys()
        raise FinishedError(f"the run in {folder} is finished: all {checkpoint['step']} steps are taken")
    return config.resumed(checkpoint.get("config", {})).resumed(given), checkpoint


def saved_noise_multiplier(state: Mapping[str, Any]) -> float:
    """σ of the run that was interrupted."""
    try:
        return float(state["engine"]["plan"]["noise_multiplier"])
    except (LookupError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(f"the checkpoint lacks the state of its engine ({error!r})") from error


def restore(
    config: TrainConfig,
    parts: Assembly,
    progress: Progress,
    checkpoint: Mapping[str, Any],
    *,
    released: int,
    first: bool,
) -> tuple[Mapping[str, Tensor], bool]:
    """Put a run where its checkpoint says.

    Returns:
        The state of torch's generators, and whether steps were released that the checkpoint does not hold: their count
        and the new keys must then be on disk before the next step.
    """
    state, total = checkpoint["resume"], decided(config.steps)
    try:
        engine = state["engine"]
        lost = released - int(engine["loader"]["position"])
        if lost > 0 and parts.engine.plan.bands > 1:
            raise ResumeError(
                f"the checkpoint of step {released} is lost. With bands no step can be repeated, because its noise"
                " would reuse the same draws. Start a new run"
            )
        if lost > 0 and config.seed is None:
            engine = _counting(parts.engine, engine, lost)
        parts.engine.load_state_dict(engine)
        parts.model.load_state_dict(checkpoint["model"])
        load_optimizer(parts.optimizer, state["optimizer"])
        _go_on(parts.scheduler, state["scheduler"])
        parts.ema.load_state_dict(state["ema"])
        if parts.table is not None:
            parts.table.preconditioner.load_state_dict(state["table"])
        random: Mapping[str, Tensor] = state["random"]
        with own_random_state(parts.device, random):
            pass
        progress.records = [dict(record) for record in state["records"]]
        progress.stds = {str(name): plain_number(std) for name, std in state["noise_stds"].items()}
        progress.step, progress.seconds, loss, progress.samples = map(plain_number, state["progress"])
        progress.loss.fill_(loss)
        if not first:
            progress.since_record()
    except LipdpError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ResumeError(f"the checkpoint does not fit this run: {error!r}") from error
    if not progress.step == parts.loader.position <= min(parts.engine.steps_taken, total):
        raise ResumeError(
            f"the checkpoint is of step {progress.step}, with {parts.loader.position} batches drawn and"
            f" {parts.engine.steps_taken} of {total} steps in its account: it was edited"
        )
    return random, lost > 0


def _go_on(scheduler: torch.optim.lr_scheduler.LRScheduler, saved: Mapping[str, Any]) -> None:
    """Where the schedule was; what it is, the configuration says."""
    own = scheduler.state_dict()
    position = {name: plain_number(saved[name]) for name in ("last_epoch", "_step_count")}
    rates = [plain_number(rate) for rate in saved["_last_lr"]]
    if len(rates) != len(own["_last_lr"]):
        raise ResumeError("the checkpoint's schedule is of another optimizer")
    scheduler.load_state_dict({**own, **position, "_last_lr": rates})


def _counting(engine: PrivacyEngine, state: Mapping[str, Any], lost: int) -> dict[str, Any]:
    """The engine's state with `lost` more steps released, and with fresh keys for those to come.

    With the old keys the steps to come would be the draws of the lost ones, so that their gradients, if they differ at
    all (another machine, other threads, a corrected record), would differ by no noise.
    """
    check_digest(state, "the saved state of the engine")
    fresh = engine.state_dict()
    ledger = Ledger.from_state(state["ledger"])
    ledger.append(engine.plan.step_event.with_steps(lost))
    changed = {
        "ledger": ledger.state_dict(),
        "before": state["before"] + lost,
        "loader": {**state["loader"], "ratchet": fresh["loader"]["ratchet"]},
        "noise": fresh["noise"],
    }
    return with_digest({**state, **changed})
