"""Processes that act as one: collectives, wrappers, launch."""

from lipdp.lazy import facade

_NAMES = {
    "Alone": "lipdp.distributed.collectives",
    "DefaultGroup": "lipdp.distributed.collectives",
    "World": "lipdp.distributed.collectives",
    "current_world": "lipdp.distributed.collectives",
    "launched": "lipdp.distributed.launch",
}

__getattr__, __dir__, __all__ = facade(__name__, _NAMES)
