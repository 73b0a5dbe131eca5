"""An ordinary torch script, ported and nothing chosen, beside Opacus untuned: python examples/ported.py digits mlp

The test set is looked at once, after training. `LIPDP_DATA` says where the data lie (docs/data.md); digits come with
scikit-learn, and are tested on the last 297, of other writers. `--opacus` runs the script's own net there instead, with
GroupNorm for BatchNorm, Adam 1e-3, clip 1 and as many samples.
"""

import argparse
import time

import torch
from sklearn.datasets import load_digits
from torch import nn

import lipdp


def conv(a, b, stride=1):
    return nn.Sequential(nn.Conv2d(a, b, 3, stride, 1), nn.BatchNorm2d(b))


class Block(nn.Module):
    """Of a residual net: two convolutions, and a shortcut that halves where they do."""

    def __init__(self, a, b, stride):
        super().__init__()
        self.first, self.second = conv(a, b, stride), conv(b, b)
        self.shortcut = nn.Identity() if stride == 1 and a == b else conv(a, b, stride)

    def forward(self, x):
        y = self.second(torch.relu(self.first(x)))
        return torch.relu(y + self.shortcut(x))


def script(c, n, classes):
    side = ((n - 4) // 2 - 4) // 2
    return nn.Sequential(
        nn.Conv2d(c, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(32 * side * side, 64), nn.ReLU(), nn.Linear(64, classes),
    )  # fmt: skip


def script_gn(c, n, classes):
    """The script as Opacus' users would write it: GroupNorm behind the convolutions."""
    net = list(script(c, n, classes))
    return nn.Sequential(net[0], nn.GroupNorm(8, 16), *net[1:4], nn.GroupNorm(8, 32), *net[4:])


def lenet(c, n, classes):
    side = (n // 2 - 4) // 2
    return nn.Sequential(
        nn.Conv2d(c, 6, 5, padding=2), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.AvgPool2d(2),
        nn.Flatten(), nn.Linear(16 * side * side, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(),
        nn.Linear(84, classes),
    )  # fmt: skip


def vgg(c, n, classes):
    layers = []
    for a, b in ((c, 16), (16, 32), (32, 64)):
        layers += [nn.Conv2d(a, b, 3, padding=1), nn.ReLU(), nn.Conv2d(b, b, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * (n // 8) ** 2, classes))


def resnet8(c, n, classes):
    return nn.Sequential(
        conv(c, 16), nn.ReLU(), Block(16, 16, 1), Block(16, 32, 2), Block(32, 64, 2), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(64, classes),
    )  # fmt: skip


def mlp(d, width, classes):
    return nn.Sequential(nn.Linear(d, width), nn.ReLU(), nn.Linear(width, classes))


def mlp3(d, width, classes):
    return nn.Sequential(nn.Linear(d, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, classes))


NETS = {f.__name__: f for f in (script, script_gn, lenet, vgg, resnet8, mlp, mlp3)}

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("data", help="digits, mnist, fashion-mnist, cifar10, or a table (adbench/22_magic.gamma)")
parser.add_argument("net", choices=NETS)
parser.add_argument("--epsilon", type=float, default=3.0)
parser.add_argument("--seed", type=int, default=0, help="of the initial weights; batches and noise have none")
parser.add_argument("--records", type=int, help="train on the first N records")
parser.add_argument("--epochs", type=float)
parser.add_argument("--adam", type=float, help="a learning rate: with Adam instead of the optimiser that is chosen")
parser.add_argument("--opacus", action="store_true")
args = parser.parse_args()

# --- data ------------------------------------------------------------------------------------------------------------
if args.data == "digits":
    x, y = (torch.tensor(array) for array in load_digits(return_X_y=True))
    x = x.float().view(-1, 1, 8, 8) / 16
    x, y, test_x, test_y = x[:1500], y[:1500], x[1500:], y[1500:]
else:
    split = lipdp.data.load(args.data)
    x, y, test_x, test_y = split.train_x, split.train_y.long(), split.test_x, split.test_y.long()
if args.net.startswith("mlp"):
    x, test_x = x.flatten(1), test_x.flatten(1)
train = torch.utils.data.TensorDataset(x[: args.records], y[: args.records])
shape, classes = tuple(x.shape[1:]), int(max(y.max(), test_y.max())) + 1
torch.manual_seed(args.seed)
net = NETS[args.net](shape[0], 32 if args.net.startswith("mlp") else shape[-1], classes)
settings = {"target_epsilon": args.epsilon, "target_delta": 1e-5}
start = time.time()

# --- training --------------------------------------------------------------------------------------------------------
if args.opacus:
    import opacus

    plain = lipdp.nn.from_torch(net, input_shape=shape)
    plan = lipdp.suggest(plain, input_shape=shape, dataset_size=len(train), epochs=args.epochs, **settings).plan
    batch, passes = plan.expected_batch_size, round(plan.steps * plan.sampling_rate)
    for parent in list(net.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(parent, name, nn.GroupNorm(min(8, child.num_features), child.num_features))
    model, optimizer, loader = opacus.PrivacyEngine().make_private_with_epsilon(
        module=net,
        optimizer=torch.optim.Adam(net.parameters(), lr=1e-3),
        data_loader=torch.utils.data.DataLoader(train, batch_size=batch),
        max_grad_norm=1.0,
        epochs=passes,
        **settings,
    )
    criterion = nn.CrossEntropyLoss()
    for _ in range(passes):
        for xb, yb in loader:
            optimizer.zero_grad()
            criterion(model(xb), yb).backward()
            optimizer.step()
else:
    model = lipdp.nn.from_torch(net, input_shape=shape)
    engine = lipdp.PrivacyEngine()
    if args.epochs:
        settings["epochs"] = args.epochs
    own = None if args.adam is None else torch.optim.Adam(model.parameters(), lr=args.adam)
    model, optimizer, loader, criterion = engine.make_private_with_epsilon(
        module=model, dataset=train, optimizer=own, **settings
    )
    print(engine.settings)
    for _ in range(int(args.epochs or 1)):
        for xb, yb in loader:
            optimizer.zero_grad()
            criterion(model(xb), yb).backward()
            optimizer.step()

model.eval()
with torch.no_grad():
    right = sum(
        int((model(a).argmax(1) == b).sum()) for a, b in zip(test_x.split(1000), test_y.split(1000), strict=True)
    )
who = "opacus" if args.opacus else "lipdp"
print(
    f"{who} {args.data} {args.net} ε={args.epsilon:g} seed {args.seed}: test accuracy {right / len(test_y):.2%}",
    end=", ",
)
print(f"{time.time() - start:.0f} s")
