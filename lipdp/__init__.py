"""lipdp: differentially private training of Lipschitz networks, without per-sample gradient clipping."""

from __future__ import annotations

import importlib
from typing import Any

from lipdp.relation import Relation
from lipdp.sensitivity import Sensitivity, lipschitz_constant, sensitivity  # eager: the module has the function's name

__version__ = "0.1.0"

# public name → the module that defines it; imported on first use
_LAZY = {
    "PrivacyEngine": "lipdp.privacy.engine",
    "calibrate": "lipdp.privacy.calibration",
    "epsilon": "lipdp.privacy.accounting",
}
_MODULES = (
    "audit",
    "bounds",
    "certify",
    "comparison",
    "constraints",
    "data",
    "errors",
    "features",
    "losses",
    "models",
    "nn",
    "planning",
    "privacy",
    "report",
    "testing",
    "training",
)

__all__ = ["Relation", "Sensitivity", "lipschitz_constant", "sensitivity", *_LAZY, *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"lipdp.{name}")
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'lipdp' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
