"""One delivery of a task: the state shared by its attempts, from the first run of the body to the last replay."""

from __future__ import annotations

import random
import time
import uuid
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from workerpools._run.budget import Budget
from workerpools._run.deadline import NO_DEADLINE, Deadline
from workerpools._run.decision import Action, Decision, RetryPolicy, Situation, decide
from workerpools._run.failure import Failure, Noted
from workerpools._run.keys import Keys, derive

__all__ = ["Delivery", "NotSent", "Terms"]


class NotSent(Exception):
    """Sending a retry succeeded, but no message left."""


class Terms:
    """A task's terms for running again, and its way back to the broker.

    The defaults are those of a plain function: no broker, no limits, not idempotent. A task system overrides them.
    """

    name = ""
    idempotent = False
    policy: RetryPolicy | None = None
    #: The object whose attributes the body uses, as ``self``; None for a plain function.
    instance: Any = None

    def requests(self) -> list[Any]:
        """Return the task's current requests in this thread, the outermost first."""
        return []

    def is_control(self, error: BaseException) -> bool:
        """Return whether ``error`` is the task system's own way to end a run (Retry, Ignore, Reject)."""
        return False

    def retries(self, request: Any) -> int:
        """Return the number of times the task was put back on the broker."""
        return 0

    def replays(self, request: Any) -> int:
        """Return the number of replays in earlier deliveries of the task."""
        return 0

    def carry(self, request: Any, replays: int) -> None:
        """Pass the number of replays on to later deliveries of the task."""

    def task_id(self, request: Any) -> str:
        """Return the task's id, the same in all its deliveries; empty if it has none."""
        return ""

    def keys(self, request: Any) -> list[Any]:
        """Return the idempotency keys that the delivery before carried over."""
        return []

    def carry_keys(self, request: Any, sent: Sequence[Any]) -> None:
        """Pass the idempotency keys on to the retry that comes next."""

    def no_broker(self, request: Any, error: BaseException) -> str:
        """Return the reason why the task cannot go back to the broker after ``error``; empty if it can."""
        return "it was called directly, and has no broker to wait at"

    def runs_again(self, request: Any, error: BaseException) -> str:
        """Return a sentence that says why the task system itself runs the task again; empty if it does not."""
        return ""

    def allowed(self, request: Any, elapsed: float) -> float | None:
        """Return the time the task may take, in seconds from its start; None without a limit.

        Args:
            request: The request.
            elapsed: Seconds since the start, for limits given as a point in time.
        """
        return None

    def expires_in(self, request: Any) -> float | None:
        """Return the seconds until the task expires; None if it does not."""
        return None

    def visibility(self) -> float | None:
        """Return the seconds after which the broker redelivers an unacknowledged message; None for never."""
        return None

    def time_limit_exceeded(self, request: Any) -> Exception:
        """Return the task system's own error for an exceeded time limit."""
        return TimeoutError("the task's time limit was exceeded")

    def retry(self, request: Any, error: BaseException, delay: float) -> Exception:
        """Put the task back on the broker, to run in ``delay`` seconds; return the exception to raise.

        Raises:
            NotSent: The task's own way to send it sent no message.
            Exception: The broker did not accept it.
        """
        raise NotImplementedError


#: Placeholder for the request of an outermost run, which is the task's first request.
OUTERMOST = object()


class Delivery:
    """One delivery of a task.

    Args:
        terms: The task's terms.
        request: The task's request, whose identity distinguishes runs; :data:`OUTERMOST` to look it up on first use,
            because the lookup is slow and few runs need it.
    """

    # Class attributes until set: most deliveries need none of them, and setting them costs time in every one.
    _replays = 0
    _before: int | None = None
    #: The budget that paid for its replays.
    budget: Budget | None = None

    def __init__(self, terms: Terms, request: Any = OUTERMOST) -> None:
        self.terms = terms
        self._request = request
        self._started = time.monotonic()

    @cached_property
    def request(self) -> Any:
        """The Celery request of this delivery; None outside a worker."""
        if self._request is OUTERMOST:
            requests = self.terms.requests()
            return requests[0] if requests else None
        return self._request

    @cached_property
    def deadline(self) -> Deadline:
        """The task's deadline."""
        if self._request is OUTERMOST:
            # self.request, without its call.
            requests = self.terms.requests()
            self.request = requests[0] if requests else None
        allowed = self.terms.allowed(self.request, time.monotonic() - self._started)
        return NO_DEADLINE if allowed is None else Deadline(self._started + allowed)

    @cached_property
    def keys(self) -> Keys:
        """The idempotency keys of its requests."""
        return Keys(self.terms.keys(self.request))

    @cached_property
    def task_id(self) -> str:
        """The task's id, the same in all its deliveries; of its own where there is no task's."""
        return self.terms.task_id(self.request) or str(uuid.uuid4())

    def key(self, task: str, name: str) -> str:
        """Return the idempotency key of an act of this task.

        Args:
            task: The task's name.
            name: The act's name.
        """
        made = derive(self.task_id, task, name)
        self.keys.derived.add(made)
        return made

    def runs_again(self) -> None:
        """Note that the body runs again in this delivery."""
        if "keys" in self.__dict__:
            self.keys.run_again()

    def _used(self) -> int:
        if self._before is None:
            self._before = self.terms.replays(self.request)
        return self._before + self._replays

    def take_replay(self, noted: Noted) -> bool:
        """Count and pay for one replay after ``noted``; return False if policy or budget forbid it."""
        policy = self.terms.policy
        if policy is None or self._used() >= policy.replays or not self._pay(noted):
            return False
        self.count_replay()
        return True

    def count_replay(self) -> None:
        """Count one replay, for this and later deliveries."""
        self._replays += 1
        self.terms.carry(self.request, self._used())

    def _pay(self, noted: Noted) -> bool:
        if noted.budget is None or noted.failure is None:
            return True
        self.budget = noted.budget
        return self.budget.take(timed_out=noted.failure.timed_out)

    def decide(
        self,
        failure: Failure,
        noted: Noted,
        error: BaseException,
        *,
        effects: Sequence[Any],
        threads: Sequence[str],
        remaining: float | None,
    ) -> Decision:
        """Decide what follows a failure of an attempt, and pay for a replay.

        Args:
            failure: The failure.
            noted: The adapter's note about it.
            error: The exception the task would raise.
            effects: The attempt's effects.
            threads: The names of threads that may still work for the attempt.
            remaining: Seconds until the attempt's deadline; None without one.
        """
        expires_in = self.terms.expires_in(self.request)
        # Needed only for a delay requested by a server: the policy's own delays were checked at start-up.
        visibility = self.terms.visibility() if failure.retry_after else None

        def situation(affordable: bool) -> Situation:
            return Situation(
                effects=effects,
                threads=threads,
                idempotent=self.terms.idempotent,
                policy=self.terms.policy,
                replays=self._used(),
                retries=self.terms.retries(self.request),
                affordable=affordable,
                no_broker=self.terms.no_broker(self.request, error),
                remaining=remaining,
                expires_in=expires_in,
                visibility=visibility,
                chance=random.random(),
            )

        decision = decide(failure, situation(True))
        # Paid after the decision: another thread may have taken the last token meanwhile.
        if decision.action is Action.REPLAY and not self._pay(noted):
            return decide(failure, situation(False))
        return decision

    def succeeded(self, budget: Budget | None) -> None:
        """Return the tokens of its replays; without replays, return one token to ``budget``."""
        if self.budget is not None:
            self.budget.succeeded(self._replays)
        elif budget is not None:
            budget.succeeded(0)
