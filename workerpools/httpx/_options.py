"""Checks a client's options on declaration, and takes the user information out of its base URL."""

from __future__ import annotations

import codecs
import ipaddress
import os
import ssl
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from http.cookiejar import CookieJar
from typing import Any, NamedTuple

from workerpools.adapter import WEEK, redact_url, seconds, whole
from workerpools.errors import ConfigurationError

from ._library import httpx

__all__ = ["COOKIES", "Base", "base_of", "check_connections", "check_files", "check_options", "declaring"]

#: How long the cookies that a server sets are kept.
COOKIES = ("attempt", "process", "off")


_WANTED = "http:// or https:// and a host, like https://api.example.com"
_HIDDEN = "not shown here, as it may contain a password"
_ESCAPE = "special characters of a password escaped (urllib.parse.quote)"


@contextmanager
def declaring(name: str) -> Generator[None, None, None]:
    """Name the declaration in errors of its options.

    Args:
        name: The adapter's name.
    """
    try:
        yield
    except ConfigurationError as error:
        raise ConfigurationError(f"{name}: {error}") from None


class Base(NamedTuple):
    """A base URL and what it says of authentication.

    Attributes:
        url: The URL without its user information.
        auth: The user information, for requests to that server alone; None without one.
        shown: The URL without secrets, for people.
        server: Its host and port; None without a base URL.
    """

    url: httpx.URL
    auth: httpx.Auth | None
    shown: str
    server: tuple[str, int] | None


def base_of(given: Any, *, any_scheme: bool = False) -> Base:
    """Parse a base URL.

    httpx would leave the user information in the URL of each request, which it logs and puts into the message of
    ``HTTPStatusError``.

    Args:
        given: The option.
        any_scheme: Whether to allow schemes other than http and https, which the user's transport may handle.

    Raises:
        ConfigurationError: It is not a server's URL. The message omits it, as it may contain a password.
    """
    if given is None:
        raise ConfigurationError("base_url is None; is its environment variable set?")
    try:
        url = httpx.URL(given)
    except (TypeError, ValueError, httpx.InvalidURL):
        url = None
    if url is not None and not str(url):
        return Base(url, None, "", None)
    if (
        url is None
        or not (url.host and url.scheme and (any_scheme or url.scheme in ("http", "https")))
        or not (url.port is None or 0 < url.port < 2**16)
    ):
        raise ConfigurationError(f"base_url is invalid ({_HIDDEN}); wanted: {_WANTED}, with {_ESCAPE}")
    if url.userinfo and (b"@" in url.raw_path or "@" in url.fragment):
        # An unescaped "/", "?" or "#" of a password ended the host early; the rest of the password would be shown.
        raise ConfigurationError(
            f"base_url has an '@' after its host ({_HIDDEN}); "
            "escape special characters of a password (urllib.parse.quote)"
        )
    plain = url.copy_with(username=None, password=None) if url.userinfo else url
    auth = _Own(url.username, url.password, plain) if url.userinfo else None
    return Base(plain, auth, redact_url(str(given)), _server(url))


class _Own(httpx.BasicAuth):
    """Basic authentication with one server. A client's ``auth`` would go to every server that a request names."""

    def __init__(self, user: str, password: str, url: httpx.URL) -> None:
        super().__init__(user, password)
        self._origin = _origin(url)

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        if _origin(request.url) == self._origin:
            yield from super().auth_flow(request)
        else:
            yield request


def _origin(url: httpx.URL) -> tuple[str, tuple[str, int] | None]:
    return url.scheme, _server(url)


def _server(url: httpx.URL) -> tuple[str, int] | None:
    port = url.port or {"http": 80, "https": 443}.get(url.scheme)
    return (url.host, port) if url.host and port else None


def check_options(*, client: Mapping[str, Any], **own: Any) -> None:
    """Refuse options that no client can be opened with, or that would fail its first request.

    Args:
        client: The options of ``httpx.Client``, by name.
        own: Those of :class:`workerpools.httpx.HttpxClient`, by name.

    Raises:
        ConfigurationError: An option has the wrong type or is out of range; the message omits its value.
    """
    _check_timeout(own["timeout"])
    for name in ("trust_env", "http1", "http2"):
        _check(name, own[name], isinstance(own[name], bool), "True or False")
    if not (own["http1"] or own["http2"]):
        raise ConfigurationError("http1=False needs http2=True")
    for name in ("credentials", "on_open"):
        _check(name, own[name], own[name] is None or callable(own[name]), "a function")
    if own["max_connections"] is not None:
        whole(own["max_connections"], "max_connections", least=1, optional=True)
    if own["leak_after"] is not None:
        seconds(own["leak_after"], "leak_after", optional=True)
    _check_limits(own["limits"])
    verify, cert, transport, mounts, base = (own[name] for name in ("verify", "cert", "transport", "mounts", "base"))
    _check("verify", verify, isinstance(verify, (bool, str, os.PathLike, ssl.SSLContext)), "a bool, path or SSLContext")
    _check(
        "cert", cert, cert is None or _is_cert(cert), "a path, or (certificate, key) or (certificate, key, password)"
    )
    _check(
        "transport",
        transport,
        transport is None or isinstance(transport, base) or callable(transport),
        f"an httpx.{base.__name__}, or a function that returns one",
    )
    _check(
        "mounts",
        mounts,
        mounts is None
        or (isinstance(mounts, Mapping) and all(each is None or isinstance(each, base) for each in mounts.values())),
        f"a mapping of URL patterns to httpx.{base.__name__} or None",
    )
    _check_socket_options(own["socket_options"])
    _check_client(client, mounts or {})


def check_connections(
    *,
    total_timeout: Any,
    cookies: str,
    uds: Any,
    local_address: Any,
    proxy: Any,
    transport: Any,
    base: Any,
    max_lifetime: float | None,
    refused: Mapping[str, bool],
) -> None:
    """Refuse options of the connections that are wrong, or that cannot reach them.

    Args:
        total_timeout: How long an exchange may take, in seconds; None for no limit.
        cookies: One of :data:`COOKIES`.
        uds: The path of a Unix domain socket, or None.
        local_address: The address to connect from, or None.
        proxy: The proxy, or None.
        transport: The user's transport, or a function that makes one; None for ours.
        base: The class of transports.
        max_lifetime: How long a connection is used, in seconds; None for no limit.
        refused: The options that reach our transport alone, and whether each is given.

    Raises:
        ConfigurationError: One of them is wrong, or two of them do not go together.
    """
    if total_timeout is not None:
        seconds(total_timeout, "total_timeout", most=WEEK, above=True, optional=True)
    if cookies not in COOKIES:
        raise ConfigurationError(f"cookies={cookies[:20]!r}: wanted one of {', '.join(COOKIES)}")
    if uds is not None and (not isinstance(uds, (str, os.PathLike)) or not os.fspath(uds)):
        raise ConfigurationError("uds: wanted the path of a Unix domain socket")
    if local_address is not None:
        try:
            ipaddress.ip_address(local_address if isinstance(local_address, str) else "")
        except ValueError:
            raise ConfigurationError("local_address: wanted an IP address") from None
    if proxy is not None and (uds or local_address):
        name = "uds" if uds else "local_address"
        raise ConfigurationError(f"{name} cannot reach the connections to a proxy; give one of the two")
    if transport is not None:
        unreached = [name for name in refused if refused[name]]
        if isinstance(transport, base) and max_lifetime not in (300.0, None):
            unreached.append("max_lifetime")
        if unreached:
            raise ConfigurationError(
                f"{', '.join(unreached)} cannot reach the transport that you give; pass it to the transport itself: "
                f"transport=lambda: httpx.{base.__name__.replace('Base', 'HTTP')}(…)"
            )


def check_files(verify: Any, cert: Any) -> None:
    """Refuse certificate files that do not exist. Not on declaration: another machine may have them.

    Raises:
        ConfigurationError: One of them does not exist; the message names it.
    """
    files = [("verify", verify)] if isinstance(verify, (str, os.PathLike)) else []
    files += [("cert", each) for each in ((cert,) if isinstance(cert, (str, os.PathLike)) else (cert or ())[:2])]
    for name, path in files:
        if not os.path.exists(path):
            raise ConfigurationError(f"{name}: there is no file {os.fspath(path)!r}")


def _check(name: str, value: object, accepted: bool, wanted: str) -> None:
    if not accepted:
        raise ConfigurationError(f"{name} is a value of the type {type(value).__name__}; wanted: {wanted}")


def _check_timeout(timeout: Any) -> None:
    try:
        bounds = httpx.Timeout(timeout).as_dict()
    except (TypeError, ValueError, AssertionError, IndexError) as error:
        raise ConfigurationError(f"timeout: {error}") from None
    for name, bound in bounds.items():
        if bound is not None:
            seconds(bound, f"timeout: {name}", most=WEEK, optional=True)


def _check_limits(limits: Any) -> None:
    if limits is None:
        return
    _check("limits", limits, isinstance(limits, httpx.Limits), "an httpx.Limits")
    for name, least in (("max_connections", 1), ("max_keepalive_connections", 0)):
        if getattr(limits, name) is not None:
            whole(getattr(limits, name), f"limits: {name}", least=least, optional=True)
    if limits.keepalive_expiry is not None:
        seconds(limits.keepalive_expiry, "limits: keepalive_expiry", optional=True)


def _is_cert(cert: Any) -> bool:
    if isinstance(cert, (tuple, list)):
        return len(cert) in (2, 3) and all(isinstance(each, (str, os.PathLike)) for each in cert[:2])
    return isinstance(cert, (str, os.PathLike))


def _is_socket_option(option: Any) -> bool:
    if not isinstance(option, (tuple, list)) or not all(isinstance(each, int) for each in option[:2]):
        return False
    if len(option) == 3:
        value = option[2]
        return isinstance(value, (bytes, bytearray)) or (isinstance(value, int) and -(2**31) <= value < 2**31)
    return len(option) == 4 and option[2] is None and isinstance(option[3], int)


def _check_socket_options(options: Any) -> None:
    _check(
        "socket_options",
        options,
        options is None
        or (
            isinstance(options, Iterable)
            and not isinstance(options, (str, bytes))
            and all(map(_is_socket_option, options))
        ),
        "tuples for socket.setsockopt(), like (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)",
    )


class _Nowhere(httpx.BaseTransport):
    """Sends nothing."""


def _check_client(options: Mapping[str, Any], mounts: Mapping[str, Any]) -> None:
    """Build a client and a request without sending it: httpx checks most options there or with the first request."""
    hooks = options.get("event_hooks")
    _check("event_hooks", hooks, hooks is None or _are_hooks(hooks), 'a mapping of "request" and "response" to lists')
    if (redirects := options.get("max_redirects")) is not None:
        whole(redirects, "max_redirects")
    cookies = options.get("cookies")
    _check(
        "cookies", cookies, cookies is None or isinstance(cookies, (dict, list, httpx.Cookies, CookieJar)), "a mapping"
    )
    follows = options.get("follow_redirects", False)
    _check("follow_redirects", follows, isinstance(follows, bool), "True or False")
    try:
        _check_encoding(options.get("default_encoding", "utf-8"))
        arguments: dict[str, Any] = {"transport": _Nowhere(), "trust_env": False, **options}
        with httpx.Client(
            **arguments,
            mounts={pattern: None if each is None else _Nowhere() for pattern, each in mounts.items()},
        ) as client:
            request = client.build_request("GET", "http://localhost/")
            # As h11 refuses them, when the request is sent.
            if any(set(b"\r\n\0") & set(value) for _, value in request.headers.raw):
                raise ValueError("a header has a line break")
    except ConfigurationError:
        raise
    except Exception as error:
        # The class alone: the message may repeat a value.
        given = ", ".join(sorted(name for name in options if name != "base_url"))
        raise ConfigurationError(
            f"httpx.Client cannot be used with these options ({type(error).__name__}): {given or 'mounts'}"
        ) from None


def _are_hooks(hooks: Any) -> bool:
    return isinstance(hooks, Mapping) and all(
        name in ("request", "response") and isinstance(each, (list, tuple)) and all(map(callable, each))
        for name, each in hooks.items()
    )


def _check_encoding(encoding: str | Callable[[bytes], str]) -> None:
    if not callable(encoding):
        codecs.lookup(encoding)
