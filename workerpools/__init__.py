"""Gives every Celery worker process its own live connections, made after the fork.

See :class:`WorkerPools` to declare them, and :class:`PooledTask` to use them in tasks. Importing this package imports
no client library and opens nothing.
"""

from workerpools._celery.app import WorkerPools
from workerpools._celery.task import PooledTask
from workerpools._core.adapter import Adapter
from workerpools._core.deadline import Deadline
from workerpools._core.failure import Failure, FailureKind
from workerpools._core.policy import RetryPolicy
from workerpools._core.resource import Resource
from workerpools.bases import DatabaseTask, HTTPTask
from workerpools.classification import classify
from workerpools.errors import ConfigurationError, DeadlineExceeded, NoAttemptError, OpenTimeoutError, WorkerPoolsError

__all__ = [
    "Adapter",
    "ConfigurationError",
    "DatabaseTask",
    "Deadline",
    "DeadlineExceeded",
    "Failure",
    "FailureKind",
    "HTTPTask",
    "NoAttemptError",
    "OpenTimeoutError",
    "PooledTask",
    "Resource",
    "RetryPolicy",
    "WorkerPools",
    "WorkerPoolsError",
    "classify",
]
