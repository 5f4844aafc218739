"""The page's head room: what the servers allow, asked for by a person, in Flower's own process."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import psycopg2
import pytest
from tornado.web import create_signed_value

from tests.flower.fake import FakeWorkers, process, resource, told, worker_stats
from tests.flower.test_page import NewFlower, opened
from tests.support.browser import Browser
from tests.support.flower import FlowerProcess
from tests.support.stand import SHOP, Stand, wait_until
from tests.worker.test_budget_command import ENGINES, most
from tests.worker.test_budget_command import told as of_the_command

pytestmark = [pytest.mark.worker, pytest.mark.timeout(240)]

UNASKED = {"asking": False, "asked": None, "problem": "", "budget": None}


def asked(flower: FlowerProcess) -> dict[str, Any]:
    """Ask the servers, and return what they said."""
    answer = flower.get("/api/pools", method="POST")
    assert answer.status == 202, answer.body
    return told_by(flower)


def told_by(flower: FlowerProcess) -> dict[str, Any]:
    def found() -> Any:
        servers = flower.document()["servers"]
        return not servers["asking"] and servers["asked"] and servers

    return wait_until(found, "the servers' answers")  # type: ignore[no-any-return]


def rows(page: Browser) -> list[list[str]]:
    """Return the texts of the table's rows, without those that name a server."""
    return page.evaluate(  # type: ignore[no-any-return]
        """[...document.querySelectorAll("#wp-limits tbody .wp-row")]
        .map((row) => [...row.children].map((cell) => cell.innerText.replace(/\\s+/g, " ").trim()))"""
    )


def press(page: Browser) -> None:
    page.evaluate("document.getElementById('wp-ask').click()")
    page.until("document.getElementById('wp-servers-asked').innerText.startsWith('Asked ')")


def fits(page: Browser, width: int) -> bool:
    return bool(page.evaluate("document.documentElement.scrollWidth") <= width)


def test_asked_by_a_person(stand: Stand, flower: NewFlower, page: Browser, pictures: Path) -> None:
    """The same numbers as `celery pools budget`, on a press of the button, and no connection before it or after it."""
    with stand.worker(concurrency=2), closing(psycopg2.connect(stand.database.dsn)):
        running = flower(broker_url=stand.broker_url, app=SHOP, env=stand.environment())
        page.size(1440, 900)
        opened(page, running)
        page.until("!document.getElementById('wp-servers').hidden")
        assert "is known when they are asked" in page.text("#wp-servers-note")
        assert running.document()["servers"] == UNASKED
        assert stand.backends() == []

        press(page)
        servers = told_by(running)
        assert servers["problem"] == ""
        wait_until(lambda: not stand.backends(), "the end of Flower's connections")
        expected = of_the_command(stand, "--timeout", "20")
        assert servers["budget"] == expected
        (limit,) = expected["limits"]
        ceiling = most(stand)
        (row,) = rows(page)
        numbers = [ceiling, 0, 1, 12, ceiling - 13, (ceiling - 1) // 6, (ceiling - 1) // 12]
        assert row == [f"max_connections {', '.join(ENGINES)}", *map(str, numbers)]
        assert page.text("#wp-limits .wp-group").strip() == limit["server"]
        assert "1 worker, 2 processes" in page.text("#wp-servers-asked")
        said = page.evaluate("document.querySelector('#wp-limits [data-part=others]').title")
        assert said.startswith("open now: 1 ")
        look(page, pictures)
        assert page.problems() == []

        # Its age grows until somebody asks again.
        page.until("!/^Asked [01] s ago/.test(document.getElementById('wp-servers-asked').innerText)")
        assert page.text("#wp-ask") == "Ask again"
        page.evaluate("document.getElementById('wp-pause').click()")
        press(page)
        assert told_by(running)["asked"] > servers["asked"]
        wait_until(lambda: not stand.backends(), "the end of Flower's connections")
        shown = json.dumps(running.document()) + page.evaluate("document.documentElement.outerHTML") + running.log()
        assert stand.database.password not in shown


def look(page: Browser, pictures: Path) -> None:
    for scheme in ("light", "dark"):
        page.media(prefers_color_scheme=scheme, prefers_reduced_motion="reduce")
        page.size(1440, 900)
        page.screenshot(pictures / f"servers-{scheme}.png")
        assert fits(page, 1440)
        page.size(390, 800, phone=True)
        page.screenshot(pictures / f"servers-{scheme}-390.png")
        assert fits(page, 390)
    page.size(1440, 900)


def shop(*names: str, concurrency: int = 2) -> dict[str, Any]:
    """What a worker says that has these resources."""
    children = process(4001, 0, *(resource(name, open=1, limit=2) for name in names))
    return told(worker_stats(children, concurrency=concurrency, ceilings=tuple((name, 2) for name in names)))


def test_flower_without_the_app(page: Browser, flower: NewFlower, broker_url: str) -> None:
    """Flower may be started with a broker alone: it says that it has no resource to ask with."""
    with FakeWorkers(broker_url, {"celery@shop": shop("db")}):
        running = opened(page, flower())
        press(page)
        assert "started without the workers' app" in page.text("#wp-servers-note")
        assert told_by(running)["budget"] is None
        assert rows(page) == []


def test_nothing_to_compare(stand: Stand, flower: NewFlower) -> None:
    """No worker, or none with such a resource."""
    options = {"broker_url": stand.broker_url, "app": SHOP, "env": stand.environment()}
    assert asked(flower(**options))["problem"].startswith("No worker has replied")
    with FakeWorkers(stand.broker_url, {"celery@shop": shop()}):
        running = flower(**options)
        wait_until(lambda: running.document()["workers"], "the worker in Flower")
        assert asked(running)["problem"].startswith("No resource of the workers counts")
    assert stand.backends() == []


@contextmanager
def silent_server() -> Iterator[tuple[int, list[socket.socket]]]:
    """A port whose connections are accepted by the kernel alone, and what has been accepted."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(16)
        listener.setblocking(False)
        accepted: list[socket.socket] = []
        yield listener.getsockname()[1], accepted
        while True:
            try:
                accepted.append(listener.accept()[0])
            except BlockingIOError:
                break
        for each in accepted:
            each.close()


def test_server_that_is_silent_and_one_that_refuses(stand: Stand, flower: NewFlower, page: Browser) -> None:
    """Flower serves others meanwhile, asks once however many press, and says what it did not learn; no password."""
    secret = "a-password-of-this-test"
    with silent_server() as (port, accepted), FakeWorkers(stand.broker_url, {"celery@shop": shop("db", "stock", "x")}):
        refusing = stand.database.url("psycopg").replace(stand.database.password, secret)
        env = stand.environment(
            {"SHOP_DATABASE": f"postgresql+psycopg2://app:{secret}@127.0.0.1:{port}/shop", "SHOP_STOCK": refusing}
        )
        running = opened(page, flower(broker_url=stand.broker_url, app=SHOP, env=env))
        page.evaluate("document.getElementById('wp-ask').click()")
        page.until("document.getElementById('wp-servers-asked').innerText === 'Asking the servers…'")
        assert page.evaluate("document.getElementById('wp-ask').disabled")
        for _ in range(3):
            assert running.get("/api/pools", method="POST").status == 202
            assert running.get("/healthcheck").status == 200
        assert running.document()["servers"]["asking"]
        page.until("document.getElementById('wp-servers-asked').innerText.startsWith('Asked ')")
        servers = told_by(running)
        reasons = {next(iter(each["resources"])): each["unknown"] for each in servers["budget"]["limits"]}
        assert "timeout expired" in reasons["db"]
        assert "password authentication failed" in reasons["stock"]
        assert reasons["x"] == "this app declares no resource 'x', which a worker has"
        shown = " ".join(map(str, rows(page)))
        assert f"connections x · not known: {reasons['x']}" in shown
        assert secret not in json.dumps(running.document()) + shown + running.log()
    assert len(accepted) == 1


def test_who_may_ask(stand: Stand, flower: NewFlower) -> None:
    """Who may see the document, from Flower's own page alone; nobody else has a server asked."""
    user, secret = "someone:a-password", "a-secret-of-this-test"
    options: dict[str, Any] = {"broker_url": stand.broker_url, "app": SHOP, "env": stand.environment()}
    own, other = {"Sec-Fetch-Site": "same-origin"}, {"Sec-Fetch-Site": "cross-site"}

    def posted(running: FlowerProcess, credentials: str = "", headers: Any = None) -> int:
        return running.get("/api/pools", credentials, headers, method="POST").status

    with FakeWorkers(stand.broker_url, {"celery@shop": shop("db")}):
        running = flower(**options, arguments=[f"--basic_auth={user}"])
        assert [posted(running, wrong, own) for wrong in ("", "someone:another")] == [401, 401]
        assert posted(running, user, other) == 403
        assert json.loads(running.get("/api/pools", user).body)["servers"] == UNASKED
        assert posted(running, user, own) == 202

        closed = flower(**{**options, "env": stand.environment({"FLOWER_UNAUTHENTICATED_API": ""})})
        assert posted(closed) == 401
        # Where Flower itself lets every site in.
        assert posted(flower(**options), headers=other) == 403

        oauth = flower(
            **options,
            arguments=[
                "--auth=someone@example.com",
                "--auth_provider=flower.views.auth.GoogleAuth2LoginHandler",
                "--oauth2_key=k",
                "--oauth2_secret=s",
                "--oauth2_redirect_uri=http://127.0.0.1/login",
                f"--cookie_secret={secret}",
            ],
        )
        cookie = f"user={create_signed_value(secret, 'user', 'someone@example.com').decode()}"
        assert posted(oauth, headers={**own, "Cookie": cookie}) == 403
        page = oauth.get("/pools", headers={"Cookie": cookie})
        token = page.headers["set-cookie"].partition("_xsrf=")[2].partition(";")[0]
        with_token = {**own, "Cookie": f"{cookie}; _xsrf={token}", "X-XSRFToken": token}
        assert posted(oauth, headers=with_token) == 202
