"""A real prefork worker with tasks, a real Flower, and what its pages say of the two."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import redis
from celery import Celery
from celery.exceptions import TimeoutError
from kombu.exceptions import OperationalError

from demo_tasks.servers import ValkeyServer
from tests.support.browser import Browser
from tests.support.flower import FlowerProcess
from tests.support.stand import Stand, wait_until
from workerpools._stats.snapshot import ResourceStats, WorkerStats
from workerpools.flower._page import LEAST_INTERVAL

pytestmark = [pytest.mark.worker, pytest.mark.timeout(240)]

NewFlower = Callable[..., FlowerProcess]


def snapshot(flower: FlowerProcess) -> WorkerStats | None:
    """Return what the document says of the one worker, once that is known."""
    for worker in flower.document()["workers"]:
        if worker["status"] == "online":
            (found,) = worker["snapshots"]
            return WorkerStats.from_dict(found)
    return None


def of(resources: tuple[ResourceStats, ...], name: str) -> ResourceStats:
    return next(each for each in resources if each.name == name)


def test_numbers_agree(stand: Stand, flower: NewFlower) -> None:
    """The document's totals are what the servers saw, also after a child was killed, and never fall."""
    with stand.worker(concurrency=2) as worker:
        running = flower(broker_url=stand.broker_url)
        tasks = len(stand.reach_all(worker.children()))
        killed = worker.children()[0]

        def seen(name: str, number: str, value: float) -> WorkerStats | None:
            found = snapshot(running)
            return found if found is not None and of(found.totals(), name).value(number) == value else None

        before = wait_until(lambda: seen("db", "attempts", tasks), "every task in the document")
        assert {process.pid for process in before.processes} == set(worker.children())
        assert of(before.totals(), "api").value("opened") == stand.echo.accepted
        assert of(before.totals(), "db").open == len(stand.backends("workerpools db pid=%"))

        os.kill(killed, signal.SIGKILL)
        wait_until(lambda: killed not in worker.children() and len(worker.children()) == 2, "a successor")
        tasks += len(stand.reach_all(worker.children()))
        after = wait_until(lambda: seen("db", "attempts", tasks), "every task in the document")
        assert {process.pid for process in after.processes} == set(worker.children())
        assert of(after.totals(), "api").value("opened") == stand.echo.accepted
        assert of(after.totals(), "db").value("opened") == 3
        # The same as the command line is told.
        (answer,) = stand.client.control.broadcast("pools", reply=True, timeout=5.0, limit=1)
        ((told,),) = answer.values()
        for one, other in zip(WorkerStats.from_dict(told).totals(), after.totals(), strict=True):
            assert (one.name, one.value("opened"), one.value("reused")) == (
                *(other.name, other.value("opened")),
                other.value("reused"),
            )


def test_first_question_after_a_kill_of_the_broker_under_load(
    stand: Stand, flower: NewFlower, valkey_server: ValkeyServer
) -> None:
    """Messages are on their way when it dies. Once the worker runs tasks again, Flower's page is right at once."""
    url = valkey_server.start().url(14)
    over = threading.Event()

    def load() -> None:
        # As many as the worker takes: a queue that grows would keep the task that is waited for.
        with closing(redis.Redis.from_url(url)) as broker:
            while not over.wait(0.05):
                with suppress(OperationalError, redis.RedisError):
                    if broker.llen("celery") < 5:
                        own.send("visit", "load", retry=False, ignore_result=True)

    def runs() -> bool:
        try:
            own.send("visit", "after", retry=False).get(timeout=3.0)
        except (OperationalError, TimeoutError):
            return False
        return True

    with closing(Celery("client", broker=url, backend=url, set_as_current=False)) as client:
        own = replace(stand, broker_url=url, client=client)
        with own.worker(concurrency=2), ThreadPoolExecutor(1) as sender:
            running = flower(broker_url=url)
            sender.submit(load)
            try:
                before = wait_until(lambda: snapshot(running), "the worker's numbers")
                asked = time.monotonic()
                valkey_server.send_signal(signal.SIGKILL)
                wait_until(lambda: not valkey_server.running, "the broker's end")
                valkey_server.start()
                wait_until(runs, "a task after the broker's start")
                time.sleep(max(0.0, asked + LEAST_INTERVAL - time.monotonic()))
                found = running.document()
            finally:
                over.set()
        assert found["problem"] == ""
        assert found["asked"] > found["now"] - 2 * LEAST_INTERVAL
        (worker,) = found["workers"]
        assert worker["status"] == "online"
        after = WorkerStats.from_dict(worker["snapshots"][0])
        assert of(after.totals(), "db").value("attempts") > of(before.totals(), "db").value("attempts")


def test_pages(stand: Stand, flower: NewFlower, page: Browser, pictures: Path) -> None:
    """Both pages show the children and what they use; that of the worker is readable, and leads to the other."""
    page.size(1440, 900)
    with stand.worker(concurrency=2) as worker:
        running = flower(broker_url=stand.broker_url)
        stand.reach_all(worker.children())
        name = worker.node
        slow = stand.send("slow_request", 9.0)
        page.open(running.url("/pools"))
        page.until("document.querySelectorAll('.wp-row').length > 4")
        page.until("[...document.querySelectorAll('.wp-use-text')].some((each) => each.textContent.startsWith('1 of'))")
        slow.get(timeout=60)
        text = page.text("#workerpools")
        for pid in worker.children():
            assert f"Process {pid}" in text
        page.screenshot(pictures / "real.png")
        assert page.problems() == []

        page.evaluate("document.querySelector('.wp-worker-name a').click()")
        page.until("document.getElementById('workername')?.textContent")
        assert page.evaluate("document.getElementById('workername').textContent") == name
        page.evaluate("document.querySelector('[data-bs-target=\"#tab-workerpools\"]').click()")
        page.until("getComputedStyle(document.getElementById('tab-workerpools')).opacity === '1'")
        page.screenshot(pictures / "worker.png")
        pane = page.text("#tab-workerpools")
        assert re.search(r"The numbers here are from \d{4}-\d\d-\d\d \d\d:\d\d:\d\d", pane)
        assert re.search(r"db\s+open 2/4, in use 0, pending 0; opened 2, reused", pane)
        for pid in worker.children():
            assert re.search(rf"{pid}\s+api\s+open 1", pane)
        # The raw snapshots, with their buckets, are nowhere on the page.
        whole = page.evaluate("document.body.textContent")
        assert "buckets" not in whole
        assert "snapshots" not in whole
        page.evaluate("document.querySelector('#tab-workerpools a').click()")
        page.until("location.pathname === '/pools' && document.querySelector(':target, .wp-worker')")
        page.until(f"document.body.innerText.includes({name!r})")


def test_raw_reply_is_still_there(stand: Stand, flower: NewFlower) -> None:
    """What the page of a worker leaves out, Flower's own API still has."""
    import json

    with stand.worker(concurrency=1):
        running = flower(broker_url=stand.broker_url, env={"FLOWER_UNAUTHENTICATED_API": "true"})

        def asked() -> Any:
            answer = running.get("/api/workers?refresh=1")
            return next(iter(json.loads(answer.body).values()), None) if answer.status == 200 else None

        found = wait_until(asked, "the worker")
        assert WorkerStats.from_dict(found["stats"]["workerpools"]["snapshots"][0]).execution_pool == "prefork"
