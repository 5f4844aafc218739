"""Fixtures of the whole suite: real servers, one of each a session, and what a single test gets of them."""

from __future__ import annotations

import gc
import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from typing import Any

import pytest

from demo_tasks.servers import PostgresServer, ValkeyServer, Workspace
from demo_tasks.servers.binaries import postgres_directory, valkey_program
from tests.support.databases import Database, HasAddress, hash_passwords_once, new_database
from tests.support.inspect import INHERITED, socket_inodes
from tests.support.leftovers import nothing_left_behind
from tests.support.mariadb import DRIVERS, MariaDatabase, MariaDBServer, mariadb_program
from tests.support.memcached import MemcachedServer, memcached_program
from tests.support.paths import memory
from tests.support.pgbouncer import PgBouncer, pgbouncer_program
from tests.support.program import close_server
from tests.support.proxy import TcpProxy
from tests.support.services import require_program
from tests.support.shop import Shop
from tests.support.stand import Stand, stand_among
from tests.support.tls import TlsProxy
from tests.support.upstream import EchoUpstream

#: The folders of the clients' tests.
CLIENTS = {"httpx", "redis", "requests", "sqlalchemy"}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cuts", type=int, default=100, help="how many random cuts the soak makes (100)")
    parser.addoption("--struck", type=int, default=60, help="how many async bodies are struck by a limit (60)")
    parser.addoption("--tasks", type=int, default=400, help="how many tasks the soak of one child runs (400)")


def pytest_configure() -> None:
    """Note the sockets that this run was started with, before xdist starts its processes."""
    if INHERITED not in os.environ:
        os.environ[INHERITED] = " ".join(map(str, socket_inodes()))


def pytest_collection_finish() -> None:
    """Keep the collected tests from the garbage collector: forked children would walk, and so copy, all of them."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def little_to_collect() -> None:
    """The garbage collector looks at what the test makes, and not at a whole process full of modules."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _no_leaks(request: pytest.FixtureRequest) -> None:
    """No test of a client leaves a connection in use."""
    if request.path.parent.name in CLIENTS:
        request.getfixturevalue("no_pool_leaks")


@pytest.fixture(scope="session", autouse=True)
def _clean_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Fail the session when it leaves a process or a temporary directory behind."""
    # pytest's own directory is chosen, and kept after the session, before ours replaces the default.
    tmp_path_factory.getbasetemp()
    # In a workspace, so that the next session sweeps it when this one is killed.
    with Workspace() as outer:
        root = outer.path / "tmp"
        root.mkdir()
        # As /tmp is: servers run as another user when the tests run as root.
        root.chmod(0o1777)
        with nothing_left_behind(root):
            yield
            close_server()


@pytest.fixture(scope="session")
def workspace(_clean_session: None) -> Iterator[Workspace]:
    """The directory of this session's servers."""
    with Workspace(memory()) as opened:
        yield opened


@pytest.fixture(scope="session")
def postgres_server(workspace: Workspace) -> Iterator[PostgresServer]:
    """A PostgreSQL server for the session. A test that stops or restarts it leaves it running."""
    require_program(postgres_directory)
    # No test pulls the plug of the machine: the disk need not keep up.
    settings = {"fsync": "off", "max_connections": "200", "max_prepared_transactions": "20", "max_wal_size": "128MB"}
    with PostgresServer(workspace, settings=settings) as server:
        hash_passwords_once(server)
        yield server


@pytest.fixture
def database(postgres_server: PostgresServer) -> Iterator[Database]:
    """A new, empty database, dropped with whatever is still connected to it."""
    with new_database(postgres_server) as made:
        yield made


@pytest.fixture(scope="session")
def mariadb_server(workspace: Workspace) -> Iterator[MariaDBServer]:
    """A MariaDB server for the session. A test that stops it leaves it running."""
    require_program(mariadb_program)
    with MariaDBServer(workspace) as server:
        yield server


@pytest.fixture
def maria_database(mariadb_server: MariaDBServer) -> Iterator[MariaDatabase]:
    """A new, empty database on MariaDB, dropped with whatever is still connected to it."""
    with mariadb_server.new_database() as made:
        yield made


@pytest.fixture(scope="session")
def valkey_server(workspace: Workspace) -> Iterator[ValkeyServer]:
    """A Valkey (or Redis) server for the session. A test that stops it leaves it running."""
    require_program(valkey_program)
    with ValkeyServer(workspace) as server:
        yield server


@pytest.fixture(scope="session")
def memcached(workspace: Workspace) -> Iterator[MemcachedServer]:
    """A memcached for the session."""
    require_program(memcached_program)
    with MemcachedServer(workspace) as server:
        yield server


@pytest.fixture(scope="session")
def _broker_numbers() -> Iterator[int]:
    # Database 0 is left to tests that use the server directly.
    return itertools.cycle(range(1, 14))


@pytest.fixture(scope="session")
def _shared_numbers() -> Iterator[int]:
    # Of a module's own, which many tests see: none of them is given it as well.
    return itertools.cycle((14, 15))


@pytest.fixture
def broker_url(valkey_server: ValkeyServer, _broker_numbers: Iterator[int]) -> str:
    """An empty broker and result store: another Valkey database than that of the twelve tests before."""
    import redis

    url = valkey_server.start().url(next(_broker_numbers))
    with closing(redis.Redis.from_url(url)) as client:
        client.flushdb()
    return url


@pytest.fixture
def echo() -> Iterator[EchoUpstream]:
    """An HTTP server in a process of its own."""
    with EchoUpstream() as server:
        yield server


@pytest.fixture
def tls_echo(echo: EchoUpstream) -> Iterator[TlsProxy]:
    """The same server behind TLS."""
    with TlsProxy(echo.host, echo.port) as proxy:
        yield proxy


@pytest.fixture
def proxy_to() -> Iterator[Callable[[HasAddress], TcpProxy]]:
    """Make a TCP proxy before a server, or before another proxy; closed at the end of the test."""
    with ExitStack() as opened:
        yield lambda server: opened.enter_context(TcpProxy(server.host, server.port))


@pytest.fixture
def pgbouncer_to() -> Iterator[Callable[..., PgBouncer]]:
    """Start a PgBouncer before a database, with the options of `PgBouncer`; stopped at the end of the test."""
    require_program(pgbouncer_program)
    with ExitStack() as opened:
        # Of the test's own: its files are removed with it.
        workspace = opened.enter_context(Workspace())
        numbers = itertools.count(1)

        def start(database: Database, **options: Any) -> PgBouncer:
            return opened.enter_context(PgBouncer(workspace, database, name=f"pgbouncer-{next(numbers)}", **options))

        yield start


@pytest.fixture(params=["psycopg2", "psycopg"])
def shop(request: pytest.FixtureRequest, database: Database, proxy_to: Any) -> Iterator[Shop]:
    """An app whose database is reached through a proxy, with each driver."""
    with closing(Shop(database, request.param, proxy=proxy_to(database))) as made:
        yield made


@pytest.fixture(params=DRIVERS)
def maria_shop(request: pytest.FixtureRequest, maria_database: MariaDatabase, proxy_to: Any) -> Iterator[Shop]:
    """The same on MariaDB."""
    with closing(Shop(maria_database, request.param, proxy=proxy_to(maria_database))) as made:
        yield made


@pytest.fixture
def stand(
    postgres_server: PostgresServer,
    valkey_server: ValkeyServer,
    _broker_numbers: Iterator[int],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Stand]:
    """Servers for one test's workers."""
    url = valkey_server.start().url(next(_broker_numbers))
    with stand_among(postgres_server, url, tmp_path_factory.mktemp("stand"), "stand") as made:
        yield made


@pytest.fixture(scope="module")
def shared(
    postgres_server: PostgresServer,
    valkey_server: ValkeyServer,
    _shared_numbers: Iterator[int],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Stand]:
    """Servers for the workers of a module, whose tests do not disturb each other."""
    url = valkey_server.start().url(next(_shared_numbers))
    with stand_among(postgres_server, url, tmp_path_factory.mktemp("stand"), "shared") as made:
        yield made
