"""The server of the adapter of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from demo_tasks.servers import Workspace
from tests.support.memcached import MemcachedServer, memcached_program
from tests.support.services import require_program


@pytest.fixture(scope="session")
def memcached(workspace: Workspace) -> Iterator[MemcachedServer]:
    """A memcached for the session."""
    require_program(memcached_program)
    with MemcachedServer(workspace) as server:
        yield server
