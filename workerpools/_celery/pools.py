"""WorkerPools: the resources of an app and their life cycle in its workers."""

from __future__ import annotations

import inspect
import logging
import sys
import time
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar, cast, overload

from celery import Celery

from workerpools._celery import apps, lifecycle, messages, on_loop, sharing
from workerpools._celery.censor import hide_secrets
from workerpools._celery.request import check_times
from workerpools._celery.settings import read_setting, read_settings
from workerpools._pools.adapter import Adapter
from workerpools._pools.awaited import AwaitedResource
from workerpools._pools.factory import FunctionAdapter
from workerpools._pools.holder import Holder
from workerpools._pools.resource import Resource
from workerpools._pools.shared import UNKNOWN, ExecutionPool, Shared
from workerpools._process.bounded import remaining, run_bounded
from workerpools._run import attempts, coroutines, threads
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

# Distinguishes an adapter from a client: many clients have open() and close() too.
_ADAPTER = ("prepare", "open", "close", "describe")


def is_adapter(value: object) -> bool:
    """Return whether ``value`` is an adapter; it need not inherit from :class:`Adapter`."""
    # Looked up on the class: on the instance, a lazy object (Celery's Proxy) would be evaluated.
    return _adapts(type(value))


def _adapts(cls: type) -> bool:
    return all(callable(getattr(cls, name, None)) for name in _ADAPTER)


def _register_with_worker(app: Any) -> None:
    from workerpools._celery import worker

    app.steps["worker"].update(worker.STEPS)
    worker.register_commands()


class WorkerPools:
    """The resources that an app's tasks share: declared once, opened once per process, closed at its end.

    Works in workers with any execution pool, and outside workers: ``with pools:`` closes every value at the end of
    the block.

    Args:
        app: The Celery app; None to pass it to :meth:`init_app` later.
    """

    def __init__(self, app: Celery | None = None) -> None:
        attempts.protect()
        threads.follow()
        messages.follow()
        on_loop.follow()
        hide_secrets()
        self._apps: weakref.WeakSet[Any] = weakref.WeakSet()
        self._worker: Any = None
        # Without a worker in this process: a spawned child, a script, a web process.
        self._unseen = UNKNOWN
        self.shared = Shared(self._setting, self._execution_pool)
        #: Called when an alert is raised or cleared.
        self.alert_listeners: tuple[AlertListener, ...] = ()
        self._number = lifecycle.connect(self)
        if app is not None:
            self.init_app(app)

    def init_app(self, app: Celery) -> None:
        """Serve ``app``: use its settings and follow its workers.

        May be called for several apps; a second call for the same app does nothing.

        Args:
            app: The Celery app.
        """
        if app not in self._apps:
            self._apps.add(app)
            if "celery.worker.control" in sys.modules:
                # The ``celery`` command, which refuses remote control commands that it does not know, or a worker.
                # Other programs are spared the import.
                _register_with_worker(app)
            apps.add(app, self)

    @property
    def has_app(self) -> bool:
        """Whether this WorkerPools serves an app."""
        return len(self._apps) > 0

    @classmethod
    def of(cls, app: Celery) -> WorkerPools:
        """Return the first WorkerPools of an app; create one if there is none.

        Args:
            app: The Celery app.
        """
        pools = cls.all_of(app)
        if not pools and sharing.child_index() is not None:
            # Celery passes a pickled copy of the app to a spawned child; the resources belong to the imported one.
            pools = apps.of_namesake(app)
            if pools:
                pools[0].init_app(app)
        return pools[0] if pools else cls(app)

    @staticmethod
    def all_of(app: Celery) -> list[WorkerPools]:
        """Return every WorkerPools of an app, in order of creation.

        Args:
            app: The Celery app.
        """
        return apps.all_of(app)

    def stats(self) -> WorkerStats:
        """Return the statistics of this process; in a worker's main process, also those of its children."""
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
        adapter: Callable[[], Coroutine[Any, Any, T]],
        *,
        name: str | None = None,
        close: Callable[[T], object] | None = None,
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
            adapter: An adapter, a function that returns the value, or a generator function that yields it once and
                closes it after the ``yield``.
            name: The resource's name; by default the name of its class attribute. One line of printable characters,
                at most 56 bytes in UTF-8, without ``"``, ``\\``, ``,`` and ``=``.
            close: For a plain function: called with the value to close it; by default the value's own ``close()``, if
                it has one.
            connections: For a function: called with the value at a fork; returns the value's objects with a
                ``fileno()``, so that a child can discard them. By default the value itself, if it has a ``fileno()``.

        Returns:
            The resource: a class attribute for task bases, and a handle with ``get()``, ``override()`` and ``close()``.

        Raises:
            ConfigurationError: The name is taken in this WorkerPools or invalid; ``adapter`` is neither an adapter nor
                a function; or ``close`` or ``connections`` was given with an adapter.
        """
        if isinstance(adapter, type):
            name = adapter.__name__
            if _adapts(adapter):
                raise ConfigurationError(
                    f"pools.add({name}) got the adapter's class; pass an instance: pools.add({name}(…))"
                )
            raise ConfigurationError(
                f"pools.add() takes an adapter or a function that creates the value, not the class {name}; "
                f"pass a function: pools.add(lambda: {name}(…))"
            )
        if not all(callable(getattr(adapter, name, None)) for name in _ADAPTER):
            if not callable(adapter):
                raise ConfigurationError(
                    f"pools.add() takes an adapter or a function that creates the value, not {type(adapter).__name__}; "
                    "pass a function, so that each process creates its own"
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
        made: type[Resource[Any]] = AwaitedResource if getattr(adapter, "awaited", False) else Resource
        resource: Resource[Any] = made(self.shared, cast("Adapter[Any]", adapter), name)
        if name is not None:
            check_name(name)
            if name in self.shared.names:
                raise ConfigurationError(
                    f"two resources are named {name!r} in one WorkerPools: {self.shared.names[name]!r} and "
                    f"{resource!r}; rename one of them: pools.add(…, name='…')"
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
        """The collector of the statistics of this process and its children."""
        return self.shared.collector

    def has(self, name: str) -> bool:
        """Return whether a resource has this name.

        Args:
            name: The resource's name.
        """
        return name in self.shared.names

    def recycle(self, name: str | None = None) -> list[str]:
        """Replace the connections that are open now; each process does so on its next use of the resource.

        Work in flight finishes on the connection it has. In a worker's main process this covers the children too;
        elsewhere only this process.

        Args:
            name: The resource's name; None for all resources.

        Returns:
            The names of the resources to be recycled.

        Raises:
            ConfigurationError: No resource has that name.
        """
        names = self.collector.names()
        if name is not None and name not in names:
            known = ", ".join(names) or "there are none"
            raise ConfigurationError(f"no resource is named {name!r}; the resources: {known}")
        self.collector.recycle([] if name is None else [name])
        return names if name is None else [name]

    def on_commit(self, function: Callable[[], object]) -> None:
        """Call ``function`` once the task body that calls this is committed, after its last session.

        Functions and messages that wait are called in their order, outside the attempt; not at all if the body is
        rolled back, replayed or retried. Where no body runs, ``function`` is called at once. An exception that it
        raises after a commit is logged, and keeps nothing else from being called.

        Args:
            function: Called without arguments.
        """
        messages.call_on_commit(function)

    def run(self, coroutine: Awaitable[T]) -> T:
        """Run a coroutine from a synchronous body, a script or a test, and return its result.

        It runs on the process's event loop, where the asynchronous clients live, as a part of the calling attempt; the
        calling thread waits. A time limit of the task cancels it.

        >>> import asyncio
        >>> from workerpools import WorkerPools
        >>> pools = WorkerPools()
        >>> async def both():
        ...     return await asyncio.gather(asyncio.sleep(0, "a"), asyncio.sleep(0, "b"))
        >>> pools.run(both())
        ['a', 'b']

        Args:
            coroutine: The coroutine.

        Raises:
            RuntimeError: Called on the event loop itself, where the coroutine is to be awaited.
            ConfigurationError: gevent or eventlet has patched this process.
            BaseException: The coroutine's exception, or what interrupted the wait.
        """
        return coroutines.run(coroutine)

    def subscribe(self, listener: Listener) -> None:
        """Call ``listener`` with every event of these resources, in this process and the children it forks later.

        Args:
            listener: Called in the thread in which the event happens.
        """
        self.shared.listeners.add(listener)

    def on_alert(self, listener: L) -> L:
        """Call ``listener(alert, raised)`` in a worker's main process whenever an alert is raised or cleared.

        It runs in the worker's main loop or timer: keep it short. An exception that it raises is logged.

        Args:
            listener: Called with the alert, and True if it was raised or False if it was cleared.

        Returns:
            The listener, so that this serves as a decorator.
        """
        self.alert_listeners = (*self.alert_listeners, listener)
        return listener

    @property
    def close_timeout(self) -> float:
        """Time limit for closing, in seconds: the setting ``workerpools_close_timeout``, or 5."""
        return self.shared.close_timeout

    def close(self, timeout: float | None = None) -> None:
        """Close every open value of this process, in reverse order of opening; the next use opens a new one.

        Waits first for attempts in other threads that use these resources. A close that hangs or fails is logged and
        does not keep the others from closing.

        Args:
            timeout: The total time limit, in seconds; ``close_timeout`` if None.

        Raises:
            ConfigurationError: ``timeout`` is not a number, is negative, or exceeds a week.
        """
        if timeout is not None:
            seconds(timeout, "WorkerPools.close(): timeout", most=WEEK, optional=True)
        # A value may need an earlier one to close.
        holders = sorted(
            (resource._holder for resource in self.resources if resource.is_open),
            key=lambda holder: holder.opened_as,
            reverse=True,
        )
        # With nothing open, do not read the settings: an invalid one may be the reason for the exit.
        if not holders:
            return
        deadline = time.monotonic() + (self.close_timeout if timeout is None else timeout)
        attempts.wait_for_others(holders, remaining(deadline))
        for holder in holders:
            _close(holder, deadline)

    def _execution_pool(self) -> ExecutionPool:
        # Evaluated late: worker_init is sent before the worker resolves its execution pool and concurrency.
        return self._unseen if self._worker is None else lifecycle.execution_pool(self._worker)

    def _setting(self, name: str) -> Any:
        for app in self._apps:
            return read_setting(app.conf, name, None)
        return None

    def record_failure(self, error: Exception) -> None:
        """Make every later opening of a resource raise an error, until a worker starts.

        Args:
            error: The exception.
        """
        self.shared.failure = error

    def worker_starts(self, worker: Any) -> None:
        """Prepare resources for children to inherit; called in the parent, before the first child.

        Args:
            worker: The sender of ``worker_init``.

        Raises:
            ConfigurationError: A setting is unknown or malformed.
        """
        if self._worker is not None and self._serves(self._worker) and not self._serves(worker):
            # A worker of another app in the same process: pool sizes follow this app's own worker.
            return
        self._worker = worker
        self.shared.failure = None
        lifecycle.keep_limits(worker)
        with sharing.unharmed():
            for app in self._apps:
                _register_with_worker(app)
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
        """Close everything, unless ``worker`` serves another app and this app's own worker still runs here.

        Args:
            worker: The sender of ``worker_shutdown``.
        """
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
        """Note that this process runs tasks; opens and prepares nothing."""
        if self._worker is None:
            # A spawned child never sees worker_init; only prefork spawns.
            self._unseen = ExecutionPool("prefork", 1)
            self.collector.share(sharing.found_board(self._number))
        with sharing.unharmed():
            index = sharing.child_index()
            if index is not None:
                self.collector.join(index)

    def worker_stops(self) -> None:
        """Log the open resources that the shutdown will close, if any."""
        open_here = [resource.name for resource in self.resources if resource.is_open]
        if open_here:
            logger.info("worker shutting down: closing %s within %.1f s", ", ".join(open_here), self.close_timeout)

    def __enter__(self) -> WorkerPools:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<WorkerPools {self.resources!r}>"


def _close(holder: Holder[Any], deadline: float) -> None:
    def close() -> None:
        try:
            holder.close(remaining(deadline))
        except Exception:
            logger.exception("could not close %r", holder)

    # A healthy close gets a moment even when no time is left.
    if not run_bounded(close, max(remaining(deadline), 0.25)):
        logger.warning("closing %r timed out; its connections close with the process", holder)
