"""Whose answer about a lost COMMIT is believed, and what it means with synchronous replication."""

from __future__ import annotations

import itertools
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import psycopg2
import pytest
from sqlalchemy import text
from sqlalchemy.exc import OperationalError

from demo_tasks.servers import PostgresServer, Workspace
from demo_tasks.servers.binaries import postgres_directory
from tests.servers.helpers import eventually
from tests.support.copies import CopiedServer
from tests.support.databases import Database, maintenance
from tests.support.errands import Errands
from tests.support.services import require_program
from tests.support.shop import Shop, insert
from workerpools import FailureKind, classify
from workerpools.events import EventKind
from workerpools.sqlalchemy._connection import History
from workerpools.sqlalchemy._resolving import Noted, Origin, origin

_NUMBERS = itertools.count(1)


@pytest.fixture(scope="module")
def servers() -> Iterator[ExitStack]:
    """The servers to stop at the end of this file's tests."""
    require_program(postgres_directory)
    with ExitStack() as opened:
        yield opened


@pytest.fixture(scope="module")
def server(workspace: Workspace, servers: ExitStack) -> Callable[..., PostgresServer]:
    """Start a server with settings."""

    def start(**settings: str) -> PostgresServer:
        settings = {"fsync": "off", **settings}
        return servers.enter_context(PostgresServer(workspace, settings=settings, name=f"postgres-{next(_NUMBERS)}"))

    return start


@pytest.fixture(scope="module")
def original(server: Callable[..., PostgresServer]) -> PostgresServer:
    """The server that gives the ids."""
    return server()


@pytest.fixture
def first_database(original: PostgresServer) -> Iterator[Database]:
    """The database that its copies have, too."""
    yield maintenance(original)
    maintenance(original).execute("drop table orders")


@pytest.fixture(params=["psycopg2", "psycopg"])
def shop_on(request: pytest.FixtureRequest, proxy_to: Any) -> Iterator[Callable[..., Shop]]:
    """Make an app whose database is reached through a proxy."""
    with ExitStack() as opened:

        def make(database: Database, **options: Any) -> Shop:
            shop = opened.enter_context(closing(Shop(database, request.param, proxy=proxy_to(database))))
            shop.engine, shop.base = shop.another(**options)
            return shop

        yield make


def resolved(shop: Shop) -> list[str]:
    return [event.detail for event in shop.events if event.kind is EventKind.COMMIT_RESOLVED]


def lost_commit(
    shop: Shop, body: Callable[[Any], None] | None = None, errands: Errands | None = None
) -> tuple[int, OperationalError | None]:
    """Run a task that inserts a row; return how often, and its error."""
    runs: list[int] = []

    @shop.task()
    def task(self: Any) -> None:
        runs.append(1)
        if body is not None:
            body(self)
        insert(self.session, 1)

    try:
        (errands or Errands()).run(task)
    except OperationalError as error:
        return len(runs), error
    return len(runs), None


def is_indeterminate(error: OperationalError | None) -> bool:
    assert error is not None
    failure = classify(error)
    assert failure is not None
    assert any("pg_xact_status('" in note for note in error.__notes__)
    return failure.kind is FailureKind.INDETERMINATE


def give_away_ids(server: PostgresServer, beyond: int, *, commit: bool) -> None:
    """Let each id up to `beyond`, and some after it, be that of a transaction of this server."""
    with closing(psycopg2.connect(server.dsn)) as connection, connection.cursor() as cursor:
        given = 0
        while given < beyond + 50:
            cursor.execute("select pg_current_xact_id()::text::bigint")
            ((given,),) = cursor.fetchall()
            connection.commit() if commit else connection.rollback()


def written(server: PostgresServer) -> int:
    return int(str(maintenance(server).execute("select (pg_current_wal_flush_lsn() - '0/0'::pg_lsn)::bigint")[0][0]))


def next_id(server: PostgresServer) -> int:
    found = maintenance(server).execute("select pg_snapshot_xmax(pg_current_snapshot())::text::bigint")
    return int(str(found[0][0]))


@pytest.fixture(scope="module")
def another_cluster(server: Callable[..., PostgresServer]) -> PostgresServer:
    return server()


@pytest.fixture(scope="module")
def promoted(original: PostgresServer, servers: ExitStack) -> PostgresServer:
    original.stop()
    copy = CopiedServer(original, standby=True).copy()
    original.start()
    maintenance(servers.enter_context(copy)).execute("select pg_promote()")
    return copy


@pytest.fixture(scope="module")
def cold_copy(original: PostgresServer, servers: ExitStack) -> PostgresServer:
    original.stop()
    copy = CopiedServer(original).copy()
    original.start()
    return servers.enter_context(copy)


@pytest.fixture(scope="module")
def snapshot(original: PostgresServer, servers: ExitStack) -> PostgresServer:
    maintenance(original).execute("checkpoint")
    return servers.enter_context(CopiedServer(original).copy())


#: A COMMIT that the server never got must not be a success, one that it got must not be done again.
DELIVERED = pytest.mark.parametrize("deliver", [False, True], ids=["server never got it", "server got it"])


@DELIVERED
@pytest.mark.parametrize(
    ("other", "restarted"),
    [
        ("another_cluster", False),
        ("another_cluster", True),
        ("promoted", False),
        ("promoted", True),
        ("cold_copy", False),
        ("snapshot", False),
        ("snapshot", True),
    ],
)
def test_another_server_is_not_believed(
    request: pytest.FixtureRequest,
    first_database: Database,
    original: PostgresServer,
    shop_on: Any,
    deliver: bool,
    other: str,
    restarted: bool,
) -> None:
    """It has a transaction of its own with this id, whatever it has of the original one's rows by other means."""
    copy: PostgresServer = request.getfixturevalue(other)
    shop = shop_on(first_database, resolve_timeout=10.0)
    give_away_ids(copy, next_id(original), commit=not deliver)
    # It has written more, too.
    while written(copy) <= written(original):
        maintenance(copy).execute("select pg_logical_emit_message(false, '', ''::text), pg_switch_wal()")

    errands = Errands()

    def cuts_over(chunk: bytes) -> bool:
        if b"COMMIT" not in chunk:
            return False
        if restarted:
            errands.ask(lambda: copy.restart("fast"))
        shop.proxy.lead_to(copy)
        return True

    cut = shop.proxy.cut_when(cuts_over, deliver=deliver)
    runs, error = lost_commit(shop, errands=errands)
    assert cut.fired == 1
    assert (runs, is_indeterminate(error), resolved(shop)) == (1, True, [])


@DELIVERED
def test_a_backup_that_is_started_later_is_not_believed(
    first_database: Database,
    original: PostgresServer,
    cold_copy: PostgresServer,
    shop_on: Any,
    deliver: bool,
) -> None:
    """A copy of the stopped server, restored without recovery: only what it has written tells it from the server."""
    cold_copy.stop()
    original.start()
    while written(original) <= written(cold_copy.start()):
        maintenance(original).execute("select pg_logical_emit_message(false, '', ''::text), pg_switch_wal()")
    cold_copy.stop()
    shop = shop_on(first_database, resolve_timeout=10.0)
    beyond = next_id(original)

    errands = Errands()

    def restores(chunk: bytes) -> bool:
        if b"COMMIT" not in chunk:
            return False
        errands.ask(cold_copy.start)
        give_away_ids(cold_copy, beyond, commit=not deliver)
        shop.proxy.lead_to(cold_copy)
        return True

    shop.proxy.cut_when(restores, deliver=deliver)
    runs, error = lost_commit(shop, errands=errands)
    assert (runs, is_indeterminate(error), resolved(shop)) == (1, True, [])


@pytest.fixture
def clerk(database: Database) -> Database:
    """The database for an ordinary role."""
    name = f"clerk{next(_NUMBERS)}_{database.name[-12:]}"
    database.execute(f"create role {name} login password 'secret'")
    database.execute(f"grant create on schema public to {name}")
    return Database(database.host, database.port, database.name, name, "secret")


@DELIVERED
def test_an_ordinary_role_may_ask(clerk: Database, shop_on: Any, deliver: bool) -> None:
    """Every function that is needed is everyone's."""
    shop = shop_on(clerk)
    shop.proxy.cut_when(lambda chunk: b"COMMIT" in chunk, deliver=deliver)
    assert lost_commit(shop) == ((1, None) if deliver else (2, None))
    assert shop.rows() == [1]


@DELIVERED
def test_a_server_that_hides_its_identity_is_not_asked(
    clerk: Database, database: Database, shop_on: Any, deliver: bool
) -> None:
    """Without the system identifier a lost COMMIT stays unknown."""
    database.execute("revoke execute on function pg_control_system() from public")
    shop = shop_on(clerk)
    shop.proxy.cut_when(lambda chunk: b"COMMIT" in chunk, deliver=deliver)
    runs, error = lost_commit(shop)
    assert error is not None
    failure = classify(error)
    assert failure is not None
    assert (runs, failure.kind, resolved(shop)) == (1, FailureKind.INDETERMINATE, [])
    assert shop.rows() == ([1] if deliver else [])


HISTORY = History("7000000000000000000", "00000001", "1000.0", "500.0", 5_000)


@pytest.mark.parametrize(
    ("changes", "uptime", "life", "expected"),
    [
        ({}, 600.0, 900.0, Origin.SAME),
        ({"identifier": "7000000000000000001"}, 600.0, 900.0, Origin.FOREIGN),
        ({"identifier": ""}, 600.0, 900.0, Origin.FOREIGN),
        ({"timeline": "00000002"}, 600.0, 900.0, Origin.FOREIGN),
        ({"timeline": "", "lsn": 0}, 600.0, 900.0, Origin.STANDBY),
        ({"timeline": "", "identifier": "7000000000000000001"}, 600.0, 900.0, Origin.FOREIGN),
        ({"life": "1640.0"}, 600.0, 2.0, Origin.CRASHED),
        ({"life": None}, 600.0, None, Origin.CRASHED),
        ({"life": "1300.0"}, 600.0, 300.0, Origin.SAME),
        ({"start": "1640.0"}, 2.0, 900.0, Origin.RESTARTED),
        ({"start": "1640.0"}, 20.0, 900.0, Origin.FOREIGN),
        ({"start": "1640.0", "lsn": 4_999}, 2.0, 900.0, Origin.FOREIGN),
        ({"start": "1640.0", "life": "1640.0"}, 2.0, 2.0, Origin.CRASHED),
        ({"start": "1640.0", "life": "1300.0"}, 2.0, 300.0, Origin.FOREIGN),
    ],
)
def test_the_origin_of_an_answer(changes: dict[str, Any], uptime: float, life: float | None, expected: Origin) -> None:
    """Ten seconds after the id was given."""
    transaction = Noted("800", 4711, HISTORY)
    now = HISTORY._replace(**changes)
    assert origin(transaction, now, uptime=uptime, life=life, elapsed=10.0) is expected


# Synchronous replication.


def waiting(server: PostgresServer) -> list[int]:
    """Return the sessions that wait for a standby."""
    found = maintenance(server).execute("select pid from pg_stat_activity where wait_event = 'SyncRep'")
    return [int(str(pid)) for (pid,) in found]


def visible(server: PostgresServer) -> int:
    return int(str(maintenance(server).execute("select count(*) from orders")[0][0]))


def replicated(self: Any) -> None:
    self.session.execute(text("set local synchronous_commit = on"))


@pytest.fixture(scope="module")
def synchronous_server(server: Callable[..., PostgresServer]) -> PostgresServer:
    return server(synchronous_commit="local")


@pytest.fixture
def synchronous(synchronous_server: PostgresServer) -> Iterator[PostgresServer]:
    """A server whose standby is not there; only transactions that say so wait for it."""
    made = synchronous_server
    made.start()
    standbys(made, "nobody")
    yield made
    standbys(made, "")
    sessions = "from pg_stat_activity where pid <> pg_backend_pid() and backend_type = 'client backend'"
    maintenance(made).execute(f"select pg_terminate_backend(pid, 10000) {sessions}")
    maintenance(made).execute("drop table orders")
    maintenance(made).execute("drop function if exists nap")


def standbys(server: PostgresServer, names: str) -> None:
    maintenance(server).execute(f"alter system set synchronous_standby_names = '{names}'")
    maintenance(server).execute("select pg_reload_conf()")
    shown = "select setting from pg_settings where name = 'synchronous_standby_names'"
    assert eventually(lambda: maintenance(server).execute(shown) == [(names,)], 10.0)


def test_a_wait_for_a_standby_is_not_ended(synchronous: PostgresServer, shop_on: Any) -> None:
    """Nobody but the standby can end it: the outcome is unknown, and the row invisible as long as it lasts."""
    shop = shop_on(maintenance(synchronous), resolve_timeout=3.0)
    shop.proxy.cut_when(lambda chunk: b"COMMIT" in chunk, deliver=True, reply_wait=0.1)
    runs, error = lost_commit(shop, replicated)
    assert (runs, is_indeterminate(error), resolved(shop)) == (1, True, [])
    assert len(waiting(synchronous)) == 1
    assert visible(synchronous) == 0


def test_a_wait_that_ends_in_time_is_a_success(synchronous: PostgresServer, shop_on: Any) -> None:
    """The server has let the transaction go itself."""
    shop = shop_on(maintenance(synchronous), resolve_timeout=20.0)

    def lets_go() -> None:
        assert eventually(lambda: bool(waiting(synchronous)), 10.0)
        # Longer than a session that only commits slowly is left alone.
        time.sleep(2.0)
        standbys(synchronous, "")

    thread = threading.Thread(target=lets_go)
    shop.proxy.cut_when(lambda chunk: b"COMMIT" in chunk, deliver=True, reply_wait=0.1)
    thread.start()
    assert lost_commit(shop, replicated) == (1, None)
    thread.join()
    assert resolved(shop) == ["outcome=committed"]
    assert visible(synchronous) == 1


@pytest.mark.parametrize("how", ["terminated", "shut down"])
def test_a_wait_that_others_ended_proves_nothing(synchronous: PostgresServer, shop_on: Any, how: str) -> None:
    """The server calls it committed, and no standby has it."""
    shop = shop_on(maintenance(synchronous), resolve_timeout=3.0)

    errands = Errands()

    def ends() -> None:
        assert eventually(lambda: bool(waiting(synchronous)), 10.0)
        if how == "terminated":
            maintenance(synchronous).execute("select pg_terminate_backend(%s)", waiting(synchronous)[0])
        else:
            errands.ask(lambda: synchronous.restart("fast"))

    thread = threading.Thread(target=ends)
    shop.proxy.cut_when(lambda chunk: b"COMMIT" in chunk, deliver=True, reply_wait=60.0)
    thread.start()
    runs, error = lost_commit(shop, replicated, errands)
    thread.join()
    assert visible(synchronous) == 1
    assert (runs, is_indeterminate(error), resolved(shop)) == (1, True, [])


def test_a_commit_that_the_standby_has_is_a_success(synchronous: PostgresServer, shop_on: Any, tmp_path: Path) -> None:
    """Only the acknowledgement was lost: a later COMMIT reaches the standby, so this one has."""
    program = postgres_directory() / "pg_receivewal"
    if not program.exists():
        pytest.skip("this PostgreSQL has no pg_receivewal")
    maintenance(synchronous).execute("select pg_create_physical_replication_slot('nobody')")
    where = f"{synchronous.dsn}?application_name=nobody"
    command = [program, "-D", tmp_path, "-d", where, "--slot=nobody", "--synchronous", "--no-loop"]
    with subprocess.Popen(command) as standby:
        try:
            there = "select count(*) from pg_stat_replication where sync_state = 'sync'"
            assert eventually(lambda: maintenance(synchronous).execute(there) == [(1,)], 20.0)
            shop = shop_on(maintenance(synchronous), resolve_timeout=20.0)
            shop.proxy.cut_when(lambda chunk: b"COMMIT" in chunk, deliver=True)
            assert lost_commit(shop, replicated) == (1, None)
            assert resolved(shop) == ["outcome=committed"]
        finally:
            standby.terminate()
            standby.wait(10)
            gone = "select count(*) from pg_stat_replication"
            assert eventually(lambda: maintenance(synchronous).execute(gone) == [(0,)], 10.0)
            maintenance(synchronous).execute("select pg_drop_replication_slot('nobody')")


def test_with_standbys_a_slow_commit_is_not_ended(synchronous: PostgresServer, shop_on: Any) -> None:
    """It may begin to wait for them at any moment."""
    body = "begin perform pg_sleep(60); return null; end"
    maintenance(synchronous).execute(f"create function nap() returns trigger language plpgsql as '{body}'")
    shop = shop_on(maintenance(synchronous), resolve_timeout=3.0)
    maintenance(synchronous).execute(
        "create constraint trigger nap after insert on orders deferrable initially deferred"
        " for each row execute function nap()"
    )
    shop.proxy.cut_when(lambda chunk: b"COMMIT" in chunk, deliver=True, reply_wait=0.1)
    runs, error = lost_commit(shop, replicated)
    assert (runs, is_indeterminate(error), resolved(shop)) == (1, True, [])
    sleeps = "select count(*) from pg_stat_activity where wait_event = 'PgSleep'"
    assert maintenance(synchronous).execute(sleeps) == [(1,)]


def test_with_standbys_a_session_that_does_not_commit_is_ended(synchronous: PostgresServer, shop_on: Any) -> None:
    """COMMIT never reached it: nobody waits for anything."""
    impatient = {"keepalives_idle": 1, "keepalives_interval": 1, "keepalives_count": 1, "tcp_user_timeout": 1000}
    shop = shop_on(maintenance(synchronous), resolve_timeout=20.0, connect_args=impatient)
    severed: list[int] = []

    def severs(chunk: bytes) -> bool:
        if b"INSERT 0 1" in chunk and not severed:
            severed.append(1)
            shop.proxy.sever()
        return False

    shop.proxy.cut_when(severs, "to_client")
    assert lost_commit(shop) == (2, None)
    assert resolved(shop) == ["outcome=aborted"]
    assert visible(synchronous) == 1
