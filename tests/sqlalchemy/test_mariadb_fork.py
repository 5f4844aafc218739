"""PyMySQL tells nobody its socket, which stays with the parent all the same."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy
from sqlalchemy import text

from tests.sqlalchemy.fork_cases import STATES, collect_garbage, make_table, rows
from tests.support.forking import fork_in_script, start_child, wait_for_child
from tests.support.inspect import socket_inodes
from tests.support.mariadb import DRIVERS, MariaDatabase
from workerpools import Resource, WorkerPools
from workerpools.sqlalchemy import SQLAlchemyEngine

# Children collect garbage several times.
pytestmark = pytest.mark.usefixtures("little_to_collect")

# What the last of them asks for, PostgreSQL alone has.
HELD = [name for name in STATES if name != "closing"]


@pytest.fixture(params=DRIVERS)
def engine(request: pytest.FixtureRequest, maria_database: MariaDatabase) -> Iterator[Resource[sqlalchemy.Engine]]:
    pools = WorkerPools()
    resource = pools.add(SQLAlchemyEngine(maria_database.url(request.param)), name="db")
    make_table(resource.get())
    yield resource
    pools.close()


@pytest.mark.parametrize("state", HELD)
def test_children_share_no_socket_and_the_parent_goes_on(engine: Resource[sqlalchemy.Engine], state: str) -> None:
    """Each child gets a session of its own; none holds a socket of the parent's; the parent's work commits."""
    engine.get().dispose()
    foreign = socket_inodes()

    def use() -> tuple[int, set[int]]:
        collect_garbage()
        with engine.get().begin() as connection:
            session = int(connection.execute(text("select connection_id()")).scalar_one())
            held = socket_inodes()
        engine.get().dispose()
        collect_garbage()
        return session, held

    with STATES[state](engine.get()):
        children = [start_child(use) for _ in range(2)]
        answers = [wait_for_child(child, 60.0) for child in children]
        own = socket_inodes() - foreign
        assert own
        for _, held in answers:
            assert not held & own
        assert len({session for session, _ in answers}) == 2


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_child_that_ends_like_any_program_says_nothing(maria_database: MariaDatabase, driver: str) -> None:
    """A child that leaves by sys.exit, with finalizers and atexit, does not end the parent's transaction."""
    os.environ["TEST_FORK_URL"] = maria_database.url(driver)
    try:
        done = fork_in_script(open_transaction, leave_normally, commit_transaction, timeout=60.0)
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
