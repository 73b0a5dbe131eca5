"""A private convolution net on MNIST, top to bottom: python examples/mnist.py --data-dir DIR [--epsilon 1]

DIR is what torchvision leaves on disk (DIR/MNIST/raw/*-ubyte.gz). About 96 % at ε = 1, δ = 1e-5 (see README).
"""

import argparse
import time

import torch

import lipdp
from lipdp import losses
from lipdp import nn as lnn

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--data-dir", required=True)
parser.add_argument("--epsilon", type=float, default=1.0)
parser.add_argument("--epochs", type=float, default=10)
parser.add_argument("--batch-size", type=int, default=2048)
args = parser.parse_args()

# --- data: 60,000 + 10,000 digits, pixels in [0, 1] -------------------------------------------------------------------
data = lipdp.data.load("mnist", data_dir=args.data_dir)
train = torch.utils.data.TensorDataset(data.train_x, data.train_y)

# --- model: every number here is a public constant, none is computed from the data ------------------------------------
# A clip in front of a layer bounds its input, a gate behind it bounds the gradient that comes back: together they set
# the layer's sensitivity, here 0.05, 0.1 and 0.3. Norm pooling is the non-linearity, centering the channels keeps the
# signal.
model = torch.nn.Sequential(
    lnn.InputBound(8.1, radius=1.0),
    lnn.SpectralConv2d(1, 16, 5, padding=2), lnn.ScaledL2NormPool2d(2), lnn.LayerCentering(dim=(1,)),
    lnn.GradientGate(0.05), lnn.ValueClip(0.7, radius=1.0),
    lnn.SpectralConv2d(16, 32, 5, padding=2), lnn.ScaledL2NormPool2d(2), lnn.LayerCentering(dim=(1,)),
    torch.nn.Flatten(), lnn.GradientGate(0.1), lnn.ValueClip(0.14, radius=1.0),
    lnn.SpectralLinear(32 * 7 * 7, 10),
)  # fmt: skip

# --- privacy: the smallest noise that keeps ε within the budget -------------------------------------------------------
steps = round(args.epochs * len(train) / args.batch_size)
engine = lipdp.PrivacyEngine()
model, optimizer, loader, criterion = engine.make_private_with_epsilon(
    module=model,
    optimizer=torch.optim.SGD(model.parameters(), lr=1.2, momentum=0.9),
    criterion=losses.TauCrossEntropy(tau=32.0),
    dataset=train,
    expected_batch_size=args.batch_size,
    steps=steps,
    target_epsilon=args.epsilon,
    target_delta=1e-5,
    allocation="min_variance",
    gate=0.3,
)
schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, total_iters=steps)
print(f"noise multiplier {engine.plan.noise_multiplier:.3f}, {steps} steps of about {args.batch_size} records")

# --- training: an ordinary loop ---------------------------------------------------------------------------------------
start = time.time()
for step, (x, y) in enumerate(loader, 1):
    optimizer.zero_grad()
    for xb, yb in engine.microbatches(x, y, 512):  # the whole batch is one noisy step, whatever fits the memory
        criterion(model(xb), yb).backward()
    optimizer.step()  # noise, update, projection
    schedule.step()
    if step % 25 == 0 or step == steps:
        print(f"step {step:4d}  ε = {engine.get_epsilon(delta=1e-5):.3f}  {time.time() - start:.0f} s", flush=True)

# --- test -------------------------------------------------------------------------------------------------------------
model.eval()
with torch.no_grad():
    right = sum(
        int((model(x).argmax(1) == y).sum())
        for x, y in zip(data.test_x.split(500), data.test_y.split(500), strict=True)
    )
print(f"test accuracy {right / len(data.test_y):.4f} at ε = {engine.get_epsilon(delta=1e-5):.3f}, δ = 1e-5")
