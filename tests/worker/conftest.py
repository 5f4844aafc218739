"""Fixtures of the tests that run real workers."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from demo_tasks.servers import PostgresServer, ValkeyServer
from tests.support.stand import Stand, stand_among

# Numbers of Valkey databases: a module's own stand and a test's never have the same.
_numbers = itertools.cycle(range(1, 16))


@pytest.fixture(scope="module")
def shared(
    postgres_server: PostgresServer, valkey_server: ValkeyServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stand]:
    """Servers for a module, whose tests do not disturb each other."""
    url, folder = valkey_server.start().url(next(_numbers)), tmp_path_factory.mktemp("stand")
    with stand_among(postgres_server, url, folder, "shared") as made:
        yield made


@pytest.fixture
def stand(
    postgres_server: PostgresServer, valkey_server: ValkeyServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stand]:
    """Servers for one test."""
    url, folder = valkey_server.start().url(next(_numbers)), tmp_path_factory.mktemp("stand")
    with stand_among(postgres_server, url, folder, "stand") as made:
        yield made
