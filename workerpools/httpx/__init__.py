"""The adapter for httpx: one ``httpx.Client`` a process, with bounded waits, whose sockets never cross a fork."""

from __future__ import annotations

import functools
import inspect
import ipaddress
import socket
import ssl
import urllib.request
import weakref
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import Any

from workerpools.adapter import explained

try:
    import httpx
except ModuleNotFoundError as error:
    raise explained(error, "workerpools.httpx", "httpx", "httpx") from None

from workerpools.adapter import (
    WEEK,
    Adapter,
    ExecutionPool,
    Failure,
    Lifetime,
    Opening,
    Setting,
    redact_url,
    refusal,
    seconds,
    whole,
)
from workerpools.errors import ConfigurationError
from workerpools.httpx._errors import classify_status, classify_unwatched
from workerpools.httpx._transport import Traffic, WatchedTransport

__all__ = ["DEFAULT_TIMEOUT", "HttpxClient", "classify", "default_limits"]

#: Every one of the four waits is bounded, in seconds.
DEFAULT_TIMEOUT = httpx.Timeout(10.0, connect=3.0, pool=2.0)

#: Idle connections are closed before common servers close them (many after 5 s): a request sent at the moment the
#: server closes is lost.
KEEPALIVE_EXPIRY = 4.0

#: What makes the kernel notice that a peer is gone although it never said so: TCP keepalives for an idle connection,
#: TCP_USER_TIMEOUT (milliseconds) for sent data that nobody acknowledges. Where the platform has them.
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
    """Return the connection limits for a process: 10 connections, or the concurrency where that is higher."""
    size = max_connections or max(10, execution_pool.concurrency or 0)
    return httpx.Limits(max_connections=size, max_keepalive_connections=size, keepalive_expiry=KEEPALIVE_EXPIRY)


class HttpxClient(Adapter[httpx.Client]):
    """Declares an ``httpx.Client``: every option of the client, with bounds where httpx has none.

    Args:
        timeout: As for ``httpx.Client``; by default 10 s to read and write, 3 s to connect, 2 s for a free connection.
            None, asked for in so many words, waits for ever.
        limits: As for ``httpx.Client``; by default as :func:`default_limits` says.
        verify: As for ``httpx.Client``. The TLS context is built once, in the parent, and inherited.
        cert: As for ``httpx.Client``.
        trust_env: Whether proxies and certificate files are taken from the environment, as httpx does.
        http1: As for ``httpx.Client``.
        http2: As for ``httpx.Client``.
        proxy: As for ``httpx.Client``.
        mounts: As for ``httpx.Client``.
        transport: As for ``httpx.Client``. A transport of your own is used as it is; proxies, TLS settings and limits
            do not reach it. It is shared by parent and children if it was made before the fork: make it in a function
            instead, ``transport=lambda: MyTransport()``.
        socket_options: Options for each TCP socket; by default keepalives and ``TCP_USER_TIMEOUT``.
        max_connections: How many connections a process may open, where ``limits`` is not given.
        max_lifetime: For how long a connection is used, in seconds; None for ever. httpx itself never resolves a name
            again while a connection lives: this is what follows a change of DNS or of a load balancer. Responses that
            are on their way end undisturbed.
        max_lifetime_jitter: The part of ``max_lifetime``, from 0 to 1, by which it is shortened at random.
        credentials: Called for each request; returns ``(user, password)`` for basic authentication, or a bearer token
            as a text. For secrets that change.
        leak_after: For how long a response may be open, in seconds, before that is logged with where it was asked for;
            None for what the setting ``workerpools_leak_after`` says.
        options: The other options of ``httpx.Client``: ``base_url``, ``headers``, ``auth``, ``event_hooks``, ….

    Raises:
        ConfigurationError: ``httpx.Client`` has no such option, ``base_url`` or ``proxy`` is no URL of a server, or a
            number is out of bounds: a week for timeouts, a year for other times.
    """

    kind = "http"
    settings = (
        Setting.url(
            "http_base_url",
            "The base URL of ``HTTPTask.http`` (none: tasks give full URLs).",
            example="https://api.example.com",
        ),
        Setting.timeout("http_timeout", "Read and write timeout, in seconds (10)."),
        Setting.timeout("http_connect_timeout", "Connect timeout, in seconds (3)."),
        Setting.timeout("http_acquire_timeout", "How long to wait for a free connection, in seconds (2)."),
        Setting.whole("http_max_connections", "Connections per process (10, or the concurrency).", least=1),
    )
    libraries = ("httpx", "httpcore", "h11", "h2", "hpack")

    def __init__(
        self,
        *,
        timeout: Any = DEFAULT_TIMEOUT,
        limits: httpx.Limits | None = None,
        verify: ssl.SSLContext | str | bool = True,
        cert: Any = None,
        trust_env: bool = True,
        http1: bool = True,
        http2: bool = False,
        proxy: Any = None,
        mounts: Mapping[str, httpx.BaseTransport | None] | None = None,
        transport: httpx.BaseTransport | Callable[[], httpx.BaseTransport] | None = None,
        socket_options: Iterable[tuple[Any, ...]] | None = None,
        max_connections: int | None = None,
        max_lifetime: float | None = 300.0,
        max_lifetime_jitter: float = 0.1,
        credentials: Callable[[], tuple[str, str] | str] | None = None,
        leak_after: float | None = None,
        **options: Any,
    ) -> None:
        unknown = options.keys() - _CLIENT_OPTIONS
        if unknown:
            known = _CLIENT_OPTIONS.union(inspect.signature(HttpxClient).parameters) - {"options"}
            raise ConfigurationError(f"HttpxClient: httpx.Client has no option {refusal(unknown, known)}")
        if credentials is not None:
            if "auth" in options:
                raise ConfigurationError("HttpxClient: give either auth= or credentials=, not both")
            options["auth"] = _Credentials(credentials)
        self._lifetime = Lifetime(max_lifetime=max_lifetime, max_lifetime_jitter=max_lifetime_jitter)
        if max_connections is not None:
            whole(max_connections, "HttpxClient: max_connections", least=1, optional=True)
        if leak_after is not None:
            seconds(leak_after, "HttpxClient: leak_after", optional=True)
        _check_timeout(timeout)
        self.leak_after = leak_after
        self._base_url = _shown_base_url(options.get("base_url", ""), any_scheme=bool(transport or mounts))
        self.server = _server(options.get("base_url", ""))
        self._client_options: dict[str, Any] = {"timeout": timeout, "trust_env": trust_env, **options}
        self._limits = limits
        self._max_connections = max_connections
        self._tls = (verify, cert, trust_env)
        self._http1 = http1
        self._http2 = http2
        self._proxy = _usable_proxy(proxy, "HttpxClient: proxy")
        self._mounts = mounts or {}
        self._transport = transport
        self._socket_options = list(SOCKET_OPTIONS if socket_options is None else socket_options)
        self._context: ssl.SSLContext | None = None
        # Weak: a client may be closed, and dropped, by who uses it.
        self._traffic: weakref.WeakKeyDictionary[httpx.Client, Traffic] = weakref.WeakKeyDictionary()

    def prepare(self) -> None:
        """Build the TLS context, and have httpx import what it needs: nearly all that a first client costs."""
        if self._context is None and self._transport is None:
            verify, cert, trust_env = self._tls
            self._context = httpx.create_ssl_context(verify=verify, cert=cert, trust_env=trust_env)
            # httpx imports its connection pool with the first transport that is made. This one opens nothing.
            httpx.HTTPTransport(verify=self._context).close()

    def open(self, opening: Opening) -> httpx.Client:
        self.prepare()
        limits = self._limits or default_limits(opening.execution_pool, self._max_connections)
        traffic = Traffic(opening, limits.keepalive_expiry)

        def watched(
            transport: httpx.BaseTransport | Callable[[], httpx.BaseTransport], *, traced: bool = True
        ) -> WatchedTransport:
            return WatchedTransport(transport, traffic, traced=traced, lifetime=self._lifetime)

        own = self._transport
        transport: httpx.BaseTransport | Callable[[], httpx.BaseTransport]
        if own is None:
            transport = functools.partial(self._over_network, limits, self._proxy)
            proxies = _environment_proxies() if self._client_options["trust_env"] and self._proxy is None else {}
        else:
            transport = own if isinstance(own, httpx.BaseTransport) else own()
            proxies = {}
        mounts: dict[str, httpx.BaseTransport | None] = {
            pattern: None if proxy is None else watched(functools.partial(self._over_network, limits, proxy))
            for pattern, proxy in proxies.items()
        }
        mounts.update(
            {
                pattern: None if mount is None else watched(mount, traced=False)
                for pattern, mount in self._mounts.items()
            }
        )
        # Each of them has a connection pool of its own.
        networks = (own is None) + sum(proxy is not None for proxy in proxies.values())
        opening.limited(networks * (limits.max_connections or 0))
        client = httpx.Client(transport=watched(transport, traced=own is None), mounts=mounts, **self._client_options)
        self._traffic[client] = traffic
        return client

    def _over_network(self, limits: httpx.Limits, proxy: Any) -> httpx.BaseTransport:
        assert self._context is not None
        return httpx.HTTPTransport(
            verify=self._context,
            limits=limits,
            proxy=proxy,
            # Retrying is decided above, where it is known what was sent.
            retries=0,
            socket_options=self._socket_options,
            http1=self._http1,
            http2=self._http2,
        )

    def close(self, value: httpx.Client, timeout: float) -> None:
        """Close the client once its requests in flight have ended, or after ``timeout`` seconds.

        ``httpx.Client.close()`` alone fails them.
        """
        traffic = self._traffic.pop(value, None)
        if traffic is not None:
            traffic.drain(timeout)
        value.close()

    def recycle(self, value: httpx.Client, since: float) -> bool:
        """Have the next requests go over new connections; those on their way end on theirs.

        A transport of the user's own keeps its connections: nothing tells how to make another one.
        """
        traffic = self._traffic.get(value)
        if traffic is not None:
            traffic.recycle(since)
        return True

    def classify(self, error: BaseException, earlier: Sequence[Failure]) -> Failure | None:
        # The rest was noted when it was raised. A response that came through another client is not this one's.
        failure = classify_status(error) if isinstance(error, httpx.HTTPStatusError) else None
        return failure if failure is not None and failure.resource else None

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> HttpxClient:
        timeout = httpx.Timeout(
            settings.get("http_timeout", DEFAULT_TIMEOUT.read),
            connect=settings.get("http_connect_timeout", DEFAULT_TIMEOUT.connect),
            pool=settings.get("http_acquire_timeout", DEFAULT_TIMEOUT.pool),
        )
        return cls(
            base_url=settings.get("http_base_url", ""),
            timeout=timeout,
            max_connections=settings.get("http_max_connections"),
        )

    @classmethod
    def classify_unwatched(cls, error: BaseException) -> Failure | None:
        return classify(error)

    def describe(self) -> str:
        return f"HttpxClient {self._base_url}".strip()


class _Credentials(httpx.Auth):
    """Asks for the credentials of each request."""

    def __init__(self, ask: Callable[[], tuple[str, str] | str]) -> None:
        self._ask = ask

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        found = self._ask()
        if isinstance(found, str):
            request.headers["Authorization"] = f"Bearer {found}"
            yield request
        else:
            yield from httpx.BasicAuth(*found).auth_flow(request)


def _check_timeout(timeout: Any) -> None:
    try:
        bounds = httpx.Timeout(timeout).as_dict()
    except (TypeError, ValueError, AssertionError) as error:
        raise ConfigurationError(f"HttpxClient: timeout: {error}") from None
    for name, bound in bounds.items():
        if bound is not None:
            seconds(bound, f"HttpxClient: timeout: {name}", most=WEEK, optional=True)


_CLIENT_OPTIONS = frozenset(
    (
        "auth",
        "base_url",
        "cookies",
        "default_encoding",
        "event_hooks",
        "follow_redirects",
        "headers",
        "max_redirects",
        "params",
    )
)


def _server(base_url: Any) -> tuple[str, int] | None:
    """Return the host and port of a base URL that was checked before; None for an empty one."""
    url = httpx.URL(base_url)
    port = url.port or {"http": 80, "https": 443}.get(url.scheme)
    return (url.host, port) if url.host and port else None


def _shown_base_url(base_url: Any, *, any_scheme: bool) -> str:
    """Return what may be shown of a base URL.

    Args:
        base_url: The URL.
        any_scheme: Whether a transport of the user's may know schemes of its own.

    Raises:
        ConfigurationError: It is no URL of a server; the message does not show it, as it may hold a password.
    """
    if base_url is None:
        raise ConfigurationError("HttpxClient: base_url is None; is the variable that it is read from set?")
    try:
        url = httpx.URL(base_url)
    except (TypeError, httpx.InvalidURL):
        url = httpx.URL()
    if str(base_url) and not (url.host and url.scheme and (any_scheme or url.scheme in ("http", "https"))):
        raise ConfigurationError(
            "HttpxClient: base_url cannot be used (it is not shown here, as it may hold a password); wanted: "
            "http:// or https:// and a host, like https://api.example.com, a password's special characters escaped "
            "(urllib.parse.quote)"
        )
    if url.userinfo and (b"@" in url.raw_path or "@" in url.fragment):
        # A password's "/", "?" or "#" has ended the host: what stands there is a part of it, and errors would show it.
        raise ConfigurationError(
            "HttpxClient: base_url has an '@' after its host (it is not shown here, as it may hold a password); "
            "a password's special characters must be escaped (urllib.parse.quote)"
        )
    return redact_url(str(base_url))


def _usable_proxy(proxy: Any, what: str) -> Any:
    """Return a proxy as httpx takes it.

    Args:
        proxy: The proxy, or None.
        what: Where it comes from, for the message.

    Raises:
        ConfigurationError: It is no URL of a proxy; the message does not show it, as httpx's own would.
    """
    if proxy is None or isinstance(proxy, httpx.Proxy):
        return proxy
    try:
        usable, url = httpx.Proxy(proxy), httpx.URL(proxy)
        if url.host and b"@" not in url.raw_path and "@" not in url.fragment:
            return usable
    except (TypeError, ValueError, httpx.InvalidURL):
        pass
    raise ConfigurationError(
        f"{what} cannot be used (it is not shown here, as it may hold a password); wanted: "
        "http://proxy.example.com:3128, a password's special characters escaped (urllib.parse.quote)"
    )


def _environment_proxies() -> dict[str, httpx.Proxy | None]:
    """Return httpx mount patterns for the proxies that the environment asks for.

    httpx takes them from the environment only for transports that it makes itself. The variables are those of curl:
    HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and NO_PROXY, read by :func:`urllib.request.getproxies`.

    Raises:
        ConfigurationError: One is no URL of a proxy.
    """
    found = urllib.request.getproxies()
    exempt = [host.strip() for host in found.get("no", "").split(",") if host.strip()]
    if "*" in exempt:
        return {}
    mounts: dict[str, httpx.Proxy | None] = {}
    for scheme in ("http", "https", "all"):
        if url := found.get(scheme):
            variable = f"{scheme.upper()}_PROXY of the environment"
            mounts[f"{scheme}://"] = _usable_proxy(url if "://" in url else f"http://{url}", variable)
    for host in exempt:
        mounts[_exempt_pattern(host)] = None
    return mounts


def _exempt_pattern(host: str) -> str:
    if "://" in host:
        return host
    name = host.strip("[]")
    try:
        address = ipaddress.ip_interface(name).ip
    except ValueError:
        if name.lower() == "localhost":
            return f"all://{name}"
    else:
        return f"all://[{address}]" if address.version == 6 else f"all://{address}"
    # A domain stands for its subdomains, too: "*" matches the name itself and everything under it.
    return f"all://*{name}"


def classify(error: BaseException) -> Failure | None:
    """Return what an exception of httpx proves; None if it is no failure of a connection.

    For the exceptions of any client. What the client of a :class:`HttpxClient` raises is known more closely:
    :func:`workerpools.classify` tells that.
    """
    return classify_unwatched(error)
