"""The pool of connections: bounded in number and waits, checked at check-out, retired together."""

from __future__ import annotations

import ssl
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from workerpools.adapter import Due, Failure, FailureKind, Lease, Lifetime, Opening, Phase, Sent, deadline, due
from workerpools.errors import ConfigurationError, DeadlineExceeded
from workerpools.redis._connection import WatchedConnection
from workerpools.redis._exchange import Watched

if TYPE_CHECKING:
    from typing import Any as _Driver

    from workerpools.redis._sentinel import Sentinel
else:
    _Driver = object

__all__ = ["Pooled", "WatchedPool"]


class Pooled(_Driver):  # type: ignore[misc]
    """The part of a pool that decides. A synchronous and an asynchronous one wait.

    Args:
        opening: The opening to which everything is reported.
        library: The driver, a ``Library``.
        options: The driver's options for each connection.
        max_connections: The number of connections.
        timeout: How long an answer may take, in seconds; None for no limit but the deadline.
        connect_timeout: How long connecting may take, in seconds, log-in included.
        acquire_timeout: How long to wait for a connection, in seconds.
        lifetime: How long connections are kept and trusted.
        credentials: Returns what to log in with; None for what ``options`` have.
        sentinel: Finds the primary; None where ``options`` name the server.
        tls: Returns the TLS context.

    Attributes:
        declaration: The name of what declares it, for messages.
    """

    declaration = ""
    # Of the driver's class, which is the other base.
    max_connections: int
    connection_class: Any
    connection_kwargs: dict[str, Any]

    def __init__(
        self,
        opening: Opening,
        library: Any,
        options: dict[str, Any],
        *,
        max_connections: int,
        timeout: float | None,
        connect_timeout: float,
        acquire_timeout: float,
        lifetime: Lifetime,
        credentials: Callable[[], Any] | None = None,
        sentinel: Sentinel | None = None,
        tls: Callable[[], ssl.SSLContext] | None = None,
    ) -> None:
        self.opening = opening
        self.library = library
        self.timeout = timeout
        self.connect_timeout = connect_timeout
        self.acquire_timeout = acquire_timeout
        self.lifetime = lifetime
        self.credentials = credentials
        self.sentinel = sentinel
        self.tls: Any = tls
        # Of a Sentinel's primary not known beforehand.
        self.ports: tuple[int, ...] = () if sentinel is not None or "port" not in options else (options["port"],)
        self._idle: list[Any] = []
        #: The connections in use, each with its lease.
        self._used: dict[Any, Lease] = {}
        self._since = 0.0
        self._reason = ""
        self._closed = False
        super().__init__(max_connections=max_connections, **library.pool_options, **options)

    def __repr__(self) -> str:
        return f"<pool of the resource {self.opening.resource!r}: {len(self._used)} in use, {len(self._idle)} idle>"

    def __del__(self) -> None:
        # The driver's would close the connections, of which each closes itself.
        return

    def reset(self) -> None:
        """Forget nothing: a forked child has a pool of its own."""

    def _checkpid(self) -> None:
        return

    # Checking out.

    def _asked(self) -> Lease:
        """Begin a check-out; return its lease, which waits."""
        opening = self.opening
        opening.notice()
        if deadline().remaining() == 0.0:
            raise DeadlineExceeded(
                f"no connection of the resource {opening.resource!r} was taken: the task's deadline has passed"
            )
        return opening.wait()

    def _taken(self, lease: Lease) -> Any:
        """Return a connection for a lease, an idle one or a new one, while there is room."""
        connection = self._idle.pop() if self._idle else self.make_connection()
        self._used[connection] = lease
        return connection

    def _has_room(self) -> bool:
        return bool(self._idle) or len(self._used) < self.max_connections

    def _patience(self) -> float | None:
        # Not at all for what never comes.
        return 0.0 if self.opening.endless_wait() else deadline().clamp(self.acquire_timeout)

    def _exhausted(self) -> Exception:
        opening = self.opening
        endless = opening.endless_wait()
        waited = endless or f"none became free in {self.acquire_timeout:g} s"
        error: Exception = self.library.ConnectionError(
            f"no connection of the resource {opening.resource!r} is available: {waited} "
            f"(max_connections={self.max_connections})"
        )
        error.pool_timeout = True  # type: ignore[attr-defined]
        if endless:
            failure = Failure(FailureKind.PERMANENT, Sent.NOTHING, phase=Phase.ACQUIRE, known=endless)
        else:
            failure = Failure(FailureKind.POOL_EXHAUSTED, Sent.NOTHING, phase=Phase.ACQUIRE, known=waited)
        late = not endless and deadline().remaining() == 0.0
        opening.failed(error, None if late else failure, phase=Phase.ACQUIRE, deadline=late)
        return error

    def make_connection(self) -> Any:
        """Make a connection, which opens at its first use."""
        return self.connection_class(self, **self.connection_kwargs)

    def _due(self, connection: Watched, now: float) -> Due | None:
        """Return what is due for an idle connection."""
        action = due(self.lifetime, age=now - connection.made, idle=now - connection.returned, lives=connection.lives)
        if action is Due.RETIREMENT:
            over = connection.lives is not None and now - connection.made >= connection.lives
            connection.reason = "lifetime" if over else "idle"
        return action

    def _replace(self, connection: Watched) -> None:
        connection.reason = connection.reason or "stale"
        self.opening.replaced(connection.reason)
        connection.drop()

    # Checking in.

    def _settle(self, connection: Watched) -> None:
        """Close a connection that the next task must not have."""
        if self._closed or connection.made < self._since or not connection.is_clean():
            connection.reason = connection.reason or self._reason_for(connection)
            connection.drop()
        connection.returned = time.monotonic()

    def _reason_for(self, connection: Watched) -> str:
        if self._closed:
            return "shutdown"
        return self._reason if connection.made < self._since else "other"

    def _retired(self, since: float, reason: str) -> list[Any]:
        """Note that connections opened before ``since`` serve nothing new; return the idle ones, which are to close."""
        self._since, self._reason = max(since, self._since), reason
        old = [connection for connection in self._idle if connection.made < since]
        self._idle = [connection for connection in self._idle if connection.made >= since]
        return old

    # The driver's, for its users.

    def set_retry(self, retry: object) -> None:
        """Refuse: a driver's retry sends a command again whose answer was lost."""
        raise ConfigurationError(
            f"{self.declaration}: the driver is to send nothing again; workerpools does, where that is safe"
        )

    def _get_free_connections(self) -> set[Any]:
        return set(self._idle)

    def _get_in_use_connections(self) -> set[Any]:
        return set(self._used)


class WatchedPool(Pooled):
    """The part of a pool that waits; the driver's own class is the other base."""

    declaration = "RedisClient"

    def __init__(self, *arguments: Any, **options: Any) -> None:
        # A lock in C, so that no signal handler runs between acquiring it and entering the block. The drivers have a
        # `_lock` of their own.
        self._mutex = threading.RLock()
        self._changed = threading.Condition(self._mutex)
        super().__init__(*arguments, **options)

    def get_connection(self, command_name: object = None, *keys: object, **options: object) -> Any:
        """Check out a connection, connected and fit for use."""
        lease = self._asked()
        lease.reclaim = reclaim = partial(self._reclaim, lease)
        try:
            connection = self._acquire(lease)
            began = time.monotonic()
            if connection._sock is not None and self._is_fit(connection, began):
                connection.reused = True
                lease.acquired(reclaim=reclaim)
            else:
                connection.connect()
                lease.acquired(creating=time.monotonic() - began, reused=False, reclaim=reclaim)
        except BaseException as error:
            self._give_back(lease)
            lease.gave_up(timed_out=getattr(error, "pool_timeout", False))
            lease.returned()
            raise
        return connection

    def _acquire(self, lease: Lease) -> WatchedConnection:
        with self._mutex:
            if not self._has_room() and not self._changed.wait_for(self._has_room, self._patience()):
                raise self._exhausted()
            connection: WatchedConnection = self._taken(lease)
        return connection

    def _is_fit(self, connection: WatchedConnection, now: float) -> bool:
        """Return whether an idle connection may be used; else it is closed."""
        action = self._due(connection, now)
        if (
            action is not Due.RETIREMENT
            and not connection.has_ended()
            and (action is not Due.CHECK or self._checked(connection))
        ):
            return True
        self._replace(connection)
        return False

    def _checked(self, connection: WatchedConnection) -> bool:
        alive = connection.answers()
        self.opening.checked(alive=alive)
        return alive

    def release(self, connection: Any) -> None:
        """Check a connection in; one that something was left on is closed."""
        lease = self._used.get(connection)
        if lease is None:
            # Taken back before.
            connection.disconnect()
            return
        self._check_in(connection)
        lease.returned()

    def _check_in(self, connection: WatchedConnection) -> None:
        self._settle(connection)
        with self._mutex:
            if connection._sock is not None:
                # In both for a moment: an interruption must not lose it.
                self._idle.append(connection)
            self._used.pop(connection, None)
            self._changed.notify_all() if self._closed else self._changed.notify()

    def _give_back(self, lease: Lease) -> bool:
        """Take the connection of a lease back, whatever state it is in; return whether it was out."""
        found = [connection for connection, held in list(self._used.items()) if held is lease]
        for connection in found:
            with self._mutex:
                # An interrupted check-in may have got this far.
                if connection in self._idle:
                    self._idle.remove(connection)
            connection.retired = True
            connection.reason = connection.reason or "other"
            connection.disconnect()
            with self._mutex:
                self._used.pop(connection, None)
                self._changed.notify_all()
        return bool(found)

    def _reclaim(self, lease: Lease) -> bool:
        try:
            return self._give_back(lease)
        finally:
            lease.gave_up()
            lease.returned()

    # Retiring.

    def retire(self, since: float, reason: str) -> None:
        """Use connections that were opened before ``since`` for nothing new: idle ones are closed."""
        with self._mutex:
            old = self._retired(since, reason)
        for connection in old:
            connection.reason = reason
            connection.disconnect()

    def shut_down(self, timeout: float) -> None:
        """Close everything, once what is in use has come back or ``timeout`` seconds have passed."""
        with self._mutex:
            self._changed.wait_for(lambda: not self._used, timeout)
            self._closed = True
            used = list(self._used)
        self.retire(time.monotonic(), "shutdown")
        for connection in used:
            connection.interrupt()

    def disconnect(self, inuse_connections: bool = True) -> None:
        """Close the idle connections; those in use once they are checked in."""
        if inuse_connections:
            self.retire(time.monotonic(), "other")
        else:
            self.retire(self._since, "other")

    def close(self) -> None:
        """Close the idle connections."""
        self.disconnect()
