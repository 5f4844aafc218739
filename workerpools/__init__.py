"""Per-process connection pools for Celery workers, opened after the fork.

Declare resources with :class:`WorkerPools`, and use them in tasks with :class:`PooledTask`. Importing this package
imports no client library and opens no connection.
"""

from workerpools._celery.pools import WorkerPools
from workerpools._celery.task import PooledTask
from workerpools._pools.adapter import Adapter
from workerpools._pools.resource import Resource
from workerpools._run.deadline import Deadline
from workerpools._run.delivery import RetryPolicy
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
