"""An exchange ends in time, however busy the peer keeps it: by the task's deadline, or by ``total_timeout``."""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import requests
import trustme
from celery.exceptions import SoftTimeLimitExceeded

from tests.requests.conftest import RequestsShop
from tests.support.trickle import ANSWERS, Trickle
from tests.support.upstream import EchoUpstream
from workerpools import DeadlineExceeded, FailureKind, classify
from workerpools.events import EventKind

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


def trusting(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


def ask(session: requests.Session, path: str) -> requests.Response:
    return session.post(path, data=_MEGABYTES) if path == "/upload" else session.get(path)


def at_once(function: Callable[[str], None]) -> None:
    """Call a function with every path, each in a thread of its own."""
    paths = [*ANSWERS, "/upload"]
    with ThreadPoolExecutor(len(paths)) as threads:
        for each in [threads.submit(function, path) for path in paths]:
            each.result()


@pytest.mark.parametrize("kept", [False, True], ids=["new connection", "kept connection"])
def test_total_timeout_bounds_an_exchange(shop: RequestsShop, peer: Trickle, authority: trustme.CA, kept: bool) -> None:
    """No wait of it is long: requests' own timeouts never strike. The error is a timeout all the same."""
    api = shop.add_session(peer.url, total_timeout=1.0, verify=trusting(authority)).get()
    if kept:
        responses = [api.get("/ok", stream=True) for _ in (*ANSWERS, "/upload")]
        assert {response.text for response in responses} == {"ok"}

    def exchange(path: str) -> None:
        begun = time.monotonic()
        with pytest.raises(requests.RequestException) as caught:
            ask(api, path)
        assert time.monotonic() - begun < 4.0
        failure = classify(caught.value)
        # requests has no exception of its own for what is not written, nor for a body that is not read in time.
        in_head = path in ("/head", "/informational")
        assert type(caught.value) is (requests.ReadTimeout if in_head else requests.ConnectionError), path
        if in_head or path == "/upload":
            assert failure is not None
            assert (failure.kind, failure.timed_out) == (FailureKind.INDETERMINATE, True)
            assert "workerpools: total_timeout=1 s had passed" in caught.value.__notes__

    at_once(exchange)
    # The connections were given up, and nothing else.
    assert api.get("/ok").text == "ok"


def test_the_deadline_bounds_an_exchange(shop: RequestsShop) -> None:
    """It is the task's own limit that is reported, and nothing runs again."""
    runs: list[str] = []
    with Trickle() as peer:
        shop.add_session(peer.url)

        @shop.task(soft_time_limit=1)
        def body(self: Any, path: str) -> None:
            runs.append(path)
            ask(self.api, path)

        def exchange(path: str) -> None:
            begun = time.monotonic()
            with pytest.raises((SoftTimeLimitExceeded, DeadlineExceeded)):
                body.apply((path,)).get()
            assert time.monotonic() - begun < 4.0

        at_once(exchange)
    assert sorted(runs) == sorted([*ANSWERS, "/upload"])


def test_a_proxy_that_trickles_its_answer_to_connect(shop: RequestsShop) -> None:
    """Nothing of the request has left: the server cannot have acted on it."""
    with Trickle() as proxy:
        api = shop.add_session("https://api.example.com", proxies={"https": proxy.url}, total_timeout=0.4).get()
        with pytest.raises(requests.Timeout) as caught:
            api.post("/orders")
    failure = classify(caught.value)
    assert failure is not None
    assert (failure.kind, failure.timed_out) == (FailureKind.UNAVAILABLE, True)


def test_a_stream_that_is_read_slowly_counts_as_the_exchange(
    shop: RequestsShop, peer: Trickle, authority: trustme.CA
) -> None:
    """Also where each chunk was there in time."""
    api = shop.add_session(peer.url, total_timeout=0.8, verify=trusting(authority)).get()
    begun = time.monotonic()
    with pytest.raises(requests.ConnectionError, match="Read timed out"):
        for _ in api.get("/length", stream=True).iter_content(1):
            time.sleep(0.01)
    assert time.monotonic() - begun < 2.0


def test_a_connection_is_no_longer_watched_after_its_response(shop: RequestsShop) -> None:
    """The next exchange over it has a time of its own, and an idle connection none."""
    with Trickle() as peer:
        api = shop.add_session(peer.url, total_timeout=0.8).get()
        for _ in range(2):
            assert api.get("/ok").text == "ok"
            time.sleep(0.5)
        assert api.get("/ok").text == "ok"
    assert [event.kind for event in shop.events].count(EventKind.CONNECTION_OPENED) == 1


@pytest.mark.parametrize("bound", ["acquire_timeout", "the call's timeout", "total_timeout", "deadline"])
def test_the_wait_for_a_connection_is_bounded(shop: RequestsShop, echo: EchoUpstream, bound: str) -> None:
    """requests passes no timeout for it: with ``pool_block=True`` it waits for as long as the others take."""
    options: dict[str, dict[str, Any]] = {
        "acquire_timeout": {"acquire_timeout": 0.3},
        "the call's timeout": {"acquire_timeout": 0.3, "timeout": 0.1},
        "total_timeout": {"total_timeout": 0.3},
        "deadline": {"acquire_timeout": None},
    }
    resource = shop.add_session(echo.url, pool_maxsize=1, **options[bound])
    runs: list[int] = []

    def body(api: requests.Session) -> None:
        runs.append(1)
        api.post("/orders")

    held = resource.get().get("/stream?n=5", stream=True)
    begun = time.monotonic()
    if bound == "deadline":
        with pytest.raises(SoftTimeLimitExceeded):
            shop.run(body, soft_time_limit=1)
    else:
        with pytest.raises(requests.ConnectTimeout) as caught:
            shop.run(body)
        failure = classify(caught.value)
        assert failure is not None
        assert failure.kind is FailureKind.POOL_EXHAUSTED
    assert 0.2 < time.monotonic() - begun < 1.5
    if bound == "total_timeout":
        # Its own time is over, too.
        held.close()
    else:
        assert held.text.startswith("chunk 0")
    assert (runs, echo.orders, echo.accepted) == ([1], 0, 1)
    assert resource.get().get("/echo/x").text == "x"


def test_waiting_requests_have_their_turns(shop: RequestsShop, echo: EchoUpstream) -> None:
    """Many threads, two connections: each is served, and none waits longer than the ones before it take."""
    api = shop.add_session(echo.url, pool_maxsize=2, acquire_timeout=10.0).get()
    begun = time.monotonic()
    with ThreadPoolExecutor(16) as threads:
        answers = list(threads.map(lambda n: api.get(f"/echo/{n}?delay=0.02").text, range(100)))
    assert answers == [str(n) for n in range(100)]
    assert time.monotonic() - begun < 5.0
    assert echo.accepted == 2
