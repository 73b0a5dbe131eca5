"""Draw the pictures of the pages from the measured tables in docs/comparison.md: python docs/draw.py"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import matplotlib as mpl

from lipdp.comparison import plots
from lipdp.comparison.results import Results
from lipdp.files import write_figure

DOCS = Path(__file__).parent
LINES = [
    ("non_private", "cnn"),
    ("clipless", "cnn"),
    ("opacus_hooks", "cnn"),
    ("opacus_hooks", "cnn-twin"),
    ("opacus_ghost", "cnn"),
]


def table(heading: str) -> list[list[str]]:
    """The rows of the first table below a heading, its head first."""
    section = (DOCS / "comparison.md").read_text().split(f"## {heading}\n")[1]
    lines = re.findall(r"(?:^\|.*\|\n)+", section, re.M)[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [rows[0], *rows[2:]]


def speed() -> Results:
    """Seconds per step, as `lipdp compare speed` records them."""
    head, *rows = table("Speed and memory")
    sizes = [int(cell.removeprefix("B = ")) for cell in head[2:]]
    results = Results(None, config={})
    results.cells += [
        {
            "model": model,
            "trainer": trainer,
            "views": 1,
            "batch_size": size,
            "step_seconds": float(cell.split(" ms")[0].replace(",", "")) / 1e3,
        }
        for model, trainer, *cells in rows
        for size, cell in zip(sizes, cells, strict=True)
        if (trainer, model) in LINES
    ]
    return results


def utility() -> list[dict[str, object]]:
    """Accuracy against ε, as `lipdp compare utility` sums it up."""
    head, *rows = table("Utility on MNIST")
    budgets = [None if cell == "no privacy" else float(cell.removeprefix("ε = ")) for cell in head[2:]]
    return [
        {
            "trainer": trainer,
            "model": model,
            "target_epsilon": budget,
            "dataset": "MNIST, 60 steps",
            "metric": "accuracy, %",
        }
        | dict(zip(("mean", "spread"), map(float, cell.split(" ± ")), strict=True))
        for trainer, model, *cells in rows
        for budget, cell in zip(budgets, cells, strict=True)
        if cell
    ]


if __name__ == "__main__":
    mpl.rcParams["svg.hashsalt"] = "lipdp"  # the same file from the same numbers
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else DOCS / "pictures"
    write_figure(plots.speed_figure(speed()), folder / "speed.svg")
    write_figure(plots.utility_figure(utility()), folder / "privacy-utility.svg")
