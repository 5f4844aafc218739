"""HTTP connections: replaced when they reach their age, under load, without a failed request; bounded by deadlines."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import httpx
import pytest
from celery.exceptions import SoftTimeLimitExceeded

from tests.support.shop import NUMBERS, Shop
from tests.support.upstream import EchoUpstream
from workerpools import ConfigurationError, DeadlineExceeded, PooledTask, WorkerPools
from workerpools.httpx import HttpxClient


@pytest.fixture
def pools() -> Iterator[WorkerPools]:
    with closing(Shop()) as shop:
        yield shop.pools


def test_streaming_load_survives_rotations(pools: WorkerPools, echo: EchoUpstream) -> None:
    """Six threads stream while the connections reach their age over and over: no failure, and none left behind."""
    api = pools.add(HttpxClient(base_url=echo.url, max_lifetime=0.15, max_lifetime_jitter=0.5), name="api").get()
    failures: list[BaseException] = []
    done: list[int] = []
    until = time.monotonic() + 3.0

    def stream() -> None:
        try:
            while time.monotonic() < until:
                with api.stream("GET", "/stream", params={"n": "20"}) as response:
                    assert list(response.iter_lines()) == [f"chunk {number}" for number in range(20)]
                done.append(1)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=stream) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failures == []
    assert len(done) > 50
    # About twenty generations of up to six connections.
    assert echo.accepted > 20
    # The last ones live; every older one was closed with its last response.
    assert echo.open_connections() <= 6
    pools.close()
    echo.wait_for_open(0)


def test_traffic_follows_a_name_within_the_lifetime(pools: WorkerPools, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name moves to another server: no request fails, and within the lifetime all of them arrive there."""
    with EchoUpstream() as old, EchoUpstream() as new:
        target = {"port": old.port}
        original = socket.getaddrinfo

        def resolve(host: Any, port: Any, *args: Any, **kwargs: Any) -> Any:
            # A resolver that knows one name more; the address it gives is the server's of the moment.
            if host == "api.test":
                return original("127.0.0.1", target["port"], *args, **kwargs)
            return original(host, port, *args, **kwargs)

        monkeypatch.setattr(socket, "getaddrinfo", resolve)
        api = pools.add(HttpxClient(base_url="http://api.test:80", max_lifetime=0.5), name="api").get()
        for number in range(3):
            assert api.get(f"/echo/{number}").text == str(number)
        target["port"] = new.port
        moved = time.monotonic()
        while not new.requests():
            assert api.get("/echo/x").text == "x"
            assert time.monotonic() - moved < 2
            time.sleep(0.02)
        before = len(old.requests())
        assert api.get("/echo/y").text == "y"
        assert len(old.requests()) == before


def test_without_a_lifetime_a_connection_is_kept(pools: WorkerPools, echo: EchoUpstream) -> None:
    """None is for ever."""
    api = pools.add(HttpxClient(base_url=echo.url, max_lifetime=None), name="api").get()
    for _ in range(5):
        api.get("/echo/x")
        time.sleep(0.05)
    assert echo.accepted == 1


def test_credentials_are_asked_for(pools: WorkerPools, echo: EchoUpstream) -> None:
    """For each request, as basic authentication or as a bearer token; never beside ``auth``."""
    answers: Iterator[Any] = iter([("app", "first"), "token-1", "token-2"])
    adapter = HttpxClient(base_url=echo.url, credentials=lambda: next(answers))
    api = pools.add(adapter, name="api").get()
    sent = [api.send(api.build_request("GET", "/echo/x")).request.headers["authorization"] for _ in range(3)]
    assert sent == ["Basic YXBwOmZpcnN0", "Bearer token-1", "Bearer token-2"]
    with pytest.raises(ConfigurationError, match="credentials"):
        HttpxClient(auth=("a", "b"), credentials=lambda: "x")


def task_of(pools: WorkerPools, body: Any, **options: Any) -> Any:
    (app,) = pools._apps
    api = next(resource for resource in pools.resources if resource.name == "api")
    base = type("Base", (PooledTask,), {"abstract": True, "api": api})
    return app.task(base=base, bind=True, name=f"task{next(NUMBERS)}", shared=False, **options)(body)


def test_a_silent_server_is_given_up_at_the_deadline(pools: WorkerPools, echo: EchoUpstream, proxy_to: Any) -> None:
    """Not after the client's own ten seconds; reported as the task's limit."""
    proxy = proxy_to(echo)
    pools.add(HttpxClient(base_url=f"http://127.0.0.1:{proxy.port}"), name="api")
    proxy.blackhole()
    runs: list[int] = []

    def body(self: Any) -> None:
        runs.append(1)
        self.api.get("/echo/x")

    started = time.monotonic()
    with pytest.raises(SoftTimeLimitExceeded) as caught:
        task_of(pools, body, soft_time_limit=1).apply().get()
    assert time.monotonic() - started < 2
    assert isinstance(caught.value.__cause__, httpx.ReadTimeout)
    assert runs == [1]


def test_a_response_that_trickles_in_is_given_up_at_the_deadline(pools: WorkerPools, echo: EchoUpstream) -> None:
    """Each read is in time; the whole is not."""
    pools.add(HttpxClient(base_url=echo.url), name="api")

    def body(self: Any) -> None:
        with self.api.stream("GET", "/stream", params={"n": "100000"}) as response:
            for _ in response.iter_lines():
                time.sleep(0.01)

    started = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        task_of(pools, body, soft_time_limit=1).apply().get()
    assert time.monotonic() - started < 3


def test_a_request_whose_body_outlasts_the_deadline_is_reported_as_the_limit(
    pools: WorkerPools, echo: EchoUpstream
) -> None:
    """The deadline comes between two waits: the next one is over at once, and is a time-out like any other."""
    pools.add(HttpxClient(base_url=echo.url), name="api")

    def parts() -> Iterator[bytes]:
        yield b"one"
        time.sleep(1.1)
        yield b"two"

    def body(self: Any) -> None:
        self.api.post("/echo/x?delay=5", content=parts())

    with pytest.raises(SoftTimeLimitExceeded) as caught:
        task_of(pools, body, soft_time_limit=1).apply().get()
    assert isinstance(caught.value.__cause__, httpx.WriteTimeout)


def test_a_request_is_not_begun_after_the_deadline(pools: WorkerPools, echo: EchoUpstream) -> None:
    """Nothing is sent; a task without a limit is not concerned."""
    pools.add(HttpxClient(base_url=echo.url), name="api")

    def body(self: Any) -> str:
        time.sleep(1.1)
        return str(self.api.post("/orders").status_code)

    with pytest.raises(DeadlineExceeded, match="POST by the resource 'api' was not sent"):
        task_of(pools, body, soft_time_limit=1).apply().get()
    assert echo.requests() == []
    assert task_of(pools, body).apply().get() == "200"
