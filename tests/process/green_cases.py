"""What the tests of greenlets do in an interpreter of their own (see `tests.support.green`)."""

from __future__ import annotations

import ctypes
import logging
import os
import socket
import threading
import time
from importlib import import_module
from typing import Any

from celery import Celery
from sqlalchemy import text

from tests.support.databases import Database
from tests.support.forking import run_in_fork
from workerpools import PooledTask, WorkerPools
from workerpools._process import greenlets
from workerpools._process.watchdog import Watchdog
from workerpools.events import Event, EventKind
from workerpools.httpx import HttpxClient
from workerpools.sqlalchemy import SQLAlchemyEngine, TaskSession
from workerpools.sqlalchemy._pool import DeadlineQueuePool

BACKEND = text("select pg_backend_pid()")


def cooperate() -> None:
    """Have psycopg2 let other greenlets run, as an application would."""
    import_module(f"psycogreen.{greenlets.library()}").patch_psycopg()


def names_of_what_is_patched() -> list[Any]:
    """Return which library it is, and whether threads are the system's all the same."""
    threads = greenlets.Threads()
    return [greenlets.library(), type(threads.start).__name__, type(threads.lock()).__module__]


def watchdog_beside_a_c_library() -> tuple[int, bool]:
    """Wait for a peer in C, where no greenlet runs; return what came, and whether the socket was left alone."""
    ours, theirs = socket.socketpair()
    # The libraries have theirs never block.
    os.set_blocking(theirs.fileno(), True)
    dog = Watchdog()
    number = dog.watch(ours.fileno(), time.monotonic() + 0.2)
    came = ctypes.CDLL(None).recv(theirs.fileno(), ctypes.create_string_buffer(1), 1, 0)
    return came, dog.forget(number)


def switches_while_locks_are_held(url: str, api_url: str) -> dict[str, list[str]]:
    """Give way to another greenlet while a lock of ours is held that the other one wants; return who had it when."""
    pools = WorkerPools()
    db = pools.add(SQLAlchemyEngine(url), name="db")
    api = pools.add(HttpxClient(base_url=api_url), name="api")
    client, pool = api.get(), db.get().pool
    assert isinstance(pool, DeadlineQueuePool)
    transport: Any = client._transport
    locks = {
        "resource": db._holder._lock,
        "meter": db.meter.lock,
        "budget": pools.shared.budget._lock,
        "transport": transport._lock,
        "pool": pool._lock,
    }
    found: dict[str, list[str]] = {}
    for name, lock in locks.items():
        had: list[str] = []

        def hold(lock: Any, had: list[str], who: str) -> None:
            with lock:
                had.append(who)
                time.sleep(0.02)
                had.append(who)

        threads = [threading.Thread(target=hold, args=(lock, had, who)) for who in ("first", "second")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(5)
        found[name] = had
    return found


def two_queries(url: str, cooperates: bool) -> list[str]:
    """Have two greenlets wait for their database; return what they did, in order."""
    if cooperates:
        cooperate()
    pools = WorkerPools()
    db = pools.add(SQLAlchemyEngine(url), name="db")
    sleep = text("select pg_sleep(0.5)" if url.startswith("postgresql") else "select sleep(0.5)")
    did: list[str] = []

    def query() -> None:
        with db.get().connect() as connection:
            connection.execute(text("select 1"))
            did.append("begin")
            connection.execute(sleep)
            did.append("end")

    threads = [threading.Thread(target=query) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    pools.close()
    return did


def silent_connect(url: str, cooperates: bool) -> tuple[str, str, float]:
    """Connect to a server that accepts and says nothing; return the error, what it proves, and the seconds."""
    if cooperates:
        cooperate()
    pools = WorkerPools()
    db = pools.add(SQLAlchemyEngine(url, connect_timeout=2.0), name="db")
    started = time.monotonic()
    try:
        with db.get().connect():
            return "connected", "", 0.0
    except Exception as error:
        from workerpools.failures import classify

        failure = classify(error)
        return type(error).__name__, failure.kind.value if failure else "", time.monotonic() - started


def fork_beside_greenlets(url: str, api_url: str) -> dict[str, Any]:
    """Fork while this greenlet and another one are in transactions; the child opens connections of its own."""
    pools = WorkerPools()
    db = pools.add(SQLAlchemyEngine(url), name="db")
    api = pools.add(HttpxClient(base_url=api_url), name="api")
    begun, go_on = threading.Event(), threading.Event()
    found: dict[str, Any] = {}

    def other() -> None:
        with db.get().begin() as connection:
            found["other"] = connection.scalar(BACKEND)
            connection.execute(text("insert into orders values (1)"))
            begun.set()
            go_on.wait(30)
            found["other after"] = connection.scalar(BACKEND)

    thread = threading.Thread(target=other)
    thread.start()
    begun.wait(30)
    with db.get().begin() as connection:
        found["own"] = connection.scalar(BACKEND)
        connection.execute(text("insert into orders values (2)"))
        api.get().get("/echo/before")

        def in_child() -> tuple[int, str]:
            with db.get().connect() as fresh:
                return fresh.scalar(BACKEND), api.get().get("/echo/child").text

        found["child"], found["answer"] = run_in_fork(in_child)
        found["own after"] = connection.scalar(BACKEND)
    go_on.set()
    thread.join(30)
    found["after"] = api.get().get("/echo/after").text
    pools.close()
    return found


def close_beside_a_request(url: str, api_url: str) -> list[str]:
    """Close everything while another greenlet reads a response and then uses the database."""
    cooperate()
    pools = WorkerPools()
    db = pools.add(SQLAlchemyEngine(url), name="db")
    api = pools.add(HttpxClient(base_url=api_url), name="api")
    came: list[str] = []
    begun = threading.Event()

    def request() -> None:
        with db.get().begin() as connection:
            connection.execute(text("insert into orders values (3)"))
            begun.set()
            came.append(api.get().get("/echo/slow", params={"delay": "1"}).text)

    thread = threading.Thread(target=request)
    thread.start()
    begun.wait(30)
    # The request is on its way.
    time.sleep(0.3)
    pools.close(20)
    came.append("closed")
    thread.join(30)
    return came


def what_is_told(url: str, cooperates: bool) -> list[str]:
    """Open an engine; return what is logged of it as a warning."""
    if cooperates:
        cooperate()
    told: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("workerpools")
    logger.addHandler(handler)
    pools = WorkerPools()
    pools.add(SQLAlchemyEngine(url), name="db").get()
    logger.removeHandler(handler)
    return told


def interrupted_everywhere(database: Database, cases: list[tuple[str, str, str]]) -> list[dict[str, Any]]:
    """Return what :func:`interrupted` finds in each case: a driver, a way and a place."""
    cooperate()
    return [interrupted(database, *case) for case in cases]


def interrupted(database: Database, driver: str, how: str, where: str) -> dict[str, Any]:
    """Run a body that is interrupted from outside, then an ordinary one; return what came out, and what is left.

    Args:
        database: The database; connecting has to take a while where that is interrupted.
        driver: SQLAlchemy's name of the driver.
        how: `timeout` or `kill`.
        where: `body`, `query`, `cleanup` (in a block whose own clean-up uses the connection), `commit`, `connect`, or
            `introduction`: in the first question to a server.
    """
    import gevent

    from workerpools.sqlalchemy._connection import watchdog

    app = Celery("shop", set_as_current=False)
    pools = WorkerPools(app)
    resource = pools.add(SQLAlchemyEngine(database.url(driver), check_after=None), name="db")
    runs: list[int] = []

    class ShopTask(PooledTask):
        db = resource
        session = TaskSession(resource)

    def interrupt(seconds: float = 0.3) -> None:
        if how == "timeout":
            kept.append(gevent.Timeout.start_new(seconds))
        else:
            kept.append(gevent.spawn_later(seconds, gevent.kill, current[0]))

    def opened(event: Event) -> None:
        if where == "introduction" and event.kind is EventKind.CONNECTION_OPENED and not kept:
            interrupt(0.05)

    pools.subscribe(opened)

    @app.task(base=ShopTask, bind=True, name="shop.body", soft_time_limit=60)
    def body(self: ShopTask, number: int, where: str = "") -> int:
        runs.append(number)
        if where and where != "introduction":
            interrupt()
        if where == "cleanup":
            with self.db.begin() as connection:
                connection.execute(text("insert into orders values (:number)"), {"number": number})
                connection.execute(text("select pg_sleep(20)"))
        self.session.execute(text("insert into orders values (:number)"), {"number": number})
        if where == "body":
            time.sleep(20)
        elif where == "query":
            self.session.execute(text("select pg_sleep(20)"))
        elif where == "commit":
            # Deferred: the trigger sleeps when COMMIT is sent.
            self.session.execute(text("insert into slow values (20)"))
        return number

    kept: list[Any] = []
    current: list[Any] = []
    came: list[str] = []

    def run(*arguments: Any) -> None:
        current[:] = [gevent.getcurrent()]
        try:
            # As in a worker: with its limits.
            came.append(repr(body.apply(arguments, throw=True).get()))
        except BaseException as error:
            came.append(type(error).__name__)

    if where in ("connect", "introduction"):
        resource.get()
    else:
        run(1)
    thread = threading.Thread(target=run, args=(2, where))
    thread.start()
    thread.join(40)
    run(3)
    stats = pools.stats().totals()[0]
    live = resource._holder.live
    found = {
        "came": came,
        "runs": runs.count(2),
        "in use": stats.in_use,
        "open": stats.open,
        "watched": sum(len(watch.waiting) for watch in watchdog.watched),
        "connecting": len(live.opening.descriptors._connecting) if live else 0,
    }
    pools.close()
    found["rows"] = sorted(number for (number,) in database.execute("delete from orders returning id"))
    return found
