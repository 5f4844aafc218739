"""Coroutines of an attempt: they run on the process's event loop, and the attempt's own thread waits for them."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from concurrent.futures import CancelledError
from typing import Any, TypeVar, cast

from workerpools._process import event_loop
from workerpools._process.event_loop import Call
from workerpools._run.attempts import Attempt, current

__all__ = ["run", "wait_for"]

T = TypeVar("T")

#: How long after its deadline a coroutine is cancelled, in seconds: what its clients say of their time-outs comes
#: first. Less than the deadline's margin before Celery's own limit.
GRACE = 0.05

#: Called in the waiting thread: returns what to call on the loop before the coroutine, in its context.
carry: Callable[[], Callable[[], object]] | None = None


def wait_for(result: Any, attempt: Attempt) -> Any:
    """Return the value of what the body of an attempt has returned, if that is to be awaited.

    Args:
        result: What the body has returned.
        attempt: The attempt, which runs in the calling thread.

    Raises:
        RuntimeError: The calling thread runs the event loop itself.
        BaseException: The exception of the coroutine, or what interrupted the wait.
    """
    if event_loop.is_here():
        Call(result).close()
        raise RuntimeError(
            f"{attempt.task or 'a task'} is async def, and runs in the event loop's thread, where nothing can wait for "
            "it; in an async body, call it without apply() and await the call: await task(…)"
        )
    return run(result)


def run(awaitable: Awaitable[T], *, least: float = 0.0) -> T:
    """Run a coroutine on the process's event loop in the calling context, and return its result.

    It is cancelled by whatever interrupts the calling thread, and at the deadline of its attempt. The tasks that it has
    started and that outlive it are cancelled and awaited, too.

    Args:
        awaitable: The coroutine.
        least: The time that it has in any case, also after the deadline, in seconds: for a clean-up.

    Raises:
        RuntimeError: The calling thread runs the event loop itself.
        BaseException: The exception of the coroutine, or what interrupted the wait.
    """
    call = Call(awaitable, None if carry is None else carry())
    if event_loop.is_here():
        call.close()
        raise RuntimeError("run() waits, and this is the event loop's thread: await the coroutine instead")
    attempt = current()
    at = None if attempt is None else attempt.deadline.at
    error: BaseException | None = None
    try:
        in_time = event_loop.call(call, -1 if at is None else max(least, at + GRACE - time.monotonic()))
        if not in_time and attempt is not None and attempt.delivery is not None:
            delivery = attempt.delivery
            raise delivery.terms.time_limit_exceeded(delivery.request)
        error = call.error
        if error is None:
            return cast(T, call.result)
        if type(error).__name__ == "CancelledError" and not isinstance(error, Exception):
            # For a task system, what is no Exception ends the process.
            raise CancelledError("the coroutine was cancelled, and not by its time limit") from error
        raise error
    finally:
        if attempt is not None:
            attempt.left_tasks = (*attempt.left_tasks, *call.living())
        # The traceback of an error holds this frame.
        del call, attempt, error
