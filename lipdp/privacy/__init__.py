"""The engine: what enters a step, what bounds it, what is checked."""

from lipdp.lazy import facade

_NAMES = {
    "FixedGate": "lipdp.privacy.gate",
    "PrivacyEngine": "lipdp.privacy.engine",
    "PrivateCriterion": "lipdp.privacy.criterion",
    "QuantileGate": "lipdp.privacy.gate",
}

__getattr__, __dir__, __all__ = facade(__name__, _NAMES)
