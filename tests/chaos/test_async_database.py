"""The rows of the table with the asynchronous engine: the same bodies, run where its connections live."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import sqlalchemy
from sqlalchemy import text
from sqlalchemy.orm import Session

from demo_tasks.servers import PostgresServer
from tests.chaos import table
from tests.chaos.breaks import DatabaseSite
from tests.chaos.conftest import IMPATIENT
from tests.chaos.shop import ChaosShop, run_to_the_end
from tests.chaos.table import Cell
from tests.chaos.test_database import body_of
from tests.support.databases import Database
from tests.support.faults import ordinary_role
from tests.support.proxy import TcpProxy
from workerpools.sqlalchemy import AsyncSQLAlchemyEngine, AsyncTaskSession

pytest.importorskip("sqlalchemy", minversion="2.1")

BREAKS = ("FIN", "terminate", "silent")


def _parameters() -> Iterator[Any]:
    """Yield the rows of psycopg with these breaks, for both asynchronous drivers."""
    for found in table.parameters(*table.OVER_DATABASE):
        cell, broken, driver, method = found.values
        assert isinstance(cell, Cell)
        if broken not in BREAKS or driver != "psycopg" or method or cell.pgbouncer or cell.requests is not None:
            continue
        yield pytest.param(cell, broken, "psycopg", marks=found.marks, id=f"psycopg-{found.id}")
        # Its statements share no flight. COMMIT as text is prepared in a round trip before it is executed; and before a
        # COMMIT there is one for the transaction's id, which is what a silent server leaves without an answer.
        if (
            cell.moment not in (table.FLIGHT, table.ANSWERED)
            and cell.declared != "COMMIT as text"
            and (broken, cell.moment) != ("silent", table.BEFORE_COMMIT)
        ):
            yield pytest.param(cell, broken, "asyncpg", marks=found.marks, id=f"asyncpg-{found.id}")


class _InGreenlet:
    """What a plain body sees of an async one's task."""

    def __init__(self, task: Any, session: Session) -> None:
        self.session, self.effect, self.db = session, task.effect, task.db.sync_engine


@pytest.fixture
def site(
    chaos_server: PostgresServer,
    chaos_database: Database,
    cell: Cell,
    driver: str,
    proxy_to: Callable[[Any], TcpProxy],
) -> Iterator[DatabaseSite]:
    """An app with an asynchronous engine, whose connections go through a proxy."""
    with ExitStack() as opened:
        role = opened.enter_context(ordinary_role(chaos_database))
        proxy = proxy_to(chaos_server)
        shop = ChaosShop()
        url = sqlalchemy.make_url(role.through(proxy).url(driver))
        engine: Any = shop.pools.add(
            AsyncSQLAlchemyEngine(
                url,
                connect_args=dict(IMPATIENT) if driver == "psycopg" else {"timeout": 2},
                resolve_timeout=5.0,
                check_after=600.0,
                resolve_commit="resolve_commit=False" not in cell.declared,
            ),
            name="db",
        )
        shop.engine = engine
        shop._extend(db=engine, session=AsyncTaskSession(engine))
        opened.callback(shop.close)
        made = DatabaseSite(shop, chaos_server, chaos_database, proxy, None)
        opened.callback(made.heal)
        yield made


@pytest.mark.parametrize(("cell", "broken", "driver"), list(_parameters()))
def test_cell(cell: Cell, broken: str, driver: str, site: DatabaseSite) -> None:
    """What the task did, and how many rows are there in the end."""
    shop, plain = site.shop, body_of(site.shop, cell)

    async def body(self: Any) -> None:
        await self.session.run_sync(lambda session: plain(_InGreenlet(self, session)))

    async def use(engine: Any) -> None:
        async with engine.begin() as connection:
            await connection.execute(text("select 1"))

    shop.declare(body, cell.declared)
    shop.pools.run(use(shop.engine.get()))
    site.arm(broken, cell.moment)
    run_to_the_end(shop, site.heal, cell.steps)
    site.settle()
    assert len(site.database.execute("SELECT * FROM orders")) == cell.rows
    assert shop.pools.stats().totals()[0].in_use == 0
