"""The decision to run a body again, as a table."""

from __future__ import annotations

import itertools

import pytest

from workerpools._core.events import Listeners
from workerpools._core.retry import causes, may_replay
from workerpools._core.scope import Effect, Stale


class LibraryError(Exception):
    """Stands for an error of the client library."""


class SoftTimeLimitExceeded(Exception):
    """Stands for Celery's."""


LibraryError.__module__ = "sqlalchemy.exc"
SoftTimeLimitExceeded.__module__ = "billiard.exceptions"


def chained(*errors: BaseException, by: str = "__context__") -> BaseException:
    for later, earlier in itertools.pairwise(errors):
        setattr(later, by, earlier)
    return errors[0]


def decide(error: BaseException, *, noted: bool = True, effects: int = 0, replays: int = 0) -> bool:
    stale = Stale(error, "db", ("sqlalchemy", "psycopg2"), Listeners()) if noted else None
    return may_replay(error, stale, [Effect("COMMIT")] * effects, replays)


@pytest.mark.parametrize(
    ("error", "circumstances", "expected"),
    [
        (LibraryError(), {}, True),
        (LibraryError(), {"noted": False}, False),
        (LibraryError(), {"effects": 1}, False),
        (LibraryError(), {"replays": 1}, False),
        (chained(LibraryError(), ConnectionResetError()), {}, True),
        (chained(LibraryError(), LibraryError(), by="__cause__"), {}, True),
        (chained(LibraryError(), SoftTimeLimitExceeded()), {}, False),
        (chained(LibraryError(), LibraryError(), SoftTimeLimitExceeded(), by="__cause__"), {}, False),
        (chained(LibraryError(), ValueError("the task's own bug")), {}, False),
        (chained(LibraryError(), SystemExit()), {}, False),
    ],
)
def test_may_replay(error: BaseException, circumstances: dict[str, int], expected: bool) -> None:
    """Only the library's own error of a dead connection, with nothing done yet, and once."""
    assert decide(error, **circumstances) is expected  # type: ignore[arg-type]


def test_causes_end_where_they_began() -> None:
    """A chain that bites its own tail is walked once."""
    first, second = LibraryError(), LibraryError()
    first.__context__, second.__context__ = second, first
    assert set(causes(first)) == {first, second}
