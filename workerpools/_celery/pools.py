"""WorkerPools: the resources of an app, and their life in its workers."""

from __future__ import annotations

import inspect
import logging
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar, cast, overload

from celery import Celery

from workerpools._celery import apps, lifecycle, sharing
from workerpools._celery.request import check_times
from workerpools._celery.settings import read_setting, read_settings
from workerpools._pools.adapter import Adapter, FunctionAdapter
from workerpools._pools.resource import Resource
from workerpools._pools.shared import UNKNOWN, ExecutionPool, Shared
from workerpools._process.bounded import remaining, run_bounded
from workerpools._run import attempts
from workerpools._run.events import Listener
from workerpools._stats.collector import Collector
from workerpools._values import WEEK, check_name, seconds
from workerpools.errors import ConfigurationError

if TYPE_CHECKING:
    from workerpools._stats.alerts import AlertListener
    from workerpools._stats.snapshot import WorkerStats

__all__ = ["WorkerPools", "is_adapter"]

T = TypeVar("T")
L = TypeVar("L", bound="AlertListener")

logger = logging.getLogger("workerpools")

# What tells an adapter from a client: many of those have open() and close(), too.
_ADAPTER = ("prepare", "open", "close", "describe")


def is_adapter(value: object) -> bool:
    """Return whether ``value`` is an adapter, of whatever class."""
    # Its class is asked: a lazy object (Celery's Proxy) would be made for the answer.
    return _adapts(type(value))


def _adapts(cls: type) -> bool:
    return all(callable(getattr(cls, name, None)) for name in _ADAPTER)


def _tell_worker(app: Any) -> None:
    from workerpools._celery import worker

    app.steps["worker"].update(worker.STEPS)
    worker.register_commands()


class WorkerPools:
    """The resources that an app's tasks share: declared once, opened once in each process, closed with it.

    Works in workers of every execution pool, and outside of them: ``with pools:`` closes what the block opened.

    Args:
        app: The Celery app; :meth:`init_app` gives it later.
    """

    def __init__(self, app: Celery | None = None) -> None:
        attempts.protect()
        self._apps: weakref.WeakSet[Any] = weakref.WeakSet()
        self._worker: Any = None
        # Where no worker is seen: a spawned child, or none at all.
        self._unseen = UNKNOWN
        self.shared = Shared(self._setting, self._execution_pool)
        #: Called when an alert is raised or cleared.
        self.alert_listeners: tuple[AlertListener, ...] = ()
        self._number = lifecycle.connect(self)
        if app is not None:
            self.init_app(app)

    def init_app(self, app: Celery) -> None:
        """Serve ``app``: read its settings, follow its workers. May be called for several apps, and again."""
        if app not in self._apps:
            self._apps.add(app)
            if "celery.worker.control" in sys.modules:
                # The ``celery`` command, or a worker: what the command does not know of it refuses. Other programs are
                # spared the import.
                _tell_worker(app)
            apps.add(app, self)

    @property
    def has_app(self) -> bool:
        """Whether an app is served."""
        return len(self._apps) > 0

    @classmethod
    def of(cls, app: Celery) -> WorkerPools:
        """Return the first WorkerPools of ``app``; one is made if it has none."""
        pools = cls.all_of(app)
        if not pools and sharing.child_index() is not None:
            # Celery hands a spawned child a copy of the app that the child has imported, and what is declared there.
            pools = apps.of_namesake(app)
            if pools:
                pools[0].init_app(app)
        return pools[0] if pools else cls(app)

    @staticmethod
    def all_of(app: Celery) -> list[WorkerPools]:
        """Return every WorkerPools of ``app``, the first one first."""
        return apps.all_of(app)

    def stats(self) -> WorkerStats:
        """Return what the resources of this process are doing; in a worker's main process, those of its children."""
        return self.collector.snapshot(None if self._worker is None else sharing.children(self._worker))

    @overload
    def add(self, adapter: Adapter[T], *, name: str | None = None) -> Resource[T]: ...
    @overload
    def add(
        self,
        adapter: Callable[[], Iterator[T]],
        *,
        name: str | None = None,
        connections: Callable[[T], Iterable[Any]] | None = None,
    ) -> Resource[T]: ...
    @overload
    def add(
        self,
        adapter: Callable[[], T],
        *,
        name: str | None = None,
        close: Callable[[T], object] | None = None,
        connections: Callable[[T], Iterable[Any]] | None = None,
    ) -> Resource[T]: ...
    def add(
        self, adapter: Any, *, name: str | None = None, close: Any = None, connections: Any = None
    ) -> Resource[Any]:
        """Declare a resource. Opens nothing.

        >>> import io
        >>> from workerpools import WorkerPools
        >>> pools = WorkerPools()
        >>> def notes():
        ...     value = io.StringIO()
        ...     yield value         # opened on first use, once per process
        ...     value.close()       # at the end of the process, or by close()
        >>> resource = pools.add(notes, name="notes")
        >>> resource.is_open
        False
        >>> value = resource.get()
        >>> resource.get() is value
        True
        >>> pools.close()
        >>> value.closed
        True

        Args:
            adapter: An adapter; or a function that returns the value; or a generator function that yields it once
                and closes it after the ``yield``.
            name: The resource's name; by default that of the class attribute it is assigned to. One line of printable
                characters, at most 56 bytes in UTF-8, without ``"``, ``\\``, ``,`` and ``=``.
            close: For a plain function: called with the value when the process is done with it; by default the
                value's own ``close()``, if it has one.
            connections: For a function: called with the value at a fork; returns the objects with a ``fileno()`` that
                the value owns, so that a child can discard them. By default the value itself, if it has a
                ``fileno()``.

        Returns:
            The resource: a class attribute for task bases, and a handle with ``get()``, ``override()``, ``close()``.

        Raises:
            ConfigurationError: Another resource of this WorkerPools has that name, or it cannot be published; or
                ``adapter`` is neither, or is an adapter and comes with ``close`` or ``connections``.
        """
        if isinstance(adapter, type):
            name = adapter.__name__
            if _adapts(adapter):
                raise ConfigurationError(
                    f"pools.add({name}) wants the adapter, not its class; call it: pools.add({name}(…))"
                )
            raise ConfigurationError(
                f"pools.add() wants an adapter or a function that makes the value, not the class {name}; "
                f"give it a function: pools.add(lambda: {name}(…))"
            )
        if not all(callable(getattr(adapter, name, None)) for name in _ADAPTER):
            if not callable(adapter):
                raise ConfigurationError(
                    f"pools.add() wants an adapter or a function that makes the value, not {type(adapter).__name__}; "
                    "give it a function, so that each process makes its own"
                )
            if close is not None and inspect.isgeneratorfunction(adapter):
                raise ConfigurationError(
                    f"pools.add({adapter.__name__}, close=…): a generator function closes its value after the yield; "
                    "put the clean-up there"
                )
            adapter = FunctionAdapter(adapter, close=close, connections=connections)
        elif close is not None or connections is not None:
            raise ConfigurationError(
                f"pools.add({type(adapter).__name__}(…)): close= and connections= are for functions; an adapter has "
                "methods for that"
            )
        resource: Resource[Any] = Resource(self.shared, cast("Adapter[Any]", adapter), name)
        if name is not None:
            check_name(name)
            if name in self.shared.names:
                raise ConfigurationError(
                    f"two resources are named {name!r} in one WorkerPools: {self.shared.names[name]!r} and "
                    f"{resource!r}; give one another name: pools.add(…, name='…')"
                )
            self.shared.names[name] = resource
        resource.pools = self
        self.shared.resources.append(resource)
        return resource

    @property
    def resources(self) -> list[Resource[Any]]:
        """The declared resources, by name."""
        return self.shared.by_name()

    @property
    def collector(self) -> Collector:
        """What counts, and reads what children count."""
        return self.shared.collector

    def has(self, name: str) -> bool:
        """Return whether a resource has this name."""
        return name in self.shared.names

    def recycle(self, name: str | None = None) -> list[str]:
        """Have connections replaced that are open now: each process does it when it uses the resource next.

        What is in flight ends undisturbed on the connection that it has. In the main process of a worker this reaches
        its children, too; elsewhere it is about this process alone.

        Args:
            name: The resource; every one if None.

        Returns:
            The names of the resources that will do it.

        Raises:
            ConfigurationError: No resource has that name.
        """
        names = self.collector.names()
        if name is not None and name not in names:
            known = ", ".join(names) or "there are none"
            raise ConfigurationError(f"no resource is named {name!r}; the resources: {known}")
        self.collector.recycle([] if name is None else [name])
        return names if name is None else [name]

    def subscribe(self, listener: Listener) -> None:
        """Call ``listener`` with every event of these resources in this process and its later children."""
        self.shared.listeners.add(listener)

    def on_alert(self, listener: L) -> L:
        """Call ``listener(alert, raised)`` in a worker's main process whenever an alert is raised or cleared.

        Nothing else goes on there meanwhile: keep it short. One that raises is logged.

        Returns:
            The listener, so that this serves as a decorator.
        """
        self.alert_listeners = (*self.alert_listeners, listener)
        return listener

    @property
    def close_timeout(self) -> float:
        """How long closing may take, in seconds: the setting ``workerpools_close_timeout``, or 5."""
        return self.shared.close_timeout

    def close(self, timeout: float | None = None) -> None:
        """Close every value that this process has open, the last one opened first; the next use opens another.

        First waits for the attempts of other threads that use these resources. A close that hangs or fails is logged,
        and the others are closed all the same.

        Args:
            timeout: The bound for all of it, in seconds; ``close_timeout`` if None.

        Raises:
            ConfigurationError: ``timeout`` is no number, negative, or longer than a week.
        """
        if timeout is not None:
            seconds(timeout, "WorkerPools.close(): timeout", most=WEEK, optional=True)
        # A value may need another one to close, and has opened later then.
        resources = sorted(
            (resource for resource in self.resources if resource.is_open),
            key=lambda resource: resource.opened_as,
            reverse=True,
        )
        # Where nothing is open the settings need not be read: a process may exit because of them.
        if not resources:
            return
        deadline = time.monotonic() + (self.close_timeout if timeout is None else timeout)
        attempts.wait_for_others(resources, remaining(deadline))
        for resource in resources:
            _close(resource, deadline)

    def _execution_pool(self) -> ExecutionPool:
        # Asked late: worker_init comes before the worker has resolved its execution pool and concurrency.
        return self._unseen if self._worker is None else lifecycle.execution_pool(self._worker)

    def _setting(self, name: str) -> Any:
        for app in self._apps:
            return read_setting(app.conf, name, None)
        return None

    def record_failure(self, error: Exception) -> None:
        """Raise ``error`` in every task that opens a resource from now on."""
        self.shared.failure = error

    def worker_starts(self, worker: Any) -> None:
        """Prepare what children can inherit; called in the parent, before any of them exists."""
        if self._worker is not None and self._serves(self._worker) and not self._serves(worker):
            # A worker of another app in the same process: this app's own one decides about sizes.
            return
        self._worker = worker
        self.shared.failure = None
        lifecycle.keep_limits(worker)
        with sharing.unharmed():
            for app in self._apps:
                _tell_worker(app)
            self.collector.share(sharing.new_board(worker, self._number))
        for app in self._apps:
            read_settings(app.conf)
            if WorkerPools.of(app) is self:
                for warning in check_times(app):
                    logger.warning(warning)
        self._prepare()

    def _prepare(self) -> None:
        for resource in self.resources:
            try:
                resource.adapter.prepare()
            except Exception:
                logger.exception("could not prepare %r; its tasks will fail with this error", resource)

    def worker_ended(self, worker: Any) -> None:
        """Close everything, unless it was the worker of another app, and this app's own one still runs here."""
        if self._worker is not None and self._serves(self._worker) and hasattr(worker, "app"):
            if not self._serves(worker):
                return
            self._worker = None
        self.close()
        sharing.withdraw(self._number)
        self.collector.end()

    def _serves(self, worker: Any) -> bool:
        return getattr(worker, "app", None) in self._apps

    def process_starts(self) -> None:
        """Note that this process runs tasks; connects and builds nothing."""
        if self._worker is None:
            # A spawned child never sees worker_init; only prefork spawns.
            self._unseen = ExecutionPool("prefork", 1)
            self.collector.share(sharing.found_board(self._number))
        with sharing.unharmed():
            index = sharing.child_index()
            if index is not None:
                self.collector.join(index)

    def worker_stops(self) -> None:
        """Log what the shutdown will have to wait for, if anything is open here."""
        open_here = [resource.name for resource in self.resources if resource.is_open]
        if open_here:
            logger.info("worker stops: closing %s within %.1f s", ", ".join(open_here), self.close_timeout)

    def __enter__(self) -> WorkerPools:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<WorkerPools {self.resources!r}>"


def _close(resource: Resource[Any], deadline: float) -> None:
    def close() -> None:
        try:
            resource.close(remaining(deadline))
        except Exception:
            logger.exception("could not close %r", resource)

    # Even without time left a healthy close gets the moment it needs.
    if not run_bounded(close, max(remaining(deadline), 0.25)):
        logger.warning("closing %r did not end in time; its connections end with the process", resource)
