"""The adapter of Django's databases: which connections this process has, and what becomes of them between tasks."""

from __future__ import annotations

import contextlib
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import celery
from django.db import connections
from django.db.utils import InterfaceError, OperationalError

from workerpools.adapter import (
    Adapter,
    ExecutionPool,
    Failure,
    Limit,
    Opening,
    Phase,
    Watchdog,
    greenlet_library,
)
from workerpools.django._connections import is_current, is_initialized, on_connect, pool_of, watch
from workerpools.django._errors import classify_lost, driver_error
from workerpools.django._limits import capacity, counted, limits

__all__ = ["Databases", "DjangoDatabases"]


#: Celery 5.4 and 5.5 close what Django would close at the end of a request, and no more.
CELERY_CLOSES_ALL = celery.VERSION >= (5, 6)

#: The longest wait for the check of the pooled connections beside one that was lost, in seconds.
CHECK_TIMEOUT = 1.0


class DjangoDatabases(Adapter["Databases"]):
    """The databases of Django's settings. Each thread's connections are Django's own, ``connections[alias]``."""

    kind = "database"
    libraries = ("django", "psycopg", "psycopg2", "psycopg_pool")

    def __init__(self) -> None:
        self._values: weakref.WeakSet[Databases] = weakref.WeakSet()

    def open(self, opening: Opening) -> Databases:
        watch()
        value = Databases(opening)
        self._values.add(value)
        return value

    def close(self, value: Databases, timeout: float) -> None:
        """Close the connections of all threads once they are idle, or after ``timeout`` seconds.

        Args:
            value: The databases.
            timeout: How long to wait, in seconds.
        """
        self._values.discard(value)
        value.close(timeout)

    def recycle(self, value: Databases, since: float) -> bool:
        """Close each connection before its next use by a task.

        Args:
            value: The databases.
            since: Connections opened before this :func:`time.monotonic` time are replaced.
        """
        value.since = since
        return True

    def capacity(self, execution_pool: ExecutionPool) -> int | None:
        """Return the most connections of one process, to all servers; None if all databases are files.

        Args:
            execution_pool: The execution pool of the process.
        """
        aliases = counted()
        return capacity(aliases, execution_pool) if aliases else None

    def limits(self, value: Databases, resource: str) -> Sequence[Limit]:
        """Ask the server of each alias for its limits, and PgBouncer's console for its own.

        Args:
            value: The databases.
            resource: The resource's name.
        """
        return limits(counted())

    def classify(self, error: BaseException, earlier: Sequence[Failure]) -> Failure | None:
        # Rows of a server-side cursor come past Django's hooks.
        original = driver_error(error)
        if not isinstance(error, (OperationalError, InterfaceError)) or original is None:
            return None
        if not any(value.lost_any_unseen() for value in list(self._values)):
            return None
        return classify_lost(original, lost=True, phase=Phase.STATEMENT, unknown=False)

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> DjangoDatabases:
        return cls()

    def describe(self) -> str:
        return "Django's databases"


class Databases:
    """Django's connections in this process.

    Args:
        opening: Where they report to.
    """

    def __init__(self, opening: Opening) -> None:
        self.opening = opening
        self.watchdog = Watchdog()
        #: Connections opened before this time are replaced.
        self.since = 0.0
        self._local = threading.local()
        self._wrappers: weakref.WeakSet[Any] = weakref.WeakSet()
        #: The driver's connections and when each was seen first, by id.
        self._known: dict[int, tuple[weakref.ref[Any], float]] = {}
        on_connect(self.seen)

    def attempt_begins(self) -> None:
        """Forget what the calling thread's last attempt has lost."""
        self._local.lost = False

    # A thread's connections.

    def take(self, alias: str) -> Any:
        """Return the calling thread's connection object, with the connection that its last task left, if it is good."""
        kept = self._kept().get(alias)
        if kept is not None and not (is_initialized(alias) and connections[alias].connection is not None):
            connections[alias] = kept
            del self._kept()[alias]
        wrapper = connections[alias]
        self._wrappers.add(wrapper)
        if self.opening.execution_pool.kind and not wrapper.in_atomic_block:
            if wrapper.connection is not None and self._age(wrapper.connection) < self.since:
                with self.opening.closing("recycled"):
                    self._close(wrapper)
                    self.settle()
            # As Django does when a request begins: CONN_MAX_AGE, CONN_HEALTH_CHECKS. Outside of a worker this may be
            # in the middle of one.
            wrapper.close_if_unusable_or_obsolete()
        return wrapper

    def put_away(self) -> None:
        """Keep the connections of a task that has ended from Celery, which closes all of Django's, for the next task.

        A connection that Django would close at the end of a request is closed: CONN_MAX_AGE.
        """
        for wrapper in connections.all(initialized_only=True):
            if wrapper not in self._wrappers or wrapper.in_atomic_block:
                continue
            if greenlet_library():
                # The next task is another greenlet, with connections of its own.
                continue
            if pool_of(wrapper) is not None:
                wrapper.close()
            else:
                wrapper.close_if_unusable_or_obsolete()
            if not CELERY_CLOSES_ALL:
                continue
            if wrapper.connection is not None:
                self._kept()[wrapper.alias] = wrapper
            # Celery also closes the pool of a connection that it finds.
            del connections[wrapper.alias]
        self.settle()

    def _kept(self) -> dict[str, Any]:
        found: dict[str, Any] = self._local.__dict__.setdefault("kept", {})
        return found

    def lost(self, wrapper: Any) -> None:
        """Check those beside a connection that was lost: they are suspect."""
        if (pool := pool_of(wrapper)) is not None:
            # Those that do not answer are removed. In a thread, because it has no timeout.
            checking = threading.Thread(target=pool.check, name="workerpools-check", daemon=True)
            checking.start()
            checking.join(CHECK_TIMEOUT)

    def lost_unseen(self, wrapper: Any) -> None:
        """Note that the calling thread's attempt has lost a connection in an operation that Django does not show."""
        self._local.lost = True
        self.lost(wrapper)

    def lost_any_unseen(self) -> bool:
        """Return whether the calling thread's last attempt has lost a connection so."""
        return bool(getattr(self._local, "lost", False))

    def throw_away(self, wrapper: Any) -> None:
        """Close a connection whose state is unknown; the thread opens another one."""
        with self.opening.closing("stale"):
            self._close(wrapper)
            self._wrappers.discard(wrapper)
            if is_current(wrapper):
                del connections[wrapper.alias]
            self.settle()

    def _close(self, wrapper: Any) -> None:
        with contextlib.suppress(Exception):
            wrapper.close()

    # Statistics.

    @property
    def opened_here(self) -> Any:
        """The connection that was last seen for the first time in the calling thread."""
        return getattr(self._local, "opened", None)

    @opened_here.setter
    def opened_here(self, connection: Any) -> None:
        self._local.opened = connection

    def seen(self, wrapper: Any) -> None:
        """Count a connection that is open."""
        connection = wrapper.connection
        known = self._known.get(id(connection))
        if known is not None and known[0]() is connection:
            return
        self.settle()
        if hasattr(connection, "fileno"):
            self._known[id(connection)] = weakref.ref(connection), time.monotonic()
            self.opened_here = connection
            self.opening.connected(connection, wrapper.alias)

    def _age(self, connection: Any) -> float:
        known = self._known.get(id(connection))
        return time.monotonic() if known is None else known[1]

    def settle(self) -> None:
        """Count the connections that were closed: by Django, by Celery, by psycopg's pool."""
        for key, (reference, since) in list(self._known.items()):
            connection = reference()
            if connection is not None and not connection.closed:
                continue
            if self._known.pop(key, None) is not None:
                closed = connection if connection is not None else reference
                self.opening.disconnected(closed, age=time.monotonic() - since)

    def close(self, timeout: float) -> None:
        """Close the connections of all threads, and psycopg's pools."""
        until = time.monotonic() + timeout
        wrappers = list(self._wrappers)
        while any(wrapper.in_atomic_block for wrapper in wrappers) and time.monotonic() < until:
            time.sleep(0.01)
        for wrapper in wrappers:
            wrapper.inc_thread_sharing()
            self._close(wrapper)
            if pool_of(wrapper) is not None:
                with contextlib.suppress(Exception):
                    wrapper.close_pool()
        self._kept().clear()
        self.settle()
