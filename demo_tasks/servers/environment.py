"""The demo's three servers, each from the environment where a URL is set there, else started here."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from demo_tasks.servers.external import ExternalDatabase, ExternalRedis, ExternalUpstream
from demo_tasks.servers.postgres import PostgresServer
from demo_tasks.servers.upstream import HttpUpstream
from demo_tasks.servers.valkey import ValkeyServer

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType

    from typing_extensions import Self

    from demo_tasks.servers.workspace import Workspace

#: How long the HTTP server keeps an idle connection, in seconds: longer than the clients do (4 s), so that only its
#: reload closes one that they would use again.
KEEPALIVE = 75


@dataclass(frozen=True)
class Servers:
    """The servers of one run; a context manager that starts all of them and stops them in reverse.

    Attributes:
        database: PostgreSQL.
        redis: Valkey or Redis.
        upstream: The HTTP server.
    """

    database: PostgresServer | ExternalDatabase
    redis: ValkeyServer | ExternalRedis
    upstream: HttpUpstream | ExternalUpstream

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start every server; when one fails, stop those that run.

        Raises:
            ServerError: A server cannot be found or does not start.
        """
        with ExitStack() as started:
            for server in (self.database, self.redis, self.upstream):
                started.callback(server.stop)
                server.start()
            started.pop_all()

    def stop(self) -> None:
        """Stop every server, the last one started first."""
        with ExitStack() as running:
            for server in (self.database, self.redis, self.upstream):
                running.callback(server.stop)


def from_environment(workspace: Workspace, environ: Mapping[str, str]) -> Servers:
    """Choose the servers of a run; nothing is started yet.

    Args:
        workspace: Where started servers keep their files.
        environ: The environment; DATABASE_URL, REDIS_URL and UPSTREAM_URL name servers that run already. An
            empty value counts as none.

    Returns:
        The three servers.

    Raises:
        ServerError: A URL is malformed.
    """
    database = environ.get("DATABASE_URL", "").strip()
    redis = environ.get("REDIS_URL", "").strip()
    upstream = environ.get("UPSTREAM_URL", "").strip()
    return Servers(
        database=ExternalDatabase(database) if database else PostgresServer(workspace),
        redis=ExternalRedis(redis) if redis else ValkeyServer(workspace),
        upstream=ExternalUpstream(upstream) if upstream else HttpUpstream(workspace, keepalive=KEEPALIVE),
    )
