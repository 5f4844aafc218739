"""A task that runs another one in its body, with ``.apply()``, and waits for itself: found, bounded and named."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from typing import Any

import httpx
import psycopg2
import pytest
import sqlalchemy
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from tests.support.databases import Database
from tests.support.shop import NUMBERS, Shop, insert
from tests.support.upstream import EchoUpstream
from workerpools import FailureKind, PooledTask, classify
from workerpools.sqlalchemy import SQLAlchemyEngine, TaskSession
from workerpools.sqlalchemy._nested import find_blocker

#: More than it takes, and less than any other bound.
SOON = 8.0

BLOCKED = text("select count(*) from pg_locks where not granted")


@pytest.mark.parametrize(
    ("blocked", "found"),
    [
        ({}, None),
        ({1: [2]}, 2),
        ({1: [7]}, None),
        ({1: [7], 7: [2]}, 2),
        ({1: [7, 8], 8: [9], 9: [3]}, 3),
        ({1: [7], 7: [1]}, None),
        ({1: [0]}, None),
        ({4: [2]}, None),
    ],
)
def test_find_blocker(blocked: Mapping[int, list[int]], found: int | None) -> None:
    """Session 1 waits; 2 and 3 cannot go on."""
    assert find_blocker(1, {2, 3}, blocked) == found


@pytest.fixture(params=["psycopg2", "psycopg"])
def shop(database: Database, request: pytest.FixtureRequest) -> Iterator[Shop]:
    made = Shop(database, request.param)
    with made.engine.get().begin() as connection:
        connection.execute(text("create table stock (id int primary key, sku text)"))
        connection.execute(text("insert into stock values (1, 'cup'), (2, 'jug')"))
    yield made
    made.pools.close()


def update(session: Any, number: int) -> None:
    session.execute(text("update stock set sku = 'x' where id = :id"), {"id": number})


def notes(caught: pytest.ExceptionInfo[BaseException]) -> str:
    return " ".join(caught.value.__notes__)


def inner_run(task: Any) -> Any:
    return task.apply().get(disable_sync_subtasks=False)


def base_with(shop: Shop, **options: Any) -> type[Any]:
    """Return a base whose engine has these options; it is the shop's from now on."""
    url = shop.database.url(shop.driver)
    shop.engine = shop.pools.add(SQLAlchemyEngine(url, **options), name=f"db{next(NUMBERS)}")
    return type("Base", (PooledTask,), {"abstract": True, "db": shop.engine, "session": TaskSession(shop.engine)})


def nest(shop: Shop, **options: Any) -> tuple[Any, list[str]]:
    """Return a task of three levels, each with a connection of its own; and the list of its runs."""
    base = base_with(shop, **options)
    runs: list[str] = []

    def level(name: str, inner: Any) -> Any:
        @shop.task(base=base, name=name)
        def task(self: Any) -> int:
            runs.append(name)
            number: int = self.session.scalar(text("select 1"))
            return number if inner is None else number + inner_run(inner)

        return task

    return level("first", level("second", level("third", None))), runs


def test_a_pool_exhausted_by_the_runs_around(shop: Shop) -> None:
    """The wait is not begun, the error says what to do, and nothing runs again."""
    first, runs = nest(shop, pool_size=1, max_overflow=1, acquire_timeout=60)
    started = time.monotonic()
    with pytest.raises(sqlalchemy.exc.TimeoutError, match="raise max_overflow") as caught:
        first()
    assert time.monotonic() - started < SOON
    assert runs == ["first", "second", "third"]
    assert "all 2 connections of this process's pool are held by runs that end only after this one" in str(caught.value)
    assert "(first, second)" in str(caught.value)
    assert "another try would fail in the same way" in notes(caught)
    failure = classify(caught.value)
    assert failure is not None
    assert failure.kind is FailureKind.PERMANENT
    assert shop.checked_out() == 0


def test_one_connection_more_is_enough(shop: Shop) -> None:
    """As the error says."""
    first, _ = nest(shop, pool_size=1, max_overflow=2)
    assert first() == 3


def test_a_connection_of_another_thread_may_become_free(shop: Shop) -> None:
    """It is waited for."""
    base = base_with(shop, pool_size=1, max_overflow=1, acquire_timeout=60)
    pool = shop.engine.get().pool
    taken, free = threading.Event(), threading.Event()

    def holds() -> None:
        with shop.engine.get().connect():
            taken.set()
            free.wait(30)

    @shop.task(base=base)
    def inner(self: Any) -> int:
        # What a thread does while this one waits.
        threading.Timer(0.5, free.set).start()
        number: int = self.session.scalar(text("select 1"))
        return number

    @shop.task(base=base)
    def outer(self: Any) -> int:
        self.session.scalar(text("select 1"))
        return int(inner_run(inner))

    holder = threading.Thread(target=holds)
    holder.start()
    taken.wait(30)
    assert isinstance(pool, sqlalchemy.pool.QueuePool)
    assert outer() == 1
    assert free.is_set()
    holder.join()


def test_a_run_that_holds_all_connections_itself(shop: Shop) -> None:
    """It may have given one to a thread, so it waits as long as ever; but then it is not run again."""
    base = base_with(shop, pool_size=1, max_overflow=1, acquire_timeout=0.5)
    runs: list[int] = []

    @shop.task(base=base)
    def task(self: Any) -> None:
        runs.append(1)
        self.session.scalar(text("select 1"))
        with self.db.connect(), self.db.connect():
            pass

    with pytest.raises(sqlalchemy.exc.TimeoutError) as caught:
        task()
    assert "all 2 connections of this process's pool are held by this very run" in notes(caught)
    assert "another try would fail in the same way" in notes(caught)
    assert len(runs) == 1


def test_the_connections_of_a_client(echo: EchoUpstream) -> None:
    """The same holds for HTTP: a response that the run around has not read to its end keeps its connection."""
    shop = Shop()
    shop.add_api(echo.url, limits=httpx.Limits(max_connections=1), timeout=httpx.Timeout(5, pool=0.5))
    runs: list[int] = []

    @shop.task(name="inner")
    def inner(self: Any) -> None:
        runs.append(1)
        self.api.get("/echo/2")

    @shop.task(name="outer")
    def outer(self: Any) -> None:
        with self.api.stream("GET", "/echo/1"):
            inner_run(inner)

    with pytest.raises(httpx.PoolTimeout) as caught:
        outer()
    assert "held by runs that end only after this one, which is nested in them (outer)" in notes(caught)
    assert "another try would fail in the same way" in notes(caught)
    assert len(runs) == 1
    shop.close()


@pytest.mark.parametrize("how", ["row", "unique at COMMIT", "through another session"])
def test_a_lock_of_the_run_around(shop: Shop, how: str) -> None:
    """For the server there is no deadlock: the outer session is idle. The wait ends soon, by its name, on both drivers,
    wherever it is, and nothing runs again."""
    base = base_with(shop)
    runs: list[str] = []

    @shop.task(base=base, name="inner")
    def inner(self: Any) -> None:
        runs.append("inner")
        if how == "unique at COMMIT":
            insert(self.session, 1)
        else:
            update(self.session, 1 if how == "row" else 2)

    @shop.task(base=base, name="outer")
    def outer(self: Any) -> None:
        runs.append("outer")
        if how == "unique at COMMIT":
            insert(self.session, 1)
        else:
            update(self.session, 1)
        if how == "through another session":
            between.start()
            wait_for_blocked(self.session)
        inner_run(inner)

    def holds_2_and_wants_1() -> None:
        with closing(psycopg2.connect(shop.database.dsn)) as connection, connection.cursor() as cursor:
            cursor.execute("update stock set sku = 'y' where id = 2")
            cursor.execute("update stock set sku = 'y' where id = 1")

    between = threading.Thread(target=holds_2_and_wants_1)
    started = time.monotonic()
    with pytest.raises(DBAPIError) as caught:
        outer()
    assert time.monotonic() - started < SOON
    assert runs == ["outer", "inner"]
    assert "it waited for a lock of the run of outer in which it is nested" in notes(caught)
    assert "another try would fail in the same way" in notes(caught)
    assert shop.checked_out() == 0
    assert shop.rows() == []
    if how == "through another session":
        between.join()

    # The next nested run, whose connection had a wait ended, waits for nothing.
    @shop.task(base=base)
    def later(self: Any) -> None:
        update(self.session, 2)
        fine.apply().get(disable_sync_subtasks=False)

    @shop.task(base=base)
    def fine(self: Any) -> None:
        update(self.session, 1)

    later()


def wait_for_blocked(session: Any) -> None:
    while not session.scalar(BLOCKED):
        time.sleep(0.02)


def test_a_lock_of_anyone_else_is_waited_for(shop: Shop) -> None:
    """However long it takes, also while the run around holds a transaction open."""
    base = base_with(shop)

    @shop.task(base=base)
    def inner(self: Any) -> None:
        update(self.session, 1)

    @shop.task(base=base)
    def outer(self: Any) -> None:
        update(self.session, 2)
        inner_run(inner)

    with closing(psycopg2.connect(shop.database.dsn)) as connection, connection.cursor() as cursor:
        cursor.execute("update stock set sku = 'y' where id = 1")
        # Longer than it takes to find a wait for the run around.
        commits = threading.Timer(5.0, lambda: (begun.set(), connection.commit()))
        begun = threading.Event()
        commits.start()
        outer()
        assert begun.is_set()
        commits.join()


def test_nothing_is_watched_without_a_connection_around(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run around that has committed and given its connection back holds no lock."""
    base = base_with(shop)
    started: list[str] = []
    start: Callable[[Any], None] = threading.Thread.start

    def noted(thread: threading.Thread) -> None:
        started.append(thread.name)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", noted)

    @shop.task(base=base)
    def inner(self: Any) -> None:
        update(self.session, 1)

    @shop.task(base=base)
    def outer(self: Any, commits: bool) -> None:
        update(self.session, 1)
        if commits:
            self.session.commit()
        else:
            self.session.rollback()
            update(self.session, 2)
        inner_run(inner)

    outer(True)
    assert "workerpools-locks" not in started
    outer(False)
    assert "workerpools-locks" in started
