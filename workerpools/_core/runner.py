"""Runs a task body as one attempt, and once more where that is safe."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from workerpools._core import scope
from workerpools._core.retry import may_replay
from workerpools._core.scope import Attempt, Stale

__all__ = ["run"]

R = TypeVar("R")


def run(
    body: Callable[[], R],
    *,
    request: object,
    called_directly: bool,
    on_replay: Callable[[Stale], object],
) -> R:
    """Run ``body`` inside an attempt: commit what it did when it returns, undo it on every other way out.

    A body that another one calls as a plain function joins that one's attempt: one session, one commit.

    Args:
        body: The task body, with its arguments.
        request: The Celery request that the body runs for.
        called_directly: Whether the task was called as a plain function.
        on_replay: Told of the dead connection before the body runs again.

    Raises:
        BaseException: What the body raised, or the failure to commit, unchanged.
    """
    if _joins(scope.current(), request, called_directly):
        return body()
    replays = 0
    while True:
        attempt = Attempt(request)
        try:
            return _once(attempt, body)
        except Exception as error:
            stale = attempt.stale_for(error)
            if stale is None or not may_replay(error, stale, attempt.effects, replays):
                raise
            replays += 1
        finally:
            # An exception's traceback holds this frame: without the attempt in it, sessions and errors go at once.
            del attempt
        on_replay(stale)


def _joins(outer: Attempt | None, request: object, called_directly: bool) -> bool:
    if outer is None:
        return False
    if called_directly:
        return True
    # ``.apply()`` brings a request of its own; ``task.run()`` within the body still has the outer one's.
    attempt: Attempt | None = outer
    while attempt is not None and attempt.request is not request:
        attempt = attempt.parent
    return attempt is not None


def _once(attempt: Attempt, body: Callable[[], R]) -> R:
    try:
        attempt.enter()
        try:
            result = body()
            attempt.commit()
        except BaseException:
            attempt.close(rollback=True)
            raise
        attempt.close(rollback=False)
        return result
    finally:
        attempt.leave()
