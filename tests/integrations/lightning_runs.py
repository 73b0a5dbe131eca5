"""Runs by Lightning's Trainer: modules in the forms that people write, and the callback of the budget."""

from __future__ import annotations

import pytest
import torch
from plain_loop import DELTA, net, private
from torch.utils.data import DataLoader, TensorDataset

import lipdp

lightning = pytest.importorskip("lightning")

from lightning.pytorch import callbacks  # noqa: E402, F401

from lipdp.integrations.lightning import PrivacyBudget  # noqa: E402


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
