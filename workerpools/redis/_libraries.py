"""The two drivers, redis-py and valkey-py: the same code, in classes of each."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from workerpools.adapter import Effect, FailureKind, Opening, deadline, explained, failure_of
from workerpools.errors import DeadlineExceeded
from workerpools.redis._connection import WatchedConnection, effects_of_lock
from workerpools.redis._pool import WatchedPool

if TYPE_CHECKING:
    from typing import Any as _Driver
else:
    _Driver = object

__all__ = ["Library", "library"]


class _Client(_Driver):  # type: ignore[misc]
    """The part of a client that sends a lost command again where that is safe."""

    connection_pool: WatchedPool

    def execute_command(self, *arguments: Any, **options: Any) -> Any:
        """Execute a command."""
        pool = self.connection_pool
        try:
            return super().execute_command(*arguments, **options)
        except pool.library.ConnectionError as error:
            failure = failure_of(error)
            # A new connection has nothing of what the body left on a connection of its own.
            if failure is None or failure.kind is not FailureKind.STALE or failure.code or self.connection is not None:
                raise
            if not pool.opening.replay(error, method=str(arguments[0])[:40]):
                raise
        return super().execute_command(*arguments, **options)

    def pipeline(self, transaction: Any = True, shard_hint: Any = None) -> Any:
        """Return a pipeline."""
        pool = self.connection_pool
        return pool.library.Pipeline(pool, self.response_callbacks, transaction, shard_hint)

    def lock(self, *arguments: Any, **options: Any) -> Any:
        """Return a lock whose wait ends by the task's deadline."""
        if len(arguments) < 6:
            options["lock_class"] = options.get("lock_class") or self.connection_pool.library.Lock
        return super().lock(*arguments, **options)


class _Pipeline(_Driver):  # type: ignore[misc]
    """The part of a pipeline that tells a lost connection from a watched key that changed.

    The drivers raise WatchError for both, upon which code such as their own ``transaction()`` begins again, although
    EXEC may have been done.
    """

    connection_pool: WatchedPool
    connection: Any

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
        connection = self.connection
        if connection is not None and (connection._sock is None or deadline().remaining() == 0.0):
            # The pool closes it instead of asking it to UNWATCH.
            self.watching = False
        try:
            super().reset()
        finally:
            if self.connection is not None:
                self.watching, self.connection = False, None
                self.connection_pool.release(connection)


class _Lock(_Driver):  # type: ignore[misc]
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

    def acquire(
        self,
        sleep: float | None = None,
        blocking: bool | None = None,
        blocking_timeout: float | None = None,
        token: Any = None,
    ) -> bool:
        """Acquire the lock. The wait ends by the task's deadline."""
        if blocking_timeout is None:
            blocking_timeout = self.blocking_timeout
        clamped = deadline().clamp(blocking_timeout) if blocking_timeout is None or blocking_timeout >= 0 else None
        if clamped is None:
            clamped = blocking_timeout
        acquired = bool(super().acquire(sleep, blocking, clamped, token))
        waits = self.blocking if blocking is None else blocking
        if not acquired and waits and clamped != blocking_timeout:
            raise DeadlineExceeded("a lock was not acquired before the task's deadline")
        return acquired

    def do_acquire(self, token: Any) -> bool:
        """Try to acquire the lock."""
        before = self._effects
        with self._collected():
            acquired = bool(super().do_acquire(token))
        if not acquired:
            # SET NX answered that the key was there.
            self._withdraw(self._effects[len(before) :])
            self._effects = before
        return acquired

    def do_release(self, expected_token: Any) -> None:
        """Release the lock; whoever runs again takes it again."""
        with self._collected():
            super().do_release(expected_token)
        self._withdraw(self._effects)
        self._effects = ()

    def do_extend(self, *arguments: Any, **options: Any) -> Any:
        """Extend the lock."""
        with self._collected():
            return super().do_extend(*arguments, **options)

    def do_reacquire(self) -> Any:
        """Renew the lock."""
        with self._collected():
            return super().do_reacquire()

    def _withdraw(self, effects: tuple[Effect, ...]) -> None:
        for effect in effects:
            effect.withdraw()


class Library:
    """One of the drivers.

    Args:
        name: ``redis`` or ``valkey``.

    Raises:
        ModuleNotFoundError: It is not installed.
    """

    def __init__(self, name: str) -> None:
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise explained(error, "workerpools.redis", name, name) from None
        connection = importlib.import_module(f"{name}.connection")
        self.distribution = name
        self.name = f"{name}-py"
        self.version = importlib.metadata.version(name)
        self.RedisError: type[Exception] = module.RedisError if name == "redis" else module.ValkeyError
        self.ConnectionError: type[Exception] = module.ConnectionError
        self.TimeoutError: type[Exception] = module.TimeoutError
        self.ResponseError: type[Exception] = module.ResponseError
        self.WatchError: type[Exception] = module.WatchError
        self.RESP3: Any = importlib.import_module(f"{name}._parsers")._RESP3Parser
        self.parse_url: Any = connection.parse_url
        client: Any = module.Redis if name == "redis" else module.Valkey
        self._plain = (connection.Connection, connection.SSLConnection, connection.UnixDomainSocketConnection)
        self.tcp, self.tls, self.unix = (_joined(WatchedConnection, each) for each in self._plain)
        self.Pool: Any = _joined(WatchedPool, connection.ConnectionPool)
        self.Pipeline: Any = _joined(_Pipeline, importlib.import_module(f"{name}.client").Pipeline)
        self.Client: Any = _joined(_Client, client)
        self.Lock: Any = _joined(_Lock, importlib.import_module(f"{name}.lock").Lock)
        #: Nothing of what a newer redis-py does by itself: moving connections when a server announces its maintenance.
        self.pool_options: dict[str, Any] = {}
        try:
            maintenance = importlib.import_module(f"{name}.maint_notifications")
        except ModuleNotFoundError:
            pass
        else:
            self.pool_options["maint_notifications_config"] = maintenance.MaintNotificationsConfig(enabled=False)
        #: No retries.
        backoff, retry = (importlib.import_module(f"{name}.{part}") for part in ("backoff", "retry"))
        self.quiet: dict[str, Any] = {"retry": retry.Retry(backoff.NoBackoff(), 0)}

    def sentinel_connection(self, *, secure: bool = False, **options: Any) -> Any:
        """Return a connection to a Sentinel."""
        return self._plain[1 if secure else 0](**options)

    def client(self, opening: Opening, pool: WatchedPool) -> Any:
        """Return a client over a pool."""
        return self.Client(connection_pool=pool)


def _joined(ours: type, theirs: type) -> Any:
    namespace = {"__module__": theirs.__module__, "__qualname__": theirs.__qualname__}
    return type(theirs.__name__, (ours, theirs), namespace)


@functools.cache
def library(name: str) -> Library:
    """Return the driver, imported on first use."""
    return Library(name)
