"""The messages of docs/troubleshooting.md: each is provoked with plain clients, and does not come with ours."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import select
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import httpx
import pytest
import requests
import sqlalchemy
from celery import Celery
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

from demo_tasks.servers import PostgresServer, Workspace
from tests.docs.shop_api import shop_api
from tests.support.databases import Database, maintenance
from tests.support.faults import read_only
from tests.support.forking import run_in_fork
from tests.support.mariadb import MariaDatabase
from tests.support.paths import ROOT
from tests.support.proxy import TcpProxy
from tests.support.tls import TlsProxy
from workerpools import FailureKind, PooledTask, WorkerPools, classify
from workerpools.httpx import AsyncHttpxClient, HttpxClient
from workerpools.requests import RequestsSession
from workerpools.sqlalchemy import AsyncSQLAlchemyEngine, SQLAlchemyEngine

PAGE = ROOT / "docs" / "troubleshooting.md"
ONE = text("SELECT 1")


@contextmanager
def _logged(name: str) -> Iterator[list[str]]:
    lines: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger(name)
    logger.addHandler(handler)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)


def _all_of(threads: list[threading.Thread]) -> None:
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


class Plain:
    """Clients as they are made without the library; a body is a function that is called."""

    patience = "pool_timeout"

    def __init__(self) -> None:
        self._engines: list[sqlalchemy.Engine] = []

    def engine(self, url: str, **options: Any) -> Callable[[], sqlalchemy.Engine]:
        made = sqlalchemy.create_engine(url, **options)
        self._engines.append(made)
        return lambda: made

    def session(self, url: str, **options: Any) -> Callable[[], requests.Session]:
        made = requests.Session()
        return lambda: made

    def client(self, url: str, **options: Any) -> Callable[[], httpx.Client]:
        made = httpx.Client(base_url=url, **options)
        return lambda: made

    def run(self, body: Callable[[], Any]) -> Any:
        return body()

    def close(self) -> None:
        for engine in self._engines:
            engine.dispose(close=False)


class Ours:
    """The same clients, declared; a body is that of a task."""

    patience = "acquire_timeout"

    def __init__(self) -> None:
        self.pools = WorkerPools()

    def engine(self, url: str, **options: Any) -> Callable[[], sqlalchemy.Engine]:
        return self.pools.add(SQLAlchemyEngine(url, **options), name=f"db{len(self.pools.resources)}").get

    def session(self, url: str, **options: Any) -> Callable[[], requests.Session]:
        return self.pools.add(RequestsSession(url, **options), name="api").get

    def client(self, url: str, **options: Any) -> Callable[[], httpx.Client]:
        return self.pools.add(HttpxClient(base_url=url, **options), name="api").get

    def run(self, body: Callable[[], Any]) -> Any:
        app = Celery(set_as_current=False)
        return app.task(base=PooledTask, name="body")(body)()

    def close(self) -> None:
        self.pools.close()


def _one(engine: Callable[[], sqlalchemy.Engine]) -> Callable[[], int]:
    def body() -> int:
        with engine().begin() as connection:
            return int(connection.scalar(ONE))

    return body


@dataclass
class Stage:
    """The servers."""

    database: Database
    server: PostgresServer
    maria: Callable[[], MariaDatabase]
    stack: ExitStack
    small: Callable[[], PostgresServer]

    def proxied(self, database: Database | MariaDatabase) -> TcpProxy:
        return self.stack.enter_context(TcpProxy(database.host, database.port))

    def over_tls(self) -> tuple[str, TcpProxy]:
        tls = self.stack.enter_context(TlsProxy(self.database.host, self.database.port, postgres=True))
        proxy = self.stack.enter_context(TcpProxy("127.0.0.1", tls.port))
        return f"{self.database.through(proxy).url()}?sslmode=require", proxy


def forked_over_tls(side: Any, stage: Stage) -> Any:
    url, _ = stage.over_tls()
    engine = side.engine(url)
    side.run(_one(engine))
    assert run_in_fork(lambda: side.run(_one(engine))) == 1
    return side.run(_one(engine))


def idle_end(side: Any, stage: Stage) -> Any:
    proxy = stage.proxied(stage.database)
    engine = side.engine(stage.database.through(proxy).url())
    side.run(_one(engine))
    proxy.close_all("fin")
    return side.run(_one(engine))


def idle_end_over_tls(side: Any, stage: Stage) -> Any:
    url, proxy = stage.over_tls()
    engine = side.engine(url)
    side.run(_one(engine))
    proxy.close_all("fin")
    return side.run(_one(engine))


def stolen_reply(side: Any, stage: Stage) -> Any:
    engine = side.engine(stage.database.url("psycopg"))

    def body() -> Any:
        with engine().connect() as connection:
            pgconn = connection.connection.driver_connection.pgconn
            pgconn.send_query(b"SELECT repeat('x', 1000)")
            select.select([pgconn.socket], [], [], 10)
            run_in_fork(lambda: os.read(pgconn.socket, 7))
            result = pgconn.get_result()
            message = pgconn.error_message.decode()
            while pgconn.get_result() is not None:
                pass
            if result.status != 2:
                raise RuntimeError(message)
            return 1

    return body()


def used_after_a_loss(side: Any, stage: Stage) -> Any:
    engine = side.engine(stage.database.url())
    ended: list[int] = []

    def body() -> Any:
        with engine().connect() as connection:
            backend = connection.scalar(text("SELECT pg_backend_pid()"))
            if not ended:
                ended.append(backend)
                stage.database.execute("SELECT pg_terminate_backend(%s, 5000)", backend)
            with suppress(sqlalchemy.exc.OperationalError):
                connection.execute(ONE)
            return connection.scalar(ONE)

    return side.run(body)


def changed_table(side: Any, stage: Stage) -> Any:
    stage.database.execute("CREATE TABLE orders (id integer)")
    engine = side.engine(stage.database.url("psycopg"), connect_args={"prepare_threshold": 0})

    def body() -> Any:
        with engine().begin() as connection:
            return len(connection.execute(text("SELECT * FROM orders")).all()) + 1

    side.run(body)
    stage.database.execute("ALTER TABLE orders ADD sku text")
    return side.run(body)


def after_a_failover(side: Any, stage: Stage) -> Any:
    stage.database.execute("CREATE TABLE orders (id integer)")
    engine = side.engine(stage.database.url())

    def body() -> Any:
        with engine().begin() as connection:
            return connection.execute(text("INSERT INTO orders VALUES (1)")).rowcount

    side.run(_one(engine))
    with read_only(stage.server, stage.database):
        return side.run(body)


def left_open(side: Any, stage: Stage) -> Any:
    engine = side.engine(stage.database.url(), pool_size=1, max_overflow=0, **{side.patience: 0.2})
    kept = []

    def body() -> int:
        kept.append(engine().connect())
        return int(kept[-1].scalar(ONE))

    side.run(body)
    return side.run(body)


def left_streaming(side: Any, stage: Stage) -> Any:
    limits, timeout = httpx.Limits(max_connections=1), httpx.Timeout(5.0, pool=0.2)
    with shop_api() as url:
        client = side.client(url, limits=limits, timeout=timeout)

        def body() -> int:
            return client().send(client().build_request("GET", "/"), stream=True).status_code // 200

        side.run(body)
        try:
            return side.run(body)
        except httpx.PoolTimeout as error:
            raise RuntimeError(repr(error)) from error


def eleven_at_once(side: Any, stage: Stage) -> Any:
    with shop_api() as url, _logged("urllib3.connectionpool") as lines:
        session = side.session(url)
        threads = [threading.Thread(target=lambda: session().get(f"{url}/?delay=0.3")) for _ in range(11)]
        _all_of(threads)
        if lines:
            raise RuntimeError(lines[0])
    return 1


def many(side: Any, url: str, number: int) -> Any:
    """So many connections at a time."""
    engine = side.engine(url, pool_size=number)
    with ExitStack() as stack:
        for _ in range(number):
            stack.enter_context(engine().connect())
    return 1


def more_than_there_are(side: Any, stage: Stage) -> Any:
    return many(side, stage.small().url(), 9)


def more_than_a_role_may(side: Any, stage: Stage) -> Any:
    server = stage.small()
    maintenance(server).execute("DROP ROLE IF EXISTS app")
    maintenance(server).execute("CREATE ROLE app LOGIN PASSWORD 'of-app'")
    app = replace(maintenance(server), user="app", password="of-app")
    return many(side, app.url(), 8)


def more_than_mariadb_has(side: Any, stage: Stage) -> Any:
    maria = stage.maria()
    # Connected before: there is no connection left at the end.
    with closing(sqlalchemy.create_engine(maria.url(), isolation_level="AUTOCOMMIT").connect()) as administrator:
        administrator.execute(text("SET GLOBAL max_connections = 10"))
        try:
            return many(side, maria.url(), 13)
        finally:
            administrator.execute(text("SET GLOBAL max_connections = DEFAULT"))
            administrator.detach()


def nobody_listens(side: Any, stage: Stage) -> Any:
    proxy = stage.proxied(stage.database)
    proxy.stop()
    session = side.session(f"http://127.0.0.1:{proxy.port}")

    def body() -> int:
        return int(session().get(f"http://127.0.0.1:{proxy.port}/").status_code) // 200

    return side.run(body)


def killed(side: Any, stage: Stage) -> Any:
    maria = stage.maria()
    engine = side.engine(maria.url())
    side.run(_one(engine))
    maria.kill_sessions()
    return side.run(_one(engine))


def reset(side: Any, stage: Stage) -> Any:
    maria = stage.maria()
    proxy = stage.proxied(maria)
    engine = side.engine(replace(maria, host=proxy.host, port=proxy.port).url())
    side.run(_one(engine))
    proxy.close_all("rst")
    return side.run(_one(engine))


def kept_client(side: Any, stage: Stage) -> Any:
    with shop_api() as url:
        if isinstance(side, Plain):
            client = httpx.AsyncClient(base_url=url)
            asyncio.run(client.get("/"))
            asyncio.run(client.get("/"))
        declared = side.pools.add(AsyncHttpxClient(base_url=url), name="api")

        async def body() -> int:
            return (await declared.get().get("/")).status_code // 200

        side.run(body)
        return side.run(body)


def kept_engine(side: Any, stage: Stage) -> Any:
    url = stage.database.url("asyncpg")
    if isinstance(side, Plain):
        engine = create_async_engine(url)

        async def ask() -> int:
            async with engine.connect() as connection:
                return int(await connection.scalar(ONE))

        asyncio.run(ask())
        return asyncio.run(ask())
    declared = side.pools.add(AsyncSQLAlchemyEngine(url), name="db")

    async def body() -> int:
        async with declared.get().connect() as connection:
            return int(await connection.scalar(ONE))

    side.run(body)
    return side.run(body)


def closed_under_a_request(side: Any, stage: Stage) -> Any:
    with shop_api() as url, closing(TcpProxy("127.0.0.1", int(url.rpartition(":")[2]))) as proxy:
        client = side.client(f"http://127.0.0.1:{proxy.port}")

        def body() -> int:
            return client().get("/").status_code // 200

        side.run(body)
        proxy.cut_after(1, "to_server", scope="open")
        return side.run(body)


#: What comes with plain clients, and not with ours.
STORIES: dict[str, Callable[[Any, Stage], Any]] = {
    "SSL error: decryption failed or bad record mac": forked_over_tls,
    "server closed the connection unexpectedly": idle_end,
    "SSL SYSCALL error: EOF detected": idle_end_over_tls,
    "lost synchronization with server": stolen_reply,
    "Can't reconnect until invalid transaction is rolled back": used_after_a_loss,
    "cached plan must not change result type": changed_table,
    "in a read-only transaction": after_a_failover,
    "MySQL server has gone away": reset,
    "Lost connection to MySQL server during query": killed,
    "Event loop is closed": kept_client,
    "attached to a different loop": kept_engine,
    "Server disconnected without sending a response": closed_under_a_request,
    "QueuePool limit of size": left_open,
    "PoolTimeout": left_streaming,
    "Connection pool is full, discarding connection": eleven_at_once,
}


#: What comes with both: the task goes back to the broker for it.
RETRIED: dict[str, Callable[[Any, Stage], Any]] = {
    "sorry, too many clients already": more_than_there_are,
    "remaining connection slots are reserved": more_than_a_role_may,
    "Too many connections": more_than_mariadb_has,
    "Max retries exceeded with url": nobody_listens,
}


@pytest.fixture(scope="module")
def small_server(workspace: Workspace) -> Iterator[PostgresServer]:
    """A server with eight connections, of which three are reserved."""
    with PostgresServer(workspace, name="small", settings={"max_connections": "8"}) as server:
        yield server


@pytest.fixture
def stage(database: Database, postgres_server: PostgresServer, request: pytest.FixtureRequest) -> Iterator[Stage]:
    """Those that a test does not use are not started."""
    with ExitStack() as stack:
        yield Stage(
            database,
            postgres_server,
            lambda: request.getfixturevalue("maria_database"),
            stack,
            lambda: request.getfixturevalue("small_server"),
        )


@pytest.mark.parametrize("message", STORIES)
def test_message_comes_without_and_not_with_the_library(message: str, stage: Stage) -> None:
    """The same bodies, over the same servers, one after the other."""
    with closing(Plain()) as plain, pytest.raises(Exception, match=re.escape(message)):
        STORIES[message](plain, stage)
    stage.stack.close()
    stage.database.execute("DROP TABLE IF EXISTS orders")
    with closing(Ours()) as ours:
        assert STORIES[message](ours, stage) == 1


@pytest.mark.parametrize("message", RETRIED)
def test_message_is_of_a_server_that_cannot_serve_now(message: str, stage: Stage) -> None:
    """The error is the same one, and the failure's kind is the one that is retried."""
    for side in (Plain(), Ours()):
        with closing(side), pytest.raises(Exception, match=re.escape(message)) as caught:
            RETRIED[message](side, stage)
        stage.stack.close()
    failure = classify(caught.value)
    assert failure is not None
    assert failure.kind is FailureKind.UNAVAILABLE


def test_every_message_has_its_section() -> None:
    """Headings are the messages that people search for."""
    headings = re.findall(r"^### (.+)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    missing = [message for message in (*STORIES, *RETRIED) if not any(message in heading for heading in headings)]
    assert missing == []
