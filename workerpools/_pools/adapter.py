"""What knows how one library's object is opened and closed, and the adapter for anything else."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar, cast

from workerpools._pools.execution import ExecutionPool
from workerpools._process.descriptors import Descriptors
from workerpools._run.budget import Budget
from workerpools._run.events import EventKind, Listeners
from workerpools._run.failure import Failure
from workerpools._stats.meter import Meter

__all__ = ["Adapter", "FunctionAdapter", "Opening"]

T = TypeVar("T")


def _nothing() -> None:
    """Do nothing."""


@dataclass(frozen=True)
class Opening:
    """What an adapter is told when it opens a value, and where it reports the value's connections.

    Attributes:
        resource: The resource's name.
        execution_pool: What runs the tasks of this process: sizes follow from it.
        descriptors: Every connection the value opens is added here, and dropped when it is closed: that is what
            keeps it from crossing a fork.
        listeners: Where events go.
        budget: What pays for replays.
        meter: What counts.
        notice: Has the adapter's :meth:`Adapter.recycle` called, if that was asked for: to be called when a connection
            is about to be taken, by an adapter whose value is kept and used without asking the resource for it.
        ended: Has the next use open another value: to be called when whoever used the value has closed it.
    """

    resource: str
    execution_pool: ExecutionPool
    descriptors: Descriptors
    listeners: Listeners
    budget: Budget = field(default_factory=Budget)
    meter: Meter = field(default_factory=Meter)
    notice: Callable[[], object] = _nothing
    ended: Callable[[], object] = _nothing

    def connected(self, connection: Any, detail: str = "") -> None:
        """Note that the value opened ``connection``, which has a ``fileno()``; ``detail`` goes with the event."""
        self.descriptors.add(connection)
        self.meter.opened()
        self.listeners.emit(EventKind.CONNECTION_OPENED, self.resource, detail)

    def disconnected(self, connection: object, detail: str = "", reason: str = "", age: float | None = None) -> None:
        """Note that the value closed ``connection``.

        Args:
            connection: What :meth:`connected` was told.
            detail: Goes with the event.
            reason: Why, for the statistics: one of their reasons for closing.
            age: For how long the connection was open, in seconds; None where that is not known.
        """
        self.descriptors.drop(connection)
        why = self.meter.closed(reason, age)
        self.listeners.emit(EventKind.CONNECTION_CLOSED, self.resource, detail, reason=why)

    def replaced(self, reason: str) -> None:
        """Note that an idle connection is replaced by another one as it is wanted; it is ``stale``, for one."""
        self.listeners.emit(EventKind.CONNECTION_REPLACED, self.resource, reason=reason)

    def failed(self, failure: Failure) -> None:
        """Count a failure of one of the value's connections."""
        self.meter.failed(failure.kind)


class Adapter(Protocol[T]):
    """How the object of one library is prepared, opened and closed.

    An adapter holds the declaration alone. Each process opens a value of its own through it. It may have an attribute
    ``kind``: what it connects to, ``"http"`` or ``"database"``, by which exporters choose their names. And it may have
    an attribute ``server``: the host and port that it always connects to, None if there is no such one.
    """

    def prepare(self) -> None:
        """Build what can be built without a socket (a TLS context, a driver's import).

        Called in the parent before it forks, where it is inherited by every child; not called at all in a script.
        ``open`` must work without it.
        """
        return

    def open(self, opening: Opening) -> T:
        """Return a new value for this process. Called once a process, under a lock."""
        ...

    def close(self, value: T, timeout: float) -> None:
        """Close ``value`` and its connections; wait at most ``timeout`` seconds for work in flight."""
        ...

    def recycle(self, value: T, since: float) -> bool:
        """Have the connections of ``value`` replaced, each once it is idle: what is in flight ends on it.

        Called at the next use after :meth:`workerpools.WorkerPools.recycle`, in whichever thread that is.

        Args:
            value: The value.
            since: When that was asked for, on the clock of :func:`time.monotonic`. What was opened later may stay.

        Returns:
            Whether that is seen to. If not, the value is closed, and another opened in its place: for the next attempt,
            once those that have used it have ended.
        """
        return False

    def classify(self, error: BaseException, earlier: Sequence[Failure]) -> Failure | None:
        """Return what an exception of this library proves; None if it is no failure of a connection, or not known.

        Asked after an attempt has failed, for exceptions that were not noted when they were raised. Without an answer
        the exception is raised, and nothing is run again.

        Args:
            error: The exception.
            earlier: The failures that the attempt's resources have noted, for an error that merely follows from one.
        """
        return None

    def describe(self) -> str:
        """Return a short name of the declaration for a bug report, without secrets."""
        return type(self).__name__


class FunctionAdapter(Adapter[T], Generic[T]):
    """An adapter made from a function that returns the value, or a generator function that yields it once.

    The code after the ``yield`` closes the value; it never runs in a forked child for a value of the parent.

    Args:
        factory: Called without arguments, once a process.
        close: Called with the value when the process is done with it; for plain functions. Without it the value's
            own ``close()`` is called if it has one.
        connections: Called with the value at a fork; returns the objects with a ``fileno()`` that the value owns, so
            that a child can discard them. Without it the value's own ``fileno()`` is taken if it has one.
    """

    def __init__(
        self,
        factory: Callable[[], T] | Callable[[], Iterator[T]],
        *,
        close: Callable[[T], object] | None = None,
        connections: Callable[[T], Iterable[Any]] | None = None,
    ) -> None:
        self._factory = factory
        self._close = close
        self._connections = connections
        self._running: dict[int, Iterator[T]] = {}
        self._meters: dict[int, tuple[Meter, float]] = {}

    def open(self, opening: Opening) -> T:
        made = self._factory()
        if inspect.isgenerator(made):
            running = cast("Iterator[T]", made)
            value = next(running)
            self._running[id(value)] = running
            # Collecting a suspended generator runs its clean-up: never in a child.
            opening.descriptors.keep(running)
        else:
            value = cast("T", made)
        if (connections := self._connections) is not None:
            opening.descriptors.watch(lambda: connections(value))
        elif hasattr(value, "fileno"):
            opening.descriptors.add(cast(Any, value))
        # One value, one connection: nothing tells of more.
        opening.meter.opened()
        self._meters[id(value)] = (opening.meter, time.monotonic())
        return value

    def close(self, value: T, timeout: float) -> None:
        meter, since = self._meters.pop(id(value), (None, 0.0))
        if meter is not None:
            meter.closed(age=time.monotonic() - since)
        running = self._running.pop(id(value), None)
        if running is not None:
            next(running, None)
        elif self._close is not None:
            self._close(value)
        elif callable(own := getattr(value, "close", None)):
            own()

    def describe(self) -> str:
        return str(getattr(self._factory, "__name__", type(self._factory).__name__))
