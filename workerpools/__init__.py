"""Per-process connection pools for Celery workers, opened after the fork.

Declare resources with :class:`WorkerPools`, and use them in tasks with :class:`PooledTask`. Importing this package
imports no client library and opens no connection.
"""

# ruff: noqa: F403, F405

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from workerpools._names import *

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
    "check",
    "classify",
]


if not TYPE_CHECKING:  # a type checker would believe every name

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name)
        from workerpools import _names

        globals().update({each: getattr(_names, each) for each in __all__})
        return globals()[name]

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
