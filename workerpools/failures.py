"""Connection failures, and how to classify an exception."""

from __future__ import annotations

from workerpools._pools.found import adapter_of
from workerpools._run.failure import Failure, FailureKind, Noted, Phase, Sent, judge

__all__ = ["Failure", "FailureKind", "Phase", "Sent", "classify"]


def classify(error: BaseException) -> Failure | None:
    """Classify an exception as a connection failure.

    The chain of causes is searched: a soft time limit, an exit, or an exception of the task body masked by a failed
    rollback is not a connection failure, whatever error hides it.

    Args:
        error: An exception raised by a workerpools resource, or by a library that has an installed adapter. For the
            latter there is less evidence, so more of them are indeterminate.

    Returns:
        The failure; None if ``error`` is not a connection failure.
    """
    return judge(error, _unwatched).failure


def _unwatched(error: BaseException) -> Noted | None:
    adapter = adapter_of(type(error).__module__.partition(".")[0])
    ask = getattr(adapter, "classify_unwatched", None)
    failure: Failure | None = None if ask is None else ask(error)
    return None if failure is None else Noted(failure, failure.phase)
