"""Task bases that need no declaration: everything comes from the ``workerpools_…`` settings."""

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
    """Return a resource for a task base that needs no declaration: each app's own, from its ``workerpools_…`` settings.

    As a class attribute of a task base it gives the value: ``cache = from_settings(MemcachedClient)``.

    Args:
        adapter: The adapter's class, whose :meth:`workerpools.Adapter.from_settings` is asked; or ``"module:class"``
            to import it when it is needed.
    """
    return ConfiguredResource(adapter)


class HTTPTask(PooledTask):
    """A task base with ``self.http``, an ``httpx.Client``, one a process, from the ``workerpools_http_…`` settings."""

    abstract = True

    http: ConfiguredResource[httpx.Client] = from_settings("workerpools.httpx:HttpxClient")


class DatabaseTask(PooledTask):
    """A task base with ``self.engine``, one a process, and ``self.session``, one an attempt.

    Both come from the ``workerpools_database_…`` settings. The session commits when the body returns.
    """

    abstract = True

    engine: ConfiguredResource[sqlalchemy.Engine] = from_settings("workerpools.sqlalchemy:SQLAlchemyEngine")

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
