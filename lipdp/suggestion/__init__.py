"""What a user can't guess, chosen from public facts: batch, steps, loss, gates, clips and learning rates."""

from lipdp.lazy import facade

_NAMES = {
    "BlockSetting": "lipdp.suggestion.settings",
    "Joint": "lipdp.suggestion.joints",
    "Settings": "lipdp.suggestion.settings",
    "place_joints": "lipdp.suggestion.joints",
    "suggest": "lipdp.suggestion.choose",
}

__getattr__, __dir__, __all__ = facade(__name__, _NAMES)
