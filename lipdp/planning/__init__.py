"""Planning with the total amount of noise: from a budget to (B, σ, T), and a search at a fraction of the compute.

`plan` chooses a batch size, a noise multiplier and a number of steps; `simulate` looks for hyper-parameters by runs at B/k
and σ/k, which are not private; `Repetitions` says what a search costs that is private.
"""

from __future__ import annotations

import importlib
from typing import Any

# public name → the module that defines it; imported on first use: Optuna is an extra
_LAZY = {
    "Budget": "lipdp.planning.budget",
    "Move": "lipdp.planning.tan",
    "Plan": "lipdp.planning.budget",
    "Point": "lipdp.planning.budget",
    "Repetitions": "lipdp.planning.repetitions",
    "Simulation": "lipdp.planning.simulation",
    "constant_eta": "lipdp.planning.budget",
    "eta_for": "lipdp.planning.tan",
    "evaluate": "lipdp.planning.budget",
    "iso_budget": "lipdp.planning.budget",
    "plan": "lipdp.planning.budget",
    "rule": "lipdp.planning.tan",
    "simulate": "lipdp.planning.search",
    "tan_epsilon": "lipdp.planning.tan",
    "tan_eta": "lipdp.planning.tan",
    "with_batch_size": "lipdp.planning.budget",
    "with_noise_multiplier": "lipdp.planning.budget",
}

__all__ = list(_LAZY)


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'lipdp.planning' has no attribute {name!r}")
