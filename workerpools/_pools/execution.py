"""What runs the tasks of this process, and how many at a time."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["UNKNOWN", "ExecutionPool"]


class ExecutionPool(NamedTuple):
    """The worker's execution pool as this process sees it.

    Attributes:
        kind: ``prefork``, ``solo``, ``threads``, ``gevent``, ``eventlet``, or an empty string outside a worker.
        concurrency: How many tasks run in this process at a time; None when that is not known.
    """

    kind: str = ""
    concurrency: int | None = None


UNKNOWN = ExecutionPool()
