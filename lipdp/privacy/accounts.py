"""Which account the steps on a parameter are counted in, so that a second one is told of the first."""

from __future__ import annotations

import warnings
import weakref
from dataclasses import dataclass

from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from lipdp.accounting.events import Ledger
from lipdp.errors import PrivacyLeakWarning, outside


@dataclass
class Account:
    """A run's account, which parameters remember as long as they live; it keeps nothing alive.

    Attributes:
        ledger: None once it is gone.
        open: whether the run may still take steps.
        used: whether it has taken one.
    """

    ledger: weakref.ref[Ledger]
    open: bool = True
    used: bool = False

    def open_for(self, module: nn.Module) -> None:
        """Warn where parameters are another's, frozen ones too: each ε is then of its own steps alone."""
        before = [one for p in module.parameters() for one in _of(p)]
        if any((one.open or one.used) and one.ledger() is not self.ledger() for one in before):
            warnings.warn(
                "another engine trains, or has trained, parameters of this model; its steps are not in this account:"
                " where both read the same records, neither ε covers what comes out; their sum does. Use one engine for"
                " both, with detach() between the runs: it adds them up",
                PrivacyLeakWarning,
                stacklevel=outside(),
            )
        for parameter in module.parameters():
            if parameter.requires_grad or parameter in _OF:
                _OF[parameter] = [*_of(parameter), self]


def _of(parameter: nn.Parameter) -> list[Account]:
    """The last account with a step on the parameter, and those opened after it."""
    known = [one for one in _OF.get(parameter, ()) if one.open or one.used]
    return known[max((i for i, one in enumerate(known) if one.used), default=0) :]


_OF: WeakIdKeyDictionary = WeakIdKeyDictionary()  # parameter → [Account, …]
