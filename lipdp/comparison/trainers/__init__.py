"""Every trainer of the comparison: `TRAINERS` by name."""

from lipdp.comparison.trainers.registry import TRAINERS, get_trainer, legend

__all__ = ["TRAINERS", "get_trainer", "legend"]
