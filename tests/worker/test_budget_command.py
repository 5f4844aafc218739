"""``celery pools budget`` and ``celery pools check --budget``, asking real workers and a real server."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import closing
from typing import Any

import psycopg2
import pytest

from tests.support.paths import environment
from tests.support.stand import PATIENCE, SHOP, Stand, wait_until
from tests.worker.test_recycle_command import pools

pytestmark = pytest.mark.worker

#: Of the shop's resources, those that count against the database server; per process one connection, and one to spare.
ENGINES = ("db", "engine", "stock")


def told(stand: Stand, *args: str) -> dict[str, Any]:
    done = pools(stand, "budget", "--json", *args)
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert isinstance(found, dict)
    return found


def most(stand: Stand) -> int:
    return int(str(stand.database.execute("SHOW max_connections")[0][0]))


def test_of_the_workers_that_run(shared: Stand) -> None:
    """Their processes times what each may open, whatever they have opened so far; that is not counted twice."""
    free = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
    wait_until(lambda: shared.database.execute(free) == [(0,)], "nobody is connected")
    with shared.worker(concurrency=2) as worker, closing(psycopg2.connect(shared.database.dsn)):
        asked = ("-d", worker.node, "--timeout", "20")
        for opened in (0, 2):
            if opened:
                shared.reach_all(worker.children())
            found = told(shared, *asked)
            (running,) = found["workers"]
            assert (running["execution_pool"], running["processes"]) == ("prefork", 2)
            assert running["ceilings"] == dict.fromkeys(ENGINES, 2)
            assert sum(running["open"].values()) == opened
            (limit,) = found["limits"]
            assert (limit["limit"], limit["most"], limit["open"]) == ("max_connections", most(shared), opened + 1)
            assert limit["resources"] == dict.fromkeys(ENGINES, 4)
            assert (limit["sum"], limit["others"], limit["head_room"]) == (12, 1, most(shared) - 1 - 12)
            assert limit["largest_concurrency"] == (most(shared) - 1) // (3 * 2)
        with_rich, plain = pools(shared, "budget", *asked), without_rich(shared, "budget", *asked)
        left = most(shared) - 1
        for done in (with_rich, plain):
            assert (done.returncode, done.stderr) == (0, "")
            shown = done.stdout.splitlines()
            assert shown[0].rstrip().endswith(f":{shared.database.port}  1 worker, 2 processes")
            (row,) = (line.split() for line in shown if line.startswith("max_connections"))
            assert row[-6:] == ["–", "1", "12", *map(str, (left - 12, left // 6, left // 12))]
            assert "db: 2 × 2 (processes × connections)" in done.stdout
            assert all(len(line.rstrip()) <= 80 for line in shown[:5])
        assert shared.database.password not in with_rich.stdout + json.dumps(found)
        checked = pools(shared, "check", "--budget", "--json")
        assert [each for each in json.loads(checked.stdout)["findings"] if each["code"].startswith("WP4")] == []


def without_rich(stand: Stand, *args: str) -> Any:
    hidden = "import sys; sys.modules['rich'] = None; from celery.__main__ import main; sys.exit(main())"
    return subprocess.run(
        [sys.executable, "-c", hidden, "-A", SHOP, "pools", *args],
        env=environment({**stand.environment(), "COLUMNS": "80"}),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


@pytest.mark.parametrize(
    ("pool", "args", "concurrency", "processes", "ceiling"),
    [("prefork", ("--autoscale=5,2",), 5, 5, 2), ("threads", (), 4, 1, 5), ("solo", (), 1, 1, 2)],
)
def test_of_every_execution_pool(
    shared: Stand, pool: str, args: tuple[str, ...], concurrency: int, processes: int, ceiling: int
) -> None:
    """A worker that scales is counted at its largest; where tasks share a process, there is one."""
    with shared.worker(pool=pool, concurrency=4, args=args) as worker:
        (running,) = told(shared, "-d", worker.node, "--timeout", "20")["workers"]
    assert (running["concurrency"], running["processes"]) == (concurrency, processes)
    assert running["ceilings"] == dict.fromkeys(ENGINES, ceiling)


def test_of_planned_workers(shared: Stand) -> None:
    """No worker has to run, and no broker."""
    (limit,) = told(shared, "--workers", "3", "--concurrency", "10")["limits"]
    assert limit["sum"] == 3 * 10 * 2 * 3
    (limit,) = told(shared, "--workers", "3", "--concurrency", "10", "-P", "threads")["limits"]
    assert limit["sum"] == 3 * 11 * 3
    too_many = pools(shared, "check", "--budget", "--workers", "20", "--concurrency", "10", "--json")
    assert too_many.returncode == 2
    (found,) = (each for each in json.loads(too_many.stdout)["findings"] if each["code"].startswith("WP4"))
    assert (found["code"], found["where"]) == ("WP401", "ShopTask.db, engine, StockTask.stock")
    assert "max_connections of PostgreSQL " in found["what"]
    assert shared.database.password not in too_many.stdout
    unset = pools(shared, "budget", "--workers", "3")
    assert unset.returncode == 2
    assert "give the concurrency" in unset.stderr


def test_nobody_answers(shared: Stand) -> None:
    """The table has nothing to show; the check says that it does not know."""
    done = pools(shared, "budget", "--timeout", "0.2")
    assert (done.returncode, done.stdout) == (69, "")
    assert "no reply from any worker" in done.stderr
    done = pools(shared, "check", "--budget", "--json")
    (found,) = (each for each in json.loads(done.stdout)["findings"] if each["code"].startswith("WP4"))
    assert (found["code"], found["where"]) == ("WP403", "workers")
