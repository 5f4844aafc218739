"""What clients, pipelines and locks do otherwise than the driver's, which are the other base of each class."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from workerpools.adapter import Effect, FailureKind, deadline, failure_of
from workerpools.errors import DeadlineExceeded
from workerpools.redis._exchange import effects_of_lock
from workerpools.redis._pool import Pooled

if TYPE_CHECKING:
    from typing import Any as _Driver
else:
    _Driver = object

__all__ = ["AsyncClient", "AsyncLock", "AsyncPipeline", "Client", "Lock", "Pipeline"]


class _AnyClient(_Driver):  # type: ignore[misc]
    connection_pool: Pooled

    def _may_send_again(self, error: BaseException, command: object) -> bool:
        """Return whether a command that failed is sent again: it changed nothing, and only its connection was dead."""
        failure = failure_of(error)
        # A new connection has nothing of what the body left on a connection of its own.
        if failure is None or failure.kind is not FailureKind.STALE or failure.code or self.connection is not None:
            return False
        return self.connection_pool.opening.replay(error, method=str(command)[:40])

    def pipeline(self, transaction: Any = True, shard_hint: Any = None) -> Any:
        """Return a pipeline."""
        pool = self.connection_pool
        return pool.library.Pipeline(pool, self.response_callbacks, transaction, shard_hint)

    def lock(self, *arguments: Any, **options: Any) -> Any:
        """Return a lock whose wait ends by the task's deadline."""
        if len(arguments) < 6:
            options["lock_class"] = options.get("lock_class") or self.connection_pool.library.Lock
        return super().lock(*arguments, **options)


class Client(_AnyClient):
    """The part of a client that sends a lost command again where that is safe."""

    def execute_command(self, *arguments: Any, **options: Any) -> Any:
        """Execute a command."""
        try:
            return super().execute_command(*arguments, **options)
        except self.connection_pool.library.ConnectionError as error:
            if not self._may_send_again(error, arguments[0]):
                raise
        return super().execute_command(*arguments, **options)


class AsyncClient(_AnyClient):
    """The same of an asynchronous client."""

    async def execute_command(self, *arguments: Any, **options: Any) -> Any:
        """Execute a command."""
        try:
            return await super().execute_command(*arguments, **options)
        except self.connection_pool.library.ConnectionError as error:
            if not self._may_send_again(error, arguments[0]):
                raise
        return await super().execute_command(*arguments, **options)


class _AnyPipeline(_Driver):  # type: ignore[misc]
    connection_pool: Any
    connection: Any

    def _forget_dead(self) -> Any:
        """Return the connection; if it is closed, or the time is over, the pool closes it: it is not to UNWATCH."""
        connection = self.connection
        if connection is not None and (not connection.is_open or deadline().remaining() == 0.0):
            self.watching = False
        return connection


class Pipeline(_AnyPipeline):
    """The part of a pipeline that tells a lost connection from a watched key that changed.

    The drivers raise WatchError for both, upon which code such as their own ``transaction()`` begins again, although
    EXEC may have been done.
    """

    def _is_lost(self, connection: Any, error: Exception, *figures: object) -> None:
        connection.disconnect()
        # A new connection would watch nothing.
        self.reset()
        raise error

    # The names of redis-py and valkey-py.
    _disconnect_raise_on_watching = _disconnect_reset_raise_on_watching = _is_lost
    _disconnect_raise_reset = _disconnect_reset_raise = _is_lost

    def reset(self) -> None:
        """Give the connection back, watching nothing."""
        connection = self._forget_dead()
        try:
            super().reset()
        finally:
            if self.connection is not None:
                self.watching, self.connection = False, None
                self.connection_pool.release(connection)


class AsyncPipeline(_AnyPipeline):
    """The same of an asynchronous pipeline."""

    async def _is_lost(self, connection: Any, error: Exception, *figures: object) -> None:
        connection.drop()
        await self.reset()
        raise error

    _disconnect_raise_on_watching = _disconnect_reset_raise_on_watching = _is_lost
    _disconnect_raise_reset = _disconnect_reset_raise = _is_lost

    async def reset(self) -> None:
        """Give the connection back, watching nothing."""
        connection = self._forget_dead()
        try:
            await super().reset()
        finally:
            if self.connection is not None:
                self.watching, self.connection = False, None
                await self.connection_pool.release(connection)


class _AnyLock(_Driver):  # type: ignore[misc]
    """The part of a lock that knows what is left of it: nothing, once it was released."""

    _effects: tuple[Effect, ...] = ()

    @contextmanager
    def _collected(self) -> Generator[None, None, None]:
        found: list[Effect] = []
        token = effects_of_lock.set(found)
        try:
            yield
        finally:
            effects_of_lock.reset(token)
            self._effects = (*self._effects, *found)

    @contextmanager
    def _acquiring(self) -> Generator[list[bool], None, None]:
        """Collect as :meth:`_collected`; what is yielded is filled where the lock was acquired."""
        before, acquired = self._effects, list[bool]()
        with self._collected():
            yield acquired
        if not acquired:
            # SET NX answered that the key was there.
            self._withdraw(self._effects[len(before) :])
            self._effects = before

    @contextmanager
    def _releasing(self) -> Generator[None, None, None]:
        """Withdraw all effects at the end: whoever runs again takes the lock again."""
        with self._collected():
            yield
        self._withdraw(self._effects)
        self._effects = ()

    def _withdraw(self, effects: tuple[Effect, ...]) -> None:
        for effect in effects:
            effect.withdraw()

    def _patience(self, timeout: float | None) -> float | None:
        """Return how long to wait for the lock, in seconds: not longer than until the task's deadline."""
        if timeout is not None and timeout < 0:
            return timeout
        clamped = deadline().clamp(timeout)
        return timeout if clamped is None else clamped

    def _in_time(self, acquired: bool, *, waits: bool, shortened: bool) -> bool:
        if not acquired and waits and shortened:
            raise DeadlineExceeded("a lock was not acquired before the task's deadline")
        return acquired


class Lock(_AnyLock):
    """A lock that a thread waits for."""

    def acquire(
        self,
        sleep: float | None = None,
        blocking: bool | None = None,
        blocking_timeout: float | None = None,
        token: Any = None,
    ) -> bool:
        """Acquire the lock. The wait ends by the task's deadline."""
        wanted = self.blocking_timeout if blocking_timeout is None else blocking_timeout
        patience = self._patience(wanted)
        acquired = bool(super().acquire(sleep, blocking, patience, token))
        waits = self.blocking if blocking is None else blocking
        return self._in_time(acquired, waits=waits, shortened=patience != wanted)

    def do_acquire(self, token: Any) -> bool:
        """Try to acquire the lock."""
        with self._acquiring() as acquired:
            if super().do_acquire(token):
                acquired.append(True)
        return bool(acquired)

    def do_release(self, expected_token: Any) -> None:
        """Release the lock."""
        with self._releasing():
            super().do_release(expected_token)

    def do_extend(self, *arguments: Any, **options: Any) -> Any:
        """Extend the lock."""
        with self._collected():
            return super().do_extend(*arguments, **options)

    def do_reacquire(self) -> Any:
        """Renew the lock."""
        with self._collected():
            return super().do_reacquire()


class AsyncLock(_AnyLock):
    """A lock that a coroutine waits for."""

    async def acquire(
        self, blocking: bool | None = None, blocking_timeout: float | None = None, token: Any = None
    ) -> bool:
        """Acquire the lock. The wait ends by the task's deadline."""
        wanted = self.blocking_timeout if blocking_timeout is None else blocking_timeout
        patience = self._patience(wanted)
        acquired = bool(await super().acquire(blocking, patience, token))
        waits = self.blocking if blocking is None else blocking
        return self._in_time(acquired, waits=waits, shortened=patience != wanted)

    async def do_acquire(self, token: Any) -> bool:
        """Try to acquire the lock."""
        with self._acquiring() as acquired:
            if await super().do_acquire(token):
                acquired.append(True)
        return bool(acquired)

    async def do_release(self, expected_token: Any) -> None:
        """Release the lock."""
        with self._releasing():
            await super().do_release(expected_token)

    async def do_extend(self, *arguments: Any, **options: Any) -> Any:
        """Extend the lock."""
        with self._collected():
            return await super().do_extend(*arguments, **options)

    async def do_reacquire(self) -> Any:
        """Renew the lock."""
        with self._collected():
            return await super().do_reacquire()
