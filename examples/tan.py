"""The scaling law on real data: python examples/tan.py --data-dir DIR --out OUT [--dataset mnist --steps 100]

At constant T and B/σ, runs of 1, 1/4, 1/16 and 1/64 of the compute have the same best learning rate, and their loss
curves lie on each other. Each is a simulation: NOT private (the full one too, since it has a seed and validates on
held-out training records). Interrupt it at any time: the same command goes on. It writes OUT/results.json and two
pictures.
"""

import argparse
import json
import math
from pathlib import Path

from lipdp.files import write_figure, write_json
from lipdp.planning import LABEL, accuracy_against_rate, loss_curves, parse_space, simulate

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--dataset", default="mnist")
parser.add_argument("--data-dir")
parser.add_argument("--model", default="mlp")
parser.add_argument("--features")
parser.add_argument("--epsilon", type=float, default=1.0)
parser.add_argument("--batch-size", type=int, default=4096)
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--scales", type=float, nargs="+", default=[1, 4, 16, 64])
parser.add_argument("--rates", type=float, nargs="+", default=[0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4])
parser.add_argument("--jobs", type=int, default=1)
parser.add_argument("--out", type=Path, required=True)
args = parser.parse_args()

settings = {"dataset": args.dataset, "data_dir": args.data_dir, "model": args.model, "features": args.features}
settings |= {"epsilon": args.epsilon, "batch_size": args.batch_size, "steps": args.steps}
settings = {name: value for name, value in settings.items() if value is not None}
space = parse_space([f"lr={','.join(map(str, args.rates))}"])
print(LABEL)


def progress(number, record, found):
    print(f"  lr {record['drawn']['lr']:<5g} {record['value'] or math.nan:.4f}  {record['seconds']:.0f} s", flush=True)


# --- every learning rate at every scale, the cheapest first -----------------------------------------------------------
searches = {}
for k in sorted(args.scales, reverse=True):
    print(f"k = {k:g}", flush=True)
    searches[k] = simulate(
        settings, space, out=args.out / f"k{k:g}", scale=k, trials=len(args.rates), jobs=args.jobs, progress=progress
    )

# --- what the small runs would have told ------------------------------------------------------------------------------
best = {k: found.best["drawn"]["lr"] for k, found in searches.items()}
full = searches[min(args.scales)].simulation
curves = {}
shown = best[min(args.scales)]
for k, found in sorted(searches.items()):
    name = (
        f"k = {k:g}: B = {found.simulation.simulated_batch_size}, σ = {found.simulation.simulated_noise_multiplier:.3g}"
    )
    run = next(record for record in found.trials.values() if record["drawn"]["lr"] == shown)
    curves[name] = [(line["step"], line["train_loss_not_private"]) for line in run["curve"]]
accuracies = {
    f"k = {k:g}": [(r["drawn"]["lr"], r["value"]) for r in found.trials.values() if r["value"] is not None]
    for k, found in sorted(searches.items())
}
reference, *others = [[loss for _, loss in curve] for curve in curves.values()]
gaps = {  # root mean square, relative to how far the loss falls
    f"{k:g}": math.sqrt(sum((a - b) ** 2 for a, b in zip(curve, reference, strict=True)) / len(curve))
    / (max(reference) - min(reference))
    for k, curve in zip(sorted(searches)[1:], others, strict=True)
}
results = {
    "label": LABEL,
    "settings": settings,
    "noise_multiplier": full.noise_multiplier,
    "best_learning_rate": {f"{k:g}": rate for k, rate in sorted(best.items())},
    "factor_from_the_best_at_full_size": {f"{k:g}": rate / shown for k, rate in sorted(best.items())},
    "accuracy": {
        f"{k:g}": dict(sorted(points)) for k, points in zip(sorted(searches), accuracies.values(), strict=True)
    },
    "gap_of_the_loss_curves": gaps,
    "seconds": {f"{k:g}": sum(r["seconds"] for r in found.trials.values()) for k, found in sorted(searches.items())},
}
write_json(args.out / "results.json", results)
title = f"{args.dataset}, {args.model}, T = {args.steps}, B/σ = {full.batch_size / full.noise_multiplier:.0f}"
for suffix in ("png", "svg"):
    write_figure(loss_curves(curves, title=f"{title}, lr {shown:g}"), args.out / f"loss-curves.{suffix}")
    write_figure(accuracy_against_rate(accuracies, title=title), args.out / f"learning-rates.{suffix}")
print(json.dumps(results, indent=2))
