"""Every break of a connection to PostgreSQL, at every moment, with both drivers: the rows of the table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import text

from tests.chaos import table
from tests.chaos.breaks import DatabaseSite
from tests.chaos.shop import ChaosShop, run_to_the_end
from tests.chaos.table import Cell
from tests.support.faults import restart
from tests.support.upstream import EchoUpstream


def body_of(shop: ChaosShop, cell: Cell) -> Callable[[Any], None]:
    def insert(connection: Any) -> None:
        if cell.moment == table.FIRST_BYTE:
            connection.execute(text("select 1"))
            shop.pause_at(table.FIRST_BYTE)
        if cell.moment == table.MID_QUERY:
            # Only the first one is there to be found at it.
            parameters = {"seconds": 1.0 if shop.runs == 1 else 0.0}
            connection.execute(text("insert into orders select 1 from pg_sleep(:seconds)"), parameters)
        else:
            connection.execute(text("insert into orders values (1)"))

    def body(self: Any) -> None:
        if cell.before == "self.effect(…)":
            self.effect("sent a mail")
        elif cell.before == "COMMIT":
            insert(self.session)
            self.session.commit()
            self.session.execute(text("select 1"))
            shop.pause_at(cell.moment)
        elif cell.before:
            _send(self.api, cell.before)
        if cell.declared == "autocommit":
            with self.db.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                insert(connection)
            return
        shop.pause_at("first")
        insert(self.session)
        shop.pause_at(cell.moment)
        self.session.execute(text("update stock set n = n + 1"))
        if cell.declared == "COMMIT as text":
            self.session.execute(text("COMMIT"))

    return body


def _send(api: Any, request: str) -> None:
    method, _, key = request.partition(" ")
    api.request(method, "/orders", headers={"Idempotency-Key": "order-1"} if key else {})


def check(cell: Cell, broken: str, site: DatabaseSite) -> None:
    """Break it as the cell says, and compare what the task did and what is in the database."""
    shop = site.shop
    shop.declare(body_of(shop, cell), cell.declared)
    if broken != "wrong password":
        # Committed: what it may have left on the session is reset for the task.
        with shop.engine.get().begin() as connection:
            connection.execute(text("select 1"))
    site.arm(broken, cell.moment)
    run_to_the_end(shop, site.heal, cell.steps)
    site.settle()
    assert len(site.database.execute("SELECT * FROM orders")) == cell.rows
    if cell.declared != "autocommit" and cell.before != "COMMIT":
        # The whole transaction or nothing of it; hundreds are the other session's.
        [(stock,)] = site.database.execute("SELECT n % 100 FROM stock")
        assert stock == cell.rows


@pytest.mark.parametrize(("cell", "broken", "driver", "method"), table.parameters(*table.OVER_DATABASE))
def test_cell(
    cell: Cell, broken: str, driver: str, method: str, database_site: DatabaseSite, upstream: EchoUpstream
) -> None:
    """What the task did, how many rows are there in the end, and how many requests were seen."""
    if cell.requests is not None:
        database_site.shop.add_api(base_url=upstream.url)
    check(cell, broken, database_site)
    if cell.requests is not None:
        assert len(upstream.requests()) == cell.requests


@pytest.mark.parametrize(("cell", "driver"), [(Cell((), "", ()), driver) for driver in table.DATABASE])
def test_an_id_that_was_given_again_is_not_taken_for_ours(cell: Cell, driver: str, database_site: DatabaseSite) -> None:
    """After a crash that forgot the transaction, somebody else's has its id, and is committed."""
    site = database_site
    shop = site.shop

    def crash() -> None:
        [(lost,)] = site.database.execute("SELECT max(backend_xid::text::bigint) FROM pg_stat_activity")
        restart(site.server)
        while True:
            [(found,)] = site.database.execute("SELECT pg_current_xact_id()::text::bigint")
            # The forgotten one was never written down; the others' are, one after the other.
            if found >= lost:  # type: ignore[operator]
                return

    shop.declare(body_of(shop, cell), "")
    with shop.engine.get().connect() as connection:
        connection.execute(text("select 1"))
    site._before_chunk(b"COMMIT", "", crash)
    shop.send()
    shop.deliver(shop.take())
    site.settle()
    done = len(site.database.execute("SELECT * FROM orders"))
    assert (done == 1) == (shop.raised == [None])
