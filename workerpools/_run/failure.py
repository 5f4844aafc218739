"""Connection failures: kinds, evidence, and the search for the real cause in a chain of exceptions."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from enum import Enum
from typing import Any, NamedTuple

from workerpools._run.budget import Budget
from workerpools._run.events import Listeners
from workerpools._values import YEAR

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
    "retry_after",
]


class FailureKind(str, Enum):
    """The kind of a failure, which decides about replay and retry; the values are stable."""

    #: The pooled connection was dead and nothing was applied.
    STALE = "stale"
    #: It may have been applied (compare SQLSTATE 08007 and 40003).
    INDETERMINATE = "indeterminate"
    #: Not applied; the server cannot serve now.
    UNAVAILABLE = "unavailable"
    #: Not sent: the local connection pool had no free connection in time.
    POOL_EXHAUSTED = "pool_exhausted"
    #: Certainly rolled back, on a healthy connection: serialization, deadlock, lock timeout.
    ABORTED = "aborted"
    #: Not applied, and never will be: credentials, TLS verification, no such database.
    PERMANENT = "permanent"


class Sent(str, Enum):
    """The part of a request or statement that may have reached the server."""

    NOTHING = "nothing"
    PARTIAL = "partial"
    ALL = "all"
    #: Not reported by the driver.
    UNKNOWN = "unknown"


class Phase(str, Enum):
    """The operation that failed."""

    ACQUIRE = "acquire"
    CONNECT = "connect"
    STATEMENT = "statement"
    COMMIT = "commit"
    ROLLBACK = "rollback"
    REQUEST = "request"
    RESPONSE = "response"


@dataclass(frozen=True)
class Failure:
    """A connection failure and its evidence.

    Attributes:
        kind: The kind of failure.
        sent: The part of the request that may have reached the server.
        resource: The resource's name; empty for an unmanaged connection.
        phase: The operation that failed.
        code: The SQLSTATE, the driver's error number or the HTTP status; empty without one.
        retry_after: The delay requested by the server (RFC 9110 §10.2.3), in seconds; None without one.
        timed_out: Whether the failure was a timeout rather than the end of the connection.
        known: A short sentence about the evidence, without secrets.
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
    """An adapter's note about an exception, made when it was raised.

    Attributes:
        failure: The failure; None if the library's error is not a connection failure.
        phase: The operation that failed.
        deadline: Whether the task's deadline ended the operation.
        budget: The budget that pays for replays; None for an unmanaged connection.
        listeners: The listeners for the events that follow; None for an unmanaged connection.
    """

    failure: Failure | None
    phase: Phase
    deadline: bool = False
    budget: Budget | None = field(default=None, repr=False, compare=False)
    listeners: Listeners | None = field(default=None, repr=False, compare=False)

    def __reduce__(self) -> tuple[Any, ...]:
        # Celery may pickle the exception together with this note.
        return Noted, (self.failure, self.phase, self.deadline)


class Verdict(NamedTuple):
    """The cause of an attempt's end.

    Attributes:
        error: The exception to raise: the original, or the one that a failed clean-up had masked.
        noted: The note about it; None if it is not a connection failure.
    """

    error: BaseException
    noted: Noted | None

    @property
    def failure(self) -> Failure | None:
        """The connection failure; None if it is not one."""
        return None if self.noted is None else self.noted.failure


_ATTRIBUTE = "__workerpools__"

#: Top-level packages of connection libraries, whose exceptions may mask another one during a clean-up. Adapters add
#: those of their client and its drivers; ``OSError`` always counts.
_libraries: set[str] = set()


def know_libraries(packages: Iterable[str]) -> None:
    """Register top-level packages of connection libraries."""
    _libraries.update(packages)


def known_libraries() -> frozenset[str]:
    """Return the packages registered with :func:`know_libraries`."""
    return frozenset(_libraries)


def attach(error: BaseException, noted: Noted) -> None:
    """Attach a note to ``error``. An earlier note is kept: it was made closer to the cause."""
    if getattr(error, _ATTRIBUTE, None) is None:
        try:
            setattr(error, _ATTRIBUTE, noted)
        except Exception:  # an exception class without a __dict__
            return


def noted_of(error: BaseException) -> Noted | None:
    """Return the note attached to this exception; None if there is none."""
    noted = getattr(error, _ATTRIBUTE, None)
    return noted if isinstance(noted, Noted) else None


def judge(
    error: BaseException, classify: Callable[[BaseException], Noted | None], handled: BaseException | None = None
) -> Verdict:
    """Find the cause of an attempt's end in the chain of exceptions.

    - A time limit or an exit anywhere in the chain is not a connection failure. If a library's error masks it, because
      a clean-up failed, the masked exception is raised instead.
    - An exception of the body that a failed rollback masks is raised instead, too.
    - An exception raised ``from`` a library's error is judged as that error. One raised while handling it
      (``__context__``) is not: the body had its reasons.

    Args:
        error: The exception that ended the attempt.
        classify: Classifies exceptions without a note.
        handled: The exception that was being handled when the attempt began: it is the context of all that the attempt
            raises, and no part of its end. None if there was none.
    """
    noted = noted_of(error)
    if noted is None or noted.failure is None:
        noted = classify(error) or noted
    chain = causes(error, handled)
    masks = noted is not None or is_library(error)
    for cause in chain:
        if is_interruption(cause):
            return Verdict(cause if masks else error, None)
    if noted is not None and noted.phase is Phase.ROLLBACK:
        for cause in chain:
            if not is_library(cause):
                return Verdict(cause, None)
    explicit, seen = error.__cause__, {id(error)}
    # ``raise error from error`` makes a cycle.
    while noted is None and explicit is not None and id(explicit) not in seen:
        seen.add(id(explicit))
        noted = noted_of(explicit) or classify(explicit)
        explicit = explicit.__cause__
    return Verdict(error, noted)


def causes(error: BaseException, beyond: BaseException | None = None) -> list[BaseException]:
    """Return an exception with all its causes and contexts, without duplicates, the nearest first.

    Args:
        error: The exception; a cyclic chain is allowed.
        beyond: Left out, with all that is reached through it alone.
    """
    found: dict[int, BaseException] = {}
    pending: list[BaseException | None] = [error]
    while pending:
        each = pending.pop(0)
        if each is not None and each is not beyond and id(each) not in found:
            found[id(each)] = each
            pending += (each.__cause__, each.__context__)
    return list(found.values())


def retry_after(value: str | None, now: datetime) -> float | None:
    """Return the delay of a Retry-After header in seconds (RFC 9110 §10.2.3), at most a year; None if it is invalid.

    Args:
        value: The header's value; None if there is none.
        now: The time to which a date is compared.
    """
    text = (value or "").strip()
    # isdigit() accepts Unicode digits, which HTTP does not.
    if text.isascii() and text.isdigit():
        # Python refuses to convert very long numbers; leading zeros do not count.
        text = text.lstrip("0")
        return float(min(int(text[:12] or "0"), YEAR))
    try:
        when = parsedate_to_datetime(text)
        if when.tzinfo is None:
            when = when.replace(tzinfo=timezone.utc)
        return min(max(0.0, (when - now).total_seconds()), YEAR)
    except (ValueError, OverflowError, IndexError, TypeError):
        # parsedate_to_datetime() can raise any of these.
        return None


def is_interruption(error: BaseException) -> bool:
    """Return whether ``error`` interrupts the task: a soft time limit, an exit, GreenletExit, gevent.Timeout."""
    if not isinstance(error, Exception):
        # asyncio's time-outs are cancellations inside; one that ends a body reaches its attempt as an Exception.
        return type(error).__module__ != "asyncio.exceptions"
    # By name: the core imports neither Celery nor billiard, which defines it.
    return "SoftTimeLimitExceeded" in [cls.__name__ for cls in type(error).__mro__]


def is_library(error: BaseException) -> bool:
    """Return whether ``error`` comes from a connection library or the operating system."""
    return isinstance(error, OSError) or type(error).__module__.partition(".")[0] in _libraries
