"""Whatever fails, and however often: nothing that cannot be taken back is done twice, and nothing is endless."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any
from unittest import mock

from hypothesis import given, settings
from hypothesis import strategies as st

from workerpools._run.attempts import Effect, note_effect
from workerpools._run.budget import Budget
from workerpools._run.delivery import ABORTED_BACKOFF, Action, RetryPolicy, Situation, decide
from workerpools._run.events import Listeners
from workerpools._run.failure import Failure, FailureKind, Noted, Phase, Sent, attach
from workerpools._run.loop import run

SECONDS = st.floats(0, 1000, allow_nan=False)

policies = st.builds(
    RetryPolicy,
    replays=st.integers(0, 5),
    max_retries=st.integers(0, 5),
    backoff=SECONDS,
    backoff_max=SECONDS,
)


def mostly(usual: Any, seldom: Any) -> Any:
    """Return a strategy for what is usual, with an exception now and then: most decisions are refused soon enough."""
    return st.integers(0, 5).flatmap(lambda number: seldom if number == 5 else usual)


failures = st.builds(
    Failure,
    kind=st.sampled_from(FailureKind),
    sent=st.sampled_from(Sent),
    phase=st.sampled_from(Phase),
    retry_after=mostly(st.none(), SECONDS),
    timed_out=st.booleans(),
)
situations = st.builds(
    Situation,
    effects=mostly(st.just(()), st.just((Effect("POST by 'api'"),))),
    idempotent=st.booleans(),
    policy=mostly(policies, st.none()),
    replays=st.integers(0, 5),
    retries=st.integers(0, 5),
    affordable=mostly(st.just(True), st.just(False)),
    no_broker=mostly(st.just(""), st.just("it was called directly")),
    remaining=mostly(st.none(), st.floats(-1, 1)),
    expires_in=st.none() | st.floats(-10, 1000),
    visibility=mostly(st.none(), SECONDS),
    chance=st.floats(0, 1),
)

#: A machine that is busy with other tests is no failure of a decision.
thoroughly = settings(max_examples=800, deadline=None)


@thoroughly
@given(failures, situations)
def test_one_decision(failure: Failure, situation: Situation) -> None:
    """What each decision must not be, whatever surrounds it."""
    decision = decide(failure, situation)
    policy = situation.policy
    again = decision.action is not Action.RAISE
    assert again or decision.reason
    assert decision.delay >= 0
    if policy is None or failure.kind is FailureKind.PERMANENT:
        assert not again
        return
    if not situation.idempotent and (situation.effects or failure.kind is FailureKind.INDETERMINATE):
        assert not again
    if decision.action is Action.REPLAY:
        assert situation.affordable
        assert situation.replays < policy.replays
        # Where nothing can be served now, another try at once is none.
        assert failure.kind not in (FailureKind.UNAVAILABLE, FailureKind.POOL_EXHAUSTED)
        assert situation.remaining is None or decision.delay < situation.remaining
        most = ABORTED_BACKOFF * 2**situation.replays if failure.kind is FailureKind.ABORTED else 0.0
        assert decision.delay <= most
    if decision.action is Action.RETRY:
        assert not situation.no_broker
        assert situation.retries < policy.max_retries
        assert situation.expires_in is None or decision.delay < situation.expires_in
        asked = failure.retry_after or 0.0
        assert situation.visibility is None or asked < situation.visibility
        assert asked <= decision.delay <= max(asked, policy.backoff_max, 0.0)
        assert decision.delay <= max(asked, policy.backoff * 2**situation.retries)


@thoroughly
@given(failures, situations)
def test_what_is_known_against_it_never_helps(failure: Failure, situation: Situation) -> None:
    """An effect more, one replay more behind it, no idempotence: none of them makes a refused task run again."""
    if decide(failure, situation).action is not Action.RAISE:
        return
    assert decide(failure, situation._replace(idempotent=False)).action is Action.RAISE
    worse = (*situation.effects, Effect("COMMIT by 'db'"))
    assert decide(failure, situation._replace(effects=worse)).action is Action.RAISE
    assert decide(failure, situation._replace(retries=situation.retries + 1)).action is Action.RAISE


def test_a_task_may_be_retried_for_ever() -> None:
    """A policy with a bound that is never reached comes to the longest delay, and stays there."""
    policy = RetryPolicy(max_retries=10_000)
    situation = Situation(policy=policy, retries=1100, chance=1.0)
    assert decide(Failure(FailureKind.UNAVAILABLE, Sent.NOTHING), situation).delay == policy.backoff_max


def test_an_aborted_transaction_waits_for_a_bounded_time() -> None:
    """The process sleeps meanwhile: not for longer than a retry through the broker would wait."""
    policy = RetryPolicy(replays=20)
    situation = Situation(policy=policy, replays=19, chance=1.0)
    assert decide(Failure(FailureKind.ABORTED, Sent.ALL), situation).delay <= policy.backoff_max


@dataclass(frozen=True)
class Attempt:
    """One run of a body whose effect cannot be taken back.

    Attributes:
        effect: What becomes of it: ``not reached`` before the failure, ``done`` before it, or the failure's own: then
            it was done, unnoticed, if that says ``indeterminate`` and ``done_after_all`` is true.
        failure: What ends the run; None for a success.
        done_after_all: What the server knows and nobody else.
        requests: How many requests of it are sent again.
    """

    effect: str
    failure: Failure | None
    done_after_all: bool = False
    requests: int = 0


# Simpler than those of a single decision: it is their order that matters here. A failure to roll back is judged
# otherwise, and is none of the decision's.
one_failure = st.builds(
    Failure,
    kind=st.sampled_from((FailureKind.INDETERMINATE, FailureKind.STALE, *FailureKind)),
    sent=st.just(Sent.UNKNOWN),
    timed_out=st.booleans(),
)
attempts = st.lists(
    st.builds(
        Attempt,
        effect=st.sampled_from(("not reached", "the failure's own", "done")),
        failure=mostly(one_failure, st.none()),
        done_after_all=mostly(st.just(True), st.just(False)),
        requests=mostly(st.just(0), st.integers(1, 3)),
    ),
    min_size=1,
    max_size=15,
)


class Broken(Exception):
    """What a resource raises."""


class Put(Exception):
    """The broker has it."""


@dataclass
class World:
    """A task, its broker and its server; the terms that the runner is given."""

    policy: RetryPolicy | None
    idempotent: bool
    budget: Budget
    with_broker: bool
    expires: float | None
    script: list[Attempt]
    name: str = "task"
    instance: Any = None
    request: Any = None
    runs: int = 0
    executed: int = 0
    request_replays: int = 0
    waiting: float | None = None

    def is_control(self, error: BaseException) -> bool:
        return isinstance(error, Put)

    def retries(self, request: Any) -> int:
        return int(request["retries"])

    def replays(self, request: Any) -> int:
        return int(request["replays"])

    def carry(self, request: Any, replays: int) -> None:
        request["replays"] = replays

    def no_broker(self, request: Any, error: BaseException) -> str:
        return "" if self.with_broker else "it was called directly"

    def runs_again(self, request: Any, error: BaseException) -> str:
        return ""

    def requests(self) -> list[Any]:
        return [self.request]

    def allowed(self, request: Any, elapsed: float) -> float | None:
        return None

    def expires_in(self, request: Any) -> float | None:
        return self.expires

    def visibility(self) -> float | None:
        return None

    def time_limit_exceeded(self, request: Any) -> Exception:
        raise NotImplementedError

    def retry(self, request: Any, error: BaseException, delay: float) -> Exception:
        assert self.waiting is None
        self.waiting = delay
        request["retries"] += 1
        return Put()

    @property
    def listeners(self) -> Listeners:
        return Listeners()

    def body(self) -> None:
        from workerpools._run import attempts

        self.runs += 1
        attempt = self.script.pop(0) if self.script else Attempt("done", None)
        current = attempts.current()
        assert current is not None
        assert current.delivery is not None
        stale = Noted(Failure(FailureKind.STALE, Sent.ALL), Phase.REQUEST, budget=self.budget, listeners=self.listeners)
        self.request_replays += sum(current.delivery.take_replay(stale) for _ in range(attempt.requests))
        if attempt.failure is None or attempt.effect == "done":
            # As a resource does it: noted before it leaves.
            note_effect(Effect("POST by 'api'"))
            self.executed += 1
        if attempt.failure is None:
            return
        if attempt.effect == "the failure's own" and attempt.failure.kind is FailureKind.INDETERMINATE:
            self.executed += attempt.done_after_all
        error = Broken()
        attach(error, Noted(attempt.failure, attempt.failure.phase, budget=self.budget, listeners=self.listeners))
        raise error

    def live(self) -> bool:
        """Deliver the task until nobody has it any more; return whether it succeeded."""
        request = {"retries": 0, "replays": 0}
        while True:
            try:
                # Each delivery knows no more than what the message says.
                self.request = dict_of(request)
                run(self.body, self)
            except Put:
                assert self.waiting is not None
                assert self.expires is None or self.waiting < self.expires
                if self.expires is not None:
                    self.expires -= self.waiting
                self.waiting = None
            except Broken:
                return False
            else:
                return True


class dict_of(dict[str, int]):
    """A request that writes through: Celery copies its headers into the message that is put back."""

    def __init__(self, message: dict[str, int]) -> None:
        super().__init__(message)
        self.message = message

    def __setitem__(self, key: str, value: int) -> None:
        super().__setitem__(key, value)
        self.message[key] = value


worlds = st.builds(
    World,
    policy=mostly(policies, st.none()),
    idempotent=st.booleans(),
    budget=st.builds(Budget, st.sampled_from((500, 12, 5, 4, 0))),
    with_broker=mostly(st.just(True), st.just(False)),
    expires=mostly(st.none(), SECONDS),
    script=attempts,
)


@thoroughly
@given(worlds)
def test_a_whole_life(world: World) -> None:
    """Through the runner, over all deliveries: once at most unless it is idempotent; and it ends."""
    tokens = world.budget.tokens
    with mock.patch.object(time, "sleep"):
        succeeded = world.live()
    policy = world.policy or RetryPolicy(replays=0, max_retries=0)
    if not world.idempotent:
        assert world.executed <= 1
    assert world.executed or not succeeded
    most = policy.replays + (policy.max_retries if world.with_broker else 0)
    assert world.runs + world.request_replays <= 1 + most
    if tokens < 5:
        # Without tokens only the broker is left.
        assert world.runs <= 1 + (policy.max_retries if world.with_broker else 0)
        assert world.request_replays == 0
