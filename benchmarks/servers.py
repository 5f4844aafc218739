"""The servers of one run: PostgreSQL, Valkey, an HTTP server and a proxy that is as far away as it is told."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from urllib.parse import urlsplit

import redis

from demo_tasks.servers import PostgresServer, ValkeyServer, Workspace
from tests.support.paths import environment
from tests.support.upstream import EchoUpstream

__all__ = ["Servers", "distant", "running"]


@dataclass
class Servers:
    """What runs for the benchmarks of one call of `python -m benchmarks`.

    Attributes:
        postgres: With a table ``rows`` of a hundred numbers and a table ``entries`` to write to.
        valkey: Broker and result store.
        upstream: Answers `GET /echo/<token>`, in a process of its own.
    """

    postgres: PostgresServer
    valkey: ValkeyServer
    upstream: EchoUpstream

    @property
    def broker(self) -> str:
        """The broker's URL."""
        return self.valkey.url()

    @cached_property
    def redis(self) -> Any:
        """A client of the broker."""
        return redis.Redis.from_url(self.broker)

    def database(self, name: str = "postgres") -> str:
        """Return the SQLAlchemy URL of a database that has the tables; it is made if there is none."""
        if name != "postgres":
            self.postgres.create_database(name)
            self.execute(name, _TABLES)
        return self.postgres.url(database=name)

    def execute(self, database: str, statement: str) -> list[tuple[Any, ...]]:
        """Execute one statement over a connection of its own, and return the rows."""
        import psycopg2

        url = urlsplit(self.postgres.dsn)
        connection = psycopg2.connect(url._replace(path=f"/{database}").geturl(), connect_timeout=10)
        try:
            connection.autocommit = True
            with connection.cursor() as cursor:
                cursor.execute(statement)
                return [] if cursor.description is None else list(cursor.fetchall())
        finally:
            connection.close()


_TABLES = """
CREATE TABLE rows (number integer PRIMARY KEY, value integer);
INSERT INTO rows SELECT n, n * n FROM generate_series(0, 99) AS n;
CREATE TABLE entries (id bigserial PRIMARY KEY, number integer)
"""


@contextmanager
def running() -> Iterator[Servers]:
    """Start the servers; stop them at the end."""
    with (
        Workspace() as workspace,
        # Durability costs each side the same, and hides what they differ in.
        PostgresServer(workspace, settings={"synchronous_commit": "off", "max_connections": "250"}) as postgres,
        ValkeyServer(workspace) as valkey,
        EchoUpstream() as upstream,
    ):
        servers = Servers(postgres, valkey, upstream)
        servers.execute("postgres", _TABLES)
        yield servers


@contextmanager
def distant(host: str, port: int, seconds: float) -> Iterator[tuple[str, int]]:
    """Give a server's second address, ``seconds`` of round trip further away than the first.

    The proxy is a process of its own, so that its thread and the measured one do not share an interpreter.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.proxy", host, str(port), str(seconds)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment(),
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield "127.0.0.1", int(process.stdout.readline())
    finally:
        process.stdin.close()
        process.stdout.close()
        process.wait(10)
