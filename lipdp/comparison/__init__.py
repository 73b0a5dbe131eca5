"""The same models under clipping-based DP-SGD: speed, memory and utility side by side, training dynamics, calibration.

Needs `pip install "lipdp[comparison]"` (Opacus). `trainers` holds the ways to train, each a frozen dataclass behind the
protocol `ComparedTrainer`; `speed` and `utility` measure them; `dynamics` looks at the kernel of gradient flow.
"""

from lipdp.lazy import facade

# public name → the module that defines it; imported on first use: Opacus and matplotlib are extras
_NAMES = {
    "TRAINERS": "lipdp.comparison.trainers",
    "Task": "lipdp.comparison.protocol",
    "ComparedTrainer": "lipdp.comparison.protocol",
    "calibration": ".calibration",
    "dynamics": ".dynamics",
    "get_trainer": "lipdp.comparison.trainers",
    "with_backprop_clipping": "lipdp.comparison.backprop_clipping",
}

__getattr__, __dir__, __all__ = facade(__name__, _NAMES)
