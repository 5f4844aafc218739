"""On a real MariaDB: what a task waits for ends by its deadline, and what the driver waits for by its own bound."""

from __future__ import annotations

import itertools
import time
from typing import Any

import pytest
from celery.exceptions import SoftTimeLimitExceeded
from sqlalchemy import text
from sqlalchemy.exc import OperationalError

from tests.sqlalchemy.mariadb import LATE, SESSION, TIMEOUT, kind_of
from tests.support.shop import Shop, insert
from workerpools import FailureKind
from workerpools.sqlalchemy._timeouts import slack


@pytest.mark.parametrize("statement", ["select sleep(60)", "insert into orders select sleep(60) + 5"])
def test_the_server_ends_a_statement_at_the_deadline(maria_shop: Shop, statement: str) -> None:
    """Whatever it is; reported as Celery reports its limit, once, and the connection is of use afterwards."""
    runs: list[int] = []

    @maria_shop.task(soft_time_limit=2)
    def task(self: Any) -> None:
        runs.append(self.session.scalar(SESSION))
        insert(self.session, 1)
        self.session.execute(text(statement))

    started = time.monotonic()
    with pytest.raises(SoftTimeLimitExceeded) as caught:
        task.apply().get()
    assert time.monotonic() - started < LATE
    assert len(runs) == 1
    assert "max_statement_time" in str(caught.value.__cause__)
    assert maria_shop.rows() == []

    @maria_shop.task()
    def after(self: Any) -> tuple[int, float]:
        insert(self.session, 2)
        return self.session.scalar(SESSION), self.session.scalar(TIMEOUT)

    assert after.apply().get() == (runs[0], 0.0)


def test_a_later_statement_has_less_time(maria_shop: Shop) -> None:
    """The timeout is sent again when it no longer fits: it ends a statement at the deadline or a little earlier."""

    @maria_shop.task(soft_time_limit=30)
    def task(self: Any) -> list[tuple[float, float, float]]:
        found = []
        for pause in (0.0, 2.0):
            time.sleep(pause)
            before = self.deadline.remaining()
            timeout = float(self.session.scalar(TIMEOUT))
            found.append((self.deadline.remaining(), timeout, before))
        return found

    first, second = task.apply().get()
    assert second[1] < first[1]
    for after, timeout, before in (first, second):
        assert after - slack(before) - 0.001 <= timeout <= before


def test_short_tasks_pay_no_round_trip_for_their_deadline(maria_shop: Shop) -> None:
    """The session's timeout is remembered: not every task of the same limit sends one."""

    @maria_shop.task(soft_time_limit=300)
    def task(self: Any) -> list[Any]:
        return list(self.session.execute(text("show session status like 'com_set_option'")).one())

    sent = [task.apply().get() for _ in range(10)]
    # A machine that stands still for half a second has one sent again.
    assert any(one == other for one, other in itertools.pairwise(sent))


def test_the_users_own_shorter_timeout_wins(maria_shop: Shop) -> None:
    """Its error is the database's own: no deadline ended it, and it is no failure of the connection."""
    _, base = maria_shop.another(connect_args={"init_command": "set session max_statement_time = 1.5"})

    @maria_shop.task(base=base, soft_time_limit=300)
    def task(self: Any) -> None:
        assert float(self.session.scalar(TIMEOUT)) == 1.5
        self.session.execute(text("select sleep(60)"))

    with pytest.raises(OperationalError, match="max_statement_time") as caught:
        task.apply().get()
    assert kind_of(caught.value) is None
    assert maria_shop.replays() == 0


def test_what_tells_of_the_statement_before_still_does(maria_shop: Shop) -> None:
    """Nothing is sent in between, though the timeout no longer fits."""

    @maria_shop.task(soft_time_limit=30)
    def task(self: Any) -> int:
        self.session.execute(text("insert into orders values (1), (2), (3)"))
        time.sleep(2)
        return int(self.session.scalar(text("select row_count()")))

    assert task.apply().get() == 3


def test_a_statement_that_outlasts_the_drivers_read_timeout_is_raised(maria_shop: Shop) -> None:
    """Nobody knows whether the server is gone or slow: a slow statement is not run again and again."""
    _, base = maria_shop.another(connect_args={"read_timeout": 2})
    runs: list[int] = []

    @maria_shop.task(base=base)
    def task(self: Any) -> None:
        runs.append(1)
        insert(self.session, 1)
        self.session.execute(text("select sleep(60)"))

    if maria_shop.driver != "pymysql":
        pytest.skip("mysqlclient does not tell a time-out from another end of the connection")
    with pytest.raises(OperationalError, match="timed out") as caught:
        task()
    assert len(runs) == 1
    assert kind_of(caught.value) is FailureKind.INDETERMINATE


@pytest.mark.parametrize("when", ["statement", "its timeout", "commit", "checkout"])
def test_a_silent_network_is_given_up_at_the_deadline(maria_shop: Shop, when: str) -> None:
    """Packets are dropped, the server's timeout with them: the socket is shut down, long before the driver's bound."""
    connect_args = {"read_timeout": 80, "write_timeout": 80}
    engine, base = maria_shop.another(check_after=0.0 if when == "checkout" else None, connect_args=connect_args)

    @maria_shop.task(base=base, soft_time_limit=2, replay=False)
    def task(self: Any) -> None:
        if when != "checkout":
            insert(self.session, 1)
        if when == "its timeout":
            # The one that was sent fits no longer.
            time.sleep(1)
        maria_shop.proxy.blackhole()
        if when == "checkout":
            # PyMySQL waits for a server's greeting for as long as for any answer.
            maria_shop.proxy.stop()
        if when != "commit":
            insert(self.session, 2)

    with engine.get().connect() as connection:
        connection.scalar(SESSION)
    started = time.monotonic()
    with pytest.raises((SoftTimeLimitExceeded, OperationalError)) as caught:
        task.apply().get()
    assert time.monotonic() - started < LATE
    maria_shop.proxy.pass_through()
    if when == "commit":
        # It had left: it arrives, or it does not.
        assert kind_of(caught.value) is FailureKind.INDETERMINATE
    else:
        assert isinstance(caught.value, SoftTimeLimitExceeded) or when == "checkout"
        assert maria_shop.rows() == []
