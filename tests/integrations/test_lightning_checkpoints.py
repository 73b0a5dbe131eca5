"""A run that Lightning resumes ends bit-identical, and no step is forgotten."""

from __future__ import annotations

import pytest
import torch
from lightning_runs import Before, Module, PrivacyBudget, callbacks, fit, lightning, trainer
from plain_loop import DELTA, QUIET, STEPS, plain, same

import lipdp
from lipdp.errors import EngineError, ResumeError

pytestmark = QUIET


class Bomb(callbacks.Callback):
    def __init__(self, where, step=8):
        self.where, self.step = where, step

    def go_off(self, where, trainer):
        if where == self.where and trainer.global_step == self.step:
            raise InterruptedError("the machine is gone")

    def on_train_batch_end(self, trainer, *args):
        self.go_off("after the step", trainer)

    def on_before_backward(self, trainer, *args):
        self.go_off("before backward", trainer)

    def on_before_optimizer_step(self, trainer, *args):
        self.go_off("before the noise", trainer)


WHERE = ["after the step", "before backward", "before the noise"]


PLANS = {
    "one epoch": {},
    "epochs": {"max_epochs": 3, "limit_train_batches": 4},
    "validation": {"val_check_interval": 5},
}


def interrupted(digits, folder, where, **options):
    saving = callbacks.ModelCheckpoint(folder, every_n_train_steps=3, save_top_k=-1, filename="{step}")
    dying = callbacks.OnExceptionCheckpoint(folder, filename="dying")
    with pytest.raises(InterruptedError):
        fit(digits, saving, dying, Bomb(where), enable_checkpointing=True, **options)


@pytest.mark.parametrize(
    ("where", "plan"),
    [*((where, "one epoch") for where in WHERE), *(("before the noise", plan) for plan in list(PLANS)[1:])],
)
def test_a_resumed_run_ends_bit_identical(where, plan, digits, tmp_path):
    expected, epsilon = plain(digits)
    interrupted(digits, tmp_path, where, **PLANS[plan])
    weights, engine, run = fit(digits, ckpt_path=tmp_path / "step=6.ckpt", **PLANS[plan])
    assert same(weights, expected)
    assert engine.get_epsilon(DELTA) == epsilon
    assert engine.steps_taken == STEPS == run.global_step


@pytest.mark.parametrize("where", WHERE)
def test_a_checkpoint_of_a_run_that_dies_within_a_step_has_the_steps_that_were_taken(where, digits, tmp_path):
    """A batch that was drawn and not used is not drawn again, and counts: why it was not used may be its records."""
    interrupted(digits, tmp_path, where)
    _, engine, run = fit(digits, ckpt_path=tmp_path / "dying.ckpt")
    assert engine.steps_taken == STEPS
    assert run.global_step == (STEPS if where == "after the step" else STEPS - 1)


def test_a_checkpoint_without_the_account_is_not_gone_on_with(digits, tmp_path):
    interrupted(digits, tmp_path, "after the step")
    path = tmp_path / "step=6.ckpt"
    state = torch.load(path, weights_only=True)
    state.pop("callbacks")
    torch.save(state, path)
    with pytest.raises(EngineError, match="restored after 6 private steps but the account has 0"):
        fit(digits, ckpt_path=path)


def test_a_checkpoint_of_another_run_is_refused(digits, tmp_path):
    interrupted(digits, tmp_path, "after the step")
    with pytest.raises(ResumeError, match="noise_multiplier"):
        fit(digits, ckpt_path=tmp_path / "step=6.ckpt", module_options={"noise_multiplier": 1.0})


def test_the_account_does_not_go_back(digits, tmp_path):
    """It would draw the noise again that was released already."""
    engine = lipdp.PrivacyEngine("rdp", seed=0)
    module = Before(engine, digits)
    saving = callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1, filename="{step}")
    trainer(PrivacyBudget(engine, delta=DELTA), saving, enable_checkpointing=True).fit(module)
    with pytest.raises(EngineError, match="of step 6, but the engine has taken 12"):
        trainer(PrivacyBudget(engine, delta=DELTA)).fit(module, ckpt_path=tmp_path / "step=6.ckpt")
    assert engine.steps_taken == STEPS


@pytest.mark.parametrize(("kind", "named"), [(Module, "already made a model private"), (Before, "Going back")])
def test_a_search_of_the_learning_rate_is_not_forgotten(kind, named, digits, tmp_path):
    """`lr_find` takes private steps and puts weights and checkpoints back as if it had not."""
    engine = lipdp.PrivacyEngine("rdp", seed=0)
    module = kind(engine, digits)
    module.lr = 0.1
    run = trainer(PrivacyBudget(engine, delta=DELTA), default_root_dir=tmp_path)
    lightning.pytorch.tuner.Tuner(run).lr_find(module, num_training=3)
    assert engine.steps_taken == 3
    with pytest.raises(EngineError, match=named):
        run.fit(module)
