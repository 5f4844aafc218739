"""Runs a task body as one attempt, and again where that is safe."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol, TypeVar

from workerpools._run import attempts
from workerpools._run.attempts import Attempt
from workerpools._run.budget import Budget
from workerpools._run.deadline import NO_DEADLINE, Deadline
from workerpools._run.decision import Action, Decision, RetryPolicy, Situation, decide
from workerpools._run.events import EventKind
from workerpools._run.failure import Failure, Noted, Verdict, judge
from workerpools._stats.leaks import BASE
from workerpools._text import add_note

__all__ = ["Terms", "run"]

R = TypeVar("R")


class Terms(Protocol):
    """What a task says about running again, and how it goes back to the broker."""

    @property
    def name(self) -> str:
        """The task's name."""
        ...

    @property
    def idempotent(self) -> bool:
        """Whether the task says that it may run twice."""
        ...

    @property
    def policy(self) -> RetryPolicy | None:
        """The task's policy; None where replaying is turned off."""
        ...

    def requests(self) -> list[Any]:
        """Return the requests that the task runs for in this thread, the outermost first."""
        ...

    def is_control(self, error: BaseException) -> bool:
        """Return whether ``error`` is the task system's own way to end a run (Retry, Ignore, Reject)."""
        ...

    def retries(self, request: Any) -> int:
        """Return how often the task was put back on the broker."""
        ...

    def replays(self, request: Any) -> int:
        """Return how many replays earlier deliveries of the task have used."""
        ...

    def carry(self, request: Any, replays: int) -> None:
        """Have later deliveries of the task know how many replays were used."""

    def no_broker(self, request: Any, error: BaseException) -> str:
        """Return why the task cannot go back to the broker after ``error``; an empty text if it can."""
        ...

    def allowed(self, request: Any, elapsed: float) -> float | None:
        """Return how long the task may take from its start, in seconds; None without a limit.

        Args:
            request: The request.
            elapsed: Since its start, in seconds: what is told as a time of day counts from now.
        """
        ...

    def expires_in(self, request: Any) -> float | None:
        """Return the seconds until the task expires; None if it does not."""
        ...

    def visibility(self) -> float | None:
        """Return after how many seconds the broker delivers a message again that still waits; None for never."""
        ...

    def time_limit_exceeded(self, request: Any) -> Exception:
        """Return the task system's own error for a task that took longer than the nearest of its limits."""
        ...

    def retry(self, request: Any, error: BaseException, delay: float) -> Exception:
        """Put the task back on the broker, to run in ``delay`` seconds; return what is to be raised.

        Raises:
            Exception: The broker did not take it.
        """
        ...


_NONE: Mapping[str, Any] = MappingProxyType({})

#: Stands for the request of a run that is inside of no other one: the first of the task's.
_OUTERMOST = object()


class _Run:
    """One delivery of a task: what its attempts share. An :class:`workerpools._run.attempts.Allowance`."""

    # At the class until they are set: most deliveries need none of them, and every one would pay.
    replays = 0
    before: int | None = None
    budget: Budget | None = None
    _deadline: Deadline | None = None

    def __init__(self, terms: Terms, request: Any) -> None:
        self.terms = terms
        self._request = request
        self.started = time.monotonic()

    @property
    def task(self) -> str:
        return self.terms.name

    @property
    def request(self) -> Any:
        if self._request is _OUTERMOST:
            # Asked for late, because asking takes longer than all the rest, and few runs need it.
            requests = self.terms.requests()
            self._request = requests[0] if requests else None
        return self._request

    @property
    def deadline(self) -> Deadline:
        if self._deadline is None:
            allowed = self.terms.allowed(self.request, time.monotonic() - self.started)
            self._deadline = NO_DEADLINE if allowed is None else Deadline(self.started + allowed)
        return self._deadline

    def used(self) -> int:
        """Return how many replays were used, in this delivery and those before."""
        if self.before is None:
            self.before = self.terms.replays(self.request)
        return self.before + self.replays

    def take_replay(self, noted: Noted) -> bool:
        policy = self.terms.policy
        if policy is None or self.used() >= policy.replays or not self._pay(noted):
            return False
        self.count()
        return True

    def count(self) -> None:
        self.replays += 1
        self.terms.carry(self.request, self.used())

    def _pay(self, noted: Noted) -> bool:
        if noted.owner is None or noted.failure is None:
            return True
        self.budget = noted.owner.budget
        return self.budget.take(timed_out=noted.failure.timed_out)

    def decide(self, failure: Failure, noted: Noted, attempt: Attempt, error: BaseException) -> Decision:
        expires_in = self.terms.expires_in(self.request)
        # Asked only where a server says how long to wait: the policy's own delays were looked at before.
        visibility = self.terms.visibility() if failure.retry_after else None

        def situation(affordable: bool) -> Situation:
            return Situation(
                effects=attempt.effects,
                idempotent=self.terms.idempotent,
                policy=self.terms.policy,
                replays=self.used(),
                retries=self.terms.retries(self.request),
                affordable=affordable,
                no_broker=self.terms.no_broker(self.request, error),
                remaining=attempt.deadline.remaining(),
                expires_in=expires_in,
                visibility=visibility,
                chance=random.random(),
            )

        decision = decide(failure, situation(True))
        # Paid when it is to be done, not before: another thread may have taken the last token.
        if decision.action is Action.REPLAY and not self._pay(noted):
            return decide(failure, situation(False))
        return decision

    def succeeded(self, attempt: Attempt) -> None:
        if self.budget is not None:
            self.budget.succeeded(self.replays)
        elif attempt.used:
            attempt.used[0].registry.budget.succeeded(0)


def run(body: Callable[..., R], terms: Terms, args: Sequence[Any] = (), kwargs: Mapping[str, Any] = _NONE) -> R:
    """Run ``body`` inside an attempt: commit what it did when it returns, undo it on every other way out.

    A body that another one calls as a plain function joins that one's attempt: one session, one commit, no replay of
    its own.

    Args:
        body: The task body.
        terms: What the task says about running again.
        args: The body's positional arguments.
        kwargs: The body's keyword arguments.

    Raises:
        BaseException: What the body raised, or the failure to commit; unchanged, but for a note. A time limit or an
            exception of the body that a failed clean-up masked comes out instead of the clean-up's.
    """
    outer = attempts.current()
    request: Any = _OUTERMOST
    if outer is not None:
        requests = terms.requests()
        request = requests[-1] if requests else None
        if request is None or request.called_directly or _runs_for(outer, request):
            return body(*args, **kwargs)
    delivery = _Run(terms, request)
    while True:
        attempt = Attempt(delivery, outer)
        try:
            result = _once(attempt, body, args, kwargs)
            if Budget.touched:
                delivery.succeeded(attempt)
            return result
        except Exception as error:
            if terms.is_control(error):
                raise
            verdict = judge(error, attempt.classify)
            if verdict.noted is not None and verdict.noted.deadline:
                # The task's own limit ended it, by way of a server or a socket: it is reported as that limit.
                raise terms.time_limit_exceeded(delivery.request) from error
            if verdict.noted is None or verdict.failure is None:
                if verdict.error is error:
                    raise
                masked = verdict.error
            else:
                _replay_retry_or_raise(delivery, attempt, verdict, verdict.noted, verdict.failure)
                masked = None
        finally:
            if not attempt.left:
                # Who stays the current one would own what later tasks of this process do, and never commit it.
                attempt.leave()
            # An exception's traceback holds this frame: without the attempt in it, sessions and errors go at once.
            del attempt
        if masked is not None:
            # Outside of the handler, so that the masking error does not become its context.
            raise masked


def _replay_retry_or_raise(delivery: _Run, attempt: Attempt, verdict: Verdict, noted: Noted, failure: Failure) -> None:
    """Return when the body is to run again at once; raise otherwise."""
    error, terms = verdict.error, delivery.terms
    decision = delivery.decide(failure, noted, attempt, error)
    told: dict[str, object] = {"task": terms.name, "error": type(error).__name__, "kind": failure.kind.value}
    if decision.action is Action.REPLAY:
        delivery.count()
        _emit(noted, EventKind.ATTEMPT_REPLAYED, failure, told)
        time.sleep(decision.delay)
        return
    reason = decision.reason
    if decision.action is Action.RETRY:
        try:
            retry = terms.retry(delivery.request, error, decision.delay)
        except Exception as refused:
            reason = f"the broker did not take it back ({type(refused).__name__})"
        else:
            _emit(noted, EventKind.TASK_RETRIED, failure, {**told, "delay": round(decision.delay, 1)})
            raise retry
    add_note(error, sentence(failure, reason))
    _emit(noted, EventKind.REPLAY_REFUSED, failure, {**told, "reason": reason})
    raise error


def sentence(failure: Failure, reason: str) -> str:
    """Return the note on an error after which the task is not run again: what is known, and why not."""
    whose = f" of the resource {failure.resource!r}" if failure.resource else ""
    known = failure.known or failure.kind.value
    return f"workerpools: {failure.phase.value}{whose} failed: {known}. Not run again: {reason}."


def _emit(noted: Noted, kind: EventKind, failure: Failure, told: Mapping[str, object]) -> None:
    if noted.owner is not None:
        noted.owner.listeners.emit(kind, failure.resource, **told)


def _runs_for(outer: Attempt, request: object) -> bool:
    # ``.apply()`` brings a request of its own; ``task.run()`` within the body still has the outer one's.
    attempt: Attempt | None = outer
    while attempt is not None and (attempt.allowance is None or attempt.allowance.request is not request):
        attempt = attempt.parent
    return attempt is not None


def _once(attempt: Attempt, body: Callable[..., R], args: Sequence[Any], kwargs: Mapping[str, Any]) -> R:
    try:
        attempt.enter()
        try:
            result = body(*args, **kwargs)
            if attempt.lent:
                attempt.commit()
        except BaseException:
            attempt.close(rollback=True)
            raise
        if attempt.lent:
            attempt.close(rollback=False)
        return result
    finally:
        attempt.leave()
        interruption: BaseException | None = None
        for resource in attempt.used:
            left = resource.meter.attempt_ended(attempt)
            if left:
                interruption = resource.give_back(left, attempt) or interruption
            if resource.turnover.bound:
                resource.release(attempt)
        if interruption is not None:
            raise interruption


BASE.code = _once.__code__
