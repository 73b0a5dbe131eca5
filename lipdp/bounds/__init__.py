"""Norm-bound propagation: from the weights as they are to certified bounds on values, cotangents and gradients."""

from lipdp.bounds import attention as _attention  # noqa: F401  (each registers rules)
from lipdp.bounds import convolution as _convolution  # noqa: F401
from lipdp.bounds import curves as _curves  # noqa: F401
from lipdp.bounds import functions as _functions  # noqa: F401
from lipdp.bounds import layers as _layers  # noqa: F401
from lipdp.bounds import lookups as _lookups  # noqa: F401
from lipdp.bounds import moving as _moving  # noqa: F401
from lipdp.bounds import pooling as _pooling  # noqa: F401
from lipdp.bounds import products as _products  # noqa: F401
from lipdp.bounds.propagate import BoundGraph
from lipdp.bounds.rounding import Rounding
from lipdp.bounds.rules import Call, Local, Number, Rule, least, rule, times
from lipdp.bounds.steps import ForwardSweep, NodeBound, Step, Sweep, as_tensor

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
