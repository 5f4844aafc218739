"""Task bases that need no declaration: everything comes from the ``workerpools_…`` settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from workerpools._celery.configured import ConfiguredResource
from workerpools._celery.task import PooledTask
from workerpools._pools.adapter import Adapter
from workerpools.errors import ConfigurationError

if TYPE_CHECKING:
    import httpx
    import sqlalchemy

    from workerpools.sqlalchemy import TaskSession

__all__ = ["DatabaseTask", "HTTPTask"]


def _http(settings: Mapping[str, Any]) -> Adapter[httpx.Client]:
    from workerpools.httpx import from_settings

    return from_settings(settings)


def _database(settings: Mapping[str, Any]) -> Adapter[sqlalchemy.Engine]:
    if "database_url" not in settings:
        raise ConfigurationError(
            "workerpools_database_url is not set; DatabaseTask needs it: set it in app.conf, or "
            "WORKERPOOLS_DATABASE_URL in the environment, like postgresql+psycopg2://app@db/shop"
        )
    from workerpools.sqlalchemy import from_settings

    return from_settings(settings)


class HTTPTask(PooledTask):
    """A task base with ``self.http``, an ``httpx.Client``, one a process, from the ``workerpools_http_…`` settings."""

    abstract = True

    http = ConfiguredResource(_http)


class DatabaseTask(PooledTask):
    """A task base with ``self.engine``, one a process, and ``self.session``, one an attempt.

    Both come from the ``workerpools_database_…`` settings. The session commits when the body returns.
    """

    abstract = True

    engine = ConfiguredResource(_database)

    if TYPE_CHECKING:
        session = TaskSession(engine)
    else:

        class _Session:
            """Makes the TaskSession on first use: importing workerpools must not import SQLAlchemy."""

            __workerpools__ = True

            def __init__(self) -> None:
                self._made = None

            def __get__(self, instance: object, owner: type) -> Any:
                if self._made is None:
                    from workerpools.sqlalchemy import TaskSession

                    self._made = TaskSession(DatabaseTask.engine)
                    # It stands for itself from here on.
                    DatabaseTask.session = self._made
                return self._made.__get__(instance, owner)

        session = _Session()
