"""Gives every Celery worker process its own live connections, made after the fork.

See :class:`WorkerPools` to declare them, and :class:`PooledTask` to use them in tasks. Importing this package imports
no client library and opens nothing.
"""

from workerpools._celery.pools import WorkerPools
from workerpools._celery.task import PooledTask
from workerpools._pools.adapter import Adapter
from workerpools._pools.resource import Resource
from workerpools._run.deadline import Deadline
from workerpools._run.decision import RetryPolicy
from workerpools._run.failure import Failure, FailureKind
from workerpools.bases import DatabaseTask, HTTPTask
from workerpools.errors import ConfigurationError, DeadlineExceeded, NoAttemptError, OpenTimeoutError, WorkerPoolsError
from workerpools.failures import classify

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
