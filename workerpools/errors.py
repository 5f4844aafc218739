"""The exceptions of workerpools.

::

    WorkerPoolsError
    ├── ConfigurationError      (also ValueError)    a declaration or setting is wrong
    ├── DeadlineExceeded        (also TimeoutError)  a task's deadline passed
    ├── NoAttemptError          (also RuntimeError)  an attempt is required, and none is running
    └── OpenTimeoutError        (also TimeoutError)  another thread took too long to open a value

Client libraries' errors are never wrapped or replaced: ``except httpx.ReadError`` and
``except sqlalchemy.exc.OperationalError`` keep working. All classes take positional arguments only, because Celery
pickles exceptions. None is an AttributeError: ``__getattr__`` would swallow it.
"""

from __future__ import annotations

__all__ = ["ConfigurationError", "DeadlineExceeded", "NoAttemptError", "OpenTimeoutError", "WorkerPoolsError"]


class WorkerPoolsError(Exception):
    """Base class of all workerpools exceptions."""


class ConfigurationError(WorkerPoolsError, ValueError):
    """A declaration or setting is invalid; the message contains its name, its value and the remedy."""


class DeadlineExceeded(WorkerPoolsError, TimeoutError):
    """The task's deadline has passed: the operation was not started, or its wait was cut short."""


class NoAttemptError(WorkerPoolsError, RuntimeError):
    """A feature that requires a running task body was used outside one."""


class OpenTimeoutError(WorkerPoolsError, TimeoutError):
    """Timed out waiting for another thread to open the same resource."""
