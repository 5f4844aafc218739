"""A cold stop, which sends no signal of Celery's that could close anything, leaves no connection either."""

from __future__ import annotations

import pytest

from tests.support.stand import Stand

pytestmark = pytest.mark.worker


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
@pytest.mark.parametrize("pool", ["threads", "solo"])
def test_a_cold_stop_ends_and_leaves_no_connection(stand: Stand, pool: str, busy: bool) -> None:
    """The process ends, and every connection with a goodbye, also with a body in the middle of its transaction: solo
    breaks that one off; a thread cannot be broken off, so the process ends when its body does. The row is there if the
    task has succeeded, and otherwise it is not."""
    with stand.worker(pool=pool, concurrency=4 if pool == "threads" else 1) as worker:
        for name in ("visit", "stock", "configured"):
            stand.call(name, "token")
        if busy:
            in_flight = stand.send("order", 7, "sleep", 3)
            stand.wait_for_entry("order", 7)
        worker.cold_stop(timeout=60)
        log = worker.log()
    stand.wait_for_no_connection()
    assert stand.disorderly_ends() == 0
    for resource in ("api", "db", "stock", "http", "engine"):
        assert log.count(f"value_closed resource={resource} pid={worker.pid}") == 1
    if busy:
        assert stand.orders(7) == ([0] if in_flight.state == "SUCCESS" else [])
        assert len(stand.entries("body")) == 1
