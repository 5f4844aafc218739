"""What web processes make of declarations, in one process."""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress
from typing import Any

import httpx
import pytest
from celery import Celery
from fastapi import FastAPI
from sqlalchemy import create_engine, text
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from tests.support.databases import Database
from tests.support.shop import Shop
from workerpools import ConfigurationError, WorkerPools
from workerpools._process import event_loop
from workerpools.adapter import current
from workerpools.fastapi import depends, lifespan
from workerpools.httpx import AsyncHttpxClient
from workerpools.testing import run_attempt


async def _loop() -> asyncio.AbstractEventLoop:
    return asyncio.get_running_loop()


@pytest.fixture
def pools() -> WorkerPools:
    """An app's, without a loop in this process."""
    event_loop.end(5.0)
    return WorkerPools(Celery("web", set_as_current=False))


def test_inside_the_servers_loop_is_the_processs(pools: WorkerPools) -> None:
    """For threads, too, and for a second lifespan; afterwards the process has one of its own again."""

    async def serve() -> None:
        own = asyncio.get_running_loop()
        async with lifespan(pools)(None), lifespan(pools)(None):
            assert event_loop.is_here()
            assert await asyncio.to_thread(lambda: pools.run(_loop())) is own
        assert not event_loop.is_running()

    asyncio.run(serve())
    other = pools.run(_loop())
    assert other.is_running()

    async def late() -> None:
        with pytest.raises(ConfigurationError, match="runs another event loop already"):
            async with lifespan(pools)(None):
                raise AssertionError("entered")

    asyncio.run(late())
    event_loop.end(5.0)


def test_a_forked_child_has_a_loop_of_its_own(pools: WorkerPools) -> None:
    """Neither the server's loop nor its selector is touched by what the child does."""

    async def serve() -> int:
        async with lifespan(pools)(None):
            pid = os.fork()
            if pid == 0:
                status = 1
                with suppress(BaseException):
                    status = 0 if pools.run(asyncio.sleep(0, 7)) == 7 else 2
                os._exit(status)
            _, status = await asyncio.to_thread(os.waitpid, pid, 0)
            await asyncio.sleep(0.01)
            return status

    assert asyncio.run(serve()) == 0


def test_values_are_closed_on_the_servers_loop(pools: WorkerPools) -> None:
    """At the lifespan's end, when the loop still runs."""
    resource = pools.add(AsyncHttpxClient(), name="api")

    async def serve() -> httpx.AsyncClient:
        async with lifespan(pools)(None):
            client = resource.get()
            assert not client.is_closed
        return client

    assert asyncio.run(serve()).is_closed
    assert not resource.is_open


def test_an_asynchronous_engine_on_the_servers_loop(pools: WorkerPools, database: Database) -> None:
    """Endpoints commit their sessions; what they do not commit is rolled back; the engine is closed at the end."""
    pytest.importorskip("sqlalchemy", minversion="2.1")
    from sqlalchemy.ext.asyncio import AsyncSession

    from workerpools.sqlalchemy import AsyncSQLAlchemyEngine, AsyncTaskSession

    database.execute("create table orders (id int)")
    engine = pools.add(AsyncSQLAlchemyEngine(database.url("psycopg")), name="db")
    own = depends(AsyncTaskSession(engine))
    web = FastAPI()

    @web.post("/orders/{number}")
    async def add(number: int, commit: bool, session: AsyncSession = own) -> int:
        await session.execute(text("insert into orders values (:number)"), {"number": number})
        if commit:
            await session.commit()
        found: int = await session.scalar(text("select pg_backend_pid()"))
        return found

    async def serve() -> set[int]:
        transport = httpx.ASGITransport(web)
        async with lifespan(pools)(web), httpx.AsyncClient(transport=transport, base_url="http://web") as client:
            sent = [await client.post(f"/orders/{number}", params={"commit": number != 2}) for number in (1, 2, 3)]
        return {each.raise_for_status().json() for each in sent}

    assert len(asyncio.run(serve())) == 1
    assert database.execute("select id from orders order by id") == [(1,), (3,)]
    assert not engine.is_open
    assert database.execute("select 1 from pg_stat_activity where application_name like 'workerpools %'") == []


def test_depends_takes_declarations(shop: Shop) -> None:
    """The same dependency for one handle, so that a request has one session; anything else is refused."""
    assert depends(shop.engine) is depends(shop.engine)
    FastAPI().get("/")(lambda session=depends(shop.base.session): None)  # type: ignore[attr-defined]
    with pytest.raises(ConfigurationError, match=r"depends\('api'\): wanted: a resource or a session's declaration"):
        depends("api")


def test_a_session_of_the_callers_own(shop: Shop) -> None:
    """It is no attempt's: what it commits in a body is an effect, and the attempt leaves it alone."""
    declared: Any = shop.base.session  # type: ignore[attr-defined]
    with declared.new() as session, session.begin():
        session.execute(text("insert into orders values (1)"))
    assert shop.rows() == [1]
    kept: list[Session] = []

    def body() -> list[str]:
        own = declared.new()
        kept.append(own)
        own.execute(text("insert into orders values (2)"))
        own.commit()
        attempt = current()
        assert attempt is not None
        return [str(effect) for effect in attempt.effects]

    assert any("COMMIT" in effect for effect in run_attempt(body))
    assert shop.rows() == [1, 2]
    kept[0].execute(text("select 1"))
    kept[0].close()
    fake = Session()
    with declared.override(fake):
        assert declared.new() is fake


def test_a_scoped_session_serves_bodies(shop: Shop, database: Database) -> None:
    """In a body it is the attempt's; elsewhere its own; what is wrong with it is said at the declaration."""
    declared: Any = shop.base.session  # type: ignore[attr-defined]
    engine = create_engine(database.url())
    scoped: Any = scoped_session(sessionmaker(engine))
    declared.serve(scoped)
    own = scoped()

    @shop.task()
    def body(self: Any, number: int) -> bool:
        scoped.execute(text("insert into orders values (:number)"), {"number": number})
        with pytest.raises(ConfigurationError, match=r"which has its options"):
            scoped(expire_on_commit=False)
        scoped.remove()
        return scoped() is self.session

    assert body.delay(1).get() is True
    assert shop.rows() == [1]
    assert scoped() is own
    own.execute(text("insert into orders values (2)"))
    scoped.remove()
    assert shop.rows() == [1]
    assert scoped() is not own
    scoped.remove()
    engine.dispose()
    with pytest.raises(ConfigurationError, match=r"serves .*session already"):
        declared.serve(scoped)
    with pytest.raises(ConfigurationError, match="takes a scoped_session, not sessionmaker"):
        declared.serve(sessionmaker())
    assert run_attempt(lambda: scoped() is declared.get())
