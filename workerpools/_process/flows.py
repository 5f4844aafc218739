"""Flows of control: threads, and the tasks of the process's event loop, which share one thread."""

from __future__ import annotations

import threading

__all__ = ["flow", "loop_thread"]


class LoopThread:
    """The thread of the process's event loop.

    Attributes:
        ident: Its identifier; 0 without one.
    """

    def __init__(self) -> None:
        self.ident = 0


loop_thread = LoopThread()


def flow() -> int:
    """Return what tells apart the flows of control of this process: the calling thread; below 0, the loop's task."""
    ident = threading.get_ident()
    if ident != loop_thread.ident:
        return ident
    import asyncio

    return -id(asyncio.current_task())
