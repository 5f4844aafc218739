"""An adapter for pymemcache, as another distribution would bring it: written from the documentation alone."""

from __future__ import annotations

import functools
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from pymemcache.client.base import Client, PooledClient
from pymemcache.exceptions import MemcacheUnexpectedCloseError
from pymemcache.pool import ObjectPool

from workerpools.adapter import Adapter, Failure, FailureKind, Lease, Opening, Phase, Sent, Setting, add_note, deadline
from workerpools.errors import ConfigurationError, DeadlineExceeded

__all__ = ["Memcached"]

#: What leaves the same behind however often it is done. Whatever else there is counts as an effect.
REPEATABLE = frozenset(
    (b"get", b"gets", b"gat", b"gats", b"set", b"replace", b"delete", b"touch", b"flush_all", b"stats", b"version")
)

# A socket with a time-out of 0 does not wait, and says so with an error that is no time-out.
_LEAST = 0.001


class Memcached(Adapter[PooledClient]):
    """Declares a ``pymemcache.PooledClient``: bounded waits, and an answer to every command.

    Args:
        host: The server's host.
        port: The server's port.
        timeout: Seconds to wait for each answer.
        connect_timeout: Seconds to wait for a connection.
        max_pool_size: How many connections a process may open; None for 10, or the concurrency if that is more.
        options: The other options of ``PooledClient``.
    """

    kind = "cache"
    libraries = ("pymemcache",)
    settings = (
        Setting.text("memcached_host", "The host of memcached; required."),
        Setting.whole("memcached_port", "Its port (11211).", least=1),
        Setting.timeout("memcached_timeout", "How long to wait for each answer, in seconds (5)."),
    )

    def __init__(
        self,
        host: str,
        port: int = 11211,
        *,
        timeout: float = 5.0,
        connect_timeout: float = 3.0,
        max_pool_size: int | None = None,
        **options: Any,
    ) -> None:
        self.server = (host, port)
        self._max_pool_size = max_pool_size
        # Without an answer nothing proves that a command has arrived.
        self._options = {"timeout": timeout, "connect_timeout": connect_timeout, "default_noreply": False, **options}

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Memcached:
        if "memcached_host" not in settings:
            raise ConfigurationError("workerpools_memcached_host is not set")
        return cls(
            settings["memcached_host"],
            settings.get("memcached_port", 11211),
            timeout=settings.get("memcached_timeout", 5.0),
        )

    def open(self, opening: Opening) -> PooledClient:
        size = self._max_pool_size or max(10, opening.execution_pool.concurrency or 0)
        opening.limited(size)
        return _WatchedClient(opening, self.server, max_pool_size=size, **self._options)

    def close(self, value: PooledClient, timeout: float) -> None:
        value.client_pool.drain(timeout)
        value.close()

    def recycle(self, value: PooledClient, since: float) -> bool:
        value.client_pool.retire(since, "recycled")
        return True

    def describe(self) -> str:
        return "Memcached {}:{}".format(*self.server)


class _WatchedClient(PooledClient):
    def __init__(self, opening: Opening, server: tuple[str, int], **options: Any) -> None:
        super().__init__(server, **options)
        self.client_pool = pool = _Pool(opening, self._create_client, max_size=self.client_pool.max_size)
        self.client_class = functools.partial(_Connection, opening, pool)


class _Pool(ObjectPool):
    """Reports leases, and gives up connections that are too old to be used again."""

    def __init__(self, opening: Opening, make: Callable[[], _Connection], max_size: int) -> None:
        super().__init__(make, after_remove=lambda connection: connection.close(), max_size=max_size)
        self._opening = opening
        self._returned = threading.Condition()
        # Connections that were opened earlier are retired, and why.
        self._since, self._reason = 0.0, ""

    def get(self) -> _Connection:
        self._opening.notice()
        lease = self._opening.wait()
        try:
            connection: _Connection = super().get()
        except RuntimeError as error:
            lease.gave_up()
            self._opening.failed(
                error,
                Failure(
                    FailureKind.POOL_EXHAUSTED, Sent.NOTHING, phase=Phase.ACQUIRE, known="every connection was in use"
                ),
            )
            raise
        except BaseException:
            lease.gave_up()
            raise
        connection.lease = lease
        lease.acquired(reused=connection.sock is not None, reclaim=lambda: self._reclaim(connection))
        return connection

    def release(self, obj: _Connection, silent: bool = True) -> None:
        if obj.born < self._since:
            obj.reason = self._reason
            self.destroy(obj, silent)
            return
        super().release(obj, silent)
        self._ended(obj)

    def destroy(self, obj: _Connection, silent: bool = True) -> None:
        super().destroy(obj, silent)
        self._ended(obj)

    def _ended(self, connection: _Connection) -> None:
        connection.lease.returned()
        with self._returned:
            self._returned.notify_all()

    def _reclaim(self, connection: _Connection) -> bool:
        # Nothing tells what was sent over it.
        self.destroy(connection)
        return True

    def retire(self, since: float, reason: str) -> None:
        """Use connections that were opened before ``since`` for nothing new."""
        with self._lock:
            self._since, self._reason = since, reason
            old = [connection for connection in self._free_objs if connection.born < since]
            for connection in old:
                self._free_objs.remove(connection)
        for connection in old:
            connection.reason = reason
            connection.close()

    def drain(self, timeout: float) -> None:
        """Wait until no connection is in use, at most ``timeout`` seconds."""
        with self._returned:
            self._returned.wait_for(lambda: not self.used, timeout)


class _Connection(Client):
    """One connection, which reports what becomes of it and of what is sent over it."""

    lease: Lease

    def __init__(self, opening: Opening, pool: _Pool, server: tuple[str, int], **options: Any) -> None:
        super().__init__(server, **options)
        self._opening = opening
        self._pool = pool
        self._wanted = self.connect_timeout
        self.born = time.monotonic()
        self.reason = ""

    def _connect(self) -> None:
        self.born = time.monotonic()
        self.connect_timeout = _clamped(self._wanted)
        self._opening.descriptors.connecting(self.server[1])
        try:
            super()._connect()
        except OSError as error:
            self._opening.descriptors.gave_up()
            self._failed(error, FailureKind.UNAVAILABLE, Sent.NOTHING, Phase.CONNECT, "no connection was made")
            raise
        self._opening.connected(self.sock)
        self._opening.created(time.monotonic() - self.born)
        self.sock = _Socket(self.sock, self.timeout)

    def close(self) -> None:
        connection = self.sock
        super().close()
        if connection is not None:
            self._opening.disconnected(connection.socket, reason=self.reason, age=time.monotonic() - self.born)

    @contextmanager
    def _watched(self, command: bytes) -> Iterator[None]:
        name, repeatable = command.decode(), command in REPEATABLE
        if deadline().remaining() == 0.0:
            raise DeadlineExceeded(f"{name} by {self._opening.resource!r} was not begun: the task's deadline has come")
        reused = self.sock is not None
        if not reused:
            self._connect()
        if not repeatable:
            self._opening.effect(f"{name} by {self._opening.resource!r}")
        try:
            yield
        except (OSError, MemcacheUnexpectedCloseError) as error:
            add_note(error, f"workerpools: {name} by the resource {self._opening.resource!r}")
            if not repeatable:
                kind, known = FailureKind.INDETERMINATE, f"whether {name} was done is not known"
            elif reused and not isinstance(error, TimeoutError):
                kind, known = FailureKind.STALE, "the connection was dead, and the command may be sent again"
            else:
                kind, known = FailureKind.UNAVAILABLE, "no answer came, and the command may be sent again"
            self._failed(error, kind, Sent.UNKNOWN, Phase.REQUEST, known)
            if kind is FailureKind.STALE:
                # Where one was dead, its siblings are suspect.
                self.reason = "stale"
                self._pool.retire(time.monotonic(), "stale")
            raise

    def _failed(self, error: BaseException, kind: FailureKind, sent: Sent, phase: Phase, known: str) -> None:
        timed_out = isinstance(error, TimeoutError)
        if timed_out and deadline().remaining() == 0.0:
            self._opening.failed(error, None, phase=phase, deadline=True)
            return
        failure = Failure(kind, sent, phase=phase, timed_out=timed_out, known=known)
        self._opening.failed(error, failure)

    def _fetch_cmd(self, name: bytes, *args: Any, **options: Any) -> Any:
        with self._watched(name):
            return super()._fetch_cmd(name, *args, **options)

    def _store_cmd(self, name: bytes, *args: Any, **options: Any) -> Any:
        with self._watched(name):
            return super()._store_cmd(name, *args, **options)

    def _misc_cmd(self, cmds: Any, cmd_name: bytes, *args: Any, **options: Any) -> Any:
        with self._watched(cmd_name):
            return super()._misc_cmd(cmds, cmd_name, *args, **options)


class _Socket:
    """A socket none of whose waits reaches past the task's deadline."""

    def __init__(self, connection: socket.socket, timeout: float | None) -> None:
        self.socket = connection
        self._timeout = timeout

    def sendall(self, data: bytes) -> None:
        self.socket.settimeout(_clamped(self._timeout))
        self.socket.sendall(data)

    def recv(self, size: int) -> bytes:
        self.socket.settimeout(_clamped(self._timeout))
        return self.socket.recv(size)

    def close(self) -> None:
        # Wakes another thread that waits for an answer.
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()


def _clamped(timeout: float | None) -> float | None:
    return deadline().clamp(timeout, _LEAST)
