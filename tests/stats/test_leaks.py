"""What a body leaves checked out is told of, and goes back; what others use is left alone."""

from __future__ import annotations

import contextlib
import contextvars
import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
import sqlalchemy
from sqlalchemy import text
from sqlalchemy.orm import Session

from tests.support.databases import Database
from tests.support.shop import Shop
from tests.support.upstream import EchoUpstream
from workerpools import PooledTask, WorkerPools
from workerpools._stats.snapshot import ResourceStats
from workerpools.httpx import HttpxClient
from workerpools.sqlalchemy import SQLAlchemyEngine

ONE = text("select 1")
PATIENCE = 30.0


class Place:
    """A shop whose pools have a single connection each: one that stays out is felt at once."""

    def __init__(self, database: Database, driver: str, url: str) -> None:
        self.shop = shop = Shop()
        self.pools = shop.pools
        shop.add_database(database.url(driver), pool_size=1, max_overflow=0, acquire_timeout=0.2)
        shop.add_api(url, max_connections=1, timeout=httpx.Timeout(10.0, pool=0.2))
        self.base = type("Base", (shop.base,), {"abstract": True, "replay": False})
        self.database = database

    def task(self, body: Callable[..., Any], **options: Any) -> Any:
        # Celery takes a body's name for source code.
        body.__name__ = "body" if body.__name__ == "<lambda>" else body.__name__
        return self.shop.task(base=self.base, **options)(body)

    def told(self, kind: str) -> list[tuple[str, Any]]:
        return [(event.resource, event.fields) for event in self.shop.events if event.kind.value == kind]

    def stats(self, name: str) -> ResourceStats:
        (process,) = self.pools.stats().processes
        return next(each for each in process.resources if each.name == name)

    def is_whole(self, task: Any) -> None:
        """Check that the one connection of each pool can be had, and that nothing else was counted as a leak."""
        leaks = [
            self.stats(name).value("leaks")
            for name, each in (("db", self.shop.engine), ("api", self.shop.api))
            if each.is_open
        ]

        def uses(this: Any) -> None:
            assert this.session.scalar(ONE) == 1
            assert this.api.get("/echo/1").text == "1"

        self.task(uses)()
        assert [self.stats(name).in_use for name in ("db", "api")] == [0, 0]
        assert sum(self.stats(name).value("leaks") for name in ("db", "api")) == sum(leaks)


@pytest.fixture(params=["psycopg2", "psycopg"])
def place(request: pytest.FixtureRequest, database: Database) -> Iterator[Place]:
    with EchoUpstream() as echo:
        made = Place(database, request.param, echo.url)
        with made.pools:
            yield made


KEPT: list[Any] = []


@pytest.fixture(autouse=True)
def nothing_kept() -> Iterator[None]:
    yield
    KEPT.clear()


def connects(this: Any) -> None:
    connection = this.db.connect()
    connection.execute(text("create table if not exists traces (n int)"))
    connection.execute(text("insert into traces values (1)"))
    KEPT.append(connection)


def begins(this: Any) -> None:
    connection = this.db.connect()
    connection.begin()
    connection.begin_nested()
    connection.execute(ONE)
    KEPT.append(connection)


def fetches(this: Any) -> None:
    KEPT.append(this.db.connect().execution_options(stream_results=True).execute(text("select generate_series(1, 9)")))


def raw(this: Any) -> None:
    connection = this.db.raw_connection()
    connection.cursor().execute("select 1")
    KEPT.append(connection)


def own_session(this: Any) -> None:
    session = Session(this.db)
    session.execute(ONE)
    KEPT.append(session)


def suspended(this: Any) -> None:
    def rows() -> Iterator[Any]:
        with this.db.connect() as connection:
            yield from connection.execute(ONE)

    KEPT.append(generator := rows())
    next(generator)


@pytest.mark.parametrize("body", [connects, begins, fetches, raw, own_session, suspended])
@pytest.mark.parametrize("fails", [False, True])
def test_a_database_connection_that_was_left(place: Place, body: Callable[[Any], None], fails: bool) -> None:
    """Rolled back and given back, whether the body returned or failed, and told of once with the task's name."""

    def leaves(this: Any) -> None:
        body(this)
        if fails:
            raise LookupError("the body's own")

    task = place.task(leaves)
    for _ in range(3):
        with pytest.raises(LookupError, match="own") if fails else contextlib.nullcontext():
            task()
    leaked = place.told("connection_leaked")
    assert [(name, fields["task"], fields["returned"]) for name, fields in leaked] == [("db", task.name, "true")] * 3
    assert place.stats("db").value("leaks") == 3
    place.is_whole(task)
    # One connection for all of it, and nothing of what it had not committed.
    assert place.stats("db").value("opened") == 1
    assert place.database.execute("select to_regclass('traces')")[0][0] is None
    assert not place.database.execute(
        "select 1 from pg_stat_activity where application_name like 'workerpools %' and state <> 'idle'"
        " and datname = current_database()"
    )


def test_what_was_given_back_cannot_be_used_any_more(place: Place) -> None:
    """The library's own errors say so; a connection that somebody else may have by now is not touched."""
    place.task(connects)()
    (connection,) = KEPT
    assert connection.closed
    with pytest.raises(sqlalchemy.exc.ResourceClosedError):
        connection.execute(ONE)
    connection.close()


def streams(this: Any) -> None:
    KEPT.append(this.api.send(this.api.build_request("GET", "/echo/stream"), stream=True))


def streams_and_forgets(this: Any) -> None:
    this.api.send(this.api.build_request("GET", "/echo/stream"), stream=True)


def streams_half(this: Any) -> None:
    response = this.api.send(this.api.build_request("GET", "/echo/" + 3000 * "x"), stream=True)
    KEPT.append(chunks := response.iter_bytes(100))
    next(chunks)


@pytest.mark.parametrize("body", [streams, streams_and_forgets, streams_half])
def test_a_response_that_was_left_open(place: Place, body: Callable[[Any], None]) -> None:
    """It is closed, although nobody may hold it any more: httpcore would keep its connection for ever."""
    task = place.task(body)
    for _ in range(3):
        task()
    leaked = place.told("connection_leaked")
    assert [(name, fields["task"], fields["returned"]) for name, fields in leaked] == [("api", task.name, "true")] * 3
    place.is_whole(task)
    if body is streams:
        assert all(response.is_closed for response in KEPT)
        with pytest.raises(httpx.StreamClosed):
            KEPT[0].read()
    if body is streams_half:
        # What httpx had read already may still come; then there is an end to it.
        with pytest.raises(httpx.StreamClosed):
            list(KEPT[0])


def test_a_response_that_a_body_returns_is_closed(place: Place) -> None:
    """The attempt is over when the body returns: what is wanted of a response must be read in it."""
    task = place.task(lambda this: this.api.send(this.api.build_request("GET", "/echo/1"), stream=True))
    assert task().is_closed
    assert task.apply().get().is_closed
    read = place.task(lambda this: this.api.get("/echo/whole"))
    assert read().text == "whole"
    assert len(place.told("connection_leaked")) == 2


def test_a_task_called_as_a_function_leaves_it_to_its_caller(place: Place) -> None:
    """It is a part of the caller's attempt, which may still read the response."""
    inner = place.task(lambda this: this.api.send(this.api.build_request("GET", "/echo/late"), stream=True))
    outer = place.task(lambda this: inner().read())
    assert outer() == b"late"
    assert place.told("connection_leaked") == []


def test_what_the_caller_of_a_task_uses_is_left_alone(place: Place) -> None:
    """Outside of any attempt, and in the attempt that this one runs inside of."""

    class Wide(PooledTask):
        abstract = True
        db = place.pools.add(SQLAlchemyEngine(place.database.url(), pool_size=3, max_overflow=0), name="wide")

    place.base = Wide  # type: ignore[assignment]

    def inner(this: Any) -> None:
        KEPT.append(this.db.connect())

    def outer(this: Any) -> int:
        with this.db.connect() as connection:
            place_inner.apply().get(disable_sync_subtasks=False)
            return int(connection.scalar(ONE))

    place_inner, place_outer = place.task(inner), place.task(outer)
    with Wide.__dict__["db"].get().connect() as connection:
        assert place_outer() == 1
        assert connection.scalar(ONE) == 1
    assert [fields["task"] for _, fields in place.told("connection_leaked")] == [place_inner.name]


def test_a_thread_that_still_runs_keeps_its_connection(place: Place) -> None:
    """With the attempt in its context or without, and one that the body has handed over as soon as it has used it."""
    go, used = threading.Event(), threading.Event()
    seen: list[Any] = []

    def works(this: Any, connection: Any) -> None:
        with connection or this.db.connect() as mine:
            seen.append(mine.scalar(ONE))
            used.set()
            assert go.wait(PATIENCE)
            seen.append(mine.scalar(ONE))

    def body(this: Any, how: str) -> None:
        connection = this.db.connect() if how == "handed over" else None
        arguments = (this, connection)
        context = contextvars.copy_context() if how == "with context" else contextvars.Context()
        threads.append(thread := threading.Thread(target=context.run, args=(works, *arguments)))
        thread.start()
        assert used.wait(PATIENCE)

    task = place.task(body)
    for how in ("without", "with context", "handed over"):
        threads: list[threading.Thread] = []
        task(how)
        go.set()
        threads[0].join(PATIENCE)
        assert seen == [1, 1]
        seen.clear()
        go.clear()
        used.clear()
    told = place.told("connection_leaked")
    assert [fields["returned"] for _, fields in told] == ["false"]
    place.is_whole(task)


def test_what_a_factory_keeps_for_its_value_stays(place: Place) -> None:
    """A value that is opened by an attempt's first use lives as long as the process."""
    engine = place.shop.engine
    holder = place.pools.add(lambda: engine.get().connect(), name="holder", close=lambda made: made.close())
    task = place.task(lambda this: holder.get().scalar(ONE))
    assert (task(), task()) == (1, 1)
    assert place.told("connection_leaked") == []
    holder.close()


def test_a_lost_connection_that_was_left(place: Place) -> None:
    """It cannot be rolled back; it is thrown away, and the body's own outcome stands."""

    def body(this: Any) -> str:
        connects(this)
        place.database.execute(
            "select pg_terminate_backend(pid, 10000) from pg_stat_activity"
            " where application_name like 'workerpools %' and datname = current_database()"
        )
        return "done"

    task = place.task(body)
    assert task() == "done"
    assert len(place.told("connection_leaked")) == 1
    place.is_whole(task)


def test_a_replay_finds_the_connection_that_its_predecessor_left(place: Place) -> None:
    """There is one connection: the second run would wait for it in vain."""
    runs: list[int] = []

    def body(this: Any) -> int:
        runs.append(1)
        connection = this.db.connect()
        connection.execute(ONE)
        KEPT.append(connection)
        if len(runs) == 1:
            connection.execute(text("select pg_terminate_backend(pg_backend_pid())"))
        return len(runs)

    assert place.task(body, replay=True, idempotent=True)() == 2


def test_one_that_is_held_too_long_is_told_of_once_with_its_stack(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    """While it is held: the line has the task's name, and its record where the connection was acquired."""
    place.shop.app.conf.workerpools_leak_after = 0.05

    def holds(this: Any) -> None:
        with this.db.connect(), this.api.stream("GET", "/echo/long"):
            deadline = time.monotonic() + PATIENCE
            while len(place.told("connection_held")) < 2 and time.monotonic() < deadline:
                time.sleep(0.01)
            # Looked at a few times more: there is no second line.
            time.sleep(0.3)

    task = place.task(holds)
    with caplog.at_level(logging.WARNING, "workerpools.leaks"):
        task()
    lines = [record for record in caplog.records if record.name == "workerpools.leaks"]
    assert sorted(record.__dict__["workerpools_resource"] for record in lines) == ["api", "db"]
    for record in lines:
        assert record.getMessage().startswith("connection_held resource=")
        assert f"task={task.name} held=" in record.getMessage()
        assert f"at={__file__}:" in record.getMessage()
        assert "in holds" in (record.stack_info or "")
        # No source: it may hold what nobody is to read.
        assert "this.db.connect()" not in (record.stack_info or "")
        assert record.__dict__["workerpools_leak_after"] == 0.05
    assert place.told("connection_leaked") == []


def test_an_adapters_own_option_wins_over_the_setting(place: Place) -> None:
    """Each resource may say what is too long for it."""
    place.shop.app.conf.workerpools_leak_after = 0.5
    for option, found in ((None, 0.5), (7.0, 7.0)):
        made = place.pools.add(SQLAlchemyEngine(place.database.url(), leak_after=option), name=f"after{found}")
        assert made.leak_after == found
        api = place.pools.add(HttpxClient(leak_after=option), name=f"api{found}")
        assert api.leak_after == found
    assert WorkerPools().shared.leak_after is None
