"""The connection pool of an asynchronous engine: its callers wait in greenlets, all on the process's event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

from sqlalchemy.pool import AsyncAdaptedQueuePool, ConnectionPoolEntry, PoolProxiedConnection
from sqlalchemy.util import await_only, greenlet_spawn

from workerpools.adapter import Lease, loop_is_running, on_loop, run_coroutine, start_coroutine
from workerpools.sqlalchemy._connection import KEY, ConnectionState
from workerpools.sqlalchemy._pool import DeadlineQueuePool

__all__ = ["AsyncDeadlineQueuePool"]

#: How long taking back a connection may take, in seconds.
RECLAIM = 2.0


class _Waiter:
    """Has the methods of a lock that :class:`DeadlineQueuePool` uses."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def release(self) -> None:
        self._event.set()

    async def acquired(self, timeout: float) -> None:
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._event.wait(), timeout)


class AsyncDeadlineQueuePool(DeadlineQueuePool):
    """A :class:`DeadlineQueuePool` for asynchronous drivers."""

    replaces = AsyncAdaptedQueuePool
    _is_asyncio = True

    def connect(self) -> PoolProxiedConnection:
        """Check out a connection, as :meth:`DeadlineQueuePool.connect` does.

        Raises:
            RuntimeError: The calling thread has another event loop, to which the connections do not belong.
        """
        if self.events is not None:
            self.events.opening.require_loop()
        connection = super().connect()
        state: ConnectionState = connection.info[KEY]
        lease = state.lease
        if lease is not None and lease.attempt is not None:
            # Held until it is given back: what the garbage collector finds could not be rolled back.
            lease.reclaim = partial(self.reclaim, lease, connection)
        return connection

    def _waiter(self) -> Any:
        return _Waiter()

    def _wait(self, waiter: Any, seconds: float) -> None:
        await_only(waiter.acquired(seconds))

    def retire_idle(self, retire: Callable[[ConnectionPoolEntry], None]) -> None:
        """Call ``retire`` with every idle record, which may close its connection."""
        with self._lock:
            # Out of reach meanwhile: others of the loop's tasks go on while a connection is being closed.
            taken = list(self._idle)
            self._idle.clear()
            for record in taken:
                self._takers[record] = None
        try:
            for record in taken:
                retire(record)
        finally:
            with self._lock:
                self._idle.extend(taken)
            self._wake()

    def reclaim(self, lease: Lease, borrower: object = None) -> bool:
        """Take back the connection of a lease whose attempt has ended, in the attempt's thread.

        Args:
            lease: The lease.
            borrower: What keeps the connection.

        Returns:
            Whether it was in use.
        """
        record: Any = lease.held
        state: ConnectionState | None = None if record is None else record.info.get(KEY)
        if not loop_is_running() or (state is not None and state.announced):
            # A task that could not be ended still waits for an answer.
            return False
        if on_loop():
            start_coroutine(self._reclaimed(lease))
            return True
        return run_coroutine(self._reclaimed(lease))

    async def _reclaimed(self, lease: Lease) -> bool:
        return await asyncio.wait_for(greenlet_spawn(super().reclaim, lease), RECLAIM)
