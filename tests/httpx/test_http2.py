"""HTTP/2: what a server refused is sent again, a wait for a stream is bounded, and a child connects anew."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import httpx
import pytest
from celery.exceptions import SoftTimeLimitExceeded

from tests.stats.counting import counted_pools, stats
from tests.support.forking import run_in_fork
from tests.support.h2server import H2Server
from tests.support.inspect import socket_inodes
from tests.support.shop import Shop
from workerpools import Resource, WorkerPools
from workerpools.adapter import failure_of
from workerpools.httpx import HttpxClient


@pytest.fixture
def server() -> Iterator[H2Server]:
    with H2Server() as made:
        yield made


@pytest.fixture
def single() -> Iterator[H2Server]:
    """A server that takes one stream at a time."""
    with H2Server(streams=1) as made:
        yield made


@pytest.fixture
def shop() -> Iterator[Shop]:
    with closing(Shop()) as made:
        yield made


def options(server: H2Server, **more: Any) -> dict[str, Any]:
    return {"http2": True, "verify": server.client_context, "trust_env": False, **more}


def client_of(pools: WorkerPools, server: H2Server, **more: Any) -> Resource[httpx.Client]:
    return pools.add(HttpxClient(base_url=server.url, **options(server, **more)), name="api")


#: A path; how often a POST and a GET are executed; whether the body gets an answer to them.
CASES: dict[str, tuple[tuple[int, bool], tuple[int, bool]]] = {
    # Not processed, says the server: everything is sent again.
    "/goaway/1/unseen": ((1, True), (1, True)),
    "/goaway/1/none": ((1, True), (1, True)),
    "/refused/1": ((1, True), (1, True)),
    # Perhaps processed: what is idempotent is sent again.
    "/goaway/1/seen": ((1, False), (2, True)),
    "/reset/1": ((1, False), (2, True)),
}


@pytest.mark.parametrize("method", ["POST", "GET"])
@pytest.mark.parametrize("path", CASES)
def test_a_stream_that_the_server_ended(shop: Shop, server: H2Server, path: str, method: str) -> None:
    executed, answered = CASES[path][method == "GET"]
    api = shop.add_api(server.url, **options(server)).get()
    assert api.get("/ok").http_version == "HTTP/2"
    runs: list[int] = []

    @shop.task()
    def body(self: Any) -> str:
        runs.append(1)
        # JSON is sent after the head, in a frame of its own.
        text: str = self.api.request(method, path, json=None if method == "GET" else {"cents": 100}).text
        return text

    result = body.apply()
    assert [seen.method for seen in server.seen if seen.path == path] == [method] * executed
    assert len(runs) == 1
    if answered:
        assert result.get() == "ok"
    else:
        with pytest.raises(httpx.RemoteProtocolError) as caught:
            result.get()
        failure = failure_of(caught.value)
        assert failure is not None
        assert failure.kind == "indeterminate"
    assert api.get("/ok").text == "ok"


@pytest.mark.parametrize("path", ["/refused/9", "/goaway/9/none"])
def test_a_refusal_over_a_new_connection_is_no_effect(shop: Shop, server: H2Server, path: str) -> None:
    """As with a connection that is refused: the task may run again."""
    api = shop.add_api(server.url, **options(server)).get()
    with pytest.raises(httpx.RemoteProtocolError) as caught:
        api.post(path, json={})
    failure = failure_of(caught.value)
    assert failure is not None
    assert (failure.kind, failure.known) == ("unavailable", "the server did not process the request, as it says")
    # An error while another one is handled tells of its own request alone.
    try:
        api.post(path, json={})
    except httpx.RemoteProtocolError:
        with pytest.raises(httpx.RemoteProtocolError) as caught:
            api.post("/reset/1", json={})
    failure = failure_of(caught.value)
    assert (failure and failure.kind) == "indeterminate"
    assert [seen.path for seen in server.seen] == ["/reset/1"]


def test_a_response_that_goaway_cuts_off_is_not_asked_for_again(shop: Shop, server: H2Server) -> None:
    """The server had answered another request's stream; the one in progress is lost with its connection."""
    api = shop.add_api(server.url, **options(server)).get()
    with api.stream("POST", "/body", json={}) as response:
        assert api.get("/goaway/1/seen").text == "ok"
        with pytest.raises(httpx.RemoteProtocolError) as caught:
            response.read()
    failure = failure_of(caught.value)
    assert failure is not None
    assert failure.kind == "indeterminate"


def test_requests_share_a_connection(server: H2Server) -> None:
    """`in_use` counts requests, `open` connections."""
    with counted_pools() as pools, ThreadPoolExecutor(3) as threads:
        api = client_of(pools, server).get()
        api.get("/ok")
        held = [threads.submit(api.get, "/held") for _ in range(3)]
        for _ in held:
            assert server.held.acquire(timeout=10)
        now = stats(pools, "api")
        assert (now.open, now.in_use, server.connections, server.most) == (1, 3, 1, 3)
        server.let_go.set()
        assert [each.result().text for each in held] == ["ok"] * 3
        now = stats(pools, "api")
        assert (now.open, now.in_use, now.value("opened"), now.value("reused")) == (1, 0, 1, 3)


@pytest.mark.parametrize("limit", ["pool timeout", "deadline"])
def test_a_wait_for_a_stream_is_bounded(single: H2Server, shop: Shop, limit: str) -> None:
    """It is one for a connection: nothing was sent, and the response whose stream it is goes on.

    httpcore would wait for ever: the thread waits for itself.
    """
    pool = 0.3 if limit == "pool timeout" else 20.0
    shop.add_api(single.url, **options(single, timeout=httpx.Timeout(20.0, pool=pool)))
    begun = time.monotonic()

    @shop.task(soft_time_limit=1 if limit == "deadline" else None)
    def body(self: Any) -> None:
        with self.api.stream("GET", "/body") as response:
            with pytest.raises(httpx.PoolTimeout) as caught:
                self.api.post("/ok", json={})
            assert time.monotonic() - begun < 4.0
            single.let_go.set()
            if limit == "pool timeout":
                assert response.read() == b"ok"
        raise caught.value

    with pytest.raises((httpx.PoolTimeout, SoftTimeLimitExceeded)) as caught:
        body.apply(throw=True)
    failure = failure_of(caught.value)
    assert (failure and failure.kind) == ("pool_exhausted" if limit == "pool timeout" else None)
    assert [seen.method for seen in single.seen] == ["GET"]


@pytest.mark.parametrize("streams", [1, None])
def test_streams_are_taken_in_turn(shop: Shop, streams: int | None) -> None:
    """From the first request on, before the server has told its limit; one that tells none has one for httpcore."""
    together = threading.Barrier(8)
    with H2Server(streams=streams) as peer, ThreadPoolExecutor(8) as threads:
        api = shop.add_api(peer.url, **options(peer)).get()

        def ask(number: int) -> str:
            together.wait()
            return api.get(f"/ok/{number}").text

        assert list(threads.map(ask, range(8))) == ["ok"] * 8
        assert (peer.connections, peer.most) == (1, 1)


@pytest.mark.parametrize("what", ["http/1.1", "many streams"])
def test_where_there_is_no_such_limit_nobody_waits(shop: Shop, what: str) -> None:
    with H2Server(http2=what != "http/1.1") as peer:
        api = shop.add_api(peer.url, **options(peer, timeout=httpx.Timeout(5.0, pool=0.5))).get()
        api.get("/ok")
        with api.stream("GET", "/body"), api.stream("GET", "/body"):
            assert api.get("/ok").text == "ok"


def test_a_child_has_a_connection_of_its_own(server: H2Server) -> None:
    """A stream of the parent's is in progress at the fork."""
    before = socket_inodes()
    with counted_pools() as pools:
        resource = client_of(pools, server)
        with resource.get().stream("GET", "/body") as response:
            own = socket_inodes() - before

            def child() -> tuple[str, set[int]]:
                return resource.get().get("/ok").text, socket_inodes()

            text, inherited = run_in_fork(child)
            assert text == "ok"
            assert not inherited & own
            server.let_go.set()
            assert response.read() == b"ok"
        assert resource.get().get("/ok").text == "ok"
        assert {seen.path: seen.connection for seen in server.seen} == {"/body": 1, "/ok": 1}
        assert [seen.connection for seen in server.seen] == [1, 2, 1]
