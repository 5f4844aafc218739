"""A time limit or an exit strikes at every point of a task: nothing is leaked, and the next task does not wait."""

from __future__ import annotations

import gc
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from typing import Any

import psycopg2
import pytest
from celery.exceptions import SoftTimeLimitExceeded

from tests.stats.counting import stats
from tests.support.databases import Database
from tests.support.interruptions import Interruption, in_a_thread
from tests.support.shop import Shop, insert
from tests.support.upstream import EchoUpstream
from workerpools._run import attempts
from workerpools.events import EventKind

OURS = ("/workerpools/_run/", "/workerpools/_pools/", "/workerpools/_stats/", "/workerpools/sqlalchemy/")
POOL = ("/sqlalchemy/pool/", "/sqlalchemy/util/queue.py")
HTTP = ("/workerpools/_run/", "/workerpools/_pools/", "/workerpools/_stats/", "/workerpools/httpx/")
CORE = ("/httpcore/_sync/connection_pool.py", "/httpcore/_synchronization.py")

#: A warm task that succeeds is struck at each point, the others at every nth; EVERY_POINT=1 strikes all at each.
STEP = int(os.environ.get("EVERY_POINT", "11"))


class Stand:
    """A shop with one connection of each kind, whose task is struck."""

    def __init__(self, database: Database, driver: str, echo: EchoUpstream) -> None:
        self.shop = shop = Shop()
        shop.database = database
        shop.driver = driver
        shop.add_database(database.url(driver), pool_size=1, max_overflow=0, acquire_timeout=1.0)
        shop.add_api(echo.url, max_connections=2)
        self.server = psycopg2.connect(database.dsn)
        self.server.autocommit = True
        self.query("create table orders (id int primary key)")

        @shop.task()
        def uses_database(this: Any, number: int, fails: bool = False) -> int:
            insert(this.session, number)
            if fails:
                raise ValueError("mine")
            return number

        @shop.task()
        def uses_api(this: Any, number: int, fails: bool = False) -> int:
            assert this.api.get("/echo/x").status_code == 200
            if fails:
                raise ValueError("mine")
            return number

        self.tasks = {"db": uses_database, "api": uses_api}

    def query(self, statement: str) -> list[Any]:
        with self.server.cursor() as cursor:
            cursor.execute(statement)
            return list(cursor.fetchall()) if cursor.description else []

    def connections(self) -> int:
        return int(
            self.query(
                "select count(*) from pg_stat_activity where pid <> pg_backend_pid() and datname = current_database()"
            )[0][0]
        )

    def problems(self, name: str, number: int) -> list[str]:
        """Return what is wrong after a task that was struck."""
        found: list[str] = []
        shop = self.shop
        if attempts.current() is not None or attempts.running():
            found.append("the attempt runs on")
            attempts._current.set(None)
            attempts._active.attempts.clear()
        now = stats(shop.pools, name)
        if (now.in_use, now.pending) != (0, 0):
            found.append(f"in use {now.in_use}, pending {now.pending}")
        if shop.checked_out():
            found.append("checked out")
        if any(event.kind is EventKind.CONNECTION_LEAKED for event in shop.events):
            found.append("a leak is told")
            shop.events.clear()
        if name == "api":
            traffic = shop.api.adapter._traffic[shop.api.get()]
            if traffic.requests:
                found.append("in flight")
                traffic.requests.clear()
            if any(each._current.users for each in traffic.transports):
                found.append("users of a generation")
        try:
            result = in_a_thread(lambda: self.tasks[name].apply((1_000_000 + number,)))
            if result.state != "SUCCESS":
                found.append(f"the next task fails: {result.result!r}")
        except TimeoutError:
            found.append("the next task hangs")
        if name == "db":
            until = time.monotonic() + 2
            while (count := self.connections()) != (now := stats(shop.pools, name)).open or count != 1:
                if time.monotonic() > until:
                    found.append(f"{count} connections, {now.open} counted as open")
                    break
                gc.collect()
                time.sleep(0.01)
        else:
            live = shop.api._holder.live
            assert live is not None
            if (now := stats(shop.pools, name)).open != (count := live.opening.descriptors.count()):
                found.append(f"{count} connections, {now.open} counted as open")
        return found


@pytest.fixture
def stand(database: Database, echo: EchoUpstream, driver: str) -> Iterator[Stand]:
    made = Stand(database, driver, echo)
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    with ExitStack() as ends:
        ends.callback(logging.disable, disabled)
        ends.callback(made.server.close)
        ends.callback(made.shop.close)
        yield made


@pytest.mark.parametrize("error", [SoftTimeLimitExceeded, SystemExit])
@pytest.mark.parametrize("fails", [False, True], ids=["succeeds", "fails"])
@pytest.mark.parametrize("cold", [False, True], ids=["warm", "cold"])
@pytest.mark.parametrize(
    ("name", "driver", "files"),
    [("db", "psycopg2", OURS + POOL), ("db", "psycopg", OURS + POOL), ("api", "psycopg2", HTTP + CORE)],
    ids=["psycopg2", "psycopg", "httpx"],
)
def test_nothing_is_leaked(
    stand: Stand, name: str, files: tuple[str, ...], fails: bool, cold: bool, error: Callable[[], BaseException]
) -> None:
    task, struck, wrong = stand.tasks[name], 0, []
    task.apply((0,))
    number = 0
    step = 1 if error is SoftTimeLimitExceeded and not (cold or fails) else STEP
    while True:
        number += step
        if cold:
            (stand.shop.engine if name == "db" else stand.shop.api).close(0.0)
        with Interruption(files, number, error) as interruption, suppress(SystemExit):
            task.apply((number, fails))
        if not interruption.where:
            break
        struck += 1
        if os.environ.get("SHOW"):
            print(number, interruption.where, flush=True)
        for problem in stand.problems(name, number):
            wrong.append(f"{problem}: {number} {interruption.where}")
    assert wrong == []
    assert struck > 100 / step
