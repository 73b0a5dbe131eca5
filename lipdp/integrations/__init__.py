"""Lightning, Fabric and Accelerate train a private model as it is. This adds a callback and a helper."""

from lipdp.lazy import facade

# public name → the module that defines it; imported on first use: Lightning is an extra
_NAMES = {"PrivacyBudget": "lipdp.integrations.lightning", "steps_within": "lipdp.integrations.budget"}

__getattr__, __dir__, __all__ = facade(__name__, _NAMES)
