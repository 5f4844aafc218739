"""Lightweight stacks: they hold no frames, and read no source files."""

from __future__ import annotations

import sys
import sysconfig
from pathlib import PurePath
from types import CodeType

from workerpools._run.failure import known_libraries
from workerpools._run.loop import BASE

__all__ = ["Stack", "collect"]

#: The most calls kept, counted from the innermost.
DEPTH = 40


#: Packages between a task's code and a connection, besides the client libraries.
_BETWEEN = frozenset(("celery", "workerpools"))


class Stack:
    """A captured stack, the innermost call first."""

    __slots__ = ("calls",)

    def __init__(self, calls: list[tuple[CodeType, int]]) -> None:
        self.calls = calls

    @property
    def at(self) -> str:
        """The innermost call in the task's own code, as ``shop/tasks.py:42 in charge``; empty if there is none."""
        for code, line in self.calls:
            if not _is_between(code.co_filename):
                return f"{code.co_filename}:{line} in {code.co_name}"
        return ""

    def __str__(self) -> str:
        # The format of tracebacks, without source lines, which may contain a password.
        lines = [f'  File "{code.co_filename}", line {line}, in {code.co_name}' for code, line in self.calls]
        return "\n".join(["Acquired at (most recent call last):", *reversed(lines)])


def collect() -> Stack:
    """Return the caller's stack."""
    calls: list[tuple[CodeType, int]] = []
    # Frames are specific to CPython; other implementations get an empty stack.
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
    # Installed packages live below the standard library's directory without being part of it.
    standard = PurePath(sysconfig.get_path("stdlib"))
    return path.is_relative_to(standard) and "site-packages" not in path.parts and "dist-packages" not in path.parts
