"""A private model under Lightning Fabric, top to bottom: python examples/fabric_private.py [--epsilon 3]

pip install "lipdp[lightning]". The loader is left as it is: it draws the Poisson batches that ε is computed for.
"""

import argparse

import torch
from lightning.fabric import Fabric

import lipdp
from lipdp import nn as lnn

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--epsilon", type=float, default=3.0)
parser.add_argument("--processes", type=int, default=1, help="one for each device")
parser.add_argument("--out", help="file for the weights")
parser.add_argument("--seed", type=int, help="a run that can be repeated, hence not private")
args = parser.parse_args()

if args.seed is not None:
    torch.manual_seed(args.seed)
data = lipdp.data.load("digits")
fabric = Fabric(devices=args.processes, strategy="ddp" if args.processes > 1 else "auto")
fabric.launch()

# --- private, on the device it will be trained on ---------------------------------------------------------------------
model = torch.nn.Sequential(
    torch.nn.Flatten(), lnn.InputBound(4.0),
    lnn.SpectralLinear(64, 64), lnn.GroupSort2(), lnn.SpectralLinear(64, 10),
).to(fabric.device)  # fmt: skip
engine = lipdp.PrivacyEngine(seed=args.seed)
_, optimizer, loader, criterion = engine.make_private_with_epsilon(
    module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9),
    criterion=lipdp.losses.TauCrossEntropy(tau=8.0), gate=0.3,
    dataset=torch.utils.data.TensorDataset(data.train_x, data.train_y),
    expected_batch_size=500, steps=60, target_epsilon=args.epsilon, target_delta=1e-5,
)  # fmt: skip

# --- Fabric's own loop ------------------------------------------------------------------------------------------------
wrapped, stepper = fabric.setup(model, optimizer)
for x, y in loader:
    stepper.zero_grad()
    fabric.backward(criterion(wrapped(x.to(fabric.device)), y.to(fabric.device)))
    stepper.step()

with torch.no_grad():
    accuracy = (model(data.test_x.to(fabric.device)).argmax(1).cpu() == data.test_y).float().mean()
fabric.print(f"test accuracy {accuracy:.4f} at ε = {engine.get_epsilon(delta=1e-5):.3f}, δ = 1e-5")
fabric.print(f"{fabric.world_size} process(es), {engine.steps_taken} steps")
if args.out:
    fabric.save(args.out, model.state_dict())
