"""The errors that workerpools raises itself.

::

    WorkerPoolsError
    ├── ConfigurationError      (also ValueError)    a declaration or setting is wrong
    ├── DeadlineExceeded        (also TimeoutError)  a task's deadline came before something was begun
    ├── NoAttemptError          (also RuntimeError)  something of an attempt was used outside one
    └── OpenTimeoutError        (also TimeoutError)  another thread's opening did not end in time

Errors of client libraries are never wrapped nor replaced: ``except httpx.ReadError`` and
``except sqlalchemy.exc.OperationalError`` keep working. Every class takes positional arguments alone, because
Celery pickles exceptions. None is an AttributeError: ``__getattr__`` would swallow it.
"""

from __future__ import annotations

__all__ = ["ConfigurationError", "DeadlineExceeded", "NoAttemptError", "OpenTimeoutError", "WorkerPoolsError"]


class WorkerPoolsError(Exception):
    """The base of every error that workerpools raises itself."""


class ConfigurationError(WorkerPoolsError, ValueError):
    """A declaration or a setting is wrong; the message names it, its value and what to do."""


class DeadlineExceeded(WorkerPoolsError, TimeoutError):
    """A task's deadline has come: what it asked for was not begun, or not waited for any longer."""


class NoAttemptError(WorkerPoolsError, RuntimeError):
    """Something that belongs to an attempt was used where no task body runs."""


class OpenTimeoutError(WorkerPoolsError, TimeoutError):
    """A thread waited too long for another thread that is opening the same resource."""
