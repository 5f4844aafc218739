"""Runs what may block for ever where nothing can interrupt it, and waits for it only so long."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

__all__ = ["remaining", "run_bounded"]


def remaining(deadline: float) -> float:
    """Return the seconds until ``deadline`` (of :func:`time.monotonic`), never below 0."""
    return max(0.0, deadline - time.monotonic())


def run_bounded(function: Callable[[], object], timeout: float) -> bool:
    """Run ``function`` in a thread of its own; return whether it ended within ``timeout`` seconds.

    A goodbye on a network that drops packets blocks inside a driver.
    """
    thread = threading.Thread(target=function, name="workerpools-close", daemon=True)
    try:
        thread.start()
    except RuntimeError:
        # An interpreter on its way out starts no more threads.
        function()
        return True
    thread.join(timeout)
    return not thread.is_alive()
