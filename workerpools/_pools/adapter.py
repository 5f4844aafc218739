"""The adapter interface: the protocol to implement, and the object to report to."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any, Protocol, TypeVar

from workerpools._pools.limits import Limit
from workerpools._pools.settings import Setting
from workerpools._pools.shared import UNKNOWN, ExecutionPool
from workerpools._process import event_loop
from workerpools._process.descriptors import Descriptors
from workerpools._process.flows import flow
from workerpools._run.attempts import MAX_EFFECTS, Attempt, Effect, current, line, note_effect, note_failure
from workerpools._run.budget import Budget
from workerpools._run.events import CONNECTIONS, EventKind, Listeners
from workerpools._run.failure import Failure, Noted, Phase, noted_of
from workerpools._stats.meter import Lease, Meter
from workerpools.errors import ConfigurationError

__all__ = ["Adapter", "Opening"]

T = TypeVar("T")

_log = logging.getLogger(CONNECTIONS)


def _nothing() -> None:
    """Do nothing."""


_new = object.__new__


class Opening:
    """One value in the process of being opened and used: its environment, and the place to report to.

    Passed to :meth:`Adapter.open`, which passes it on to the code that observes the value. All methods may be called
    from any thread of the process that opened the value, and none blocks on the network.

    Attributes:
        resource: The resource's name, for messages.
        execution_pool: The execution pool of this process, which determines pool sizes.
        descriptors: The value's sockets, so that a forked child can discard them.
        notice: Call it without arguments before a connection is checked out, if users keep the value and use it without
            the resource. It calls :meth:`Adapter.recycle` if a recycle was requested.
        ended: Call it without arguments after the user has closed the value: the next use opens another one.
        broken: Call it without arguments if the value can no longer be used: it is recycled at the next use, as by
            :meth:`workerpools.WorkerPools.recycle`.
        wait: Call it without arguments when a caller begins to wait for a connection; returns the :class:`Lease`.
        budget: The process's budget for replays. Use :meth:`replay`, which respects the task's policy as well.
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
        broken: Callable[[], object] = _nothing,
    ) -> None:
        self.resource = resource
        self.execution_pool = execution_pool
        self.descriptors = descriptors or Descriptors()
        self.notice = notice
        self.ended = ended
        self.broken = broken
        self._listeners = listeners or Listeners()
        self.budget = budget or Budget()
        #: The open connections without a socket of their own.
        self._without_socket = 0
        meter = meter or Meter()
        self._meter = meter
        #: Begins a lease with the wait for a connection.
        self.wait: Callable[[], Lease] = partial(Lease, meter)

    # Connections.

    def connected(self, connection: Any, detail: str = "") -> None:
        """Report a new connection of the value.

        Args:
            connection: Anything with a ``fileno()``, or a connection passed to :meth:`Descriptors.look` before. Held
                weakly where its type allows that.
            detail: Text for the event, without secrets.
        """
        self.descriptors.add(connection)
        self._meter.opened()
        self._listeners.emit(EventKind.CONNECTION_OPENED, self.resource, detail)

    def opened(self, detail: str = "") -> None:
        """Report a new connection without a socket of its own (a file, an embedded database).

        Args:
            detail: Text for the event, without secrets.
        """
        self._without_socket += 1
        self._meter.opened()
        self._listeners.emit(EventKind.CONNECTION_OPENED, self.resource, detail)

    @property
    def open_connections(self) -> int:
        """The number of connections that are open, also where an interruption kept one from being reported."""
        return self.descriptors.count() + self._without_socket

    def disconnected(self, connection: object, detail: str = "", reason: str = "", age: float | None = None) -> None:
        """Report a closed connection.

        Args:
            connection: The object passed to :meth:`connected`; any other one without a socket.
            detail: Text for the event, without secrets.
            reason: ``idle``, ``lifetime``, ``stale``, ``recycled`` or ``shutdown``; any other one counts as ``other``.
                Inside :meth:`closing` its reason takes precedence.
            age: The time since the connection was opened, in seconds; None if unknown.
        """
        if self.descriptors.connections.pop(id(connection), None) is None and self._without_socket:
            self._without_socket -= 1
        why = self._meter.closed(reason, age)
        # Rarely observed, and after a broken connection the decision about a replay is waiting.
        if self._listeners.audience[EventKind.CONNECTION_CLOSED] or _log.isEnabledFor(logging.DEBUG):
            self._listeners.emit(EventKind.CONNECTION_CLOSED, self.resource, detail, reason=why)

    def replaced(self, reason: str) -> None:
        """Report that an idle connection is replaced at checkout.

        Args:
            reason: As for :meth:`disconnected`, such as ``stale``.
        """
        self._listeners.emit(EventKind.CONNECTION_REPLACED, self.resource, reason=reason)

    def closing(self, reason: str) -> AbstractContextManager[None]:
        """Return a context manager in which connections are counted as closed for ``reason``.

        Args:
            reason: As for :meth:`disconnected`.
        """
        return self._meter.closing(reason)

    def limited(self, limit: int) -> None:
        """Report the maximum number of connections.

        Args:
            limit: The maximum; 0 for no limit.
        """
        self._meter.limited(limit)

    def created(self, seconds: float) -> None:
        """Report the time taken to open a connection.

        Args:
            seconds: The time with TLS handshake and log-in, in seconds.
        """
        self._meter.created(seconds)

    def checked(self, *, alive: bool) -> None:
        """Report a check of an idle connection. It only counts: replacing a dead connection is up to the adapter.

        Args:
            alive: Whether the connection passed the check.
        """
        self._meter.checked(alive=alive)

    def unbatched(self) -> None:
        """Report a transaction whose first statement took a round trip of its own, although the adapter batches."""
        self._meter.count("unbatched")

    # Leases: :meth:`wait` begins one, with the wait for a connection.

    def lease(self, reclaim: Callable[[], bool] | None = None) -> Lease:
        """Begin a lease of a connection that is in use at once, for clients that cannot observe the wait for it.

        Args:
            reclaim: See :meth:`Lease.acquired`.

        Returns:
            The lease; call its :meth:`Lease.returned` at the end of the use.
        """
        return self._meter.taken(reclaim)

    def require_loop(self) -> None:
        """Refuse a use outside the process's event loop, where an asynchronous client's connections live.

        Raises:
            RuntimeError: The calling thread runs another loop, or none.
        """
        if not event_loop.is_here():
            raise RuntimeError(
                f"the resource {self.resource!r} lives on this process's own event loop, and the caller does not run "
                "there: use it in an async body, or in a coroutine that pools.run() runs"
            )

    def endless_wait(self, *, nested: bool = False) -> str:
        """Return why a wait for a connection can never end; an empty string if it may.

        It cannot while the calling thread itself has acquired all connections up to the limit (:meth:`limited`), for
        its attempt or the enclosing ones.

        Args:
            nested: Whether to look only for an enclosing attempt among them. The attempt itself may have given a
                connection to another thread.
        """
        attempt, limit, thread = current(), self._meter.limit, flow()
        own, leases = line(attempt), self._meter.held_since(math.inf)
        if not limit or len(leases) < limit:
            return ""
        holders: dict[Attempt, None] = {}
        for lease in leases:
            if lease.attempt not in own or lease.thread != thread:
                return ""
            holders[lease.attempt] = None
        if list(holders) == [attempt]:
            return "" if nested else f"all {limit} connections of this process's pool are held by this very run"
        names = ", ".join(dict.fromkeys(holder.task or "a task" for holder in holders))
        return (
            f"all {limit} connections of this process's pool are held by runs that end only after this one, which is "
            f"nested in them ({names})"
        )

    # Failures and effects.

    def failed(
        self, error: BaseException, failure: Failure | None, *, phase: Phase | None = None, deadline: bool = False
    ) -> None:
        """Record the meaning of an exception that is about to be raised, on the exception and in the attempt.

        Args:
            error: The exception. It is never replaced or wrapped.
            failure: The failure, assigned to this resource unless it names one; None if the client's error is not a
                connection failure.
            phase: The operation that failed; the phase of ``failure`` if None.
            deadline: Whether the task's deadline ended the operation: the task then fails with its own time limit.
        """
        if failure is not None and not failure.resource:
            failure = replace(failure, resource=self.resource)
        if failure is not None and noted_of(error) is None:
            self._meter.failed(failure.kind)
        phase = phase or (Phase.STATEMENT if failure is None else failure.phase)
        note_failure(error, Noted(failure, phase, deadline, self.budget, self._listeners))

    def effect(self, what: str, unless: Callable[[], bool] | None = None) -> Effect:
        """Record an irreversible effect, before it happens.

        It counts for the attempt of the calling context and its enclosing ones. In a thread without an attempt, it
        counts for all attempts of the process: any of them may have started the thread.

        Args:
            what: A short phrase without secrets: ``"POST by 'api'"``.
            unless: For an effect that only shows later: see :class:`Effect`.

        Returns:
            The effect; see :meth:`Effect.withdraw`.
        """
        # Without the call of the constructor, as every COMMIT comes here.
        effect = _new(Effect)
        effect.what, effect.unless = what, unless
        attempt = current()
        if attempt is None or attempt.parent is not None or len(attempt.noted_effects) >= MAX_EFFECTS:
            note_effect(effect)
        else:
            attempt.noted_effects = (*attempt.noted_effects, effect)
        return effect

    def replay(self, error: BaseException, **fields: object) -> bool:
        """Request permission to send a failed request again at once; if granted, it is paid for and reported.

        The task's policy and budget decide; outside an attempt, the budget alone. Call it only for a request that is
        safe to repeat.

        Args:
            error: The exception passed to :meth:`failed`.
            fields: Fields of the event, without secrets.

        Returns:
            Whether the request may be sent again.
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
        """Report that the outcome of a commit with a lost acknowledgement was resolved.

        Args:
            outcome: The outcome, for the event, such as ``committed``.
        """
        self._listeners.emit(EventKind.COMMIT_RESOLVED, self.resource, outcome=outcome)


class Adapter(Protocol[T]):
    """The integration of one client library: prepares, opens, closes and classifies.

    An adapter holds only the declaration, with which each process opens its own value. Subclass it and override the
    methods that differ; :mod:`workerpools.adapter` lists when, in which process and in which thread each is called.

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
        kind: The kind of server, in at most 16 bytes: ``"http"``, ``"database"``, ``"cache"``. Exporters name their
            metrics by it.
        server: The fixed host and port, for exporters; None if there is not exactly one.
        libraries: The top-level packages of the client and its drivers. Their exceptions may mask another one during a
            clean-up.
        settings: The settings that :meth:`from_settings` reads, from the app's configuration or the environment. They
            are checked when tasks are bound.
        leak_after: The time after which a connection in use is reported with its stack, in seconds; None for the
            setting ``workerpools_leak_after``.
        on_open: The user's function, called with every value right after :meth:`open` has returned it, before its first
            use. If it raises, the value is closed again, and the error is one of opening.
        unseen_effects: Whether uses of the value may have effects that are not reported. Every attempt that uses it has
            an effect then.
        event_attributes: The attributes by which the library recognizes objects with events. Asking a handle for one
            of them raises an error that says ``on_open``.
    """

    kind: str = ""
    server: tuple[str, int] | None = None
    libraries: Sequence[str] = ()
    settings: Sequence[Setting] = ()
    leak_after: float | None = None
    on_open: Callable[[T], object] | None = None
    unseen_effects: bool = False
    event_attributes: Sequence[str] = ()

    def prepare(self) -> None:
        """Build everything that needs no socket (a TLS context, the driver's import).

        Called in a worker's main process before it forks, so that every child inherits the result. Not called in
        scripts: ``open`` must work without it.

        Raises:
            Exception: Logged; ``open`` should raise the same error in the task.
        """
        return

    def open(self, opening: Opening) -> T:
        """Return a new value for this process.

        Called on first use, in the task's thread, under a lock: once per process.

        Args:
            opening: The object to which the value reports connections, leases, failures and effects.

        Returns:
            The value.

        Raises:
            Exception: Raised unchanged in the task, with a note that names the resource. The next use tries again.
        """
        ...

    def close(self, value: T, timeout: float) -> None:
        """Close ``value`` and its connections.

        Called once per value: at shutdown, by ``close()``, or after another value has replaced it. Must work for a
        value that failed half-way.

        Args:
            value: The value.
            timeout: The longest wait for work in flight, in seconds.

        Raises:
            Exception: Raised by ``close()``; logged otherwise.
        """
        ...

    def discard(self, value: T) -> None:
        """Drop an inherited value in a forked child, without a byte to its peers.

        Called right after the fork, once the sockets of which :class:`Opening` knows are replaced. What the value still
        holds then are sockets that nobody reported, and threads that the child does not have. Must not wait, and must
        not take a lock that another thread of the parent may have held.

        Args:
            value: The parent's value. It is never finalized.

        Raises:
            Exception: Logged.
        """
        return

    def recycle(self, value: T, since: float) -> bool:
        """Replace the connections of ``value``, each as soon as it is idle: work in flight is not disturbed.

        Called at the next use after :meth:`workerpools.WorkerPools.recycle`, in the thread of that use.

        Args:
            value: The value.
            since: The time of the request, on the clock of :func:`time.monotonic`. Connections opened later may stay.

        Returns:
            Whether the replacement is done or in progress. If False, the next attempt gets a new value, and this one is
            closed after the attempts that use it have ended.

        Raises:
            Exception: Logged, and treated like False.
        """
        return False

    def attached(self, value: T) -> Iterable[tuple[str, object]]:
        """Return what user code may have attached to ``value``: listeners, hooks, changed options.

        Called after ``on_open``, and again once another value has replaced this one: what was added in between is lost,
        and a warning says so. Must not use the network.

        Args:
            value: The value.

        Returns:
            Pairs of a name for messages and the attached object, which is compared by ``==``.
        """
        return ()

    def capacity(self, execution_pool: ExecutionPool) -> int | None:
        """Return the most connections that one process may have open to the server at a time.

        From the declaration alone: called in a worker's main process and by ``celery pools budget``, without a value.

        Args:
            execution_pool: The execution pool of the process.

        Returns:
            The number; 0 if nothing limits it; None if there is no server that counts them.

        Raises:
            Exception: Logged, and treated like None.
        """
        return None

    def limits(self, value: T, resource: str) -> Sequence[Limit]:
        """Ask the server how many connections its clients may open.

        Called by ``celery pools budget`` in a process of its own, in a thread that is given up after a while; never in
        a worker.

        Args:
            value: The value.
            resource: The resource's name.

        Returns:
            Every limit that these connections count against. One that cannot be found out has :attr:`Limit.unknown`.

        Raises:
            Exception: Told to the user as the reason for which the limits are unknown: by its type alone, as its text
                may have secrets.
        """
        return ()

    def classify(self, error: BaseException, earlier: Sequence[Failure]) -> Failure | None:
        """Classify an exception of this library that was not reported to :meth:`Opening.failed`.

        Called in the attempt's thread after it has failed. An unclassified exception is raised, and nothing runs again.

        Args:
            error: The exception.
            earlier: The failures reported earlier in the attempt, for an error that is merely a consequence.

        Returns:
            The failure; None if ``error`` is not a connection failure, or unknown.

        Raises:
            Exception: Logged, and treated like None.
        """
        return None

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Adapter[T]:
        """Return an adapter configured by an app's settings.

        See :func:`workerpools.bases.from_settings`. Called once per app, as late as possible, because settings may
        change until then.

        Args:
            settings: The parsed settings by name, without the prefix ``workerpools_``; only those that are set.

        Raises:
            ConfigurationError: A required setting is missing.
        """
        raise ConfigurationError(
            f"{cls.__name__} cannot be configured by settings: declare it, pools.add({cls.__name__}(…))"
        )

    @classmethod
    def classify_unwatched(cls, error: BaseException) -> Failure | None:
        """Classify an exception of this library, raised by a client that no resource has opened.

        Called by :func:`workerpools.failures.classify`.

        Args:
            error: The exception.

        Returns:
            The failure; None if ``error`` is not a connection failure.
        """
        return None

    def describe(self) -> str:
        """Return a short description of the declaration for bug reports, without secrets."""
        return type(self).__name__
