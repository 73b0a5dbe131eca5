"""lipdp: differentially private training of Lipschitz networks, without per-sample gradient clipping."""

from lipdp.lazy import facade

__version__ = "0.1.0"

_ROOMS = (  # those that a user meets first come first, as in the reference
    "privacy losses nn accounting noise batches bounds constraints models suggestion testing data features training"
    " estimators audit certify planning comparison report serving integrations distributed errors"
)
_NAMES = {
    "PrivacyEngine": "lipdp.privacy.engine",
    "Relation": "lipdp.accounting.relation",
    "Sensitivity": "lipdp.bounds.sensitivity",
    "calibrate": "lipdp.accounting.calibration",
    "epsilon": "lipdp.accounting.accountants",
    "lipschitz_constant": "lipdp.bounds.sensitivity",
    "load": "lipdp.serving.model",
    "sensitivity": "lipdp.bounds.sensitivity",
    "suggest": "lipdp.suggestion.choose",
} | {room: f".{room}" for room in _ROOMS.split()}

__getattr__, __dir__, __all__ = facade(__name__, _NAMES)
