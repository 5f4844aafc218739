"""What the driver is given: libpq's parameters in every form, several servers, and what is refused at declaration."""

from __future__ import annotations

import logging
import os
import re
import socket
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import psycopg
import psycopg2
import pytest
import sqlalchemy
from sqlalchemy import event, text
from sqlalchemy.engine import URL
from sqlalchemy.pool import QueuePool

from tests.support.databases import Database
from tests.support.inspect import backends
from tests.support.shop import Shop
from workerpools import ConfigurationError, WorkerPools
from workerpools.sqlalchemy import SQLAlchemyEngine
from workerpools.sqlalchemy._driver import attempts, fitted

DRIVERS = ["psycopg2", "psycopg"]
MODULES: dict[str, Any] = {"psycopg2": psycopg2, "psycopg": psycopg}
STRINGS = {"psycopg2": "dsn", "psycopg": "conninfo"}
LIMITS: dict[str, dict[str, Any]] = {"no deadline": {}, "deadline": {"soft_time_limit": 30}}


@pytest.fixture
def dead() -> Iterator[int]:
    """A port that refuses connections."""
    with socket.socket() as claim:
        claim.bind(("127.0.0.1", 0))
        yield claim.getsockname()[1]


def parameters_of(connection: sqlalchemy.Connection) -> dict[str, str]:
    driver: Any = connection.connection.driver_connection
    info = driver.info
    found: dict[str, str] = info.dsn_parameters if hasattr(info, "dsn_parameters") else info.get_parameters()
    # The parameter marks the socket while it is being connected; what counts is the option that the socket keeps.
    with socket.socket(fileno=os.dup(driver.fileno())) as own:
        return {**found, "tcp_user_timeout": str(own.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT))}


def in_task(shop: Shop, limit: dict[str, Any]) -> dict[str, str]:
    """Connect in a task; return what libpq was given."""

    @shop.task(**limit)
    def body(self: Any) -> dict[str, str]:
        with self.db.connect() as connection:
            assert connection.scalar(text("select 1")) == 1
            return {**parameters_of(connection), "name": connection.scalar(text("show application_name"))}

    found: dict[str, str] = body.delay().get()
    return found


@pytest.fixture
def shop() -> Iterator[Shop]:
    made = Shop()
    yield made
    made.close()


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("form", ["query", "text", "number", "string", "creator"])
@pytest.mark.parametrize("driver", DRIVERS)
def test_parameters_in_every_form(shop: Shop, database: Database, driver: str, form: str, limit: str) -> None:
    """What is given wins over the defaults, and a deadline changes none that fits."""
    given = {"connect_timeout": "3", "keepalives_idle": "7", "application_name": "mine", "tcp_user_timeout": "9000"}
    url, options = database.url(driver), dict[str, Any]()
    if form == "query":
        url += "?" + "&".join(f"{name}={value}" for name, value in given.items())
    elif form == "text":
        options["connect_args"] = given
    elif form == "number":
        options["connect_args"] = {name: int(value) if value.isdigit() else value for name, value in given.items()}
    elif form == "string":
        url = f"postgresql+{driver}://"
        words = " ".join(f"{name}={value}" for name, value in given.items())
        where = f"host={database.host} port={database.port} user={database.user} dbname={database.name}"
        options["connect_args"] = {STRINGS[driver]: f"{where} password={database.password} {words}"}
    else:
        options["creator"] = partial(MODULES[driver].connect, database.dsn, **given)
    shop.add_database(url, **options)
    found = in_task(shop, LIMITS[limit])
    assert {name: found[name] for name in given} == given
    assert found["name"] == "mine"
    # The others are ours, unless the connection is the user's.
    assert found.get("keepalives_count") == (None if form == "creator" else "3")


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("form", ["host:port", "lists", "one port", "connect_args", "string", "addresses"])
@pytest.mark.parametrize("driver", DRIVERS)
def test_several_servers(shop: Shop, database: Database, dead: int, driver: str, form: str, limit: str) -> None:
    """The first one refuses; the second one is the primary."""
    base = f"postgresql+{driver}://{database.user}:{database.password}@/{database.name}"
    query, options = "?target_session_attrs=read-write", dict[str, Any]()
    ports = f"{dead},{database.port}"
    if form == "host:port":
        query += f"&host=127.0.0.1:{dead}&host=127.0.0.1:{database.port}"
    elif form == "lists":
        query += f"&host=127.0.0.1,127.0.0.1&port={ports}"
    elif form == "one port":
        # Nobody listens on this address of the loopback.
        query += f"&host=127.9.9.9,127.0.0.1&port={database.port}"
    elif form == "addresses":
        query += f"&hostaddr=127.0.0.1,127.0.0.1&port={ports}"
    elif form == "connect_args":
        options["connect_args"] = {"host": "127.0.0.1,127.0.0.1", "port": ports}
    else:
        base = f"postgresql+{driver}://"
        query = ""
        options["connect_args"] = {
            STRINGS[driver]: f"postgresql://{database.user}:{database.password}@127.0.0.1:{dead},"
            f"127.0.0.1:{database.port}/{database.name}?target_session_attrs=read-write"
        }
    shop.add_database(base + query, **options)
    assert in_task(shop, LIMITS[limit])["name"] == f"workerpools db pid={os.getpid()}"


@pytest.mark.parametrize(
    ("value", "remaining", "servers", "expected"),
    [
        (5, 60.0, 1, 5),
        ("5", 60.0, 1, "5"),
        (5, 3.9, 1, 4),
        ("5", 3.9, 1, 4),
        (5, 0.5, 1, 2),
        (30, 12.0, 3, 4),
        ("30", 12.0, 3, 4),
        (30, 4.0, 3, 2),
        (0, 60.0, 1, 60),
        ("0", 60.0, 2, 30),
        (-1, 60.0, 1, 60),
        (None, 60.0, 1, 60),
        ("", 60.0, 1, 60),
        ("7.5", 60.0, 1, "7.5"),
        ("soon", 60.0, 1, "soon"),
    ],
)
def test_connect_timeouts_fit_a_deadline(value: Any, remaining: float, servers: int, expected: Any) -> None:
    """Whole seconds, at least 2, for each server; 0 is no bound, and what is no number is the driver's to refuse."""
    assert fitted(value, remaining, servers) == expected


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({}, 1),
        ({"host": "db"}, 1),
        ({"host": "a,b,c"}, 3),
        ({"hostaddr": "10.0.0.1,10.0.0.2"}, 2),
        ({"host": "a,b", "target_session_attrs": "prefer-standby"}, 4),
        ({"host": "a", "target_session_attrs": "prefer-standby"}, 1),
    ],
)
def test_how_many_servers_are_tried(parameters: dict[str, str], expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """libpq looks for a standby among all first, with prefer-standby."""
    monkeypatch.delenv("PGHOST", raising=False)
    assert attempts(parameters) == expected


@pytest.mark.parametrize("given", ["30", "0", None])
@pytest.mark.parametrize("driver", DRIVERS)
def test_silent_servers_take_no_longer_than_the_deadline(
    shop: Shop, database: Database, proxy_to: Any, driver: str, given: str | None
) -> None:
    """Two servers that accept and never answer share what the task has left, whatever was given."""
    proxies = [proxy_to(database), proxy_to(database)]
    for proxy in proxies:
        proxy.blackhole()
    hosts = "&".join(f"host=127.0.0.1:{proxy.port}" for proxy in proxies)
    shop.add_database(
        f"postgresql+{driver}://{database.user}:{database.password}@/{database.name}?{hosts}",
        connect_args={"connect_timeout": given},
        on_open=lambda engine: event.listen(engine, "do_connect", connects),
    )
    passed: list[Any] = []

    def connects(dialect: object, record: object, arguments: object, parameters: dict[str, Any]) -> None:
        passed.append(parameters["connect_timeout"])

    @shop.task(soft_time_limit=5, replay=False)
    def body(self: Any) -> None:
        self.db.connect()

    begun = time.monotonic()
    with pytest.raises(sqlalchemy.exc.OperationalError, match=r"(?i)timeout"):
        body.apply().get()
    assert 3.5 < time.monotonic() - begun < 15
    assert passed == [2]


@pytest.mark.parametrize(
    ("url", "options", "message"),
    [
        ("?connect_timeout=soon", {}, r"connect_timeout is 'soon'; libpq takes a whole number of seconds"),
        ("?connect_timeout=3&connect_timeout=4", {}, r"connect_timeout has several values"),
        ("?keepalives=yes", {}, r"keepalives is 'yes'"),
        ("", {"connect_args": {"keepalives": True}}, r"keepalives is True"),
        ("", {"connect_args": {"tcp_user_timeout": 2**31}}, r"tcp_user_timeout is 2147483648.* of milliseconds"),
        ("", {"connect_args": {"connect_timeout": [3]}}, r"connect_timeout has several values"),
        ("", {"connect_args": {"host": ["a", "b"]}}, r"host has several values.*host=a,b and port=1,2"),
        ("", {"connect_args": {"port": "70000"}}, r"port is '70000'; wanted: 1 to 65535"),
        ("", {"connect_args": {"port": "x"}}, r"port is 'x'"),
        ("", {"connect_args": 1}, r"connect_args is a value of the type int; wanted: a dict"),
        ("?host=a,b&port=1,2,3", {}, r"3 values of port for 2 of host"),
        ("?host=a,b&hostaddr=10.0.0.1", {}, r"2 values of host and 1 of hostaddr"),
        ("?host=a:1,b:2", {}, r"host is 'a:1,b:2'; wanted: host=a,b&port=1,2"),
        ("?host=a:1&host=b:2&port=3", {}, r"the URL's query: Can't mix"),
        ("?host=[::1]:5&host=b:2", {}, r"the URL's query: .*wanted: host=a,b&port=1,2"),
        ("?target_session_attrs=readwrite", {}, r"target_session_attrs is 'readwrite'; .*one of any, read-write"),
        ("?sslmode=on", {}, r"sslmode is 'on'; libpq takes one of disable"),
    ],
)
@pytest.mark.parametrize("driver", DRIVERS)
def test_nonsense_is_refused_at_declaration(driver: str, url: str, options: dict[str, Any], message: str) -> None:
    """With the name, the value and the remedy; the password is not in it."""
    with pytest.raises(ConfigurationError, match=message) as caught:
        SQLAlchemyEngine(f"postgresql+{driver}://app:secret@/shop{url}", **options)
    assert "secret" not in str(caught.value)


def test_what_is_no_text_is_refused_in_a_url() -> None:
    """psycopg 3 would compare the text with a number, in the task."""
    with pytest.raises(ConfigurationError, match=r"prepare_threshold is in the URL's query.*connect_args=\{'prepare"):
        SQLAlchemyEngine("postgresql+psycopg://app@db/shop?prepare_threshold=0")


@pytest.mark.parametrize("driver", ["pymysql", "mysqldb"])
def test_timeouts_of_mysql_are_numbers(driver: str) -> None:
    """In the URL SQLAlchemy makes them so."""
    url = f"mysql+{driver}://app@db/shop"
    SQLAlchemyEngine(f"{url}?connect_timeout=3&read_timeout=4", connect_args={"write_timeout": 2.5})
    with pytest.raises(ConfigurationError, match=r"connect_args: read_timeout is '3'; wanted: a number of seconds"):
        SQLAlchemyEngine(url, connect_args={"read_timeout": "3"})
    with pytest.raises(ConfigurationError, match="the URL's query"):
        SQLAlchemyEngine(f"{url}?connect_timeout=soon")


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize(
    "options",
    [
        {"connect_timeout": "soon"},
        {"connect_timeout": True},
        {"connect_timeout": ""},
        {"keepalives": "yes"},
        {"keepalives_idle": 2**31},
        {"tcp_user_timeout": "1.5"},
        {"port": "70000"},
        {"target_session_attrs": "readwrite"},
        {"load_balance_hosts": "yes"},
        {"sslmode": "on"},
        {"host": "127.0.0.1,127.0.0.1", "port": "1,2,3"},
        {"host": "127.0.0.1,127.0.0.1", "hostaddr": "127.0.0.1"},
    ],
    ids=str,
)
def test_the_driver_refuses_it_too(database: Database, driver: str, options: dict[str, Any]) -> None:
    """Nothing is refused that would have worked."""
    module = MODULES[driver]
    where = {"host": database.host, "port": database.port, "user": database.user, "dbname": database.name}
    with pytest.raises(module.Error):
        module.connect(**{**where, "password": database.password, **options}).close()
    with pytest.raises(ConfigurationError):
        SQLAlchemyEngine(database.url(driver), connect_args=options)


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize(
    "options",
    [
        {"connect_timeout": " 3 "},
        {"connect_timeout": "+3"},
        {"connect_timeout": 0},
        {"connect_timeout": "-1"},
        {"connect_timeout": None},
        {"application_name": None},
        {"keepalives": "0"},
        {"sslmode": "prefer", "target_session_attrs": "any", "load_balance_hosts": "random"},
        {"host": "127.0.0.1,", "hostaddr": "127.0.0.1,127.0.0.1"},
    ],
    ids=str,
)
def test_what_the_driver_takes_works(shop: Shop, database: Database, driver: str, options: dict[str, Any]) -> None:
    """As it is, with a deadline or without."""
    shop.add_database(database.url(driver), connect_args=options)
    for limit in LIMITS.values():
        in_task(shop, limit)
        shop.engine.get().dispose()


def test_psycopg_rounds_fractions(shop: Shop, database: Database) -> None:
    """libpq alone would refuse them."""
    shop.add_database(database.url("psycopg"), connect_args={"connect_timeout": 3.5})
    in_task(shop, {"soft_time_limit": 30})
    with pytest.raises(ConfigurationError, match=r"connect_timeout is 3\.5"):
        SQLAlchemyEngine(database.url("psycopg2"), connect_args={"connect_timeout": 3.5})


@pytest.mark.parametrize("option", ["creator", "pool"])
def test_credentials_that_nobody_would_ask_for(option: str) -> None:
    """Who opens the connections passes the password."""
    given: Any = {"creator": object, "pool": QueuePool(object)}[option]
    with pytest.raises(ConfigurationError, match=f"with {option}=.*credentials= would never be called"):
        SQLAlchemyEngine("postgresql+psycopg2://", credentials=lambda: ("a", "b"), **{option: given})


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.lines: list[tuple[int, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append((record.levelno, record.getMessage()))


@pytest.fixture
def lines() -> Iterator[list[tuple[int, str]]]:
    log, handler = logging.getLogger("workerpools"), Lines()
    before = log.level
    log.addHandler(handler)
    log.setLevel(logging.DEBUG)
    yield handler.lines
    log.removeHandler(handler)
    log.setLevel(before)


@pytest.mark.parametrize("takes", ["nothing", "record", "optional record"])
@pytest.mark.parametrize("driver", DRIVERS)
def test_creator(database: Database, driver: str, takes: str, lines: list[tuple[int, str]]) -> None:
    """It is called as SQLAlchemy calls it; what it drops is said, and the time that it takes is counted."""
    connect = MODULES[driver].connect
    records: list[object] = []

    def plain() -> Any:
        time.sleep(0.2)
        return connect(database.dsn)

    def recording(record: Any) -> Any:
        records.append(record.info)
        return plain()

    def optional(connection_record: Any = None) -> Any:
        return recording(connection_record)

    creator = {"nothing": plain, "record": recording, "optional record": optional}[takes]
    with WorkerPools() as pools:
        declared = SQLAlchemyEngine(URL.create(f"postgresql+{driver}"), creator=creator, connect_args={"port": 1})
        resource = pools.add(declared, name="db")
        with resource.get().connect() as connection:
            assert connection.scalar(text("select 1")) == 1
            assert backends(database.dsn, "workerpools %") == []
        assert len(records) == (takes != "nothing")
        assert pools.stats().totals()[0].histogram("create_time").sum >= 0.2
    said = [(level, line) for level, line in lines if "creator=" in line]
    assert [level for level, _ in said] == [logging.WARNING, logging.DEBUG]
    assert re.search(r"'db'.*connect_args= has no effect", said[0][1])
    assert re.search(r"without .*connect_timeout.*application_name.*keepalives", said[1][1])
