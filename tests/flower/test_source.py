"""How the page's numbers get to Flower: asked for while somebody looks, within a bound, and without stopping Flower."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.flower.fake import FakeWorkers, process, resource, told, worker_stats
from tests.support.flower import FlowerProcess
from tests.support.stand import wait_until

#: As documented.
LEAST_INTERVAL = 2.0

pytestmark = pytest.mark.worker

NewFlower = Callable[..., FlowerProcess]
POOLS = told(worker_stats(process(1, 0, resource("db", open=1))))


def statuses(flower: FlowerProcess) -> dict[str, str]:
    return {worker["name"]: worker["status"] for worker in flower.document()["workers"]}


def test_many_pages_ask_no_more_than_one(flower: NewFlower, broker_url: str) -> None:
    """However many ask for the document at once, the workers are asked not more often than the bound allows."""
    with FakeWorkers(broker_url, {"celery@shop": POOLS}) as workers:
        running = flower()
        wait_until(lambda: statuses(running) == {"celery@shop": "online"}, "the worker")
        before, begun = workers.asked["celery@shop"], time.monotonic()
        with ThreadPoolExecutor(16) as many:
            for _ in range(4):
                found = list(many.map(lambda _: running.document(), range(32)))
                assert all(each["workers"][0]["status"] == "online" for each in found)
                time.sleep(1.0)
        passed = time.monotonic() - begun
        # One for the time before the first of these, and each may be asked twice where late answers came.
        assert 1 <= workers.asked["celery@shop"] - before <= 2 * (passed / LEAST_INTERVAL + 1)


def test_nobody_looks(flower: NewFlower, broker_url: str) -> None:
    """Without a page that is open, no worker is asked."""
    with FakeWorkers(broker_url, {"celery@shop": POOLS}) as workers:
        running = flower()
        wait_until(lambda: statuses(running) == {"celery@shop": "online"}, "the worker")
        # What was asked at the start may still be on its way.
        time.sleep(2.0)
        before = workers.asked["celery@shop"]
        time.sleep(3.0 * LEAST_INTERVAL)
        assert workers.asked["celery@shop"] == before


def test_flower_goes_on_meanwhile(flower: NewFlower, broker_url: str) -> None:
    """While a worker that does not answer is waited for, Flower serves others."""
    with FakeWorkers(broker_url, {"celery@busy": POOLS}) as workers:
        running = flower(arguments=["--inspect_timeout=4000"])
        wait_until(lambda: statuses(running) == {"celery@busy": "online"}, "the worker")
        workers.busy.add("celery@busy")
        time.sleep(LEAST_INTERVAL)
        ended: list[str] = []
        waiting = threading.Thread(target=lambda: (running.document(), ended.append("document")))
        waiting.start()
        time.sleep(0.5)
        for _ in range(20):
            assert running.get("/healthcheck").status == 200
        ended.append("healthcheck")
        waiting.join(40)
        assert ended == ["healthcheck", "document"]
        assert statuses(running) == {"celery@busy": "silent"}


def test_late_answers_do_not_hide_others(flower: NewFlower, broker_url: str) -> None:
    """A worker that answers many questions at once, too late, neither passes for another nor has it missed."""
    with FakeWorkers(broker_url, {"celery@busy": POOLS, "celery@calm": POOLS}) as workers:
        running = flower()
        both = {"celery@busy": "online", "celery@calm": "online"}
        wait_until(lambda: statuses(running) == both, "both")
        workers.busy.add("celery@busy")
        wait_until(lambda: statuses(running) == {**both, "celery@busy": "silent"}, "one")
        for _ in range(4):
            time.sleep(LEAST_INTERVAL)
            assert statuses(running)["celery@calm"] == "online"
        workers.busy.clear()
        for _ in range(4):
            time.sleep(LEAST_INTERVAL)
            assert statuses(running) == both


def test_new_worker_is_found(flower: NewFlower, broker_url: str) -> None:
    """A worker that starts after Flower is asked, too; one that says goodbye is offline."""
    with FakeWorkers(broker_url, {"celery@one": POOLS}):
        running = flower()
        wait_until(lambda: statuses(running) == {"celery@one": "online"}, "the first")
        with FakeWorkers(broker_url, {"celery@two": POOLS}):
            wait_until(lambda: statuses(running) == {"celery@one": "online", "celery@two": "online"}, "the second")
        wait_until(lambda: statuses(running) == {"celery@one": "online", "celery@two": "offline"}, "its end")


def test_forgotten_as_flower_is_told(flower: NewFlower, broker_url: str) -> None:
    """A worker that has gone is forgotten after the time that Flower's purge_offline_workers says."""
    with FakeWorkers(broker_url, {"celery@one": POOLS}):
        running = flower(arguments=["--purge_offline_workers=3"])
        wait_until(lambda: statuses(running) == {"celery@one": "online"}, "the worker")
    wait_until(lambda: statuses(running) == {}, "nobody")


def test_broker_is_down(flower: NewFlower, valkey_server: object) -> None:
    """The document says what is wrong, and keeps the last numbers; no URL of the broker is in it or in the log."""
    from demo_tasks.servers import ValkeyServer

    assert isinstance(valkey_server, ValkeyServer)
    url = valkey_server.start().url(15)
    with FakeWorkers(url, {"celery@one": POOLS}):
        running = flower(broker_url=url)
        wait_until(lambda: statuses(running) == {"celery@one": "online"}, "the worker")
    try:
        valkey_server.stop()
        found = wait_until(lambda: next((d for d in [running.document()] if d["problem"]), None), "the problem")
        assert found["problem"].startswith("Flower cannot reach the broker")
        (worker,) = found["workers"]
        assert (worker["status"], worker["snapshots"][0]["totals"][0]["open"]) == ("silent", 1)
        assert "redis://" not in str(found)
        ours = [line for line in running.log().splitlines() if "cannot query the workers" in line]
        assert len(ours) == 1
        assert re.search(r": (Operational|Connection)Error$", ours[0])
    finally:
        valkey_server.start()
    wait_until(lambda: not running.document()["problem"], "the broker")
    assert "can be queried for their connection pools again" in running.log()


def test_first_question_after_a_restart_of_the_broker(flower: NewFlower, valkey_server: object) -> None:
    """Flower's connection to the broker is stale then: the question is asked once more, and the page is right."""
    from demo_tasks.servers import ValkeyServer

    assert isinstance(valkey_server, ValkeyServer)
    url = valkey_server.start().url(15)
    with FakeWorkers(url, {"celery@one": POOLS}):
        running = flower(broker_url=url)
        wait_until(lambda: statuses(running) == {"celery@one": "online"}, "the worker")
        asked = time.monotonic()
    valkey_server.stop()
    valkey_server.start()
    with FakeWorkers(url, {"celery@one": POOLS}):
        time.sleep(max(0.0, asked + LEAST_INTERVAL - time.monotonic()))
        found = running.document()
    assert found["problem"] == ""
    assert found["asked"] > found["now"] - 2 * LEAST_INTERVAL
    assert [worker["status"] for worker in found["workers"]] == ["online"]
