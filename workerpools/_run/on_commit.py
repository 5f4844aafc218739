"""What waits for an attempt's commit: messages and functions, which run in order once its last session is committed."""

from __future__ import annotations

import logging
import traceback
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from workerpools._run import attempts, threads
from workerpools._run.attempts import Attempt, Effect
from workerpools._run.events import REPLAY, write
from workerpools._run.failure import is_interruption

__all__ = ["attempt_here", "on_commit"]


class Waiting(NamedTuple):
    """A function that waits for a commit.

    Attributes:
        function: The function.
        what: What it does, for messages: a short phrase without secrets.
    """

    function: Callable[[], object]
    what: str


def attempt_here() -> Attempt | None:
    """Return the attempt whose commit the calling code can wait for; None if there is none.

    It is that of the calling context. In a thread without one, it is the attempt that started the thread; for the
    worker of a thread pool, the only one that runs.
    """
    attempt = attempts.current()
    if attempt is not None:
        return attempt
    running = set(attempts.running())
    if not running:
        return None
    found = [attempt for attempt in threads.starting() if attempt in running]
    return found[0] if len(found) == 1 or (found and found[0].parent is not None) else None


def on_commit(function: Callable[[], object], what: str, attempt: Attempt | None) -> bool:
    """Have ``function`` called once ``attempt`` is committed, after those before it; dropped if it is rolled back.

    Args:
        function: The function.
        what: What it does, for messages: a short phrase without secrets.
        attempt: The attempt; None for none.

    Returns:
        Whether it waits, or was dropped. If not, nothing is left to wait for: the caller calls it at once.
    """
    if attempt is None:
        return False
    # Without a lock, which a fork could copy taken: each step is one of the interpreter's.
    made: deque[Waiting] = deque()
    waiting: deque[Waiting] = attempt.__dict__.setdefault("waiting", made)
    if waiting is made:
        attempt.callback(_release)
    each = Waiting(function, what)
    waiting.append(each)
    if not attempt.ended:
        return True
    # A thread that outlives the attempt. The attempt's own thread may have found it all the same.
    try:
        waiting.remove(each)
    except ValueError:
        return True
    if not attempt.committed:
        write(REPLAY, logging.WARNING, "on_commit_dropped", {"task": attempt.task, "what": what})
    return not attempt.committed


def _release(attempt: Attempt) -> BaseException | None:
    """Call what waits for an attempt that has ended, if it was committed.

    An exception is logged: nothing of it undoes the commit, nor keeps the others from being called.
    """
    waiting: deque[Waiting] = attempt.__dict__["waiting"]
    interruption: BaseException | None = None
    while waiting and attempt.committed:
        function, what = waiting.popleft()
        try:
            function()
        except BaseException as error:
            fields = {"task": attempt.task, "what": what, "error": type(error).__name__}
            write(REPLAY, logging.ERROR, "on_commit_failed", fields, str(error), traceback.format_exc())
            if is_interruption(error):
                interruption = error
        else:
            _note(what)
    waiting.clear()
    return interruption


def _note(what: str) -> None:
    # For the log line of a task that fails after its commit, when its result cannot be encoded.
    found = attempts.last_returned.get()
    if found is not None:
        found.noted_effects = (*found.noted_effects, Effect(what))
