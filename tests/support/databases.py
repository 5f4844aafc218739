"""A database of a test's own on a shared PostgreSQL server."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from typing import Protocol
from urllib.parse import quote

from demo_tasks.servers import PostgresServer


class HasAddress(Protocol):
    """Anything that listens: a server, a proxy."""

    @property
    def host(self) -> str: ...

    @property
    def port(self) -> int: ...


@dataclass(frozen=True)
class Database:
    """Where a database is and how to get in.

    Attributes:
        host: The server's address, or that of a proxy before it.
        port: The server's port, or that of a proxy before it.
        name: The database's name.
        user: The role to log in as.
        password: The role's password.
    """

    host: str
    port: int
    name: str
    user: str
    password: str = field(repr=False)

    @property
    def dsn(self) -> str:
        """The libpq URL, with the password."""
        return self._url("postgresql")

    def url(self, driver: str = "psycopg2") -> str:
        """Return the SQLAlchemy URL for a driver, with the password."""
        return self._url(f"postgresql+{driver}")

    def through(self, proxy: HasAddress) -> Database:
        """Return the same database as it is reached through a proxy."""
        return replace(self, host=proxy.host, port=proxy.port)

    def execute(self, statement: str, *parameters: object) -> list[tuple[object, ...]]:
        """Run one statement on a connection of its own, commit, and return the rows, if any."""
        import psycopg2

        with closing(psycopg2.connect(self.dsn, connect_timeout=10)) as connection:
            connection.autocommit = True
            with connection.cursor() as cursor:
                cursor.execute(statement, parameters or None)
                return list(cursor.fetchall()) if cursor.description is not None else []

    def _url(self, scheme: str) -> str:
        secret = quote(self.password, safe="")
        return f"{scheme}://{quote(self.user, safe='')}:{secret}@{self.host}:{self.port}/{self.name}"


def maintenance(server: PostgresServer) -> Database:
    """Return a server's first database, for its superuser."""
    return Database(server.host, server.port, server.database, server.user, server.password)


def hash_passwords_once(server: PostgresServer) -> None:
    """Have a server and its clients do one round of SHA-256 a login instead of 4096, which take longer than the rest.

    Before PostgreSQL 16 the number is fixed.
    """
    own = maintenance(server)
    if own.execute("SELECT 1 FROM pg_settings WHERE name = 'scram_iterations'"):
        own.execute("ALTER SYSTEM SET scram_iterations = 1")
        own.execute("SELECT pg_reload_conf()")
        own.execute(f"SET scram_iterations = 1; ALTER ROLE {own.user} PASSWORD '{own.password}'")


@contextmanager
def new_database(server: PostgresServer, prefix: str = "test") -> Iterator[Database]:
    """Make an empty database; at the end it is dropped with whatever is still connected to it.

    Args:
        server: The server; it is started if need be, before and after.
        prefix: What the database's name begins with.
    """
    import psycopg2

    name = f"{prefix}_{uuid.uuid4().hex[:12]}"
    server.start()
    with closing(psycopg2.connect(server.dsn, connect_timeout=10)) as connection, connection.cursor() as cursor:
        connection.autocommit = True
        # Copying files takes a third of the time that writing them to the log does, which is all older servers know.
        how = " STRATEGY file_copy" if connection.server_version >= 150000 else ""
        cursor.execute(f"CREATE DATABASE {name}{how}")
    yield Database(server.host, server.port, name, server.user, server.password)
    server.start()
    maintenance(server).execute(f"DROP DATABASE {name} WITH (FORCE)")
