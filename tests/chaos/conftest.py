"""Servers of these tests' own: they are restarted, and set read-only as a whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import sqlalchemy

from demo_tasks.servers import PostgresServer, Workspace
from demo_tasks.servers.binaries import postgres_directory
from tests.chaos.breaks import DatabaseSite
from tests.chaos.shop import ChaosShop
from tests.chaos.table import Cell
from tests.support.databases import Database, hash_passwords_once, new_database
from tests.support.faults import ordinary_role
from tests.support.pgbouncer import PgBouncer
from tests.support.proxy import TcpProxy
from tests.support.services import require_program
from tests.support.tls import TlsProxy
from tests.support.upstream import EchoUpstream


@pytest.fixture(scope="session")
def chaos_server(workspace: Workspace) -> Iterator[PostgresServer]:
    """A PostgreSQL server that nobody but these tests uses."""
    require_program(postgres_directory)
    settings = {
        # Nobody pulls the plug of the machine: what the server wrote outlives its own crash ...
        "fsync": "off",
        # ... and what no COMMIT made it write does not, however slow the test is.
        "wal_writer_delay": "10s",
    }
    with PostgresServer(workspace, settings=settings, name="chaos") as server:
        hash_passwords_once(server)
        yield server


@pytest.fixture
def chaos_database(chaos_server: PostgresServer) -> Iterator[Database]:
    """A new database on it, with what the tasks write to; dropped with whatever is still connected."""
    with new_database(chaos_server, "chaos") as made:
        # No key that would keep a row from being there twice.
        made.execute("CREATE TABLE orders (number int); CREATE TABLE stock (n int); INSERT INTO stock VALUES (0)")
        yield made


@pytest.fixture(scope="module")
def _upstream(_clean_session: None) -> Iterator[EchoUpstream]:
    with EchoUpstream() as server:
        yield server


@pytest.fixture(scope="module")
def _tls_upstream(_upstream: EchoUpstream) -> Iterator[TlsProxy]:
    with TlsProxy(_upstream.host, _upstream.port) as proxy:
        yield proxy


@pytest.fixture
def upstream(_upstream: EchoUpstream) -> EchoUpstream:
    """The module's HTTP server, with an empty log."""
    _upstream.clear()
    return _upstream


@pytest.fixture
def tls_upstream(_tls_upstream: TlsProxy) -> TlsProxy:
    """The same server behind TLS."""
    return _tls_upstream


#: Bounds that are short enough for a test: a connection whose packets vanish is given up after one or two seconds.
IMPATIENT = {
    "connect_timeout": 2,
    "keepalives_idle": 1,
    "keepalives_interval": 1,
    "keepalives_count": 1,
    "tcp_user_timeout": 1000,
}


@pytest.fixture
def database_site(
    chaos_server: PostgresServer,
    chaos_database: Database,
    cell: Cell,
    driver: str,
    proxy_to: Callable[[Any], TcpProxy],
    request: pytest.FixtureRequest,
) -> Iterator[DatabaseSite]:
    """An app as the cell declares it, whose connections go through a proxy."""
    with ExitStack() as opened:
        # As an application: what only a superuser may do is of no use to the library.
        role = opened.enter_context(ordinary_role(chaos_database))
        bouncer: PgBouncer | None = None
        if cell.pgbouncer:
            size = 1 if "pool full" in cell.breaks else 5
            # Only where it is wanted: the machine may have none.
            bouncer = request.getfixturevalue("pgbouncer_to")(role, default_pool_size=size, query_wait_timeout=1)
        proxy = proxy_to(bouncer or chaos_server)
        shop = ChaosShop()
        shop.add_database(**_options(cell, driver, role.through(proxy)))
        opened.callback(shop.close)
        made = DatabaseSite(shop, chaos_server, chaos_database, proxy, bouncer)
        opened.callback(made.heal)
        yield made


def _options(cell: Cell, driver: str, database: Database) -> dict[str, Any]:
    # However slow the machine is, an idle connection is trusted: what is to find it dead is the task.
    options: dict[str, Any] = {"connect_args": dict(IMPATIENT), "resolve_timeout": 5.0, "check_after": 600.0}
    if cell.pgbouncer and driver == "psycopg":
        options["connect_args"]["prepare_threshold"] = None
    if "resolve_commit=False" in cell.declared:
        options["resolve_commit"] = False
    if "resolve_timeout=0.5" in cell.declared:
        options["resolve_timeout"] = 0.5
    if "pool full" in cell.breaks and not cell.pgbouncer:
        options.update(pool_size=1, max_overflow=0, acquire_timeout=0.3)
    if "serialization failure" in cell.breaks:
        options["isolation_level"] = "REPEATABLE READ"
    url = sqlalchemy.make_url(database.url(driver))
    if "wrong password" in cell.breaks:
        url = url.set(password="wrong")
    return {"url": url, **options}
