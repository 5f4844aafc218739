"""The one live value that a process has of a resource: opened on first use, kept by attempts, replaced, and closed."""

from __future__ import annotations

import itertools
import logging
import os
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Generic, TypeVar

from workerpools._pools.adapter import Adapter, Opening
from workerpools._pools.shared import Shared
from workerpools._process import ends, fork
from workerpools._process.bounded import remaining, run_bounded
from workerpools._process.descriptors import Descriptors
from workerpools._run.attempts import Attempt, current, line, running
from workerpools._run.events import EventKind
from workerpools._run.failure import Failure, Noted, is_interruption, know_libraries
from workerpools._run.threads import of_no_attempt
from workerpools._stats.meter import Meter
from workerpools._text import add_note
from workerpools.errors import ConfigurationError, OpenTimeoutError

__all__ = ["Holder"]

T = TypeVar("T")

logger = logging.getLogger("workerpools")

# The longest wait for another thread that is opening the same value, in seconds. Adapters connect lazily or with a
# connect timeout of a few seconds, so only a hanging user-defined factory reaches this limit.
OPEN_TIMEOUT = 60.0

# The longest wait of a task for the closing of a replaced value, in seconds: a clean close over a dead network must not
# use up the task's time.
END_TIMEOUT = 1.0


class Live(Generic[T]):
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


class Holder(Generic[T]):
    """This process's value of a resource, and who uses it.

    An object of its own: the resource is also a handle, whose ``__getattr__`` slows every access to its attributes
    down before Python 3.12.

    Args:
        shared: What the resources of its WorkerPools share.
        adapter: The resource's adapter.
        given: The resource's name; None until its class attribute gives it one.

    Attributes:
        where: That class attribute, for messages; empty if there is none.
        live: The value; None before its first use, and after its closing.
        overrides: What tests have put in the value's place, the innermost last.
        meter: Its statistics.
    """

    def __init__(self, shared: Shared, adapter: Adapter[T], given: str | None) -> None:
        self.shared = shared
        self.adapter = adapter
        self.given = given
        self.where = ""
        self.overrides: tuple[T, ...] = ()
        self._recycles = shared.recycles
        self.live: Live[T] | None = None
        #: The number of inherited connections discarded after a fork; None if there was no value.
        self._discarded: int | None = None
        self._inherited: Live[T] | None = None
        self._warned = False
        know_libraries(getattr(adapter, "libraries", ()))
        self._unseen = bool(getattr(adapter, "unseen_effects", False))
        self._forget()
        fork.guard(self)

    def _forget(self) -> None:
        self._lock = threading.RLock()
        self.meter = Meter()
        self._opening: Descriptors | None = None
        self._closing: list[Live[T]] = []
        #: Replaced values, each until its last user ends.
        self._retired: list[Live[T]] = []
        self._asked = 0.0

    @property
    def name(self) -> str:
        """The resource's name: the declared one, or that of its class attribute."""
        return self.given or f"({self.adapter.describe()})"

    def use(self) -> T:
        """Return the value, opened if necessary; raises like :meth:`Resource.get`."""
        if self.overrides:
            return self.overrides[-1]
        attempt = current()
        live: Live[T] | None = self.live if attempt is None else attempt.values.get(self)
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
        live = self.live
        if live is None or live.version != self._recycles.cells[0] or attempt.parent is not None or attempt.ended:
            return self._begin(attempt).value
        if self._unseen:
            live.opening.effect(f"a use of {self.name!r}")
        attempt.values[self] = live
        if self.live is not live:
            # Replaced in between by another thread, which may have found it unused.
            del attempt.values[self]
            return self._begin(attempt).value
        return live.value

    def notice(self) -> None:
        """Replace the connections if that was requested; see :attr:`Opening.notice`."""
        live = self.live
        if live is not None and live.version != self._recycles.cells[0]:
            self._renew(live)

    def _begin(self, attempt: Attempt | None) -> Live[T]:
        """Return the current value, opened if necessary; an attempt keeps it to its end."""
        replaced: Live[T] | None = None
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
            live = self.live
            outer: Live[T] | None = None
            if attempt is not None and attempt.parent is not None:
                # A nested attempt shares the value of the enclosing one.
                outer = next(
                    (found for each in line(attempt) if (found := each.values.get(self)) and not found.closed), None
                )
            if outer is not None:
                live = outer
            elif live is not None and live.version != self._recycles.cells[0] and not self._renew(live):
                # Unpublish first, so that no new caller gets it.
                self.live, replaced = None, live
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

    def _open(self, attempt: Attempt | None) -> Live[T]:
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
                    live = Live(value, opening, born)
                    live.attached = self._attached(value)
                    # Published last: other threads read it without the lock.
                    self.live = live
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

    def _warn_of_loss(self, former: Live[T]) -> None:
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

    def _renew(self, live: Live[T]) -> bool:
        """Replace the connections of ``live`` if requested; return whether the value remains usable."""
        version = self._recycles.cells[0]
        if live.version == version:
            return True
        with self._lock:
            asked = max(self._asked, self._recycles.at(self.name))
            if asked > live.born:
                if live is not self.live or not self._recycle(live.value, asked):
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
        meter = self.meter
        interruption = None
        if meter.leases or meter.waiting or attempt.interrupted or self._retired:
            interruption = self._tidy(attempt)
        meter.attempt_ended(attempt)
        return interruption

    def _tidy(self, attempt: Attempt) -> BaseException | None:
        interruption: BaseException | None = None
        if left := self.meter.left_by(attempt):
            # Imported by the first attempt that leaves a connection in use.
            from workerpools._stats.leaks import reclaim

            interruption = reclaim(
                self.name, self.meter, self.shared.listeners, left, attempt.task, interrupted=attempt.interrupted
            )
        if attempt.interrupted:
            self._repair()
        if self._retired:
            attempt.values.pop(self, None)
            self._end_unused()
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

    def _end(self, live: Live[T]) -> None:
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
            if self.live is not None:
                self.live.version = -1.0

    def close(self, timeout: float | None = None) -> None:
        """Close the value, if there is one; see :meth:`Resource.close`."""
        with self._lock:
            values, self._retired = self._retired, []
            if self.live is not None:
                values.append(self.live)
                self.live = None
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

    def _close(self, live: Live[T], deadline: float) -> None:
        self.adapter.close(live.value, remaining(deadline))

    def _closed_by_user(self, descriptors: Descriptors) -> None:
        with self._lock:
            # Not for a close by workerpools, which clears the value first.
            if self.live is None or self.live.opening.descriptors is not descriptors:
                return
            self.live.closed = True
            self.live = None
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
        self._inherited = self.live or self._inherited
        self.live = None
        self._forget()
        inherited = [number for ledger in ledgers for number in ledger.filenos()]
        self.meter.discarded(len(inherited))
        if ledgers:
            self._discarded = len(inherited)
        # The adapter may not derive from Adapter.
        if held and hasattr(self.adapter, "discard"):
            fork.afterwards(partial(self._discard, held))
        return kept, inherited

    def _discard(self, inherited: Sequence[Live[T]]) -> None:
        for live in inherited:
            try:
                self.adapter.discard(live.value)
            except Exception:  # third-party code: the fork goes on without it
                logger.exception("could not discard an inherited value of %r", self)

    def _held(self) -> list[Live[T]]:
        return [*self._closing, *self._retired, *([self.live] if self.live is not None else [])]

    @property
    def kind(self) -> str:
        """Its adapter's kind, such as ``http``; empty if unknown."""
        return str(getattr(self.adapter, "kind", ""))

    @property
    def leak_after(self) -> float | None:
        """The time after which a connection in use is reported with its stack, in seconds; None for never."""
        own = getattr(self.adapter, "leak_after", None)
        return self.shared.leak_after if own is None else float(own)

    @property
    def is_open(self) -> bool:
        """Whether this process has an open value of its own."""
        return self.live is not None or bool(self._retired)

    @property
    def opened_as(self) -> int:
        """The position of its value in the order in which this process has opened values; 0 without a value."""
        live = self.live
        return 0 if live is None else live.number

    def __repr__(self) -> str:
        state = "overridden" if self.overrides else "open" if self.is_open else "closed"
        return f"<Resource {self.name!r} {type(self.adapter).__name__} {state} pid={os.getpid()}>"
