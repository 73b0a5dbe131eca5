"""Norm-bound propagation: from the weights as they are to certified bounds on values, cotangents and gradients."""

from lipdp.bounds import functions as _functions  # noqa: F401  (registers the rules of functions and methods)
from lipdp.bounds import layers as _layers  # noqa: F401  (registers the rules of modules)
from lipdp.bounds.propagate import BoundGraph, ForwardSweep, NodeBound, Step, Sweep, as_tensor
from lipdp.bounds.rounding import Rounding
from lipdp.bounds.rules import Call, Local, Number, Rule, least, rule, times

__all__ = [
    "BoundGraph",
    "Call",
    "ForwardSweep",
    "Local",
    "NodeBound",
    "Number",
    "Rounding",
    "Rule",
    "Step",
    "Sweep",
    "as_tensor",
    "least",
    "rule",
    "times",
]
