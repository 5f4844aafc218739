"""Attempts: one run of a task body, and the state that belongs to that run alone."""

from __future__ import annotations

import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from contextvars import ContextVar
from functools import cached_property
from typing import Any

from workerpools._process import fork
from workerpools._run.budget import Budget
from workerpools._run.deadline import NO_DEADLINE, Deadline
from workerpools._run.delivery import Delivery
from workerpools._run.failure import Noted, attach, is_interruption
from workerpools.errors import NoAttemptError

__all__ = [
    "Attempt",
    "Effect",
    "Scoped",
    "concerned",
    "current",
    "deadline",
    "declare_effect",
    "last_returned",
    "line",
    "note_effect",
    "note_failure",
    "protect",
    "require",
    "running",
    "wait_for_others",
]

logger = logging.getLogger("workerpools")

#: The most failures recorded per attempt; later ones usually follow from the first.
MAX_NOTED = 20

#: The most rounds of commits per attempt, as commits may begin further work.
MAX_ROUNDS = 20

_current: ContextVar[Attempt | None] = ContextVar("workerpools_attempt", default=None)

#: The context's last outermost attempt, if it succeeded.
last_returned: ContextVar[Attempt | None] = ContextVar("workerpools_returned", default=None)


class Effect:
    """An irreversible effect of an attempt. Effects with the same text are distinct.

    Args:
        what: A short phrase without secrets, like ``POST by 'api'``.
        unless: Called when the effects are looked at: returns True while the effect has not happened. None for an
            effect that has happened, or may have.

    Attributes:
        what: The phrase.
        unless: The function; None once the effect is settled.
    """

    # Class attributes until set: most tasks have effects, and each would pay for a longer constructor.
    _withdrawn = False
    unless: Callable[[], bool] | None = None

    def __init__(self, what: str, unless: Callable[[], bool] | None = None) -> None:
        self.what = what
        self.unless = unless

    @property
    def withdrawn(self) -> bool:
        """Whether the effect is known not to have happened. No attempt lists it then."""
        return self._withdrawn or (self.unless is not None and self.unless())

    def withdraw(self) -> None:
        """Withdraw the effect, once it is certain that the server cannot have acted on the request."""
        self._withdrawn = True

    def settle(self) -> None:
        """Ask for the last time: the effect counts from now on as it does at this moment."""
        self._withdrawn, self.unless = self.withdrawn, None

    def __repr__(self) -> str:
        return f"Effect({self.what!r})"

    def __str__(self) -> str:
        return self.what


class Scoped:
    """An object that belongs to one attempt and ends with it: a session, a batch, a lock.

    The attempt calls these methods in its own thread: :meth:`finish` after the body has returned, :meth:`rollback` on
    every other exit, then :meth:`end` in both cases.
    """

    def finish(self) -> bool:
        """Commit pending work.

        Called again until every scoped object of the attempt returns False: a commit's listeners may begin more work.

        Returns:
            Whether there was anything to commit.

        Raises:
            Exception: The commit failed; the attempt fails with this error.
        """
        return False

    def rollback(self) -> object:
        """Undo all work. The attempt has failed already.

        Raises:
            Exception: Logged; :meth:`invalidate` is called.
        """

    def end(self) -> object:
        """Release all connections and other resources, for good.

        Raises:
            Exception: Logged; :meth:`invalidate` is called.
        """

    def invalidate(self) -> object:
        """Discard the connection, after a failed rollback or release. Its errors are ignored."""


class Attempt:
    """One run of a task body.

    Args:
        delivery: Its delivery; None if unknown.
        parent: The enclosing attempt; None for an outermost one.
    """

    # Class attributes until set: most attempts need few of them, and setting them costs time in every one.

    #: All recorded effects, including withdrawn ones.
    noted_effects: tuple[Effect, ...] = ()
    #: Notes about the exceptions raised by its resources.
    noted: tuple[Noted, ...] = ()
    #: The effects noted when its commit began; None before.
    before_commit: tuple[Effect, ...] | None = None
    #: Whether it has ended.
    ended = False
    #: Whether the body has returned and every session is committed.
    committed = False
    #: What waits for its commit, in order; None if nothing does.
    waiting: deque[Any] | None = None
    #: The tasks of the event loop that it started and that outlived it, although they were cancelled.
    left_tasks: tuple[Any, ...] = ()
    #: Whether its body is a coroutine function that uses what a coroutine opens.
    awaits = False
    #: Whether a time limit or an exit ended it: at any point, also between two steps of ours.
    interrupted = False
    #: Called with the attempt after it has ended; see :meth:`callback`.
    callbacks: Sequence[Callable[[Attempt], BaseException | None]] = ()

    def __init__(self, delivery: Delivery | None = None, parent: Attempt | None = None) -> None:
        self.delivery = delivery
        self.parent = parent
        #: The values it uses, by holder: each is kept until the attempt ends. None while one is being opened.
        self.values: dict[Any, Any] = {}
        #: Its scoped objects, by key.
        self.scoped: dict[object, Any] = {}

    @property
    def task(self) -> str:
        """The task's name; empty if unknown."""
        return "" if self.delivery is None else self.delivery.terms.name

    @property
    def instance(self) -> Any:
        """The task's object, ``self`` in its body; None for a plain function."""
        return None if self.delivery is None else self.delivery.terms.instance

    @property
    def effects(self) -> tuple[Effect, ...]:
        """The effects that were not withdrawn."""
        return tuple([effect for effect in self.noted_effects if not effect.withdrawn])

    @property
    def budget(self) -> Budget | None:
        """The budget of the first resource it used, which gets a token for a success without replays."""
        for value in self.values.values():
            if value is not None:
                budget: Budget = value.opening.budget
                return budget
        return None

    @cached_property
    def deadline(self) -> Deadline:
        """The earlier of its own task's deadline and that of the enclosing attempt."""
        own = NO_DEADLINE if self.delivery is None else self.delivery.deadline
        return own if self.parent is None else own.nearest(self.parent.deadline)

    def callback(self, function: Callable[[Attempt], BaseException | None]) -> None:
        """Register a function to call after the attempt has ended, in its thread, in the order of registration.

        Args:
            function: Called with the attempt; again if a signal interrupts it. Returns the interruption (SystemExit,
                GreenletExit) that it caught, or None. Must not raise.
        """
        self.callbacks = (*self.callbacks, function)

    def enter(self) -> None:
        """Make this the current attempt of the calling context."""
        _current.set(self)
        _active.attempts.add(self)

    def leave(self) -> None:
        """Restore the enclosing attempt as the current one. Idempotent, because a signal may interrupt it."""
        if _current.get() is self:
            _current.set(self.parent)
        self.ended = True

    def commit(self) -> None:
        """Commit the scoped objects, in the order of their creation.

        Raises:
            Exception: The first failure to commit; nothing is committed after it.
        """
        self.before_commit = self.noted_effects
        for _ in range(MAX_ROUNDS):
            # A session's commit listeners may use another session, new or already committed.
            committed = False
            for scoped in tuple(self.scoped.values()):
                if scoped.finish():
                    committed = True
            if not committed:
                return
        raise RuntimeError("listeners of the sessions began another transaction at every commit")

    def close(self, *, rollback: bool) -> None:
        """Close the scoped objects. Never raises an Exception: the outcome is decided already.

        Args:
            rollback: Whether to roll back first, because the body did not return or a commit failed.

        Raises:
            BaseException: A SystemExit, KeyboardInterrupt or GreenletExit that arrived during the clean-up; raised
                after the clean-up.
        """
        interruption: BaseException | None = None
        while self.scoped:
            # Removed when it has ended: a signal may interrupt each step, and then it is closed again.
            key, scoped = next(reversed(self.scoped.items()))
            if rollback:
                try:
                    scoped.rollback()
                except BaseException as failure:
                    interruption = self._failed_to_clean_up(scoped, failure) or interruption
            try:
                scoped.end()
            except BaseException as failure:
                interruption = self._failed_to_clean_up(scoped, failure) or interruption
            self.scoped.pop(key, None)
        if interruption is not None:
            raise interruption

    def _failed_to_clean_up(self, scoped: Any, failure: BaseException) -> BaseException | None:
        """Keep the connection of a failed clean-up out of its pool; return ``failure`` if it interrupts the process."""
        if is_interruption(failure):
            self.interrupted = True
        logger.debug("cleaning up after an attempt failed: %s", type(failure).__name__, exc_info=failure)
        with contextlib.suppress(BaseException):
            scoped.invalidate()
        return None if isinstance(failure, Exception) else failure

    def end(self) -> None:
        """Leave the attempt unless already done, release its values, and run the callbacks.

        Until then it counts as running: threads of the body may have effects while its failure is examined.

        Called before a failed attempt is replayed or retried, so that an interruption of a callback ends the task while
        no retry was sent. A second call goes on where a signal struck.

        Raises:
            BaseException: An interruption that arrived meanwhile.
        """
        if not self.ended:
            # As leave() does, without the call: most attempts end here.
            if _current.get() is self:
                _current.set(self.parent)
            self.ended = True
        _active.attempts.discard(self)
        if self.scoped:
            # A signal interrupted its closing.
            self.close(rollback=True)
        interruption: BaseException | None = None
        values = self.values
        while values:
            for holder in (*values,):
                # Removed once it is released: a signal may interrupt each step, and then it is released again.
                interruption = holder.attempt_ended(self) or interruption
                values.pop(holder, None)
        while self.callbacks:
            interruption = self.callbacks[0](self) or interruption
            self.callbacks = self.callbacks[1:]
        if interruption is not None:
            raise interruption

    def classify(self, error: BaseException) -> Noted | None:
        """Return the first classification of an error without a note, by a resource in use.

        Args:
            error: The exception that ended the attempt.

        Returns:
            The note; None if no resource recognizes the error.
        """
        earlier = tuple(noted.failure for noted in self.noted if noted.failure is not None)
        for holder in self.values:
            noted: Noted | None = holder.classify(error, earlier)
            if noted is not None:
                return noted
        return None


class _Active:
    """The running attempts of this process."""

    def __init__(self) -> None:
        self.attempts: set[Attempt] = set()

    def pin(self) -> object:
        return [list(attempt.scoped.values()) for attempt in list(self.attempts)]

    def discard(self) -> tuple[object, Sequence[int]]:
        kept = []
        for attempt in list(self.attempts):
            # Its transaction is the parent's. Later work in the child begins a session of its own.
            kept.append((attempt, attempt.scoped, attempt.values))
            attempt.scoped, attempt.values = {}, {}
        self.attempts = set()
        return kept, ()


_active = _Active()


def protect() -> None:
    """Make forked children discard the sessions of the attempts running at the fork."""
    fork.guard(_active)


#: Returns the attempt of the calling context; None outside one.
current: Callable[[], Attempt | None] = _current.get


def deadline() -> Deadline:
    """Return the deadline of the attempt in the calling context; one without a limit outside an attempt."""
    attempt = _current.get()
    return NO_DEADLINE if attempt is None else attempt.deadline


def require(what: str, instead: str = "") -> Attempt:
    """Return the attempt of the calling context.

    Args:
        what: The object that needs the attempt, for the message.
        instead: The alternative outside an attempt, for the message.

    Raises:
        NoAttemptError: No attempt runs in the calling context.
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
    """Return the running attempts of this process."""
    return list(_active.attempts)


def concerned() -> list[Attempt]:
    """Return the attempts that the calling code belongs to.

    These are the attempt of the calling context and its enclosing ones. In a thread without an attempt, they are all
    attempts of the process: any of them may have started the thread.
    """
    attempt = _current.get()
    return running() if attempt is None else line(attempt)


def line(attempt: Attempt | None) -> list[Attempt]:
    """Return ``attempt`` and its enclosing attempts, the innermost first."""
    found = []
    while attempt is not None:
        found.append(attempt)
        attempt = attempt.parent
    return found


def note_failure(error: BaseException, noted: Noted) -> None:
    """Record a note about ``error``, which is about to be raised, on the exception and in the attempt."""
    attach(error, noted)
    attempt = _current.get()
    if attempt is not None:
        attempt.noted = (*attempt.noted, noted)[:MAX_NOTED]


def wait_for_others(holders: Collection[object], timeout: float) -> bool:
    """Wait for the end of all other attempts that use a value of one of ``holders``.

    Args:
        holders: The holders.
        timeout: The longest wait, in seconds.

    Returns:
        Whether all of them ended.
    """
    own, wanted = set(line(_current.get())), set(holders)
    until = time.monotonic() + timeout
    # Polled, so that ending an attempt costs no notification.
    while any(not wanted.isdisjoint(attempt.values) for attempt in _active.attempts.copy() - own):
        if time.monotonic() >= until:
            return False
        time.sleep(0.01)
    return True


#: The most effects recorded per attempt: one is enough to decide, and the others are for people.
MAX_EFFECTS = 100


def note_effect(effect: Effect) -> None:
    """Record an irreversible effect, before it happens.

    It counts for the attempt of the calling context and its enclosing ones. In a thread without an attempt, it counts
    for all attempts of the process: any of them may have started the thread.

    Args:
        effect: The effect. Recording the same object again changes nothing.
    """
    attempt = _current.get()
    for each in running() if attempt is None else (attempt,) if attempt.parent is None else line(attempt):
        noted = each.noted_effects
        if len(noted) >= MAX_EFFECTS:
            # Drop withdrawn effects to make room.
            noted = each.effects
        if len(noted) < MAX_EFFECTS and effect not in noted:
            # A new tuple: another thread may be reading the old one.
            each.noted_effects = (*noted, effect)


def declare_effect(what: str) -> None:
    """Record an effect that no resource observes: a mail, a file, a call with an unmanaged client.

    Args:
        what: A short phrase without secrets, for the note on why a task was not run again.

    Raises:
        NoAttemptError: No task body runs in this process.
    """
    if not concerned():
        raise NoAttemptError(f"the effect {what!r} belongs to one run of a task body, and none runs here")
    note_effect(Effect(what))
