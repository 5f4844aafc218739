"""Greenlets: whether a library has replaced the standard library's ways to wait, and what it has replaced.

gevent and eventlet do that to a process ("monkey patching"). Neither is imported here: who uses one has it loaded.
"""

from __future__ import annotations

import _thread
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

__all__ = ["Threads", "library", "time_limit"]


def library() -> str:
    """Return ``gevent`` or ``eventlet`` if it has replaced the sockets of this process; else an empty text."""
    gevent, eventlet = sys.modules.get("gevent.monkey"), sys.modules.get("eventlet.patcher")
    if gevent is not None and gevent.is_module_patched("socket"):
        return "gevent"
    if eventlet is not None and eventlet.is_monkey_patched("socket"):
        return "eventlet"
    return ""


class Threads:
    """The operating system's threads and locks, whatever has taken their places.

    Attributes:
        start: ``_thread.start_new_thread``, as it was.
        lock: ``_thread.allocate_lock``, as it was.
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
    """Raise ``error`` in the calling greenlet after ``seconds``, unless the block has ended; without a library, never.

    It comes when the greenlet waits in a way that lets others run.
    """
    which = library()
    if not which:
        return nullcontext()
    limit: AbstractContextManager[Any] = sys.modules[which].Timeout(seconds, error)
    return limit
