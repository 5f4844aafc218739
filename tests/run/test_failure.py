"""Which exception of a chain is the real one, as a table; and what is noted on an exception."""

from __future__ import annotations

import itertools
import pickle

import pytest

from workerpools import Failure, FailureKind
from workerpools._run.attempts import Attempt, note_failure
from workerpools._run.budget import Budget
from workerpools._run.events import Listeners
from workerpools._run.failure import Noted, Phase, Sent, attach, causes, judge, noted_of


class LibraryError(Exception):
    """Stands for an error of the client library."""


class SoftTimeLimitExceeded(Exception):
    """Stands for Celery's."""


class GreenletExit(BaseException):
    """Stands for greenlet's; gevent.Timeout is a BaseException, too."""


LibraryError.__module__ = "sqlalchemy.exc"
SoftTimeLimitExceeded.__module__ = "billiard.exceptions"

STALE = Failure(FailureKind.STALE, Sent.UNKNOWN, "db")


def chained(*errors: BaseException, by: str = "__context__") -> BaseException:
    for later, earlier in itertools.pairwise(errors):
        setattr(later, by, earlier)
    return errors[0]


def library(phase: Phase = Phase.STATEMENT, failure: Failure | None = STALE) -> LibraryError:
    error = LibraryError()
    attach(error, Noted(failure, phase))
    return error


BUG, LIMIT, RESET = ValueError("the task's own bug"), SoftTimeLimitExceeded(), ConnectionResetError()


@pytest.mark.parametrize(
    ("error", "comes_out", "failure"),
    [
        (library(), None, STALE),
        (LibraryError(), None, None),
        (ValueError(), None, None),
        (chained(library(), RESET), None, STALE),
        (chained(library(), LibraryError(), by="__cause__"), None, STALE),
        # A time limit or an exit anywhere, which the library's error may mask.
        (chained(library(), LIMIT), LIMIT, None),
        (chained(LibraryError(), LIMIT), LIMIT, None),
        (chained(library(), LibraryError(), LIMIT, by="__cause__"), LIMIT, None),
        (chained(OSError(), LIMIT), LIMIT, None),
        (chained(library(), SystemExit()), "SystemExit", None),
        (chained(library(), GreenletExit()), "GreenletExit", None),
        (chained(library(), KeyboardInterrupt()), "KeyboardInterrupt", None),
        # What the body made of a time limit stays what it made.
        (chained(ValueError("my own"), LIMIT), None, None),
        # A failed rollback masks the body's own exception; a statement in its handler does not.
        (chained(library(Phase.ROLLBACK), LibraryError(), BUG), BUG, None),
        (chained(library(Phase.ROLLBACK), RESET), None, STALE),
        (chained(library(), BUG), None, STALE),
        # Raised from the failure, or merely while it was handled.
        (chained(KeyError(), library(), by="__cause__"), None, STALE),
        (chained(KeyError(), library(), by="__context__"), None, None),
        (chained(library(failure=None), BUG), None, None),
    ],
)
def test_judge(error: BaseException, comes_out: BaseException | str | None, failure: Failure | None) -> None:
    """The exception that comes out, and the failure that it tells of."""
    verdict = judge(error, lambda _: None)
    if isinstance(comes_out, str):
        assert type(verdict.error).__name__ == comes_out
    else:
        assert verdict.error is (comes_out or error)
    assert verdict.failure is failure


def test_what_was_not_noted_is_asked_for() -> None:
    """Of the error and of what it was raised from, and also where no more was noted than that it was seen."""
    error, asked = LibraryError(), []

    def classify(found: BaseException) -> Noted | None:
        asked.append(found)
        return Noted(STALE, Phase.ACQUIRE) if found is error else None

    assert judge(error, classify).failure is STALE
    outer = chained(RuntimeError(), error, by="__cause__")
    assert judge(outer, classify).failure is STALE
    assert asked == [error, outer, error]
    attach(error, Noted(None, Phase.STATEMENT))
    assert judge(error, classify).failure is STALE


def test_causes_end_where_they_began() -> None:
    """A chain that bites its own tail is walked once, the nearest first."""
    first, second = LibraryError(), LibraryError()
    first.__context__, second.__context__ = second, first
    assert list(causes(first)) == [first, second]


@pytest.mark.timeout(20)
@pytest.mark.parametrize("length", [1, 2, 3])
def test_what_was_raised_from_itself_is_judged(length: int) -> None:
    """``raise error from error`` is a mistake that Python allows: it must not hold a worker's process for ever."""
    errors = [ValueError(str(number)) for number in range(length)]
    chained(*errors, by="__cause__")
    errors[-1].__cause__ = errors[0]
    assert judge(errors[0], lambda _: None) == (errors[0], None)
    outer = chained(RuntimeError(), errors[0], by="__cause__")
    assert judge(outer, lambda _: None) == (outer, None)


def test_a_note_survives_pickling_without_its_owner() -> None:
    """Celery may pickle the exception; listeners and locks do not go with it."""
    error = ValueError("x")
    attach(error, Noted(STALE, Phase.COMMIT, budget=Budget(), listeners=Listeners()))
    attach(error, Noted(None, Phase.CONNECT))
    assert noted_of(error) == Noted(STALE, Phase.COMMIT)
    restored = noted_of(pickle.loads(pickle.dumps(error)))
    assert restored == Noted(STALE, Phase.COMMIT)
    assert (restored.budget, restored.listeners) == (None, None)


def test_an_attempt_remembers_the_first_failures() -> None:
    """Later ones follow from them, and there may be many."""
    attempt = Attempt()
    attempt.enter()
    try:
        for number in range(100):
            note_failure(LibraryError(), Noted(Failure(FailureKind.STALE, Sent.UNKNOWN, str(number)), Phase.STATEMENT))
    finally:
        attempt.end()
    assert [noted.failure.resource for noted in attempt.noted if noted.failure][:2] == ["0", "1"]
    assert len(attempt.noted) == 20
