"""Norm-bound propagation: from the weights as they are to certified bounds on values, cotangents and gradients."""

from lipdp.bounds import functions as _functions  # noqa: F401  (registers the rules of functions and methods)
from lipdp.bounds import layers as _layers  # noqa: F401  (registers the rules of modules)
from lipdp.bounds.propagate import BoundGraph, Sweep
from lipdp.bounds.rules import Call, Local, rule

__all__ = ["BoundGraph", "Call", "Local", "Sweep", "rule"]
