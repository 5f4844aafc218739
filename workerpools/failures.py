"""Failures of connections: what describes one, and what an exception proves."""

from __future__ import annotations

from workerpools._pools.found import adapter_of
from workerpools._run.failure import Failure, FailureKind, Noted, Phase, Sent, judge

__all__ = ["Failure", "FailureKind", "Phase", "Sent", "classify"]


def classify(error: BaseException) -> Failure | None:
    """Return what ``error`` proves about a connection; None if it is no failure of one.

    The chain of causes is walked: a soft time limit, an exit, or an exception of the body's that a failed rollback
    masks, is no failure of a connection, whatever error stands before it.

    Args:
        error: An exception that a resource of ours raised, or any exception of a library for which an adapter is
            installed. Of the latter less is known, so that more counts as indeterminate.
    """
    return judge(error, _unwatched).failure


def _unwatched(error: BaseException) -> Noted | None:
    adapter = adapter_of(type(error).__module__.partition(".")[0])
    ask = getattr(adapter, "classify_unwatched", None)
    failure: Failure | None = None if ask is None else ask(error)
    return None if failure is None else Noted(failure, failure.phase)
