"""Interrupts Python code at every point at which CPython may run a signal handler, one after another."""

from __future__ import annotations

import dis
import sys
import threading
from collections.abc import Callable
from functools import cache
from types import CodeType, FrameType
from typing import Any

#: CPython runs signal handlers after a call, at the start of a function and at a jump backwards.
CHECKED = ("CALL", "RESUME", "JUMP_BACKWARD", "JUMP_ABSOLUTE")


@cache
def _names(code: CodeType) -> dict[int, str]:
    return {instruction.offset: instruction.opname for instruction in dis.get_instructions(code)}


class Interruption:
    """Raises an error in the calling thread at one point of the traced code.

    Args:
        files: Parts of the names of the files whose points count.
        at: The number of the point, from 1; 0 to count points only.
        error: Makes the error.

    Attributes:
        points: The number of points passed.
        where: The file, line and function of the point at which it struck; empty if it did not.
    """

    def __init__(self, files: tuple[str, ...], at: int = 0, error: Callable[[], BaseException] = SystemExit) -> None:
        self.points = 0
        self.where = ""
        self._files = files
        self._at = at
        self._error = error
        self._last: dict[FrameType, str] = {}
        self._before: Any = None

    def __enter__(self) -> Interruption:
        self._before = sys.gettrace()
        sys.settrace(self._calls)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)
        self._last.clear()

    def _calls(self, frame: FrameType, event: str, _: object) -> Any:
        if self.where or not any(part in frame.f_code.co_filename for part in self._files):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return self._steps

    def _steps(self, frame: FrameType, event: str, _: object) -> Any:
        if event == "return":
            self._last.pop(frame, None)
        elif event == "opcode" and not self.where:
            before = self._last.get(frame, "")
            self._last[frame] = now = _names(frame.f_code).get(frame.f_lasti, "")
            # After a call that has failed, CPython goes to the handler of its error, and to no signal's.
            if before.startswith(CHECKED) and now != "PUSH_EXC_INFO":
                self.points += 1
                if self.points == self._at:
                    code = frame.f_code
                    self.where = f"{code.co_filename.rpartition('/')[2]}:{frame.f_lineno} {code.co_name}"
                    sys.settrace(self._before)
                    self._last.clear()
                    raise self._error()
        return self._steps


def in_a_thread(function: Callable[[], Any], timeout: float = 10.0) -> Any:
    """Return what ``function`` returns in another thread: a lock that this one has kept is not free there.

    Raises:
        TimeoutError: It did not return in time.
    """
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(function()), daemon=True)
    thread.start()
    thread.join(timeout)
    if not found:
        raise TimeoutError("hangs, or failed")
    return found[0]
