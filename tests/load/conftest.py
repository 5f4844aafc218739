"""Fixtures of the tests that take whole servers away."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from demo_tasks.servers import PostgresServer, Workspace
from demo_tasks.servers.binaries import postgres_directory
from tests.support.databases import Database, maintenance
from tests.support.services import require_program


@pytest.fixture
def server() -> Iterator[PostgresServer]:
    """A database server of the test's own, to be crashed."""
    require_program(postgres_directory)
    # The machine does not crash, only the server: the disk need not keep up.
    with Workspace() as workspace, PostgresServer(workspace, settings={"fsync": "off"}) as started:
        yield started


@pytest.fixture
def own_database(server: PostgresServer) -> Database:
    """Its first database, reached without a proxy."""
    return maintenance(server)
