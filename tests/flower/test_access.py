"""Who may see the Pools page and its document: who may see Flower's own pages, and nobody else."""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import pytest
from tornado.web import create_signed_value

from tests.flower.fake import FakeWorkers, process, resource, told, worker_stats
from tests.support.flower import PLAIN, FlowerProcess
from tests.support.stand import wait_until

pytestmark = pytest.mark.worker

NewFlower = Callable[..., FlowerProcess]
PATHS = ("/pools", "/api/pools")
USER = "someone:a-password"


@pytest.mark.parametrize("config", [None, PLAIN], ids=["within Flower", "plain"])
def test_basic_auth(flower: NewFlower, config: str | None) -> None:
    """Without the password, or with another one, neither the page nor the document is given away."""
    options = {} if config is None else {"config": config}
    running = flower(arguments=[f"--basic_auth={USER}"], **options)
    for path in PATHS:
        for wrong in ("", "someone:another", "someone:", "a-password"):
            answer = running.get(path, wrong)
            assert answer.status == 401, (path, wrong)
            assert answer.headers["www-authenticate"] == 'Basic realm="flower"'
            assert "workers" not in answer.body
        assert running.get(path, USER).status == 200
    # Flower's own answer for comparison, so that this test is about the same thing.
    assert running.get("/workers").status == 401


def test_log_in(flower: NewFlower) -> None:
    """With OAuth the page leads to the log-in, the document is refused, and a session of the right person sees both."""
    secret = "a-secret-of-this-test"
    running = flower(
        arguments=[
            "--auth=someone@example.com",
            "--auth_provider=flower.views.auth.GoogleAuth2LoginHandler",
            "--oauth2_key=k",
            "--oauth2_secret=s",
            "--oauth2_redirect_uri=http://127.0.0.1/login",
            f"--cookie_secret={secret}",
        ]
    )
    page = running.get("/pools")
    assert page.status == 302
    assert page.headers["location"].startswith("/login")
    refused = running.get("/api/pools")
    assert (refused.status, json.loads(refused.body)) == (401, {"error": "Unauthorized"})
    # Not of a kind that has the browser ask for a password that there is not.
    assert "www-authenticate" not in refused.headers
    for person, status in (("someone@example.com", (200, 200)), ("other@example.com", (302, 401))):
        cookie = create_signed_value(secret, "user", person).decode()
        found = [running.get(path, headers={"Cookie": f"user={cookie}"}).status for path in PATHS]
        assert tuple(found) == status


@pytest.mark.parametrize(("variable", "status"), [("", 401), ("false", 401), ("true", 200)])
def test_open_flower(flower: NewFlower, variable: str, status: int) -> None:
    """Without any authentication the page is as open as Flower's own, and the document as Flower's own API."""
    running = flower(env={"FLOWER_UNAUTHENTICATED_API": variable})
    origin = {"Origin": "http://elsewhere.example"}
    page, document, theirs = (running.get(path, headers=origin) for path in (*PATHS, "/api/workers"))
    assert (page.status, document.status, theirs.status) == (200, status, status)
    # Scripts of other sites may read it where they may read Flower's own, and nowhere else.
    assert document.headers.get("access-control-allow-origin") == theirs.headers.get("access-control-allow-origin")
    assert document.headers["content-type"].startswith("application/json")
    if status == 200:
        assert document.headers["cache-control"] == "no-store"
    else:
        assert "access-control-allow-origin" not in document.headers
        assert "--basic_auth" in json.loads(document.body)["hint"]


SCRAPED = """\
import workerpools.flower

workerpools.flower.install(metrics_interval=3.0)
"""


def test_metrics_without_a_password_ask_no_worker(flower: NewFlower, broker_url: str) -> None:
    """A stranger gets Flower's own series and the last known of ours, and has nobody asked, however often; with the
    password the workers are asked. `metrics_interval` allows strangers a query per so many seconds."""

    def worker_of(running: FlowerProcess, credentials: str = "") -> bool:
        answer = running.get("/metrics", credentials)
        assert answer.status == 200
        return 'workerpools_connections_open{resource="db",worker="celery@shop"} 1.0' in answer.body

    pools = told(worker_stats(process(1, 0, resource("db", open=1))))
    with FakeWorkers(broker_url, {"celery@shop": pools}) as workers:
        running = flower(arguments=[f"--basic_auth={USER}"], env={"FLOWER_UNAUTHENTICATED_API": ""})
        wait_until(lambda: worker_of(running, USER), "the worker")
        # Late replies to earlier queries have been counted, too.
        time.sleep(2.5)
        before = workers.asked["celery@shop"]
        for wrong in ("", "someone:another", "x") * 10:
            assert worker_of(running, wrong)
        assert workers.asked["celery@shop"] == before
        assert worker_of(running, USER)
        assert workers.asked["celery@shop"] > before

        bounded = flower(config=SCRAPED, arguments=[f"--basic_auth={USER}"])
        wait_until(lambda: worker_of(bounded), "the worker, for a stranger")
        before, begun = workers.asked["celery@shop"], time.monotonic()
        while time.monotonic() - begun < 4.0:
            worker_of(bounded)
        assert 1 <= workers.asked["celery@shop"] - before <= 2 * 2


def test_files_are_open_and_nothing_else(flower: NewFlower) -> None:
    """Script and style need no password, as Flower's own; there is no way out of their directory."""
    running = flower(arguments=[f"--basic_auth={USER}"])
    script = running.get("/pools/static/pools.js")
    assert script.status == 200
    assert "javascript" in script.headers["content-type"]
    assert running.get("/pools/static/pools.css").status == 200
    for path in ("../templates/page.html", "%2e%2e/_page.py", "..%2f..%2ferrors.py", ""):
        assert running.get(f"/pools/static/{path}").status in (403, 404)


def test_without_install(flower: NewFlower) -> None:
    """A Flower that was not told to has no such page."""
    running = flower(config="")
    assert [running.get(path).status for path in PATHS] == [404, 404]
    assert "Pools" not in running.get("/workers").body


def test_url_prefix(flower: NewFlower, broker_url: str) -> None:
    """Below a prefix everything is below it: the page, its document, its files, and its links."""
    pools = told(worker_stats(process(1, 0, resource("db", open=1))))
    with FakeWorkers(broker_url, {"celery@shop": pools}):
        running = flower(prefix="deep/flower", arguments=[f"--basic_auth={USER}"])
        page = running.get("/pools", USER).body
        for path in ("pools", "api/pools", "pools/static/pools.js", "pools/static/pools.css", "worker/0", "workers"):
            assert f'"/deep/flower/{path}"' in page
        assert running.get("/api/pools").status == 401
        (worker,) = json.loads(running.get("/api/pools", USER).body)["workers"]
        assert worker["name"] == "celery@shop"
        assert running.get("/pools/static/view.js").status == 200
        assert '"/deep/flower/pools#worker:celery%40shop"' in running.get("/worker/celery@shop", USER).body
