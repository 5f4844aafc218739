"""The requests of an ``httpx.Auth``: one for a token is no work of the body, and several threads do not ask twice."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import httpx
import pytest

from tests.support.shop import Shop
from tests.support.upstream import EchoUpstream
from workerpools import FailureKind, classify

Flow = Generator[httpx.Request, httpx.Response, None]


@pytest.fixture
def shop() -> Iterator[Shop]:
    with closing(Shop()) as made:
        yield made


class Token(httpx.Auth):
    """Client credentials, as people write them."""

    requires_response_body = True

    def __init__(self, url: str) -> None:
        self.url = url
        self.token = ""

    def auth_flow(self, request: httpx.Request) -> Flow:
        if not self.token:
            answer = yield httpx.Request("POST", self.url)
            self.token = answer.text
        request.headers["Authorization"] = f"Bearer {self.token}"
        answer = yield request
        if answer.status_code == 401:
            self.token = (yield httpx.Request("POST", self.url)).text
            yield request


class Rebuilding(httpx.Auth):
    """Sends the body's request as another object."""

    def auth_flow(self, request: httpx.Request) -> Flow:
        signed = request.url.copy_merge_params({"signature": "1"})
        yield httpx.Request(request.method, signed, headers=request.headers, stream=request.stream)


class Standing(httpx.Auth):
    """Sends another request in the place of the body's."""

    def auth_flow(self, request: httpx.Request) -> Flow:
        yield httpx.Request("POST", request.url.copy_with(path="/echo/gateway"))


def run(shop: Shop, method: str, path: str) -> tuple[object, list[str]]:
    """Return the kind of the failure of a task's request, or its status, and the effects."""
    found: list[Any] = []

    @shop.task(replay=False)
    def body(self: Any) -> None:
        try:
            found.append(int(self.api.request(method, path).raise_for_status().status_code))
        except httpx.HTTPError as error:
            failure = classify(error)
            found.append(failure and failure.kind)
        found.append([str(effect) for effect in self.effects])

    body.apply().get()
    return found[0], found[1]


POST = ["POST by 'api'"]

CASES: list[tuple[Any, str, str, str, object, list[str]]] = [
    # The auth, the token's URL, the body's request, and what became of it.
    (Token, "/echo/token", "GET", "/echo/x", 200, []),
    (Token, "/echo/token", "GET", "/echo/x?status=503", FailureKind.UNAVAILABLE, []),
    (Token, "/echo/token", "POST", "/orders", 200, POST),
    (Token, "/echo/token", "GET", "/echo/x?status=401", None, []),
    (Token, "/echo/token?close=fin", "POST", "/orders", FailureKind.UNAVAILABLE, []),
    (Token, "/echo/token", "POST", "/orders?close=fin", FailureKind.INDETERMINATE, POST),
    (lambda url: Rebuilding(), "", "POST", "/orders", 200, POST),
    (lambda url: Standing(), "", "POST", "/orders", 200, POST),
    (lambda url: ("user", "secret"), "", "POST", "/orders", 200, POST),
    (lambda url: httpx.DigestAuth("user", "secret"), "", "POST", "/orders", 200, POST),
]


def test_what_an_auth_flow_sends(shop: Shop, echo: EchoUpstream) -> None:
    """Its own requests are no effect, and where they fail nothing of the body's has left; the body's are one."""
    for auth, token, method, path, came, effects in CASES:
        with closing(Shop()) as one:
            one.add_api(echo.url, auth=auth(echo.url + token))
            assert run(one, method, path) == (came, effects), (auth, token, path)


def test_an_auth_of_one_request(shop: Shop, echo: EchoUpstream) -> None:
    """Given with the request, it is followed, too."""
    shop.add_api(echo.url)
    effects: list[str] = []

    @shop.task()
    def body(self: Any) -> None:
        self.api.get("/echo/x", auth=Token(f"{echo.url}/echo/token"))
        effects.extend(map(str, self.effects))

    body.apply().get()
    assert (effects, [request.method for request in echo.requests()]) == ([], ["POST", "GET"])


def test_threads_share_one_token(shop: Shop, echo: EchoUpstream) -> None:
    """The first asks; the others wait for it, and only for it."""
    api = shop.add_api(echo.url, auth=Token(f"{echo.url}/echo/token?delay=0.3"))
    with ThreadPoolExecutor(6) as threads:
        answers = list(threads.map(lambda number: api.get().get(f"/echo/{number}").text, range(6)))
    assert answers == [str(number) for number in range(6)]
    assert sum(request.path == "/echo/token" for request in echo.requests()) == 1
