"""A declared connection-holding object: one live value a process, opened on first use."""

from __future__ import annotations

import itertools
import logging
import os
import threading
import time
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Generic, NoReturn, TypeVar, overload

from workerpools._pools.adapter import Adapter, Opening
from workerpools._pools.shared import Shared
from workerpools._process import fork
from workerpools._process.bounded import remaining, run_bounded
from workerpools._process.descriptors import Descriptors
from workerpools._run.attempts import Attempt, current, line
from workerpools._run.events import EventKind
from workerpools._run.failure import Failure, Noted, is_interruption, know_libraries
from workerpools._stats.meter import Meter
from workerpools._text import add_note
from workerpools._values import WEEK, check_name, seconds
from workerpools.errors import ConfigurationError, OpenTimeoutError

__all__ = ["Overridable", "Resource"]

T = TypeVar("T")

logger = logging.getLogger("workerpools")

# How long a thread waits for another one that is opening the same value, in seconds. Adapters connect lazily or within
# a connect timeout of a few seconds, so this is reached only when a factory of the user's hangs.
OPEN_TIMEOUT = 60.0

# How long a task waits for the end of a value whose place another one takes, in seconds: a good-bye over a network that
# is gone must not use up its time.
END_TIMEOUT = 1.0


class Overridable(Generic[T]):
    """A stack of stand-ins for a value, for tests."""

    def __init__(self) -> None:
        self._overrides: tuple[T, ...] = ()
        #: The class attribute it stands at, for messages.
        self._where = ""

    @contextmanager
    def override(self, value: T) -> Generator[T, None, None]:
        """Use ``value`` in place of the resource's own, in every thread of this process, until the block ends.

        The stand-in is the caller's: it is not closed. Blocks may be nested; the innermost counts.
        """
        # A one-element slot makes the entry itself identifiable, even if the same value is pushed twice.
        self._overrides = (*self._overrides, value)
        depth = len(self._overrides)
        try:
            yield value
        finally:
            self._overrides = (*self._overrides[: depth - 1], *self._overrides[depth:])

    if not TYPE_CHECKING:  # a type checker would believe every name

        def __getattr__(self, name: str) -> Any:
            if hasattr(type(self), name):
                # A property of this class raised an AttributeError, which is to come out as it is.
                return object.__getattribute__(self, name)
            hint = "" if name.startswith("_") else f"; {self._misplaced(name)}"
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}{hint}", name=name, obj=self)

    def _misplaced(self, name: str) -> str:
        """Return what to write in place of ``name`` on the handle."""
        # Asked for on an object that is half made, too, as copy does.
        attribute = self.__dict__.get("_name") or "resource"
        where = self.__dict__.get("_where") or attribute
        return f"{where} is the handle, not the value: write {where}.get().{name}, or self.{attribute}.{name} in a body"


class _Live(Generic[T]):
    """A value that is open in this process.

    Attributes:
        value: The value.
        opening: What its adapter was given, whose descriptors are its connections.
        born: When opening began, or when its connections were replaced last, on the clock of :func:`time.monotonic`.
        number: Its place in the order in which this process has opened values.
        version: The version of the requests to recycle that it is known to be up to date with.
        users: The attempts that began with it and run.
        outside: Whether it was given out outside of an attempt, so that nothing tells when its use ends.
    """

    __slots__ = ("born", "number", "opening", "outside", "users", "value", "version")

    def __init__(self, value: T, opening: Opening, born: float) -> None:
        self.value = value
        self.opening = opening
        self.born = born
        self.number = next(_numbers)
        self.version = -1.0
        self.users: set[Attempt] = set()
        self.outside = False

    @property
    def is_free(self) -> bool:
        """Whether nobody uses it."""
        return not self.outside and not self.users


_numbers = itertools.count(1)


class Resource(Overridable[T]):
    """One declared connection-holding object, and the value of it that this process has.

    As a class attribute of a task base it gives the value (``self.api``); on the class itself, or kept in a variable,
    it is a handle. Made by :meth:`workerpools.WorkerPools.add`.

    >>> from workerpools import WorkerPools
    >>> pools = WorkerPools()
    >>> prices = pools.add(lambda: {"teapot": 12}, name="prices")
    >>> prices
    <Resource 'prices' FunctionAdapter closed pid=...>
    >>> prices.get()
    {'teapot': 12}
    >>> with prices.override({"teapot": 10}):
    ...     prices.get()
    {'teapot': 10}
    >>> prices.close()
    """

    #: The WorkerPools it was declared in.
    pools: Any = None

    def __init__(self, shared: Shared, adapter: Adapter[T], name: str | None) -> None:
        super().__init__()
        self.shared = shared
        self.adapter = adapter
        self._recycles = shared.recycles
        self._name = name
        self._live: _Live[T] | None = None
        #: Connections that were inherited by a fork and dropped; None where there was no value to drop.
        self._discarded: int | None = None
        know_libraries(getattr(adapter, "libraries", ()))
        self._forget()
        fork.guard(self)

    def _forget(self) -> None:
        self._lock = threading.RLock()
        self.meter = Meter()
        self._opening: Descriptors | None = None
        self._closing: list[_Live[T]] = []
        #: Values that another one has replaced, each until its last user ends.
        self._retired: list[_Live[T]] = []
        self._asked = 0.0

    @property
    def name(self) -> str:
        """The resource's name: the one it was given, or the attribute it stands at."""
        return self._name or f"({self.adapter.describe()})"

    def __set_name__(self, owner: type, name: str) -> None:
        if self._name is None:
            # A refusal must wait for __init_subclass__: before Python 3.12 what is raised here becomes RuntimeError.
            self._name = name
            # The first owner of a name keeps it.
            self.shared.names.setdefault(name, self)
        self._where = self._where or f"{owner.__name__}.{name}"

    def check_name(self, where: str) -> None:
        """Refuse an attribute name that cannot be published, or that another resource has already.

        Args:
            where: The attribute, for the message.

        Raises:
            ConfigurationError: See above.
        """
        try:
            check_name(self.name, where)
        except ConfigurationError:
            self.shared.resources.remove(self)
            self.shared.names.pop(self.name, None)
            raise
        other = self.shared.names.get(self.name)
        if other is not None and other is not self:
            self.shared.resources.remove(self)
            raise ConfigurationError(
                f"{where}: another resource of the same WorkerPools is named {self.name!r} ({other!r}); "
                "use that one here, or name this one: pools.add(…, name='…')"
            )

    @overload
    def __get__(self, instance: None, owner: type | None = None) -> Resource[T]: ...
    @overload
    def __get__(self, instance: object, owner: type | None = None) -> T: ...
    def __get__(self, instance: Any, owner: type | None = None) -> Resource[T] | T:
        return self if instance is None else self.use()

    def get(self, *arguments: NoReturn, **options: NoReturn) -> T:
        """Return this process's value; the first call in a process opens it.

        Raises:
            TypeError: It takes no arguments: they were meant for a method of the value.
            OpenTimeoutError: Another thread has been opening the value for 60 seconds.
            ConfigurationError: The value's factory asks for the value itself.
            Exception: Whatever the client library raised while opening, with a note that names the resource.
        """
        if arguments or options:
            raise TypeError(f"{type(self).__name__}.get() takes no arguments; {self._misplaced('get(…)')}")
        return self.use()

    def use(self) -> T:
        """Return what :meth:`get` returns, for a descriptor's ``__get__``."""
        if self._overrides:
            return self._overrides[-1]
        attempt = current()
        live: _Live[T] | None = self._live if attempt is None else attempt.values.get(self)
        if live is None:
            live = self._begin(attempt)
        # Most of the time this one look is all that recycling costs.
        elif live.version != self._recycles.cells[0]:
            if attempt is None:
                live = self._begin(attempt)
            else:
                self._renew(live)
        if attempt is None:
            live.outside = True
        return live.value

    def notice(self) -> None:
        """Have connections replaced if that was asked for; see :attr:`Opening.notice`."""
        live = self._live
        if live is not None and live.version != self._recycles.cells[0]:
            self._renew(live)

    def _begin(self, attempt: Attempt | None) -> _Live[T]:
        """Return the value to use from now on, opened if there is none; an attempt keeps it to its end."""
        replaced: _Live[T] | None = None
        opened = False
        if not self._lock.acquire(timeout=OPEN_TIMEOUT):
            raise OpenTimeoutError(f"{self!r}: another thread has been opening it for {OPEN_TIMEOUT:.0f} s")
        try:
            if attempt is not None and self not in attempt.values:
                # Before anything can fail: its adapter is asked about the error then.
                attempt.values[self] = None
                attempt.callbacks.append(self._attempt_ended)
            live = self._live
            outer: _Live[T] | None = None
            if attempt is not None and attempt.parent is not None:
                # One that runs inside of another one goes on with the outer one's value.
                outer = next((found for each in line(attempt) if (found := each.values.get(self))), None)
            if outer is not None:
                live = outer
            elif live is not None and live.version != self._recycles.cells[0] and not self._renew(live):
                self._live, replaced, live = None, live, None
                self._retired.append(replaced)
            if live is None:
                live, opened = self._open(attempt), True
            if attempt is not None:
                attempt.values[self] = live
                live.users.add(attempt)
                if attempt.budget is None:
                    attempt.budget = live.opening.budget
        finally:
            self._lock.release()
            if replaced is not None and replaced.is_free:
                self._end(replaced)
        if opened:
            # Told now: right after a fork no code may run that takes a lock, and logging does.
            discarded, self._discarded = self._discarded, None
            if discarded is not None:
                self.shared.listeners.emit(
                    EventKind.VALUE_DISCARDED, self.name, "inherited by a fork", connections=discarded
                )
            self.shared.listeners.emit(EventKind.VALUE_OPENED, self.name)
        return live

    def _open(self, attempt: Attempt | None) -> _Live[T]:
        if self._opening is not None:
            raise ConfigurationError(f"{self!r}: its factory uses the resource that it is to make")
        if self.shared.failure is not None:
            raise self.shared.failure
        born = time.monotonic()
        # From here on a fork knows of the value's connections, even while it is half open.
        self._opening = descriptors = Descriptors()
        shared = self.shared
        try:
            # Its name is final now: an attribute may have given it.
            shared.collector.attach(self)
            self.meter.closes("")
            if (leak_after := self.leak_after) is not None:
                self.meter.leak_after = leak_after
                shared.leaks.watch(self.name, self.meter, shared.listeners)
            opening = Opening(
                self.name,
                shared.execution_pool,
                descriptors,
                shared.listeners,
                shared.budget,
                self.meter,
                notice=self.notice,
                ended=lambda: self._closed_by_user(descriptors),
            )
            live = self._live = _Live(self.adapter.open(opening), opening, born)
            return live
        except Exception as error:
            add_note(error, f"workerpools: while opening the resource {self.name!r} ({self.adapter.describe()})")
            raise
        finally:
            self._opening = None
            if attempt is not None:
                # What a factory acquires for its value lives as long as that, and not as long as the attempt.
                for used in attempt.values:
                    used.meter.disown(attempt, born)

    def _renew(self, live: _Live[T]) -> bool:
        """Have the connections of ``live`` replaced if that was asked for; return whether it can be used on."""
        version = self._recycles.cells[0]
        if live.version == version:
            return True
        with self._lock:
            asked = max(self._asked, self._recycles.at(self.name))
            if asked > live.born:
                if live is not self._live or not self._recycle(live.value, asked):
                    return False
                live.born = asked
                self.shared.listeners.emit(EventKind.VALUE_RECYCLED, self.name)
            live.version = version
        return True

    def _recycle(self, value: T, since: float) -> bool:
        # Not every adapter derives from Adapter.
        recycle = getattr(self.adapter, "recycle", None)
        if recycle is None:
            return False
        try:
            return bool(recycle(value, since))
        except Exception as error:
            if is_interruption(error):
                raise
            logger.exception("%r: recycling failed; closing its value instead", self)
            return False

    def _attempt_ended(self, attempt: Attempt) -> BaseException | None:
        """Count an attempt that has used the resource, take back what it left, and let go of its value."""
        interruption: BaseException | None = None
        left = self.meter.attempt_ended(attempt)
        if left:
            # Loaded by the first attempt that leaves something.
            from workerpools._stats.leaks import give_back

            interruption = give_back(self.name, self.shared.listeners, left, attempt.task)
            self.meter.publish()
        live: _Live[T] | None = attempt.values.get(self)
        if live is not None:
            with self._lock:
                live.users.discard(attempt)
                free = live is not self._live and live in self._retired and live.is_free
            if free:
                self._end(live)
        return interruption

    def _end(self, live: _Live[T]) -> None:
        """Close a value that another one has replaced."""

        def close() -> None:
            try:
                with self.meter.closing("recycled"):
                    self.adapter.close(live.value, self.shared.close_timeout)
            except Exception:
                logger.exception("could not close a value of %r", self)
            finally:
                with self._lock:
                    if live in self._retired:
                        self._retired.remove(live)

        if not run_bounded(close, END_TIMEOUT):
            logger.warning("closing a value of %r takes long; its task does not wait for it", self)

    def ask(self, now: float) -> None:
        """Have this process replace what was opened before ``now``, at the next use.

        Args:
            now: On the clock of :func:`time.monotonic`.
        """
        with self._lock:
            self._asked = now
            if self._live is not None:
                self._live.version = -1.0

    def recycle(self) -> None:
        """Have its connections replaced (see :meth:`workerpools.WorkerPools.recycle`)."""
        self.shared.collector.recycle([self.name])

    def close(self, timeout: float | None = None) -> None:
        """Close this process's value, if it has one; the next use opens another.

        Args:
            timeout: Seconds to wait for work in flight; the setting ``workerpools_close_timeout`` if None.

        Raises:
            ConfigurationError: ``timeout`` is no number, negative, or longer than a week.
        """
        if timeout is not None:
            seconds(timeout, "Resource.close(): timeout", most=WEEK, optional=True)
        with self._lock:
            values, self._retired = self._retired, []
            if self._live is not None:
                values.append(self._live)
                self._live = None
            if not values:
                return
            # Still ours until its last connection is closed: a fork meanwhile must discard it.
            self._closing += values
        self.meter.closes("shutdown")
        deadline = time.monotonic() + (self.shared.close_timeout if timeout is None else timeout)
        with ExitStack() as closing:
            for live in values:
                closing.callback(self._closing.remove, live)
                closing.callback(self._close, live, deadline)
        self.shared.listeners.emit(EventKind.VALUE_CLOSED, self.name)

    def _close(self, live: _Live[T], deadline: float) -> None:
        self.adapter.close(live.value, remaining(deadline))

    def _closed_by_user(self, descriptors: Descriptors) -> None:
        with self._lock:
            # Closing by workerpools lets go of the value first.
            if self._live is None or self._live.opening.descriptors is not descriptors:
                return
            self._live = None
        logger.warning("%r was closed by its user; reopening on next use. Do not close pooled clients.", self)
        self.shared.listeners.emit(EventKind.VALUE_CLOSED, self.name, "by its user")

    def classify(self, error: BaseException, earlier: Sequence[Failure]) -> Noted | None:
        """Return what an exception proves, if its adapter takes it for one of this resource."""
        try:
            failure = self.adapter.classify(error, earlier)
        except Exception:  # somebody else's function: the task's own error matters more
            logger.exception("%r could not classify %s", self, type(error).__name__)
            return None
        if failure is None or failure.resource not in ("", self.name):
            return None
        self.meter.failed(failure.kind)
        shared = self.shared
        return Noted(replace(failure, resource=self.name), failure.phase, False, shared.budget, shared.listeners)

    def pin(self) -> object:
        """Return what must not be finalized in a forked child (see :mod:`workerpools._process.fork`)."""
        return [(held, held.opening.descriptors.pin()) for held in self._held()], self._opening

    def discard(self) -> tuple[object, Sequence[int]]:
        """Forget the inherited value, in a forked child, without a byte to its peer."""
        held = self._held()
        ledgers = [live.opening.descriptors for live in held]
        if self._opening is not None:
            ledgers.append(self._opening)
        kept = (held, ledgers, [ledger.pin() for ledger in ledgers])
        self._live = None
        self._forget()
        inherited = [number for ledger in ledgers for number in ledger.filenos()]
        self.meter.discarded(len(inherited))
        if ledgers:
            self._discarded = len(inherited)
        return kept, inherited

    def _held(self) -> list[_Live[T]]:
        return [*self._closing, *self._retired, *([self._live] if self._live is not None else [])]

    @property
    def kind(self) -> str:
        """What its adapter connects to, such as ``http``; empty where that is not known."""
        return str(getattr(self.adapter, "kind", ""))

    @property
    def leak_after(self) -> float | None:
        """Seconds after which a connection in use is reported with its stack; None for never."""
        own = getattr(self.adapter, "leak_after", None)
        return self.shared.leak_after if own is None else float(own)

    @property
    def is_open(self) -> bool:
        """Whether this process has opened a value of its own."""
        return self._live is not None or bool(self._retired)

    @property
    def opened_as(self) -> int:
        """The place of its value in the order in which this process has opened values; 0 for none."""
        live = self._live
        return 0 if live is None else live.number

    def __repr__(self) -> str:
        if self._overrides:
            state = "overridden"
        elif self.is_open:
            state = "open"
        else:
            state = "closed"
        return f"<Resource {self.name!r} {type(self.adapter).__name__} {state} pid={os.getpid()}>"
