"""The httpx adapter: the client's own options, bounded waits, proxies from the environment, an orderly close."""

from __future__ import annotations

import inspect
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from tests.support.proxy import TcpProxy
from tests.support.tls import TlsProxy
from tests.support.upstream import EchoUpstream
from workerpools import ConfigurationError, Resource, WorkerPools
from workerpools._pools.shared import ExecutionPool
from workerpools.httpx import DEFAULT_TIMEOUT, HttpxClient, default_limits

Add = Callable[..., Resource[httpx.Client]]


@pytest.fixture
def add() -> Iterator[Add]:
    """Declare a client; closed after the test."""
    with WorkerPools() as pools:
        yield lambda **options: pools.add(HttpxClient(**options), name="api")


def test_every_option_of_the_client_is_accepted() -> None:
    """A new version of httpx with a new option fails here."""
    accepted = set(inspect.signature(HttpxClient.__init__).parameters) | {
        "auth",
        "base_url",
        "cookies",
        "default_encoding",
        "event_hooks",
        "follow_redirects",
        "headers",
        "max_redirects",
        "params",
    }
    assert set(inspect.signature(httpx.Client.__init__).parameters) <= accepted


def test_an_unknown_option_is_refused_at_declaration() -> None:
    """By name, not in the first task, and with the option that was meant: one of ours, or of httpx's."""
    with pytest.raises(ConfigurationError, match=r"no option base_ur \(did you mean base_url\?\), zzz$"):
        HttpxClient(base_ur="http://127.0.0.1", zzz=1)
    with pytest.raises(ConfigurationError, match=r"no option tiemout \(did you mean timeout\?\)$"):
        HttpxClient(tiemout=1)


def test_options_reach_the_client(add: Add, echo: EchoUpstream) -> None:
    """As ``httpx.Client`` documents them."""
    sent: list[httpx.Request] = []
    client = add(
        base_url=echo.url,
        headers={"X-Shop": "1"},
        params={"delay": "0"},
        auth=("user", "password"),
        event_hooks={"request": [sent.append]},
    ).get()
    assert client.get("/echo/hello").text == "hello"
    assert sent[0].headers["X-Shop"] == "1"
    assert "Authorization" in sent[0].headers
    assert sent[0].url.params["delay"] == "0"


@pytest.mark.parametrize(
    ("execution_pool", "given", "size"),
    [
        (ExecutionPool(), None, 10),
        (ExecutionPool("prefork", 1), None, 10),
        (ExecutionPool("threads", 50), None, 50),
        (ExecutionPool("threads", 50), 3, 3),
    ],
)
def test_limits_follow_the_execution_pool(execution_pool: ExecutionPool, given: int | None, size: int) -> None:
    """Never unbounded, and never fewer than run at a time."""
    limits = default_limits(execution_pool, given)
    assert (limits.max_connections, limits.max_keepalive_connections) == (size, size)
    assert limits.keepalive_expiry is not None
    assert limits.keepalive_expiry < 5


def test_every_wait_is_bounded_by_default(add: Add) -> None:
    """And unbounded only where it is asked for in so many words."""
    timeout = add().get().timeout
    assert timeout == DEFAULT_TIMEOUT
    assert None not in (timeout.connect, timeout.read, timeout.write, timeout.pool)
    with WorkerPools() as pools:
        assert pools.add(HttpxClient(timeout=None), name="x").get().timeout == httpx.Timeout(None)


def test_a_silent_server_is_given_up(add: Add, echo: EchoUpstream, proxy_to: Any) -> None:
    """A request to a server that accepts and never answers ends by the read timeout, and is not stale."""
    proxy: TcpProxy = proxy_to(echo)
    proxy.blackhole()
    client = add(base_url=f"http://127.0.0.1:{proxy.port}", timeout=httpx.Timeout(5, read=0.2)).get()
    with pytest.raises(httpx.ReadTimeout) as caught:
        client.get("/echo/hello")
    assert "'api'" in caught.value.__notes__[0]


def test_sockets_have_keepalives(add: Add, echo: EchoUpstream) -> None:
    """The kernel notices a peer that is gone."""
    seen: list[int] = []

    def trace(name: str, info: Any) -> None:
        if name == "connection.connect_tcp.complete":
            connection = info["return_value"].get_extra_info("socket")
            seen.append(connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE))

    add(base_url=echo.url).get().get("/echo/hello", extensions={"trace": trace})
    assert seen == [1]


def test_a_trace_of_the_caller_still_works(add: Add, echo: EchoUpstream) -> None:
    """Also over a redirect, where httpx copies the extensions, and after the request nothing of ours is left."""
    names: list[str] = []
    extensions = {"trace": lambda name, info: names.append(name)}
    response = add(base_url=echo.url).get().get("/echo/hello", extensions=extensions)
    assert "http11.send_request_headers.complete" in names
    assert response.request.extensions["trace"] is extensions["trace"]


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_tls_is_verified(add: Add, tls_echo: TlsProxy, method: str) -> None:
    """By default with the public authorities, which do not know the test's."""
    url = f"https://localhost:{tls_echo.port}"
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE"):
        add(base_url=url).get().request(method, "/orders")
    with WorkerPools() as pools:
        trusting = pools.add(HttpxClient(base_url=url, verify=tls_echo.client_context()), name="x").get()
        assert trusting.get("/echo/hello").text == "hello"


def test_the_tls_context_is_built_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the parent, before the fork, by ``prepare``; opening a client builds no other."""
    for name in ("SSL_CERT_FILE", "SSL_CERT_DIR"):
        # A file is looked at again at each opening.
        monkeypatch.delenv(name, raising=False)
    built: list[Any] = []
    original = httpx.create_ssl_context
    monkeypatch.setattr(httpx, "create_ssl_context", lambda **options: built.append(options) or original(**options))
    adapter = HttpxClient()
    adapter.prepare()
    with WorkerPools() as pools:
        resource = pools.add(adapter, name="api")
        resource.get()
        resource.close()
        resource.get()
    assert len(built) == 1


PROXY_CASES = [
    ({"HTTP_PROXY": "proxy"}, True),
    ({"http_proxy": "proxy"}, True),
    ({"ALL_PROXY": "proxy"}, True),
    ({"HTTPS_PROXY": "proxy"}, False),
    ({"HTTP_PROXY": "proxy", "NO_PROXY": "127.0.0.1"}, False),
    ({"HTTP_PROXY": "proxy", "NO_PROXY": "*"}, False),
    ({"HTTP_PROXY": "proxy", "NO_PROXY": "example.com, 127.0.0.1"}, False),
    ({"HTTP_PROXY": "proxy", "NO_PROXY": "example.com"}, True),
    ({}, False),
]


@pytest.mark.parametrize(("environment", "proxied"), PROXY_CASES)
@pytest.mark.parametrize("who", ["ours", "httpx"])
def test_proxies_of_the_environment_are_honoured(
    echo: EchoUpstream,
    proxy_to: Any,
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    proxied: bool,
    who: str,
) -> None:
    """Exactly as a plain ``httpx.Client`` does."""
    proxy: TcpProxy = proxy_to(echo)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value.replace("proxy", f"http://127.0.0.1:{proxy.port}"))
    with WorkerPools() as pools:
        client = pools.add(HttpxClient(), name="api").get() if who == "ours" else httpx.Client()
        client.get(f"{echo.url}/status")
        assert (proxy.accepted > 0) is proxied
        client.close()


def test_the_environment_is_ignored_on_request(add: Add, echo: EchoUpstream, monkeypatch: pytest.MonkeyPatch) -> None:
    """``trust_env=False``, or a proxy that was given."""
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.delenv("NO_PROXY", raising=False)
    assert add(trust_env=False, base_url=echo.url).get().get("/echo/hello").text == "hello"


def test_closing_waits_for_requests_in_flight(add: Add, echo: EchoUpstream) -> None:
    """A request that was sent before the close gets its answer; ``httpx.Client.close()`` alone would fail it."""
    resource = add(base_url=echo.url)
    client = resource.get()
    client.get("/echo/warm")
    answers: list[str] = []
    thread = threading.Thread(target=lambda: answers.append(client.get("/echo/late?delay=0.5").text))
    thread.start()
    while len(echo.requests()) < 2:
        time.sleep(0.01)
    resource.close(timeout=10)
    thread.join()
    assert answers == ["late"]
    assert client.is_closed
    echo.wait_for_open(0)


def test_closing_does_not_wait_for_ever(add: Add, echo: EchoUpstream) -> None:
    """A response that nobody reads to its end holds up the close until the timeout, not longer."""
    resource = add(base_url=echo.url)
    with resource.get().stream("GET", "/stream?n=3") as response:
        begun = time.monotonic()
        resource.close(timeout=0.2)
        assert 0.2 <= time.monotonic() - begun < 5
        assert not response.is_closed


def test_a_transport_of_the_users_is_used(add: Add) -> None:
    """An instance, or a function that makes one for each process."""
    answer = httpx.MockTransport(lambda request: httpx.Response(200, text="mock"))
    assert add(transport=answer).get().get("http://api.example.com/").text == "mock"
    with WorkerPools() as pools:
        made = pools.add(HttpxClient(transport=lambda: answer), name="x").get()
        assert made.get("http://api.example.com/").text == "mock"
        mounted = pools.add(HttpxClient(mounts={"all://api.example.com": answer}), name="y").get()
        assert mounted.get("http://api.example.com/").text == "mock"


def test_the_resource_tells_no_secret() -> None:
    """Neither the repr nor the description holds a password of the base URL."""
    with WorkerPools() as pools:
        resource = pools.add(HttpxClient(base_url="https://user:secret@api.example.com/?token=secret"), name="api")
        assert "secret" not in repr(resource) + resource.adapter.describe() + repr(pools)


@pytest.mark.parametrize(
    "url",
    [
        "http://user:se/cret@proxy:3128",
        "http://user:12/cret@proxy:3128",
        "http://user:se?cret@proxy:3128",
        "http://user:se#cret@proxy:3128",
        "ftp://user:cret@proxy:3128",
        "http://user:cret@",
        "user:cret",
    ],
)
@pytest.mark.parametrize("where", ["option", "environment"])
def test_a_wrong_proxy_is_refused_without_showing_it(url: Any, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """httpx's own errors repeat what it took for the port, which may be a part of the password."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    with WorkerPools() as pools, pytest.raises(ConfigurationError) as caught:
        if where == "environment":
            monkeypatch.setenv("HTTPS_PROXY", str(url))
            pools.add(HttpxClient(), name="api").get()
        else:
            HttpxClient(proxy=url)
    assert "HTTPS_PROXY" in str(caught.value) if where == "environment" else "proxy is invalid" in str(caught.value)
    shown = "".join(traceback.format_exception(caught.value))
    assert "cret" not in shown.replace("secret", "")


@pytest.mark.parametrize("tls", [False, True])
def test_every_connection_is_told_of_when_it_opens_and_when_it_closes(
    echo: EchoUpstream, tls_echo: TlsProxy, tls: bool
) -> None:
    """One event each, whoever ended it: the server, an expiry or the client."""
    told: list[str] = []
    with WorkerPools() as pools:
        pools.subscribe(lambda event: told.append(event.kind.value))
        verify = tls_echo.client_context() if tls else True
        api = pools.add(
            HttpxClient(base_url=f"https://localhost:{tls_echo.port}" if tls else echo.url, verify=verify), name="api"
        )
        assert api.get().get("/echo/1").text == "1"
        assert api.get().get("/echo/2").text == "2"
        assert told == ["value_opened", "connection_opened"]
        api.get().get("/echo/3", headers={"Connection": "close"})
        assert told[2:] == ["connection_closed"]
        api.get().get("/echo/4")
    assert told[3:] == ["connection_opened", "connection_closed", "value_closed"]


@pytest.mark.parametrize("how", ["with", "close"])
def test_a_client_that_a_body_closes_is_replaced(
    add: Add, echo: EchoUpstream, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It is the process's: who uses it next, in the same body or in another task, gets one that works; the log says
    whose doing it was. Closing it later, as its owner does, closes nothing else."""
    resource = add(base_url=echo.url)
    first = resource.get()
    if how == "with":
        with resource.get() as client:
            assert client.get("/echo/1").status_code == 200
    else:
        resource.get().get("/echo/1")
        resource.get().close()
    assert not resource.is_open
    assert resource.get() is not first
    assert resource.get().get("/echo/2").status_code == 200
    (line,) = [record.getMessage() for record in caplog.records if record.name == "workerpools"]
    assert "<Resource 'api' HttpxClient" in line
    assert "closed by its user" in line
    first.close()
    assert resource.get().get("/echo/3").status_code == 200
    assert echo.accepted == 2
