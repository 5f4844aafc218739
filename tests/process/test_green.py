"""Processes in which gevent or eventlet has replaced the ways to wait, with real servers and no worker."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import pytest

from tests.support.databases import Database
from tests.support.green import GreenFailed, Interpreter, run_green
from tests.support.mariadb import MariaDatabase
from tests.support.proxy import TcpProxy
from tests.support.upstream import EchoUpstream

CASES = "tests.process.green_cases"

LIBRARIES = ("gevent", "eventlet")


class Interpreters(dict[tuple[str, bool], Interpreter]):
    """By the library, and whether psycopg2 lets others run there: once that is so, it stays so."""

    def __call__(self, library: str, cooperates: bool, function: str, *args: Any) -> Any:
        """Have one of them call a function of `CASES`."""
        key = library, cooperates
        if key not in self:
            self[key] = Interpreter(library)
        try:
            return self[key].call(f"{CASES}:{function}", *args)
        except GreenFailed:
            self.pop(key).close()
            raise


@pytest.fixture(scope="module")
def green() -> Iterator[Interpreters]:
    """Interpreters that answer what changes nothing in them."""
    interpreters = Interpreters()
    yield interpreters
    for interpreter in interpreters.values():
        interpreter.close()


@pytest.mark.parametrize("library", ["", *LIBRARIES])
def test_what_is_patched_is_known(green: Interpreters, library: str) -> None:
    """By the library's own word, and the system's threads are found behind it."""
    assert green(library, False, "names_of_what_is_patched") == [
        library,
        "builtin_function_or_method",
        "_thread",
    ]


@pytest.mark.parametrize("library", ["", *LIBRARIES])
def test_the_watchdog_does_not_depend_on_greenlets(green: Interpreters, library: str) -> None:
    """A wait in a C library stops every greenlet: the watchdog ends it all the same."""
    assert green(library, False, "watchdog_beside_a_c_library") == (0, False)


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_switch_while_a_lock_is_held_stops_nobody(database: Database, echo: EchoUpstream, library: str) -> None:
    """A garbage collection in the middle of a count may close a connection, and so let another greenlet run: whoever
    wants the lock waits as a greenlet does. With a lock of the system's the process would stop for ever."""
    found = run_green(library, f"{CASES}:switches_while_locks_are_held", database.url(), echo.url)
    assert list(found.values()) == [["first", "first", "second", "second"]] * 5


@pytest.mark.parametrize(
    ("library", "driver", "cooperates", "together"),
    [
        ("gevent", "psycopg2", False, False),
        ("gevent", "psycopg2", True, True),
        ("gevent", "psycopg", False, True),
        ("eventlet", "psycopg2", False, True),
        # With PSYCOPG_WAIT_FUNC=wait_select.
        ("eventlet", "psycopg", False, True),
    ],
)
def test_which_drivers_let_others_run(
    green: Interpreters, database: Database, library: str, driver: str, cooperates: bool, together: bool
) -> None:
    """As docs/sqlalchemy.md tells."""
    found = green(library, cooperates, "two_queries", database.url(driver), cooperates)
    assert found == (["begin", "begin", "end", "end"] if together else ["begin", "end"] * 2)


@pytest.mark.parametrize("library", LIBRARIES)
def test_pymysql_lets_others_run(green: Interpreters, maria_database: MariaDatabase, library: str) -> None:
    """It is Python all through."""
    found = green(library, False, "two_queries", maria_database.url(), False)
    assert found == ["begin", "begin", "end", "end"]


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize(("driver", "cooperates"), [("psycopg2", True), ("psycopg2", False), ("psycopg", False)])
def test_connecting_ends(
    green: Interpreters,
    database: Database,
    proxy_to: Callable[[Any], TcpProxy],
    library: str,
    driver: str,
    cooperates: bool,
) -> None:
    """A server that accepts and says nothing; libpq itself knows no connect_timeout where psycopg2 waits elsewhere."""
    proxy = proxy_to(database)
    proxy.blackhole()
    url = database.through(proxy).url(driver)
    name, kind, took = green(library, cooperates, "silent_connect", url, cooperates)
    assert (name, kind) == ("OperationalError", "unavailable")
    assert took < 15


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("driver", ["psycopg2", "psycopg"])
def test_a_fork_beside_greenlets(database: Database, echo: EchoUpstream, library: str, driver: str) -> None:
    """The child has sessions of its own; both transactions of the parent go on, and are committed."""
    database.execute("create table orders (id int)")
    found = run_green(library, f"{CASES}:fork_beside_greenlets", database.url(driver), echo.url)
    assert found["own"] == found["own after"]
    assert found["other"] == found["other after"]
    assert len({found["own"], found["other"], found["child"]}) == 3
    assert (found["answer"], found["after"]) == ("child", "after")
    assert sorted(database.execute("select id from orders")) == [(1,), (2,)]


@pytest.mark.parametrize("library", LIBRARIES)
def test_closing_waits_for_work_in_flight(database: Database, echo: EchoUpstream, library: str) -> None:
    """A greenlet that is in the middle of a request and a transaction ends both before anything is closed."""
    database.execute("create table orders (id int)")
    assert run_green(library, f"{CASES}:close_beside_a_request", database.url(), echo.url) == ["slow", "closed"]
    assert database.execute("select id from orders") == [(3,)]
    deadline = time.monotonic() + 10
    while database.execute("select 1 from pg_stat_activity where application_name like 'workerpools %%'"):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("library", "driver", "cooperates", "told"),
    [
        ("gevent", "postgresql+psycopg2", False, r"'db'.*psycopg2.*gevent.*psycogreen\.gevent\.patch_psycopg\(\)"),
        ("gevent", "postgresql+psycopg2", True, None),
        ("gevent", "postgresql+psycopg", False, None),
        ("gevent", "mysql+pymysql", False, None),
        # eventlet.monkey_patch() does it.
        ("eventlet", "postgresql+psycopg2", False, None),
        ("eventlet", "mysql+pymysql", False, None),
        ("", "postgresql+psycopg2", False, None),
    ],
)
def test_a_driver_that_stops_the_others_is_told_of(
    green: Interpreters, library: str, driver: str, cooperates: bool, told: str | None
) -> None:
    """When its engine is made, with what to do; nothing else is worth a warning."""
    found = green(library, cooperates, "what_is_told", f"{driver}://app:secret@127.0.0.1/shop", cooperates)
    assert len(found) == (told is not None)
    assert told is None or re.search(told, found[0])
    assert "secret" not in str(found)


def cases(*places: str) -> list[tuple[str, str, str]]:
    return list(product(("psycopg2", "psycopg"), ("timeout", "kill"), places))


@pytest.mark.parametrize(
    "cases",
    [cases("body", "query", "cleanup", "commit"), *([case] for case in cases("connect", "introduction"))],
    ids=lambda cases: "-".join(cases[0]) if len(cases) == 1 else "warm",
)
def test_what_interrupts_a_greenlet_comes_out_as_itself(
    database: Database, proxy_to: Callable[[Any], TcpProxy], cases: list[tuple[str, str, str]]
) -> None:
    """GreenletExit and gevent.Timeout, wherever they strike: the body is not run again, what it did is undone, and
    nothing of it is left: no connection in use, none that is counted and not there, no socket that is watched."""
    database.execute("create table orders (id int)")
    database.execute("create table slow (seconds int)")
    database.execute(
        "create function wait() returns trigger language plpgsql as"
        " $$ begin perform pg_sleep(new.seconds); return new; end $$"
    )
    database.execute(
        "create constraint trigger waits after insert on slow deferrable initially deferred"
        " for each row execute function wait()"
    )
    if cold := len(cases) == 1:
        proxy = proxy_to(database)
        proxy.delay(0.2)
        database = database.through(proxy)
    found = run_green("gevent", f"{CASES}:interrupted_everywhere", database, cases)
    for (driver, how, where), case in zip(cases, found, strict=True):
        wanted = {"timeout": "Timeout", "kill": "GreenletExit"}[how]
        before = [] if cold else [1]
        left = {"in use": 0, "watched": 0, "connecting": 0, "open": 1, "rows": [*before, 3]}
        expected = {"came": [*map(str, before), wanted, "3"], "runs": 1, **left}
        assert (driver, how, where, case) == (driver, how, where, expected)
