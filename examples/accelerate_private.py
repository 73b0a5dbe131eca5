"""A private model under Hugging Face Accelerate, top to bottom: python examples/accelerate_private.py [--epsilon 3]

pip install "lipdp[accelerate]". `prepare` leaves the loader as it is, since it is no torch DataLoader.
On several devices: accelerate launch --multi_gpu --num_processes 2 examples/accelerate_private.py
On two processes of a CPU: ACCELERATE_USE_CPU=true torchrun --nproc-per-node 2 examples/accelerate_private.py
"""

import argparse

import torch
from accelerate import Accelerator

import lipdp
from lipdp import nn as lnn

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--epsilon", type=float, default=3.0)
parser.add_argument("--out", help="file for the weights")
parser.add_argument("--seed", type=int, help="a run that can be repeated, hence not private")
args = parser.parse_args()

if args.seed is not None:
    torch.manual_seed(args.seed)
data = lipdp.data.load("digits")
accelerator = Accelerator()

# --- private, on the device it will be trained on ---------------------------------------------------------------------
model = torch.nn.Sequential(
    torch.nn.Flatten(), lnn.InputBound(4.0),
    lnn.SpectralLinear(64, 64), lnn.GroupSort2(), lnn.SpectralLinear(64, 10),
).to(accelerator.device)  # fmt: skip
engine = lipdp.PrivacyEngine(seed=args.seed)
_, optimizer, loader, criterion = engine.make_private_with_epsilon(
    module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9),
    criterion=lipdp.losses.TauCrossEntropy(tau=8.0), gate=0.3,
    dataset=torch.utils.data.TensorDataset(data.train_x, data.train_y),
    expected_batch_size=500, steps=60, target_epsilon=args.epsilon, target_delta=1e-5,
)  # fmt: skip

# --- Accelerate's own loop --------------------------------------------------------------------------------------------
wrapped, stepper, loader = accelerator.prepare(model, optimizer, loader)
accelerator.register_for_checkpointing(engine)  # save_state and load_state carry the account
for x, y in loader:
    stepper.zero_grad()
    accelerator.backward(criterion(wrapped(x.to(accelerator.device)), y.to(accelerator.device)))
    stepper.step()

with torch.no_grad():
    accuracy = (model(data.test_x.to(accelerator.device)).argmax(1).cpu() == data.test_y).float().mean()
accelerator.print(f"test accuracy {accuracy:.4f} at ε = {engine.get_epsilon(delta=1e-5):.3f}, δ = 1e-5")
accelerator.print(f"{accelerator.num_processes} process(es), {engine.steps_taken} steps")
if args.out:
    accelerator.save(model.state_dict(), args.out)
accelerator.end_training()
