"""The adapter for requests: one ``requests.Session`` per process, with bounded waits, watched on the wire."""

from __future__ import annotations

import inspect
import math
import os
import socket
import ssl
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from workerpools.adapter import explained

try:
    import requests
except ModuleNotFoundError as error:
    raise explained(error, "workerpools.requests", "requests", "requests") from None

from requests.cookies import cookiejar_from_dict
from urllib3.connection import HTTPConnection

from workerpools.adapter import Adapter, Failure, Lifetime, Opening, Setting, causes, failure_of, refusal
from workerpools.errors import ConfigurationError
from workerpools.requests._errors import classify_status, classify_unwatched
from workerpools.requests._options import Credentials, base_of, check_options, check_times
from workerpools.requests._session import PooledSession
from workerpools.requests._tls import Contexts
from workerpools.requests._transport import WatchedAdapter
from workerpools.requests._wire import Traffic

__all__ = ["RequestsSession", "classify"]

#: The default timeouts of a request, in seconds: to connect, and to read or write.
DEFAULT_TIMEOUT = (3.0, 10.0)

#: How long a request waits for a connection, in seconds.
ACQUIRE_TIMEOUT = 2.0

#: How long an idle connection is used again, in seconds: less than with common servers (many close after 5 s), since a
#: request sent while the server closes is lost.
MAX_IDLE = 4.0

_OF_URLLIB3: Any = HTTPConnection.default_socket_options

#: urllib3's socket options, and those that detect a vanished peer, where the platform has them: TCP keepalives on an
#: idle connection and TCP_USER_TIMEOUT (milliseconds) for unacknowledged data.
SOCKET_OPTIONS: tuple[tuple[int, int, int | bytes], ...] = (
    *_OF_URLLIB3,
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


class RequestsSession(Adapter[requests.Session]):
    """Declares a ``requests.Session``. Takes the session's attributes as options, with bounded defaults.

    Args:
        base_url: What URLs without a host are appended to; empty for none. Its user and password become ``auth`` for
            that server alone.
        timeout: The timeouts of each request that gives none, as for ``requests.get()``: a number of seconds, or
            (connect, read); by default 3 s to connect and 10 s to read or write. ``(None, None)`` waits for ever.
        acquire_timeout: How long to wait for a connection, in seconds; None for ever.
        total_timeout: How long an exchange may take in all, in seconds: acquiring a connection, connecting, sending and
            the response to its end. None for no limit but the task's deadline. ``timeout`` bounds each wait by itself.
        pool_maxsize: Maximum number of connections to each server; None for 10, or for the concurrency if it is higher.
        pool_connections: The number of servers for which connections are kept.
        max_idle: How long an idle connection is used again, in seconds; None for no limit.
        max_lifetime: How long a connection is used, in seconds; None for no limit. A name is not resolved again while
            a connection lives, so this is how changes of DNS or of a load balancer take effect. Responses in flight are
            not interrupted.
        max_lifetime_jitter: The fraction of ``max_lifetime``, from 0 to 1, by which it is shortened at random.
        headers: Headers of each request, beside requests' own.
        params: The query of each request.
        auth: As for ``requests.get()``: (user, password), or an ``AuthBase``.
        credentials: Called for each request; returns ``(user, password)`` for basic authentication, or a bearer token
            as a string. For secrets that change.
        cookies: How long cookies that a server sets are kept: "attempt" (the default), "process" or "off". Or the
            cookies to send with each request.
        verify: As for ``requests.get()``, or an ``ssl.SSLContext``. The TLS context is built once, in the parent, and
            inherited; anew when one of its files has changed.
        cert: The client's certificate, as for ``requests.get()``.
        proxies: As for ``requests.get()``; they take the place of the environment's.
        hooks: As for ``requests.get()``.
        stream: As for ``requests.get()``.
        max_redirects: As the session's attribute.
        trust_env: Whether proxies, certificate files and netrc are taken from the environment, as requests does.
        socket_options: Options for each TCP socket; by default keepalives and ``TCP_USER_TIMEOUT``.
        on_open: Called with every session opened, in the process that opens it, before its first use: the place to
            mount an adapter, or to instrument it. If it raises, the session is closed again and the task gets the
            error.
        leak_after: How long a response may stay open, in seconds, before that is logged with the place of the request;
            None for the setting ``workerpools_leak_after``.

    Raises:
        ConfigurationError: ``base_url`` or a proxy is not a server's URL, an option is unknown or of the wrong type, or
            a number is out of range: timeouts are at most a week, other times at most a year.
    """

    kind = "http"
    settings = (
        Setting.url(
            "requests_base_url",
            "Base URL of a ``RequestsSession`` from settings (none: tasks use full URLs).",
            example="https://api.example.com",
        ),
        Setting.timeout("requests_timeout", "Its read and write timeout, in seconds (10)."),
        Setting.timeout("requests_total_timeout", "Its timeout of a whole exchange, in seconds (none)."),
        Setting.timeout("requests_connect_timeout", "Its connect timeout, in seconds (3)."),
        Setting.timeout("requests_acquire_timeout", "Its acquire timeout, in seconds (2)."),
        Setting.whole("requests_pool_maxsize", "Its connections per server (10, or the concurrency).", least=1),
    )
    libraries = ("requests", "urllib3")

    def __init__(
        self,
        base_url: str = "",
        *,
        timeout: Any = DEFAULT_TIMEOUT,
        acquire_timeout: float | None = ACQUIRE_TIMEOUT,
        total_timeout: float | None = None,
        pool_maxsize: int | None = None,
        pool_connections: int = 10,
        max_idle: float | None = MAX_IDLE,
        max_lifetime: float | None = 300.0,
        max_lifetime_jitter: float = 0.1,
        headers: Mapping[str, Any] | None = None,
        params: Mapping[str, Any] | None = None,
        auth: Any = None,
        credentials: Callable[[], tuple[str, str] | str] | None = None,
        cookies: Any = "attempt",
        verify: bool | str | os.PathLike[str] | ssl.SSLContext = True,
        cert: Any = None,
        proxies: Mapping[str, str] | None = None,
        hooks: Mapping[str, Any] | None = None,
        stream: bool = False,
        max_redirects: int = 30,
        trust_env: bool = True,
        socket_options: Iterable[tuple[int, int, int | bytes]] | None = None,
        on_open: Callable[[requests.Session], object] | None = None,
        leak_after: float | None = None,
        **unknown: Any,
    ) -> None:
        if unknown:
            known = inspect.signature(RequestsSession).parameters.keys() - {"unknown"}
            raise ConfigurationError(f"RequestsSession has no option {refusal(unknown, known)}")
        if credentials is not None and auth is not None:
            raise ConfigurationError("RequestsSession: give either auth= or credentials=, not both")
        check_times(
            timeout=timeout,
            acquire_timeout=acquire_timeout,
            total_timeout=total_timeout,
            max_idle=max_idle,
            leak_after=leak_after,
            redirects=max_redirects,
        )
        self._lifetime = Lifetime(None, max_idle, max_lifetime, max_lifetime_jitter)
        base = base_of(base_url)
        self._options: dict[str, Any] = {
            "auth": auth,
            "cert": cert,
            "headers": {} if headers is None else headers,
            "hooks": {} if hooks is None else hooks,
            "max_redirects": max_redirects,
            "params": {} if params is None else params,
            "proxies": {} if proxies is None else proxies,
            "stream": stream,
            "trust_env": trust_env,
        }
        self._cookie_mode = cookies if isinstance(cookies, str) else "attempt"
        self._jar = None if isinstance(cookies, str) else cookies
        sockets: Any = socket_options
        if isinstance(sockets, Iterable) and not isinstance(sockets, (str, bytes)):
            # Once: the option may be an iterator.
            sockets = list(sockets)
        check_options(
            self._options,
            cookies=self._cookie_mode,
            credentials=credentials,
            jar=self._jar,
            on_open=on_open,
            pool_connections=pool_connections,
            pool_maxsize=pool_maxsize,
            socket_options=sockets,
            verify=verify,
        )
        if credentials is not None:
            self._options["auth"] = Credentials(credentials)
        elif auth is None:
            self._options["auth"] = base.auth
        if cert is not None:
            self._options["cert"] = tuple(map(os.fspath, cert)) if isinstance(cert, (tuple, list)) else os.fspath(cert)
        self._contexts = Contexts(verify if isinstance(verify, ssl.SSLContext) else None)
        self._options["verify"] = (
            True
            if isinstance(verify, ssl.SSLContext)
            else os.fspath(verify)
            if isinstance(verify, os.PathLike)
            else verify
        )
        self.server = base.server
        self.on_open = on_open
        self.leak_after = leak_after
        self._base = base
        self._timeout = timeout
        self._acquire_timeout = acquire_timeout
        self._total_timeout = total_timeout
        self._pool_maxsize = pool_maxsize
        self._pool_connections = pool_connections
        self._socket_options: list[Any] = list(SOCKET_OPTIONS if sockets is None else sockets)
        # Weak: user code may close and drop a session.
        self._traffic: weakref.WeakKeyDictionary[requests.Session, Traffic] = weakref.WeakKeyDictionary()

    @property
    def keepalive_expiry(self) -> float:
        """How long an idle connection is kept, in seconds."""
        return math.inf if self._lifetime.max_idle is None else self._lifetime.max_idle

    def prepare(self) -> None:
        """Build the TLS context, which makes up most of a first request's cost."""
        verify = self._options["verify"]
        if verify is not False:
            self._contexts.context(verify, self._options["cert"])

    def open(self, opening: Opening) -> requests.Session:
        size = self._pool_maxsize or max(10, opening.execution_pool.concurrency or 0)
        # With a base URL there is one server for most; each has a pool of its own.
        opening.limited(size if self._base.url else size * self._pool_connections)
        traffic = Traffic(opening, self._lifetime, self._acquire_timeout, self._total_timeout)
        session = PooledSession(
            opening, self._cookie_mode, self._base.url, self._timeout, has_context=self._contexts.has_own
        )
        adapter = WatchedAdapter(
            traffic,
            self._contexts,
            socket_options=self._socket_options,
            connections=self._pool_connections,
            maxsize=size,
        )
        session.mount("https://", adapter)
        session.mount("http://", adapter)
        options = dict(self._options)
        session.headers.update(options.pop("headers"))
        for name in ("params", "proxies"):
            setattr(session, name, dict(options.pop(name)))
        for event, given in options.pop("hooks").items():
            session.hooks[event] = list(given) if isinstance(given, (list, tuple)) else [given]
        for name, value in options.items():
            setattr(session, name, value)
        if self._jar is not None:
            session.cookies = cookiejar_from_dict(dict(self._jar)) if isinstance(self._jar, Mapping) else self._jar
        self._traffic[session] = traffic
        return session

    def attached(self, value: requests.Session) -> Iterator[tuple[str, object]]:
        """Return the session's hooks, adapters and options.

        Args:
            value: The session.
        """
        if isinstance(value, PooledSession):
            # After ``on_open``: what changes from now on is a body's.
            value.is_set_up = True
        own: Any = value.hooks
        for name, hooks in own.items():
            for hook in hooks if isinstance(hooks, list) else (hooks,):
                yield f"hooks[{name!r}]", hook
        for prefix, adapter in value.adapters.items():
            if not isinstance(adapter, WatchedAdapter):
                yield f"adapters[{prefix!r}]", adapter
        yield "headers", value.headers.copy()
        for name in ("auth", "cert", "max_redirects", "params", "proxies", "verify"):
            yield name, getattr(value, name)

    def close(self, value: requests.Session, timeout: float) -> None:
        """Close the session once its requests in flight have ended, or after ``timeout`` seconds.

        ``requests.Session.close()`` would not wait for them.

        Args:
            value: The session.
            timeout: How long to wait, in seconds.
        """
        # The next session is opened with what is on disk then.
        self._contexts.renew()
        traffic = self._traffic.pop(value, None)
        if traffic is not None:
            traffic.drain(timeout)
        value.close()

    def recycle(self, value: requests.Session, since: float) -> bool:
        """Send new requests over new connections; requests in flight finish on theirs.

        Args:
            value: The session.
            since: Connections opened before this :func:`time.monotonic` time are replaced.

        Returns:
            True: the session itself is kept.
        """
        self._contexts.renew()
        traffic = self._traffic.get(value)
        if traffic is not None:
            traffic.retire(since, "recycled")
        return True

    def classify(self, error: BaseException, earlier: Sequence[Failure]) -> Failure | None:
        # Errors of sending were classified when raised; those of reading where they occurred, and requests has made
        # others of them. A response from another session is not ours.
        if not isinstance(error, requests.RequestException):
            return None
        if isinstance(error, requests.HTTPError):
            failure = classify_status(error)
        else:
            failure = next((found for each in causes(error) if (found := failure_of(each)) is not None), None)
        return failure if failure is not None and failure.resource else None

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> RequestsSession:
        connect, read = DEFAULT_TIMEOUT
        return cls(
            settings.get("requests_base_url", ""),
            timeout=(settings.get("requests_connect_timeout", connect), settings.get("requests_timeout", read)),
            acquire_timeout=settings.get("requests_acquire_timeout", ACQUIRE_TIMEOUT),
            total_timeout=settings.get("requests_total_timeout"),
            pool_maxsize=settings.get("requests_pool_maxsize"),
        )

    @classmethod
    def classify_unwatched(cls, error: BaseException) -> Failure | None:
        return classify(error)

    def describe(self) -> str:
        return f"RequestsSession {self._base.shown}".strip()


def classify(error: BaseException) -> Failure | None:
    """Classify an exception of any requests session; None if it is not a connection failure.

    For a session of :class:`RequestsSession`, :func:`workerpools.classify` knows more: what was sent.

    Args:
        error: The exception.
    """
    return classify_unwatched(error)
