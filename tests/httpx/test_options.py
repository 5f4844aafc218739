"""Options are checked where they are declared, and a base URL's user information becomes authentication."""

from __future__ import annotations

import logging
import socket
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from tests.support.upstream import EchoUpstream
from workerpools import ConfigurationError, WorkerPools
from workerpools.httpx import AsyncHttpxClient, HttpxClient
from workerpools.httpx._options import base_of

SECRET = "pä ss/w:o@r?d#%"
QUOTED = quote(SECRET, safe="")


@pytest.mark.parametrize(
    ("given", "url", "auth", "shown"),
    [
        ("", "", None, ""),
        ("https://api.example.com", "https://api.example.com", None, "https://api.example.com"),
        ("http://h:8080/v1/", "http://h:8080/v1/", None, "http://h:8080/v1/"),
        ("https://me:pw@h/v1", "https://h/v1", ("me", "pw"), "https://me:***@h/v1"),
        (f"https://me:{QUOTED}@h:1/", "https://h:1/", ("me", SECRET), "https://me:***@h:1/"),
        ("https://token@h/", "https://h/", ("token", ""), "https://***@h/"),
        ("https://:pw@h/", "https://h/", ("", "pw"), "https://:***@h/"),
        ("https://me:@[::1]:8/", "https://[::1]:8/", ("me", ""), "https://***@[::1]:8/"),
        ("https://h/services/T0/xyz", "https://h/services/T0/xyz", None, "https://h/***/***/***"),
        ("https://h/?key=xyz#xyz", "https://h/?key=xyz#xyz", None, "https://h/"),
    ],
)
def test_user_information_leaves_the_url(
    given: str, url: str, auth: tuple[str, str] | None, shown: str, echo: EchoUpstream
) -> None:
    """It is decoded, sent as basic authentication to that server alone, and is in no URL any more."""
    for form in (given, httpx.URL(given)):
        base = base_of(form)
        assert (str(base.url), base.shown) == (url, shown)
        assert (base.auth is None) == (auth is None)
        if base.auth is not None and auth is not None:
            same = base.url.copy_with(path="/x")
            wanted = next(httpx.BasicAuth(*auth).auth_flow(httpx.Request("GET", same))).headers["Authorization"]
            assert next(base.auth.auth_flow(httpx.Request("GET", same))).headers["Authorization"] == wanted
            for other in ("http://other.example/", same.copy_with(port=99), same.copy_with(scheme="ftp")):
                assert "Authorization" not in next(base.auth.auth_flow(httpx.Request("GET", other))).headers


def test_a_password_in_a_base_url_works_and_is_not_told(echo: EchoUpstream, caplog: pytest.LogCaptureFixture) -> None:
    """Requests carry it; httpx's line, the URL of an error and a redirect to elsewhere do not. ``auth=`` wins."""
    caplog.set_level(logging.DEBUG)
    # An application that another test imports may have made it quieter.
    caplog.set_level(logging.DEBUG, logger="httpx")
    sent: list[httpx.Request] = []
    url = echo.url.replace("://", f"://me:{QUOTED}@")
    with WorkerPools() as pools:
        options: dict[str, Any] = {"base_url": url, "event_hooks": {"request": [sent.append]}}
        client = pools.add(HttpxClient(**options), name="api").get()
        with pytest.raises(httpx.HTTPStatusError) as caught:
            client.get("/status/404").raise_for_status()
        error = caught.value
        client.get(echo.url.replace("127.0.0.1", "localhost") + "/echo/x")
        other = pools.add(HttpxClient(**options, auth=("you", "x")), name="other").get()
        other.get("/echo/x")
    headers = [request.headers.get("Authorization") for request in sent]
    expected = [
        next(httpx.BasicAuth(*each).auth_flow(httpx.Request("GET", url))) for each in (("me", SECRET), ("you", "x"))
    ]
    assert headers == [expected[0].headers["Authorization"], None, expected[1].headers["Authorization"]]
    said = caplog.text + str(error) + repr(error.request) + str(error.request.url)
    assert "HTTP Request: GET http://127.0.0.1" in caplog.text
    assert not any(piece in said for piece in (QUOTED, SECRET, "me:"))


NAN = float("nan")
#: What is neither right for any option nor None.
ODD = ("x", -1, object(), [1], 10**400, NAN, float("inf"), b"\xff", {"a": 1}, lambda: 1, True, "a\r\nb", 1.5, {1}, ())

OPTIONS = (
    *("timeout", "limits", "verify", "cert", "trust_env", "http1", "http2", "proxy", "mounts", "transport"),
    *("socket_options", "max_connections", "max_lifetime", "max_lifetime_jitter", "credentials", "on_open"),
    *("leak_after", "base_url", "headers", "event_hooks", "params", "auth", "cookies", "default_encoding"),
    *("follow_redirects", "max_redirects"),
)


@pytest.mark.parametrize("name", OPTIONS)
def test_an_odd_option_is_refused_or_works(name: str, echo: EchoUpstream) -> None:
    """Never a client that fails its first request. A file or a codec is looked for where the client is opened."""
    refused: dict[int, str] = {}
    with WorkerPools() as pools:
        for number, value in enumerate(ODD):
            if name in ("transport", "credentials", "auth", "on_open") and callable(value):
                # Called, and what it returns is its author's.
                continue
            try:
                resource = pools.add(HttpxClient(**{name: value}), name=f"r{number}")
                client = resource.get()
            except ConfigurationError as error:
                refused[number] = str(error)
                continue
            assert client.get(echo.url + "/echo/x").status_code == 200, (name, value)
    assert refused, name
    assert all(name in message for message in refused.values())


@pytest.mark.parametrize(
    "options",
    [
        {"base_url": "https://h:99999"},
        {"base_url": "http://h\n.x"},
        {"base_url": "http://[::1"},
        {"http1": False},
        {"limits": httpx.Limits(max_connections=0)},
        {"limits": httpx.Limits(max_keepalive_connections=-1)},
        {"limits": httpx.Limits(keepalive_expiry=NAN)},
        {"timeout": httpx.Timeout(5, read=NAN)},
        {"timeout": httpx.Timeout(5, connect=1e12)},
        {"socket_options": [(1, 2)]},
        {"socket_options": [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 2**40)]},
        {"headers": {"Authorization": "Bearer sec\nret"}},
        {"auth": ("me",)},
        {"auth": (1, 2)},
        {"event_hooks": {"request": [1]}},
        {"event_hooks": {"requests": []}},
        {"event_hooks": {"request": print}},
        {"default_encoding": "no-such-codec"},
        {"mounts": {"x": httpx.HTTPTransport()}},
        {"max_redirects": -1},
        {"cert": ("a", "b", "c", "d")},
    ],
    ids=lambda options: next(iter(options)),
)
def test_refused_on_declaration(options: dict[str, Any]) -> None:
    """Types, ranges and NaN; the message has no value of a header."""
    for declared in (HttpxClient, AsyncHttpxClient):
        # By the name of the declaration that is wrong.
        with pytest.raises(ConfigurationError, match=f"^{declared.__name__}: ") as caught:
            declared(**options)
    assert "ret" not in str(caught.value).replace("returns", "")


def test_accepted(echo: EchoUpstream, tmp_path: Path) -> None:
    """What httpx and the operating system take is taken."""
    accepted: list[dict[str, Any]] = [
        {"timeout": None},
        {"timeout": 5},
        {"timeout": (1, 2, 3, 4)},
        {"verify": False},
        {"verify": ssl.create_default_context()},
        {"headers": [("A", "b")], "params": "a=b", "cookies": {"a": "b"}},
        {"auth": lambda request: request},
        {"auth": httpx.DigestAuth("a", "b")},
        {"socket_options": iter([(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)])},
        {"socket_options": []},
        {"max_lifetime": None, "max_connections": 1},
        {"limits": httpx.Limits(max_connections=None, max_keepalive_connections=0, keepalive_expiry=None)},
        {"mounts": {"all://nowhere.example": None}},
    ]
    with WorkerPools() as pools:
        for number, options in enumerate(accepted):
            client = pools.add(HttpxClient(**options), name=f"r{number}").get()
            assert client.get(echo.url + "/echo/x").status_code == 200


@pytest.mark.parametrize(
    "make", [lambda path: {"verify": path}, lambda path: {"cert": path}, lambda path: {"cert": (path, path)}]
)
def test_a_missing_certificate_file(make: Callable[[str], dict[str, Any]], tmp_path: Path) -> None:
    """Named where the client is opened, not on declaration: another machine may have it."""
    with WorkerPools() as pools:
        resource = pools.add(HttpxClient(**make(str(tmp_path / "ca.pem"))), name="api")
        with pytest.raises(ConfigurationError, match=r"there is no file .*ca\.pem"):
            resource.get()
