"""Lightning's Trainer releases what the plain loop does; what would break the account is refused."""

from __future__ import annotations

import re

import pytest
import torch
from lightning_runs import Before, CompiledModel, Manual, Module, PrivacyBudget, Scheduled, callbacks, fit, lightning
from plain_loop import DELTA, EXAMPLES, QUIET, STEPS, net, plain, same
from torch.utils.data import TensorDataset

import lipdp
from lipdp.errors import EngineError, LipdpError, OptimizerError

pytestmark = QUIET


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
