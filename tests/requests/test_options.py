"""Options are checked where they are declared, and a base URL's user information becomes authentication."""

from __future__ import annotations

import logging
import socket
import ssl
from typing import Any
from urllib.parse import quote

import pytest
import requests
from requests.auth import HTTPDigestAuth
from requests.cookies import RequestsCookieJar

from tests.support.upstream import EchoUpstream
from workerpools import ConfigurationError, WorkerPools
from workerpools.requests import RequestsSession
from workerpools.requests._options import base_of

SECRET = "pä ss/w:o@r?d#%"
QUOTED = quote(SECRET, safe="")


@pytest.mark.parametrize(
    ("given", "url", "auth", "shown", "server"),
    [
        ("", "", None, "", None),
        (
            "https://api.example.com",
            "https://api.example.com",
            None,
            "https://api.example.com",
            ("api.example.com", 443),
        ),
        ("http://h:8080/v1/", "http://h:8080/v1/", None, "http://h:8080/v1/", ("h", 8080)),
        ("https://me:pw@h/v1", "https://h/v1", ("me", "pw"), "https://me:***@h/v1", ("h", 443)),
        (f"https://me:{QUOTED}@h:1/", "https://h:1/", ("me", SECRET), "https://me:***@h:1/", ("h", 1)),
        ("https://token@h/", "https://h/", ("token", ""), "https://***@h/", ("h", 443)),
        ("https://me:@[::1]:8/", "https://[::1]:8/", ("me", ""), "https://***@[::1]:8/", ("::1", 8)),
        ("https://h/services/T0/xyz", "https://h/services/T0/xyz", None, "https://h/***/***/***", ("h", 443)),
    ],
)
def test_user_information_leaves_the_url(
    given: str, url: str, auth: tuple[str, str] | None, shown: str, server: Any
) -> None:
    """It is decoded, sent as basic authentication to that server alone, and is in no URL any more."""
    base = base_of(given)
    assert (base.url, base.shown, base.server) == (url, shown, server)
    assert (base.auth is None) == (auth is None)
    if base.auth is not None and auth is not None:
        name, password = (each.encode() for each in auth)
        wanted = requests.Request("GET", url, auth=(name, password)).prepare().headers["Authorization"]
        assert requests.Request("GET", f"{url}x", auth=base.auth).prepare().headers["Authorization"] == wanted
        for other in ("http://other.example/", "https://h:99/", "http://h/"):
            assert "Authorization" not in requests.Request("GET", other, auth=base.auth).prepare().headers


def test_a_password_in_a_base_url_works_and_is_not_told(echo: EchoUpstream, caplog: pytest.LogCaptureFixture) -> None:
    """Requests carry it; urllib3's lines, the URL of an error and a request to elsewhere do not. ``auth=`` wins."""
    caplog.set_level(logging.DEBUG)
    url = echo.url.replace("://", f"://me:{QUOTED}@")
    with WorkerPools() as pools:
        resource = pools.add(RequestsSession(url), name="api")
        with pytest.raises(requests.HTTPError) as caught:
            resource.get().get("/echo/x?status=404").raise_for_status()
        elsewhere = resource.get().get(echo.url.replace("127.0.0.1", "localhost") + "/echo/x")
        other = pools.add(RequestsSession(url, auth=("you", "x")), name="other").get().get("/echo/x")
        said = repr(resource) + resource.adapter.describe() + repr(pools)
    error: Any = caught.value
    assert error.request.headers["Authorization"].startswith("Basic bWU6")
    assert "Authorization" not in elsewhere.request.headers
    assert other.request.headers["Authorization"] == "Basic eW91Ong="
    told = caplog.text + str(error) + error.request.url
    assert not any(piece in said + told for piece in (QUOTED, SECRET))
    assert "me:" not in told


NAN = float("nan")
#: What is neither right for any option nor None.
ODD: tuple[Any, ...] = (
    *("x", -1, object(), [1], 10**400, NAN, float("inf"), b"\xff", {"a": 1}, {1: "x"}, True, "a\r\nb", 1.5, {1}, ()),
    *((1, 2, 3), ("a",), ""),
)
OPTIONS = (
    *("base_url", "timeout", "acquire_timeout", "total_timeout", "pool_maxsize", "pool_connections", "max_idle"),
    *("max_lifetime", "max_lifetime_jitter", "headers", "params", "auth", "credentials", "cookies", "verify", "cert"),
    *("proxies", "hooks", "stream", "max_redirects", "trust_env", "socket_options", "on_open", "leak_after"),
)


@pytest.mark.parametrize("name", OPTIONS)
def test_an_odd_option_is_refused_or_works(name: str, echo: EchoUpstream) -> None:
    """Never a session that fails its first request. A file is looked for where a connection is opened."""
    refused: dict[int, str] = {}
    with WorkerPools() as pools:
        for number, value in enumerate(ODD):
            try:
                resource = pools.add(RequestsSession(**{name: value}), name=f"r{number}")
            except ConfigurationError as error:
                refused[number] = str(error)
                continue
            session = resource.get()
            if name in ("verify", "cert") and isinstance(value, (str, tuple)):
                continue
            assert session.get(echo.url + "/echo/x").text == "x", (name, value)
    assert refused, name
    assert all(name in message for message in refused.values())


@pytest.mark.parametrize(
    "options",
    [
        {"base_url": None},
        {"base_url": "h/x"},
        {"base_url": "https://h:99999"},
        {"base_url": "ftp://h"},
        {"base_url": "http://h\n.x"},
        {"base_url": "http://[::1"},
        {"base_url": "https://me:se/cret@h"},
        {"base_url": "https://h/?token=secret"},
        {"timeout": None},
        {"timeout": (1, NAN)},
        {"timeout": (1, 2, 3)},
        {"timeout": 0},
        {"headers": {"Authorization": "Bearer sec\nret"}},
        {"headers": {"X": "☃ secret"}},
        {"headers": {"X": 7}},
        {"auth": ("me",)},
        {"auth": (1, 2)},
        {"hooks": {"response": [1]}},
        {"hooks": {"request": print}},
        {"proxies": {"http": "http://user:se/cret@proxy:3128"}},
        {"proxies": {"http": None}},
        {"socket_options": [(1, 2)]},
        {"socket_options": [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 2**40)]},
        {"cert": ("a", "b", "c")},
        {"cookies": "none"},
        {"max_redirects": -1},
        {"tiemout": 1},
    ],
    ids=lambda options: next(iter(options)),
)
def test_refused_on_declaration(options: dict[str, Any]) -> None:
    """Types, ranges and NaN; the message names the option and has no secret."""
    with pytest.raises(ConfigurationError, match="RequestsSession") as caught:
        RequestsSession(**options)
    assert next(iter(options)) in str(caught.value)
    assert "ret" not in str(caught.value)


def test_accepted(echo: EchoUpstream) -> None:
    """What requests and the operating system take is taken."""
    jar = RequestsCookieJar()
    jar.set("a", "b")
    accepted: list[dict[str, Any]] = [
        {"timeout": 5},
        {"timeout": (None, None), "acquire_timeout": None, "max_idle": None, "max_lifetime": None, "pool_maxsize": 1},
        {"verify": False},
        {"verify": ssl.create_default_context()},
        {"headers": {"A": "b", "B": b"c"}, "params": {"a": ["b", "c"]}, "cookies": {"a": "b"}},
        {"cookies": jar},
        {"auth": HTTPDigestAuth("a", "b")},
        {"auth": lambda request: request},
        {"hooks": {"response": [lambda response, **_: response]}},
        {"proxies": {"https": "proxy.example.com:3128", "no_proxy": "127.0.0.1"}},
        {"socket_options": iter([(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)])},
        {"stream": True},
    ]
    with WorkerPools() as pools:
        for number, options in enumerate(accepted):
            session = pools.add(RequestsSession(**options), name=f"r{number}").get()
            assert session.get(echo.url + "/echo/x").text == "x"
