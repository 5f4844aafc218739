"""One delivery of a task: what its attempts share, and the pure decision whether it runs again after a failed one."""

from __future__ import annotations

import random
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import Any, NamedTuple

from workerpools._run.budget import Budget
from workerpools._run.deadline import NO_DEADLINE, Deadline
from workerpools._run.failure import Failure, FailureKind, Noted
from workerpools._run.keys import Keys, derive
from workerpools._values import seconds, whole
from workerpools.errors import ConfigurationError

__all__ = ["Action", "Decision", "Delivery", "NotSent", "RetryPolicy", "Situation", "Terms", "decide", "describe"]


@dataclass(frozen=True)
class RetryPolicy:
    """How often a task runs again after a connection failure. Times are in seconds.

    Attributes:
        replays: The number of times the body, or one of its requests, may run again at once in the same process.
            Counted over all deliveries of the task, so that replays and retries add up and never multiply.
        max_retries: The number of times the task may be put back on the broker, counted in ``request.retries``. A
            smaller ``max_retries`` of the task itself counts.
        backoff: The upper bound of the first delay; it doubles with each retry. The delay is uniformly distributed from
            half of the bound to the bound (equal jitter): the first tries come soon, and all of them together last.
        backoff_max: The maximum of that bound.

    Raises:
        ConfigurationError: A value is not a number, is negative, or exceeds a million times or a year.
    """

    replays: int = 2
    max_retries: int = 10
    backoff: float = 2.0
    backoff_max: float = 60.0

    def __post_init__(self) -> None:
        whole(self.replays, "RetryPolicy: replays")
        whole(self.max_retries, "RetryPolicy: max_retries")
        seconds(self.backoff, "RetryPolicy: backoff")
        seconds(self.backoff_max, "RetryPolicy: backoff_max")

    @property
    def longest_delay(self) -> float:
        """The longest possible delay, in seconds; 0 without retries."""
        return min(self.backoff_max, self.backoff * 2.0 ** min(self.max_retries - 1, 60)) if self.max_retries else 0.0

    @classmethod
    def of(cls, value: object, where: str) -> RetryPolicy | None:
        """Return the policy of a task's ``replay`` option; None for ``replay=False``.

        Args:
            value: A policy, True or False.
            where: The task, for the message.

        Raises:
            ConfigurationError: ``value`` is anything else.
        """
        if isinstance(value, cls):
            return value
        if isinstance(value, bool):
            return DEFAULT_POLICY if value else None
        raise ConfigurationError(f"{where}: replay={value!r}; wanted: a RetryPolicy, True or False")


#: The upper bound of the delay before an aborted transaction runs again, in seconds; it doubles each time. Without a
#: delay, the participants of a deadlock would meet again.
ABORTED_BACKOFF = 0.05
ABORTED_BACKOFF_MAX = 1.0


DEFAULT_POLICY = RetryPolicy()


class Action(str, Enum):
    """The action that follows a failure."""

    REPLAY = "replay"
    RETRY = "retry"
    RAISE = "raise"


class Situation(NamedTuple):
    """The circumstances of a failure. Times are in seconds.

    Attributes:
        effects: The irreversible effects of the attempt.
        threads: The names of threads that may still work for it.
        idempotent: Whether the task is declared idempotent.
        policy: The task's policy; None if replays are turned off.
        replays: The number of replays so far, in this and earlier deliveries of the task.
        retries: The number of retries so far.
        affordable: Whether the budget has tokens for a replay.
        no_broker: The reason why the task cannot go back to the broker; empty if it can.
        remaining: The time until the task's time limit; None without one.
        expires_in: The time until the task expires; None if it does not.
        visibility: The time after which the broker redelivers a waiting message; None for never.
        chance: A random number from 0 to 1, for the jitter.
    """

    effects: Sequence[object] = ()
    threads: Sequence[str] = ()
    idempotent: bool = False
    policy: RetryPolicy | None = DEFAULT_POLICY
    replays: int = 0
    retries: int = 0
    affordable: bool = True
    no_broker: str = ""
    remaining: float | None = None
    expires_in: float | None = None
    visibility: float | None = None
    chance: float = 0.5


class Decision(NamedTuple):
    """The action to take after a failure.

    Attributes:
        action: Replay, retry or raise.
        delay: The delay before it, in seconds.
        reason: The reason why there is no replay, or no retry; empty for a replay.
    """

    action: Action
    delay: float = 0.0
    reason: str = ""


_AT_ONCE = (FailureKind.STALE, FailureKind.ABORTED, FailureKind.INDETERMINATE)


def decide(failure: Failure, situation: Situation) -> Decision:
    """Decide what follows a failure.

    Nothing that may have taken effect runs again, unless the task is idempotent: neither after an effect, nor after an
    unknown outcome, nor while a thread may still do its work.

    Args:
        failure: The failure.
        situation: Its circumstances.
    """
    policy = situation.policy
    if policy is None:
        return _raise("replaying is turned off (replay=False of the task, or the setting workerpools_replay)")
    if failure.kind is FailureKind.PERMANENT:
        return _raise("another try would fail in the same way")
    if not situation.idempotent:
        if failure.kind is FailureKind.INDETERMINATE:
            return _raise("it may have been done, and the task is not declared idempotent")
        if situation.effects:
            return _raise(f"{describe(situation.effects)} had left already, and the task is not declared idempotent")
        if situation.threads:
            some = "a thread of it" if len(situation.threads) == 1 else "threads of it"
            return _raise(
                f"{some} may still be at work ({describe(situation.threads)}), and the task is not declared idempotent"
            )
    if failure.kind in _AT_ONCE and situation.replays < policy.replays and situation.affordable:
        delay = 0.0
        if failure.kind is FailureKind.ABORTED:
            delay = situation.chance * min(ABORTED_BACKOFF_MAX, ABORTED_BACKOFF * 2.0 ** min(situation.replays, 60))
        if situation.remaining is None or delay < situation.remaining:
            return Decision(Action.REPLAY, delay)
    return _to_broker(failure, situation, policy)


def _to_broker(failure: Failure, situation: Situation, policy: RetryPolicy) -> Decision:
    if situation.no_broker:
        return _raise(situation.no_broker)
    if situation.retries >= policy.max_retries:
        return _raise(f"it was retried {situation.retries} times (max_retries={policy.max_retries})")
    bound = min(policy.backoff_max, policy.backoff * 2.0 ** min(situation.retries, 60))
    asked = failure.retry_after or 0.0
    # The policy's own delays were checked when the worker started; a server's request could not be.
    if situation.visibility is not None and asked >= situation.visibility:
        return _raise(
            f"the server asks to wait {asked:.0f} s, and the broker would deliver the task twice after its visibility "
            f"timeout of {situation.visibility:g} s"
        )
    delay = max((1.0 + situation.chance) / 2.0 * bound, asked)
    if situation.expires_in is not None and delay >= situation.expires_in:
        return _raise(f"the task expires in {max(0.0, situation.expires_in):.1f} s, before a retry in {delay:.1f} s")
    return Decision(Action.RETRY, delay, "" if situation.affordable else "the process's retry budget is used up")


def _raise(reason: str) -> Decision:
    return Decision(Action.RAISE, reason=reason)


def describe(effects: Sequence[object]) -> str:
    """Return a short phrase that lists the effects."""
    names = list(dict.fromkeys(str(effect) for effect in effects))
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


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
