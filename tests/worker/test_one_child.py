"""Task after task in one child of a real worker: what one leaves behind, loses or holds up is not the next one's."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import count
from typing import Any

import psycopg2
import pytest
from celery.result import AsyncResult

from tests.support.cuts import Cut
from tests.support.proxy import TcpProxy
from tests.support.stand import Stand, wait_until
from tests.support.trips import trips
from tests.support.worker import WorkerProcess

pytestmark = pytest.mark.worker

#: The drivers, and where the application reads the URL for each.
DRIVERS = {"psycopg2": "SHOP_DATABASE", "psycopg": "SHOP_STOCK"}

SETUP = (
    "create table stock (id int primary key, sku text)",
    "insert into stock values (1, 'cup')",
    """create function enter() returns void language plpgsql as $$ begin
        perform set_config('app.tenant', 'a', false), set_config('role', 'pg_monitor', false), pg_advisory_lock(7);
        execute 'set search_path to pg_catalog';
        execute 'set statement_timeout = 7777';
        execute 'create temp table scratch (n int)';
        execute 'listen sold';
    end $$""",
    """create function sell() returns trigger language plpgsql as
        $$ begin perform pg_notify('sold', new.number::text); return null; end $$""",
    "create table sales (number int)",
    "create trigger sell after insert on sales for each row execute function sell()",
)

numbers = count(1)


@dataclass(frozen=True)
class Child:
    """One child, whose connections of each driver go through a proxy."""

    stand: Stand
    worker: WorkerProcess
    proxies: dict[str, TcpProxy]


@dataclass(frozen=True)
class Side:
    """The child as the tasks of one driver see it."""

    stand: Stand
    worker: WorkerProcess
    proxy: TcpProxy
    driver: str

    def call(self, name: str, *args: Any, **options: Any) -> Any:
        return self.stand.call(f"{self.driver}.{name}", *args, **options)

    def outcome(self, name: str, *args: Any, **options: Any) -> AsyncResult:
        return self.stand.outcome(f"{self.driver}.{name}", *args, **options)

    def execute(self, *statements: str) -> list[Any]:
        """Have a task execute these; return the first value of each."""
        answer: list[Any] = self.call("execute", next(numbers), statements)
        return answer

    def bodies(self, detail: object) -> int:
        """Return how often a body ran."""
        return [entry.detail for entry in self.stand.entries("body")].count(detail)

    def lose(self, what: bytes, *, deliver: bool, then: Any = None) -> Cut:
        """End the connection at the next chunk that contains this."""

        def found(chunk: bytes) -> bool:
            if what in chunk and then is not None:
                self.proxy.lead_to(then)
            return what in chunk

        return self.proxy.cut_when(found, deliver=deliver)

    def logged(self, *words: str) -> list[str]:
        lines = self.worker.log().splitlines()
        return [line for line in lines if all(word in line for word in (f"resource={self.driver} ", *words))]


@pytest.fixture(scope="module")
def child(shared: Stand) -> Iterator[Child]:
    for statement in SETUP:
        shared.database.execute(statement)
    with ExitStack() as opened:
        proxies = {
            driver: opened.enter_context(TcpProxy(shared.database.host, shared.database.port)) for driver in DRIVERS
        }
        env = {DRIVERS[driver]: shared.database.through(proxy).url(driver) for driver, proxy in proxies.items()}
        worker = opened.enter_context(shared.worker(app="tests.worker.one_child:app", concurrency=1, env=env))
        yield Child(shared, worker, proxies)


@pytest.fixture(params=list(DRIVERS))
def side(request: pytest.FixtureRequest, child: Child) -> Iterator[Side]:
    """Whatever happened to a task, the child lives and nothing of its pool is lost."""
    made = Side(child.stand, child.worker, child.proxies[request.param], request.param)
    made.execute("select 1")
    pid = made.call("gauges")["pid"]
    yield made
    made.proxy.pass_through()
    made.execute("select 1")
    now = made.call("gauges")
    wait_until(lambda: made.proxy.open == now["open"], f"{made.proxy}, {now}", 5.0)
    assert now == {"pid": pid, "open": now["open"], "in use": 0, "pending": 0, "checked out": 0}
    assert 1 <= now["open"] <= 2


@pytest.mark.parametrize("limit", [None, 30.0], ids=["without a limit", "with a limit"])
@pytest.mark.parametrize("statement", ["select count(*) from orders", "insert into orders values (-1, 0)"])
def test_a_task_takes_two_trips(side: Side, statement: str, limit: float | None) -> None:
    """Nothing before its first statement, and only COMMIT after it."""
    for _ in range(2):
        with trips(side.proxy) as sent:
            side.call("execute", next(numbers), [statement], soft_time_limit=limit)
    assert len(sent) == 2, sent


@pytest.mark.parametrize(
    ("what", "deliver", "runs"),
    [(b"", False, 2), (b"", True, 2), (b"COMMIT", False, 2), (b"COMMIT", True, 1)],
    ids=["first flight lost", "its answer lost", "COMMIT lost", "its acknowledgement lost"],
)
def test_what_is_lost_in_flight_is_done_once(side: Side, what: bytes, deliver: bool, runs: int) -> None:
    number = next(numbers)
    cut = side.lose(what, deliver=deliver)
    side.call("execute", number, [f"insert into orders values ({number}, 0)"])
    assert cut.fired == 1
    assert side.stand.orders(number) == [0]
    assert side.bodies(number) == runs


def test_a_backend_that_is_killed_in_the_first_flight(side: Side) -> None:
    """It waits for a lock; the body runs again, once."""
    number = next(numbers)
    with closing(psycopg2.connect(side.stand.database.dsn)) as holder, holder.cursor() as cursor:
        cursor.execute("lock table orders")
        sent = side.stand.send(f"{side.driver}.execute", number, [f"insert into orders values ({number}, 0)"])
        waiting = "select pid from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'"
        ((pid,),) = wait_until(lambda: side.stand.database.execute(waiting), "the task to wait for the lock")
        side.stand.database.execute("select pg_terminate_backend(%s, 10000)", pid)
    sent.get(timeout=30)
    assert side.stand.orders(number) == [0]
    assert side.bodies(number) == 2


LEFT = {
    "a tenant": ("set app.tenant = 'a'", "select coalesce(current_setting('app.tenant', true), '')"),
    "a role": ("set role pg_monitor", "select current_user"),
    "a path": ("set search_path to pg_catalog", "select current_setting('search_path')"),
    "a time-out": ("set statement_timeout = 7777", "select current_setting('statement_timeout')"),
    "an advisory lock": (
        "select pg_advisory_lock(7)",
        "select count(*) from pg_locks where locktype = 'advisory' and pid = pg_backend_pid()",
    ),
    "a temporary table": ("create temp table scratch (n int)", "select to_regclass('pg_temp.scratch')::text"),
    "a cursor": ("declare kept cursor with hold for select 1", "select count(*) from pg_cursors where is_holdable"),
    "a channel": ("listen sold", "select count(*) from pg_listening_channels()"),
}


@pytest.mark.parametrize(
    "leaves",
    [[leaves for leaves, _ in LEFT.values()], ["select enter()"], ["do 'begin perform enter(); end'"]],
    ids=["statements", "a function", "a block"],
)
def test_what_a_task_left_on_its_session_is_gone(side: Side, leaves: list[str]) -> None:
    """On the same connection, also after a task that failed, whose rollback takes a reset back."""
    pid, asks = "select pg_backend_pid()", [asks for _, asks in LEFT.values()]
    # A custom setting that was set once is empty ever after, and not unknown.
    fresh = side.execute(pid, *asks)
    within = side.execute(*leaves, *asks)[len(leaves) :]
    changed = [before != now for before, now in zip(fresh[1:], within, strict=True)]
    # A channel is listened to from COMMIT on.
    assert sum(changed) >= len(LEFT) - (1 if len(leaves) > 1 else 2), within
    assert side.execute(pid, *asks) == fresh
    side.execute(*leaves)
    assert side.outcome("execute", next(numbers), ["select 1"], True).state == "FAILURE"
    assert side.execute(pid, *asks) == fresh


@pytest.mark.parametrize("deliver", [False, True], ids=["COMMIT lost", "its acknowledgement lost"])
@pytest.mark.parametrize(
    ("statement", "known"),
    [
        ("select pg_notify('sold', '{}')", True),
        ("notify sold, '{}'", True),
        ("insert into sales values ({})", True),
        ("select pg_notify('sold', '{}')", False),
    ],
    ids=["function", "statement", "trigger", "nobody to ask"],
)
def test_a_notification_is_delivered_once(side: Side, statement: str, deliver: bool, known: bool) -> None:
    """It has no id before COMMIT and is delivered by it. Where nobody can say what became of it, nothing runs again."""
    number = next(numbers)
    with closing(psycopg2.connect(side.stand.database.dsn)) as listener, listener.cursor() as cursor:
        listener.autocommit = True
        cursor.execute("listen sold")
        cut = side.lose(b"COMMIT", deliver=deliver, then=None if known else Nowhere)
        result = side.outcome("execute", number, [statement.format(number)])
        side.proxy.lead_to(side.stand.database)
        assert cut.fired == 1
        assert result.state == ("SUCCESS" if known else "FAILURE")
        assert side.bodies(number) == (2 if known and not deliver else 1)
        if not known:
            (line,) = side.logged("replay_refused", "kind=indeterminate")[-1:]
            assert "it may have been done" in line
        cursor.execute("select 1")
        heard = [notice.payload for notice in listener.notifies]
    assert heard == ([str(number)] if known or deliver else [])


class Nowhere:
    """A port on which nothing listens: TCP port 1 is tcpmux's, which no machine serves any more."""

    host, port = "127.0.0.1", 1


def test_tasks_that_were_interrupted_lose_nothing(side: Side) -> None:
    """Each signal of a soft time limit strikes somewhere between the begin of a task and its end."""
    tasks, first = 400, 1_000_000
    answer = side.stand.call("interrupt", side.driver, first, tasks, 7)
    assert answer["errors"].get("SoftTimeLimitExceeded", 0) > tasks / 10, answer["errors"]
    rows = dict(
        side.stand.database.execute("select number, count(*) from orders where number >= %s group by number", first)
    )
    assert [number for number in answer["done"] if rows.get(number) != 1] == []
    assert [number for number, found in rows.items() if found != 1] == []
    side.stand.database.execute("delete from orders where number >= %s", first)


def test_nested_tasks_that_exhaust_their_own_pool(side: Side) -> None:
    """One connection and one to spare: the third level says so at once, and nothing runs again."""
    before = side.bodies("first")
    started = time.monotonic()
    result = side.outcome("first")
    assert time.monotonic() - started < 8.0
    assert result.state == "FAILURE"
    assert "all 2 connections of this process's pool are held by runs that end only after this one" in str(
        result.result
    )
    assert f"(shop.{side.driver}.first, shop.{side.driver}.second)" in str(result.result)
    assert side.bodies("first") == before + 1
    assert side.logged("replay_refused", f"task=shop.{side.driver}.first", "another try would fail in the same way")


def test_nested_tasks_that_lock_each_other(side: Side) -> None:
    """The wait for the task around ends soon and by its name."""
    number, inner = next(numbers), next(numbers)
    started = time.monotonic()
    result = side.outcome("around", number, inner, "update stock set sku = 'x' where id = 1")
    assert time.monotonic() - started < 8.0
    assert result.state == "FAILURE"
    assert side.bodies(number) == side.bodies(inner) == 1
    assert side.logged("replay_refused", f"task=shop.{side.driver}.around", "another try would fail in the same way")
    assert side.stand.database.execute("select sku from stock") == [("cup",)]
