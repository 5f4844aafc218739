"""No wait reaches past the task's deadline, whatever it waits for."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
from celery.exceptions import SoftTimeLimitExceeded

from tests.redis.conftest import Stage
from workerpools.errors import DeadlineExceeded
from workerpools.testing import run_attempt

LIMIT = 0.6


def _lock(cache: Any) -> None:
    cache.lock("held", timeout=60, sleep=5).acquire()


def _with_lock(cache: Any) -> None:
    with cache.lock("held", timeout=60):
        raise AssertionError("it is another's")


def _listen(cache: Any) -> None:
    with cache.pubsub() as pubsub:
        pubsub.subscribe("channel")
        for message in pubsub.listen():
            assert message["type"] == "subscribe"


def _get_message(cache: Any) -> None:
    with cache.pubsub(ignore_subscribe_messages=True) as pubsub:
        pubsub.subscribe("channel")
        while pubsub.get_message(timeout=60) is None:
            pass


def _monitor(cache: Any) -> None:
    with cache.monitor() as monitor:
        while True:
            monitor.next_command()


def _pool(cache: Any) -> None:
    with cache.pipeline() as pipeline:
        pipeline.watch("n")
        time.sleep(LIMIT)
        cache.get("n")


WAITS: list[Callable[[Any], object]] = [
    lambda cache: cache.blpop("empty", 60),
    lambda cache: cache.blpop("empty", 0),
    lambda cache: cache.xread({"stream": "$"}, block=60_000),
    lambda cache: cache.blmove("empty", "other", 60),
    lambda cache: cache.wait(5, 60_000),
    lambda cache: cache.pipeline(transaction=False).execute_command("BLPOP", "empty", 60).execute(),
    _lock,
    _with_lock,
    _listen,
    _get_message,
    _monitor,
    _pool,
]


@pytest.mark.parametrize("wait", WAITS, ids=lambda wait: wait.__name__ if wait.__name__ != "<lambda>" else "")
def test_a_wait_ends_by_the_deadline(stage: Stage, wait: Any) -> None:
    """As the task's own time limit; the next task finds nothing of it."""
    stage.own.set("held", "another's")
    cache = stage.declare()
    began = time.monotonic()
    with pytest.raises((SoftTimeLimitExceeded, DeadlineExceeded)):
        run_attempt(lambda: wait(cache.get()), time_limit=LIMIT)
    # Less than a lock sleeps, and than an answer may take.
    assert time.monotonic() - began < LIMIT + 3.0
    assert (stage.stats().in_use, stage.stats().pending) == (0, 0)
    assert run_attempt(lambda: cache.get().get("held")) == b"another's"


def test_a_command_may_wait_on_the_server_for_longer_than_an_answer_may_take(stage: Stage) -> None:
    """The driver would give up after its timeout, and what is popped later would be lost."""
    cache = stage.declare(timeout=0.2)
    assert run_attempt(lambda: cache.get().blpop("empty", 0.5)) is None
    assert run_attempt(lambda: cache.get().pipeline().blpop("empty", 0.5).execute()) == [None]
    assert stage.stats().value("failures") == 0


def test_nothing_begins_after_the_deadline(stage: Stage) -> None:
    """Neither a connection nor a command."""
    cache = stage.declare()

    def body() -> None:
        client = cache.get()
        pipeline = client.pipeline()
        pipeline.watch("n")
        time.sleep(0.4)
        for use in (lambda: client.incr("n"), lambda: pipeline.get("n"), client.pubsub().ping):
            with pytest.raises(DeadlineExceeded):
                use()
        pipeline.reset()

    with pytest.raises((SoftTimeLimitExceeded, DeadlineExceeded)):
        run_attempt(lambda: (body(), cache.get().get("n")), time_limit=0.4)
    assert stage.own.get("n") is None
    assert stage.stats().in_use == 0
