"""The adapter for httpx: one ``httpx.Client`` per process, with bounded waits and sockets that never cross a fork."""

from __future__ import annotations

import asyncio
import functools
import importlib
import inspect
import math
import os
import socket
import ssl
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from workerpools.adapter import (
    Adapter,
    ExecutionPool,
    Failure,
    Lifetime,
    Opening,
    Setting,
    loop_is_running,
    on_loop,
    refusal,
    run_coroutine,
    start_coroutine,
)
from workerpools.errors import ConfigurationError

from ._async import AsyncPooledClient, AsyncWatchedTransport
from ._client import Pooled, PooledClient
from ._errors import classify_status, classify_unwatched
from ._library import LIBRARIES, httpx
from ._options import base_of, check_connections, check_options, declaring
from ._proxies import environment_proxies, usable_proxy
from ._tls import Certificates
from ._transport import Traffic, WatchedTransport

__all__ = ["DEFAULT_TIMEOUT", "AsyncHttpxClient", "HttpxClient", "classify", "default_limits"]

#: The default bounds of httpx's four waits, in seconds.
DEFAULT_TIMEOUT = httpx.Timeout(10.0, connect=3.0, pool=2.0)

#: How long an idle connection is kept, in seconds: less than with common servers (many close after 5 s), since a
#: request sent while the server closes is lost.
KEEPALIVE_EXPIRY = 4.0

#: Socket options that detect a vanished peer, where the platform has them: TCP keepalives on an idle connection and
#: TCP_USER_TIMEOUT (milliseconds) for unacknowledged data.
SOCKET_OPTIONS: tuple[tuple[int, int, int], ...] = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    *(
        (socket.IPPROTO_TCP, getattr(socket, name), value)
        for name, value in (
            ("TCP_KEEPIDLE", 30),
            ("TCP_KEEPINTVL", 10),
            ("TCP_KEEPCNT", 3),
            ("TCP_USER_TIMEOUT", 30_000),
        )
        if hasattr(socket, name)
    ),
)


def default_limits(execution_pool: ExecutionPool, max_connections: int | None = None) -> httpx.Limits:
    """Return the connection limits of a process.

    Args:
        execution_pool: The worker's execution pool.
        max_connections: The number of connections; None for 10, or for the concurrency if it is higher.
    """
    size = max_connections or max(10, execution_pool.concurrency or 0)
    return httpx.Limits(max_connections=size, max_keepalive_connections=size, keepalive_expiry=KEEPALIVE_EXPIRY)


C = TypeVar("C", httpx.Client, httpx.AsyncClient)


class _Declared(Adapter[C]):
    """What the declarations of both clients have in common."""

    # What a synchronous client is made of.
    _client: Any = PooledClient
    _watched: Any = WatchedTransport
    _network: Any = httpx.HTTPTransport
    _base: Any = httpx.BaseTransport
    _handles = "handle_request"

    kind = "http"
    settings = (
        Setting.url(
            "http_base_url",
            "Base URL of ``HTTPTask.http`` (none: tasks use full URLs).",
            example="https://api.example.com",
        ),
        Setting.timeout("http_timeout", "Read and write timeout, in seconds (10)."),
        Setting.timeout("http_total_timeout", "Timeout of a whole exchange, in seconds (none but the deadline)."),
        Setting.timeout("http_connect_timeout", "Connect timeout, in seconds (3)."),
        Setting.timeout("http_acquire_timeout", "Acquire timeout, in seconds (2)."),
        Setting.whole("http_max_connections", "Connections per process (10, or the concurrency).", least=1),
    )
    libraries: Sequence[str] = LIBRARIES

    def __init__(
        self,
        *,
        timeout: Any = DEFAULT_TIMEOUT,
        total_timeout: float | None = None,
        limits: httpx.Limits | None = None,
        verify: ssl.SSLContext | str | os.PathLike[str] | bool = True,
        cert: Any = None,
        trust_env: bool = True,
        http1: bool = True,
        http2: bool = False,
        proxy: Any = None,
        mounts: Mapping[str, Any] | None = None,
        transport: Any = None,
        uds: str | os.PathLike[str] | None = None,
        local_address: str | None = None,
        socket_options: Iterable[tuple[Any, ...]] | None = None,
        cookies: Any = "attempt",
        max_connections: int | None = None,
        max_lifetime: float | None = 300.0,
        max_lifetime_jitter: float = 0.1,
        credentials: Callable[[], tuple[str, str] | str] | None = None,
        on_open: Callable[[C], object] | None = None,
        leak_after: float | None = None,
        **options: Any,
    ) -> None:
        with declaring(type(self).__name__):
            unknown = options.keys() - _CLIENT_OPTIONS
            if unknown:
                known = _CLIENT_OPTIONS.union(inspect.signature(HttpxClient).parameters) - {"options"}
                raise ConfigurationError(f"httpx.{self._client.__name__} has no option {refusal(unknown, known)}")
            if credentials is not None:
                if "auth" in options:
                    raise ConfigurationError("give either auth= or credentials=, not both")
                options["auth"] = _Credentials(credentials)
            self._lifetime = Lifetime(max_lifetime=max_lifetime, max_lifetime_jitter=max_lifetime_jitter)
            base = base_of(options.get("base_url", ""), any_scheme=transport is not None or bool(mounts))
            options["base_url"] = base.url
            if base.auth is not None and options.get("auth") is None:
                options["auth"] = base.auth
            sockets: Any = socket_options
            if isinstance(sockets, Iterable):
                # Once: the option may be an iterator.
                sockets = list(sockets)
            self._cookie_mode = cookies if isinstance(cookies, str) else "attempt"
            if not isinstance(cookies, str):
                options["cookies"] = cookies
            check_options(
                client=options,
                timeout=timeout,
                limits=limits,
                verify=verify,
                cert=cert,
                trust_env=trust_env,
                http1=http1,
                http2=http2,
                mounts=mounts,
                transport=transport,
                base=self._base,
                socket_options=sockets,
                max_connections=max_connections,
                credentials=credentials,
                on_open=on_open,
                leak_after=leak_after,
            )
            check_connections(
                total_timeout=total_timeout,
                cookies=self._cookie_mode,
                uds=uds,
                local_address=local_address,
                proxy=proxy,
                transport=transport,
                base=self._base,
                max_lifetime=max_lifetime,
                refused={
                    "verify": verify is not True,
                    "cert": cert is not None,
                    "limits": limits is not None,
                    "http1": http1 is not True,
                    "http2": http2 is not False,
                    "proxy": proxy is not None,
                    "uds": uds is not None,
                    "local_address": local_address is not None,
                    "socket_options": socket_options is not None,
                    "max_connections": max_connections is not None,
                },
            )
            self._proxy = usable_proxy(proxy, "proxy")
        self._total_timeout = total_timeout
        self.leak_after = leak_after
        self.on_open = on_open
        self._base_url = base.shown
        self.server = base.server
        self._client_options: dict[str, Any] = {"timeout": timeout, "trust_env": trust_env, **options}
        self._limits = limits
        self._max_connections = max_connections
        self._certificates = Certificates(verify, cert, trust_env)
        self._http1 = http1
        self._http2 = http2
        self._mounts = mounts or {}
        self._transport = transport
        # A Unix domain socket has none of TCP's.
        self._socket_options = list((() if uds else SOCKET_OPTIONS) if sockets is None else sockets)
        self._uds = None if uds is None else os.fspath(uds)
        self._local_address = local_address
        self._prepared = False
        # Weak: user code may close and drop a client.
        self._traffic: weakref.WeakKeyDictionary[C, Traffic] = weakref.WeakKeyDictionary()

    @property
    def keepalive_expiry(self) -> float | None:
        """How long an idle connection is kept, in seconds; None where a transport of the user's decides."""
        if self._transport is not None:
            return None
        expiry = KEEPALIVE_EXPIRY if self._limits is None else self._limits.keepalive_expiry
        return math.inf if expiry is None else expiry

    def prepare(self) -> None:
        """Build the TLS context and trigger httpx's lazy imports, which make up most of a first client's cost."""
        if not self._prepared and self._transport is None:
            # httpx imports its connection pool with the first transport. This one opens no connection.
            with declaring(type(self).__name__):
                httpx.HTTPTransport(verify=self._certificates.context()).close()
            self._prepared = True

    def open(self, opening: Opening) -> C:
        self.prepare()
        limits = self._limits or default_limits(opening.execution_pool, self._max_connections)
        traffic = Traffic(opening, limits.keepalive_expiry, self._total_timeout, self._certificates)

        def watched(transport: Any) -> Any:
            return self._watched(transport, traffic, lifetime=self._lifetime)

        own = self._transport
        if own is None:
            transport: Any = functools.partial(self._over_network, limits, self._proxy)
            environment = self._client_options["trust_env"] and self._proxy is None and self._uds is None
            proxies = environment_proxies() if environment else {}
            if self._local_address is not None and any(proxies.values()):
                raise ConfigurationError(
                    f"{type(self).__name__}: local_address cannot reach connections to a proxy, and the environment "
                    "names one; trust_env=False ignores it"
                )
        else:
            transport = own
            proxies = {}
        mounts: dict[str, Any] = {
            pattern: None if proxy is None else watched(functools.partial(self._over_network, limits, proxy))
            for pattern, proxy in proxies.items()
        }
        mounts.update({pattern: None if mount is None else watched(mount) for pattern, mount in self._mounts.items()})
        # Each network transport has its own connection pool.
        networks = (own is None) + sum(proxy is not None for proxy in proxies.values())
        opening.limited(networks * (limits.max_connections or 0))
        client: C = self._client(
            opening, self._cookie_mode, transport=watched(transport), mounts=mounts, **self._client_options
        )
        self._traffic[client] = traffic
        return client

    def attached(self, value: C) -> Iterator[tuple[str, object]]:
        """Return the client's event hooks and options, and what replaces a method of its transports.

        Args:
            value: The client.
        """
        if isinstance(value, Pooled):
            # After ``on_open``: what changes from now on is a body's.
            value.is_set_up = True
        for name, hooks in value.event_hooks.items():
            for hook in hooks:
                yield f"event_hooks[{name!r}]", hook
        yield "headers", value.headers.copy()
        for name in ("auth", "base_url", "follow_redirects", "max_redirects", "params", "timeout"):
            yield name, getattr(value, name)
        # As instrumentation does.
        for transport in self._traffic[value].transports if value in self._traffic else ():
            if (replaced := vars(transport).get(self._handles)) is not None:
                yield f"{self._handles} of a transport", replaced

    def _over_network(self, limits: httpx.Limits, proxy: Any) -> Any:
        return self._network(
            verify=self._certificates.context(),
            limits=limits,
            proxy=proxy,
            # WatchedTransport decides about retries; it knows what was sent.
            retries=0,
            socket_options=self._socket_options,
            http1=self._http1,
            http2=self._http2,
            uds=self._uds,
            local_address=self._local_address,
        )

    def recycle(self, value: C, since: float) -> bool:
        """Send new requests over new connections; requests in flight finish on theirs.

        A transport instance passed by the user keeps its connections: there is no way to create another one.

        Args:
            value: The client.
            since: Connections opened before this :func:`time.monotonic` time are replaced.

        Returns:
            True: the client itself is kept.
        """
        self._certificates.renew()
        traffic = self._traffic.get(value)
        if traffic is not None:
            traffic.recycle(since)
        return True

    def classify(self, error: BaseException, earlier: Sequence[Failure]) -> Failure | None:
        # Transport errors were classified when raised. A response from another client is not ours.
        failure = classify_status(error) if isinstance(error, httpx.HTTPStatusError) else None
        return failure if failure is not None and failure.resource else None

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> _Declared[C]:
        timeout = httpx.Timeout(
            settings.get("http_timeout", DEFAULT_TIMEOUT.read),
            connect=settings.get("http_connect_timeout", DEFAULT_TIMEOUT.connect),
            pool=settings.get("http_acquire_timeout", DEFAULT_TIMEOUT.pool),
        )
        return cls(
            base_url=settings.get("http_base_url", ""),
            timeout=timeout,
            total_timeout=settings.get("http_total_timeout"),
            max_connections=settings.get("http_max_connections"),
        )

    @classmethod
    def classify_unwatched(cls, error: BaseException) -> Failure | None:
        return classify(error)

    def describe(self) -> str:
        return f"{type(self).__name__} {self._base_url}".strip()


class HttpxClient(_Declared[httpx.Client]):
    """Declares an ``httpx.Client``. Takes the client's options, with bounded defaults.

    Args:
        timeout: As for ``httpx.Client``; by default 10 s to read and to write, 3 s to connect and 2 s to acquire a
            connection. An explicit None waits for ever.
        total_timeout: How long an exchange may take in all, in seconds: acquiring a connection, connecting, sending and
            the response to its end. None for no limit but the task's deadline. ``timeout`` bounds each wait by itself.
        limits: As for ``httpx.Client``; by default :func:`default_limits`.
        verify: As for ``httpx.Client``, or the path of a file or folder of authorities. The TLS context is built once,
            in the parent, and inherited; anew when one of its files has changed.
        cert: The client's certificate, as for ``httpx.Client``: a path, or (certificate, key[, password]).
        trust_env: Whether to take proxies and certificate files from the environment, as httpx does.
        http1: As for ``httpx.Client``.
        http2: As for ``httpx.Client``.
        proxy: As for ``httpx.Client``.
        mounts: As for ``httpx.Client``.
        transport: A function that makes a transport: ``transport=lambda: MyTransport()``. It is called for each
            generation of connections (see ``max_lifetime``). Proxies, TLS, limits and sockets are the transport's own:
            options for these are refused beside it. An instance, as for ``httpx.Client``, is shared by parent and
            children and never replaced.
        uds: The path of a Unix domain socket to connect to. No proxy is used.
        local_address: The IP address to connect from; ``0.0.0.0`` for IPv4 alone, ``::`` for IPv6. Not with a proxy.
        socket_options: Options for each TCP socket; by default keepalives and ``TCP_USER_TIMEOUT``.
        cookies: How long cookies that a server sets are kept: "attempt" (the default), "process" or "off". Or the
            cookies to send with each request, as for ``httpx.Client``.
        max_connections: Maximum number of connections per process, if ``limits`` is not given.
        max_lifetime: How long a connection is used, in seconds; None for no limit. httpx does not resolve a name again
            while a connection lives, so this is how changes of DNS or of a load balancer take effect. Responses in
            flight are not interrupted.
        max_lifetime_jitter: The fraction of ``max_lifetime``, from 0 to 1, by which it is shortened at random.
        on_open: Called with every client opened, in the process that opens it, before its first use: the place to
            instrument it. If it raises, the client is closed again and the task gets the error.
        credentials: Called for each request; returns ``(user, password)`` for basic authentication, or a bearer token
            as a string. For secrets that change.
        leak_after: How long a response may stay open, in seconds, before that is logged with the place of the request;
            None for the setting ``workerpools_leak_after``.
        options: Other options of ``httpx.Client``: ``base_url``, ``headers``, ``auth``, ``event_hooks``, ….

    Raises:
        ConfigurationError: ``httpx.Client`` has no such option, ``base_url`` or ``proxy`` is not a server's URL, or a
            number is out of range: timeouts are at most a week, other times at most a year.
    """

    def close(self, value: httpx.Client, timeout: float) -> None:
        """Close the client once its requests in flight have ended, or after ``timeout`` seconds.

        ``httpx.Client.close()`` alone would fail them.

        Args:
            value: The client.
            timeout: How long to wait, in seconds.
        """
        # The next client is opened with what is on disk then.
        self._certificates.renew()
        traffic = self._traffic.pop(value, None)
        if traffic is not None:
            traffic.drain(timeout)
        value.close()


class AsyncHttpxClient(_Declared[httpx.AsyncClient]):
    """Declares an ``httpx.AsyncClient``, for ``async def`` bodies and ``pools.run()``.

    The client lives on the process's event loop. ``transport`` and ``mounts`` take asynchronous transports,
    ``event_hooks`` coroutine functions; ``credentials`` stays a plain function.

    Args:
        options: Those of :class:`HttpxClient`.

    Raises:
        ConfigurationError: As for :class:`HttpxClient`.
    """

    libraries: Sequence[str] = (*_Declared.libraries, "anyio")
    _client = AsyncPooledClient
    _watched = AsyncWatchedTransport
    _network = httpx.AsyncHTTPTransport
    _base = httpx.AsyncBaseTransport
    _handles = "handle_async_request"

    def prepare(self) -> None:
        super().prepare()
        # What the first connection would import.
        importlib.import_module("anyio")

    def close(self, value: httpx.AsyncClient, timeout: float) -> None:
        """Close the client once its requests in flight have ended, or after ``timeout`` seconds.

        Args:
            value: The client.
            timeout: How long to wait, in seconds.
        """
        self._certificates.renew()
        traffic = self._traffic.pop(value, None)
        if on_loop():
            start_coroutine(value.aclose())
            return
        if traffic is not None:
            traffic.drain(timeout)
        if loop_is_running():
            # Without a loop nothing was ever sent.
            run_coroutine(asyncio.wait_for(value.aclose(), max(timeout, 0.25)))


class _Credentials(httpx.Auth):
    """Authenticates each request with fresh credentials."""

    def __init__(self, ask: Callable[[], tuple[str, str] | str]) -> None:
        self._ask = ask

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        found = self._ask()
        if isinstance(found, str):
            request.headers["Authorization"] = f"Bearer {found}"
            yield request
        else:
            yield from httpx.BasicAuth(*found).auth_flow(request)


_CLIENT_OPTIONS = frozenset(
    (
        "auth",
        "base_url",
        "default_encoding",
        "event_hooks",
        "follow_redirects",
        "headers",
        "max_redirects",
        "params",
    )
)


def classify(error: BaseException) -> Failure | None:
    """Classify an exception of any httpx client; None if it is not a connection failure.

    For a client of :class:`HttpxClient`, :func:`workerpools.classify` knows more: what was sent.

    Args:
        error: The exception.
    """
    return classify_unwatched(error)
