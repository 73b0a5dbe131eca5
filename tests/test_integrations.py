"""Lightning, Fabric and Accelerate: what they release is, bit for bit, what a plain torch loop releases; what could
break the account is refused, with the reason."""

from __future__ import annotations

import os
import re
import runpy
import signal
import subprocess
import sys
from functools import cache
from pathlib import Path

import kit
import pytest
import torch
from kit import train
from torch.utils.data import DataLoader, TensorDataset

import lipdp
from lipdp import nn as lnn
from lipdp.errors import EngineError, LipdpError, OptimizerError, ParameterError, ResumeError
from lipdp.integrations.budget import steps_within

lightning = pytest.importorskip("lightning")
accelerate = pytest.importorskip("accelerate")

from lightning.fabric import Fabric  # noqa: E402
from lightning.pytorch import callbacks  # noqa: E402

from lipdp.integrations.lightning import PrivacyBudget  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("one_thread", "alone"),
    pytest.mark.filterwarnings("ignore"),  # the trainers warn of themselves, of each other and of what torch deprecates
]

EXAMPLES = Path(__file__).parents[1] / "examples"
DELTA = 1e-5
STEPS = 12


@pytest.fixture
def alone():
    """Accelerate keeps its settings in process-wide objects."""
    yield
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(scope="module")
def digits():
    return lipdp.data.load("digits")


def net(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(
        torch.nn.Flatten(),
        lnn.InputBound(4.0),
        lnn.SpectralLinear(64, 64),
        lnn.GroupSort2(),
        lnn.SpectralLinear(64, 10),
    )


def private(digits, model=None, *, optimizer=torch.optim.SGD, **options):
    model = net() if model is None else model
    settings = {"lr": 0.3, "momentum": 0.9} if optimizer is torch.optim.SGD else {"lr": 0.05}
    defaults = {"expected_batch_size": 300, "steps": STEPS, "noise_multiplier": 2.0, "gate": 0.3}
    dataset = TensorDataset(digits.train_x, digits.train_y)
    return kit.private(model, dataset, optimizer=optimizer(model.parameters(), **settings), **{**defaults, **options})


@cache
def plain(digits, after=lambda model: None, steps=None, **options):
    """The loop of the README, with the same engine: what the trainers must release."""
    engine, model, *made = private(digits, **options)
    train(model, *made, steps=steps, after=lambda: after(model))
    return model.state_dict(), engine.get_epsilon(DELTA)


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# --- the examples -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def twin(digits):
    """A plain loop with the settings of the examples."""
    model, engine = net(), lipdp.PrivacyEngine(seed=0)
    model, optimizer, loader, criterion = engine.make_private_with_epsilon(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9),
        criterion=lipdp.losses.TauCrossEntropy(tau=8.0), gate=0.3,
        dataset=TensorDataset(digits.train_x, digits.train_y),
        expected_batch_size=500, steps=60, target_epsilon=3.0, target_delta=DELTA,
    )  # fmt: skip
    train(model, optimizer, loader, criterion)
    return model.state_dict(), engine.get_epsilon(DELTA)


@pytest.mark.parametrize("name", ["lightning_private", "fabric_private", "accelerate_private"])
def test_an_example_releases_the_weights_of_the_plain_loop(name, twin, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--seed", "0"])
    monkeypatch.chdir(tmp_path)
    names = runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    model = names["module"].model if "module" in names else names["model"]
    assert same(model.state_dict(), twin[0])
    assert names["engine"].get_epsilon(DELTA) == twin[1] <= 3.0
    assert names["engine"].steps_taken == 60
    assert names["accuracy"] > 0.6
    assert "test accuracy 0." in capsys.readouterr().out


PAGE = re.findall(r"```python\n(.*?)```", (EXAMPLES.parent / "docs" / "integrations.md").read_text(), re.S)


def test_the_lines_of_the_page_for_lightning_run_as_written(digits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # Lightning's logger writes here
    (block,) = [block for block in PAGE if "PrivacyBudget(" in block]
    model, engine = net(), lipdp.PrivacyEngine("rdp", seed=0)
    names = {"engine": engine, "lightning": lightning, "PrivacyBudget": PrivacyBudget}
    names["settings"] = {
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9),
        "criterion": lipdp.losses.TauCrossEntropy(8.0), "dataset": TensorDataset(digits.train_x, digits.train_y),
        "expected_batch_size": 300, "steps": STEPS, "noise_multiplier": 2.0, "gate": 0.3,
    }  # fmt: skip
    exec(block, names)
    kind = type("Readme", (Module,), {
        "configure_optimizers": names["configure_optimizers"], "train_dataloader": lambda self: self.loader,
    })  # fmt: skip
    names["trainer"].fit(kind(engine, digits, model=model))
    expected = plain(digits)
    assert same(model.state_dict(), expected[0])
    assert engine.get_epsilon(DELTA) == expected[1]
    assert len(block.strip().splitlines()) <= 5


# --- Lightning's Trainer ----------------------------------------------------------------------------------------------


class Module(lightning.LightningModule):
    def __init__(self, engine, digits, model=None, optimizer=torch.optim.SGD, **options):
        super().__init__()
        self.engine, self.digits, self.kind, self.options = engine, digits, optimizer, options
        self.model = net() if model is None else model

    def configure_optimizers(self):
        *_, optimizer, self.batches, self.criterion = private(
            self.digits, self.model, optimizer=self.kind, engine=self.engine, **self.options
        )
        return optimizer

    def train_dataloader(self):
        return self.batches

    def val_dataloader(self):
        return DataLoader(TensorDataset(self.digits.test_x, self.digits.test_y), batch_size=100)

    def training_step(self, batch, index):
        x, y = batch
        return self.criterion(self.model(x), y)

    def validation_step(self, batch, index):
        x, y = batch
        self.log("accuracy", (self.model(x).argmax(1) == y).float().mean())


class Manual(Module):
    """Micro-batches: the user's own loop inside of `training_step`."""

    size = 10**6

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.automatic_optimization = False

    def training_step(self, batch, index):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        for x, y in self.engine.microbatches(*batch, self.size):
            self.manual_backward(self.criterion(self.model(x), y))
        optimizer.step()


class Scheduled(Module):
    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class Before(Module):
    """make_private at once, not in `configure_optimizers`."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.optimizer = super().configure_optimizers()

    def configure_optimizers(self):
        return self.optimizer


class CompiledModel(Module):
    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        self.__dict__["quick"] = torch.compile(self.model, backend="eager")
        return optimizer

    def training_step(self, batch, index):
        x, y = batch
        return self.criterion(self.quick(x), y)


def trainer(*extra, **options):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return lightning.Trainer(
        **{
            **quiet,
            "enable_model_summary": False,
            "accelerator": "cpu",
            "max_epochs": 1,
            "callbacks": [*extra],
            **options,
        }
    )


def fit(digits, *extra, kind=Module, budget=float("inf"), ckpt_path=None, seed=0, module_options=None, **options):
    engine = lipdp.PrivacyEngine("rdp", seed=seed)
    module = kind(engine, digits, **(module_options or {}))
    run = trainer(PrivacyBudget(engine, delta=DELTA, epsilon=budget, log_every=1), *extra, **options)
    run.fit(module, ckpt_path=ckpt_path)
    return module.model.state_dict(), engine, run


HARMLESS = {
    "automatic optimisation, which passes a closure": {},
    "Adam": {"module_options": {"optimizer": torch.optim.Adam}},
    "manual optimisation": {"kind": Manual},
    "a schedule": {"kind": Scheduled},
    "make_private before the trainer": {"kind": Before},
    "a compiled model": {"kind": CompiledModel},
    "three epochs of four batches": {"max_epochs": 3, "limit_train_batches": 4},
    "max_steps": {"max_epochs": -1, "max_steps": STEPS},
    "loaders asked for at every epoch": {
        "max_epochs": 3, "limit_train_batches": 4, "reload_dataloaders_every_n_epochs": 1,
    },
    "validation in between, in inference mode": {"val_check_interval": 4},
    "validation in between, without": {"val_check_interval": 4, "inference_mode": False},
    "no sanity check": {"num_sanity_val_steps": 0},
    "anomaly detection": {"detect_anomaly": True},
    "no distributed sampler": {"use_distributed_sampler": False},
}  # fmt: skip


@pytest.mark.parametrize("case", HARMLESS)
def test_the_trainer_releases_what_the_plain_loop_does(case, digits):
    expected, epsilon = plain(digits, **HARMLESS[case].get("module_options", {}))
    weights, engine, run = fit(digits, **HARMLESS[case])
    assert same(weights, expected)
    assert engine.get_epsilon(DELTA) == epsilon == pytest.approx(float(run.callback_metrics["epsilon"]), rel=1e-6)
    assert engine.steps_taken == STEPS == run.global_step


def test_micro_batches_in_the_trainer_are_one_step(digits):
    expected, epsilon = plain(digits)
    weights, engine, _ = fit(digits, kind=type("Small", (Manual,), {"size": 100}))
    assert all(torch.allclose(weights[n], expected[n], atol=1e-5) for n in expected)  # sums in another order
    assert engine.get_epsilon(DELTA) == epsilon


def test_averaging_the_weights_is_post_processing(digits):
    """Lightning's EMA is torch's average of the weights that were released, and the run underneath is the same."""
    averaged = []

    def update(model):
        if not averaged:
            averaged.append(torch.optim.swa_utils.AveragedModel(start, avg_fn=decay))
        averaged[0].update_parameters(model)

    start, decay = net(), torch.optim.swa_utils.get_ema_avg_fn(0.9)
    _, epsilon = plain(digits, after=update)
    weights, engine, _ = fit(digits, callbacks.EMAWeightAveraging(decay=0.9))
    assert same(weights, averaged[0].module.state_dict())
    assert engine.get_epsilon(DELTA) == epsilon


def test_stochastic_weight_averaging_costs_nothing(digits):
    swa = callbacks.StochasticWeightAveraging(swa_lrs=0.1, swa_epoch_start=1)
    _, engine, _ = fit(digits, swa, max_epochs=3, limit_train_batches=4)
    assert engine.get_epsilon(DELTA) == plain(digits)[1]
    assert engine.steps_taken == STEPS


def test_bf16_needs_its_dtype_in_the_bound_and_costs_no_epsilon(digits):
    with pytest.raises(EngineError, match=r"forward_dtype=torch\.bfloat16"):
        fit(digits, precision="bf16-mixed")
    expected, epsilon = plain(digits)
    weights, engine, _ = fit(digits, precision="bf16-mixed", module_options={"forward_dtype": torch.bfloat16})
    assert all(torch.allclose(weights[n], expected[n], atol=0.1) for n in expected)
    assert engine.get_epsilon(DELTA) == epsilon


class HalfForward(Module):
    """What '16-mixed' does on an accelerator: on the CPU Lightning makes it bf16."""

    def training_step(self, batch, index):
        x, y = batch
        with torch.autocast("cpu", dtype=torch.float16):
            logits = self.model(x)
        return self.criterion(logits.float(), y)


class Skipping(Module):
    def training_step(self, batch, index):
        return None


class TwoOptimisers(Manual):
    def configure_optimizers(self):
        return [super().configure_optimizers(), torch.optim.SGD(self.model.parameters(), lr=0.1)]


class AnotherOptimiser(Module):
    def configure_optimizers(self):
        super().configure_optimizers()
        return torch.optim.SGD(self.model.parameters(), lr=0.1)


class OwnCriterion(Module):
    def training_step(self, batch, index):
        x, y = batch
        return torch.nn.functional.cross_entropy(self.model(x), y, reduction="sum")


class NoisyGradients(callbacks.Callback):
    """A callback that scales gradients where Lightning lets callbacks do so: before the noise."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        for parameter in pl_module.model.parameters():
            parameter.grad.mul_(2.0)


REFUSED = {
    "accumulation": ({"accumulate_grad_batches": 2}, EngineError, "accumulate_grad_batches"),
    "accumulation later": (
        {"extra": lambda: callbacks.GradientAccumulationScheduler({0: 1, 1: 2}), "max_epochs": 3,
         "limit_train_batches": 4},
        EngineError, "accumulate_grad_batches",
    ),
    "clipping the norm": ({"gradient_clip_val": 0.1}, EngineError, "gradient_clip_val"),
    "clipping values": (
        {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"}, EngineError, "gradient_clip_val",
    ),
    "a callback that scales": ({"extra": NoisyGradients}, EngineError, "changed between backward"),
    "half precision": ({"kind": HalfForward}, EngineError, "16-mixed"),
    "weights in bf16": ({"precision": "bf16-true"}, LipdpError, "Keep parameters in float32"),
    "a step left out": ({"kind": Skipping}, EngineError, "no gradient went through the criterion"),
    "another criterion": ({"kind": OwnCriterion}, EngineError, "no gradient went through the criterion"),
    "two optimisers": ({"kind": TwoOptimisers}, OptimizerError, "SGD, SGD"),
    "another optimiser": ({"kind": AnotherOptimiser}, OptimizerError, "needs the one optimiser"),
    "LBFGS": ({"module_options": {"optimizer": torch.optim.LBFGS}}, OptimizerError, "several times a step"),
    "the same batches again": ({"overfit_batches": 2}, EngineError, "overfit_batches"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_trainer_must_not_do_is_refused(case, digits):
    options, error, named = REFUSED[case]
    extra = [options["extra"]()] if "extra" in options else []
    module, made = options.get("kind", Module), []

    class Recorded(module):
        def __init__(self, engine, *args, **kwargs):
            super().__init__(engine, *args, **kwargs)
            made.append((engine, self.model, {n: p.clone() for n, p in self.model.state_dict().items()}))

    with pytest.raises(error, match=named):
        fit(digits, *extra, **{k: v for k, v in options.items() if k != "extra"} | {"kind": Recorded})
    engine, model, before = made[0]
    taken = 4 if case == "accumulation later" else 0
    assert engine.steps_taken == taken
    if not taken and case != "weights in bf16":
        assert same(model.state_dict(), before)


# --- the callback -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [0.9, 1.5, 1.9])
def test_training_stops_before_a_step_that_the_budget_does_not_pay_for(budget, digits):
    weights, engine, run = fit(digits, budget=budget)
    taken = engine.steps_taken
    assert 0 < taken < STEPS
    assert engine.get_epsilon(DELTA) <= budget
    more = engine.accountant.epsilon([engine.plan.step_event.with_steps(taken + 1)], DELTA).epsilon
    assert more > budget
    assert float(run.callback_metrics["epsilon"]) == pytest.approx(engine.get_epsilon(DELTA), rel=1e-6)
    assert same(weights, plain(digits, steps=taken)[0])


def test_a_budget_that_pays_for_nothing_trains_nothing(digits):
    weights, engine, run = fit(digits, budget=0.01)
    assert engine.steps_taken == run.global_step == 0
    assert same(weights, net().state_dict())


@pytest.mark.parametrize("insist", [{"min_steps": STEPS}, {"min_epochs": 1}])
def test_a_trainer_that_goes_on_beyond_the_budget_is_refused(insist, digits):
    with pytest.raises(EngineError, match="pays for 5 steps"):
        fit(digits, budget=1.5, **insist)


def test_epsilon_is_logged_every_so_often(digits):
    seen = []

    class Watch(callbacks.Callback):
        def on_train_batch_end(self, trainer, *args):
            seen.append(float(trainer.callback_metrics.get("epsilon", 0.0)))

    engine = lipdp.PrivacyEngine("rdp", seed=0)
    watched = trainer(PrivacyBudget(engine, delta=DELTA, log_every=5), Watch())
    watched.fit(Module(engine, digits))
    steps = [engine.accountant.epsilon([engine.plan.step_event.with_steps(n)], DELTA).epsilon for n in (5, 10, STEPS)]
    assert seen[3] == 0
    assert sorted(set(seen)) == pytest.approx([0.0, *steps], rel=1e-6)


@pytest.mark.parametrize(
    "options", [{"delta": 0.0}, {"delta": 1.0}, {"delta": 1e-5, "epsilon": 0.0}, {"delta": 1e-5, "log_every": 0}]
)
def test_the_callback_names_bad_arguments(options):
    with pytest.raises(ParameterError, match=list(options)[-1]):
        PrivacyBudget(lipdp.PrivacyEngine(), **options)


def test_the_number_of_steps_counts_those_of_earlier_runs(digits):
    engine, model, *made = private(digits)
    alone = steps_within(engine, epsilon=1.5, delta=DELTA)
    train(model, *made, steps=3)
    assert steps_within(engine, epsilon=1.5, delta=DELTA) == alone - 3
    assert steps_within(engine, epsilon=float("inf"), delta=DELTA) == STEPS - 3
    engine.detach()
    private(digits, model, engine=engine)
    assert steps_within(engine, epsilon=1.5, delta=DELTA) == alone - 3
    assert steps_within(engine, epsilon=float("inf"), delta=DELTA) == STEPS
    with pytest.raises(ParameterError, match="epsilon"):
        steps_within(engine, epsilon=0.0, delta=DELTA)


# --- checkpoints ------------------------------------------------------------------------------------------------------


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
    """A batch that was drawn and not used is not drawn again: one step fewer, nothing counted twice or left out."""
    interrupted(digits, tmp_path, where)
    _, engine, run = fit(digits, ckpt_path=tmp_path / "dying.ckpt")
    assert engine.steps_taken == run.global_step == (STEPS if where == "after the step" else STEPS - 1)


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
    with pytest.raises(EngineError, match="of step 6 and the engine has taken 12"):
        trainer(PrivacyBudget(engine, delta=DELTA)).fit(module, ckpt_path=tmp_path / "step=6.ckpt")
    assert engine.steps_taken == STEPS


@pytest.mark.parametrize(("kind", "named"), [(Module, "already made a model private"), (Before, "going back")])
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


KILLED = """
import os, signal, sys
import lightning
lightning.pytorch.callbacks.ModelCheckpoint.on_train_batch_end = (lambda real: lambda self, trainer, *args: (
    real(self, trainer, *args), trainer.global_step == 47 and os.kill(os.getpid(), signal.SIGKILL)))(
    lightning.pytorch.callbacks.ModelCheckpoint.on_train_batch_end)
import runpy
sys.argv = [sys.argv[1], "--seed", "0"]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_the_example_killed_and_resumed_releases_the_weights_of_the_plain_loop(twin, tmp_path, monkeypatch):
    example = str(EXAMPLES / "lightning_private.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLES.parent)}
    process = subprocess.run(
        [sys.executable, "-c", KILLED, example], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert process.returncode == -signal.SIGKILL, process.stderr
    folder = tmp_path / "lightning_digits"
    assert sorted(path.name for path in folder.iterdir()) == ["step=20.ckpt", "step=40.ckpt"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [example, "--seed", "0", "--resume", str(folder / "step=40.ckpt")])
    names = runpy.run_path(example, run_name="__main__")
    assert same(names["module"].model.state_dict(), twin[0])
    assert names["engine"].get_epsilon(DELTA) == twin[1]


def test_without_lightning_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    with pytest.raises(ParameterError, match=r'pip install "lipdp\[lightning\]"'):
        runpy.run_path(sys.modules[PrivacyBudget.__module__].__file__)


# --- Fabric -----------------------------------------------------------------------------------------------------------


def with_fabric(
    digits,
    *,
    precision="32-true",
    size=10**6,
    clip=None,
    accumulate=1,
    compiled=False,
    apart=False,
    wrap=False,
    **options,
):
    fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
    fabric.launch()
    engine, model, optimizer, loader, criterion = private(digits, **options)
    quick = torch.compile(model, backend="eager") if compiled else model
    if apart:
        wrapped, stepper = fabric.setup_module(quick), fabric.setup_optimizers(optimizer)
    else:
        wrapped, stepper = fabric.setup(quick, optimizer)
    if wrap:
        loader = fabric.setup_dataloaders(loader)
    for number, batch in enumerate(loader, 1):
        due = number % accumulate == 0
        with fabric.no_backward_sync(wrapped, enabled=not due):
            for x, y in engine.microbatches(*batch, size):
                fabric.backward(criterion(wrapped(x), y))
        if clip:
            fabric.clip_gradients(wrapped, stepper, **clip)
        if due:
            stepper.step()
            stepper.zero_grad()
    return model.state_dict(), engine.get_epsilon(DELTA)


@pytest.mark.parametrize("options", [{}, {"apart": True}, {"compiled": True}], ids=str)
def test_fabric_releases_what_the_plain_loop_does(options, digits):
    weights, epsilon = with_fabric(digits, **options)
    expected = plain(digits)
    assert same(weights, expected[0])
    assert epsilon == expected[1]


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [({"size": 100}, 1e-5), ({"precision": "bf16-mixed", "forward_dtype": torch.bfloat16}, 0.1)],
    ids=["micro-batches", "bf16"],
)
def test_fabric_within_float_error(options, tolerance, digits):
    weights, epsilon = with_fabric(digits, **options)
    expected = plain(digits)
    assert all(torch.allclose(weights[n], expected[0][n], atol=tolerance) for n in weights)
    assert epsilon == expected[1]


@pytest.mark.parametrize(
    ("options", "error", "named"),
    [
        ({"accumulate": 2}, EngineError, "accumulate_grad_batches"),
        ({"clip": {"max_norm": 0.1}}, EngineError, r"fabric\.clip_gradients"),
        ({"clip": {"clip_val": 0.1}}, EngineError, r"fabric\.clip_gradients"),
        ({"precision": "bf16-mixed"}, EngineError, r"forward_dtype=torch\.bfloat16"),
        ({"precision": "bf16-true"}, EngineError, "torch.bfloat16"),
        ({"wrap": True}, TypeError, "DataLoader"),  # Fabric's own refusal
    ],
    ids=str,
)
def test_what_fabric_must_not_do_is_refused(options, error, named, digits):
    with pytest.raises(error, match=named):
        with_fabric(digits, **options)


@pytest.mark.parametrize("account", [True, False])
def test_fabric_saves_and_loads_the_engine(account, digits, tmp_path):
    expected, epsilon = plain(digits)
    fabric = Fabric(accelerator="cpu", devices=1)

    def run(batches, load=None):
        engine, model, optimizer, loader, criterion = private(digits)
        wrapped, stepper = fabric.setup(model, optimizer)
        state = {"model": wrapped, "optimizer": stepper, **({"engine": engine} if account else {})}
        if load:
            fabric.load(load, state)
        for _, (x, y) in zip(range(batches), loader, strict=False):
            stepper.zero_grad()
            fabric.backward(criterion(wrapped(x), y))
            stepper.step()
        return model, engine, state

    fabric.save(tmp_path / "state.ckpt", run(7)[2])
    if not account:
        with pytest.raises(EngineError, match="restored after 7 private steps"):
            run(STEPS, load=tmp_path / "state.ckpt")
        return
    model, engine, _ = run(STEPS, load=tmp_path / "state.ckpt")
    assert same(model.state_dict(), expected)
    assert engine.get_epsilon(DELTA) == epsilon


# --- Accelerate -------------------------------------------------------------------------------------------------------


def with_accelerate(
    digits, *, precision=None, size=10**6, clip=None, accumulate=1, compiled=False, model_first=False,
    prepare_model=True, criterion_too=False, scheduled=False, **options,
):  # fmt: skip
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=accumulate)
    network = accelerator.prepare(net()) if model_first else net()
    engine, model, optimizer, loader, criterion = private(digits, network, **options)
    wrapped = torch.compile(model, backend="eager") if compiled else model
    if prepare_model and not model_first:
        wrapped = accelerator.prepare(wrapped)
    stepper, batches = accelerator.prepare(optimizer, loader)
    assert batches is loader  # not sharded, not read one batch ahead
    if criterion_too:
        criterion = accelerator.prepare(criterion)
    schedule = accelerator.prepare(torch.optim.lr_scheduler.LambdaLR(stepper, lambda step: 1.0)) if scheduled else None
    for batch in batches:
        with accelerator.accumulate(wrapped):
            stepper.zero_grad()
            for x, y in engine.microbatches(*batch, size):
                with accelerator.autocast():
                    loss = criterion(wrapped(x), y)
                accelerator.backward(loss)
            if clip:
                getattr(accelerator, clip)(wrapped.parameters(), 0.1)
            stepper.step()
            if schedule:
                schedule.step()
    return model.state_dict(), engine.get_epsilon(DELTA)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"model_first": True},
        {"criterion_too": True},
        {"scheduled": True},
        {"compiled": True},
        {"prepare_model": False},
    ],
    ids=str,
)
def test_accelerate_releases_what_the_plain_loop_does(options, digits):
    weights, epsilon = with_accelerate(digits, **options)
    expected = plain(digits)
    assert same(weights, expected[0])
    assert epsilon == expected[1]


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [({"size": 100}, 1e-5), ({"precision": "bf16", "prepare_model": False, "forward_dtype": torch.bfloat16}, 0.1)],
    ids=["micro-batches", "bf16"],
)
def test_accelerate_within_float_error(options, tolerance, digits):
    weights, epsilon = with_accelerate(digits, **options)
    expected = plain(digits)
    assert all(torch.allclose(weights[n], expected[0][n], atol=tolerance) for n in weights)
    assert epsilon == expected[1]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"accumulate": 2}, "gradient_accumulation_steps"),
        ({"clip": "clip_grad_norm_"}, r"accelerator\.clip_grad_norm_"),
        ({"clip": "clip_grad_value_"}, "changed between backward"),
        ({"precision": "bf16"}, r"accelerator\.autocast\(\)"),
        ({"precision": "bf16", "forward_dtype": torch.bfloat16}, r"accelerator\.autocast\(\)"),
    ],
    ids=str,
)
def test_what_accelerate_must_not_do_is_refused(options, named, digits):
    with pytest.raises(EngineError, match=named):
        with_accelerate(digits, **options)


@pytest.mark.parametrize("account", [True, False])
def test_accelerate_saves_and_loads_the_engine(account, digits, tmp_path):
    expected, epsilon = plain(digits)

    def run(batches, save=None, load=None):
        accelerator = accelerate.Accelerator(cpu=True)
        engine, model, optimizer, loader, criterion = private(digits)
        wrapped, stepper, loader = accelerator.prepare(model, optimizer, loader)
        if account:
            accelerator.register_for_checkpointing(engine)
        if load:
            accelerator.load_state(load)
        for _, (x, y) in zip(range(batches), loader, strict=False):
            stepper.zero_grad()
            accelerator.backward(criterion(wrapped(x), y))
            stepper.step()
        if save:
            accelerator.save_state(save)
        return model, engine

    run(7, save=tmp_path)
    if not account:
        with pytest.raises(EngineError, match="restored after 7 private steps"):
            run(STEPS, load=tmp_path)
        return
    model, engine = run(STEPS, load=tmp_path)
    assert same(model.state_dict(), expected)
    assert engine.get_epsilon(DELTA) == epsilon


# --- several processes ------------------------------------------------------------------------------------------------


def run_in_a_process(*command, cwd, **variables):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLES.parent), **variables}
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def close(one, other):
    return one.keys() == other.keys() and all(torch.allclose(one[name], other[name], atol=2e-6) for name in one)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("name", ["accelerate", "fabric"])
def test_two_processes_release_what_one_does(name, twin, tmp_path):
    """One account, one draw of the batch and one of the noise: at one seed all that differs is the order of a sum."""
    launch = {
        "accelerate": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2],
        "fabric": [],  # starts its processes itself
    }
    more = {"accelerate": [], "fabric": ["--processes", 2]}
    printed = run_in_a_process(
        *launch[name], EXAMPLES / f"{name}_private.py", "--seed", 0, "--out", "two.pt", *more[name],
        cwd=tmp_path, ACCELERATE_USE_CPU="true",
    )  # fmt: skip
    assert printed.count("2 process(es), 60 steps") == 1
    assert f"ε = {twin[1]:.3f}" in printed
    weights = torch.load(tmp_path / "two.pt", weights_only=True)
    assert close(weights, twin[0])


@pytest.mark.slow
@pytest.mark.distributed
def test_the_trainer_on_two_processes_releases_what_one_does_and_one_goes_on(twin, tmp_path, monkeypatch):
    """DistributedDataParallel by Lightning, the closure included; then the run of two processes ends on one."""
    example = EXAMPLES / "lightning_private.py"
    printed = run_in_a_process(example, "--seed", 0, "--processes", 2, cwd=tmp_path)
    assert printed.count(f"ε = {twin[1]:.3f}") == 1
    folder = tmp_path / "lightning_digits"
    state = torch.load(folder / "step=60.ckpt", weights_only=True)["state_dict"]
    weights = {name.removeprefix("model."): value for name, value in state.items()}
    assert close(weights, twin[0])
    assert not same(weights, twin[0])  # there were two: the sum is rounded in another order
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(example), "--seed", "0", "--resume", str(folder / "step=40.ckpt")])
    names = runpy.run_path(str(example), run_name="__main__")
    assert close(names["module"].model.state_dict(), twin[0])
    assert names["engine"].get_epsilon(DELTA) == twin[1]


HOOKED = """
import runpy, sys
import lightning, torch
from lightning.pytorch.strategies import DDPStrategy

def lossy(state, bucket):
    future = torch.futures.Future()
    future.set_result(bucket.buffer() * 0.0)
    return future

class Hooked(DDPStrategy):  # Lightning's own argument is for CUDA only
    def configure_ddp(self):
        super().configure_ddp()
        self.model.register_comm_hook(None, lossy)

real = lightning.Trainer
lightning.Trainer = lambda **options: real(**{**options, "strategy": Hooked()})
sys.argv = [sys.argv[1], "--seed", "0", "--processes", "2"]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.distributed
def test_a_communication_hook_has_no_say(twin, tmp_path):
    """PowerSGD and the like change the sum before the noise; the engine sums itself."""
    (tmp_path / "hooked.py").write_text(HOOKED)
    run_in_a_process(
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "hooked.py",
        EXAMPLES / "lightning_private.py", cwd=tmp_path,
    )  # fmt: skip
    state = torch.load(tmp_path / "lightning_digits" / "step=60.ckpt", weights_only=True)["state_dict"]
    assert close({name.removeprefix("model."): value for name, value in state.items()}, twin[0])
