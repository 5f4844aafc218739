"""Resources: declared connection holders, with one live value per process, opened on first use."""

from __future__ import annotations

import itertools
import logging
import os
import threading
import time
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, NoReturn, TypeVar, cast, overload

from workerpools._pools.adapter import Adapter, Opening
from workerpools._pools.injection import Injected
from workerpools._pools.shared import ExecutionPool, Shared
from workerpools._process import ends, fork
from workerpools._process.bounded import remaining, run_bounded
from workerpools._process.descriptors import Descriptors
from workerpools._run.attempts import Attempt, current, line, running
from workerpools._run.events import EventKind
from workerpools._run.failure import Failure, Noted, is_interruption, know_libraries
from workerpools._run.threads import of_no_attempt
from workerpools._stats.meter import Meter
from workerpools._text import add_note
from workerpools._values import WEEK, check_name, seconds
from workerpools.errors import ConfigurationError, OpenTimeoutError

__all__ = ["Overridable", "Resource"]

T = TypeVar("T")

logger = logging.getLogger("workerpools")

# The longest wait for another thread that is opening the same value, in seconds. Adapters connect lazily or with a
# connect timeout of a few seconds, so only a hanging user-defined factory reaches this limit.
OPEN_TIMEOUT = 60.0

# The longest wait of a task for the closing of a replaced value, in seconds: a clean close over a dead network must not
# use up the task's time.
END_TIMEOUT = 1.0


class Overridable(Generic[T]):
    """A value that tests can override."""

    def __init__(self) -> None:
        self._overrides: tuple[T, ...] = ()
        #: Its class attribute, for messages.
        self._where = ""

    @contextmanager
    def override(self, value: T) -> Generator[T, None, None]:
        """Replace the resource's value in all threads of this process until the end of the block.

        The replacement is never closed. Blocks may be nested; the innermost one applies.

        Args:
            value: The replacement.
        """
        self._overrides = (*self._overrides, value)
        depth = len(self._overrides)
        try:
            yield value
        finally:
            self._overrides = (*self._overrides[: depth - 1], *self._overrides[depth:])

    def inject(self) -> T:
        """Return the default of a parameter that each run of a task's body gets the value for, as ``self.…`` would.

        >>> from celery import Celery
        >>> from workerpools import PooledTask, WorkerPools
        >>> app = Celery("shop", set_as_current=False)
        >>> prices = WorkerPools(app).add(lambda: {"teapot": 12}, name="prices")
        >>> @app.task(base=PooledTask, name="shop.price")
        ... def price(sku, prices=prices.inject()):
        ...     return prices[sku]
        >>> price("teapot")
        12
        >>> price("teapot", {"teapot": 10})
        10

        Returns:
            A placeholder. Its type is that of the value for type checkers, so that the parameter has the value's type.
        """
        return cast(T, Injected(self))

    if not TYPE_CHECKING:  # a type checker would believe every name

        def __getattr__(self, name: str) -> Any:
            if hasattr(type(self), name):
                # A property of this class raised an AttributeError: let it propagate unchanged.
                return object.__getattribute__(self, name)
            if refusal := self._refusal(name):
                raise ConfigurationError(refusal)
            hint = "" if name.startswith("_") else f"; {self._misplaced(name)}"
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}{hint}", name=name, obj=self)

    def _refusal(self, name: str) -> str:
        """Return why nothing must ask for an attribute of this name; empty for a plain AttributeError."""
        return ""

    def _place(self) -> tuple[str, str]:
        """Return the handle as text, and its attribute's name."""
        # Also called on half-initialized objects, by copy for one.
        attribute = self.__dict__.get("_name") or "resource"
        return self.__dict__.get("_where") or attribute, attribute

    def _misplaced(self, name: str) -> str:
        """Return a hint for the access of a value's attribute on the handle."""
        where, attribute = self._place()
        return f"{where} is the handle, not the value: write {where}.get().{name}, or self.{attribute}.{name} in a body"


class _Live(Generic[T]):
    """A value that is open in this process.

    Attributes:
        value: The value.
        opening: The object passed to its adapter, with the descriptors of its connections.
        attached: What its adapter found attached to it after it was opened.
        born: The start of its opening or last recycling, on the clock of :func:`time.monotonic`.
        number: Its position in the order in which this process has opened values.
        version: The latest version of the recycle requests that it complies with.
        outside: Whether it was used outside an attempt, so that the end of its use is unknown.
        closed: Whether it was closed while attempts were using it; their next use opens another.
    """

    __slots__ = ("attached", "born", "closed", "number", "opening", "outside", "value", "version")

    def __init__(self, value: T, opening: Opening, born: float) -> None:
        self.value = value
        self.opening = opening
        self.attached: list[tuple[str, object]] = []
        self.born = born
        self.number = next(_numbers)
        self.version = -1.0
        self.outside = False
        self.closed = False


_numbers = itertools.count(1)


class Resource(Overridable[T]):
    """A declared connection holder, and this process's value of it.

    As a class attribute of a task base it returns the value (``self.api``); on the class itself, or in a variable, it
    is a handle. Created by :meth:`workerpools.WorkerPools.add`.

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

    #: The WorkerPools that declares it.
    pools: Any = None

    def __init__(self, shared: Shared, adapter: Adapter[T], name: str | None) -> None:
        super().__init__()
        self.shared = shared
        self.adapter = adapter
        self._recycles = shared.recycles
        self._name = name
        self._live: _Live[T] | None = None
        #: The number of inherited connections discarded after a fork; None if there was no value.
        self._discarded: int | None = None
        self._inherited: _Live[T] | None = None
        self._warned = False
        on_open = getattr(adapter, "on_open", None)
        if on_open is not None and not callable(on_open):
            raise ConfigurationError(
                f"{type(adapter).__name__}: on_open is {on_open!r}, not a function of one argument; to call several, "
                "call them in one function"
            )
        know_libraries(getattr(adapter, "libraries", ()))
        self._unseen = bool(getattr(adapter, "unseen_effects", False))
        self._forget()
        fork.guard(self)

    def _forget(self) -> None:
        self._lock = threading.RLock()
        self.meter = Meter()
        self._opening: Descriptors | None = None
        self._closing: list[_Live[T]] = []
        #: Replaced values, each until its last user ends.
        self._retired: list[_Live[T]] = []
        self._asked = 0.0

    def _refusal(self, name: str) -> str:
        adapter = self.__dict__.get("adapter")
        if name not in getattr(adapter, "event_attributes", ()):
            return ""
        where, _ = self._place()
        return (
            f"{where} is the handle, not the value, and each process opens a value of its own: attach listeners in "
            f"{type(adapter).__name__}(on_open=…), which is called with every value opened"
        )

    @property
    def name(self) -> str:
        """The resource's name: the declared one, or that of its class attribute."""
        return self._name or f"({self.adapter.describe()})"

    def __set_name__(self, owner: type, name: str) -> None:
        if self._name is None:
            # Errors have to wait for __init_subclass__: before Python 3.12 they become a RuntimeError here.
            self._name = name
            # The first owner of a name keeps it.
            self.shared.names.setdefault(name, self)
        self._where = self._where or f"{owner.__name__}.{name}"

    def check_name(self, where: str) -> None:
        """Raise an error if its name is invalid or already in use.

        Args:
            where: The attribute, for the message.

        Raises:
            ConfigurationError: The name is invalid, or another resource has it.
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
            TypeError: An argument was passed, probably meant for a method of the value.
            OpenTimeoutError: Another thread has been opening the value for 60 seconds.
            ConfigurationError: The value's factory uses the resource itself.
            Exception: The client library's error while opening, with a note that names the resource.
        """
        if arguments or options:
            raise TypeError(f"{type(self).__name__}.get() takes no arguments; {self._misplaced('get(…)')}")
        return self.use()

    def use(self) -> T:
        """Return the value, for a descriptor's ``__get__``; raises like :meth:`get`."""
        if self._overrides:
            return self._overrides[-1]
        attempt = current()
        live: _Live[T] | None = self._live if attempt is None else attempt.values.get(self)
        if attempt is None:
            # Usually this comparison is the only cost of recycling.
            if live is None or live.version != self._recycles.cells[0]:
                live = self._begin(None)
            live.outside = True
            return live.value
        if live is not None and not live.closed:
            if live.version != self._recycles.cells[0]:
                self._renew(live)
            return live.value
        live = self._live
        if live is None or live.version != self._recycles.cells[0] or attempt.parent is not None or attempt.ended:
            return self._begin(attempt).value
        if self._unseen:
            live.opening.effect(f"a use of {self.name!r}")
        attempt.values[self] = live
        if self._live is not live:
            # Replaced in between by another thread, which may have found it unused.
            del attempt.values[self]
            return self._begin(attempt).value
        return live.value

    def notice(self) -> None:
        """Replace the connections if that was requested; see :attr:`Opening.notice`."""
        live = self._live
        if live is not None and live.version != self._recycles.cells[0]:
            self._renew(live)

    def _begin(self, attempt: Attempt | None) -> _Live[T]:
        """Return the current value, opened if necessary; an attempt keeps it to its end."""
        replaced: _Live[T] | None = None
        opened = False
        if attempt is not None and attempt.ended:
            # In a thread that outlives it.
            attempt = None
        try:
            # Within the block: a signal may interrupt the call after it has acquired the lock.
            if not self._lock.acquire(timeout=OPEN_TIMEOUT):
                raise OpenTimeoutError(f"{self!r}: another thread has been opening it for {OPEN_TIMEOUT:.0f} s")
            if attempt is not None and self not in attempt.values:
                # Before anything can fail, so that the adapter gets to classify the error.
                attempt.values[self] = None
            live = self._live
            outer: _Live[T] | None = None
            if attempt is not None and attempt.parent is not None:
                # A nested attempt shares the value of the enclosing one.
                outer = next(
                    (found for each in line(attempt) if (found := each.values.get(self)) and not found.closed), None
                )
            if outer is not None:
                live = outer
            elif live is not None and live.version != self._recycles.cells[0] and not self._renew(live):
                # Unpublish first, so that no new caller gets it.
                self._live, replaced = None, live
                self._retired.append(live)
            elif live is None:
                live, opened = self._open(attempt), True
            if attempt is not None and replaced is None:
                attempt.values[self] = live
                if self._unseen:
                    live.opening.effect(f"a use of {self.name!r}")
        finally:
            # First of all: a signal may interrupt any call before it, suppress() too.
            try:  # noqa: SIM105
                self._lock.release()
            except RuntimeError:
                # Not acquired: a timeout, or interrupted before.
                pass
        if replaced is not None:
            self.shared.listeners.emit(EventKind.VALUE_RECYCLED, self.name)
            self._warn_of_loss(replaced)
            # Without the lock, which closing needs; and before another one is opened.
            self._end_unused()
            return self._begin(attempt)
        if opened:
            # Emitted late: logging takes locks, which is unsafe right after a fork.
            discarded, self._discarded = self._discarded, None
            if discarded is not None:
                self.shared.listeners.emit(
                    EventKind.VALUE_DISCARDED, self.name, "inherited by a fork", connections=discarded
                )
            self.shared.listeners.emit(EventKind.VALUE_OPENED, self.name)
            inherited, self._inherited = self._inherited, None
            if inherited is not None:
                self._warn_of_loss(inherited)
        return live

    def _open(self, attempt: Attempt | None) -> _Live[T]:
        if self._opening is not None:
            raise ConfigurationError(f"{self!r}: its factory or its on_open uses the resource itself")
        if self.shared.failure is not None:
            raise self.shared.failure
        born = time.monotonic()
        # From here on a fork discards the value's connections, even while it is half open.
        self._opening = descriptors = Descriptors()
        shared = self.shared
        try:
            ends.used()
            # The name is final only now: it may come from an attribute.
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
                broken=lambda: self.ask(time.monotonic()),
            )
            # Threads of the value, such as a client's monitor, are not the attempt's.
            with of_no_attempt():
                value = self.adapter.open(opening)
                # One made of settings is known from here on.
                self._unseen = bool(getattr(self.adapter, "unseen_effects", False))
                self._set_up(value)
                try:
                    live = _Live(value, opening, born)
                    live.attached = self._attached(value)
                    # Published last: other threads read it without the lock.
                    self._live = live
                except BaseException:
                    # Interrupted: nobody else knows the value.
                    self.adapter.close(value, 0.0)
                    raise
            return live
        except Exception as error:
            add_note(error, f"workerpools: while opening the resource {self.name!r} ({self.adapter.describe()})")
            raise
        finally:
            self._opening = None
            if attempt is not None:
                # Connections acquired by a factory belong to the value, not to the attempt.
                for used in attempt.values:
                    used.meter.disown(attempt, born)

    def _set_up(self, value: T) -> None:
        """Call the user's ``on_open``; close a value for which it fails."""
        on_open = getattr(self.adapter, "on_open", None)
        if on_open is None:
            return
        try:
            on_open(value)
        except BaseException as error:
            add_note(error, "workerpools: on_open failed; the value that it was called with was closed again")
            try:
                # Nobody else uses it.
                self.adapter.close(value, 0.0)
            except Exception:
                logger.exception("could not close a value of %r", self)
            raise

    def _attached(self, value: T) -> list[tuple[str, object]]:
        # The adapter may not derive from Adapter.
        attached = getattr(self.adapter, "attached", None)
        try:
            return [] if attached is None else list(attached(value))
        except Exception as error:  # third-party code: the value works without
            if is_interruption(error):
                raise
            logger.exception("%r: could not list what is attached to its value", self)
            return []

    def _warn_of_loss(self, former: _Live[T]) -> None:
        """Warn once if user code has attached something to a value that another one replaces."""
        if self._warned:
            return
        lost = dict.fromkeys(name for name, what in self._attached(former.value) if (name, what) not in former.attached)
        if lost:
            self._warned = True
            logger.warning(
                "the resource %r opens another value without what had been attached to the former one (%s): attach it "
                "in %s(on_open=…), which is called with every value opened, in each process",
                self.name,
                ", ".join(lost),
                type(self.adapter).__name__,
            )

    def _renew(self, live: _Live[T]) -> bool:
        """Replace the connections of ``live`` if requested; return whether the value remains usable."""
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
        # The adapter may not derive from Adapter.
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

    def attempt_ended(self, attempt: Attempt) -> BaseException | None:
        """Count the attempt, reclaim the connections it left in use, and release its value.

        Repeatable: a signal may interrupt any step.

        Args:
            attempt: The attempt, which no longer counts as running.

        Returns:
            The interruption that arrived meanwhile; None if none did.
        """
        interruption: BaseException | None = None
        meter = self.meter
        if (meter.leases or meter.waiting) and (left := meter.left_by(attempt)):
            # Imported by the first attempt that leaves a connection in use.
            from workerpools._stats.leaks import reclaim

            interruption = reclaim(
                self.name, meter, self.shared.listeners, left, attempt.task, interrupted=attempt.interrupted
            )
        if attempt.interrupted:
            self._repair()
        if self._retired:
            attempt.values.pop(self, None)
            self._end_unused()
        meter.attempt_ended(attempt)
        return interruption

    def _repair(self) -> None:
        """Derive from the connections what an interruption may have kept from being counted."""
        self.meter.agree()
        self.meter.recount(sum(live.opening.open_connections for live in self._held()))

    def _end_unused(self) -> None:
        """Close the replaced values that are certainly unused."""
        with self._lock:
            used = [attempt.values.get(self) for attempt in running()]
            unused = [live for live in self._retired if not live.outside and live not in used]
            for live in unused:
                # Kept until its last connection is closed: a fork meanwhile must discard it.
                self._closing.append(live)
                self._retired.remove(live)
        for live in unused:
            self._end(live)

    def _end(self, live: _Live[T]) -> None:
        def close() -> None:
            try:
                with self.meter.closing("recycled"):
                    self.adapter.close(live.value, self.shared.close_timeout)
            except Exception:
                logger.exception("could not close a value of %r", self)
            finally:
                self._closing.remove(live)

        if not run_bounded(close, END_TIMEOUT):
            logger.warning("closing a value of %r takes long; it continues in the background", self)

    def ask(self, now: float) -> None:
        """Replace this process's connections opened before ``now``, at the next use.

        Args:
            now: On the clock of :func:`time.monotonic`.
        """
        with self._lock:
            self._asked = now
            if self._live is not None:
                self._live.version = -1.0

    def recycle(self) -> None:
        """Replace its connections (see :meth:`workerpools.WorkerPools.recycle`)."""
        self.shared.collector.recycle([self.name])

    def close(self, timeout: float | None = None) -> None:
        """Close this process's value, if it has one; the next use opens another.

        Args:
            timeout: The longest wait for work in flight, in seconds; the setting ``workerpools_close_timeout`` if None.

        Raises:
            ConfigurationError: ``timeout`` is not a number, is negative, or is longer than a week.
            Exception: The adapter's error while closing.
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
            for live in values:
                live.closed = True
            # Kept until its last connection is closed: a fork meanwhile must discard it.
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
            # Not for a close by workerpools, which clears the value first.
            if self._live is None or self._live.opening.descriptors is not descriptors:
                return
            self._live.closed = True
            self._live = None
        logger.warning("%r was closed by its user; reopening on next use. Do not close pooled clients.", self)
        self.shared.listeners.emit(EventKind.VALUE_CLOSED, self.name, "by its user")

    def classify(self, error: BaseException, earlier: Sequence[Failure]) -> Noted | None:
        """Return the adapter's classification of an exception; None if it does not concern this resource.

        Args:
            error: The exception that ended an attempt.
            earlier: The failures reported earlier in the attempt.
        """
        try:
            failure = self.adapter.classify(error, earlier)
        except Exception:  # third-party code: the task's own error matters more
            logger.exception("%r could not classify %s", self, type(error).__name__)
            return None
        if failure is None or failure.resource not in ("", self.name):
            return None
        self.meter.failed(failure.kind)
        shared = self.shared
        return Noted(replace(failure, resource=self.name), failure.phase, False, shared.budget, shared.listeners)

    def pin(self) -> object:
        """Return the objects that a forked child must not finalize (see :mod:`workerpools._process.fork`)."""
        return [(held, held.opening.descriptors.pin()) for held in self._held()], self._opening

    def discard(self) -> tuple[object, Sequence[int]]:
        """Forget the inherited value in a forked child, without sending a byte to its peer."""
        held = self._held()
        ledgers = [live.opening.descriptors for live in held]
        if self._opening is not None:
            ledgers.append(self._opening)
        kept = (held, ledgers, [ledger.pin() for ledger in ledgers])
        self._inherited = self._live or self._inherited
        self._live = None
        self._forget()
        inherited = [number for ledger in ledgers for number in ledger.filenos()]
        self.meter.discarded(len(inherited))
        if ledgers:
            self._discarded = len(inherited)
        # The adapter may not derive from Adapter.
        if held and hasattr(self.adapter, "discard"):
            fork.afterwards(partial(self._discard, held))
        return kept, inherited

    def _discard(self, inherited: Sequence[_Live[T]]) -> None:
        for live in inherited:
            try:
                self.adapter.discard(live.value)
            except Exception:  # third-party code: the fork goes on without it
                logger.exception("could not discard an inherited value of %r", self)

    def _held(self) -> list[_Live[T]]:
        return [*self._closing, *self._retired, *([self._live] if self._live is not None else [])]

    @property
    def where(self) -> str:
        """The class attribute that declares it, or its name."""
        return self._where or self.name

    @property
    def kind(self) -> str:
        """Its adapter's kind, such as ``http``; empty if unknown."""
        return str(getattr(self.adapter, "kind", ""))

    def capacity(self, execution_pool: ExecutionPool) -> int | None:
        """Return the most connections that one process has open at a time; see :meth:`Adapter.capacity`.

        Args:
            execution_pool: The execution pool of the process.
        """
        try:
            return self.adapter.capacity(execution_pool)
        except Exception:
            # Asked for with every snapshot; what is wrong with the declaration is said when it is used.
            logger.debug("the capacity of %r is unknown", self, exc_info=True)
            return None

    @property
    def leak_after(self) -> float | None:
        """The time after which a connection in use is reported with its stack, in seconds; None for never."""
        own = getattr(self.adapter, "leak_after", None)
        return self.shared.leak_after if own is None else float(own)

    @property
    def is_open(self) -> bool:
        """Whether this process has an open value of its own."""
        return self._live is not None or bool(self._retired)

    @property
    def opened_as(self) -> int:
        """The position of its value in the order in which this process has opened values; 0 without a value."""
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
