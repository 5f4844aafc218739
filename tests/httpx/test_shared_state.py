"""One client serves many tasks: what one of them changes on it, or is sent as cookies, is not the next one's."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import httpx
import pytest

from tests.support.shop import Shop
from workerpools import ConfigurationError
from workerpools.httpx import HttpxClient


def answer(request: httpx.Request) -> httpx.Response:
    headers = {"Set-Cookie": f"session={request.url.path.rpartition('/')[2]}; Path=/"}
    return httpx.Response(200, json=dict(request.headers), headers=headers if "login" in request.url.path else {})


@pytest.fixture
def shop() -> Iterator[Shop]:
    with closing(Shop()) as made:
        yield made


def add(shop: Shop, **options: Any) -> None:
    shop.add_api("http://api.example.com", transport=lambda: httpx.MockTransport(answer), **options)


def run(shop: Shop, body: Callable[[httpx.Client], Any]) -> Any:
    @shop.task()
    def task(self: Any) -> Any:
        return body(self.api)

    return task.apply().get()


def sent(client: httpx.Client) -> Any:
    return client.get("/me").json()


@pytest.mark.parametrize(
    ("options", "own", "next_one", "outside"),
    [
        ({}, "session=acme", None, None),
        ({"cookies": "attempt"}, "session=acme", None, None),
        ({"cookies": "process"}, "session=acme", "session=acme", "session=acme"),
        ({"cookies": "off"}, None, None, None),
        ({"cookies": {"plan": "free"}}, "plan=free; session=acme", "plan=free", "plan=free"),
    ],
)
def test_how_long_cookies_are_kept(
    shop: Shop, options: Any, own: str | None, next_one: str | None, outside: str | None
) -> None:
    add(shop, **options)

    def login(client: httpx.Client) -> Any:
        client.post("/login/acme")
        return sent(client).get("cookie")

    assert run(shop, login) == own
    assert run(shop, sent).get("cookie") == next_one
    assert sent(shop.api.get()).get("cookie") == outside


def test_cookies_outside_of_tasks_are_kept(shop: Shop) -> None:
    """As by any client, and they are every task's."""
    add(shop)
    shop.api.get().post("/login/script")
    assert sent(shop.api.get())["cookie"] == "session=script"
    assert run(shop, sent)["cookie"] == "session=script"


def test_a_replay_begins_without_cookies(shop: Shop) -> None:
    """It is another attempt."""
    add(shop)
    found: list[Any] = []

    @shop.task(idempotent=True)
    def body(self: Any) -> None:
        found.append(sent(self.api).get("cookie"))
        self.api.post("/login/acme")
        if len(found) == 1:
            raise self.retry(countdown=0)

    body.apply().get()
    assert found == [None, None]


CHANGES: dict[str, Callable[[httpx.Client], object]] = {
    "headers": lambda client: client.headers.update({"Authorization": "Bearer of-acme"}),
    "timeout": lambda client: setattr(client, "timeout", 0.5),
    "auth": lambda client: setattr(client, "auth", ("acme", "secret")),
    "base_url": lambda client: setattr(client, "base_url", "http://acme.example.com"),
    "params": lambda client: setattr(client, "params", {"tenant": "acme"}),
    "follow_redirects": lambda client: setattr(client, "follow_redirects", True),
    "max_redirects": lambda client: setattr(client, "max_redirects", 1),
    "event_hooks": lambda client: client.event_hooks["request"].append(print),
}


def defaults(client: httpx.Client) -> dict[str, Any]:
    found = {name: getattr(client, name) for name in CHANGES}
    return {
        **found,
        "headers": dict(client.headers),
        "event_hooks": {k: list(v) for k, v in client.event_hooks.items()},
    }


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_default_ends_with_the_run(shop: Shop, name: str, caplog: pytest.LogCaptureFixture) -> None:
    """It counts in the run, also with no request in it, and one line says what to write instead; once."""
    add(shop)
    before = run(shop, defaults)

    def change(client: httpx.Client) -> dict[str, Any]:
        CHANGES[name](client)
        return defaults(client)

    changed = run(shop, change)
    assert [each for each in before if changed[each] != before[each]] == [name]
    assert run(shop, defaults) == before == defaults(shop.api.get())
    run(shop, change)
    lines = [record.getMessage() for record in caplog.records if record.name == "workerpools"]
    assert len(lines) == 1
    assert repr(name) in lines[0]
    assert "secret" not in lines[0]


def test_a_changed_default_is_not_seen_by_another_thread(shop: Shop) -> None:
    """Of another task that runs at the same time."""
    add(shop)
    changed, looked = threading.Event(), threading.Event()
    found: list[Any] = []

    def change(client: httpx.Client) -> None:
        client.headers["Authorization"] = "Bearer of-acme"
        client.post("/login/acme")
        changed.set()
        assert looked.wait(10)

    thread = threading.Thread(target=run, args=(shop, change))
    thread.start()
    assert changed.wait(10)
    found.append(run(shop, sent))
    looked.set()
    thread.join(10)
    assert "authorization" not in found[0]
    assert "cookie" not in found[0]


def test_what_on_open_sets_is_every_tasks(shop: Shop, caplog: pytest.LogCaptureFixture) -> None:
    """Also where the first task's use opens the client."""
    add(shop, on_open=lambda client: client.headers.update({"X-Process": "1"}))
    assert run(shop, sent)["x-process"] == run(shop, sent)["x-process"] == "1"
    assert caplog.records == []


@pytest.mark.parametrize("value", ["", "Attempt", "none"])
def test_other_words_are_refused(value: str) -> None:
    with pytest.raises(ConfigurationError, match="wanted one of attempt, process, off"):
        HttpxClient(cookies=value)
