"""The adapter of this folder in a real prefork worker: its failures, its effects, and where its numbers are seen."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from celery import Celery

from demo_tasks.servers import Workspace
from tests.support.browser import Browser, browser_program
from tests.support.flower import FlowerProcess
from tests.support.memcached import MemcachedServer
from tests.support.services import require_program
from tests.support.stand import PATIENCE, ended, wait_until
from tests.support.worker import WorkerProcess
from tests.worker.scraping import fetch, scrape, series, total
from workerpools._stats.snapshot import ResourceStats, WorkerStats
from workerpools.testing import TcpProxy

pytestmark = [pytest.mark.worker, pytest.mark.timeout(240)]


@dataclass
class Cached:
    """A worker with two children, and what is around it."""

    client: Celery
    worker: WorkerProcess
    proxy: TcpProxy
    memcached: MemcachedServer
    broker_url: str

    def send(self, name: str) -> Any:
        return self.client.send_task(f"cached.{name}")

    def open_all(self) -> int:
        """Have every child use its client; return how many tasks that took."""
        wanted, tasks = set(self.worker.children()), 0
        while wanted:
            sent = [self.send("read") for _ in range(4)]
            wanted -= {result.get(timeout=PATIENCE) for result in sent}
            tasks += len(sent)
        return tasks

    def counted(self) -> int:
        return int(self.memcached.ask("get count").splitlines()[1])

    def stats(self) -> ResourceStats:
        """Return what `celery inspect pools` answers about the resource."""
        with self.client.connection_for_write() as connection:
            (answer,) = wait_until(
                lambda: self.client.control.broadcast("pools", reply=True, timeout=5.0, limit=1, connection=connection),
                "an answer",
            )
        ((snapshot,),) = answer.values()
        (found,) = WorkerStats.from_dict(snapshot).totals()
        return found


@pytest.fixture
def cached(memcached: MemcachedServer, broker_url: str) -> Iterator[Cached]:
    memcached.ask("set count 0 0 1\r\n0")
    client = Celery("client", broker=broker_url, backend=broker_url, set_as_current=False)
    try:
        with TcpProxy(memcached.host, memcached.port) as proxy:
            env = {"CACHED_BROKER": broker_url, "CACHED_PORT": str(proxy.port)}
            with WorkerProcess("tests.thirdparty.app:app", concurrency=2, env=env) as worker:
                yield Cached(client, worker, proxy, memcached, broker_url)
    finally:
        # A result that is finalized when the broker is gone tries to reach it for minutes.
        gc.collect()
        client.backend.result_consumer.stop()
        client.close()


def test_failures_replay_and_effects_forbid(cached: Cached) -> None:
    """A dead idle connection costs a second run; so does a lost answer to what may be repeated, but not after what
    may not; a lost answer to that is never repeated."""
    cached.open_all()
    assert cached.proxy.open == 2
    cached.proxy.cut()
    cached.open_all()
    assert cached.worker.log().count("attempt_replayed resource=cache") == 2

    cached.proxy.lose_answer(b"get ")
    assert ended(cached.send("read")).state == "SUCCESS"
    assert cached.proxy.lost == 1
    assert cached.worker.log().count("attempt_replayed resource=cache") == 3

    # Each child's connection is open: what fails now fails over one that was reused.
    cached.open_all()
    cached.proxy.lose_answer(b"get ")
    failed = ended(cached.send("count"))
    assert (failed.state, cached.proxy.lost, cached.counted()) == ("FAILURE", 2, 1)
    assert type(failed.result).__name__ == "MemcacheUnexpectedCloseError"
    assert "incr by 'cache' had left already" in cached.worker.log()

    cached.open_all()
    cached.proxy.lose_answer(b"incr ")
    failed = ended(cached.send("count"))
    assert (failed.state, cached.proxy.lost, cached.counted()) == ("FAILURE", 3, 2)
    assert "it may have been done, and the task is not declared idempotent" in cached.worker.log()
    assert cached.worker.log().count("attempt_replayed resource=cache") == 3
    assert cached.worker.stop() == 0


def test_a_server_that_is_away_is_waited_for_at_the_broker(cached: Cached) -> None:
    """And after a warm stop it counts no connection."""
    cached.open_all()
    cached.proxy.stop()
    cached.proxy.cut()
    waiting = cached.send("patient")
    cached.worker.wait_for_log("task_retried resource=cache")
    cached.proxy.start()
    assert waiting.get(timeout=PATIENCE) in cached.worker.children()
    assert cached.proxy.open > 0
    assert cached.worker.stop() == 0
    cached.proxy.wait_for(lambda proxy: proxy.open == 0)
    assert cached.memcached.connections() == 0


def test_its_numbers_are_seen(cached: Cached) -> None:
    """By `celery inspect pools`, at the worker's `/metrics`, in Flower's document, its `/metrics` and its page."""
    require_program(browser_program)
    tasks = cached.open_all()
    stats = cached.stats()
    assert (stats.name, stats.kind, stats.open, stats.in_use) == ("cache", "cache", 2, 0)
    assert (stats.value("attempts"), stats.value("opened"), stats.value("reused")) == (tasks, 2, tasks - 2)
    assert stats.histogram("use_time").count == stats.histogram("acquire_wait").count == tasks
    assert stats.histogram("create_time").count == 2

    found = series(scrape(cached.worker))
    assert total(found, "workerpools_connections_open", resource="cache") == 2
    assert total(found, "workerpools_attempts_total", resource="cache") == tasks
    assert total(found, "workerpools_acquisitions_reused_total", resource="cache") == tasks - 2

    with Workspace() as workspace, FlowerProcess(workspace, cached.broker_url) as flower:

        def in_document() -> ResourceStats | None:
            for worker in flower.document()["workers"]:
                for snapshot in worker["snapshots"]:
                    return WorkerStats.from_dict(snapshot).totals()[0]
            return None

        shown = wait_until(in_document, "the worker in Flower's document")
        assert (shown.name, shown.open, shown.value("attempts")) == ("cache", 2, tasks)
        found = series(fetch(flower.url("/metrics")))
        assert total(found, "workerpools_attempts_total", resource="cache") == tasks
        with Browser() as page:
            page.open(flower.url("/pools"))
            page.until("document.querySelectorAll('.wp-row').length >= 2")
            assert "cache" in page.text("#wp-workers")
            assert page.problems() == []
