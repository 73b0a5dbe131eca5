"""Every trainer of the comparison: `TRAINERS` by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lipdp.comparison.protocol import ComparedTrainer
from lipdp.comparison.trainers.clipping import AdaptiveClipping, AutomaticClipping, GlobalClipping, GlobalScaledClipping
from lipdp.comparison.trainers.engine import BackpropClipping, Clipless
from lipdp.comparison.trainers.non_private import NonPrivate
from lipdp.comparison.trainers.opacus import Functorch, Ghost, Hooks, PerLayer
from lipdp.comparison.trainers.rgp import Reparametrized
from lipdp.errors import UnknownNameError

TRAINERS: dict[str, ComparedTrainer] = {
    trainer.name: trainer
    for trainer in (
        NonPrivate(),
        Clipless(),
        BackpropClipping(),
        Hooks(),
        Functorch(),
        Ghost(),
        PerLayer(),
        AutomaticClipping(),
        GlobalScaledClipping(),
        GlobalClipping(),
        AdaptiveClipping(),
        Reparametrized(),
    )
}
"""name → trainer with its default settings; `dataclasses.replace` changes them."""


def legend(names: Iterable[str], described: Mapping[str, Any] = TRAINERS) -> str:
    """What trainers do, a line each.

    >>> print(legend(["clipless", "clipless"]))
    clipless: lipdp as it is, bounded layers and no clipping
    """
    return "\n".join(f"{name}: {described[name].words}" for name in dict.fromkeys(names))


def get_trainer(name: str) -> ComparedTrainer:
    """A trainer by name; UnknownNameError lists them.

    >>> get_trainer("opacus_hooks")
    Hooks(max_grad_norm=1.0)
    """
    if name not in TRAINERS:
        raise UnknownNameError("trainer", name, TRAINERS)
    return TRAINERS[name]
