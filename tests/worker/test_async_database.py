"""An asynchronous engine in a real worker: one per child on its loop, whole after whatever strikes, closed in order."""

from __future__ import annotations

import random
from typing import Any

import pytest

from tests.support.stand import PATIENCE, Stand, ended, wait_until
from tests.support.worker import WorkerProcess
from tests.worker.test_coroutines import BROKEN

pytest.importorskip("sqlalchemy", minversion="2.1")

pytestmark = pytest.mark.worker

DRIVERS = ["psycopg", "asyncpg"]


def worker_of(stand: Stand, driver: str, *, env: dict[str, str] | None = None, **options: Any) -> WorkerProcess:
    return stand.worker(
        app="tests.worker.async_database:app",
        env={"SHOP_DATABASE": stand.database.url(driver), "PYTHONWARNINGS": "default", **(env or {})},
        **options,
    )


def check_log(worker: WorkerProcess) -> None:
    for line in worker.log().splitlines():
        assert not BROKEN.search(line), worker.log()
        assert "MissingGreenlet" not in line, worker.log()
        assert "garbage collector" not in line, worker.log()


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_worker(stand: Stand, driver: str) -> None:
    """Rollbacks, connections beside the session and time limits hold, and a warm stop leaves nothing."""
    with worker_of(stand, driver, concurrency=1) as worker:
        first, second = stand.call("order", 1), stand.call("order", 2)
        assert first == second
        result = stand.outcome("order", 3, True)
        assert (result.state, len(stand.orders(1)), len(stand.orders(3))) == ("FAILURE", 1, 0)
        assert stand.call("both", 4) == [0, 1]
        assert len(stand.orders(4)) == 1

        # The deadline, in the statement; the server has ended it, and the child lives.
        assert "SoftTimeLimitExceeded" in type(ended(stand.send("sleeps")).result).__name__
        assert stand.call("order", 6)["pid"] == first["pid"]

        left = stand.call("gauges")
        assert (left["tasks"], left["counted"][:2]) == (0, [0, 0])
        assert worker.stop() == 0
        wait_until(lambda: not stand.backends(), "the sessions to be closed", 10.0)
        assert stand.disorderly_ends() == 0
        check_log(worker)


@pytest.mark.soak
@pytest.mark.parametrize("driver", DRIVERS)
def test_soft_limits_struck_at_random(stand: Stand, driver: str, request: pytest.FixtureRequest) -> None:
    """By Celery's signal. No loop is left broken, no connection leaked, nothing written.

    The full run: ``pytest -n0 -o timeout=900 -o faulthandler_timeout=0 … --struck 1000``.
    """
    count = int(request.config.getoption("--struck"))
    chance = random.Random(13)
    with worker_of(stand, driver, concurrency=2) as worker:
        pids = {stand.call("gauges")["pid"] for _ in range(6)}
        results = [stand.send("busy", number, chance.uniform(0, 0.1), soft_time_limit=15) for number in range(count)]
        assert {type(ended(result).result).__name__ for result in results} == {"SoftTimeLimitExceeded"}
        for _ in range(6):
            left = stand.call("gauges")
            assert (left["tasks"], left["counted"][:2]) == (0, [0, 0])
            # The same children: none had to be killed.
            assert left["pid"] in pids
        assert stand.database.execute("select count(*) from orders") == [(0,)]
        assert stand.send("order", 9).get(timeout=PATIENCE)["pid"] in pids
        wait_until(lambda: len(stand.backends()) <= 4, "the interrupted statements' connections to be closed")
        assert worker.stop() == 0
        wait_until(lambda: not stand.backends(), "the sessions to be closed", 10.0)
        check_log(worker)
