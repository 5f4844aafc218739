"""What is logged of real connections, with passwords in their URLs."""

from __future__ import annotations

import itertools
import logging
import socket
import time
from collections.abc import Iterator

import pytest
from celery import Celery
from sqlalchemy import text

from tests.support.databases import Database
from tests.support.faults import terminate_backends
from tests.support.forking import run_in_fork
from tests.support.upstream import EchoUpstream
from workerpools import PooledTask, WorkerPools
from workerpools.httpx import HttpxClient
from workerpools.sqlalchemy import SQLAlchemyEngine, TaskSession

_numbers = itertools.count()
ONE = text("select 1")


class Lines(logging.Handler):
    """Keeps every line below `workerpools`, as a handler writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("%(name)s %(levelname)s %(message)s"))
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))

    def of(self, event: str) -> list[str]:
        return [line for line in self.lines if f" {event} " in line]


@pytest.fixture
def lines() -> Iterator[Lines]:
    handler, logger = Lines(), logging.getLogger("workerpools")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        yield handler
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


@pytest.fixture
def pools() -> Iterator[WorkerPools]:
    app = Celery(f"logging{next(_numbers)}", set_as_current=False, backend="cache+memory://")
    with WorkerPools(app) as made:
        yield made


def test_a_stale_connection_that_was_replaced(pools: WorkerPools, database: Database, lines: Lines) -> None:
    """By the check at checkout, by SQLAlchemy's own ping, and for its age: each has its line and its reason."""
    checked = pools.add(SQLAlchemyEngine(database.url(), check_after=0.0), name="checked").get()
    pinged = pools.add(SQLAlchemyEngine(database.url(), pool_pre_ping=True), name="pinged").get()
    old = pools.add(SQLAlchemyEngine(database.url(), max_idle=0.01, check_after=None), name="old").get()
    for engine in (checked, pinged, old):
        with engine.connect() as connection:
            connection.execute(ONE)
    assert lines.of("connection_replaced") == []
    terminate_backends(database)
    time.sleep(0.05)
    for engine in (checked, pinged, old):
        with engine.connect() as connection:
            connection.execute(ONE)
    assert [line.partition(" pid=")[0] for line in lines.of("connection_replaced")] == [
        f"workerpools.connections INFO connection_replaced resource={name}" for name in ("checked", "pinged", "old")
    ]
    assert [line.rpartition("reason=")[2] for line in lines.of("connection_replaced")] == ["stale", "stale", "idle"]
    assert [line.rpartition("reason=")[2] for line in lines.of("connection_closed")] == ["stale", "stale", "idle"]


def test_a_value_that_a_fork_inherited(pools: WorkerPools, database: Database, lines: Lines) -> None:
    """The child says so when it opens its own, and not before; once, and the parent never."""
    with EchoUpstream() as echo:
        api = pools.add(HttpxClient(base_url=echo.url), name="api")
        db = pools.add(SQLAlchemyEngine(database.url()), name="db")
        api.get().get("/echo/1")
        with db.get().connect() as connection:
            connection.execute(ONE)

        def child() -> list[str]:
            assert lines.of("value_discarded") == []
            for _ in range(2):
                with db.get().connect() as connection:
                    connection.execute(ONE)
                api.get().get("/echo/1")
            found = [line.partition(" pid=")[0] for line in lines.lines if "value_" in line][2:]
            assert all("connections=1 inherited by a fork" in line for line in lines.of("value_discarded"))
            return found

        assert run_in_fork(child) == [
            "workerpools.connections INFO value_discarded resource=db",
            "workerpools.connections INFO value_opened resource=db",
            "workerpools.connections INFO value_discarded resource=api",
            "workerpools.connections INFO value_opened resource=api",
        ]
        assert lines.of("value_discarded") == []


def test_no_password_is_logged(pools: WorkerPools, database: Database, lines: Lines) -> None:
    """At the lowest level, while connections are opened, lost, refused, replaced, leaked and closed, by client and
    engine, with passwords in both URLs; tracebacks included."""
    secret = "s3cr3t-pass/w@rd"
    quoted = "s3cr3t-pass%2Fw%40rd"
    database.execute("drop role if exists logged")
    database.execute(f"create role logged login password '{secret}'")
    pools._apps.copy().pop().conf.workerpools_leak_after = 0.01
    with socket.socket() as claim:
        claim.bind(("127.0.0.1", 0))
        nobody = claim.getsockname()[1]
        with EchoUpstream() as echo:
            host = echo.url.removeprefix("http://")

            class Base(PooledTask):
                abstract = True
                db = pools.add(
                    SQLAlchemyEngine(
                        f"postgresql+psycopg2://logged:{quoted}@{database.host}:{database.port}/{database.name}",
                        pool_size=1,
                        max_overflow=0,
                        acquire_timeout=0.1,
                    )
                )
                refused = pools.add(SQLAlchemyEngine(f"postgresql+psycopg2://u:{quoted}@127.0.0.1:{nobody}/x"))
                wrong = pools.add(
                    SQLAlchemyEngine(f"postgresql+psycopg2://u:{quoted}@{database.host}/x", no_such_option=1)
                )
                session = TaskSession(db)
                api = pools.add(HttpxClient(base_url=f"http://user:{quoted}@{host}"))
                down = pools.add(HttpxClient(base_url=f"http://user:{quoted}@127.0.0.1:{nobody}"))
                replay = False

            (app,) = pools._apps
            kept: list[object] = []

            def body(self: Base, what: str) -> None:
                if what == "leaks":
                    kept.append(self.db.connect().begin())
                    self.api.send(self.api.build_request("GET", "/echo/1"), stream=True)
                    time.sleep(0.2)
                elif what == "loses":
                    self.session.execute(text("select pg_terminate_backend(pg_backend_pid())"))
                elif what == "waits":
                    with self.db.connect():
                        self.session.scalar(ONE)
                elif what == "down":
                    self.down.get("/x")
                else:
                    getattr(self, what).connect()

            task = app.task(base=Base, bind=True, name=f"logging{next(_numbers)}", shared=False)(body)
            for what in ("leaks", "loses", "waits", "down", "refused", "wrong", "db", "leaks"):
                try:
                    task(what)
                except Exception as error:
                    logging.getLogger("workerpools").error("a task failed: %s", type(error).__name__)
            pools.close()
            database.execute("drop role logged")
    assert len(lines.of("connection_leaked")) >= 4
    assert lines.of("connection_held")
    assert lines.of("replay_refused")
    everything = "\n".join(lines.lines)
    assert "value_closed resource=db" in everything
    for shown in (secret, quoted, "s3cr3t"):
        assert shown not in everything
