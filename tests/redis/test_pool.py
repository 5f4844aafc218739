"""The pool: bounds, liveness, lifetimes, and what a body leaves on a connection."""

from __future__ import annotations

import asyncio
import contextlib
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from functools import partial
from typing import Any

import pytest
import redis

from tests.redis.conftest import Stage
from tests.support.interruptions import Interruption, in_a_thread
from workerpools import ConfigurationError, FailureKind, classify
from workerpools.adapter import ExecutionPool, run_coroutine
from workerpools.testing import run_attempt


def test_the_wait_for_a_connection_is_bounded(stage: Stage) -> None:
    """By acquire_timeout, where another thread has them all; and at once, where the body itself does."""
    cache = stage.declare(max_connections=1, acquire_timeout=4.0)
    taken, over = threading.Event(), threading.Event()

    def hold() -> None:
        with cache.get().pipeline() as pipeline:
            pipeline.watch("n")
            taken.set()
            over.wait(10)

    holder = threading.Thread(target=hold)
    holder.start()
    taken.wait(10)
    began = time.monotonic()
    with pytest.raises(Exception, match=r"none became free in 4 s") as caught:
        run_attempt(lambda: cache.get().get("n"))
    assert 4.0 <= time.monotonic() - began < 30.0
    failure = classify(caught.value)
    assert failure is not None
    assert failure.kind is FailureKind.POOL_EXHAUSTED
    assert stage.stats().value("acquire_timeouts") == 1
    over.set()
    holder.join(10)

    def nested() -> Any:
        if stage.is_async:
            # In one coroutine: for the loop, each other one may be anyone's.
            return nested_coroutine(cache._value.get())
        with cache.get().pipeline() as pipeline:
            pipeline.watch("n")
            cache.get().get("n")
        return None

    async def nested_coroutine(client: Any) -> None:
        async with client.pipeline() as pipeline:
            await pipeline.watch("n")
            await client.get("n")

    began = time.monotonic()
    with pytest.raises(Exception, match="held by this very run") as caught:
        run_attempt(nested)
    assert time.monotonic() - began < 4.0
    failure = classify(caught.value)
    assert failure is not None
    assert failure.kind is FailureKind.PERMANENT
    assert run_attempt(lambda: cache.get().get("n")) is None


def test_its_size_follows_from_the_execution_pool(stage: Stage) -> None:
    """Ten, or the concurrency; connections are opened as they are needed."""
    from workerpools.adapter import Opening

    adapter = stage.declare().adapter
    for concurrency, size in ((None, 10), (4, 10), (50, 50)):
        client = adapter.open(Opening("cache", ExecutionPool("threads", concurrency)))
        assert client.connection_pool.max_connections == size
        adapter.close(client, 0.0)
    assert stage.proxy.accepted == 0


@contextlib.contextmanager
def counted(port: int) -> Iterator[tuple[int, list[str]]]:
    """A port that leads to another one, and who has spoken there, one after the other."""
    turns: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def relay() -> None:
            client, _ = listener.accept()
            with client, socket.create_connection(("127.0.0.1", port)) as server:
                others = {client: ("client", server), server: ("server", client)}
                while True:
                    for each in select.select(list(others), [], [])[0]:
                        data = each.recv(65536)
                        if not data:
                            return
                        name, other = others[each]
                        if turns[-1:] != [name]:
                            turns.append(name)
                        other.sendall(data)

        thread = threading.Thread(target=relay)
        thread.start()
        yield listener.getsockname()[1], turns
        thread.join(10)


def test_connecting_takes_one_round_trip(stage: Stage) -> None:
    """Log-in, names and the database's number leave together, and not one after the other as redis-py's do."""

    def round_trips(use: Callable[[str], object]) -> int:
        with counted(stage.proxy.port) as (port, turns):
            use(stage.url(port, 1))
        return turns.count("client") - len(["the command"])

    def plainly(url: str) -> None:
        with closing(redis.Redis.from_url(url.replace("valkey://", "redis://"), client_name="shop")) as plain:
            plain.get("n")

    def here(url: str) -> None:
        cache = stage.add(url, client_name="shop")
        run_attempt(lambda: cache.get().get("n"))
        (found,) = [client for client in stage.own.client_list() if client["name"] == "shop"]
        assert (found["lib-name"], found["lib-ver"] != "") == (f"{stage.scheme}-py(workerpools)", True)
        assert stage.stats().value("opened") == 1
        stage.close()

    assert round_trips(here) == 1
    assert round_trips(plainly) > 1


@pytest.mark.parametrize("protocol", [2, 3])
def test_both_protocols(stage: Stage, protocol: int) -> None:
    """RESP2 and RESP3, decoded where that is asked for."""
    cache = stage.declare(protocol=protocol, decode_responses=True, name=f"cache-{protocol}")
    run_attempt(lambda: cache.get().hset("hash", mapping={"a": 1}))
    assert run_attempt(lambda: cache.get().hgetall("hash")) == {"a": "1"}

    def listen() -> object:
        with cache.get().pubsub(ignore_subscribe_messages=True) as pubsub:
            pubsub.subscribe("channel")
            pubsub.get_message(timeout=2)
            stage.own.publish("channel", "hello")
            return pubsub.get_message(timeout=2)["data"]

    assert run_attempt(listen) == "hello"
    assert stage.stats().in_use == 0


LEFT: list[Callable[[Any], object]] = [
    lambda cache: cache.select(5) if hasattr(cache, "select") else cache.execute_command("SELECT", 5),
    lambda cache: cache.execute_command("SELECT", 5),
    lambda cache: cache.execute_command("MULTI"),
    lambda cache: cache.execute_command("WATCH", "n"),
    lambda cache: cache.client_setname("mine"),
    lambda cache: cache.execute_command("CLIENT", "TRACKING", "OFF"),
    lambda cache: cache.execute_command("HELLO", 2),
    lambda cache: cache.readonly(),
    lambda cache: cache.pubsub().subscribe("channel"),
    lambda cache: _watching(cache.pipeline()),
    lambda cache: cache.monitor().__enter__(),
    lambda cache: cache.connection_pool.get_connection("_").send_command("GET", "n"),
]


def _watching(pipeline: Any) -> object:
    pipeline.watch("n")
    # Kept: one that is collected is reset.
    return pipeline


@pytest.mark.parametrize("leave", LEFT)
def test_what_a_body_leaves_on_a_connection_is_gone(stage: Stage, leave: Any) -> None:
    """The next task has a connection without it, and nothing stays in use."""
    cache = stage.declare(max_connections=1)
    stage.own.set("n", 1)
    kept: list[object] = []
    run_attempt(lambda: kept.append(leave(cache.get())))
    assert stage.stats().in_use == 0
    assert run_attempt(lambda: cache.get().get("n")) == b"1"
    assert stage.stats().value("opened") == 2


def test_a_connection_without_a_remainder_is_kept(stage: Stage) -> None:
    """Also after a transaction that watched a key, and one that was given up."""
    cache = stage.declare(max_connections=1)

    def body() -> None:
        with cache.get().pipeline() as pipeline:
            pipeline.watch("n")
            pipeline.multi()
            pipeline.incr("n").execute()
            pipeline.watch("n")
        with cache.get().pipeline() as pipeline:
            pipeline.watch("n")
            pipeline.unwatch()

    run_attempt(body)
    run_attempt(body)
    assert stage.stats().value("opened") == 1


def test_what_was_given_back_serves_nobody_else(stage: Stage) -> None:
    """A pipeline that its body kept cannot use the connection that the pool has taken back."""
    cache = stage.declare()
    kept: list[Any] = []

    def body() -> None:
        pipeline = cache.get().pipeline()
        pipeline.watch("n")
        kept.append(pipeline)

    run_attempt(body)
    with pytest.raises(Exception, match="given back to its pool"):
        kept[0].get("n")
    kept[0].reset()
    assert stage.stats().in_use == 0


def test_an_idle_connection_is_checked_when_it_is_due(stage: Stage) -> None:
    """Not before check_after; then by a PING, which replaces it where none is answered."""
    cache = stage.declare(check_after=0.2, connect_timeout=0.5)
    run_attempt(lambda: cache.get().get("n"))
    run_attempt(lambda: cache.get().get("n"))
    assert stage.stats().value("checks") == 0
    time.sleep(0.25)
    run_attempt(lambda: cache.get().get("n"))
    assert (stage.stats().value("checks"), stage.stats().value("failed_checks")) == (1, 0)
    time.sleep(0.25)
    stage.proxy.silence(new=False)
    run_attempt(lambda: cache.get().incr("n"))
    assert (stage.stats().value("checks"), stage.stats().value("failed_checks")) == (2, 1)
    assert stage.stats().value("failures") == 0
    assert stage.own.get("n") == b"1"


@pytest.mark.parametrize(("options", "reason"), [({"max_lifetime": 0.2}, "lifetime"), ({"max_idle": 0.2}, "idle")])
def test_a_connection_is_replaced_in_time(stage: Stage, options: dict[str, Any], reason: str) -> None:
    """After its lifetime, shortened at random; or once it was idle for too long."""
    cache = stage.declare(**options)
    run_attempt(lambda: cache.get().get("n"))
    time.sleep(0.25)
    run_attempt(lambda: cache.get().incr("n"))
    assert stage.stats().value("closed", reason) == 1
    assert stage.own.get("n") == b"1"


def test_the_driver_is_not_made_to_retry(stage: Stage) -> None:
    """It would send again what may have been done."""
    client = stage.declare().get()
    connection = client.connection_pool.get_connection("_")
    assert connection.retry._retries == 0
    client.connection_pool.release(connection)
    with pytest.raises(ConfigurationError, match="send nothing again"):
        client.set_retry(None) if hasattr(client, "set_retry") else client.connection_pool.set_retry(None)


def _work(cache: Any, number: int) -> None:
    value = f"value-{number}"
    with cache.pipeline() as pipeline:
        pipeline.set(value, value).get(value).execute()
    with cache.lock("lock", timeout=5):
        assert cache.get(value) == value.encode()
    with cache.pipeline() as pipeline:
        pipeline.watch(value)
        assert pipeline.get(value) == value.encode()


# One that strikes in a finalizer is ignored by Python.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interruption_anywhere_leaves_nothing(stage: Stage) -> None:
    """Struck at points all over our code and the driver's: no connection is lost, none has another's answer."""
    if stage.is_async:
        pytest.skip("nothing strikes in the thread of the event loop but cancellations")
    cache = stage.declare(max_connections=2, acquire_timeout=1.0, name="struck")
    files = ("workerpools/redis/", "/redis/connection.py", "/redis/client.py", "/redis/_parsers/", "/redis/lock.py")
    if stage.scheme == "valkey":
        files = (files[0], *(part.replace("redis", "valkey") for part in files[1:]))
    files = (*files, "/threading.py")
    _work(cache.get(), 0)
    with Interruption(files) as counted:
        run_attempt(lambda: _work(cache.get(), 0))
    assert counted.points > 300
    struck = 0
    for at in range(1, counted.points, 7):
        strike = Interruption(files, at=at, error=_Struck)

        def body(strike: Interruption = strike, at: int = at) -> None:
            with strike:
                _work(cache.get(), at)

        with suppress(_Struck):
            run_attempt(body)
        struck += bool(strike.where)
        stats = stage.stats()
        assert (stats.in_use, stats.pending) == (0, 0), strike.where
        assert stats.open <= 2, strike.where
        # Whatever was interrupted, the lock included.
        stage.own.delete("lock")
        for call in (run_attempt, partial(in_a_thread, timeout=3.0)):
            assert call(lambda at=at: cache.get().echo(f"{at}")) == f"{at}".encode(), strike.where
    assert struck > 40


# One that strikes before the coroutine is handed to the loop.
@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupted_wait_for_the_loop_does_not_stop_it(stage: Stage) -> None:
    """As at the end of an attempt, whose connection is taken back on the loop."""
    if not stage.is_async:
        pytest.skip("it has no loop")
    cache = stage.declare()
    pool = cache.get()._value.connection_pool
    number = 0
    while True:
        number += 1
        run_attempt(lambda: cache.get().get("n"))
        with Interruption(("/redis/_async.py", "/threading.py"), number, _Struck) as strike, suppress(_Struck):
            pool.retire(time.monotonic(), "other")
        if not strike.where:
            break
        assert in_a_thread(lambda: run_coroutine(asyncio.sleep(0, "alive"))) == "alive", strike.where
    assert number > 3


async def _work_on_the_loop(cache: Any, number: int) -> None:
    value = f"value-{number}"
    async with cache.pipeline() as pipeline:
        await pipeline.set(value, value).get(value).execute()
    async with cache.lock("lock", timeout=5):
        assert await cache.get(value) == value.encode()
    async with cache.pipeline() as pipeline:
        await pipeline.watch(value)
        assert await pipeline.get(value) == value.encode()


def test_a_cancellation_anywhere_leaves_nothing(stage: Stage) -> None:
    """After any step of the loop: no connection is lost, none has another's answer."""
    if not stage.is_async:
        pytest.skip("nothing is cancelled in a thread")
    cache = stage.declare(max_connections=2, acquire_timeout=1.0)._value

    async def cancelled(number: int) -> bool:
        task = asyncio.create_task(_work_on_the_loop(cache.get(), number))
        for _ in range(number):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait((task,))
        return task.cancelled()

    async def echoes() -> None:
        for number in (1, 2):
            assert await cache.get().echo(f"{number}") == f"{number}".encode()

    struck = 0
    for number in range(0, 160, 2):
        if number % 20 == 0:
            # Some while it connects.
            stage.proxy.cut()
        struck += run_attempt(lambda number=number: cancelled(number))
        stats = stage.stats()
        assert (stats.in_use, stats.pending) == (0, 0), number
        assert stats.open <= 2, number
        stage.own.delete("lock")
        run_attempt(echoes)
    assert struck > 30


class _Struck(SystemExit):
    """The interruption."""
