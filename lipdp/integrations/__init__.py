"""Trainers people use: what lipdp adds for them. They run a private model as it is; see docs/integrations.md."""

from lipdp.lazy import facade

# public name → the module that defines it; imported on first use: Lightning is an extra
_NAMES = {"PrivacyBudget": "lipdp.integrations.lightning", "steps_within": "lipdp.integrations.budget"}

__getattr__, __dir__, __all__ = facade(__name__, _NAMES)
