"""What the tests on MariaDB share."""

from __future__ import annotations

from sqlalchemy import text

from workerpools import FailureKind, classify

#: Long after what is waited for has happened, however slow the machine is.
LATE = 20.0

SESSION = text("select connection_id()")
TIMEOUT = text("select @@max_statement_time")


def kind_of(error: BaseException) -> FailureKind | None:
    """Return what an exception proves."""
    failure = classify(error)
    return None if failure is None else failure.kind
