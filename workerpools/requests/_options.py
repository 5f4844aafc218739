"""Checks a session's options on declaration, and takes the user information out of its base URL."""

from __future__ import annotations

import os
import ssl
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple
from urllib.parse import SplitResult, unquote, urlsplit

import requests
from requests.auth import AuthBase, HTTPBasicAuth

from workerpools.adapter import WEEK, redact_url, seconds, whole
from workerpools.errors import ConfigurationError

__all__ = ["COOKIES", "Base", "Credentials", "base_of", "check_options", "check_times"]

#: How long the cookies that a server sets are kept.
COOKIES = ("attempt", "process", "off")

_WANTED = "http:// or https:// and a host, like https://api.example.com"
_HIDDEN = "not shown here, as it may contain a password"
_ESCAPE = "special characters of a password escaped (urllib.parse.quote)"
_PORTS = {"http": 80, "https": 443}


class Base(NamedTuple):
    """A base URL and what it says of authentication.

    Attributes:
        url: The URL without its user information; empty if there is none.
        auth: The user information, for requests to that server alone; None without one.
        shown: The URL without secrets, for people.
        server: Its host and port; None without a base URL.
    """

    url: str
    auth: AuthBase | None
    shown: str
    server: tuple[str, int] | None


def base_of(given: Any) -> Base:
    """Parse a base URL.

    requests would leave the user information in the URL of each request, which stands in the message of HTTPError.

    Args:
        given: The option.

    Raises:
        ConfigurationError: It is not a server's URL. The message omits it, as it may contain a password.
    """
    if given is None:
        raise ConfigurationError("RequestsSession: base_url is None; is its environment variable set?")
    if given == "":
        return Base("", None, "", None)
    url = _split(given)
    if url is None:
        raise ConfigurationError(f"RequestsSession: base_url is invalid ({_HIDDEN}); wanted: {_WANTED}, with {_ESCAPE}")
    user, separator, place = url.netloc.rpartition("@")
    if separator and "@" in url.path + url.query + url.fragment:
        # An unescaped "/", "?" or "#" of a password ended the host early; the rest of the password would be shown.
        raise ConfigurationError(
            f"RequestsSession: base_url has an '@' after its host ({_HIDDEN}); "
            "escape special characters of a password (urllib.parse.quote)"
        )
    if url.query or url.fragment:
        raise ConfigurationError(
            f"RequestsSession: base_url has a query or a fragment ({_HIDDEN}); give a query as params="
        )
    plain = url._replace(netloc=place)
    auth = None
    if separator:
        name, _, password = user.partition(":")
        auth = _Own(unquote(name), unquote(password), plain)
    return Base(plain.geturl(), auth, redact_url(str(given)), _server(plain))


def _split(given: Any) -> SplitResult | None:
    try:
        url = urlsplit(given) if isinstance(given, str) else None
        if url is None or any(map(str.isspace, given)) or url.scheme not in _PORTS or not url.hostname or url.port == 0:
            return None
        prepared = requests.Request("GET", url._replace(netloc=url.netloc.rpartition("@")[2]).geturl()).prepare()
    except (ValueError, UnicodeError):
        return None
    return url if prepared.url else None


class _Own(HTTPBasicAuth):
    """Basic authentication with one server. A session's ``auth`` would go to every server that a request names."""

    def __init__(self, user: str, password: str, url: SplitResult) -> None:
        # As bytes: requests takes text for Latin-1.
        super().__init__(user.encode(), password.encode())
        self._origin = (url.scheme, _server(url))

    def __call__(self, request: Any) -> Any:
        url = urlsplit(request.url)
        return super().__call__(request) if (url.scheme, _server(url)) == self._origin else request


def _server(url: SplitResult) -> tuple[str, int] | None:
    port = url.port or _PORTS.get(url.scheme)
    return (url.hostname, port) if url.hostname and port else None


class Credentials(AuthBase):
    """Authenticates each request with fresh credentials.

    Args:
        ask: Returns a user and password, or a bearer token.
    """

    def __init__(self, ask: Callable[[], tuple[str, str] | str]) -> None:
        self._ask = ask

    def __call__(self, request: Any) -> Any:
        found = self._ask()
        if not isinstance(found, str):
            user, password = found
            return HTTPBasicAuth(user, password)(request)
        request.headers["Authorization"] = f"Bearer {found}"
        return request


def check_times(
    *, timeout: Any, acquire_timeout: Any, total_timeout: Any, max_idle: Any, leak_after: Any, redirects: Any
) -> None:
    """Refuse timeouts and other numbers that are out of range.

    Raises:
        ConfigurationError: One of them is; the message names it and shows it.
    """
    if isinstance(timeout, tuple):
        if len(timeout) != 2:
            raise ConfigurationError("RequestsSession: timeout: wanted a number, or a pair (connect, read)")
        for name, value in zip(("connect", "read"), timeout, strict=True):
            if value is not None:
                seconds(value, f"RequestsSession: timeout: {name}", most=WEEK, above=True, optional=True)
    elif timeout is None:
        raise ConfigurationError("RequestsSession: timeout=None: to wait for ever give (None, None)")
    else:
        seconds(timeout, "RequestsSession: timeout", most=WEEK, above=True)
    if acquire_timeout is not None:
        seconds(acquire_timeout, "RequestsSession: acquire_timeout", most=WEEK, optional=True)
    if total_timeout is not None:
        seconds(total_timeout, "RequestsSession: total_timeout", most=WEEK, above=True, optional=True)
    if max_idle is not None:
        seconds(max_idle, "RequestsSession: max_idle", optional=True)
    if leak_after is not None:
        seconds(leak_after, "RequestsSession: leak_after", optional=True)
    whole(redirects, "RequestsSession: max_redirects")


def check_options(session: Mapping[str, Any], **own: Any) -> None:
    """Refuse options that no session can be opened with, or that would fail its first request.

    Args:
        session: The attributes of ``requests.Session``, by name.
        own: Those of :class:`workerpools.requests.RequestsSession`, by name.

    Raises:
        ConfigurationError: An option has the wrong type or is out of range; the message omits its value.
    """
    for name in ("pool_maxsize", "pool_connections"):
        if own[name] is not None:
            whole(own[name], f"RequestsSession: {name}", least=1, optional=True)
    if own["cookies"] not in COOKIES:
        given = own["cookies"][:20]
        raise ConfigurationError(f"RequestsSession: cookies={given!r}: wanted one of {', '.join(COOKIES)}")
    for name in ("credentials", "on_open"):
        _check(name, own[name], own[name] is None or callable(own[name]), "a function")
    for name in ("stream", "trust_env"):
        _check(name, session[name], isinstance(session[name], bool), "True or False")
    verify, cert, auth = own["verify"], session["cert"], session["auth"]
    _check("verify", verify, isinstance(verify, (bool, str, os.PathLike, ssl.SSLContext)), "a bool, path or SSLContext")
    _check("cert", cert, cert is None or _is_cert(cert), "a path, or (certificate, key)")
    _check("auth", auth, auth is None or callable(auth) or _is_pair(auth), "(user, password), or an AuthBase")
    for name in ("headers", "params", "proxies", "hooks"):
        _check(name, session[name], isinstance(session[name], Mapping), "a mapping")
    jar = own["jar"]
    _check("cookies", jar, jar is None or isinstance(jar, Mapping) or hasattr(jar, "set_cookie"), "a mapping")
    _check_hooks(session["hooks"])
    _check_proxies(session["proxies"])
    _check_socket_options(own["socket_options"])
    _check_request(session, jar)


def _check(name: str, value: object, accepted: bool, wanted: str) -> None:
    if not accepted:
        kind = type(value).__name__
        raise ConfigurationError(f"RequestsSession: {name} is a value of the type {kind}; wanted: {wanted}")


def _is_pair(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(isinstance(each, (str, bytes)) for each in value)


def _is_cert(cert: Any) -> bool:
    if isinstance(cert, (tuple, list)):
        return len(cert) == 2 and all(isinstance(each, (str, os.PathLike)) for each in cert)
    return isinstance(cert, (str, os.PathLike))


def _check_hooks(hooks: Mapping[Any, Any]) -> None:
    for name, given in hooks.items():
        each = given if isinstance(given, (list, tuple)) else (given,)
        _check("hooks", given, name == "response" and all(map(callable, each)), 'a mapping of "response" to functions')


def _check_proxies(proxies: Mapping[Any, Any]) -> None:
    for scheme, proxy in proxies.items():
        if scheme == "no_proxy":
            continue
        try:
            url = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
            usable = bool(url.hostname) and url.port != 0 and "@" not in url.path + url.query + url.fragment
        except (TypeError, ValueError, AttributeError):
            usable = False
        if not usable or not isinstance(scheme, str):
            raise ConfigurationError(
                f"RequestsSession: proxies has a proxy that is invalid ({_HIDDEN}); "
                f"wanted: http://proxy.example.com:3128, with {_ESCAPE}"
            )


def _check_socket_options(options: Any) -> None:
    accepted = options is None or (isinstance(options, (list, tuple)) and all(map(_is_socket_option, options)))
    _check("socket_options", options, accepted, "tuples for setsockopt(), like (SOL_SOCKET, SO_KEEPALIVE, 1)")


def _is_socket_option(option: Any) -> bool:
    if not isinstance(option, (tuple, list)) or len(option) != 3:
        return False
    level, name, value = option
    numbers = isinstance(level, int) and isinstance(name, int)
    return numbers and (isinstance(value, bytes) or (isinstance(value, int) and -(2**31) <= value < 2**31))


def _check_request(options: Mapping[str, Any], jar: Any) -> None:
    """Prepare a request without sending it: requests checks most options there."""
    try:
        with requests.Session() as session:
            session.trust_env = False
            session.headers.update(options["headers"])
            session.params = dict(options["params"])
            request = requests.Request("GET", "http://localhost/", cookies=jar or {})
            prepared = session.prepare_request(request)
            for name, value in prepared.headers.items():
                # As http.client encodes them when the request is sent.
                text = name + (value.decode("latin-1") if isinstance(value, bytes) else value)
                text.encode("latin-1")
    except Exception as error:
        # The class alone: the message may repeat a value.
        raise ConfigurationError(
            "RequestsSession: no request can be made with these headers, params or cookies: "
            f"{type(error).__name__}; wanted: text"
        ) from None
