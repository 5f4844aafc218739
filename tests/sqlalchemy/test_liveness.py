"""Database connections: checked when they were idle, replaced before they rot, bounded by the task's deadline."""

from __future__ import annotations

import threading
import time
from contextlib import ExitStack
from typing import Any

import pytest
import sqlalchemy
from celery.exceptions import SoftTimeLimitExceeded
from sqlalchemy import text
from sqlalchemy.exc import OperationalError

from tests.support.faults import terminate_backends
from tests.support.shop import Shop, insert
from workerpools import ConfigurationError, DeadlineExceeded, Resource
from workerpools.sqlalchemy import SQLAlchemyEngine, TaskSession
from workerpools.sqlalchemy._timeouts import slack

BACKEND = text("select pg_backend_pid()")


def engine_with(shop: Shop, **options: Any) -> Resource[sqlalchemy.Engine]:
    url = shop.database.through(shop.proxy).url(shop.engine.get().dialect.driver)
    return shop.pools.add(SQLAlchemyEngine(url, **options), name=f"db {' '.join(options)}")


def backend(engine: Resource[sqlalchemy.Engine]) -> int:
    with engine.get().connect() as connection:
        return int(connection.scalar(BACKEND))


def test_an_idle_connection_is_checked_and_a_fresh_one_is_trusted(shop: Shop) -> None:
    """No round trip within ``check_after``; one after it."""
    engine = engine_with(shop, check_after=0.3)
    first = backend(engine)
    sent = shop.proxy.bytes_to_server
    with engine.get().connect() as connection:
        assert shop.proxy.bytes_to_server == sent
        connection.scalar(BACKEND)
    time.sleep(0.35)
    sent = shop.proxy.bytes_to_server
    with engine.get().connect() as connection:
        assert shop.proxy.bytes_to_server > sent
        assert connection.scalar(BACKEND) == first


def test_a_dead_connection_is_replaced_before_the_task_notices(shop: Shop) -> None:
    """And its idle siblings with it: nothing is replayed."""
    engine = engine_with(shop, check_after=0.2)
    with ExitStack() as held:
        before = {held.enter_context(engine.get().connect()).scalar(BACKEND) for _ in range(3)}
    terminate_backends(shop.database)
    time.sleep(0.25)

    @shop.task(base=type("Other", (shop.base,), {"abstract": True, "session": TaskSession(engine)}))
    def task(self: Any) -> int:
        insert(self.session, 1)
        return int(self.session.scalar(BACKEND))

    assert task() not in before
    assert shop.replays() == 0
    with ExitStack() as held:
        assert not before & {held.enter_context(engine.get().connect()).scalar(BACKEND) for _ in range(3)}


def test_a_server_that_is_away_at_the_check_is_unavailable(shop: Shop) -> None:
    """The driver's own error of connecting comes out."""
    engine = engine_with(shop, check_after=0.0)
    backend(engine)
    shop.proxy.stop()
    shop.proxy.close_all()
    with pytest.raises(OperationalError, match="refused"):
        backend(engine)


@pytest.mark.parametrize("option", ["max_lifetime", "max_idle"])
def test_an_old_connection_is_replaced_when_it_is_taken(shop: Shop, option: str) -> None:
    """By its age, or by how long it was idle; one that is in use is left alone."""
    engine = engine_with(shop, **{option: 0.4, "max_lifetime_jitter": 0.0, "check_after": None})
    first = backend(engine)
    assert backend(engine) == first
    with engine.get().connect() as connection:
        time.sleep(0.45)
        assert connection.scalar(BACKEND) == first
    if option == "max_idle":
        assert backend(engine) == first
        time.sleep(0.45)
    assert backend(engine) != first
    assert shop.replays() == 0


def test_lives_differ(shop: Shop) -> None:
    """Connections that were opened together are replaced one by one."""
    engine = engine_with(shop, max_lifetime=2.0, max_lifetime_jitter=1.0, check_after=None)

    def backends() -> set[int]:
        with ExitStack() as held:
            return {int(held.enter_context(engine.get().connect()).scalar(BACKEND)) for _ in range(5)}

    first = backends()
    kept = []
    for _ in range(8):
        time.sleep(0.2)
        kept.append(len(first & backends()))
    # All five would be replaced at the same look otherwise.
    assert any(0 < count < 5 for count in kept)


def test_a_changed_password_is_picked_up_without_a_restart(shop: Shop) -> None:
    """``credentials`` is asked for each new connection; a wrong one is permanent."""
    name = f"app_{shop.database.name}"
    shop.database.execute(f"create role {name} login password 'first'")
    given = {"password": "first"}
    asked: list[str] = []

    def credentials() -> tuple[str, str]:
        asked.append(given["password"])
        return name, given["password"]

    try:
        engine = engine_with(shop, credentials=credentials)
        first = backend(engine)
        shop.database.execute(f"alter role {name} password 'second'")
        assert backend(engine) == first
        given["password"] = "second"
        terminate_backends(shop.database)
        with engine.get().connect() as connection, pytest.raises(OperationalError):
            connection.scalar(BACKEND)
        assert backend(engine) != first
        assert asked == ["first", "second"]
        assert "second" not in repr(engine) + engine.adapter.describe()
    finally:
        shop.pools.close()
        shop.database.execute(f"drop role {name}")


@pytest.mark.parametrize("options", [{"check_after": -1}, {"max_lifetime": "1h"}, {"max_lifetime_jitter": 2}])
def test_wrong_options_are_refused_at_declaration(shop: Shop, options: dict[str, Any]) -> None:
    """By their names."""
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        SQLAlchemyEngine("postgresql+psycopg2://app@db/shop", **options)


# Deadlines. An eager run has the limits of its task, which nobody but the library enforces.


def test_without_limits_there_is_no_deadline(shop: Shop) -> None:
    """And no timeout on the server."""

    @shop.task()
    def task(self: Any) -> tuple[Any, Any]:
        return self.deadline.remaining(), self.session.scalar(text("show statement_timeout"))

    assert task.apply().get() == task() == (None, "0")


def test_the_server_ends_a_statement_at_the_deadline(shop: Shop) -> None:
    """The task is reported as Celery reports its limit, it ran once, and its connection is of use afterwards."""
    runs: list[float] = []

    @shop.task(soft_time_limit=1)
    def task(self: Any) -> None:
        runs.append(self.deadline.remaining())
        insert(self.session, 1)
        self.session.execute(text("select pg_sleep(20)"))

    started = time.monotonic()
    with pytest.raises(SoftTimeLimitExceeded) as caught:
        task.apply().get()
    assert time.monotonic() - started < 2.5
    assert len(runs) == 1
    assert 0.5 < runs[0] <= 0.9
    assert "statement timeout" in str(caught.value.__cause__)
    assert shop.rows() == []

    @shop.task()
    def after(self: Any) -> tuple[str, str]:
        insert(self.session, 2)
        return self.session.scalar(text("show statement_timeout")), self.session.scalar(text("select 'fine'"))

    assert after.apply().get() == ("0", "fine")


def test_a_server_that_does_not_tell_its_history_ends_statements_all_the_same(shop: Shop) -> None:
    """A role may be forbidden to ask, and some servers have no such functions: a lost COMMIT cannot be resolved there,
    but the deadline holds."""
    role = f"clerk_{shop.database.name}"
    shop.database.execute(f"create role {role} login password 'clerk'")
    shop.database.execute("revoke execute on function pg_walfile_name(pg_lsn) from public")
    shop.database.execute(f"grant all on table orders to {role}")
    url = sqlalchemy.make_url(shop.engine.get().url).set(username=role, password="clerk")
    engine = shop.pools.add(SQLAlchemyEngine(url), name="clerk")

    @shop.task(
        base=type("Other", (shop.base,), {"abstract": True, "session": TaskSession(engine)}), soft_time_limit=1.0
    )
    def task(self: Any, seconds: float) -> None:
        insert(self.session, 1)
        self.session.execute(text("select pg_sleep(:seconds)"), {"seconds": seconds})

    try:
        with pytest.raises(SoftTimeLimitExceeded):
            task.apply((5,)).get()
        task.apply((0,)).get()
        assert shop.rows() == [1]
    finally:
        engine.close()
        shop.database.execute("grant execute on function pg_walfile_name(pg_lsn) to public")
        shop.database.execute(f"drop owned by {role}")
        shop.database.execute(f"drop role {role}")


def test_a_later_statement_has_less_time(shop: Shop) -> None:
    """The timeout is sent again, for the transaction, when it no longer fits: it ends a statement at the deadline or a
    little earlier."""

    @shop.task(soft_time_limit=2)
    def task(self: Any) -> list[tuple[float, float, float]]:
        found = []
        for pause in (0.0, 0.6, 0.6):
            time.sleep(pause)
            before = self.deadline.remaining()
            timeout = self.session.scalar(text("select setting from pg_settings where name='statement_timeout'"))
            found.append((self.deadline.remaining(), int(timeout) / 1000, before))
        return found

    seen = task.apply().get()
    assert [timeout for _, timeout, _ in seen] == sorted((timeout for _, timeout, _ in seen), reverse=True)
    for after, timeout, before in seen:
        assert after - slack(before) - 0.001 <= timeout <= before


def test_short_tasks_pay_no_round_trip_for_their_deadline(shop: Shop) -> None:
    """The timeout is set in the round trip of the first statement."""
    ends = b"S\x00\x00\x00\x04"
    sent: list[bytes] = []

    def is_trip(chunk: bytes) -> bool:
        if chunk[:1] == b"Q" or ends in chunk:
            sent.append(chunk)
        return False

    @shop.task(soft_time_limit=30)
    def task(self: Any) -> int:
        return int(self.session.scalar(text("select setting from pg_settings where name = 'statement_timeout'")))

    task.apply().get()
    shop.proxy.cut_when(is_trip, times=None)
    assert 28_000 < task.apply().get() <= 30_000
    assert len(sent) == 2


def test_the_users_own_shorter_timeout_wins(shop: Shop) -> None:
    """Its error is the database's own: no deadline ended it."""
    engine = engine_with(shop, connect_args={"options": "-c statement_timeout=300"})

    @shop.task(base=type("Own", (shop.base,), {"abstract": True, "session": TaskSession(engine)}), soft_time_limit=20)
    def task(self: Any) -> None:
        self.session.execute(text("select pg_sleep(10)"))

    with pytest.raises(OperationalError, match="statement timeout"):
        task.apply().get()


@pytest.mark.parametrize("when", ["statement", "commit", "checkout"])
def test_a_silent_network_is_given_up_at_the_deadline(shop: Shop, when: str) -> None:
    """Packets are dropped: the server's timeout does not arrive, and a driver in C waits; the socket is shut down."""
    engine = engine_with(shop, check_after=0.0 if when == "checkout" else None)

    @shop.task(
        base=type("Silent", (shop.base,), {"abstract": True, "session": TaskSession(engine)}),
        soft_time_limit=1,
        replay=False,
    )
    def task(self: Any) -> None:
        if when != "checkout":
            insert(self.session, 1)
        shop.proxy.blackhole()
        if when != "commit":
            insert(self.session, 2)

    backend(engine)
    started = time.monotonic()
    with pytest.raises((SoftTimeLimitExceeded, OperationalError)):
        task.apply().get()
    assert time.monotonic() - started < 4.5
    shop.proxy.pass_through()
    if when == "commit":
        # Held back until now: nobody knows whether the server gets it.
        assert shop.rows() in ([], [1])
    else:
        assert shop.rows() == []


@pytest.mark.parametrize("freed", [False, True])
def test_nobody_waits_for_a_free_connection_beyond_the_deadline(shop: Shop, freed: bool) -> None:
    """The connection pool would let it wait for a minute; one that comes free in time is taken."""
    engine = engine_with(shop, pool_size=1, max_overflow=0, acquire_timeout=60)

    @shop.task(base=type("Small", (shop.base,), {"abstract": True, "session": TaskSession(engine)}), soft_time_limit=4)
    def task(self: Any) -> None:
        insert(self.session, 1)

    with engine.get().connect() as held:
        if freed:
            threading.Timer(0.5, held.close).start()
            task.apply().get()
        else:
            started = time.monotonic()
            with pytest.raises(DeadlineExceeded, match="pool's 1 connections became free"):
                task.apply().get()
            assert time.monotonic() - started < 30
    assert shop.rows() == ([1] if freed else [])


def test_a_wait_that_ends_with_the_deadline_is_told_as_that(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """However late the thread goes on after it has looked at the time."""
    engine = engine_with(shop, pool_size=1, max_overflow=0, acquire_timeout=60)
    pool: Any = engine.get().pool
    longest = pool._longest_wait

    def interrupted() -> float:
        time.sleep(0.3)
        return float(longest())

    monkeypatch.setattr(pool, "_longest_wait", interrupted)

    @shop.task(base=type("Small", (shop.base,), {"abstract": True, "session": TaskSession(engine)}), soft_time_limit=2)
    def task(self: Any) -> None:
        insert(self.session, 1)

    with engine.get().connect(), pytest.raises(DeadlineExceeded, match="pool's 1 connections became free"):
        task.apply().get()


@pytest.mark.parametrize("how", ["slow", "silent"])
def test_a_late_fetch_ends_at_the_deadline(shop: Shop, how: str) -> None:
    """The server's timeout begins anew with each FETCH, and a silent server answers none."""
    sleeps = 20 if how == "slow" else 0
    rows: list[int] = []

    @shop.task(soft_time_limit=3)
    def task(self: Any) -> None:
        query = text(f"select n, pg_sleep(case when n > 150 then {sleeps} else 0 end) from generate_series(1, 200) n")
        for row in self.session.execute(query, execution_options={"yield_per": 50}):
            rows.append(row.n)
            if row.n == 100:
                time.sleep(2)
                if how == "silent":
                    shop.proxy.blackhole()

    started = time.monotonic()
    with pytest.raises(SoftTimeLimitExceeded):
        task.apply().get()
    # Without the watchdog, 2 s later, or never.
    assert time.monotonic() - started < 4.5
    assert 100 <= len(rows) <= 150
