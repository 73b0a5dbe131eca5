"""The same models under clipping-based DP-SGD: speed, memory and utility side by side, training dynamics, calibration.

Needs `pip install "lipdp[comparison]"` (Opacus). `trainers` holds the ways to train, each a frozen dataclass behind the
protocol of `protocol.py`; `speed` and `utility` measure them; `dynamics` looks at the kernel of gradient flow.
"""

from __future__ import annotations

import importlib
from typing import Any

# public name → the module that defines it; imported on first use: Opacus and matplotlib are extras
_LAZY = {
    "TRAINERS": "lipdp.comparison.trainers",
    "Task": "lipdp.comparison.protocol",
    "Trainer": "lipdp.comparison.protocol",
    "get_trainer": "lipdp.comparison.trainers",
    "with_backprop_clipping": "lipdp.comparison.backprop_clipping",
}

__all__ = ["TRAINERS", "Task", "Trainer", "get_trainer", "with_backprop_clipping"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'lipdp.comparison' has no attribute {name!r}")
