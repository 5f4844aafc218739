"""What the demo itself does in the shop's database: make the tables, count rows, and end the worker's connections."""

from __future__ import annotations

import time
from typing import Any

import sqlalchemy
from sqlalchemy.exc import OperationalError
from sqlalchemy.pool import NullPool

from demo_tasks.models import Base

__all__ = ["Database"]

# Makes two runs that start at the same time take turns: CREATE TABLE IF NOT EXISTS alone fails in one of them.
_SCHEMA_LOCK = 7_306_921


class Database:
    """The shop's database, seen from outside the worker, over a connection of its own for each question.

    Args:
        url: The database, as a SQLAlchemy URL.
        application: What the worker's connections are called, as a LIKE pattern for ``application_name``.
    """

    def __init__(self, url: str, application: str = "workerpools %") -> None:
        self._engine = sqlalchemy.create_engine(
            sqlalchemy.make_url(url).difference_update_query(["application_name"]),
            poolclass=NullPool,
            connect_args={"connect_timeout": 5, "application_name": "demo"},
        )
        self._application = application

    def wait(self, timeout: float) -> None:
        """Wait until the database takes connections.

        Args:
            timeout: How long to wait, in seconds.

        Raises:
            sqlalchemy.exc.OperationalError: It still does not.
        """
        deadline = time.monotonic() + timeout
        while True:
            try:
                with self._engine.connect():
                    return
            except OperationalError:
                if time.monotonic() >= deadline:
                    raise
            time.sleep(0.5)

    def create_tables(self) -> None:
        """Make the tables that are not there yet."""
        with self._engine.begin() as connection:
            connection.execute(sqlalchemy.select(sqlalchemy.func.pg_advisory_xact_lock(_SCHEMA_LOCK)))
            Base.metadata.create_all(connection)

    def count_rows(self, run: str) -> dict[str, int]:
        """Return how many rows of ``run`` each table has.

        Args:
            run: What the ids of the run's orders begin with.
        """
        with self._engine.connect() as connection:
            return {
                table.name: connection.scalar(
                    sqlalchemy.select(sqlalchemy.func.count())
                    .select_from(table)
                    .where(next(iter(table.primary_key)).startswith(f"{run}-", autoescape=True))
                )
                or 0
                for table in Base.metadata.sorted_tables
            }

    def worker_connections(self) -> int:
        """Return how many connections of the worker the server has."""
        return self._count("count(*)")

    def kill_worker_connections(self) -> int:
        """End every connection of the worker on the server, and return how many they were."""
        return self._count("count(*) FILTER (WHERE pg_terminate_backend(pid))")

    def execute(self, statement: str) -> None:
        """Run one statement, and commit."""
        with self._engine.begin() as connection:
            connection.execute(sqlalchemy.text(statement))

    def _count(self, what: str) -> int:
        statement = sqlalchemy.text(
            f"SELECT {what} FROM pg_stat_activity"
            " WHERE application_name LIKE :application AND datname = current_database()"
        )
        with self._engine.connect() as connection:
            counted: Any = connection.scalar(statement, {"application": self._application})
        return int(counted)
