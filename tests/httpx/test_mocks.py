"""A request of which nothing was heard is not known to be unsent: mocks, and transports that report no step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import respx
import vcr
from pytest_httpx import HTTPXMock

from tests.support.shop import Shop
from tests.support.upstream import EchoUpstream
from workerpools import FailureKind, WorkerPools, classify
from workerpools.httpx import HttpxClient

URL = "http://api.example.com"

#: What a stand-in does with each request: raises an error, or returns a response.
Answer = Callable[[httpx.Request], httpx.Response]


def lost(request: httpx.Request) -> httpx.Response:
    raise httpx.ReadError("lost", request=request)


def refused(request: httpx.Request) -> httpx.Response:
    raise httpx.ConnectError("refused", request=request)


def done(request: httpx.Request) -> httpx.Response:
    return httpx.Response(200, text="done")


@contextmanager
def with_respx(answer: Answer) -> Iterator[dict[str, Any]]:
    with respx.mock() as router:
        router.route().mock(side_effect=answer)
        yield {}


@contextmanager
def with_respx_at_httpx(answer: Answer) -> Iterator[dict[str, Any]]:
    with respx.mock(using="httpx") as router:
        router.route().mock(side_effect=answer)
        yield {}


@contextmanager
def with_mock_transport(answer: Answer) -> Iterator[dict[str, Any]]:
    yield {"transport": httpx.MockTransport(answer)}


@contextmanager
def with_function(answer: Answer) -> Iterator[dict[str, Any]]:
    yield {"transport": lambda: httpx.MockTransport(answer)}


STANDS_IN: dict[str, Callable[[Answer], AbstractContextManager[dict[str, Any]]]] = {
    "respx": with_respx,
    "respx at httpx": with_respx_at_httpx,
    "MockTransport": with_mock_transport,
    "a function that makes one": with_function,
}


@pytest.fixture
def shop() -> Iterator[Shop]:
    with closing(Shop()) as made:
        yield made


def run(shop: Shop, method: str) -> tuple[Any, list[str], int]:
    """Return what a task's request came to, the effects of its last run, and how often the task ran."""
    effects: list[str] = []
    runs: list[int] = []

    @shop.task(replay=False)
    def body(self: Any) -> str:
        runs.append(1)
        try:
            return str(self.api.request(method, "/orders").text)
        finally:
            effects[:] = [str(effect) for effect in self.effects]

    try:
        return body.apply().get(), effects, len(runs)
    except Exception as error:
        return error, effects, len(runs)


def kind_of(error: Any) -> FailureKind | None:
    failure = classify(error)
    return None if failure is None else failure.kind


@pytest.mark.parametrize("name", STANDS_IN)
def test_a_stand_in_says_what_a_server_would(shop: Shop, name: str) -> None:
    """A lost POST may have been executed; a refused one was not, but is counted as sent all the same; a POST that was
    answered has happened."""
    found: dict[tuple[str, str], tuple[object, list[str]]] = {}
    for answer in (lost, refused, done):
        for method in ("POST", "GET"):
            with STANDS_IN[name](answer) as options, closing(Shop()) as shop:
                shop.add_api(URL, **options)
                came, effects, _ = run(shop, method)
                found[answer.__name__, method] = (kind_of(came) if isinstance(came, Exception) else came, effects)
    post = ["POST by 'api'"]
    assert found == {
        ("lost", "POST"): (FailureKind.INDETERMINATE, post),
        ("lost", "GET"): (FailureKind.INDETERMINATE, []),
        ("refused", "POST"): (FailureKind.UNAVAILABLE, post),
        ("refused", "GET"): (FailureKind.UNAVAILABLE, []),
        ("done", "POST"): ("done", post),
        ("done", "GET"): ("done", []),
    }


def test_pytest_httpx(shop: Shop, httpx_mock: HTTPXMock) -> None:
    """It stands in the place of the network transport."""
    shop.add_api(URL)
    httpx_mock.add_response(text="done")
    assert run(shop, "POST") == ("done", ["POST by 'api'"], 1)
    httpx_mock.add_exception(httpx.ReadError("lost"))
    came, effects, _ = run(shop, "POST")
    assert (kind_of(came), effects) == (FailureKind.INDETERMINATE, ["POST by 'api'"])


def test_vcrpy(shop: Shop, echo: EchoUpstream, tmp_path: Path) -> None:
    """What is recorded goes over the network, what is played back does not; either is a POST that has happened."""
    shop.add_api(echo.url)
    played = []
    for _ in range(2):
        with vcr.use_cassette(str(tmp_path / "cassette.yaml")) as cassette:
            came, effects, _ = run(shop, "POST")
            assert ("order" in came, effects) == (True, ["POST by 'api'"])
            played.append(cassette.play_count)
    assert (played, echo.orders) == ([0, 1], 1)


class Retrying(httpx.BaseTransport):
    """Tries again by itself, as people's transports do; the second try is refused."""

    def __init__(self, refusing: int) -> None:
        self._inner = httpx.HTTPTransport()
        self._refusing = refusing

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        try:
            return self._inner.handle_request(request)
        except httpx.TransportError:
            request.url = request.url.copy_with(port=self._refusing)
            return self._inner.handle_request(request)


def test_a_try_of_the_transports_own_is_not_forgotten(echo: EchoUpstream) -> None:
    """Its last try was refused, but an earlier one was read by the server."""
    with ExitStack() as stack:
        pools = stack.enter_context(WorkerPools())
        api = pools.add(HttpxClient(base_url=echo.url, transport=lambda: Retrying(1)), name="api").get()
        with pytest.raises(httpx.ConnectError) as caught:
            api.post("/orders?close=fin")
    assert kind_of(caught.value) is FailureKind.INDETERMINATE
    assert echo.orders == 1
