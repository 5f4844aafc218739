"""A declared connection-holding object: one live value a process, opened on first use."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Generic, NoReturn, TypeVar, overload

from workerpools._pools.adapter import Adapter
from workerpools._pools.turnover import Live, Turnover
from workerpools._process import fork
from workerpools._process.bounded import remaining, run_bounded
from workerpools._process.descriptors import Descriptors
from workerpools._run import attempts
from workerpools._run.events import EventKind
from workerpools._run.failure import Failure, Noted, is_interruption
from workerpools._stats.meter import Meter, Use
from workerpools._text import add_note
from workerpools.errors import ConfigurationError, OpenTimeoutError

if TYPE_CHECKING:
    from workerpools._pools.registry import Registry

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


class Resource(Overridable[T]):
    """One declared connection-holding object, and the value of it that this process has.

    As a class attribute of a task base it gives the value (``self.api``); on the class itself, or kept in a variable,
    it is a handle: ``ShopTask.api.get()``. Made by :meth:`workerpools.WorkerPools.add`.
    """

    def __init__(self, registry: Registry, adapter: Adapter[T], name: str | None) -> None:
        super().__init__()
        self.registry = registry
        self.adapter = adapter
        self._recycles = registry.recycles
        self._name = name
        self._live: Live[T] | None = None
        #: How many connections were inherited by a fork and dropped; None where there was no value to drop.
        self._discarded: int | None = None
        self._forget()
        fork.guard(self)

    def _forget(self) -> None:
        self._lock = threading.RLock()
        self.meter = Meter()
        self._opening: Descriptors | None = None
        self._closing: list[Live[T]] = []
        #: Values that were replaced while they were in use.
        self.turnover: Turnover[T] = Turnover()
        self._asked = 0.0

    @property
    def name(self) -> str:
        """The resource's name: the one it was given, or the attribute it stands at."""
        return self._name or f"({self.adapter.describe()})"

    def __set_name__(self, owner: type, name: str) -> None:
        if self._name is None:
            # A refusal must wait for __init_subclass__: before Python 3.12 what is raised here becomes RuntimeError.
            self._name = name
            self.registry.adopt(self)
        self._where = self._where or f"{owner.__name__}.{name}"

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
        attempt = attempts.current()
        begins = attempt is None
        if attempt is not None and self not in attempt.used:
            attempt.used += (self,)
            begins = True
        live = self._live
        if live is None:
            live = self._open(attempt)
        # Most of the time this one look is all that recycling costs.
        if live.looked != self._recycles.cells[0]:
            live = self._look(live, attempt, begins=begins)
        if attempt is None:
            live.lent = True
        return live.value

    def notice(self) -> None:
        """Look whether connections are to be replaced, for an adapter whose value is used without :meth:`use`."""
        live = self._live
        if live is not None and live.looked != self._recycles.cells[0]:
            self._look(live, attempts.current(), begins=False)

    def _look(self, live: Live[T], attempt: attempts.Attempt | None, *, begins: bool) -> Live[T]:
        """Return the value to use, after a look at whether it is to be recycled, or was.

        Args:
            live: The present one.
            attempt: Who asks.
            begins: Whether the attempt has not used the resource before, so that it may get another value.
        """
        with self._lock:
            bound = self.turnover.of(attempt)
            if bound is not None:
                return bound
            version = self._recycles.cells[0]
            asked = max(self._asked, self._recycles.at(self.name))
            recycled, idle = live is self._live and asked > live.born, False
            if recycled and self._recycle(live.value, asked):
                live.born = asked
            elif recycled:
                if not begins:
                    # Not in the middle of an attempt.
                    return live
                # In this order: who does not find it any more is not given it.
                self._live = None
                users = [each for each in attempts.running() if each is not attempt and self in each.used]
                idle = self.turnover.supersede(live, users)
            if live is self._live and not self.turnover.bound:
                live.looked = version
        if recycled:
            self.registry.listeners.emit(EventKind.VALUE_RECYCLED, self.name)
        if self._live is live:
            return live
        if idle:
            self._end(live)
        return self._open(attempt)

    def _recycle(self, value: T, since: float) -> bool:
        # Not every adapter derives from the protocol.
        recycle = getattr(self.adapter, "recycle", None)
        if recycle is None:
            return False
        try:
            return bool(recycle(value, since))
        except Exception as error:
            if is_interruption(error):
                raise
            logger.exception("%r could not recycle its connections; its value is closed instead", self)
            return False

    def _end(self, live: Live[T]) -> None:
        """Close a value whose place another one takes."""

        def close() -> None:
            try:
                with self.meter.closing("recycled"):
                    self.adapter.close(live.value, self.registry.close_timeout)
            except Exception:
                logger.exception("could not close a value of %r", self)
            finally:
                with self._lock:
                    self.turnover.ended(live)

        if not run_bounded(close, END_TIMEOUT):
            logger.warning("closing a value of %r takes its time; its task does not wait for it", self)

    def release(self, attempt: attempts.Attempt) -> None:
        """Note that an attempt has ended that may have begun with a value that was replaced since."""
        with self._lock:
            live = self.turnover.release(attempt)
        if live is not None:
            self._end(live)

    def ask(self, now: float) -> None:
        """Have this process replace what was opened before ``now``, when it uses the resource next.

        Args:
            now: On the clock of :func:`time.monotonic`.
        """
        with self._lock:
            self._asked = now
            if self._live is not None:
                self._live.looked = -1.0

    def recycle(self) -> None:
        """Have its connections replaced (see :meth:`workerpools.WorkerPools.recycle`)."""
        self.registry.collector.recycle([self.name])

    def _open(self, attempt: attempts.Attempt | None) -> Live[T]:
        if not self._lock.acquire(timeout=OPEN_TIMEOUT):
            raise OpenTimeoutError(f"{self!r}: another thread has been opening it for {OPEN_TIMEOUT:.0f} s")
        try:
            live = self.turnover.of(attempt) or self._live
            if live is not None:
                return live
            if self._opening is not None:
                raise ConfigurationError(f"{self!r}: its factory uses the resource that it is to make")
            born = time.monotonic()
            # From here on a fork knows of the value's connections, even while it is half open.
            self._opening = descriptors = Descriptors()
            try:
                # Its name is final now: an attribute may have given it.
                self.registry.collector.attach(self)
                self.meter.closes("")
                if (leak_after := self.leak_after) is not None:
                    self.meter.leak_after = leak_after
                    self.registry.held.watch(self)
                opening = self.registry.opening(self.name, descriptors, self.meter)
                opening = replace(opening, notice=self.notice, ended=lambda: self._ended(descriptors))
                live = self._live = Live(self.adapter.open(opening), descriptors, born)
            except Exception as error:
                add_note(
                    error,
                    f"workerpools: while opening the resource {self.name!r} ({self.adapter.describe()})",
                )
                raise
            finally:
                self._opening = None
                if attempt is not None:
                    # What a factory acquires for its value lives as long as that, and not as long as the attempt.
                    for used in attempt.used:
                        used.meter.disown(attempt, born)
            discarded, self._discarded = self._discarded, None
        finally:
            self._lock.release()
        if discarded is not None:
            # Told now: right after a fork no code may run that takes a lock, and logging does.
            self.registry.listeners.emit(
                EventKind.VALUE_DISCARDED, self.name, "inherited by a fork", connections=discarded
            )
        self.registry.listeners.emit(EventKind.VALUE_OPENED, self.name)
        return live

    def close(self, timeout: float | None = None) -> None:
        """Close this process's value, if it has one; the next use opens another.

        Args:
            timeout: How long to wait for work in flight, in seconds; the registry's ``close_timeout`` if None.
        """
        with self._lock:
            values = self.turnover.superseded
            self.turnover = Turnover()
            if self._live is not None:
                values.append(self._live)
                self._live = None
            if not values:
                return
            # Still ours until its last connection is closed: a fork meanwhile must discard it.
            self._closing += values
        self.meter.closes("shutdown")
        deadline = time.monotonic() + (self.registry.close_timeout if timeout is None else timeout)
        with ExitStack() as closing:
            for live in values:
                closing.callback(self._closing.remove, live)
                closing.callback(self._close, live, deadline)
        self.registry.listeners.emit(EventKind.VALUE_CLOSED, self.name)

    def _ended(self, descriptors: Descriptors) -> None:
        with self._lock:
            # Its owner has let go of it before it closes it.
            if self._live is None or self._live.descriptors is not descriptors:
                return
            self._live = None
        logger.warning("%r was closed by who used it; the next use opens another: leave closing to workerpools", self)
        self.registry.listeners.emit(EventKind.VALUE_CLOSED, self.name, "by who used it")

    def _close(self, live: Live[T], deadline: float) -> None:
        self.adapter.close(live.value, remaining(deadline))

    def classify(self, error: BaseException, earlier: Sequence[Failure]) -> Noted | None:
        """Return what an exception proves, if its adapter knows it for one of this resource."""
        try:
            failure = self.adapter.classify(error, earlier)
        except Exception:  # somebody else's function: the task's own error matters more
            logger.exception("%r could not classify %s", self, type(error).__name__)
            return None
        if failure is None or failure.resource not in ("", self.name):
            return None
        return Noted(replace(failure, resource=self.name), failure.phase, self.registry)

    def pin(self) -> object:
        """Return what must not be finalized in a forked child (see :mod:`workerpools._process.fork`)."""
        return [(held, held.descriptors.pin()) for held in self._held()], self._opening

    def discard(self) -> tuple[object, Sequence[int]]:
        """Forget the inherited value, in a forked child, without a byte to its peer."""
        held = self._held()
        ledgers = [live.descriptors for live in held]
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

    def _held(self) -> list[Live[T]]:
        return [*self._closing, *self.turnover.superseded, *([self._live] if self._live is not None else [])]

    @property
    def kind(self) -> str:
        """What its adapter connects to: ``http``, ``database``, or empty where that is not known."""
        return str(getattr(self.adapter, "kind", ""))

    @property
    def leak_after(self) -> float | None:
        """For how long a connection may be in use, in seconds, before a line with its stack is logged; None for any."""
        own = getattr(self.adapter, "leak_after", None)
        return self.registry.leak_after if own is None else float(own)

    def give_back(self, left: Sequence[Use], attempt: attempts.Attempt) -> BaseException | None:
        """Give back what an attempt has left in use, and log it; return what interrupted the process meanwhile."""
        from workerpools._stats.leaks import give_back

        return give_back(self, left, "" if attempt.allowance is None else attempt.allowance.task)

    @property
    def is_open(self) -> bool:
        """Whether this process has opened a value of its own."""
        return self._live is not None or bool(self.turnover.superseded)

    def __repr__(self) -> str:
        if self._overrides:
            state = "overridden"
        elif self.is_open:
            state = "open"
        else:
            state = "closed"
        return f"<Resource {self.name!r} {type(self.adapter).__name__} {state} pid={os.getpid()}>"
