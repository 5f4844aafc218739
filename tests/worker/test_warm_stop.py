"""After a warm stop the servers count no connection, and every connection ended with a goodbye."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.stand import Stand, ended

pytestmark = pytest.mark.worker

WORKERS: dict[str, dict[str, Any]] = {
    "prefork": {"pool": "prefork"},
    "threads": {"pool": "threads", "concurrency": 4},
}


@pytest.mark.parametrize("kind", WORKERS)
def test_a_warm_stop_leaves_no_connection(stand: Stand, kind: str) -> None:
    """A task that is in flight when the stop is asked for succeeds; when the worker has ended, no connection is left
    on either server, and each one was closed in order: under prefork by worker_process_shutdown, in every child."""
    with stand.worker(**WORKERS[kind]) as worker:
        # Threads run tasks in the main process.
        processes = stand.pool_processes(2) if WORKERS[kind]["pool"] == "prefork" else [worker.pid]
        assert (worker.pid in processes) == (kind == "threads")
        for name in ("visit", "stock", "configured"):
            stand.reach_all(processes, name)
        assert len(stand.backends()) >= 3 * len(processes)
        in_flight = stand.send("slow_request", 1.5)
        stand.wait_for_entry("slow_request")
        assert worker.stop() == 0
        log = worker.log()
    assert ended(in_flight).state == "SUCCESS"
    stand.wait_for_no_connection()
    assert stand.disorderly_ends() == 0
    for pid in processes:
        for resource in ("api", "db", "stock", "http", "engine"):
            assert log.count(f"value_closed resource={resource} pid={pid}") == 1
    assert "Traceback" not in log


def test_an_idle_warm_stop_is_orderly_when_a_body_has_failed(stand: Stand) -> None:
    """A failed body leaves no connection that the stop would miss."""
    with stand.worker(concurrency=1) as worker:
        for ending in ("fail", "retry", "ignore", "reject", "return"):
            stand.send("order", 1, ending)
        stand.wait_for_entry("order", count=6)
        assert worker.stop() == 0
    stand.wait_for_no_connection()
    assert stand.disorderly_ends() == 0
