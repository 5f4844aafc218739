"""Whether a failed attempt runs again, and how often: pure decisions."""

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
    """How often a task runs again after a failure of a connection. Times in seconds.

    Attributes:
        replays: How often the body, or a request of it, may run again at once in the process. Counted over all
            deliveries of the task, so that replays and retries add up and never multiply.
        max_retries: How often the task may be put back on the broker, counted as Celery counts (``request.retries``).
        backoff: The upper bound of the first delay; it doubles with each retry. The delay is drawn evenly from 0 to
            the bound (full jitter).
        backoff_max: The highest bound.

    Raises:
        ConfigurationError: A value is no number, negative, or above a million times, or a year of seconds.
    """

    replays: int = 2
    max_retries: int = 3
    backoff: float = 2.0
    backoff_max: float = 60.0

    def __post_init__(self) -> None:
        whole(self.replays, "RetryPolicy: replays")
        whole(self.max_retries, "RetryPolicy: max_retries")
        seconds(self.backoff, "RetryPolicy: backoff")
        seconds(self.backoff_max, "RetryPolicy: backoff_max")

    @property
    def longest_delay(self) -> float:
        """The longest delay that may be drawn, in seconds; 0 without retries."""
        return min(self.backoff_max, self.backoff * 2.0 ** min(self.max_retries - 1, 60)) if self.max_retries else 0.0

    @classmethod
    def of(cls, value: object, where: str) -> RetryPolicy | None:
        """Return the policy that a task's ``replay`` option stands for; None for ``replay=False``.

        Args:
            value: A policy, True or False.
            where: The task, for the message.

        Raises:
            ConfigurationError: It is something else.
        """
        if isinstance(value, cls):
            return value
        if isinstance(value, bool):
            return DEFAULT_POLICY if value else None
        raise ConfigurationError(f"{where}: replay={value!r}; wanted: a RetryPolicy, True or False")


#: The upper bound of the delay before a transaction that was aborted runs again, in seconds; it doubles each time.
#: Those that met in a deadlock would meet again without one.
ABORTED_BACKOFF = 0.05
ABORTED_BACKOFF_MAX = 1.0


DEFAULT_POLICY = RetryPolicy()


class Action(str, Enum):
    """What is done about a failure."""

    REPLAY = "replay"
    RETRY = "retry"
    RAISE = "raise"


class Situation(NamedTuple):
    """What surrounds a failure. Times in seconds.

    Attributes:
        effects: What left in the attempt that cannot be taken back.
        idempotent: Whether the task says that it may run twice.
        policy: None where replaying is turned off.
        replays: How often something was replayed for this task already, in this delivery and those before.
        retries: How often the task was put back on the broker already.
        affordable: Whether the budget has tokens for a replay.
        no_broker: Why the task cannot go back to the broker; empty if it can.
        remaining: Until the task's time limit; None without one.
        expires_in: Until the task expires; None if it does not.
        visibility: After which the broker would deliver a message that still waits a second time; None for never.
        chance: A number from 0 to 1, drawn at random, for the jitter.
    """

    effects: Sequence[object] = ()
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
    """What is done.

    Attributes:
        action: Run again now, go back to the broker, or raise.
        delay: Before that, in seconds.
        reason: Why nothing is run again now or later; empty for a replay.
    """

    action: Action
    delay: float = 0.0
    reason: str = ""


_AT_ONCE = (FailureKind.STALE, FailureKind.ABORTED, FailureKind.INDETERMINATE)


def decide(failure: Failure, situation: Situation) -> Decision:
    """Decide what follows a failure.

    Nothing runs again that may have been done: not after an effect, and not when the outcome is unknown, unless the
    task says that it is idempotent.
    """
    policy = situation.policy
    if policy is None:
        return _raise("replaying is turned off for this task (replay=False)")
    if failure.kind is FailureKind.PERMANENT:
        return _raise("another try would fail in the same way")
    if not situation.idempotent:
        if failure.kind is FailureKind.INDETERMINATE:
            return _raise("it may have been done, and the task does not say that it is idempotent")
        if situation.effects:
            return _raise(
                f"{describe(situation.effects)} had left already, and the task does not say that it is idempotent"
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
    # The policy's own delays were looked at when the worker started; what a server asks for nobody knew then.
    if situation.visibility is not None and asked >= situation.visibility:
        return _raise(
            f"the server asks to wait {asked:.0f} s, and the broker would deliver the task twice after its visibility "
            f"timeout of {situation.visibility:g} s"
        )
    delay = max(situation.chance * bound, asked)
    if situation.expires_in is not None and delay >= situation.expires_in:
        return _raise(f"the task expires in {max(0.0, situation.expires_in):.1f} s, before a retry in {delay:.1f} s")
    return Decision(Action.RETRY, delay, "" if situation.affordable else "the process's retry budget is used up")


def _raise(reason: str) -> Decision:
    return Decision(Action.RAISE, reason=reason)


def describe(effects: Sequence[object]) -> str:
    """Return the effects as a short phrase."""
    names = list(dict.fromkeys(str(effect) for effect in effects))
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
