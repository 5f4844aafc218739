"""The adapters for Redis and Valkey: one client per process, with bounded waits and nothing sent twice."""

from __future__ import annotations

import inspect
import socket
import ssl
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from workerpools.adapter import (
    WEEK,
    Adapter,
    ExecutionPool,
    Failure,
    FailureKind,
    Lifetime,
    Limit,
    Opening,
    Phase,
    Sent,
    Setting,
    run_coroutine,
    seconds,
    whole,
)
from workerpools.errors import ConfigurationError
from workerpools.redis._errors import classify_unwatched
from workerpools.redis._libraries import library
from workerpools.redis._options import TLS, check_options, tls_context
from workerpools.redis._sentinel import Sentinel
from workerpools.redis._url import target_of

if TYPE_CHECKING:  # named in strings alone
    import redis  # noqa: F401
    from redis.asyncio import Redis as AsyncRedis  # noqa: F401

__all__ = ["AsyncRedisClient", "RedisClient"]

#: Detect a vanished peer, where the platform has them: TCP keepalives on an idle connection, and TCP_USER_TIMEOUT
#: (milliseconds) for unacknowledged data.
KEEPALIVE = {
    getattr(socket, name): value
    for name, value in (
        ("TCP_KEEPIDLE", 30),
        ("TCP_KEEPINTVL", 10),
        ("TCP_KEEPCNT", 3),
        ("TCP_USER_TIMEOUT", 30_000),
    )
    if hasattr(socket, name)
}


C = TypeVar("C")


class _Declared(Adapter[C]):
    """What the declarations of both clients have in common."""

    kind = "redis"
    libraries = ("redis", "valkey")
    settings = (
        Setting.url("redis_url", "URL of the server; required.", example="redis://localhost:6379/0"),
        Setting.timeout("redis_timeout", "How long an answer may take, in seconds (5)."),
        Setting.timeout("redis_connect_timeout", "Connect timeout, in seconds (3)."),
        Setting.timeout("redis_acquire_timeout", "Acquire timeout, in seconds (5)."),
        Setting.whole("redis_max_connections", "Connections per process (10, or the concurrency).", least=1),
    )

    #: Whether the driver's asynchronous classes are used.
    _asynchronous = False

    def __init__(
        self,
        url: str,
        *,
        timeout: float | None = 5.0,
        connect_timeout: float = 3.0,
        acquire_timeout: float = 5.0,
        max_connections: int | None = None,
        check_after: float | None = 30.0,
        max_idle: float | None = 300.0,
        max_lifetime: float | None = 1800.0,
        max_lifetime_jitter: float = 0.1,
        credentials: Callable[[], tuple[str, str] | str] | None = None,
        sentinel_credentials: tuple[str, str] | str | None = None,
        on_open: Callable[[C], object] | None = None,
        leak_after: float | None = None,
        **options: Any,
    ) -> None:
        called = type(self).__name__
        self._target = target = target_of(url, called, asynchronous=self._asynchronous)
        # What a URL's query says counts as an option; both at once is a mistake.
        named = {name: value for name, value in target.options.items() if name not in ("host", "port", "path")}
        if twice := named.keys() & options.keys():
            raise ConfigurationError(f"{called}: {', '.join(sorted(twice))}: given in the URL and as an option")
        own = inspect.signature(_Declared.__init__).parameters.keys() - {"self", "options"}
        check_options({**named, **options}, target.secure, called, own)
        if timeout is not None:
            seconds(timeout, f"{called}(timeout", most=WEEK, above=True, optional=True)
        seconds(connect_timeout, f"{called}(connect_timeout", most=WEEK, above=True)
        seconds(acquire_timeout, f"{called}(acquire_timeout", most=WEEK)
        if max_connections is not None:
            whole(max_connections, f"{called}(max_connections", least=1, optional=True)
        if leak_after is not None:
            seconds(leak_after, f"{called}(leak_after", above=True, optional=True)
        for name, value in (("credentials", credentials), ("on_open", on_open)):
            if value is not None and not callable(value):
                raise ConfigurationError(f"{called}({name}=…): wanted a function")
        if credentials is not None and {"username", "password", "credential_provider"} & {**named, **options}.keys():
            raise ConfigurationError(f"{called}: give either a user and a password or credentials=, not both")
        if sentinel_credentials is not None and not target.sentinels:
            raise ConfigurationError(f"{called}: sentinel_credentials is for a URL such as redis+sentinel://…")
        try:
            self._lifetime = Lifetime(check_after, max_idle, max_lifetime, max_lifetime_jitter)
        except ConfigurationError as error:
            raise ConfigurationError(f"{called}({error}") from None
        self._options = {**target.options, **options}
        self._timeouts = {"timeout": timeout, "connect_timeout": connect_timeout, "acquire_timeout": acquire_timeout}
        self._max_connections = max_connections
        self._credentials = credentials
        self._sentinel_credentials = sentinel_credentials
        self.on_open = on_open
        self.leak_after = leak_after
        if "port" in target.options:
            self.server = (target.options["host"], target.options["port"])
        self._tls_options = {name: self._options.pop(name) for name in TLS if name in self._options}
        self._tls: ssl.SSLContext | None = None
        self._building = threading.Lock()
        self._pools: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()

    def prepare(self) -> None:
        """Build the TLS context, which makes up most of a first connection's cost."""
        if self._target.secure:
            self._context()

    def _context(self) -> ssl.SSLContext:
        with self._building:
            found = self._tls
            if found is None:
                found = self._tls = tls_context(self._tls_options)
            return found

    def open(self, opening: Opening) -> C:
        target = self._target
        driver = target.library
        size = self.capacity(opening.execution_pool)
        options = {**driver.quiet, **self._options}
        if "path" in options:
            options["connection_class"] = driver.unix
        else:
            options["connection_class"] = driver.tls if target.secure else driver.tcp
            options.setdefault("socket_keepalive", True)
            options.setdefault("socket_keepalive_options", KEEPALIVE)
        sentinel = None
        if target.sentinels:
            given = self._sentinel_credentials
            known = () if given is None else ("", given) if isinstance(given, str) else given
            asking: dict[str, Any] = dict(zip(("username", "password"), known, strict=False))
            if target.secure:
                asking.update(secure=True, **self._tls_options)
            timeout: Any = self._timeouts["connect_timeout"]
            sentinel = Sentinel(library(driver.distribution), target.sentinels, target.service, timeout, asking)
        opening.limited(size)
        pool = driver.Pool(
            opening,
            driver,
            options,
            max_connections=size,
            lifetime=self._lifetime,
            credentials=self._credentials,
            sentinel=sentinel,
            tls=self._context,
            **self._timeouts,
        )
        client: C = driver.client(pool)
        self._pools[client] = pool
        return client

    def close(self, value: C, timeout: float) -> None:
        """Close the connections once they are idle, or after ``timeout`` seconds.

        Args:
            value: The client.
            timeout: How long to wait, in seconds.
        """
        pool = self._pools.pop(value, None)
        if pool is not None:
            pool.shut_down(timeout)

    def recycle(self, value: C, since: float) -> bool:
        """Send new commands over new connections; what waits for an answer gets it.

        Args:
            value: The client.
            since: Connections opened before this :func:`time.monotonic` time are replaced.

        Returns:
            True: the client itself is kept.
        """
        # The next connections are opened with what is on disk then.
        self._tls = None
        pool = self._pools.get(value)
        if pool is not None:
            pool.retire(since, "recycled")
        return True

    def attached(self, value: C) -> Iterator[tuple[str, object]]:
        """Return the client's callbacks, and what replaces one of its methods, as instrumentation does.

        Args:
            value: The client.
        """
        yield "response_callbacks", dict(getattr(value, "response_callbacks", {}))
        for name in ("execute_command", "pipeline", "parse_response"):
            if (replaced := vars(value).get(name)) is not None:
                yield name, replaced

    def capacity(self, execution_pool: ExecutionPool) -> int:
        """Return ``max_connections``, or its default.

        Args:
            execution_pool: The execution pool of the process.
        """
        return self._max_connections or max(10, execution_pool.concurrency or 0)

    def limits(self, value: C, resource: str) -> Sequence[Limit]:
        """Ask the server for its ``maxclients``.

        Args:
            value: The client.
            resource: The resource's name.
        """
        client: Any = value
        server, name = self._target.shown, "maxclients"

        async def asking() -> dict[str, Any]:
            found: dict[str, Any] = {**await client.info("server"), **await client.info("clients")}
            return found

        try:
            if self._asynchronous:
                found = run_coroutine(asking())
            else:
                found = {**client.info("server"), **client.info("clients")}
        except self._target.library.ResponseError as error:
            return [Limit(server, name, server, unknown=f"the server refused INFO ({type(error).__name__})")]
        most = found.get(name)
        key, unknown = f"{found['run_id']} {name}", "" if most else "this version of the server does not tell"
        return [Limit(server, name, key, most, open=found["connected_clients"] - 1, unknown=unknown)]

    def classify(self, error: BaseException, earlier: Sequence[Failure]) -> Failure | None:
        # Everything else was classified when it was raised.
        if not isinstance(error, self._target.library.WatchError):
            return None
        known = "a watched key had changed, and the transaction did nothing"
        return Failure(FailureKind.ABORTED, Sent.ALL, phase=Phase.RESPONSE, known=known)

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> _Declared[C]:
        if "redis_url" not in settings:
            raise ConfigurationError("workerpools_redis_url is not set")
        names = ("timeout", "connect_timeout", "acquire_timeout", "max_connections")
        given = {name: settings[f"redis_{name}"] for name in names if f"redis_{name}" in settings}
        return cls(settings["redis_url"], **given)

    @classmethod
    def classify_unwatched(cls, error: BaseException) -> Failure | None:
        return classify_unwatched(error)

    def describe(self) -> str:
        return f"{type(self).__name__} {self._target.shown}"


class RedisClient(_Declared["redis.Redis"]):
    """Declares a ``redis.Redis``, or a ``valkey.Valkey``. Takes the driver's options, with bounded defaults.

    Args:
        url: ``redis://``, ``rediss://`` (TLS) or ``unix://`` for redis-py; ``valkey://`` or ``valkeys://`` for
            valkey-py. A service behind Sentinels: ``redis+sentinel://host:port,host:port/service/0``, whose primary is
            asked for whenever a connection is opened; likewise ``rediss+sentinel``, ``valkey+sentinel`` and
            ``valkeys+sentinel``.
        timeout: How long an answer may take, in seconds, sending included; None for no limit but the task's deadline.
            A command that waits on the server (BLPOP) gets the time that it asks for in addition.
        connect_timeout: How long connecting may take, in seconds, TLS and log-in included.
        acquire_timeout: How long to wait for a connection, in seconds.
        max_connections: Maximum number of connections per process; None for 10, or for the concurrency if it is higher.
        check_after: How long a connection may be idle before a PING checks it, in seconds; None for never. Whether the
            server has closed it is seen without one, at every use.
        max_idle: A connection that was idle for longer is replaced, in seconds; None for no limit.
        max_lifetime: How long a connection is used, in seconds; None for no limit. A name is resolved again, and a
            Sentinel asked again, only for a new connection.
        max_lifetime_jitter: The fraction of ``max_lifetime``, from 0 to 1, by which it is shortened at random.
        credentials: Called for each connection; returns ``(user, password)``, or a password. For secrets that change.
        sentinel_credentials: What the Sentinels want: ``(user, password)``, or a password.
        on_open: Called with every client opened, in the process that opens it, before its first use: the place to
            instrument it. If it raises, the client is closed again and the task gets the error.
        leak_after: How long a connection may stay in use, in seconds, before that is logged with the place; None for
            the setting ``workerpools_leak_after``.
        options: Other options of the driver's connections: ``decode_responses``, ``client_name``, ``protocol``,
            ``username``, ``password``, ``db``, ``ssl_ca_certs``, ….

    Raises:
        ConfigurationError: There is no such option, ``url`` is not that of a server, or a number is out of range:
            timeouts are at most a week, other times at most a year.
        ModuleNotFoundError: The driver is not installed.
    """


class AsyncRedisClient(_Declared["AsyncRedis"]):
    """Declares a ``redis.asyncio.Redis``, or a ``valkey.asyncio.Valkey``, for ``async def`` bodies and ``pools.run()``.

    The client lives on the process's event loop. ``credentials`` and ``on_open`` stay plain functions.

    Args:
        options: Those of :class:`RedisClient`.

    Raises:
        ConfigurationError: As for :class:`RedisClient`.
        ModuleNotFoundError: The driver is not installed.
    """

    _asynchronous = True
