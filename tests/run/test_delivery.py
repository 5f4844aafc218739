"""The decision over a failure, as a table; the policy and the budget that it looks at."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest

from tests.support.forking import run_in_fork
from workerpools import ConfigurationError, Failure, FailureKind, RetryPolicy
from workerpools._run.attempts import Effect
from workerpools._run.budget import Budget
from workerpools._run.delivery import Action, Situation, decide
from workerpools.failures import Sent

STALE, ABORTED, INDETERMINATE, UNAVAILABLE, EXHAUSTED, PERMANENT = (
    FailureKind.STALE,
    FailureKind.ABORTED,
    FailureKind.INDETERMINATE,
    FailureKind.UNAVAILABLE,
    FailureKind.POOL_EXHAUSTED,
    FailureKind.PERMANENT,
)
POST = Effect("POST by 'api'")


@pytest.mark.parametrize(
    ("kind", "situation", "action", "reason"),
    [
        (STALE, {}, "replay", ""),
        (ABORTED, {}, "replay", ""),
        (STALE, {"replays": 1}, "replay", ""),
        (STALE, {"replays": 2}, "retry", ""),
        (STALE, {"affordable": False}, "retry", "budget"),
        (STALE, {"effects": (POST,)}, "raise", "POST by 'api' had left already"),
        (STALE, {"effects": (POST,), "idempotent": True}, "replay", ""),
        (STALE, {"policy": None}, "raise", "replay=False"),
        (STALE, {"policy": RetryPolicy(replays=0)}, "retry", ""),
        (ABORTED, {"remaining": 0.0}, "retry", ""),
        (INDETERMINATE, {}, "raise", "may have been done"),
        (INDETERMINATE, {"idempotent": True}, "replay", ""),
        (INDETERMINATE, {"idempotent": True, "effects": (POST,)}, "replay", ""),
        (INDETERMINATE, {"idempotent": True, "replays": 2}, "retry", ""),
        (UNAVAILABLE, {}, "retry", ""),
        (UNAVAILABLE, {"retries": 9}, "retry", ""),
        (UNAVAILABLE, {"retries": 10}, "raise", "retried 10 times"),
        (UNAVAILABLE, {"effects": (POST,)}, "raise", "had left already"),
        (UNAVAILABLE, {"effects": (POST,), "idempotent": True}, "retry", ""),
        (UNAVAILABLE, {"no_broker": "it was called directly"}, "raise", "called directly"),
        (UNAVAILABLE, {"expires_in": 0.5}, "raise", "expires in 0.5 s"),
        (UNAVAILABLE, {"expires_in": -5.0}, "raise", "expires in 0.0 s"),
        (UNAVAILABLE, {"expires_in": 60.0}, "retry", ""),
        (EXHAUSTED, {}, "retry", ""),
        (EXHAUSTED, {"policy": RetryPolicy(max_retries=0)}, "raise", "retried 0 times"),
        (PERMANENT, {}, "raise", "in the same way"),
        (PERMANENT, {"idempotent": True}, "raise", "in the same way"),
    ],
)
def test_decide(kind: FailureKind, situation: dict[str, Any], action: str, reason: str) -> None:
    """What follows a failure, and the words for it."""
    decision = decide(Failure(kind, Sent.UNKNOWN), Situation(**situation))
    assert decision.action is Action(action)
    assert reason in decision.reason
    assert bool(decision.reason) is (action == "raise" or not situation.get("affordable", True))


@pytest.mark.parametrize(
    ("retries", "chance", "retry_after", "delay"),
    [
        (0, 1.0, None, 2.0),
        (0, 0.0, None, 1.0),
        (1, 1.0, None, 4.0),
        (3, 0.5, None, 12.0),
        (9, 1.0, None, 60.0),
        (0, 1.0, 30.0, 30.0),
        (9, 1.0, 30.0, 60.0),
    ],
)
def test_delays(retries: int, chance: float, retry_after: float | None, delay: float) -> None:
    """Exponential with equal jitter up to a bound; never sooner than the server asked for."""
    failure = replace(Failure(UNAVAILABLE, Sent.NOTHING), retry_after=retry_after)
    decision = decide(failure, Situation(retries=retries, chance=chance, policy=RetryPolicy(max_retries=20)))
    assert (decision.action, decision.delay) == (Action.RETRY, delay)


@pytest.mark.parametrize(
    ("retry_after", "visibility", "action"),
    [(30.0, 3600.0, "retry"), (3600.0, 3600.0, "raise"), (86400.0, 3600.0, "raise"), (86400.0, None, "retry")],
)
def test_no_server_makes_a_broker_deliver_twice(retry_after: float, visibility: float | None, action: str) -> None:
    """A message that waits longer than the broker's visibility timeout is delivered a second time."""
    failure = replace(Failure(UNAVAILABLE, Sent.NOTHING), retry_after=retry_after)
    decision = decide(failure, Situation(visibility=visibility))
    assert decision.action is Action(action)
    assert ("asks to wait" in decision.reason) is (action == "raise")


@pytest.mark.parametrize(("replays", "delay"), [(0, 0.05), (1, 0.1)])
def test_what_met_in_a_deadlock_does_not_meet_again(replays: int, delay: float) -> None:
    """An aborted transaction waits a little, at random."""
    decision = decide(Failure(ABORTED, Sent.ALL), Situation(replays=replays, chance=1.0))
    assert (decision.action, decision.delay) == (Action.REPLAY, delay)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"replays": -1}, "replays=-1"),
        ({"replays": 1.5}, "replays=1.5"),
        ({"replays": True}, "replays=True"),
        ({"max_retries": None}, "max_retries=None"),
        ({"backoff": "2"}, "backoff='2'"),
        ({"backoff_max": -0.1}, "backoff_max=-0.1"),
    ],
)
def test_a_wrong_policy_is_refused(options: dict[str, Any], named: str) -> None:
    """At once, by the value's name."""
    with pytest.raises(ConfigurationError, match=named):
        RetryPolicy(**options)


def test_a_tasks_option_stands_for_a_policy() -> None:
    """True is the default one, False is none; anything else is named."""
    own = RetryPolicy(replays=7)
    assert RetryPolicy.of(True, "t") == RetryPolicy()
    assert RetryPolicy.of(False, "t") is None
    assert RetryPolicy.of(own, "t") is own
    with pytest.raises(ConfigurationError, match=r"shop\.task: replay=3"):
        RetryPolicy.of(3, "shop.task")


def test_a_budget_is_spent_and_given_back() -> None:
    """5 tokens a replay, 10 after a time-out; a success gives back what its replays took, or one."""
    budget = Budget(20)
    assert budget.take(timed_out=True)
    assert budget.take(timed_out=False)
    assert budget.tokens == 5
    assert budget.take(timed_out=False)
    assert not budget.take(timed_out=False)
    budget.succeeded(0)
    assert budget.tokens == 1
    budget.succeeded(2)
    assert budget.tokens == 11
    for _ in range(20):
        budget.succeeded(0)
    assert budget.tokens == 20
    assert not Budget(0).take(timed_out=False)


def test_a_child_has_a_budget_of_its_own() -> None:
    """Full, and not behind a lock that a thread of the parent held."""
    budget = Budget(20)
    budget.take(timed_out=True)
    with budget._lock:
        parent = os.getpid()
        tokens, took, child = run_in_fork(lambda: (budget.tokens, budget.take(timed_out=True), os.getpid()))
    assert (tokens, took) == (20, True)
    assert child != parent
    assert budget.tokens == 10
