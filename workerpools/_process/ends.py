"""The end of a process, also of a child of ``multiprocessing`` or ``billiard``, which runs no ``atexit`` functions.

Such a child runs its package's finalizers instead. They are registered at the first use of a resource: whatever a
process has registered is forgotten when its child begins.
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable
from typing import Any

__all__ = ["at_end", "used"]

_functions: list[Callable[[], object]] = []

# The process in which the finalizers are registered.
_registered = 0


def at_end(function: Callable[[], object]) -> None:
    """Call ``function`` when this process ends, and when a child ends that has used a resource."""
    atexit.unregister(function)
    atexit.register(function)
    if function not in _functions:
        _functions.append(function)


def used() -> None:
    """Prepare for the end of a child of ``multiprocessing`` or ``billiard``."""
    global _registered
    if _registered == os.getpid():
        return
    _registered = os.getpid()
    for package in ("multiprocessing", "billiard"):
        process: Any = sys.modules.get(f"{package}.process")
        util: Any = sys.modules.get(f"{package}.util")
        if process is not None and util is not None and process.current_process().name != "MainProcess":
            # Finalizers of a priority below 0 run after the child has waited for its own children.
            util.Finalize(None, _end, exitpriority=0)


def _end() -> None:
    for function in _functions:
        function()
