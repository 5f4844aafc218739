"""The messages of task bodies: an effect of the attempt that sends them."""

from __future__ import annotations

from typing import Any

from celery import current_task, signals

from workerpools._run import attempts
from workerpools._run.attempts import Effect, note_effect

__all__ = ["follow"]


def follow() -> None:
    """Note from now on every task message that a body sends. Idempotent."""
    signals.before_task_publish.connect(_leaves, weak=False, dispatch_uid="workerpools-before_task_publish")


def _leaves(sender: Any = None, **_: Any) -> None:
    # Without an attempt, a thread that runs a task is Celery's: it sends callbacks, the next task of a chain, errbacks,
    # or is in a body of another base. Any other thread may be one of a body.
    if attempts.current() is not None or not current_task:
        note_effect(Effect(f"message {sender!r}"))
