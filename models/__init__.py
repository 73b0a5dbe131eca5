"""The model zoo: models built from an input shape and a number of classes, by name, each with an unconstrained twin."""

from .registry import build, default_input_bound, names, own

__all__ = ["build", "default_input_bound", "names", "own"]
