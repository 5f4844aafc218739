"""One session serves many tasks: what one of them changes on it, or is sent as cookies, is not the next one's."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import requests
from requests.adapters import HTTPAdapter

from tests.requests.conftest import RequestsShop


class Answers(BaseHTTPRequestHandler):
    """Answers with the headers that it was sent, and logs in whoever asks for it."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        # Names as they came, one a line.
        content = "".join(f"{name.lower()}: {value}\n" for name, value in self.headers.items()).encode()
        self.send_response(200)
        if "/login/" in self.path:
            self.send_header("Set-Cookie", f"session={self.path.rpartition('/')[2]}; Path=/")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: Any) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def sent(session: requests.Session) -> dict[str, str]:
    lines = session.get("/me").text.splitlines()
    return dict(line.split(": ", 1) for line in lines)


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
    shop: RequestsShop, url: str, options: Any, own: str | None, next_one: str | None, outside: str | None
) -> None:
    resource = shop.add_session(url, **options)

    def login(session: requests.Session) -> Any:
        session.get("/login/acme")
        return sent(session).get("cookie")

    assert shop.run(login) == own
    assert shop.run(sent).get("cookie") == next_one
    assert sent(resource.get()).get("cookie") == outside


def test_cookies_outside_of_tasks_are_kept(shop: RequestsShop, url: str) -> None:
    """As by any session, and they are every task's."""
    resource = shop.add_session(url)
    resource.get().get("/login/script")
    assert sent(resource.get())["cookie"] == "session=script"
    assert shop.run(sent)["cookie"] == "session=script"


CHANGES: dict[str, Callable[[requests.Session], object]] = {
    "headers": lambda session: session.headers.update({"Authorization": "Bearer secret"}),
    "auth": lambda session: setattr(session, "auth", ("acme", "secret")),
    "params": lambda session: setattr(session, "params", {"tenant": "secret"}),
    "proxies": lambda session: session.proxies.update(https="http://secret:3128"),
    "hooks": lambda session: session.hooks["response"].append(print),
    "verify": lambda session: setattr(session, "verify", False),
    "cert": lambda session: setattr(session, "cert", "secret.pem"),
    "stream": lambda session: setattr(session, "stream", True),
    "max_redirects": lambda session: setattr(session, "max_redirects", 1),
    "trust_env": lambda session: setattr(session, "trust_env", True),
    "adapters": lambda session: session.mount("https://acme.example.com", HTTPAdapter()),
    "base_url": lambda session: setattr(session, "base_url", "http://acme.example.com"),
    "timeout": lambda session: setattr(session, "timeout", 0.5),
}


def defaults(session: requests.Session) -> dict[str, Any]:
    found = {name: getattr(session, name) for name in CHANGES}
    copies = {name: dict(found[name]) for name in ("headers", "params", "proxies", "adapters")}
    return {**found, **copies, "hooks": {name: list(each) for name, each in session.hooks.items()}}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_default_ends_with_the_run(
    shop: RequestsShop, url: str, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It counts in the run, and one line says what to write instead; once, and without the value."""
    resource = shop.add_session(url)
    before = shop.run(defaults)

    def change(session: requests.Session) -> dict[str, Any]:
        CHANGES[name](session)
        return defaults(session)

    changed = shop.run(change)
    assert [each for each in before if changed[each] != before[each]] == [name]
    assert shop.run(defaults) == before == defaults(resource.get())
    shop.run(change)
    lines = [record.getMessage() for record in caplog.records if record.name == "workerpools"]
    assert len(lines) == 1
    assert repr(name) in lines[0]
    assert "secret" not in lines[0]


def test_another_task_at_the_same_time_sees_no_change(shop: RequestsShop, url: str) -> None:
    """In another thread."""
    shop.add_session(url)
    changed, looked = threading.Event(), threading.Event()

    def change(session: requests.Session) -> None:
        session.headers["Authorization"] = "Bearer of-acme"
        session.get("/login/acme")
        changed.set()
        assert looked.wait(10)

    thread = threading.Thread(target=shop.run, args=(change,))
    thread.start()
    assert changed.wait(10)
    found = shop.run(sent)
    looked.set()
    thread.join(10)
    assert not {"authorization", "cookie"} & found.keys()


def test_what_on_open_sets_is_every_tasks(shop: RequestsShop, url: str, caplog: pytest.LogCaptureFixture) -> None:
    """Also where the first task's use opens the session."""
    shop.add_session(url, on_open=lambda session: session.headers.update({"X-Process": "1"}))
    assert shop.run(sent)["x-process"] == shop.run(sent)["x-process"] == "1"
    assert caplog.records == []
