"""The attempt loop: runs a task body, and runs it again where that is safe."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType, NoneType
from typing import Any, TypeVar, cast

from workerpools._process.event_loop import is_here
from workerpools._run import attempts, coroutines, threads
from workerpools._run.attempts import Attempt, Effect
from workerpools._run.budget import Budget
from workerpools._run.delivery import OUTERMOST, Action, Delivery, NotSent, Terms, describe
from workerpools._run.events import REPLAY, EventKind, write
from workerpools._run.failure import Failure, Noted, Verdict, is_interruption, judge
from workerpools._text import add_note

__all__ = ["log_failed_after_commit", "run"]

R = TypeVar("R")


_NONE: Mapping[str, Any] = MappingProxyType({})


def run(body: Callable[..., R], terms: Terms, args: Sequence[Any] = (), kwargs: Mapping[str, Any] = _NONE) -> R:
    """Run ``body`` inside an attempt: commit when it returns, roll back on every other exit.

    A body called from another one as a plain function joins its attempt: one session, one commit, no replay of its own.

    What a body returns to be awaited runs on the process's event loop, and the calling thread waits for it.

    Args:
        body: The task body.
        terms: The task's terms for running again.
        args: The body's positional arguments.
        kwargs: The body's keyword arguments.

    Raises:
        BaseException: The exception of the body or the commit, unchanged except for a note. A time limit or body
            exception masked by a failed clean-up replaces the clean-up's error.
    """
    outer = attempts.current()
    request: Any = OUTERMOST
    if outer is not None:
        requests = terms.requests()
        request = requests[-1] if requests else None
        if request is None or request.called_directly or _runs_for(outer, request):
            result = body(*args, **kwargs)
            # Another coroutine awaits it, or this thread waits for it.
            return result if is_here() or not hasattr(type(result), "__await__") else coroutines.run(cast(Any, result))
    delivery = Delivery(terms, request)
    handled = sys.exc_info()[1]
    while True:
        attempt = Attempt(delivery, outer)
        try:
            result = _once(attempt, body, args, kwargs)
            if Budget.touched:
                delivery.succeeded(attempt.budget)
            if outer is None:
                attempts.last_returned.set(attempt)
            return result
        except Exception as error:
            attempts.last_returned.set(None)
            if terms.is_control(error):
                _note_commits(attempt, error)
                raise
            verdict = judge(error, attempt.classify, handled)
            if verdict.noted is not None and verdict.noted.deadline:
                # The task's own limit took effect through a server or socket timeout: report it as that limit.
                raise terms.time_limit_exceeded(delivery.request) from error
            if verdict.noted is None or verdict.failure is None:
                _note_commits(attempt, verdict.error)
                attempt.interrupted = is_interruption(verdict.error)
                if verdict.error is error:
                    raise
                masked = verdict.error
            else:
                _replay_retry_or_raise(delivery, attempt, verdict, verdict.noted, verdict.failure)
                masked = None
        except BaseException:
            attempt.interrupted = True
            raise
        finally:
            # Also after a signal interrupted the regular end: an attempt left as the current one would own the work of
            # later tasks of this process, and never commit it.
            try:
                attempt.end()
            except BaseException:
                # A signal may have interrupted that, too.
                attempt.interrupted = True
                attempt.end()
                raise
            # An exception's traceback holds this frame: without the attempt, sessions and errors are freed at once.
            del attempt
        if masked is not None:
            # Outside the handler, so that the masking error does not become its context.
            raise masked


def _replay_retry_or_raise(
    delivery: Delivery, attempt: Attempt, verdict: Verdict, noted: Noted, failure: Failure
) -> None:
    """Return if the body should run again at once; raise otherwise."""
    error, terms = verdict.error, delivery.terms
    at = attempt.deadline.at
    remaining = None if at is None else max(0.0, at - time.monotonic())
    # Before the effects, which a thread may have just before its end.
    alive = () if terms.idempotent else threads.working(attempt)
    effects = attempt.effects
    decision = delivery.decide(failure, noted, error, effects=effects, threads=alive, remaining=remaining)
    # Before acting on it: see Attempt.end().
    attempt.end()
    fields: dict[str, object] = {"task": terms.name, "error": type(error).__name__, "kind": failure.kind.value}
    if decision.action is Action.REPLAY:
        delivery.count_replay()
        delivery.runs_again()
        _emit(noted, EventKind.ATTEMPT_REPLAYED, failure, fields)
        time.sleep(decision.delay)
        return
    reason = decision.reason
    if decision.action is Action.RETRY:
        if "keys" in delivery.__dict__:
            terms.carry_keys(delivery.request, delivery.keys.sent)
        try:
            retry = terms.retry(delivery.request, error, decision.delay)
        except NotSent:
            reason = "the task's own apply_async() returned without having sent the retry"
        except Exception as refused:
            reason = f"the broker did not accept the retry ({type(refused).__name__})"
        else:
            _emit(noted, EventKind.TASK_RETRIED, failure, {**fields, "delay": round(decision.delay, 1)})
            raise retry
    again = terms.runs_again(delivery.request, error)
    add_note(error, sentence(failure, reason, again))
    if again:
        reason = f"{reason}; {again}"
    _emit(noted, EventKind.REPLAY_REFUSED, failure, {**fields, "reason": reason})
    raise error


def _note_commits(attempt: Attempt, error: BaseException) -> None:
    """Say what was committed before a listener of the commit, or a later commit, raised ``error``."""
    before = attempt.before_commit
    if before is None:
        return
    done = [effect for effect in attempt.effects if effect not in before]
    if done:
        add_note(error, f"workerpools: {describe(done)} had left before this was raised, and is not undone.")
        log_failed_after_commit(attempt.task, error, done)


def log_failed_after_commit(task: str, error: BaseException, effects: Sequence[Effect]) -> None:
    """Log that a task fails although its attempt was committed.

    Args:
        task: The task's name.
        error: The error.
        effects: The effects that stand.
    """
    fields = {"task": task, "error": type(error).__name__, "effects": describe(effects)}
    write(REPLAY, logging.WARNING, "failed_after_commit", fields)


def sentence(failure: Failure, reason: str, again: str = "") -> str:
    """Return the note for an error after which the task is not run again: the evidence and the reason.

    Args:
        failure: The failure.
        reason: Why workerpools does not run the task again.
        again: Why the task system does, all the same; empty if it does not.
    """
    whose = f" of the resource {failure.resource!r}" if failure.resource else ""
    known = failure.known or failure.kind.value
    what = f"Not replayed: {reason}. But {again}" if again else f"Not run again: {reason}"
    return f"workerpools: {failure.phase.value}{whose} failed: {known}. {what}."


def _emit(noted: Noted, kind: EventKind, failure: Failure, fields: Mapping[str, object]) -> None:
    if noted.listeners is not None:
        noted.listeners.emit(kind, failure.resource, **fields)


def _runs_for(outer: Attempt, request: object) -> bool:
    # ``.apply()`` creates a new request; ``task.run()`` within the body keeps the outer one.
    attempt: Attempt | None = outer
    while attempt is not None and (attempt.delivery is None or attempt.delivery.request is not request):
        attempt = attempt.parent
    return attempt is not None


def _once(attempt: Attempt, body: Callable[..., R], args: Sequence[Any], kwargs: Mapping[str, Any]) -> R:
    try:
        attempt.enter()
        try:
            result = body(*args, **kwargs)
            returned = type(result)
            # Most bodies return None, and looking for an attribute that is missing is slow.
            if returned is not NoneType and hasattr(returned, "__await__"):
                result = coroutines.wait_for(result, attempt)
            if attempt.scoped:
                attempt.commit()
            attempt.committed = True
        except BaseException:
            attempt.close(rollback=True)
            raise
        if attempt.scoped:
            attempt.close(rollback=False)
    except BaseException:
        # A failure is examined outside the attempt; one that succeeds leaves it as it ends.
        attempt.leave()
        raise
    return result


#: The code that calls the body: beyond it, the stack is the same for every task.
BASE = _once.__code__
