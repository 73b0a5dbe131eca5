"""One line on stderr for what takes longer than a few seconds, so that nobody waits in silence."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

PATIENCE = 5.0
"""Seconds of silence."""

logger = logging.getLogger(__name__)


@contextmanager
def announced(what: str) -> Iterator[None]:
    """A block that is announced if it is still running after `PATIENCE` seconds: a warning of the logger, once.

    >>> with announced("a sum"):
    ...     total = 1 + 1
    """
    timer = threading.Timer(PATIENCE, logger.warning, args=(f"{what} takes longer than {PATIENCE:g} s: please wait",))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
