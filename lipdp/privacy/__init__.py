"""The engine, which makes every step private and checks it."""

from lipdp.lazy import facade

_NAMES = {
    "FixedGate": "lipdp.privacy.gate",
    "PrivacyEngine": "lipdp.privacy.engine",
    "PrivateCriterion": "lipdp.privacy.criterion",
    "QuantileGate": "lipdp.privacy.gate",
}

__getattr__, __dir__, __all__ = facade(__name__, _NAMES)
