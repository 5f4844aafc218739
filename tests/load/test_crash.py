"""What the load test has found, each as a test that needs no luck."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sqlalchemy.exc import DBAPIError, OperationalError

from demo_tasks.servers import PostgresServer
from tests.support.databases import Database, HasAddress
from tests.support.proxy import TcpProxy
from tests.support.shop import Shop, insert
from tests.support.stand import wait_until
from workerpools import FailureKind, classify

pytestmark = pytest.mark.slow


@pytest.fixture(params=["psycopg2", "psycopg"])
def shop(
    request: pytest.FixtureRequest, own_database: Database, proxy_to: Callable[[HasAddress], TcpProxy]
) -> Iterator[Shop]:
    """An app whose database is reached through a proxy."""
    made = Shop(own_database, request.param, proxy=proxy_to(own_database))
    yield made
    made.pools.close()


def test_an_id_that_was_given_away_again_is_not_believed(shop: Shop, server: PostgresServer) -> None:
    """The COMMIT never arrives, and the server crashes before it has written anything of the transaction: after the
    recovery the id is the next transaction's. Whatever becomes of that one, the task has written no row."""
    ended: list[str] = []

    @shop.task()
    def task(self: Any) -> None:
        insert(self.session, 1)

    def run() -> None:
        try:
            task()
        except OperationalError:
            ended.append("refused")
        else:
            ended.append("done")

    cut = shop.proxy.cut_when(lambda chunk: b"COMMIT" in chunk, deliver=False)
    running = threading.Thread(target=run)
    running.start()
    cut.wait()
    # Nobody can ask before another transaction has been given the id.
    shop.proxy.stop()
    server.restart("immediate")
    shop.database.execute("insert into orders values (2)")
    shop.proxy.start()
    running.join(60)
    # A refusal has no row, and a success has one.
    assert (ended, shop.rows()) in ((["refused"], [2]), (["done"], [1, 2]))


def test_a_connection_that_is_lost_while_it_is_opened_is_no_open_question(shop: Shop) -> None:
    """Nothing of the task was sent by then, and no task here is in autocommit: it runs again, now or later."""

    @shop.task()
    def task(self: Any) -> None:
        insert(self.session, 1)

    # The one that made the table is not to be used again.
    shop.engine.get().dispose()
    wait_until(lambda: shop.proxy.open == 0, "no connection")
    cut = shop.proxy.cut_when(lambda chunk: b"pg_walfile_name" in chunk)
    try:
        task()
    except DBAPIError as error:
        # In a worker it would have gone back to the broker.
        failure = classify(error)
        assert failure is not None
        assert failure.kind is FailureKind.UNAVAILABLE
        task()
    assert cut.fired == 1
    assert shop.rows() == [1]
