"""A million attempts on the bounds: python examples/falsify.py [--evaluations 1000000] [--only REGEX]

Every layer, loss and model is attacked in float64 by gradient ascent on the per-sample gradient norm, with new seeds
until each has had its share. Prints the number of gradients computed and the largest ratio to the bound: above 1 would
be a broken promise.
"""

import argparse
import re
import time

import torch

import lipdp
from lipdp import losses
from lipdp import nn as lnn
from lipdp.testing import falsify, falsify_layer, falsify_loss

LAYERS = {
    "SpectralLinear": (lnn.SpectralLinear(6, 4, True), (6,)),
    "SpectralLinear on tokens": (lnn.SpectralLinear(4, 3, True), (5, 4)),
    "FrobeniusLinear": (lnn.FrobeniusLinear(6, 1, True), (6,)),
    "SpectralConv1d": (lnn.SpectralConv1d(2, 4, 3, padding=1, bias=True), (2, 8)),
    "SpectralConv2d": (lnn.SpectralConv2d(2, 4, 3, padding=1, bias=True), (2, 6, 6)),
    "SpectralConv2d, strided": (lnn.SpectralConv2d(2, 4, 3, stride=2, bias=True), (2, 7, 7)),
    "SpectralConv2d, circular": (lnn.SpectralConv2d(2, 4, 3, padding=1, padding_mode="circular"), (2, 5, 5)),
    "GroupSort2": (lnn.GroupSort2(), (6,)),
    "GroupSort": (lnn.GroupSort(3), (6,)),
    "FullSort": (lnn.FullSort(), (6,)),
    "MaxMin": (lnn.MaxMin(), (6,)),
    "LPReLU": (lnn.LPReLU(), (6,)),
    "HouseHolder": (lnn.HouseHolder(6), (6, 2)),
    "ScaledL2NormPool2d": (lnn.ScaledL2NormPool2d(2), (2, 6, 6)),
    "ScaledAvgPool2d": (lnn.ScaledAvgPool2d(2), (2, 6, 6)),
    "ScaledAdaptiveAvgPool2d": (lnn.ScaledAdaptiveAvgPool2d((1, 1)), (2, 6, 6)),
    "InvertibleDownSampling": (lnn.InvertibleDownSampling(2), (2, 6, 6)),
    "InvertibleUpSampling": (lnn.InvertibleUpSampling(2), (4, 3, 3)),
    "LayerCentering": (lnn.LayerCentering(2, bias=True), (2, 4, 4)),
    "ValueClip": (lnn.ValueClip(0.5, 1.0), (6,)),
    "GradientGate": (lnn.GradientGate(0.1), (6,)),
    "Attention": (lnn.SpectralAttention(4, 2, bound=0.4), (4, 4)),
    "Residual": (lnn.Residual(lnn.SpectralLinear(4, 4)), (4,)),
    "Concat": (lnn.Concat(lnn.SpectralLinear(4, 4), torch.nn.Identity()), (4,)),
}
LOSSES = {
    "TauCrossEntropy": (losses.TauCrossEntropy(8.0), 5),
    "TauBCEWithLogits": (losses.TauBCEWithLogits(8.0), 1),
    "CategoricalHinge": (losses.CategoricalHinge(0.5), 5),
    "MulticlassHinge": (losses.MulticlassHinge(5), 5),
    "CosineSimilarity": (losses.CosineSimilarity(), 5),
    "MeanAbsoluteError": (losses.MeanAbsoluteError(5), 5),
}
SHAPES = dict.fromkeys(("cnn", "vgg", "resnet", "mixer", "transformer"), (1, 8, 8)) | dict.fromkeys(
    ("mlp", "linear"), (12,)
)
HARD = {"starts": 64, "climbs": 16, "steps": 30}


def attacks():
    """name → a function of a seed that attacks once and reports."""
    found = {f"layer {n}": (lambda s, a=a: falsify_layer(*a, seed=s, **HARD)) for n, a in LAYERS.items()}
    found |= {f"loss {n}": (lambda s, a=a: falsify_loss(*a, seed=s)) for n, a in LOSSES.items()}
    for name, shape in SHAPES.items():
        options = {"depth": 2} if name == "vgg" else {}
        model = lipdp.models.build(name, input_shape=shape, num_classes=3, bias=True, **options)
        found[f"model {name}"] = lambda s, m=model, shape=shape: falsify(
            m, losses.TauCrossEntropy(8.0), shape, seed=s, starts=32, climbs=6, steps=20
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--evaluations", type=int, default=1_000_000)
    parser.add_argument("--only", default="")
    args = parser.parse_args()
    torch.set_num_threads(1)
    chosen = {n: a for n, a in attacks().items() if re.search(args.only, n)}
    total, worst = 0, 0.0
    for name, attack in chosen.items():
        began, count, seed, ratio = time.perf_counter(), 0, 0, 0.0
        while count < args.evaluations / len(chosen):
            report = attack(seed)
            count, seed, ratio = count + report.evaluations, seed + 1, max(ratio, report.worst)
        total, worst = total + count, max(worst, ratio)
        print(f"{name:32s} {count:9,d} gradients  worst {ratio:.6f}  ({time.perf_counter() - began:.0f} s)", flush=True)
    print(f"{total:,d} gradients in all, worst ratio {worst:.6f}")


if __name__ == "__main__":
    main()
