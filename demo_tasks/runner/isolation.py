"""Keeps a run to itself on servers that are not its own, and removes its traces from them."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace

import redis
import sqlalchemy
from sqlalchemy.exc import SQLAlchemyError

from demo_tasks.database import Database
from demo_tasks.servers import Servers
from demo_tasks.settings import Settings
from demo_tasks.tally import connect

__all__ = ["Isolation"]


@dataclass(frozen=True)
class Isolation:
    """What a run needs to know of its servers.

    Attributes:
        settings: Where they are, and how the run's part of them is told from others'.
        application: What the worker's database connections are called, as a LIKE pattern.
        schema: The run's own schema in the database; None where the whole server is its own.
    """

    settings: Settings
    application: str
    schema: str | None

    @classmethod
    def of(cls, servers: Servers, run: str) -> Isolation:
        """Return the isolation of ``run`` on ``servers``.

        On PostgreSQL it is a schema and a name for the connections, on Redis a prefix of the keys; neither is needed
        on servers that were started for the run.

        Args:
            servers: The servers, started.
            run: The run's token, made of letters and digits.
        """
        settings = Settings(servers.redis.url(), servers.database.url("psycopg2"), servers.upstream.url(), "")
        application, schema = "workerpools %", None
        if not servers.redis.managed:
            settings = replace(settings, key_prefix=f"workerpools-demo-{run}:")
        if not servers.database.managed:
            schema = f"workerpools_demo_{run}"
            application = f"workerpools demo {run}"
            url = sqlalchemy.make_url(settings.database_url)
            options = " ".join([*_texts(url.query.get("options")), f"-csearch_path={schema}"])
            url = url.update_query_dict({"application_name": application, "options": options})
            # In a transaction that writes, the name is followed by its id.
            application += "%"
            settings = replace(settings, database_url=url.render_as_string(hide_password=False))
        return cls(settings, application, schema)

    def database(self) -> Database:
        """Return the run's part of the database."""
        return Database(self.settings.database_url, self.application)

    def prepare(self) -> None:
        """Make the schema, if there is to be one, and the tables."""
        database = self.database()
        if self.schema is not None:
            database.execute(f"CREATE SCHEMA {self.schema}")
        database.create_tables()

    def remove_traces(self) -> None:
        """Drop the schema and delete the keys; a server that does not answer keeps them."""
        if self.schema is not None:
            with contextlib.suppress(SQLAlchemyError):
                self.database().execute(f"DROP SCHEMA IF EXISTS {self.schema} CASCADE")
        if self.settings.key_prefix:
            client = connect(self.settings.redis_url)
            with contextlib.suppress(redis.RedisError):
                for key in client.scan_iter(match=f"{self.settings.key_prefix}*", count=1000):
                    client.delete(key)
            client.close()


def _texts(value: str | tuple[str, ...] | None) -> tuple[str, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, str) else value
