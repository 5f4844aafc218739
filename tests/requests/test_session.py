"""The requests adapter: what a session is opened with, its bounded waits, its connections, an orderly close."""

from __future__ import annotations

import os
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
from requests.auth import _basic_auth_str

from tests.requests.conftest import RequestsShop
from tests.stats.counting import closed, counted_pools, eventually, stats
from tests.support.proxy import TcpProxy
from tests.support.tls import TlsProxy
from tests.support.upstream import EchoUpstream
from workerpools import ConfigurationError, FailureKind, WorkerPools, classify
from workerpools._pools.shared import ExecutionPool
from workerpools.adapter import Opening
from workerpools.requests import DEFAULT_TIMEOUT, RequestsSession


def add(pools: WorkerPools, url: str = "", **options: Any) -> requests.Session:
    return pools.add(RequestsSession(url, **{"trust_env": False, **options}), name="api").get()


def test_it_is_a_session(echo: EchoUpstream) -> None:
    """SDKs take it, and its options are its attributes."""
    with WorkerPools() as pools:
        api = add(
            pools,
            echo.url,
            headers={"X-Shop": "1"},
            params={"delay": "0"},
            auth=("me", "pw"),
            hooks={"response": lambda response, **_: setattr(response, "seen", True)},
            max_redirects=3,
        )
        assert isinstance(api, requests.Session)
        assert repr(api).startswith("<workerpools.requests._session.Session object")
        response: Any = api.get("/echo/hello")
        assert (response.text, response.seen, api.max_redirects) == ("hello", True, 3)
        assert response.request.headers["X-Shop"] == "1"
        assert response.request.headers["Authorization"] == _basic_auth_str("me", "pw")
        assert [request.query for request in echo.requests()] == ["delay=0"]


@pytest.mark.parametrize(
    ("base", "given", "asked"),
    [
        ("", "http://h/x", "http://h/x"),
        ("http://h", "/x", "http://h/x"),
        ("http://h/", "x?a=b", "http://h/x?a=b"),
        ("http://h/v1", "/x/", "http://h/v1/x/"),
        ("http://h/v1/", "/x", "http://h/v1/x"),
        ("http://h/v1", "", "http://h/v1"),
        ("http://h/v1", "http://other/x", "http://other/x"),
        ("http://h/v1", "//other/x", "http://other/x"),
        ("http://h/v1", "/x/a:b", "http://h/v1/x/a:b"),
        ("http://[::1]:8/v1", "/x", "http://[::1]:8/v1/x"),
    ],
)
def test_urls_are_appended_to_the_base(base: str, given: str, asked: str) -> None:
    """As for httpx; one with a host is not."""
    with WorkerPools() as pools:
        request = requests.Request("GET", given)
        try:
            assert add(pools, base).prepare_request(request).url == asked
        except requests.exceptions.MissingSchema:
            # What begins with // names a host, as requests has it; it asks for a scheme.
            assert given == "//other/x"
        assert request.url == given


def test_every_wait_is_bounded_by_default(echo: EchoUpstream, proxy_to: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where None is passed, as SDKs do; unbounded only where it is asked for in so many words."""
    seen: list[Any] = []
    original = requests.adapters.HTTPAdapter.send

    def spy(self: Any, request: Any, stream: Any, timeout: Any, *args: Any) -> Any:
        seen.append(timeout)
        return original(self, request, stream, timeout, *args)

    monkeypatch.setattr(requests.adapters.HTTPAdapter, "send", spy)
    with WorkerPools() as pools:
        api = add(pools, echo.url)
        api.get("/echo/x")
        api.get("/echo/x", timeout=None)
        api.get("/echo/x", timeout=7)
        api.get("/echo/x", timeout=(None, None))
        api.send(api.prepare_request(requests.Request("GET", "/echo/x")))
    assert seen == [DEFAULT_TIMEOUT, DEFAULT_TIMEOUT, 7, (None, None), DEFAULT_TIMEOUT]
    proxy: TcpProxy = proxy_to(echo)
    proxy.blackhole()
    with WorkerPools() as pools, pytest.raises(requests.ReadTimeout) as caught:
        add(pools, f"http://127.0.0.1:{proxy.port}", timeout=(3.0, 0.2)).get("/echo/x")
    assert caught.value.__notes__ == ["workerpools: GET by the resource 'api' to 127.0.0.1"]


@pytest.mark.parametrize(
    ("execution_pool", "options", "limit"),
    [
        (ExecutionPool("prefork", 1), {"base_url": "http://h"}, 10),
        (ExecutionPool("threads", 50), {"base_url": "http://h"}, 50),
        (ExecutionPool("threads", 50), {"base_url": "http://h", "pool_maxsize": 3}, 3),
        (ExecutionPool("threads", 20), {"pool_connections": 4}, 80),
    ],
)
def test_sizes_follow_the_execution_pool(execution_pool: ExecutionPool, options: Any, limit: int) -> None:
    """Never unbounded, and never fewer than run at a time; without a base URL for each server."""
    opening = Opening("api", execution_pool)
    with RequestsSession(**options).open(opening):
        assert opening._meter.limit == limit


def test_what_is_counted(echo: EchoUpstream, tls_echo: TlsProxy) -> None:
    """As the server saw it, over TCP and over TLS."""
    for scheme in ("http", "https"):
        url = echo.url if scheme == "http" else f"https://localhost:{tls_echo.port}"
        before = echo.accepted
        with counted_pools() as pools:
            api = add(pools, url, pool_maxsize=3, verify=tls_echo.client_context())
            for number in range(5):
                api.get(f"/echo/{number}")
            with api.get("/stream?n=3", stream=True) as response:
                now = stats(pools, "api")
                assert (now.open, now.in_use, now.idle, now.limit) == (1, 1, 0, 3)
                assert response.text
            now = stats(pools, "api")
            assert (now.kind, now.open, now.in_use, now.idle, now.pending) == ("http", 1, 0, 1, 0)
            assert (now.value("opened"), now.value("reused")) == (echo.accepted - before, 5)
            assert [now.histogram(name).count for name in ("acquire_wait", "create_time", "use_time")] == [6, 1, 6]
            pools.close()
            assert closed(pools, "api") == {"shutdown": 1}
            assert stats(pools, "api").histogram("open_time").count == 1


def test_a_connection_that_ends_with_its_response() -> None:
    """urllib3 gives it up with the head; it is open, and a child's to discard, until the body has been read."""
    with socket.create_server(("127.0.0.1", 0)) as listener, counted_pools() as pools:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 4\r\n\r\nbo")
                read.wait(10)
                connection.sendall(b"dy")

        read = threading.Event()
        thread = threading.Thread(target=serve)
        thread.start()
        response = add(pools, f"http://127.0.0.1:{listener.getsockname()[1]}").get("/x", stream=True)
        now = stats(pools, "api")
        assert (now.open, now.in_use, closed(pools, "api")) == (1, 1, {})
        (opening,) = [each.opening for each in pools.resources[0]._holder._held()]
        assert len(opening.descriptors.filenos()) == 1
        read.set()
        assert response.text == "body"
        thread.join(10)
        now = stats(pools, "api")
        assert (now.open, now.in_use, closed(pools, "api")) == (0, 0, {"other": 1})


@pytest.mark.parametrize(
    ("reason", "options"),
    [("lifetime", {"max_lifetime": 0.0}), ("idle", {"max_idle": 0.02}), ("stale", {}), ("recycled", {})],
)
def test_why_a_connection_is_replaced(echo: EchoUpstream, reason: str, options: Any) -> None:
    """Before it is used again, so that no request fails."""
    with counted_pools() as pools:
        api = add(pools, echo.url, **options)
        api.get("/echo/x")
        time.sleep(0.05)
        if reason == "stale":
            echo.close_idle()
            echo.wait_for_open(0)
        elif reason == "recycled":
            pools.recycle()
        assert api.post("/orders").ok
        assert closed(pools, "api")[reason] >= 1
        assert set(closed(pools, "api")) == {reason}
        assert (stats(pools, "api").value("failures"), echo.orders) == (0, 1)
        eventually(lambda: echo.open_connections() == stats(pools, "api").open)


def test_connections_that_fewer_requests_need_are_closed(echo: EchoUpstream) -> None:
    """Not only where one is taken: the newest is taken first."""
    with counted_pools() as pools:
        api = add(pools, echo.url, max_idle=0.2)
        for response in [api.get("/stream?n=2", stream=True) for _ in range(4)]:
            assert response.text
        assert echo.open_connections() == 4
        begun = time.monotonic()
        while time.monotonic() - begun < 0.3:
            api.get("/echo/x")
            time.sleep(0.02)
        assert closed(pools, "api") == {"idle": 3}
        echo.wait_for_open(1)


def test_streaming_load_survives_replacements(echo: EchoUpstream) -> None:
    """Six threads stream while connections reach their age and are recycled: no failure, and none left behind."""
    with counted_pools() as pools:
        api = add(pools, echo.url, max_lifetime=0.1, max_lifetime_jitter=0.5, pool_maxsize=4)
        until = time.monotonic() + 1.5

        def stream(_: int) -> int:
            done = 0
            while time.monotonic() < until:
                with api.get("/stream?n=20", stream=True) as response:
                    assert list(response.iter_lines()) == [f"chunk {number}".encode() for number in range(20)]
                done += 1
            return done

        with ThreadPoolExecutor(6) as threads:
            work = [threads.submit(stream, n) for n in range(6)]
            time.sleep(0.5)
            pools.recycle()
            assert sum(each.result(30) for each in work) > 50
        assert echo.accepted > 20
        assert echo.open_connections() <= 4
        assert stats(pools, "api").value("failures") == 0
        pools.close()
        echo.wait_for_open(0)


def test_tls_is_verified_and_its_context_is_built_once(tls_echo: TlsProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the authorities of certifi by default; in the parent, and not for each connection."""
    url = f"https://localhost:{tls_echo.port}"
    built: list[int] = []
    from workerpools.requests import _tls

    original = _tls.create_urllib3_context
    monkeypatch.setattr(_tls, "create_urllib3_context", lambda: built.append(1) or original())
    adapter = RequestsSession(url, trust_env=False, max_lifetime=0.0)
    adapter.prepare()
    with WorkerPools() as pools:
        api = pools.add(adapter, name="api").get()
        for _ in range(3):
            with pytest.raises(requests.exceptions.SSLError) as caught:
                api.post("/orders")
        failure = classify(caught.value)
        assert failure is not None
        assert (failure.kind, failure.phase.value, built) == (FailureKind.PERMANENT, "connect", [1])
        assert api.get("/echo/x", verify=False).text == "x"
        trusting = pools.add(RequestsSession(url, verify=tls_echo.client_context()), name="y").get()
        assert trusting.get("/echo/hello").text == "hello"


def test_a_rotated_certificate_is_picked_up(echo: EchoUpstream, tmp_path: Any, caplog: Any) -> None:
    """By the next request, without a restart; files that are wrong for a moment do no harm."""
    file = tmp_path / "ca.pem"
    servers = [TlsProxy(echo.host, echo.port), TlsProxy(echo.host, echo.port)]
    try:
        file.write_bytes(Path(servers[0].ca_file).read_bytes())
        with WorkerPools() as pools:
            api = add(pools, verify=file)
            assert api.get(f"https://localhost:{servers[0].port}/echo/x").text == "x"
            file.write_text("half of it")
            assert api.get(f"https://localhost:{servers[0].port}/echo/x").text == "x"
            assert "the former ones stay in use" in caplog.text
            file.write_bytes(Path(servers[1].ca_file).read_bytes())
            assert api.get(f"https://localhost:{servers[1].port}/echo/x").text == "x"
            with pytest.raises(requests.exceptions.SSLError):
                api.get(f"https://localhost:{servers[0].port}/echo/x")
    finally:
        for server in servers:
            server.close()


@pytest.mark.parametrize(
    ("environment", "options", "proxied"),
    [
        ({"HTTP_PROXY": "proxy"}, {}, True),
        ({"ALL_PROXY": "proxy"}, {}, True),
        ({"Http_Proxy": "proxy"}, {}, True),
        ({"HTTP_PROXY": "proxy", "NO_PROXY": "127.0.0.1"}, {}, False),
        ({"HTTP_PROXY": "proxy"}, {"trust_env": False}, False),
        ({}, {"proxies": "proxy"}, True),
    ],
)
def test_proxies(
    echo: EchoUpstream,
    proxy_to: Any,
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    options: Any,
    proxied: bool,
) -> None:
    """As requests honours them, and the connections to them are counted and watched as any."""
    proxy: TcpProxy = proxy_to(echo)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value.replace("proxy", f"http://127.0.0.1:{proxy.port}"))
    if "proxies" in options:
        options = {"proxies": {"http": f"http://127.0.0.1:{proxy.port}"}}
    with counted_pools() as pools:
        api = add(pools, **{"trust_env": True, **options})
        assert api.get(f"{echo.url}/status").status_code in (200, 404)
        assert (proxy.accepted > 0) is proxied
        assert stats(pools, "api").open == 1
        pools.close()
        assert closed(pools, "api") == {"shutdown": 1}


def test_an_environment_that_names_a_proxy_later(
    echo: EchoUpstream, proxy_to: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each request looks for one, and as long as none is named reads no value; certificates are looked for as ever."""
    proxy: TcpProxy = proxy_to(echo)
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    read: list[str] = []
    real = requests.utils.should_bypass_proxies
    monkeypatch.setattr(requests.utils, "should_bypass_proxies", lambda url, **kw: read.append(url) or real(url, **kw))
    with counted_pools() as pools:
        api = add(pools, trust_env=True)
        for named in (False, True):
            if named:
                monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.port}")
            assert api.get(f"{echo.url}/echo/x").text == "x"
            assert (proxy.accepted > 0) is named
        monkeypatch.delenv("http_proxy")
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/no/such/file")
        with pytest.raises(FileNotFoundError):
            api.get("https://127.0.0.1:1/")
    assert read == ["", f"{echo.url}/echo/x", ""]


def test_a_proxy_that_wants_other_credentials() -> None:
    """Nothing of the request has left, and trying again does not help."""
    with socket.create_server(("127.0.0.1", 0)) as listener, WorkerPools() as pools:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n")

        thread = threading.Thread(target=serve)
        thread.start()
        proxy = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(requests.exceptions.ProxyError) as caught:
            add(pools, "https://api.example.com", proxies={"https": proxy}).post("/orders")
        thread.join(10)
    failure = classify(caught.value)
    assert failure is not None
    assert (failure.kind, failure.sent.value) == (FailureKind.PERMANENT, "nothing")


def test_sockets_have_keepalives(echo: EchoUpstream) -> None:
    """The kernel notices a peer that is gone; and urllib3's own option is kept."""
    with WorkerPools() as pools, add(pools, echo.url).get("/stream?n=2", stream=True) as response:
        connection: Any = response.raw._connection.sock
        assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1


def test_credentials_are_asked_for_each_request(echo: EchoUpstream) -> None:
    """As basic authentication or as a bearer token; never beside ``auth``."""
    answers: Any = iter([("app", "first"), "token-1", "token-2"])
    with WorkerPools() as pools:
        api = add(pools, echo.url, credentials=lambda: next(answers))
        sent = [api.get("/echo/x").request.headers["Authorization"] for _ in range(3)]
    assert sent == [_basic_auth_str("app", "first"), "Bearer token-1", "Bearer token-2"]


def test_closing_waits_for_requests_in_flight(echo: EchoUpstream) -> None:
    """A request that was sent before the close gets its answer; and not for ever."""
    with WorkerPools() as pools:
        resource = pools.add(RequestsSession(echo.url), name="api")
        session = resource.get()
        answers: list[str] = []
        thread = threading.Thread(target=lambda: answers.append(session.get("/echo/late?delay=0.4").text))
        thread.start()
        eventually(lambda: len(echo.requests()) == 1)
        resource.close(timeout=10)
        thread.join()
        assert answers == ["late"]
        echo.wait_for_open(0)
        with resource.get().get("/stream?n=3", stream=True):
            begun = time.monotonic()
            resource.close(timeout=0.2)
            assert 0.2 <= time.monotonic() - begun < 5


@pytest.mark.parametrize("how", ["with", "close"])
def test_a_session_that_a_body_closes_is_replaced(echo: EchoUpstream, how: str, caplog: Any) -> None:
    """It is the process's: who uses it next gets one that works, and the log says whose doing it was."""
    with WorkerPools() as pools:
        resource = pools.add(RequestsSession(echo.url), name="api")
        first = resource.get()
        if how == "with":
            with resource.get() as session:
                assert session.get("/echo/1").status_code == 200
        else:
            resource.get().get("/echo/1")
            resource.get().close()
        assert not resource.is_open
        assert resource.get() is not first
        assert resource.get().get("/echo/2").status_code == 200
        (line,) = [record.getMessage() for record in caplog.records if record.name == "workerpools"]
        assert "closed by its user" in line
        assert echo.accepted == 2


def test_a_response_that_is_read_after_its_run_says_so(shop: RequestsShop, echo: EchoUpstream) -> None:
    """It was closed with the run, as a leak; nothing is worse than an empty body."""
    shop.add_session(echo.url)
    kept: list[requests.Response] = []
    for path in ("/stream?n=5", "/echo/x"):
        shop.run(lambda api: kept.append(api.get(path, stream=True)))  # noqa: B023
    for response in kept:
        with pytest.raises(requests.exceptions.ChunkedEncodingError, match="closed at the end of its task's run"):
            response.text  # noqa: B018


def test_errors_of_others_are_told_apart(echo: EchoUpstream) -> None:
    """What is wrong with a request, or with what was received, is no failure of a connection."""
    with counted_pools() as pools:
        api = add(pools, echo.url)
        for call in (
            lambda: api.get("ftp://h/x"),
            lambda: api.get("/x", headers={"A": "a\r\nb"}),
            lambda: api.get("/x", timeout="soon"),
            lambda: api.get("/echo/x").json(),
        ):
            with pytest.raises(ValueError) as caught:
                call()
            assert classify(caught.value) is None
        now = stats(pools, "api")
        assert (now.value("failures"), now.in_use, now.pending) == (0, 0, 0)


def test_a_missing_file_is_named(echo: EchoUpstream) -> None:
    with WorkerPools() as pools, pytest.raises(OSError, match=r"nowhere\.pem|No such file"):
        add(pools, "https://localhost:1", verify="nowhere.pem").get("/x")
    with pytest.raises(ConfigurationError, match="either auth= or credentials="):
        RequestsSession(auth=("a", "b"), credentials=lambda: "x")
