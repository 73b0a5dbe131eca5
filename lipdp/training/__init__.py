"""The training loop: from a configuration to a private model, with metrics, checkpoints and an exact resume."""

from lipdp.training.config import TrainConfig, configure
from lipdp.training.monitor import Interrupted, Monitor, Result
from lipdp.training.trainer import Trainer, train

__all__ = ["Interrupted", "Monitor", "Result", "TrainConfig", "Trainer", "configure", "train"]
