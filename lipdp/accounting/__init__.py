"""From events to ε and back: relation, plan, events, accountants, calibration. No torch."""

from lipdp.lazy import facade

_NAMES = {
    "Accountant": "lipdp.accounting.accountants",
    "EpsilonCurve": "lipdp.accounting.calibration",
    "Event": "lipdp.accounting.events",
    "Ledger": "lipdp.accounting.events",
    "Measurement": "lipdp.accounting.plan",
    "PLDAccountant": "lipdp.accounting.accountants",
    "PRVAccountant": "lipdp.accounting.accountants",
    "PrivacyPlan": "lipdp.accounting.plan",
    "RDPAccountant": "lipdp.accounting.accountants",
    "Relation": "lipdp.accounting.relation",
    "Spent": "lipdp.accounting.accountants",
    "Subsampling": "lipdp.accounting.plan",
    "TradeOff": "lipdp.accounting.tradeoff",
    "calibrate": "lipdp.accounting.calibration",
    "epsilon": "lipdp.accounting.accountants",
    "get_accountant": "lipdp.accounting.accountants",
    "joint_noise_multiplier": "lipdp.accounting.events",
    "trade_off": "lipdp.accounting.tradeoff",
}

__getattr__, __dir__, __all__ = facade(__name__, _NAMES)
