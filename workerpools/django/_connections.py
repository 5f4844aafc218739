"""Django's connections, as each thread of this process has them: who watches each, and what a forked child forgets.

Django's own hooks serve: the signal ``connection_created``, and the wrappers of ``connection.execute_wrapper()``.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from celery import current_task
from django.db import connections
from django.db.backends.signals import connection_created

from workerpools.adapter import Descriptors, Effect, current, in_attempt, note_effect

__all__ = [
    "Inherited",
    "Statements",
    "inherited",
    "is_current",
    "is_initialized",
    "on_connect",
    "pool_of",
    "watch",
    "watcher_of",
]


class Statements(Protocol):
    """What gets the statements of a connection while a transaction of an attempt is open on it."""

    def execute(self, execute: Callable[..., Any], sql: Any, params: Any, many: bool, context: Any) -> Any:
        """Execute one statement, as a wrapper of ``connection.execute_wrapper()`` does."""


class Watcher:
    """Sees each statement of one connection.

    Args:
        alias: The connection's alias.

    Attributes:
        transaction: The transaction of an attempt that is open; None if there is none.
    """

    def __init__(self, alias: str) -> None:
        self.alias = alias
        self.transaction: Statements | None = None

    def __call__(self, execute: Callable[..., Any], sql: Any, params: Any, many: bool, context: Any) -> Any:
        """Execute one statement."""
        transaction = self.transaction
        if transaction is not None:
            return transaction.execute(execute, sql, params, many, context)
        # Celery's own work for a task, such as storing its result, is none of a body's thread.
        if in_attempt() and (current() is not None or not current_task):
            # It commits itself, or somebody else commits it.
            note_effect(Effect(f"a statement on {self.alias!r} outside of the run's transaction"))
        return execute(sql, params, many, context)


_watchers: weakref.WeakKeyDictionary[Any, Watcher] = weakref.WeakKeyDictionary()

#: Called with each connection that Django has opened.
_listeners: list[weakref.WeakMethod[Callable[[Any], object]]] = []


def watcher_of(wrapper: Any) -> Watcher:
    """Return what watches a connection of Django's, from now on at the latest."""
    found = _watchers.get(wrapper)
    if found is None:
        found = _watchers[wrapper] = Watcher(wrapper.alias)
        # First in the list is the outermost. At its end, as execute_wrapper() does, it would be what a block of
        # execute_wrapper() removes in which the connection was opened.
        wrapper.execute_wrappers.insert(0, found)
    return found


def watch() -> None:
    """Watch all connections of the process. Idempotent."""
    connection_created.connect(_connected, weak=False, dispatch_uid="workerpools.django")
    for wrapper in connections.all(initialized_only=True):
        if wrapper.connection is not None:
            _connected(connection=wrapper)


def on_connect(listener: Callable[[Any], object]) -> None:
    """Call ``listener`` with each connection of Django's once it is open.

    Args:
        listener: Held weakly; a bound method.
    """
    _listeners.append(weakref.WeakMethod(listener))


def _connected(connection: Any = None, **_: Any) -> None:
    watcher_of(connection)
    inherited.add(connection)
    for reference in list(_listeners):
        listener = reference()
        if listener is None:
            _listeners.remove(reference)
        else:
            listener(connection)


def is_initialized(alias: str) -> bool:
    """Return whether the calling thread has a connection object for an alias, open or not."""
    return any(wrapper.alias == alias for wrapper in connections.all(initialized_only=True))


def is_current(wrapper: Any) -> bool:
    """Return whether this is the connection object that the calling thread has for its alias."""
    return any(each is wrapper for each in connections.all(initialized_only=True))


def pool_of(wrapper: Any) -> Any:
    """Return psycopg's pool of a connection with the option ``pool``; None for any other."""
    # Since Django 5.1, and for PostgreSQL.
    options = wrapper.settings_dict.get("OPTIONS") or {}
    return getattr(wrapper, "pool", None) if options.get("pool") else None


class Inherited:
    """What a forked child must not use: the connections that the parent had open, and psycopg's pools."""

    def __init__(self) -> None:
        self._descriptors = Descriptors()
        self._wrappers: weakref.WeakSet[Any] = weakref.WeakSet()
        #: psycopg's pools by alias, each with the class of Django's that keeps it.
        self._pools: dict[str, tuple[Any, type]] = {}
        self._descriptors.watch(self._idle)

    def add(self, wrapper: Any) -> None:
        """Note a connection that Django has opened."""
        self._wrappers.add(wrapper)
        if hasattr(wrapper.connection, "fileno"):
            self._descriptors.add(wrapper.connection)
        if (pool := pool_of(wrapper)) is not None:
            self._pools[wrapper.alias] = pool, type(wrapper)

    def _idle(self) -> Sequence[Any]:
        # psycopg_pool lists its idle connections nowhere else.
        return [each for pool, _ in list(self._pools.values()) for each in list(getattr(pool, "_pool", ()))]

    def pin(self) -> object:
        """Return the objects that a child must not finalize. Called in the parent."""
        wrappers = list(self._wrappers)
        return self._descriptors.pin(), wrappers, [wrapper.connection for wrapper in wrappers], dict(self._pools)

    def discard(self) -> tuple[object, Sequence[int]]:
        """Have the child open connections of its own; return what it keeps for ever, and the descriptors."""
        kept, numbers = (self.pin(), self._descriptors), self._descriptors.filenos()
        for alias, (pool, cls) in self._pools.items():
            # A child has none of a pool's threads.
            pools: dict[str, Any] = getattr(cls, "_connection_pools", {})
            if pools.get(alias) is pool:
                del pools[alias]
        for wrapper in list(self._wrappers):
            # Django's own state of it may be that of the middle of a transaction: the child gets another object.
            wrapper.connection = None
            if is_current(wrapper):
                del connections[wrapper.alias]
        self.__init__()  # type: ignore[misc]
        # They count for the parent.
        _listeners.clear()
        return kept, numbers


inherited = Inherited()
