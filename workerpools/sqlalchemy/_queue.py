"""A connection pool in which nobody waits for a free connection beyond the task's deadline."""

from __future__ import annotations

import threading
import time
from typing import Any

from sqlalchemy.pool import PoolProxiedConnection, QueuePool

from workerpools.adapter import deadline
from workerpools.errors import DeadlineExceeded

__all__ = ["DeadlineQueuePool"]

_POLL = 0.005


class DeadlineQueuePool(QueuePool):
    """SQLAlchemy's ``QueuePool``, with the task's deadline as a second bound of its waiting.

    SQLAlchemy knows one time-out for all who wait. Who has less time waits here until a connection is free, and then
    takes it. Somebody without a deadline may be quicker; then ``timeout`` is the bound, as it always was.

    Args:
        creator: Opens a connection.
        pool_size: As for ``QueuePool``.
        max_overflow: As for ``QueuePool``.
        timeout: As for ``QueuePool``, in seconds.
        use_lifo: As for ``QueuePool``.
        options: Those of every pool.
    """

    def __init__(
        self,
        creator: Any,
        pool_size: int = 5,
        max_overflow: int = 10,
        timeout: float = 30.0,
        use_lifo: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(creator, pool_size, max_overflow, timeout, use_lifo, **options)
        #: How many there may be; None without a limit.
        self._limit = pool_size + max_overflow if pool_size > 0 and max_overflow >= 0 else None
        self._turn = threading.Lock()

    def connect(self) -> PoolProxiedConnection:
        """Return a connection.

        Raises:
            DeadlineExceeded: None came free before the task's deadline.
            sqlalchemy.exc.TimeoutError: None came free within ``timeout``.
        """
        if self._limit is None or self.checkedout() < self._limit:
            return super().connect()
        remaining = deadline().remaining()
        if remaining is None or remaining > self.timeout():
            return super().connect()
        until = time.monotonic() + remaining
        # One at a time, so that no two of them see the same free connection.
        if self._turn.acquire(timeout=remaining):
            try:
                while self.checkedout() >= self._limit and time.monotonic() < until:
                    time.sleep(_POLL)
                if self.checkedout() < self._limit:
                    return super().connect()
            finally:
                self._turn.release()
        raise DeadlineExceeded(
            f"none of the connection pool's {self._limit} connections came free: the task's deadline has come"
        )
