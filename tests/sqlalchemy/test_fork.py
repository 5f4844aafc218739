"""An engine that was used in the parent is discarded in a forked child, whatever it was doing."""

from __future__ import annotations

import os
import threading
from typing import Any

import pytest
import sqlalchemy
from sqlalchemy import text

from tests.sqlalchemy.fork_cases import STATES, collect_garbage, make_table, rows
from tests.support.forking import fork_in_script, run_in_fork, start_child, wait_for_child
from tests.support.inspect import backends, socket_inodes, tcp_connections_to
from tests.support.tls import TlsProxy
from workerpools import Resource, WorkerPools
from workerpools.sqlalchemy import SQLAlchemyEngine

# Children collect garbage several times.
pytestmark = pytest.mark.usefixtures("little_to_collect")

DRIVERS = ("psycopg2", "psycopg")


@pytest.fixture(autouse=True)
def foreign() -> set[int]:
    """The sockets that other tests left in this process: they cross a fork as they like."""
    return socket_inodes()


@pytest.fixture(params=["plain", "tls"])
def url(request: pytest.FixtureRequest, database: Any, driver: str) -> Any:
    """A URL of the test's database, over TCP or over TLS."""
    plain = database.url(driver)
    if request.param == "plain":
        yield plain
        return
    parsed = sqlalchemy.make_url(plain)
    with TlsProxy(str(parsed.host), int(parsed.port or 0), postgres=True) as proxy:
        over_tls = parsed.set(host="127.0.0.1", port=proxy.port).update_query_dict(
            {"sslmode": "verify-full", "sslrootcert": str(proxy.ca_file)}
        )
        yield over_tls.render_as_string(hide_password=False)


@pytest.fixture(params=DRIVERS)
def driver(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def engine(url: str) -> Any:
    pools = WorkerPools()
    resource = pools.add(SQLAlchemyEngine(url), name="db")
    make_table(resource.get())
    yield resource
    pools.close()


def use(resource: Resource[sqlalchemy.Engine]) -> tuple[int, set[int]]:
    collect_garbage()
    with resource.get().begin() as connection:
        backend = int(connection.execute(text("select pg_backend_pid()")).scalar_one())
        held = socket_inodes()
    resource.get().dispose()
    collect_garbage()
    return backend, held


@pytest.mark.parametrize("state", STATES)
def test_children_share_no_socket_and_the_parent_goes_on(
    foreign: set[int], engine: Resource[sqlalchemy.Engine], state: str
) -> None:
    """Three children each get a backend of their own; none holds a socket of the parent; the parent's work commits."""
    before = engine.get()
    with STATES[state](before):
        children = [start_child(lambda: use(engine)) for _ in range(3)]
        answers = [wait_for_child(child) for child in children]
        own = socket_inodes()
        for _, held in answers:
            assert not held & (own - foreign)
        assert len({backend for backend, _ in answers}) == 3
    assert engine.get() is before


@pytest.mark.parametrize("state", STATES)
def test_a_child_that_does_nothing_says_nothing(engine: Resource[sqlalchemy.Engine], state: str) -> None:
    """The garbage collector in a child that never touches the engine reaches no server."""
    with STATES[state](engine.get()):
        run_in_fork(collect_garbage)
    assert rows(engine.get()) <= 1


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_child_that_ends_like_any_program_says_nothing(database: Any, driver: str) -> None:
    """A child that leaves by sys.exit, with finalizers and atexit, does not end the parent's transaction."""
    os.environ["TEST_FORK_URL"] = database.url(driver)
    try:
        done = fork_in_script(open_transaction, leave_normally, commit_transaction)
    finally:
        del os.environ["TEST_FORK_URL"]
    assert done == ("left", 1)


def open_transaction() -> Any:
    pools = WorkerPools()
    resource = pools.add(SQLAlchemyEngine(os.environ["TEST_FORK_URL"]), name="db")
    make_table(resource.get())
    connection = resource.get().connect()
    connection.execute(text("insert into kept values (1)"))
    return pools, resource, connection


def leave_normally(state: Any) -> str:
    return "left"


def commit_transaction(state: Any) -> int:
    _, resource, connection = state
    connection.commit()
    connection.close()
    return rows(resource.get())


@pytest.mark.parametrize("driver", DRIVERS)
def test_generations_of_children_leave_no_backend(foreign: set[int], database: Any, driver: str) -> None:
    """Children of children are protected as well, and every backend is gone when its process is."""
    pools = WorkerPools()
    resource = pools.add(SQLAlchemyEngine(database.url(driver)), name="generations")
    make_table(resource.get())

    def generation() -> set[int]:
        backend, held = use(resource)
        grandchild_backend, grandchild_held = run_in_fork(lambda: use(resource))
        assert backend != grandchild_backend
        assert not held & (grandchild_held - foreign)
        return {backend, grandchild_backend}

    assert len(run_in_fork(generation)) == 2
    pools.close()
    assert backends(database.dsn, "workerpools generations%") == []


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_connection_that_is_just_being_made_stays_with_the_parent(database: Any, driver: str, proxy_to: Any) -> None:
    """Another thread waits for the server's first answer at the moment of the fork; no object tells of its socket."""
    proxy = proxy_to(database)
    proxy.blackhole()
    with WorkerPools() as pools:
        resource = pools.add(SQLAlchemyEngine(database.through(proxy).url(driver), connect_timeout=20), name="db")
        outcome: list[object] = []
        thread = threading.Thread(target=lambda: outcome.append(resource.get().connect()))
        thread.start()
        proxy.wait_for(accepted=1)
        own = {connection.local_port for connection in tcp_connections_to(proxy.port, os.getpid())}
        inherited = run_in_fork(lambda: tcp_connections_to(proxy.port, os.getpid()))
        assert len(own) == 1
        assert inherited == []
        proxy.pass_through()
        thread.join()
        assert isinstance(outcome[0], sqlalchemy.Connection)
        outcome[0].close()
