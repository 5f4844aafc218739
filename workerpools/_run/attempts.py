"""The attempt: one run of a task body, and what belongs to it alone."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Protocol

from workerpools._process import fork
from workerpools._run import attempts, failure
from workerpools._run.deadline import NO_DEADLINE, Deadline
from workerpools._run.failure import Noted
from workerpools.errors import NoAttemptError

if TYPE_CHECKING:
    from workerpools._pools.resource import Resource

__all__ = [
    "Allowance",
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
    "withdraw_effect",
]

logger = logging.getLogger("workerpools")

#: How many failures an attempt remembers; it is the first one that later ones follow from.
MAX_NOTED = 20

#: How often the sessions of an attempt are committed, where that begins others.
MAX_ROUNDS = 20

_current: ContextVar[Attempt | None] = ContextVar("workerpools_attempt", default=None)


class Scoped(Protocol):
    """Something that an attempt ends: a session."""

    def finish(self) -> bool:
        """Make what was done permanent; return whether there was anything."""
        ...

    def rollback(self) -> object:
        """Undo what was done."""

    def end(self) -> object:
        """Give the connection back, for good."""

    def invalidate(self) -> object:
        """Throw the connection away, when giving it back failed."""


class Allowance(Protocol):
    """What a task may still replay."""

    def take_replay(self, noted: Noted) -> bool:
        """Count one replay because of ``noted``, if there may be one; return whether there may."""
        ...

    @property
    def deadline(self) -> Deadline:
        """When the task must have ended."""
        ...

    @property
    def task(self) -> str:
        """The task's name."""
        ...

    @property
    def request(self) -> object:
        """The Celery request it runs for, whose identity tells one run from another; None outside a worker."""
        ...


class Attempt:
    """One run of a task body.

    Args:
        allowance: What it may still replay; None where nothing is known of that.
        parent: The attempt that it runs inside of.
    """

    # At the class until they are set: most attempts need few of them, and every one would pay.

    #: What left that cannot be taken back.
    effects: tuple[Effect, ...] = ()
    #: What is known of the exceptions that its resources raised.
    noted: tuple[Noted, ...] = ()
    #: The resources it has used.
    used: tuple[Resource[Any], ...] = ()
    #: Whether it has been left, as a whole.
    left = False

    def __init__(self, allowance: Allowance | None = None, parent: Attempt | None = None) -> None:
        self.allowance = allowance
        self.parent = parent
        #: What it has lent to its body and ends with it, by whoever lent it.
        self.lent: dict[object, Scoped] = {}

    @property
    def deadline(self) -> Deadline:
        """When the attempt must have ended: its own task's limit, or that of the attempt it runs inside of."""
        own = NO_DEADLINE if self.allowance is None else self.allowance.deadline
        return own if self.parent is None else own.nearest(self.parent.deadline)

    def enter(self) -> None:
        """Make this the current attempt of the calling context."""
        _current.set(self)
        _active.attempts.add(self)

    def leave(self) -> None:
        """Restore the attempt that was current before. To be called again where a signal struck in the middle."""
        if _current.get() is self:
            _current.set(self.parent)
        _active.attempts.discard(self)
        self.left = True

    def commit(self) -> None:
        """Commit what the body did, in the order in which it began.

        Raises:
            Exception: The first failure to commit; nothing is committed after it.
        """
        for _ in range(MAX_ROUNDS):
            # Listeners of one session may use another one, which is begun by that, or was committed before.
            committed = False
            for scoped in tuple(self.lent.values()):
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
        while self.lent:
            scoped = self.lent.popitem()[1]
            if rollback:
                interruption = _guarded(scoped.rollback, scoped) or interruption
            interruption = _guarded(scoped.end, scoped) or interruption
        if interruption is not None:
            raise interruption

    def classify(self, error: BaseException) -> Noted | None:
        """Ask the resources that were used what is known of ``error``, where nothing was noted when it was raised."""
        earlier = tuple(noted.failure for noted in self.noted if noted.failure is not None)
        for resource in self.used:
            noted = resource.classify(error, earlier)
            if noted is not None:
                if noted.owner is not None and noted.failure is not None:
                    noted.owner.failed(noted.failure)
                return noted
        return None


def _guarded(step: Callable[[], object], scoped: Scoped) -> BaseException | None:
    """Do one step of the clean-up; return what interrupts the process."""
    try:
        step()
        return None
    except BaseException as failure:
        logger.debug("cleaning up after an attempt failed: %s", type(failure).__name__, exc_info=failure)
        # What could not be rolled back or closed must not go back to its pool.
        with contextlib.suppress(BaseException):
            scoped.invalidate()
        return None if isinstance(failure, Exception) else failure


class _Active:
    """The attempts that run in this process now."""

    def __init__(self) -> None:
        self.attempts: set[Attempt] = set()

    def pin(self) -> object:
        return [list(attempt.lent.values()) for attempt in list(self.attempts)]

    def discard(self) -> tuple[object, Sequence[int]]:
        kept = []
        for attempt in list(self.attempts):
            # Its transaction is the parent's. What the child does from here on begins a session of its own.
            kept.append((attempt, attempt.lent))
            attempt.lent = {}
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


def require(what: str) -> Attempt:
    """Return the attempt of the calling context.

    Raises:
        NoAttemptError: There is none; the message names ``what`` was asked for.
    """
    attempt = _current.get()
    if attempt is None:
        raise NoAttemptError(
            f"{what} belongs to one run of a task body, and none runs here. Use it in the body itself, not in "
            "__call__, before_start, on_failure or after_return, nor in a thread that the body started; elsewhere "
            "make a session of your own: sqlalchemy.orm.Session(engine). If this is the body itself, the task's base "
            "must be a PooledTask"
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
    if noted.owner is not None and noted.failure is not None and failure.noted_of(error) is None:
        noted.owner.failed(noted.failure)
    failure.attach(error, noted)
    attempt = _current.get()
    if attempt is not None:
        attempt.noted = (*attempt.noted, noted)[:MAX_NOTED]


def wait_for_others(owner: object, timeout: float) -> bool:
    """Wait until no attempt that uses resources of ``owner`` runs, but the caller's own.

    Args:
        owner: The registry.
        timeout: How long to wait, in seconds.

    Returns:
        Whether they all ended.
    """
    own = set(line(_current.get()))
    deadline = time.monotonic() + timeout
    # Polled, so that an attempt's end costs no notification.
    while any(used.registry is owner for attempt in _active.attempts.copy() - own for used in attempt.used):
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.01)
    return True


#: How many effects an attempt remembers: the first one decides already, the others are there to be read.
MAX_EFFECTS = 100


class Effect:
    """Something that left in an attempt and cannot be taken back. Two of the same text are two effects.

    Attributes:
        what: A short phrase without secrets, like ``POST by 'api'``.
    """

    __slots__ = ("what",)

    def __init__(self, what: str) -> None:
        self.what = what

    def __repr__(self) -> str:
        return f"Effect({self.what!r})"

    def __str__(self) -> str:
        return self.what


def note_effect(effect: Effect) -> None:
    """Note that something leaves which cannot be taken back.

    It counts for the attempt of the calling context and for those it runs inside of. A thread that a body started has
    no attempt: what leaves there counts for every attempt of the process, since any of them may have started it.

    Args:
        effect: What leaves. The same object may be noted again: it counts once.
    """
    for attempt in attempts.concerned():
        if len(attempt.effects) < MAX_EFFECTS and effect not in attempt.effects:
            # A new tuple: another thread may be looking at this one.
            attempt.effects = (*attempt.effects, effect)


def withdraw_effect(effect: Effect) -> None:
    """Take back a noted effect: it turned out that the server cannot have acted on it."""
    for attempt in {*attempts.running(), *attempts.concerned()}:
        attempt.effects = tuple(noted for noted in attempt.effects if noted is not effect)


def declare_effect(what: str) -> None:
    """Note an effect that no resource sees: a mail, a file, a call of somebody else's client.

    Args:
        what: A short phrase without secrets, for the message that says why a task was not run again.

    Raises:
        NoAttemptError: No task body runs in this process.
    """
    if not attempts.concerned():
        raise NoAttemptError(f"the effect {what!r} belongs to one run of a task body, and none runs here")
    note_effect(Effect(what))
