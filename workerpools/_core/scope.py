"""The attempt: one run of a task body, and what belongs to it alone.

An attempt owns the sessions that its body used and knows what its body has done that cannot be taken back. It opens
nothing by itself, and keeps nothing on the task object: threads share that.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextvars import ContextVar, Token
from dataclasses import dataclass
from typing import Any, Protocol

from workerpools._core import fork
from workerpools._core.events import Listeners
from workerpools.errors import NoAttemptError

__all__ = [
    "Attempt",
    "Effect",
    "Scoped",
    "Stale",
    "current",
    "note_effect",
    "note_stale",
    "note_use",
    "protect",
    "require",
    "wait_for_others",
    "withdraw_effect",
]

logger = logging.getLogger("workerpools")

#: How many effects an attempt remembers: the first one decides already, the others are there to be read.
MAX_EFFECTS = 100

_current: ContextVar[Attempt | None] = ContextVar("workerpools_attempt", default=None)


class Scoped(Protocol):
    """Something that an attempt ends: a session."""

    def commit(self) -> object:
        """Make what was done permanent."""

    def rollback(self) -> object:
        """Undo what was done."""

    def close(self) -> object:
        """Give the connection back."""

    def invalidate(self) -> object:
        """Throw the connection away, when giving it back failed."""


@dataclass(frozen=True, eq=False)
class Effect:
    """Something that left in an attempt and cannot be taken back; ``what`` is a short phrase without secrets."""

    what: str


@dataclass(frozen=True, eq=False)
class Stale:
    """A connection was dead when it was used, and nothing was applied (see :func:`note_stale`)."""

    error: BaseException
    resource: str
    packages: tuple[str, ...]
    listeners: Listeners


class Attempt:
    """One run of a task body.

    Args:
        request: The Celery request it runs for, whose identity tells one run from another; None outside a worker.
    """

    __slots__ = ("_scoped", "_token", "effects", "owners", "parent", "request", "stale")

    def __init__(self, request: object = None) -> None:
        self.request = request
        self.parent = _current.get()
        #: What left that cannot be taken back.
        self.effects: list[Effect] = []
        #: The errors of connections that were dead before the server did anything.
        self.stale: list[Stale] = []
        #: The registries whose resources it has used.
        self.owners: set[object] = set()
        self._scoped: dict[object, Scoped] = {}
        self._token: Token[Attempt | None] | None = None

    def scoped(self, key: object, make: Callable[[], Scoped]) -> Any:
        """Return the attempt's object for ``key``, made on the first call."""
        made = self._scoped.get(key)
        if made is None:
            made = self._scoped[key] = make()
        return made

    def enter(self) -> None:
        """Make this the current attempt of the calling context."""
        self._token = _current.set(self)
        _active.attempts.add(self)

    def leave(self) -> None:
        """Restore the attempt that was current before."""
        _active.attempts.discard(self)
        if self._token is not None:
            _current.reset(self._token)

    def commit(self) -> None:
        """Commit what the body did, in the order in which it began.

        Raises:
            Exception: The first failure to commit; nothing is committed after it.
        """
        for scoped in self._scoped.values():
            scoped.commit()

    def close(self, *, rollback: bool) -> None:
        """Close everything the attempt owns. Never raises an Exception: the outcome is decided already.

        Args:
            rollback: Undo first: the body did not return, or a commit failed.

        Raises:
            BaseException: SystemExit, KeyboardInterrupt or GreenletExit that arrived during the clean-up, after it.
        """
        interruption: BaseException | None = None
        while self._scoped:
            _, scoped = self._scoped.popitem()
            for step in (scoped.rollback, scoped.close) if rollback else (scoped.close,):
                failure = _guarded(step)
                if failure is None:
                    continue
                if not isinstance(failure, Exception):
                    interruption = failure
                logger.debug("cleaning up after an attempt failed: %s", type(failure).__name__, exc_info=failure)
                # What could not be rolled back or closed must not go back to its pool.
                _guarded(scoped.invalidate)
        if interruption is not None:
            raise interruption

    def stale_for(self, error: BaseException) -> Stale | None:
        """Return what was noted of ``error``, if it is that of a dead connection."""
        return next((stale for stale in self.stale if stale.error is error), None)


def _guarded(step: Callable[[], object]) -> BaseException | None:
    try:
        step()
    except BaseException as failure:
        return failure
    return None


class _Active:
    """The attempts that run in this process now."""

    def __init__(self) -> None:
        self.attempts: set[Attempt] = set()

    def pin(self) -> object:
        return [list(attempt._scoped.values()) for attempt in list(self.attempts)]

    def discard(self) -> tuple[object, Sequence[int]]:
        kept = []
        for attempt in list(self.attempts):
            # Its transaction is the parent's. What the child does from here on begins a session of its own.
            kept.append((attempt, attempt._scoped))
            attempt._scoped = {}
        self.attempts = set()
        return kept, ()


_active = _Active()


def protect() -> None:
    """Have forked children discard the sessions of the attempts that run at that moment."""
    fork.guard(_active)


def current() -> Attempt | None:
    """Return the attempt of the calling context, or None."""
    return _current.get()


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
            "make a session of your own: sqlalchemy.orm.Session(engine)"
        )
    return attempt


def note_effect(effect: Effect) -> None:
    """Note that something leaves which cannot be taken back.

    It counts for the attempt of the calling context and for those it runs inside of. A thread that a body started has
    no attempt: what leaves there counts for every attempt of the process, since any of them may have started it.

    Args:
        effect: What leaves. The same object may be noted again: it counts once.
    """
    attempt = _current.get()
    concerned = list(_active.attempts) if attempt is None else _with_parents(attempt)
    for attempt in concerned:
        if len(attempt.effects) < MAX_EFFECTS and effect not in attempt.effects:
            attempt.effects.append(effect)


def withdraw_effect(effect: Effect) -> None:
    """Take back a noted effect: it turned out that the server cannot have acted on it."""
    for attempt in {*_active.attempts, *_with_parents(_current.get())}:
        # A new list: another thread may be looking at this one.
        attempt.effects = [noted for noted in attempt.effects if noted is not effect]


def _with_parents(attempt: Attempt | None) -> list[Attempt]:
    line = []
    while attempt is not None:
        line.append(attempt)
        attempt = attempt.parent
    return line


def note_stale(error: BaseException, resource: str, packages: tuple[str, ...], listeners: Listeners) -> None:
    """Note that ``error`` was raised because a pooled connection was dead and nothing was applied.

    Args:
        error: The exception that is about to be raised.
        resource: Whose connection it was.
        packages: The top-level packages whose exceptions may stand in the error's chain of causes.
        listeners: Who is told when the body runs again because of it.
    """
    attempt = _current.get()
    if attempt is not None:
        attempt.stale.append(Stale(error, resource, packages, listeners))


def note_use(owner: object) -> None:
    """Note that the current attempt uses resources of the registry ``owner``."""
    attempt = _current.get()
    if attempt is not None:
        attempt.owners.add(owner)


def wait_for_others(owner: object, timeout: float) -> bool:
    """Wait until no attempt that uses resources of ``owner`` runs, but the caller's own.

    Args:
        owner: The registry.
        timeout: How long to wait, in seconds.

    Returns:
        Whether they all ended.
    """
    own = set(_with_parents(_current.get()))
    deadline = time.monotonic() + timeout
    # Polled, so that an attempt's end costs no notification.
    while any(owner in attempt.owners for attempt in _active.attempts.copy() - own):
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.01)
    return True
