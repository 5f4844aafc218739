"""A body is run again on a fresh connection where nothing can have been done, and nowhere else."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
import sqlalchemy
from celery.exceptions import SoftTimeLimitExceeded
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, OperationalError

from tests.support.faults import terminate_backends
from tests.support.proxy import TcpProxy
from tests.support.shop import Shop, insert
from tests.support.upstream import EchoUpstream
from workerpools.events import EventKind


@pytest.fixture
def api(shop: Shop, echo: EchoUpstream, proxy_to: Any) -> Iterator[TcpProxy]:
    """A proxy before the shop's upstream."""
    proxy = proxy_to(echo)
    shop.add_api(f"http://127.0.0.1:{proxy.port}")
    return proxy


BREAKS = {
    "terminated": lambda shop: terminate_backends(shop.database),
    "FIN": lambda shop: shop.proxy.close_all("fin"),
    "RST": lambda shop: shop.proxy.close_all("rst"),
}


@pytest.mark.parametrize("broken", BREAKS)
def test_a_connection_that_died_in_the_pool_costs_nothing(shop: Shop, broken: str) -> None:
    """The body runs again at once, on a new connection, and its work is there once."""
    runs: list[int] = []

    @shop.task()
    def task(self: Any, number: int) -> str:
        runs.append(number)
        insert(self.session, number)
        return "done"

    task(0)
    BREAKS[broken](shop)
    assert task(1) == "done"
    assert runs == [0, 1, 1]
    assert shop.rows() == [0, 1]
    assert shop.replays() == 1


@pytest.mark.parametrize("broken", BREAKS)
def test_a_transaction_that_was_lost_half_way_is_replayed_whole(shop: Shop, broken: str) -> None:
    """What the lost transaction did is undone by the server, so that the whole body runs again."""
    runs: list[int] = []

    @shop.task()
    def task(self: Any) -> None:
        runs.append(1)
        insert(self.session, len(runs))
        if len(runs) == 1:
            BREAKS[broken](shop)
        insert(self.session, 10)

    task()
    assert len(runs) == 2
    assert shop.rows() == [2, 10]


def test_a_connection_that_dies_again_and_again_is_raised(shop: Shop) -> None:
    """Two replays and not more; the driver's own error comes out, with a note that says why."""
    runs: list[int] = []

    @shop.task()
    def task(self: Any) -> None:
        runs.append(1)
        insert(self.session, 1)
        terminate_backends(shop.database)
        insert(self.session, 2)

    with pytest.raises(DBAPIError) as caught:
        task()
    assert len(runs) == 3
    assert shop.replays() == 2
    assert caught.value.connection_invalidated
    assert any("'db'" in note and "Not run again: it was called directly" in note for note in caught.value.__notes__)
    assert shop.rows() == []


@pytest.mark.parametrize(
    "how", ["session.commit()", "engine.begin()", "autocommit", "raw connection", "raw connection in a thread", "text"]
)
def test_nothing_is_replayed_after_a_commit(shop: Shop, how: str) -> None:
    """What was committed in the attempt would be done twice, by whatever way it was."""
    runs: list[int] = []

    def past_the_engine(engine: sqlalchemy.Engine) -> None:
        raw = engine.raw_connection()
        raw.cursor().execute("insert into orders values (1)")
        raw.commit()
        raw.close()

    @shop.task()
    def task(self: Any) -> None:
        runs.append(1)
        if how == "session.commit()":
            insert(self.session, len(runs))
            self.session.commit()
        elif how == "engine.begin()":
            with self.db.begin() as connection:
                insert(connection, len(runs))
        elif how == "text":
            insert(self.session, len(runs))
            self.session.execute(text("COMMIT"))
        elif how == "raw connection":
            past_the_engine(self.db)
        elif how == "raw connection in a thread":
            thread = threading.Thread(target=past_the_engine, args=(self.db,))
            thread.start()
            thread.join()
        else:
            with self.db.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                insert(connection, len(runs))
        terminate_backends(shop.database)
        insert(self.session, 10)

    with pytest.raises(DBAPIError):
        task()
    assert len(runs) == 1
    assert shop.rows() == [1]


def test_a_lost_statement_in_autocommit_is_raised(shop: Shop) -> None:
    """The reply was lost, the row is there: nobody may insert it again."""
    runs: list[int] = []

    @shop.task()
    def task(self: Any) -> None:
        runs.append(1)
        with self.db.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(text("select 1"))
            shop.proxy.cut_when(lambda chunk: b"insert into" in chunk.lower(), deliver=True)
            insert(connection, len(runs))

    with pytest.raises(DBAPIError):
        task()
    assert len(runs) == 1
    assert shop.rows() == [1]


def test_what_another_attempt_inside_committed_counts(shop: Shop) -> None:
    """A task applied in the body commits; the body around it does not run again."""

    @shop.task()
    def inner(self: Any, number: int) -> None:
        insert(self.session, number)

    runs: list[int] = []

    @shop.task()
    def outer(self: Any) -> None:
        runs.append(1)
        insert(self.session, 10)
        inner.apply((len(runs),)).get(disable_sync_subtasks=False)
        terminate_backends(shop.database)
        insert(self.session, 11)

    with pytest.raises(DBAPIError):
        outer()
    assert len(runs) == 1
    assert shop.rows() == [1]


@pytest.mark.parametrize("where", ["body", "thread"])
def test_a_body_that_sent_something_is_not_replayed(shop: Shop, api: TcpProxy, echo: EchoUpstream, where: str) -> None:
    """A POST that may have been processed is never sent again, whichever thread sent it."""

    @shop.task()
    def task(self: Any) -> None:
        insert(self.session, 1)
        if where == "body":
            self.api.post("/orders")
        else:
            thread = threading.Thread(target=self.api.post, args=("/orders",))
            thread.start()
            thread.join()
        terminate_backends(shop.database)
        insert(self.session, 2)

    with pytest.raises(DBAPIError):
        task()
    assert echo.orders == 1
    assert shop.rows() == []


@pytest.mark.parametrize(
    ("method", "headers"),
    [("GET", {}), ("PUT", {}), ("DELETE", {}), ("POST", {"Idempotency-Key": "order-1"})],
)
def test_a_body_that_sent_only_what_may_be_sent_again_is_replayed(
    shop: Shop, api: TcpProxy, method: str, headers: dict[str, str]
) -> None:
    """RFC 9110 §9.2.2, or a key that makes the server recognise the second one."""
    runs: list[int] = []

    @shop.task()
    def task(self: Any) -> None:
        runs.append(1)
        insert(self.session, 1)
        self.api.request(method, "/orders", headers=headers)
        if len(runs) == 1:
            terminate_backends(shop.database)
        insert(self.session, 2)

    task()
    assert len(runs) == 2
    assert shop.rows() == [1, 2]


@pytest.mark.parametrize("how", ["fin", "rst"])
def test_an_idle_http_connection_that_died_costs_nothing(
    shop: Shop, api: TcpProxy, echo: EchoUpstream, how: Any
) -> None:
    """SocketNumber before it is used again, the connection is replaced: even a POST goes out once."""

    @shop.task()
    def task(self: Any) -> int:
        return int(self.api.post("/orders").status_code)

    first = task()
    api.close_all(how)
    api.wait_for(open=0)
    assert task() == first
    assert echo.orders == 2


@pytest.mark.parametrize("how", ["fin", "rst"])
def test_a_get_on_a_connection_that_ends_without_an_answer_is_sent_again(
    shop: Shop, api: TcpProxy, echo: EchoUpstream, how: Any
) -> None:
    """It may be sent again, whether the server saw it or not: the request alone, not the body."""
    runs: list[int] = []

    @shop.task()
    def task(self: Any) -> str:
        runs.append(1)
        return str(self.api.get("/echo/hello").text)

    task()
    api.cut_when(lambda chunk: b"GET" in chunk, how=how)
    assert task() == "hello"
    assert len(runs) == 2
    assert [event.detail for event in shop.events if event.kind is EventKind.REQUEST_REPLAYED] == [
        "method=GET kind=stale"
    ]


@pytest.mark.parametrize("deliver", [False, True])
def test_a_post_on_a_connection_that_ends_without_an_answer_is_raised(
    shop: Shop, api: TcpProxy, echo: EchoUpstream, deliver: bool
) -> None:
    """httpx's own error comes out, with a note that names the resource; the upstream never sees two."""

    @shop.task()
    def task(self: Any) -> None:
        self.api.post("/orders")

    shop.api.get().get("/echo/warm")
    api.cut_when(lambda chunk: b"POST" in chunk, deliver=deliver)
    with pytest.raises(httpx.TransportError) as caught:
        task()
    assert any("'api'" in note for note in caught.value.__notes__)
    assert echo.orders == int(deliver)


def test_a_get_on_a_fresh_connection_is_raised(shop: Shop, api: TcpProxy) -> None:
    """That is no stale connection: the server ends connections on this request."""

    @shop.task()
    def task(self: Any) -> None:
        self.api.get("/echo/hello?close=fin")

    with pytest.raises(httpx.RemoteProtocolError):
        task()


def test_a_soft_time_limit_behind_a_lost_connection_comes_out_as_itself(shop: Shop) -> None:
    """Though the driver's error of a clean-up masks it."""
    runs: list[int] = []

    @shop.task()
    def task(self: Any) -> None:
        runs.append(1)
        insert(self.session, 1)
        terminate_backends(shop.database)
        try:
            raise SoftTimeLimitExceeded
        finally:
            insert(self.session, 2)

    with pytest.raises(SoftTimeLimitExceeded):
        task()
    assert len(runs) == 1


def test_a_bug_that_a_failed_rollback_masks_is_not_replayed(shop: Shop) -> None:
    """The task's own ValueError is behind the driver's error of the rollback, and comes out."""
    runs: list[int] = []

    @shop.task()
    def task(self: Any) -> None:
        runs.append(1)
        with self.db.begin() as connection:
            insert(connection, 1)
            terminate_backends(shop.database)
            raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        task()
    assert len(runs) == 1


@pytest.mark.parametrize("handled", [ValueError, SoftTimeLimitExceeded])
def test_what_was_being_handled_before_the_task_is_no_part_of_its_end(
    shop: Shop, handled: Callable[[], BaseException]
) -> None:
    """It is the context of every exception raised meanwhile: of a statement's, and of a rollback's."""
    runs: list[int] = []

    @shop.task()
    def task(self: Any) -> None:
        runs.append(1)
        insert(self.session, 1)
        if len(runs) < 3:
            terminate_backends(shop.database)
            connection = self.session.connection().connection.dbapi_connection
            if len(runs) == 1:
                connection.rollback()
            else:
                connection.cursor().execute("select 1")

    try:
        raise handled
    except (ValueError, SoftTimeLimitExceeded):
        task()
    assert len(runs) == 3
    assert shop.rows() == [1]


def test_a_server_that_is_down_is_raised_with_the_name(shop: Shop) -> None:
    """Nothing was stale: the driver's own error, and whose it was."""
    shop.engine.close()
    shop.proxy.stop()

    @shop.task()
    def task(self: Any) -> None:
        insert(self.session, 1)

    with pytest.raises(OperationalError) as caught:
        task()
    assert any("'db'" in note for note in caught.value.__notes__)
    assert sqlalchemy.make_url(shop.database.url()).password not in str(caught.value.__notes__)
