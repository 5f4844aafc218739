"""Bounded waits for calls that may block for ever and that nothing can interrupt."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

__all__ = ["remaining", "run_bounded"]


def remaining(deadline: float) -> float:
    """Return the seconds until ``deadline`` (of :func:`time.monotonic`), never below 0."""
    return max(0.0, deadline - time.monotonic())


def run_bounded(function: Callable[[], object], timeout: float) -> bool:
    """Run ``function`` in its own thread; return whether it finished within ``timeout`` seconds.

    A clean close over a network that drops packets blocks inside the driver.
    """
    thread = threading.Thread(target=function, name="workerpools-close", daemon=True)
    try:
        thread.start()
    except RuntimeError:
        # No new threads can be started at interpreter shutdown.
        function()
        return True
    thread.join(timeout)
    return not thread.is_alive()
