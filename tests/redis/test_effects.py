"""What counts as an effect, by what the server answered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.redis.conftest import Stage, effects_of

COUNT = "return redis.call('INCR', KEYS[1])"
HALFWAY = "redis.call('INCR', KEYS[1]); return redis.call('LPUSH', KEYS[1], 1)"


def _transaction(cache: Any) -> None:
    with cache.pipeline() as pipeline:
        pipeline.incr("n").incr("n").execute()


def _reading_transaction(cache: Any) -> None:
    with cache.pipeline() as pipeline:
        pipeline.get("n").get("m").execute()


def _pipeline(cache: Any) -> None:
    with cache.pipeline(transaction=False) as pipeline:
        pipeline.get("n").incr("n").execute()


def _refused_pipeline(cache: Any) -> None:
    with cache.pipeline(transaction=False) as pipeline:
        pipeline.lpush("text", 1).get("text").incr("text").execute(raise_on_error=False)


def _half_refused_pipeline(cache: Any) -> None:
    with cache.pipeline(transaction=False) as pipeline:
        pipeline.lpush("text", 1).incr("n").execute(raise_on_error=False)


def _aborted(cache: Any) -> None:
    with cache.pipeline() as pipeline:
        pipeline.incr("n").execute_command("INCR")
        _refused(pipeline.execute)


def _partly_failed_transaction(cache: Any) -> None:
    with cache.pipeline() as pipeline:
        pipeline.incr("n").lpush("text", 1)
        _refused(pipeline.execute)


def _watched(cache: Any) -> None:
    with cache.pipeline() as pipeline:
        pipeline.watch("n")
        pipeline.get("n")
        pipeline.multi()
        pipeline.incr("m").execute()


def _overtaken(cache: Any) -> None:
    with cache.pipeline() as pipeline:
        pipeline.watch("n")
        cache.execute_command("TOUCH", "n")
        pipeline.multi()
        pipeline.incr("m")
        # Not a command that is noted: the test's own client.
        cache.others.incr("n")
        _refused(pipeline.execute)


def _refused(run: Callable[..., Any], *arguments: Any) -> None:
    with pytest.raises(Exception) as caught:
        run(*arguments)
    assert type(caught.value).__module__.partition(".")[0] in ("redis", "valkey"), caught.value


def _locked(cache: Any) -> None:
    with cache.lock("lock", timeout=5):
        cache.get("n")


def _kept(cache: Any) -> None:
    assert cache.lock("lock", timeout=5).acquire()


def _not_acquired(cache: Any) -> None:
    cache.others.set("lock", "another's")
    assert not cache.lock("lock", timeout=5).acquire(blocking=False)


def _extended(cache: Any) -> None:
    lock = cache.lock("lock", timeout=5)
    assert lock.acquire()
    lock.extend(5)
    lock.reacquire()
    lock.release()


def _expired(cache: Any) -> None:
    lock = cache.lock("lock", timeout=5)
    assert lock.acquire()
    cache.others.delete("lock")
    _refused(lock.release)


def _worked_under(cache: Any) -> None:
    with cache.lock("lock", timeout=5):
        cache.incr("n")


def _listened(cache: Any) -> None:
    with cache.pubsub() as pubsub:
        pubsub.subscribe("channel")
        assert pubsub.get_message(timeout=2)["type"] == "subscribe"


def _missing_script(cache: Any) -> None:
    _refused(cache.evalsha, "0" * 40, 1, "n")


CASES: list[tuple[Callable[[Any], object], list[str]]] = [
    (lambda cache: cache.get("n"), []),
    (lambda cache: list(cache.scan_iter()), []),
    (lambda cache: cache.info(), []),
    (lambda cache: cache.ping(), []),
    (lambda cache: cache.set("n", 1), ["SET by 'cache'"]),
    (lambda cache: cache.incr("n"), ["INCRBY by 'cache'"]),
    (lambda cache: cache.execute_command("incr", "n"), ["INCR by 'cache'"]),
    (lambda cache: cache.publish("channel", "message"), ["PUBLISH by 'cache'"]),
    (lambda cache: cache.config_set("slowlog-max-len", 100), ["CONFIG SET by 'cache'"]),
    (lambda cache: _refused(cache.execute_command, "BF.ADD", "n", 1), ["BF.ADD by 'cache'"]),
    (lambda cache: _refused(cache.lpush, "text", 1), []),
    (lambda cache: _refused(cache.incr, "text"), []),
    (lambda cache: cache.register_script(COUNT)(keys=["n"]), ["EVALSHA by 'cache'"]),
    (lambda cache: cache.eval(COUNT, 1, "n"), ["EVAL by 'cache'"]),
    (lambda cache: _refused(cache.eval, HALFWAY, 1, "n"), ["EVAL by 'cache'"]),
    (lambda cache: cache.execute_command("EVAL_RO", "return 1", 0), []),
    (_missing_script, []),
    (_transaction, ["a transaction by 'cache'"]),
    (_reading_transaction, []),
    (_pipeline, ["a pipeline by 'cache'"]),
    (_refused_pipeline, []),
    (_half_refused_pipeline, ["a pipeline by 'cache'"]),
    (_aborted, []),
    (_partly_failed_transaction, ["a transaction by 'cache'"]),
    (_watched, ["a transaction by 'cache'"]),
    (_overtaken, []),
    (_locked, []),
    (_kept, ["SET by 'cache'"]),
    (_not_acquired, []),
    (_extended, []),
    (_expired, ["SET by 'cache'", "EVALSHA by 'cache'"]),
    (_worked_under, ["INCRBY by 'cache'"]),
    (_listened, []),
]


def test_what_counts_as_an_effect(stage: Stage) -> None:
    """A write that was done, or may have been; not one that the server refused before it did anything."""
    resource = stage.declare()
    found = []
    for number, (body, expected) in enumerate(CASES):
        stage.own.flushdb()
        stage.own.script_flush()
        stage.own.set("text", "a text")

        def run(body: Any = body) -> None:
            cache = resource.get()
            cache.others = stage.own
            body(cache)

        said = effects_of(run)
        if said != expected:
            found.append((number, body, said, expected))
    assert not found
    assert stage.stats().in_use == 0
    assert stage.stats().value("failures") == 0
