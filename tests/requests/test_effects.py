"""What has left on the wire: no request that may have been executed is sent twice, unless it may be."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests
import requests_mock
import responses
import vcr
from requests.adapters import BaseAdapter, HTTPAdapter
from requests.auth import AuthBase, HTTPDigestAuth

from tests.requests.conftest import RequestsShop
from tests.stats.counting import stats
from tests.support.proxy import TcpProxy
from tests.support.upstream import EchoUpstream
from workerpools import FailureKind, RetryPolicy, classify
from workerpools.events import EventKind

ONCE = RetryPolicy(max_retries=0)


def kind_of(error: BaseException) -> FailureKind | None:
    failure = classify(error)
    return None if failure is None else failure.kind


def attempts(shop: RequestsShop, body: Callable[[requests.Session], Any], **options: Any) -> tuple[Any, list[str], int]:
    """Return what a body came to, the effects of its last run, and how often it ran."""
    effects: list[str] = []
    runs: list[int] = []

    @shop.task(**options)
    def task(self: Any) -> Any:
        runs.append(1)
        try:
            return body(self.api)
        finally:
            effects[:] = [str(effect) for effect in self.effects]

    try:
        return task.apply().get(), effects, len(runs)
    except Exception as error:
        return error, effects, len(runs)


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_lost_answer(echo: EchoUpstream, tls_echo: Any, proxy_to: Any, scheme: str) -> None:
    """Over a kept connection: the server has executed the request. It is sent again only where that is harmless."""
    found: dict[str, Any] = {}
    for method in ("GET", "PUT", "POST with a key", "POST", "PATCH", "POST with an empty key"):
        proxy: TcpProxy = proxy_to(echo if scheme == "http" else tls_echo)
        with closing(RequestsShop()) as shop:
            api = shop.add_session(f"{scheme}://localhost:{proxy.port}", verify=tls_echo.client_context()).get()
            api.get("/echo/warm")
            proxy.cut_when(lambda chunk: True, "to_server", "fin", deliver=True, scope="open")
            echo.clear()
            verb, _, key = method.partition(" ")
            headers = {} if not key else {"Idempotency-Key": "" if "empty" in key else "k-1"}
            came, effects, runs = attempts(shop, lambda api: api.request(verb, "/echo/x", headers=headers).status_code)  # noqa: B023
            found[method] = (came if came == 200 else kind_of(came), effects, runs, len(echo.requests()))
    assert found == {
        **dict.fromkeys(("GET", "PUT", "POST with a key"), (200, [], 1, 2)),
        **dict.fromkeys(("POST", "POST with an empty key"), (FailureKind.INDETERMINATE, ["POST by 'api'"], 1, 1)),
        "PATCH": (FailureKind.INDETERMINATE, ["PATCH by 'api'"], 1, 1),
    }


def test_a_post_before_a_failure_forbids_a_replay(shop: RequestsShop, echo: EchoUpstream, proxy_to: Any) -> None:
    """The failure is of another request, whose body could run again: the order would be placed twice."""
    proxy: TcpProxy = proxy_to(echo)
    shop.add_session(f"http://127.0.0.1:{proxy.port}")

    def body(api: requests.Session) -> None:
        api.post("/orders")
        proxy.stop()
        proxy.close_all()
        api.get("/echo/x")

    came, effects, runs = attempts(shop, body)
    assert (kind_of(came), effects, runs, echo.orders) == (FailureKind.UNAVAILABLE, ["POST by 'api'"], 1, 1)
    assert any("POST by 'api' had left already" in note for note in came.__notes__)


def test_a_post_that_has_not_left_is_no_effect(shop: RequestsShop) -> None:
    """Nobody listens: it goes back to the broker, or is tried again."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    shop.add_session(f"http://127.0.0.1:{port}")
    came, effects, _ = attempts(shop, lambda api: api.post("/orders"), replay=ONCE)
    assert type(came) is requests.ConnectionError
    assert (kind_of(came), effects) == (FailureKind.UNAVAILABLE, [])


def test_a_request_is_sent_again_by_the_session(shop: RequestsShop, echo: EchoUpstream, proxy_to: Any) -> None:
    """Once, over a new connection, and the other idle ones are given up; not with a body that is read once."""
    proxy: TcpProxy = proxy_to(echo)
    resource = shop.add_session(f"http://127.0.0.1:{proxy.port}")
    api = resource.get()
    for response in [api.get("/stream?n=2", stream=True) for _ in range(3)]:
        response.close() if response.status_code != 200 else response.content
    assert proxy.accepted == 3
    proxy.cut_after(0, "to_server", "fin", scope="open")
    came, effects, runs = attempts(shop, lambda api: api.put("/echo/x", data="content").status_code)
    assert (came, effects, runs) == (200, [], 1)
    assert [event.kind for event in shop.events].count(EventKind.REQUEST_REPLAYED) == 1
    assert proxy.accepted == 4
    proxy.wait_for(open=1)
    api.get("/echo/warm")
    proxy.cut_after(0, "to_server", "fin", scope="open")
    once = iter([b"content"])
    with pytest.raises(requests.ConnectionError) as caught:
        api.put("/echo/x", data=once)
    assert kind_of(caught.value) is FailureKind.STALE


def test_a_head_that_is_cut_is_no_response(shop: RequestsShop) -> None:
    """http.client takes what has come for the whole: a 200 without a body, of which nobody would know."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        shop.add_session(f"http://127.0.0.1:{listener.getsockname()[1]}")

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(b"HTTP/1.1 200 OK\r\nX-Total: 7\r\nContent-Le")

        thread = threading.Thread(target=serve)
        thread.start()
        came, effects, _ = attempts(shop, lambda api: api.post("/orders").text)
        thread.join(10)
    assert type(came) is requests.ConnectionError
    assert (kind_of(came), effects) == (FailureKind.INDETERMINATE, ["POST by 'api'"])


def test_informational_heads_are_not_the_response(shop: RequestsShop) -> None:
    """http.client takes any but 100 for it, and the real one for that of the next request."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        resource = shop.add_session(f"http://127.0.0.1:{listener.getsockname()[1]}")

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                for answer in (b"first", b"other"):
                    connection.recv(65536)
                    hints = b"HTTP/1.1 103 Early Hints\r\nLink: <x>\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n"
                    connection.sendall(hints + b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n" + answer)

        thread = threading.Thread(target=serve)
        thread.start()
        api = resource.get()
        assert [(r.status_code, r.text) for r in (api.get("/"), api.get("/"))] == [(200, "first"), (200, "other")]
        thread.join(10)


@pytest.mark.parametrize(
    ("status", "method", "kind"),
    [
        (429, "POST", FailureKind.UNAVAILABLE),
        (503, "GET", FailureKind.UNAVAILABLE),
        (502, "GET", FailureKind.UNAVAILABLE),
        (504, "POST", FailureKind.INDETERMINATE),
        (407, "GET", FailureKind.PERMANENT),
        (404, "GET", None),
    ],
)
def test_a_status_is_classified_if_the_body_raises_it(
    shop: RequestsShop, echo: EchoUpstream, status: int, method: str, kind: FailureKind | None
) -> None:
    """As for httpx; of another session than ours it is nobody's failure."""
    shop.add_session(echo.url)
    came, _, _ = attempts(
        shop, lambda api: api.request(method, f"/echo/x?status={status}").raise_for_status(), replay=ONCE
    )
    assert isinstance(came, requests.HTTPError)
    assert kind_of(came) is kind
    foreign, _, _ = attempts(shop, lambda api: requests.get(f"{echo.url}/x?status={status}").raise_for_status())
    assert not any("Not run again: " in note for note in getattr(foreign, "__notes__", ()))


class Token(AuthBase):
    """Asks for a token with each request, by the session itself."""

    def __init__(self) -> None:
        self.session: requests.Session | None = None

    def __call__(self, request: Any) -> Any:
        if "/token" not in request.url:
            assert self.session is not None
            request.headers["Authorization"] = f"Bearer {self.session.post('/token').status_code}"
        return request


def test_a_request_for_a_token_is_no_effect(shop: RequestsShop, echo: EchoUpstream) -> None:
    """The body's own request is."""
    token = Token()
    token.session = shop.add_session(echo.url, auth=token).get()
    came, effects, _ = attempts(shop, lambda api: api.get("/echo/x").text)
    assert (came, effects) == ("x", [])
    assert [request.method for request in echo.requests()] == ["POST", "GET"]
    _, effects, _ = attempts(shop, lambda api: api.post("/orders").text)
    assert effects == ["POST by 'api'"]


def test_what_an_upload_asks_meanwhile(shop: RequestsShop, echo: EchoUpstream) -> None:
    """A body that is an iterator may send requests of its own: each is followed by itself."""
    shop.add_session(echo.url)

    def body(api: requests.Session) -> str:
        def content() -> Iterator[bytes]:
            yield api.get("/echo/inner").content
            yield b" and more"

        return api.post("/orders", data=content()).text

    came, effects, _ = attempts(shop, body)
    assert "order" in came
    assert effects == ["POST by 'api'"]
    assert [request.body for request in echo.requests() if request.method == "POST"] == ["inner and more"]


# Mocks, and adapters of users: what is not heard is not known to be nothing.


@contextmanager
def with_responses(answer: Any) -> Iterator[dict[str, Any]]:
    with responses.RequestsMock(assert_all_requests_are_fired=False) as mock:
        for method in ("GET", "POST"):
            mock.add(method, "http://api.example.com/orders", body=answer)
        yield {}


@contextmanager
def with_requests_mock(answer: Any) -> Iterator[dict[str, Any]]:
    with requests_mock.Mocker() as mock:
        given = {"exc": answer} if isinstance(answer, Exception) else {"text": answer}
        mock.request(requests_mock.ANY, "http://api.example.com/orders", **given)
        yield {}


class Own(BaseAdapter):
    """An adapter that somebody has mounted."""

    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.answer = answer

    def send(self, request: Any, *args: Any, **options: Any) -> requests.Response:
        if isinstance(self.answer, Exception):
            raise self.answer
        response = requests.Response()
        response.status_code, response._content, response.request = 200, self.answer.encode(), request
        return response

    def close(self) -> None:
        """Close nothing."""


@contextmanager
def with_own_adapter(answer: Any) -> Iterator[dict[str, Any]]:
    yield {"on_open": lambda session: session.mount("http://api.example.com", Own(answer))}


STANDS_IN: dict[str, Any] = {
    "responses": with_responses,
    "requests-mock": with_requests_mock,
    "a mounted adapter": with_own_adapter,
}


@pytest.mark.parametrize("name", STANDS_IN)
def test_a_stand_in_says_what_a_server_would(name: str) -> None:
    """A lost POST may have been executed; a refused one was not, but is counted as sent all the same; a POST that was
    answered has happened."""
    found: dict[tuple[str, str], tuple[object, list[str]]] = {}
    answers = {"lost": requests.ConnectionError("lost"), "refused": requests.ConnectTimeout("refused"), "done": "done"}
    for what, answer in answers.items():
        for method in ("POST", "GET"):
            with STANDS_IN[name](answer) as options, closing(RequestsShop()) as shop:
                shop.add_session("http://api.example.com", **options)
                came, effects, _ = attempts(shop, lambda api: api.request(method, "/orders").text, replay=False)  # noqa: B023
                found[what, method] = (kind_of(came) if isinstance(came, Exception) else came, effects)
    post = ["POST by 'api'"]
    assert found == {
        ("lost", "POST"): (FailureKind.INDETERMINATE, post),
        ("lost", "GET"): (FailureKind.INDETERMINATE, []),
        ("refused", "POST"): (FailureKind.UNAVAILABLE, post),
        ("refused", "GET"): (FailureKind.UNAVAILABLE, []),
        ("done", "POST"): ("done", post),
        ("done", "GET"): ("done", []),
    }


def test_vcrpy(shop: RequestsShop, echo: EchoUpstream, tmp_path: Path) -> None:
    """It takes the place of the connections: what is recorded goes over the network, what is played back does not."""
    resource = shop.add_session(echo.url)
    assert resource.get().get("/echo/x").text == "x"
    played = []
    for _ in range(2):
        with vcr.use_cassette(str(tmp_path / "cassette.yaml")) as cassette:
            came, effects, _ = attempts(shop, lambda api: api.post("/orders").text)
            assert ("order" in came, effects) == (True, ["POST by 'api'"])
            played.append(cassette.play_count)
    assert (played, echo.orders) == ([0, 1], 1)
    assert resource.get().get("/echo/x").text == "x"
    assert stats(shop.pools, "api").in_use == 0


def test_a_mounted_network_adapter_is_not_watched(shop: RequestsShop, echo: EchoUpstream) -> None:
    """Its silence proves nothing, and its connections are its own."""
    shop.add_session(echo.url, on_open=lambda session: session.mount("http://", HTTPAdapter(max_retries=3)))
    came, effects, runs = attempts(shop, lambda api: api.post("/orders?close=fin"))
    assert (kind_of(came), effects, runs, echo.orders) == (FailureKind.INDETERMINATE, ["POST by 'api'"], 1, 1)


def test_an_authentication_that_answers_a_challenge(shop: RequestsShop, echo: EchoUpstream) -> None:
    """It is sent by the adapter itself, from a hook."""
    shop.add_session(echo.url, auth=HTTPDigestAuth("me", "pw"))
    came, effects, _ = attempts(shop, lambda api: api.post("/orders?status=401").status_code)
    assert (came, effects) == (401, ["POST by 'api'"])
