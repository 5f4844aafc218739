"""Detection of gevent's and eventlet's monkey patching, and access to the unpatched originals.

Neither library is imported here: a patched process has loaded it already.
"""

from __future__ import annotations

import _thread
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

__all__ = ["Threads", "library", "time_limit"]


def library() -> str:
    """Return ``gevent`` or ``eventlet`` if it has patched the sockets of this process; an empty string otherwise."""
    gevent, eventlet = sys.modules.get("gevent.monkey"), sys.modules.get("eventlet.patcher")
    if gevent is not None and gevent.is_module_patched("socket"):
        return "gevent"
    if eventlet is not None and eventlet.is_monkey_patched("socket"):
        return "eventlet"
    return ""


class Threads:
    """The operating system's threads and locks, even in a monkey-patched process.

    Attributes:
        start: The original ``_thread.start_new_thread``.
        lock: The original ``_thread.allocate_lock``.
    """

    def __init__(self) -> None:
        original: Any = _thread
        gevent, eventlet = sys.modules.get("gevent.monkey"), sys.modules.get("eventlet.patcher")
        if eventlet is not None and eventlet.is_monkey_patched("thread"):
            original = eventlet.original("_thread")
        self.start: Callable[..., Any] = original.start_new_thread
        self.lock: Callable[[], Any] = original.allocate_lock
        if gevent is not None and gevent.is_module_patched("_thread"):
            self.start, self.lock = gevent.get_original("_thread", ["start_new_thread", "allocate_lock"])


def time_limit(seconds: float, error: Exception) -> AbstractContextManager[Any]:
    """Raise ``error`` in the calling greenlet if the block takes longer than ``seconds``.

    Without gevent or eventlet there is no limit. The error is raised at a cooperative wait of the greenlet.

    Args:
        seconds: The limit, in seconds.
        error: The exception to raise.
    """
    which = library()
    if not which:
        return nullcontext()
    limit: AbstractContextManager[Any] = sys.modules[which].Timeout(seconds, error)
    return limit
