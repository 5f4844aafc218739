"""The attempt: one run of a task body, and what belongs to it alone."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Collection, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from workerpools._process import fork
from workerpools._run.budget import Budget
from workerpools._run.deadline import NO_DEADLINE, Deadline
from workerpools._run.delivery import Delivery
from workerpools._run.failure import Noted, attach
from workerpools.errors import NoAttemptError

__all__ = [
    "Attempt",
    "Effect",
    "Scoped",
    "concerned",
    "current",
    "deadline",
    "declare_effect",
    "line",
    "note_effect",
    "note_failure",
    "protect",
    "require",
    "running",
    "wait_for_others",
]

logger = logging.getLogger("workerpools")

#: How many failures an attempt remembers; it is the first one that later ones follow from.
MAX_NOTED = 20

#: How often the sessions of an attempt are committed, where that begins others.
MAX_ROUNDS = 20

_current: ContextVar[Attempt | None] = ContextVar("workerpools_attempt", default=None)


@dataclass(eq=False)
class Effect:
    """Something that left in an attempt and cannot be taken back. Two of the same text are two effects.

    Attributes:
        what: A short phrase without secrets, like ``POST by 'api'``.
        withdrawn: Whether it turned out that the server cannot have acted on it. No attempt shows it then.
    """

    what: str
    withdrawn: bool = False

    def withdraw(self) -> None:
        """Take it back: it turned out that the server cannot have acted on it."""
        self.withdrawn = True

    def __repr__(self) -> str:
        return f"Effect({self.what!r})"

    def __str__(self) -> str:
        return self.what


class Scoped:
    """Something that belongs to one attempt and ends with it: a session, a batch, a lock.

    The attempt calls these in its own thread: :meth:`finish` when the body has returned, :meth:`rollback` on every
    other way out, then :meth:`end` in both cases. Raising from :meth:`finish` fails the attempt.
    """

    def finish(self) -> bool:
        """Commit; return whether there was anything to commit.

        Called again until every scoped object of the attempt returns False: a commit's listeners may begin more work.
        """
        return False

    def rollback(self) -> object:
        """Undo what was done. Must not raise what it can avoid: the attempt has failed already."""

    def end(self) -> object:
        """Give back what is held, for good."""

    def invalidate(self) -> object:
        """Throw the connection away: rolling back or giving back has failed."""


class Attempt:
    """One run of a task body.

    Args:
        delivery: The delivery it is an attempt of; None where nothing is known of that.
        parent: The attempt that it runs inside of.
    """

    # Class attributes until they are set: most attempts need few of them, and every one would pay.

    #: What was noted as an effect; some may have been withdrawn since.
    noted_effects: tuple[Effect, ...] = ()
    #: What is known of the exceptions that its resources raised.
    noted: tuple[Noted, ...] = ()
    #: Gets a token back for a success without replays: the budget of the first resource it used.
    budget: Budget | None = None
    #: Whether it has ended, as a whole.
    ended = False

    def __init__(self, delivery: Delivery | None = None, parent: Attempt | None = None) -> None:
        self.delivery = delivery
        self.parent = parent
        #: The resources it has used, each with the value that it began with.
        self.values: dict[Any, Any] = {}
        #: What belongs to it and ends with it, by whoever made it.
        self.scoped: dict[object, Any] = {}
        #: Called with the attempt once it has ended; see :meth:`callback`.
        self.callbacks: list[Callable[[Attempt], BaseException | None]] = []

    @property
    def task(self) -> str:
        """The task's name; empty where it is not known."""
        return "" if self.delivery is None else self.delivery.terms.name

    @property
    def effects(self) -> tuple[Effect, ...]:
        """What left that cannot be taken back."""
        return tuple([effect for effect in self.noted_effects if not effect.withdrawn])

    @cached_property
    def deadline(self) -> Deadline:
        """When the attempt must have ended: its own task's limit, or that of the attempt it runs inside of."""
        own = NO_DEADLINE if self.delivery is None else self.delivery.deadline
        return own if self.parent is None else own.nearest(self.parent.deadline)

    def callback(self, function: Callable[[Attempt], BaseException | None]) -> None:
        """Call ``function`` with the attempt once it has ended, in its thread, in the order of registration.

        Args:
            function: Returns what interrupted the process meanwhile (SystemExit, GreenletExit), if anything did. Must
                not raise.
        """
        self.callbacks.append(function)

    def enter(self) -> None:
        """Make this the current attempt of the calling context."""
        _current.set(self)
        _active.attempts.add(self)

    def leave(self) -> None:
        """Restore the attempt that was current before. Called again where a signal struck in the middle."""
        if _current.get() is self:
            _current.set(self.parent)
        _active.attempts.discard(self)
        self.ended = True

    def commit(self) -> None:
        """Commit what the body did, in the order in which it began.

        Raises:
            Exception: The first failure to commit; nothing is committed after it.
        """
        for _ in range(MAX_ROUNDS):
            # Listeners of one session may use another one, which is begun by that, or was committed before.
            committed = False
            for scoped in tuple(self.scoped.values()):
                if scoped.finish():
                    committed = True
            if not committed:
                return
        raise RuntimeError("the sessions' own listeners began another transaction at every commit")

    def close(self, *, rollback: bool) -> None:
        """Close everything the attempt owns. Never raises an Exception: the outcome is decided already.

        Args:
            rollback: Undo first: the body did not return, or a commit failed.

        Raises:
            BaseException: SystemExit, KeyboardInterrupt or GreenletExit that arrived during the clean-up, after it.
        """
        interruption: BaseException | None = None
        while self.scoped:
            scoped = self.scoped.popitem()[1]
            for step in (scoped.rollback, scoped.end) if rollback else (scoped.end,):
                try:
                    step()
                except BaseException as failure:
                    interruption = _failed_to_clean_up(scoped, failure) or interruption
        if interruption is not None:
            raise interruption

    def end(self) -> None:
        """Leave the attempt if that was not done, and call back whoever asked for it.

        Called before a failed attempt is replayed or retried: what interrupts a callback then ends the task, and no
        retry was sent yet. Called again, it goes on where a signal struck.

        Raises:
            BaseException: What interrupted the process during a callback.
        """
        if not self.ended:
            self.leave()
        interruption: BaseException | None = None
        while self.callbacks:
            interruption = self.callbacks.pop(0)(self) or interruption
        if interruption is not None:
            raise interruption

    def classify(self, error: BaseException) -> Noted | None:
        """Ask the resources that were used what ``error`` proves, where nothing was noted when it was raised."""
        earlier = tuple(noted.failure for noted in self.noted if noted.failure is not None)
        for resource in self.values:
            noted: Noted | None = resource.classify(error, earlier)
            if noted is not None:
                return noted
        return None


def _failed_to_clean_up(scoped: Any, failure: BaseException) -> BaseException | None:
    """Keep what could not be rolled back or closed from its pool; return ``failure`` if it interrupts the process."""
    logger.debug("cleaning up after an attempt failed: %s", type(failure).__name__, exc_info=failure)
    with contextlib.suppress(BaseException):
        scoped.invalidate()
    return None if isinstance(failure, Exception) else failure


class _Active:
    """The attempts that run in this process."""

    def __init__(self) -> None:
        self.attempts: set[Attempt] = set()

    def pin(self) -> object:
        return [list(attempt.scoped.values()) for attempt in list(self.attempts)]

    def discard(self) -> tuple[object, Sequence[int]]:
        kept = []
        for attempt in list(self.attempts):
            # Its transaction is the parent's. What the child does from here on begins a session of its own.
            kept.append((attempt, attempt.scoped, attempt.values))
            attempt.scoped, attempt.values = {}, {}
        self.attempts = set()
        return kept, ()


_active = _Active()


def protect() -> None:
    """Have forked children discard the sessions of the attempts that run at that moment."""
    fork.guard(_active)


#: Return the attempt of the calling context, or None.
current: Callable[[], Attempt | None] = _current.get


def deadline() -> Deadline:
    """Return when the attempt of the calling context must have ended; without one there is no deadline."""
    attempt = _current.get()
    return NO_DEADLINE if attempt is None else attempt.deadline


def require(what: str, instead: str = "") -> Attempt:
    """Return the attempt of the calling context.

    Args:
        what: What belongs to it, for the message.
        instead: What to do elsewhere, for the message.

    Raises:
        NoAttemptError: There is none.
    """
    attempt = _current.get()
    if attempt is None:
        raise NoAttemptError(
            f"{what} belongs to one run of a task body, and none runs here. Use it in the body itself, not in "
            "__call__, before_start, on_failure or after_return, nor in a thread that the body started"
            f"{instead and '; elsewhere '}{instead}. If this is the body itself, the task's base must be a PooledTask"
        )
    return attempt


def running() -> list[Attempt]:
    """Return the attempts that run in this process."""
    return list(_active.attempts)


def concerned() -> list[Attempt]:
    """Return the attempts that what is done here and now belongs to.

    That of the calling context and those it runs inside of. A thread that a body started has none: what it does may
    belong to every attempt of the process.
    """
    attempt = _current.get()
    return running() if attempt is None else line(attempt)


def line(attempt: Attempt | None) -> list[Attempt]:
    """Return ``attempt`` and those it runs inside of, the innermost first."""
    found = []
    while attempt is not None:
        found.append(attempt)
        attempt = attempt.parent
    return found


def note_failure(error: BaseException, noted: Noted) -> None:
    """Note what is known of ``error``, which is about to be raised: on it, and in the attempt."""
    attach(error, noted)
    attempt = _current.get()
    if attempt is not None:
        attempt.noted = (*attempt.noted, noted)[:MAX_NOTED]


def wait_for_others(resources: Collection[object], timeout: float) -> bool:
    """Wait until no attempt that uses one of ``resources`` runs, but the caller's own.

    Args:
        resources: The resources.
        timeout: How long to wait, in seconds.

    Returns:
        Whether they all ended.
    """
    own, wanted = set(line(_current.get())), set(resources)
    until = time.monotonic() + timeout
    # Polled, so that an attempt's end costs no notification.
    while any(not wanted.isdisjoint(attempt.values) for attempt in _active.attempts.copy() - own):
        if time.monotonic() >= until:
            return False
        time.sleep(0.01)
    return True


#: How many effects an attempt remembers: the first one decides already, the others are there to be read.
MAX_EFFECTS = 100


def note_effect(effect: Effect) -> None:
    """Note that something leaves which cannot be taken back.

    It counts for the attempt of the calling context and for those it runs inside of. A thread that a body started has
    no attempt: what leaves there counts for every attempt of the process, since any of them may have started it.

    Args:
        effect: What leaves. The same object may be noted again: it counts once.
    """
    attempt = _current.get()
    for each in running() if attempt is None else (attempt,) if attempt.parent is None else line(attempt):
        noted = each.noted_effects
        if len(noted) >= MAX_EFFECTS:
            # What was withdrawn makes room.
            noted = each.effects
        if len(noted) < MAX_EFFECTS and effect not in noted:
            # A new tuple: another thread may be looking at this one.
            each.noted_effects = (*noted, effect)


def declare_effect(what: str) -> None:
    """Note an effect that no resource sees: a mail, a file, a call of somebody else's client.

    Args:
        what: A short phrase without secrets, for the message that says why a task was not run again.

    Raises:
        NoAttemptError: No task body runs in this process.
    """
    if not concerned():
        raise NoAttemptError(f"the effect {what!r} belongs to one run of a task body, and none runs here")
    note_effect(Effect(what))
