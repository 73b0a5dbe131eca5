"""A private model under Lightning's Trainer, top to bottom: python examples/lightning_private.py [--epsilon 3]

pip install "lipdp[lightning]". An ordinary LightningModule: automatic optimisation, validation and checkpoints
included. What is private about it is the call of make_private in `configure_optimizers`.
"""

import argparse

import lightning
import torch

import lipdp
from lipdp import nn as lnn
from lipdp.integrations import PrivacyBudget

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--epsilon", type=float, default=3.0)
parser.add_argument("--processes", type=int, default=1, help="one for each device")
parser.add_argument("--out", default="lightning_digits", help="folder of the checkpoints")
parser.add_argument("--resume", help="a checkpoint to go on with")
parser.add_argument("--seed", type=int, help="a run that can be repeated, hence not private")
args = parser.parse_args()


class Digits(lightning.LightningModule):
    def __init__(self, engine, data):
        super().__init__()
        self.engine = engine
        self.train_set = torch.utils.data.TensorDataset(data.train_x, data.train_y)
        self.test_set = torch.utils.data.TensorDataset(data.test_x, data.test_y)
        self.model = torch.nn.Sequential(
            torch.nn.Flatten(), lnn.InputBound(4.0),
            lnn.SpectralLinear(64, 64), lnn.GroupSort2(), lnn.SpectralLinear(64, 10),
        )  # fmt: skip

    def configure_optimizers(self):  # here the model is on its device
        _, optimizer, self.batches, self.criterion = self.engine.make_private_with_epsilon(
            module=self.model, optimizer=torch.optim.SGD(self.model.parameters(), lr=0.3, momentum=0.9),
            criterion=lipdp.losses.TauCrossEntropy(tau=8.0), gate=0.3, dataset=self.train_set,
            expected_batch_size=500, steps=60, target_epsilon=args.epsilon, target_delta=1e-5,
        )  # fmt: skip
        return optimizer

    def train_dataloader(self):
        return self.batches  # 60 Poisson batches

    def val_dataloader(self):
        return torch.utils.data.DataLoader(self.test_set, batch_size=360)

    def training_step(self, batch, index):
        x, y = batch
        return self.criterion(self.model(x), y)

    def validation_step(self, batch, index):
        x, y = batch
        self.log("accuracy", (self.model(x).argmax(1) == y).float().mean(), prog_bar=True, sync_dist=True)


if args.seed is not None:
    torch.manual_seed(args.seed)
engine = lipdp.PrivacyEngine(seed=args.seed)
module = Digits(engine, lipdp.data.load("digits"))
trainer = lightning.Trainer(
    devices=args.processes,
    strategy="ddp" if args.processes > 1 else "auto",
    max_epochs=1,  # all steps are one pass through the loader
    val_check_interval=20,
    logger=False,
    callbacks=[
        PrivacyBudget(engine, epsilon=args.epsilon, delta=1e-5, log_every=10),
        lightning.pytorch.callbacks.ModelCheckpoint(args.out, every_n_train_steps=20, save_top_k=-1, filename="{step}"),
    ],
)
trainer.fit(module, ckpt_path=args.resume)
accuracy = trainer.callback_metrics["accuracy"]
if trainer.is_global_zero:
    print(f"test accuracy {accuracy:.4f} at ε = {engine.get_epsilon(delta=1e-5):.3f}, δ = 1e-5")
