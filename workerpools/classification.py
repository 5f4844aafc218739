"""What an exception proves about a connection."""

from __future__ import annotations

from workerpools._run.failure import Failure, Noted, judge

__all__ = ["classify"]


def classify(error: BaseException) -> Failure | None:
    """Return what ``error`` proves about a connection; None if it is no failure of one.

    The chain of causes is walked: a soft time limit, an exit, or an exception of the body's that a failed rollback
    masks, is no failure of a connection, whatever error stands before it.

    Args:
        error: An exception that a resource of ours raised, or any exception of httpx or SQLAlchemy. Of those less is
            known, so that more counts as indeterminate.
    """
    return judge(error, _unwatched).failure


def _unwatched(error: BaseException) -> Noted | None:
    library = type(error).__module__.partition(".")[0]
    if library == "httpx":
        from workerpools import httpx as adapter
    elif library == "sqlalchemy":
        from workerpools import sqlalchemy as adapter  # type: ignore[no-redef]
    else:
        return None
    failure = adapter.classify(error)
    return None if failure is None else Noted(failure, failure.phase)
