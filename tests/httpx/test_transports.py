"""Transports of the user's, Unix domain sockets and source addresses; what cannot reach a transport is refused."""

from __future__ import annotations

import socketserver
import threading
from collections.abc import Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.stats.counting import stats
from tests.support.shop import Shop
from tests.support.upstream import EchoUpstream
from workerpools import ConfigurationError, FailureKind, classify
from workerpools.events import EventKind
from workerpools.httpx import HttpxClient


@pytest.fixture
def shop() -> Iterator[Shop]:
    with closing(Shop()) as made:
        yield made


def test_a_transports_function_is_called_for_each_generation(shop: Shop, echo: EchoUpstream) -> None:
    """So that its connections have a lifetime, and are recycled; an HTTPTransport is watched as ours is."""
    made: list[httpx.HTTPTransport] = []

    def make() -> httpx.HTTPTransport:
        made.append(httpx.HTTPTransport())
        return made[-1]

    api = shop.add_api(echo.url, transport=make)
    for _ in range(2):
        assert api.get().get("/echo/x").text == "x"
    assert (len(made), echo.accepted) == (1, 1)
    shop.pools.recycle("api")
    assert api.get().get("/echo/x").text == "x"
    assert (len(made), echo.accepted) == (2, 2)
    # The server ends a kept connection: a POST is lost before it is sent, and is sent again.
    echo.close_idle()
    assert api.get().post("/orders").status_code == 200
    opened = [event for event in shop.events if event.kind is EventKind.CONNECTION_OPENED]
    assert len(opened) == echo.accepted == 3


REACHES_NOTHING: list[dict[str, Any]] = [
    {"verify": "ca.pem"},
    {"cert": "cert.pem"},
    {"http2": True},
    {"proxy": "http://127.0.0.1:1"},
    {"limits": httpx.Limits()},
    {"max_connections": 1},
    {"socket_options": []},
    {"uds": "/run/api.sock"},
    {"local_address": "127.0.0.1"},
]


@pytest.mark.parametrize("options", REACHES_NOTHING)
def test_what_cannot_reach_a_transport_is_refused(options: dict[str, Any]) -> None:
    """By name, whatever the transport is given as."""
    for transport in (httpx.MockTransport(lambda request: httpx.Response(200)), httpx.HTTPTransport):
        with pytest.raises(ConfigurationError, match=f"{next(iter(options))} cannot reach the transport"):
            HttpxClient(transport=transport, **options)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"transport": httpx.MockTransport(lambda request: httpx.Response(200)), "max_lifetime": 5.0}, "max_lifetime"),
        ({"proxy": "http://127.0.0.1:1", "uds": "/run/api.sock"}, "uds cannot reach"),
        ({"proxy": "http://127.0.0.1:1", "local_address": "::1"}, "local_address cannot reach"),
        ({"uds": ""}, "uds: wanted"),
        ({"uds": 5}, "uds: wanted"),
        ({"local_address": "localhost"}, "local_address: wanted an IP address"),
        ({"local_address": 5}, "local_address: wanted an IP address"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], wanted: str) -> None:
    with pytest.raises(ConfigurationError, match=wanted):
        HttpxClient(**options)


def test_a_proxy_of_the_environment_does_not_swallow_the_address(monkeypatch: pytest.MonkeyPatch, shop: Shop) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    api = shop.add_api("http://127.0.0.1:2", local_address="127.0.0.1")
    with pytest.raises(ConfigurationError, match="trust_env=False"):
        api.get()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        body = str(self.client_address[0] if self.client_address else "a Unix socket").encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: Any) -> None:
        """Print nothing."""


def test_a_unix_domain_socket(shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No proxy of the environment stands in between, and its connection is counted."""
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.delenv("NO_PROXY", raising=False)
    path = tmp_path / "api.sock"
    with socketserver.ThreadingUnixStreamServer(str(path), _Handler) as server:
        server.daemon_threads, server.block_on_close = True, False
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        api = shop.add_api("http://api", uds=path, total_timeout=5.0)
        assert [api.get().get("/").text for _ in range(2)] == ["a Unix socket"] * 2
        assert stats(shop.pools, "api").open == 1
        server.shutdown()


class _Refusing(_Handler):
    def do_GET(self) -> None:
        self.send_response(407)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_POST = do_CONNECT = do_GET


@pytest.mark.parametrize("url", ["http://api.example.com", "https://api.example.com"])
def test_what_a_proxy_refuses_is_permanent(shop: Shop, url: str) -> None:
    """Its own answer, or the end of the tunnel: no other attempt has other credentials."""
    found: list[Any] = []
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), _Refusing) as server:
        server.daemon_threads, server.block_on_close = True, False
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        shop.add_api(url, proxy=f"http://127.0.0.1:{server.server_address[1]}")

        @shop.task()
        def body(self: Any) -> None:
            try:
                self.api.post("/orders").raise_for_status()
            except httpx.HTTPError as error:
                found.append(classify(error))

        body.apply().get()
        server.shutdown()
    assert [failure.kind for failure in found] == [FailureKind.PERMANENT]


def test_a_source_address(shop: Shop) -> None:
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), _Handler) as server:
        server.daemon_threads, server.block_on_close = True, False
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        assert shop.add_api(url, local_address="127.0.0.2").get().get("/").text == "127.0.0.2"
        server.shutdown()
