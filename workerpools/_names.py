"""The names of the package's root, which imports them on first use: a pytest plugin must cost nothing before."""

from workerpools._celery.pools import WorkerPools as WorkerPools
from workerpools._celery.task import PooledTask as PooledTask
from workerpools._check.checking import check as check
from workerpools._pools.adapter import Adapter as Adapter
from workerpools._pools.resource import Resource as Resource
from workerpools._run.deadline import Deadline as Deadline
from workerpools._run.delivery import RetryPolicy as RetryPolicy
from workerpools._run.failure import Failure as Failure
from workerpools._run.failure import FailureKind as FailureKind
from workerpools.bases import DatabaseTask as DatabaseTask
from workerpools.bases import HTTPTask as HTTPTask
from workerpools.errors import ConfigurationError as ConfigurationError
from workerpools.errors import DeadlineExceeded as DeadlineExceeded
from workerpools.errors import NoAttemptError as NoAttemptError
from workerpools.errors import OpenTimeoutError as OpenTimeoutError
from workerpools.errors import WorkerPoolsError as WorkerPoolsError
from workerpools.failures import classify as classify
