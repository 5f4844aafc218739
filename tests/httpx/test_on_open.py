"""on_open of a client; and hooks of the live one, which a fork loses."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.support.forking import run_in_fork
from tests.support.upstream import EchoUpstream
from workerpools import WorkerPools
from workerpools.httpx import HttpxClient


@pytest.fixture
def pools() -> Iterator[WorkerPools]:
    with WorkerPools() as made:
        yield made


def test_hooks_of_on_open_are_in_every_process(pools: WorkerPools, echo: EchoUpstream) -> None:
    """They see each request."""
    seen: list[str] = []

    def prepare(client: httpx.Client) -> None:
        client.event_hooks["request"].append(lambda request: seen.append(request.url.path))

    resource = pools.add(HttpxClient(base_url=echo.url, on_open=prepare), name="api")

    def use() -> list[str]:
        resource.get().get("/echo/1").raise_for_status()
        return seen

    assert use() == ["/echo/1"]
    seen.clear()
    assert run_in_fork(use) == ["/echo/1"]


def test_a_client_that_cannot_be_prepared_is_closed(pools: WorkerPools, echo: EchoUpstream) -> None:
    """The next use opens another."""
    clients: list[httpx.Client] = []

    def prepare(client: httpx.Client) -> None:
        client.get("/echo/1").raise_for_status()
        clients.append(client)
        if len(clients) == 1:
            raise ValueError("mine")

    resource = pools.add(HttpxClient(base_url=echo.url, on_open=prepare), name="api")
    with pytest.raises(ValueError, match="mine") as caught:
        resource.get()
    assert any("'api'" in note for note in caught.value.__notes__)
    assert clients[0].is_closed
    assert resource.get() is clients[1]
    assert not clients[1].is_closed
    assert [row.open for row in pools.stats().totals()] == [1]


def warnings_in_child(pools: WorkerPools, resource: Any, caplog: pytest.LogCaptureFixture) -> list[str]:
    def child() -> list[str]:
        resource.get()
        return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]

    return run_in_fork(child)


def test_what_was_changed_on_the_live_client_is_missed(
    pools: WorkerPools, echo: EchoUpstream, caplog: pytest.LogCaptureFixture
) -> None:
    """Hooks, headers, authentication, and a transport's method that instrumentation replaced; no value is shown."""
    resource = pools.add(HttpxClient(base_url=echo.url), name="api")
    client = resource.get()
    client.event_hooks["response"].append(lambda response: None)
    client.headers["Authorization"] = "s3cret"
    client.auth = ("user", "s3cret")
    transport: Any = client._transport
    transport.handle_request = transport.handle_request
    (warning,) = warnings_in_child(pools, resource, caplog)
    assert "s3cret" not in warning
    assert "(event_hooks['response'], headers, auth, handle_request of a transport)" in warning
    assert "HttpxClient(on_open=…)" in warning


def test_a_client_that_was_only_used_is_not_warned_of(
    pools: WorkerPools, echo: EchoUpstream, caplog: pytest.LogCaptureFixture
) -> None:
    """Cookies of responses are no loss of the user's, nor are hooks of the declaration."""
    hooks = {"request": [lambda request: None], "response": []}
    resource = pools.add(HttpxClient(base_url=echo.url, event_hooks=hooks, auth=("a", "b")), name="api")
    resource.get().get("/echo/1").raise_for_status()
    resource.get().cookies.set("session", "1")
    assert warnings_in_child(pools, resource, caplog) == []
