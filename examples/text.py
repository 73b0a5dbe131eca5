"""A private text classifier, top to bottom: python examples/text.py [--epsilon 3] [--out weights.pt] [--seed 7]

Sentences about two subjects are made from public word lists, so it runs with no file. For texts of your own replace
`sentences`. The vocabulary must be public: a word list, not the words of the private texts.
"""

import argparse
import random

import torch

import lipdp
from lipdp import nn as lnn

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--epsilon", type=float, default=3.0)
parser.add_argument("--out", help="file for the weights")
parser.add_argument("--seed", type=int, help="a run that can be repeated, hence not private")
args = parser.parse_args()

# --- texts ------------------------------------------------------------------------------------------------------------
COOKING = "bread soup oven salt recipe kitchen garlic butter spoon dinner taste fry boil sugar flour"
DRIVING = "engine wheel road brake driver gear fuel traffic bridge lorry speed park turn tyre garage"
OTHERS = "the a of and to in is it was for with on as at by this that from are or his her they"
SUBJECTS, COMMON = (COOKING.split(), DRIVING.split()), OTHERS.split()
WORDS = {word: token for token, word in enumerate(["", *COMMON, *SUBJECTS[0], *SUBJECTS[1]])}  # 0: padding, unknown
LENGTH = 16


def sentences(count: int, draw: random.Random) -> tuple[list[str], list[int]]:
    labels = [draw.randrange(2) for _ in range(count)]
    texts = [" ".join(draw.choice(COMMON if draw.random() < 0.7 else SUBJECTS[y]) for _ in range(12)) for y in labels]
    return texts, labels


def tokens(texts: list[str]) -> torch.Tensor:
    rows = [[WORDS.get(word, 0) for word in text.lower().split()[:LENGTH]] for text in texts]
    return torch.tensor([row + [0] * (LENGTH - len(row)) for row in rows])


draw = random.Random(0)
train, test = sentences(8000, draw), sentences(2000, draw)

# --- the model: an average of embeddings, then a dense layer ----------------------------------------------------------
if args.seed is not None:
    torch.manual_seed(args.seed)
model = torch.nn.Sequential(
    torch.nn.EmbeddingBag(len(WORDS), 16, mode="mean"), lnn.ValueClip(0.3, 1.0), lnn.SpectralLinear(16, 2)
)
with torch.no_grad():
    model[0].weight.mul_(0.3)

# --- private training -------------------------------------------------------------------------------------------------
engine = lipdp.PrivacyEngine(seed=args.seed)
model, optimizer, loader, criterion = engine.make_private_with_epsilon(
    module=model, optimizer=torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9),
    criterion=lipdp.losses.TauCrossEntropy(tau=4.0), dataset=(tokens(train[0]), torch.tensor(train[1])),
    expected_batch_size=800, steps=100, target_epsilon=args.epsilon, target_delta=1e-5,
)  # fmt: skip
for x, y in loader:
    optimizer.zero_grad()
    criterion(model(x), y).backward()
    optimizer.step()

with torch.no_grad():
    accuracy = (model(tokens(test[0])).argmax(1) == torch.tensor(test[1])).float().mean()
print(f"test accuracy {accuracy:.4f} at ε = {engine.get_epsilon(delta=1e-5):.3f}, δ = 1e-5")
if args.out:
    torch.save(model.state_dict(), args.out)
