"""What a failure proves: its kind, what had been sent, and which exception of a chain is the real one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple

from workerpools._run.budget import Budget
from workerpools._run.events import Listeners

__all__ = [
    "Failure",
    "FailureKind",
    "Noted",
    "Phase",
    "Sent",
    "Verdict",
    "attach",
    "causes",
    "is_interruption",
    "judge",
    "know_libraries",
    "known_libraries",
    "noted_of",
]


class FailureKind(str, Enum):
    """What is known after a failure; the values are stable."""

    #: The pooled connection was dead and nothing was applied.
    STALE = "stale"
    #: It may have been applied (compare SQLSTATE 08007 and 40003).
    INDETERMINATE = "indeterminate"
    #: Not applied; the server cannot serve now.
    UNAVAILABLE = "unavailable"
    #: Not sent: no connection of the local connection pool came free in time.
    POOL_EXHAUSTED = "pool_exhausted"
    #: Rolled back for certain, over a connection that is fine: serialization, deadlock, lock timeout.
    ABORTED = "aborted"
    #: Not applied, and never will be: credentials, TLS verification, no such database.
    PERMANENT = "permanent"


class Sent(str, Enum):
    """How much of a request or statement may have reached the server."""

    NOTHING = "nothing"
    PARTIAL = "partial"
    ALL = "all"
    #: The driver does not tell.
    UNKNOWN = "unknown"


class Phase(str, Enum):
    """What was being done."""

    ACQUIRE = "acquire"
    CONNECT = "connect"
    STATEMENT = "statement"
    COMMIT = "commit"
    ROLLBACK = "rollback"
    REQUEST = "request"
    RESPONSE = "response"


@dataclass(frozen=True)
class Failure:
    """A failure of a connection, and what it proves.

    Attributes:
        kind: What is known.
        sent: How much may have reached the server.
        resource: The resource's name; empty for a connection that is none of ours.
        phase: What was being done.
        code: The SQLSTATE, the driver's error number or the HTTP status, where there is one.
        retry_after: The seconds that the server asks to wait (RFC 9110 §10.2.3).
        timed_out: Whether a time-out told, rather than an end of the connection.
        known: A short sentence about what is known, without secrets.
    """

    kind: FailureKind
    sent: Sent
    resource: str = ""
    phase: Phase = Phase.STATEMENT
    code: str = ""
    retry_after: float | None = None
    timed_out: bool = False
    known: str = ""


@dataclass(frozen=True)
class Noted:
    """What an adapter noted of an exception when it was raised.

    Attributes:
        failure: None if it is no failure of a connection, though the adapter's library raised it.
        phase: What was being done.
        deadline: Whether the task's deadline ended it.
        budget: Pays for replays; None for a connection that is none of ours.
        listeners: Hear of what follows; None likewise.
    """

    failure: Failure | None
    phase: Phase
    deadline: bool = False
    budget: Budget | None = field(default=None, repr=False, compare=False)
    listeners: Listeners | None = field(default=None, repr=False, compare=False)

    def __reduce__(self) -> tuple[Any, ...]:
        # Celery may pickle the exception that this is attached to.
        return Noted, (self.failure, self.phase, self.deadline)


class Verdict(NamedTuple):
    """What ended an attempt.

    Attributes:
        error: The exception that is to come out: the one that was raised, or the one that a clean-up had masked.
        noted: What is known of it; None if it is no failure of a connection.
    """

    error: BaseException
    noted: Noted | None

    @property
    def failure(self) -> Failure | None:
        """The failure, if it is one."""
        return None if self.noted is None else self.noted.failure


_ATTRIBUTE = "__workerpools__"

#: Top-level packages whose exceptions tell of connections: what they raise over another exception may mask it. Adapters
#: add their client's and its drivers'; ``OSError`` counts always.
_libraries: set[str] = set()


def know_libraries(packages: Iterable[str]) -> None:
    """Take the exceptions of these top-level packages for a connection library's."""
    _libraries.update(packages)


def known_libraries() -> frozenset[str]:
    """Return the packages given to :func:`know_libraries`."""
    return frozenset(_libraries)


def attach(error: BaseException, noted: Noted) -> None:
    """Note on ``error`` what is known of it. What was noted first stays: it was nearer to the cause."""
    if getattr(error, _ATTRIBUTE, None) is None:
        try:
            setattr(error, _ATTRIBUTE, noted)
        except Exception:  # an exception class without a __dict__
            return


def noted_of(error: BaseException) -> Noted | None:
    """Return what an adapter noted of this very exception."""
    noted = getattr(error, _ATTRIBUTE, None)
    return noted if isinstance(noted, Noted) else None


def judge(error: BaseException, classify: Callable[[BaseException], Noted | None]) -> Verdict:
    """Find out what ended an attempt: walk the chain of causes.

    - A time limit or an exit anywhere in the chain means that it is no failure of a connection. Where a library's
      error masks it, because a clean-up failed, it comes out as itself.
    - An exception of the body that a failed rollback masks comes out as itself.
    - What the body raised ``from`` a library's error is judged as that error. An error that was merely being handled
      (``__context__``) is not looked at: the body had its reasons.

    Args:
        error: What ended the attempt.
        classify: Asked for exceptions that nothing was noted of when they were raised.
    """
    noted = noted_of(error)
    if noted is None or noted.failure is None:
        noted = classify(error) or noted
    chain = causes(error)
    masks = noted is not None or is_library(error)
    for cause in chain:
        if is_interruption(cause):
            return Verdict(cause if masks else error, None)
    if noted is not None and noted.phase is Phase.ROLLBACK:
        for cause in chain:
            if not is_library(cause):
                return Verdict(cause, None)
    explicit, seen = error.__cause__, {id(error)}
    # ``raise error from error`` makes a chain that bites its own tail.
    while noted is None and explicit is not None and id(explicit) not in seen:
        seen.add(id(explicit))
        noted = noted_of(explicit) or classify(explicit)
        explicit = explicit.__cause__
    return Verdict(error, noted)


def causes(error: BaseException) -> list[BaseException]:
    """Return ``error`` and everything it was raised from or during, each once, the nearest first."""
    found: dict[int, BaseException] = {}
    pending: list[BaseException | None] = [error]
    while pending:
        each = pending.pop(0)
        if each is not None and id(each) not in found:
            found[id(each)] = each
            pending += (each.__cause__, each.__context__)
    return list(found.values())


def is_interruption(error: BaseException) -> bool:
    """Return whether ``error`` ends a task from outside: a soft time limit, an exit, GreenletExit, gevent.Timeout."""
    if not isinstance(error, Exception):
        return True
    # Known by name: the core imports neither Celery nor billiard, which defines it.
    return "SoftTimeLimitExceeded" in [cls.__name__ for cls in type(error).__mro__]


def is_library(error: BaseException) -> bool:
    """Return whether ``error`` is a connection library's, or the operating system's."""
    return isinstance(error, OSError) or type(error).__module__.partition(".")[0] in _libraries
