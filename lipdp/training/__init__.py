"""The training loop: from a configuration to a private model, with metrics, checkpoints and an exact resume."""

from lipdp.lazy import facade

# public name → the module that defines it; imported on first use: the help of the command needs the settings alone
_NAMES = {
    "Forward": "lipdp.training.forward",
    "Interrupted": "lipdp.training.monitor",
    "Monitor": "lipdp.training.monitor",
    "Result": "lipdp.training.monitor",
    "TableModel": "lipdp.training.fitted",
    "TrainConfig": "lipdp.training.config",
    "Trainer": "lipdp.training.trainer",
    "configure": "lipdp.training.config",
    "fit_table": "lipdp.training.fitted",
    "make_loss": "lipdp.training.choices",
    "make_model": "lipdp.training.choices",
    "make_scheduler": "lipdp.training.choices",
    "recipe": "lipdp.training.recipes",
    "settings_table": "lipdp.training.config",
    "train": "lipdp.training.trainer",
}

__getattr__, __dir__, __all__ = facade(__name__, _NAMES)
