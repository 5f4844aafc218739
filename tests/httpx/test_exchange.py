"""An exchange ends in time, however busy the peer keeps it: by the task's deadline, or by ``total_timeout``."""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import httpx
import pytest
import trustme
from celery.exceptions import SoftTimeLimitExceeded

from tests.support.shop import Shop
from tests.support.trickle import ANSWERS, Trickle
from workerpools import ConfigurationError, DeadlineExceeded
from workerpools.events import EventKind
from workerpools.httpx import HttpxClient

#: More than the kernel's buffers take.
_MEGABYTES = b"x" * 40_000_000


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module", params=["plain", "tls"])
def peer(request: pytest.FixtureRequest, authority: trustme.CA) -> Iterator[Trickle]:
    context = None
    if request.param == "tls":
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("127.0.0.1").configure_cert(context)
    with Trickle(context) as server:
        yield server


@pytest.fixture(scope="module")
def plain() -> Iterator[Trickle]:
    with Trickle() as server:
        yield server


@pytest.fixture
def shop() -> Iterator[Shop]:
    with closing(Shop()) as made:
        yield made


def trusting(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


def ask(client: httpx.Client, path: str) -> httpx.Response:
    return client.post(path, content=_MEGABYTES) if path == "/upload" else client.get(path)


def at_once(function: Callable[[str], None]) -> None:
    """Call a function with every path, each in a thread of its own."""
    paths = [*ANSWERS, "/upload"]
    with ThreadPoolExecutor(len(paths)) as threads:
        for each in [threads.submit(function, path) for path in paths]:
            each.result()


@pytest.mark.parametrize("kept", [False, True], ids=["new connection", "kept connection"])
def test_total_timeout_bounds_an_exchange(shop: Shop, peer: Trickle, authority: trustme.CA, kept: bool) -> None:
    """No wait of it is long: httpx's own timeouts never strike. The error is a timeout all the same."""
    options = {"base_url": peer.url, "verify": trusting(authority), "trust_env": False}

    def exchange(path: str) -> None:
        api = shop.pools.add(HttpxClient(total_timeout=1.0, **options), name=path).get()
        if kept:
            assert api.get("/ok").text == "ok"
        begun = time.monotonic()
        with pytest.raises(httpx.TimeoutException, match=r"total_timeout=1 s had passed") as caught:
            ask(api, path)
        assert time.monotonic() - begun < 4.0
        assert type(caught.value) is (httpx.WriteTimeout if path == "/upload" else httpx.ReadTimeout), path
        # The connection was given up, and nothing else.
        assert api.get("/ok").text == "ok"

    at_once(exchange)


def test_the_deadline_bounds_an_exchange(shop: Shop, plain: Trickle) -> None:
    """It is the task's own limit that is reported, and nothing runs again."""
    shop.add_api(plain.url, trust_env=False)
    runs: list[str] = []

    @shop.task(soft_time_limit=1)
    def body(self: Any, path: str) -> None:
        runs.append(path)
        ask(self.api, path)

    def exchange(path: str) -> None:
        begun = time.monotonic()
        with pytest.raises((SoftTimeLimitExceeded, DeadlineExceeded)) as caught:
            body.apply((path,)).get()
        assert time.monotonic() - begun < 4.0
        # A body whose pieces arrive is looked at with each of them.
        assert isinstance(caught.value, DeadlineExceeded) or isinstance(caught.value.__cause__, httpx.TimeoutException)

    # Here, and not by the first of the threads while the others use it.
    shop.app.finalize()
    at_once(exchange)
    assert sorted(runs) == sorted([*ANSWERS, "/upload"])


def test_a_proxy_that_trickles_its_answer_to_connect(shop: Shop) -> None:
    """Nothing of the request has left: the server cannot have acted on it."""
    with Trickle() as proxy:
        api = shop.add_api("https://api.example.com", proxy=proxy.url, total_timeout=0.4).get()
        with pytest.raises(httpx.ConnectTimeout):
            api.post("/orders")


def test_a_stream_that_is_read_slowly_counts_as_the_exchange(shop: Shop, peer: Trickle, authority: trustme.CA) -> None:
    """Also where each chunk was there in time."""
    api = shop.add_api(peer.url, total_timeout=0.8, verify=trusting(authority), trust_env=False).get()
    begun = time.monotonic()
    with api.stream("GET", "/length") as response, pytest.raises(httpx.ReadTimeout):
        for _ in response.iter_raw():
            time.sleep(0.01)
    assert time.monotonic() - begun < 2.0


def test_a_connection_is_no_longer_watched_after_its_response(shop: Shop) -> None:
    """The next exchange over it has a time of its own, and an idle connection none."""
    with Trickle() as peer:
        api = shop.add_api(peer.url, total_timeout=0.8).get()
        for _ in range(2):
            assert api.get("/ok").text == "ok"
            time.sleep(0.5)
        assert api.get("/ok").text == "ok"
        opened = [event for event in shop.events if event.kind is EventKind.CONNECTION_OPENED]
        assert len(opened) == 1


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), "5", True, 604801])
def test_a_wrong_total_timeout_is_refused(value: Any) -> None:
    with pytest.raises(ConfigurationError, match="HttpxClient: total_timeout="):
        HttpxClient(total_timeout=value)
