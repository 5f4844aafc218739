"""A database of a test's own on a shared PostgreSQL server."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Protocol
from urllib.parse import quote


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
