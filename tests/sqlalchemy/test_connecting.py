"""A server that accepts a connection and falls silent, at each step of opening one: no wait is without a bound."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from celery.exceptions import SoftTimeLimitExceeded
from sqlalchemy.exc import OperationalError

from tests.support.proxy import TcpProxy
from tests.support.shop import Shop, insert
from workerpools import FailureKind, classify
from workerpools.events import EventKind
from workerpools.sqlalchemy import SQLAlchemyEngine
from workerpools.testing import run_attempt

#: What the client has sent when the server falls silent; None for nothing.
STEPS = {
    "nobody answers": None,
    "first packet": b"",
    "start-up packet": b"application_name",
    "password": b"SCRAM-SHA-256",
    "SQLAlchemy's question": b"pg_catalog.version()",
    "the introduction": b"pg_control_system",
}
AT_EACH_STEP = pytest.mark.parametrize("step", [*STEPS, "hstore"])


def fall_silent(proxy: TcpProxy, step: str, driver: str) -> Callable[[], int]:
    """Have the server fall silent at a step; return how many times it has."""
    if step == "hstore" and driver != "psycopg2":
        pytest.skip("psycopg2 alone asks for the types of hstore")
    mark = b"pg_type" if step == "hstore" else STEPS[step]
    happened: list[int] = []
    if mark is None:
        proxy.refuse_silently()
        return lambda: 1

    def look(chunk: bytes) -> bool:
        if mark in chunk:
            happened.append(1)
            proxy.blackhole()
        return False

    proxy.cut_when(look)
    return lambda: len(happened)


def engine_of(shop: Shop, **options: Any) -> Any:
    """Declare an engine that has not connected yet."""
    return shop.another(**options)[0]


@AT_EACH_STEP
def test_the_deadline_ends_connecting(shop: Shop, step: str) -> None:
    """At the deadline and not at a whole second, and the task fails with its own limit."""
    engine = engine_of(shop)
    happened = fall_silent(shop.proxy, step, shop.driver)
    began = time.monotonic()
    with pytest.raises(SoftTimeLimitExceeded) as caught:
        run_attempt(lambda: engine.get().connect(), time_limit=1.3)
    took = time.monotonic() - began
    assert happened() == 1
    assert 1.2 < took < 2.8
    cause = caught.value.__cause__
    assert cause is not None
    assert any("the task's deadline ended connecting" in note for note in cause.__notes__)
    # The driver's own timeout, in whole seconds, is later.
    assert "expired" not in str(cause)
    shop.proxy.wait_for(open=1 if shop.engine.get().pool.checkedin() else 0)  # type: ignore[attr-defined]


@AT_EACH_STEP
def test_connecting_is_bounded_without_a_deadline(shop: Shop, step: str) -> None:
    """By connect_timeout: for the log-in, and for the questions after it in all."""
    engine = engine_of(shop, connect_timeout=2.0)
    happened = fall_silent(shop.proxy, step, shop.driver)
    began = time.monotonic()
    with pytest.raises(OperationalError) as caught:
        engine.get().connect()
    assert happened() == 1
    assert 1.0 < time.monotonic() - began < 4.0
    failure = classify(caught.value)
    assert failure is not None
    assert (failure.kind, failure.phase.value, failure.timed_out) == (FailureKind.UNAVAILABLE, "connect", True)


def test_each_thread_keeps_its_own_deadline(shop: Shop) -> None:
    """Sockets to one server are told apart, and nobody else's is touched."""
    engine = engine_of(shop)
    shop.proxy.blackhole()
    took: dict[float, float] = {}

    def connects(limit: float) -> None:
        began = time.monotonic()
        with pytest.raises(SoftTimeLimitExceeded):
            run_attempt(lambda: engine.get().connect(), time_limit=limit)
        took[limit] = time.monotonic() - began

    threads = [threading.Thread(target=connects, args=(limit,)) for limit in (1.0, 1.6, 2.4)]
    for thread in threads:
        thread.start()
    with socket.create_connection(shop.proxy.address) as other:
        for thread in threads:
            thread.join()
        other.settimeout(0.1)
        with pytest.raises(TimeoutError):
            other.recv(1)
    assert len(took) == 3
    assert all(seconds - limit < 1.0 for limit, seconds in took.items())


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="Linux only")
@pytest.mark.parametrize("connect_args", [{}, {"tcp_user_timeout": 7000}, {"tcp_user_timeout": 0}])
def test_the_socket_has_the_declared_user_timeout(shop: Shop, connect_args: dict[str, Any]) -> None:
    """The one that marks it while it is connecting is gone."""
    engine = engine_of(shop, connect_args=connect_args)

    def found() -> int:
        with engine.get().connect() as connection:
            number = connection.connection.dbapi_connection.fileno()
            with socket.socket(fileno=number) as asked:
                try:
                    return asked.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
                finally:
                    asked.detach()

    assert run_attempt(found, time_limit=20.0) == connect_args.get("tcp_user_timeout", 25_000)


@pytest.mark.parametrize("text", ["connect_timeout=3", "connect_timeout=60"])
def test_a_timeout_in_the_url_is_text(shop: Shop, text: str) -> None:
    """A task with a limit shortens it all the same."""
    url = f"{shop.database.through(shop.proxy).url(shop.driver)}?{text}"
    engine = shop.pools.add(SQLAlchemyEngine(url), name="by_url")
    assert run_attempt(lambda: engine.get().connect().close(), time_limit=5.0) is None
    engine.get().dispose()
    shop.proxy.blackhole()
    began = time.monotonic()
    with pytest.raises(SoftTimeLimitExceeded):
        run_attempt(lambda: engine.get().connect(), time_limit=1.0)
    assert time.monotonic() - began < 2.5


def test_a_users_creator_is_asked_in_time(shop: Shop) -> None:
    """The first questions over a connection that somebody else opens are bounded, too."""
    import psycopg
    import psycopg2

    connect: Any = {"psycopg2": psycopg2, "psycopg": psycopg}[shop.driver].connect
    dsn = shop.database.through(shop.proxy).dsn
    engine = engine_of(shop, creator=lambda: connect(dsn))
    with engine.get().connect():
        pass
    engine.get().dispose()
    happened = fall_silent(shop.proxy, "the introduction", shop.driver)
    began = time.monotonic()
    with pytest.raises(SoftTimeLimitExceeded):
        run_attempt(lambda: engine.get().connect(), time_limit=1.0)
    assert happened() == 1
    assert time.monotonic() - began < 2.5


# Resolving.

RESOLVING = {
    **{step: STEPS[step] for step in ("nobody answers", "first packet", "start-up packet", "password")},
    "which server": b"synchronous_standby_names",
    "which outcome": b"pg_xact_status",
}


@pytest.mark.parametrize("step", RESOLVING)
@pytest.mark.parametrize("limited", [False, True], ids=["resolve_timeout", "deadline"])
def test_resolving_ends_in_time(shop: Shop, step: str, limited: bool) -> None:
    """However silent the server that is asked is; the outcome is unknown then."""
    base = shop.another(resolve_timeout=20.0 if limited else 1.5)[1]
    mark = RESOLVING[step]
    lost: list[float] = []

    def look(chunk: bytes) -> bool:
        if lost and mark is not None and mark in chunk:
            shop.proxy.blackhole()
        if b"COMMIT" in chunk and not lost:
            lost.append(time.monotonic())
            return True
        return False

    @shop.task(base=base, soft_time_limit=3.0 if limited else None)
    def task(self: Any) -> None:
        insert(self.session, 1)
        if mark is None:
            shop.proxy.refuse_silently()

    began = time.monotonic()
    shop.proxy.cut_when(look, times=None)
    with pytest.raises((OperationalError, SoftTimeLimitExceeded)) as caught:
        task.apply(throw=True)
    now = time.monotonic()
    assert len(lost) == 1
    # A busy machine adds a second or two; without the bound, it would be 20 seconds or for ever.
    assert now - began < 8.0 if limited else 1.0 < now - lost[0] < 8.0
    assert [event for event in shop.events if event.kind is EventKind.COMMIT_RESOLVED] == []
    error: BaseException | None = caught.value
    if isinstance(error, SoftTimeLimitExceeded):
        error = error.__cause__
    assert error is not None
    assert any("could not find out in time" in note for note in error.__notes__)
    assert shop.replays() == 0


def test_a_silent_answer_is_asked_for_again(shop: Shop) -> None:
    """After connect_timeout, over another connection, as long as there is time."""
    base = shop.another(connect_timeout=2.0, resolve_timeout=20.0)[1]
    lost: list[int] = []
    severed: list[int] = []

    def look(chunk: bytes) -> bool:
        if b"pg_xact_status" in chunk and not severed:
            severed.append(1)
            shop.proxy.sever()
        if b"COMMIT" in chunk and not lost:
            lost.append(1)
            return True
        return False

    @shop.task(base=base)
    def task(self: Any) -> None:
        insert(self.session, 1)

    shop.proxy.cut_when(look, deliver=True, times=None)
    began = time.monotonic()
    task()
    assert time.monotonic() - began < 8.0
    assert severed == [1]
    assert [event.detail for event in shop.events if event.kind is EventKind.COMMIT_RESOLVED] == ["outcome=committed"]


# MySQL.


@pytest.mark.parametrize("limited", [False, True], ids=["connect_timeout", "deadline"])
@pytest.mark.parametrize(
    "mark", [None, b"", b"SHOW SESSION VARIABLES"], ids=["nobody answers", "accepted", "its question"]
)
def test_mysql(maria_shop: Shop, mark: bytes | None, limited: bool) -> None:
    """The same; its drivers' own time-outs cover neither the greeting nor a question."""
    engine = engine_of(maria_shop, connect_timeout=2.0, connect_args={"read_timeout": 60})

    def look(chunk: bytes) -> bool:
        if mark is not None and mark in chunk:
            maria_shop.proxy.blackhole()
        return False

    if mark is None:
        maria_shop.proxy.refuse_silently()
    elif mark == b"":
        maria_shop.proxy.blackhole()
    else:
        maria_shop.proxy.cut_when(look)
    began = time.monotonic()
    with pytest.raises(SoftTimeLimitExceeded if limited else OperationalError):
        if limited:
            run_attempt(lambda: engine.get().connect(), time_limit=1.0)
        else:
            engine.get().connect()
    assert time.monotonic() - began < (2.5 if limited else 4.0)


@pytest.mark.parametrize("question", [b"hstore", b"set_config(%L"])
def test_a_connection_that_is_lost_while_it_is_set_up_has_done_nothing(shop: Shop, question: bytes) -> None:
    """Its first questions are the engine's own: those of psycopg were taken for an effect of the body."""
    _, base = shop.another()
    seen: list[bytes] = []
    found: list[str] = []

    @shop.task(base=base)
    def task(self: Any) -> None:
        with pytest.raises(OperationalError):
            insert(self.session, 1)
        found.extend(map(str, self.effects))
        self.session.rollback()

    def asks(chunk: bytes) -> bool:
        if question in chunk:
            seen.append(chunk)
        return bool(seen)

    shop.proxy.cut_when(asks)
    task.apply().get()
    assert seen
    assert found == []
