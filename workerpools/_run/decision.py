"""Replay, retry or raise: the pure decision that follows a failed attempt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from workerpools._run.failure import Failure, FailureKind
from workerpools._values import seconds, whole
from workerpools.errors import ConfigurationError

__all__ = ["Action", "Decision", "RetryPolicy", "Situation", "decide"]


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
        return _raise("replaying is turned off for this task (replay=False)")
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
