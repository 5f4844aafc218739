"""Task bases that are configured by the ``workerpools_…`` settings alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from workerpools._celery.configured import ConfiguredResource
from workerpools._celery.task import PooledTask
from workerpools._pools.adapter import Adapter

if TYPE_CHECKING:
    import httpx
    import sqlalchemy

    from workerpools.sqlalchemy import TaskSession

__all__ = ["DatabaseTask", "HTTPTask", "from_settings"]


T = TypeVar("T")


def from_settings(adapter: type[Adapter[T]] | str) -> ConfiguredResource[T]:
    """Return a resource that each app configures with its own ``workerpools_…`` settings.

    Assign it to a class attribute of a task base: ``cache = from_settings(MemcachedClient)``.

    Args:
        adapter: The adapter class, with :meth:`workerpools.Adapter.from_settings`; or ``"module:class"``, imported on
            first use.
    """
    return ConfiguredResource(adapter)


class HTTPTask(PooledTask):
    """A task base with ``self.http``, one ``httpx.Client`` per process, from the ``workerpools_http_…`` settings."""

    abstract = True

    http: ConfiguredResource[httpx.Client] = from_settings("workerpools.httpx:HttpxClient")


class DatabaseTask(PooledTask):
    """A task base with ``self.engine``, one per process, and ``self.session``, one per attempt.

    Both use the ``workerpools_database_…`` settings. The session commits when the body returns.
    """

    abstract = True

    engine: ConfiguredResource[sqlalchemy.Engine] = from_settings("workerpools.sqlalchemy:SQLAlchemyEngine")

    if TYPE_CHECKING:
        session = TaskSession(engine)
    else:

        class _Session:
            """Creates the TaskSession on first use: importing workerpools must not import SQLAlchemy."""

            __workerpools__ = True

            def __init__(self) -> None:
                self._made = None

            def __get__(self, instance: object, owner: type) -> Any:
                if self._made is None:
                    from workerpools.sqlalchemy import TaskSession

                    self._made = TaskSession(DatabaseTask.engine)
                    # Replace this placeholder.
                    DatabaseTask.session = self._made
                return self._made.__get__(instance, owner)

        session = _Session()
