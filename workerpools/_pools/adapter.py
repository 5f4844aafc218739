"""The adapter's side of a resource: what it implements, and what it reports to."""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any, Generic, Protocol, TypeVar, cast

from workerpools._pools.settings import Setting
from workerpools._pools.shared import UNKNOWN, ExecutionPool
from workerpools._process.descriptors import Descriptors
from workerpools._run.attempts import MAX_EFFECTS, Effect, current, note_effect, note_failure
from workerpools._run.budget import Budget
from workerpools._run.events import CONNECTIONS, EventKind, Listeners
from workerpools._run.failure import Failure, Noted, Phase, noted_of
from workerpools._stats.meter import Lease, Meter
from workerpools.errors import ConfigurationError

__all__ = ["Adapter", "FunctionAdapter", "Opening"]

T = TypeVar("T")

_log = logging.getLogger(CONNECTIONS)


def _nothing() -> None:
    """Do nothing."""


class Opening:
    """One value that an adapter opens: its terms, and the place for everything that becomes of it.

    Given to :meth:`Adapter.open`, which hands it to whatever watches the value. Every method may be called from any
    thread of the process that opened the value, and none blocks on the network.

    Attributes:
        resource: The resource's name, for messages.
        execution_pool: What runs the tasks of this process: sizes follow from it.
        descriptors: The value's sockets, so that a forked child can discard them.
        notice: Call it when a connection is about to be taken, where the value is kept and used without asking the
            resource for it: it has :meth:`Adapter.recycle` called if recycling was asked for.
        ended: Call it when the value was closed by its user: the next use opens another.
    """

    def __init__(
        self,
        resource: str,
        execution_pool: ExecutionPool = UNKNOWN,
        descriptors: Descriptors | None = None,
        listeners: Listeners | None = None,
        budget: Budget | None = None,
        meter: Meter | None = None,
        *,
        notice: Callable[[], object] = _nothing,
        ended: Callable[[], object] = _nothing,
    ) -> None:
        self.resource = resource
        self.execution_pool = execution_pool
        self.descriptors = descriptors or Descriptors()
        self.notice = notice
        self.ended = ended
        self._listeners = listeners or Listeners()
        self.budget = budget or Budget()
        meter = meter or Meter()
        self._meter = meter
        #: Begins a lease with the wait for a connection; returns the :class:`Lease`.
        self.wait: Callable[[], Lease] = partial(Lease, meter)

    # Connections.

    def connected(self, connection: Any, detail: str = "") -> None:
        """Report a connection that the value opened.

        Args:
            connection: Anything with a ``fileno()``, or a connection that :meth:`Descriptors.look` was asked about.
                Held weakly.
            detail: Goes with the event.
        """
        self.descriptors.add(connection)
        self.opened(detail)

    def opened(self, detail: str = "") -> None:
        """Report a connection without a socket of its own (a file, an embedded database)."""
        self._meter.opened()
        self._listeners.emit(EventKind.CONNECTION_OPENED, self.resource, detail)

    def disconnected(self, connection: object, detail: str = "", reason: str = "", age: float | None = None) -> None:
        """Report that the value closed a connection.

        Args:
            connection: What :meth:`connected` was told.
            detail: Goes with the event.
            reason: Why: ``idle``, ``lifetime``, ``stale``, ``recycled``, ``shutdown``; else it counts as ``other``.
            age: Seconds that the connection was open; None where that is not known.
        """
        self.descriptors.connections.pop(id(connection), None)
        why = self._meter.closed(reason, age)
        # Few listen to that, and a connection that breaks is on its way to a decision.
        if self._listeners.audience[EventKind.CONNECTION_CLOSED] or _log.isEnabledFor(logging.DEBUG):
            self._listeners.emit(EventKind.CONNECTION_CLOSED, self.resource, detail, reason=why)

    def replaced(self, reason: str) -> None:
        """Report that an idle connection is replaced as it is wanted, because it is ``stale``, for one."""
        self._listeners.emit(EventKind.CONNECTION_REPLACED, self.resource, reason=reason)

    def closing(self, reason: str) -> AbstractContextManager[None]:
        """Have whatever is closed in the block counted as closed for ``reason``."""
        return self._meter.closing(reason)

    def limited(self, limit: int) -> None:
        """Report how many connections may be open; 0 for any number."""
        self._meter.limited(limit)

    def created(self, seconds: float) -> None:
        """Report how long opening a connection took, with TLS and log-in, in seconds."""
        self._meter.created(seconds)

    def checked(self, *, alive: bool) -> None:
        """Report a check of an idle connection, and replace the connection if it was found dead."""
        self._meter.checked(alive=alive)

    # Leases: :meth:`wait` begins one, with the wait for a connection.

    def lease(self, reclaim: Callable[[], bool] | None = None) -> Lease:
        """Begin a lease of a connection that is in use at once, where nothing tells of the wait for it.

        Args:
            reclaim: See :meth:`Lease.acquired`.
        """
        return self._meter.taken(reclaim)

    # Failures and effects.

    def failed(
        self, error: BaseException, failure: Failure | None, *, phase: Phase | None = None, deadline: bool = False
    ) -> None:
        """Note what is known of an exception that is about to be raised: on it, and in the attempt.

        Args:
            error: The exception. Never replaced nor wrapped.
            failure: What it proves, of this resource if it names none; None if it is no failure of a connection,
                though the client raised it.
            phase: What was being done; that of ``failure`` if None.
            deadline: Whether the task's deadline ended it: the task then fails with its own time limit.
        """
        if failure is not None and not failure.resource:
            failure = replace(failure, resource=self.resource)
        if failure is not None and noted_of(error) is None:
            self._meter.failed(failure.kind)
        phase = phase or (Phase.STATEMENT if failure is None else failure.phase)
        note_failure(error, Noted(failure, phase, deadline, self.budget, self._listeners))

    def effect(self, what: str) -> Effect:
        """Note that something leaves which cannot be taken back; see :meth:`Effect.withdraw`.

        It counts for the attempt of the calling context and for those it runs inside of; in a thread without an
        attempt for every attempt of the process, since any of them may have started the thread.

        Args:
            what: A short phrase without secrets: ``"POST by 'api'"``.
        """
        effect = Effect(what)
        attempt = current()
        if attempt is None or attempt.parent is not None or len(attempt.noted_effects) >= MAX_EFFECTS:
            note_effect(effect)
        else:
            attempt.noted_effects = (*attempt.noted_effects, effect)
        return effect

    def replay(self, error: BaseException, **fields: object) -> bool:
        """Ask whether a request that failed with ``error`` may be sent again now; pay for it, and report it.

        Policy and budget of the task decide, outside an attempt the budget alone. That repeating is safe is the
        adapter's to know.

        Args:
            error: The exception that :meth:`failed` was told.
            fields: Go with the event.
        """
        noted = noted_of(error)
        if noted is None or noted.failure is None:
            return False
        attempt = current()
        if attempt is None or attempt.delivery is None:
            allowed = self.budget.take(timed_out=noted.failure.timed_out)
        else:
            allowed = attempt.delivery.take_replay(noted)
        if allowed:
            kind = noted.failure.kind.value
            self._listeners.emit(EventKind.REQUEST_REPLAYED, self.resource, **fields, kind=kind)
        return allowed

    def resolved(self, outcome: str) -> None:
        """Report that the outcome of a commit whose acknowledgement was lost was found out."""
        self._listeners.emit(EventKind.COMMIT_RESOLVED, self.resource, outcome=outcome)


class Adapter(Protocol[T]):
    """How the object of one library is prepared, opened, closed and judged.

    An adapter holds the declaration alone. Each process opens a value of its own through it. Subclass it, and override
    what differs; :mod:`workerpools.adapter` tells when each method is called, in which process and thread.

    >>> import socket
    >>> from workerpools import Adapter, WorkerPools
    >>> class Line(Adapter[socket.socket]):
    ...     kind = "line"
    ...     def __init__(self, address):
    ...         self.server = address
    ...     def open(self, opening):
    ...         connection = socket.create_connection(self.server, timeout=3)
    ...         opening.connected(connection)
    ...         return connection
    ...     def close(self, value, timeout):
    ...         value.close()
    ...     def describe(self):
    ...         return f"Line {self.server[0]}:{self.server[1]}"
    >>> with socket.create_server(("127.0.0.1", 0)) as server, WorkerPools() as pools:
    ...     line = pools.add(Line(server.getsockname()), name="line")
    ...     line.get().getpeername() == server.getsockname()
    True

    Attributes:
        kind: What it connects to, in at most 16 bytes: ``"http"``, ``"database"``, ``"cache"``; exporters choose
            their names by it.
        server: The host and port that it always connects to, for exporters; None if there is no such one.
        libraries: Top-level packages whose exceptions are this client's: the client's own and its drivers'. What they
            raise over another exception may mask it.
        settings: The settings that :meth:`from_settings` reads: checked when tasks are bound, and read from the
            environment, too.
        leak_after: Seconds after which a connection in use is reported with its stack; None for the setting
            ``workerpools_leak_after``.
    """

    kind: str = ""
    server: tuple[str, int] | None = None
    libraries: Sequence[str] = ()
    settings: Sequence[Setting] = ()
    leak_after: float | None = None

    def prepare(self) -> None:
        """Build what can be built without a socket (a TLS context, a driver's import).

        Called in a worker's main process before it forks, where every child inherits it; not called at all in a
        script. ``open`` must work without it.

        Raises:
            Exception: Logged; ``open`` is expected to raise it in the task.
        """
        return

    def open(self, opening: Opening) -> T:
        """Return a new value for this process.

        Called on first use, in the thread of the task, under a lock: once per process.

        Args:
            opening: Where the value reports its connections, leases, failures and effects.

        Raises:
            Exception: Raised in the task as it is, with a note that names the resource; the next use tries again.
        """
        ...

    def close(self, value: T, timeout: float) -> None:
        """Close ``value`` and its connections.

        Called once per value, in a thread of its own: at shutdown, by ``close()``, or where another value has taken
        its place. Must work after a failure half-way.

        Args:
            value: The value.
            timeout: Seconds to wait for work in flight at most.
        """
        ...

    def recycle(self, value: T, since: float) -> bool:
        """Have the connections of ``value`` replaced, each once it is idle: what is in flight ends undisturbed.

        Called at the next use after :meth:`workerpools.WorkerPools.recycle`, in whichever thread that is.

        Args:
            value: The value.
            since: When that was asked for, on the clock of :func:`time.monotonic`. What was opened later may stay.

        Returns:
            Whether that is done or on its way. If not, the next attempt gets another value, and this one is closed
            once the attempts that have used it have ended.
        """
        return False

    def classify(self, error: BaseException, earlier: Sequence[Failure]) -> Failure | None:
        """Return what an exception of this library proves; None if it is no failure of a connection, or not known.

        Called after an attempt has failed, in its thread, for exceptions that :meth:`Opening.failed` was not told of.
        Without an answer the exception is raised, and nothing is run again.

        Args:
            error: The exception.
            earlier: The failures that the attempt's resources have noted, for an error that merely follows from one.
        """
        return None

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Adapter[T]:
        """Return the adapter that an app's settings declare, for a base that needs no declaration.

        See :func:`workerpools.bases.from_settings`. Called late, once per app: settings may change until then.

        Args:
            settings: Those that are set, by name without ``workerpools_``, parsed.

        Raises:
            ConfigurationError: One that is needed is missing.
        """
        raise ConfigurationError(
            f"{cls.__name__} cannot be made from settings: declare it, pools.add({cls.__name__}(…))"
        )

    @classmethod
    def classify_unwatched(cls, error: BaseException) -> Failure | None:
        """Return what an exception of this library proves where nothing was watched; None if it is no such failure.

        For :func:`workerpools.failures.classify`, of clients that no resource has opened.

        Args:
            error: The exception.
        """
        return None

    def describe(self) -> str:
        """Return a short name of the declaration for a bug report, without secrets."""
        return type(self).__name__


class FunctionAdapter(Adapter[T], Generic[T]):
    """An adapter made from a function that returns the value, or a generator function that yields it once.

    The code after the ``yield`` closes the value; it never runs in a forked child for a value of the parent.

    Args:
        factory: Called without arguments, once per process.
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
        self._openings: dict[int, tuple[Opening, float]] = {}

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
        opening._meter.opened()
        self._openings[id(value)] = (opening, time.monotonic())
        return value

    def close(self, value: T, timeout: float) -> None:
        opening, since = self._openings.pop(id(value), (None, 0.0))
        if opening is not None:
            opening._meter.closed(age=time.monotonic() - since)
        running = self._running.pop(id(value), None)
        if running is not None:
            next(running, None)
        elif self._close is not None:
            self._close(value)
        elif callable(own := getattr(value, "close", None)):
            own()

    def describe(self) -> str:
        return str(getattr(self._factory, "__name__", type(self._factory).__name__))
