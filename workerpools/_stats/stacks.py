"""Where in the code something was begun, kept for as little as can be: no frame is held, and no file is read."""

from __future__ import annotations

import sys
import sysconfig
from pathlib import PurePath
from types import CodeType

from workerpools._run.failure import known_libraries
from workerpools._run.loop import BASE

__all__ = ["Stack", "collect"]

#: How many calls are kept, from the innermost.
DEPTH = 40


#: Packages between a task's own code and a connection, beside the client libraries.
_BETWEEN = frozenset(("celery", "workerpools"))


class Stack:
    """The calls that led to one moment, the innermost first."""

    __slots__ = ("calls",)

    def __init__(self, calls: list[tuple[CodeType, int]]) -> None:
        self.calls = calls

    @property
    def at(self) -> str:
        """The innermost call that is neither a library's nor ours: ``shop/tasks.py:42 in charge``; or empty."""
        for code, line in self.calls:
            if not _is_between(code.co_filename):
                return f"{code.co_filename}:{line} in {code.co_name}"
        return ""

    def __str__(self) -> str:
        # As logging and tracebacks write it, but for the source: that may hold a password.
        lines = [f'  File "{code.co_filename}", line {line}, in {code.co_name}' for code, line in self.calls]
        return "\n".join(["Acquired at (most recent call last):", *reversed(lines)])


def collect() -> Stack:
    """Return the calls that led here, without this one."""
    calls: list[tuple[CodeType, int]] = []
    # Frames are documented as CPython's own; elsewhere there is nothing to tell.
    frame = sys._getframe(1) if hasattr(sys, "_getframe") else None
    while frame is not None and len(calls) < DEPTH and (code := frame.f_code) is not BASE:
        calls.append((code, frame.f_lineno))
        frame = frame.f_back
    return Stack(calls)


def _is_between(file: str) -> bool:
    if file.startswith("<"):
        return True
    path = PurePath(file)
    if not _BETWEEN.union(known_libraries()).isdisjoint(part.removesuffix(".py") for part in path.parts):
        return True
    # Where packages are installed lies below the standard library, and is none of it.
    standard = PurePath(sysconfig.get_path("stdlib"))
    return path.is_relative_to(standard) and "site-packages" not in path.parts and "dist-packages" not in path.parts
