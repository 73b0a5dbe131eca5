"""lipdp: differentially private training of Lipschitz networks, without per-sample gradient clipping."""

from lipdp.lazy import facade
from lipdp.sensitivity import sensitivity as sensitivity  # eager: the module has the function's name

__version__ = "0.1.0"

_ROOMS = (
    "accounting audit batches bounds certify comparison constraints data distributed errors estimators"
    " features integrations"
    " losses models nn noise planning privacy report serving"
    " testing training"
)
_NAMES = {
    "PrivacyEngine": "lipdp.privacy.engine",
    "Relation": "lipdp.accounting.relation",
    "Sensitivity": "lipdp.sensitivity",
    "calibrate": "lipdp.accounting.calibration",
    "epsilon": "lipdp.accounting.accountants",
    "lipschitz_constant": "lipdp.sensitivity",
    "load": "lipdp.serving.model",
    "sensitivity": "lipdp.sensitivity",
} | {room: f".{room}" for room in _ROOMS.split()}

__getattr__, __dir__, __all__ = facade(__name__, _NAMES)
