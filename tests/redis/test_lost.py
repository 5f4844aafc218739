"""Connections that are lost: what runs again, and what does not."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from typing import Any

import pytest

from tests.redis.conftest import Stage
from workerpools import FailureKind, classify
from workerpools.failures import Phase
from workerpools.testing import run_attempt

COUNT = "return redis.call('INCR', KEYS[1])"


def _incr(cache: Any) -> object:
    return cache.incr("n")


def _raw(cache: Any) -> object:
    return cache.execute_command("INCR", "n")


def _transaction(cache: Any) -> object:
    with cache.pipeline() as pipeline:
        return pipeline.incr("n").get("n").execute()


def _pipeline(cache: Any) -> object:
    with cache.pipeline(transaction=False) as pipeline:
        return pipeline.get("n").incr("n").execute()


def _watched(cache: Any) -> object:
    with cache.pipeline() as pipeline:
        pipeline.watch("n")
        pipeline.multi()
        return pipeline.incr("n").execute()


def _optimistic(cache: Any) -> object:
    return cache.transaction(lambda pipeline: (pipeline.multi(), pipeline.incr("n")), "n")


def _script(cache: Any) -> object:
    return cache.eval(COUNT, 1, "n")


def _registered(cache: Any) -> object:
    return cache.register_script(COUNT)(keys=["n"])


def _single(cache: Any) -> object:
    with cache.client() as client:
        return client.incr("n")


WRITES: list[tuple[Callable[[Any], object], bytes]] = [
    (_incr, b"INCR"),
    (_raw, b"INCR"),
    (_transaction, b"EXEC"),
    (_pipeline, b"INCR"),
    (_watched, b"EXEC"),
    (_optimistic, b"EXEC"),
    (_script, b"EVAL"),
    (_registered, b"EVALSHA"),
    (_single, b"INCR"),
]


@pytest.mark.parametrize(("write", "marker"), WRITES, ids=lambda each: getattr(each, "__name__", ""))
def test_a_write_whose_reply_is_lost_is_done_once(stage: Stage, write: Any, marker: bytes) -> None:
    """The body is told the driver's own error, and is not run again."""
    cache = stage.declare()
    stage.own.script_load(COUNT)
    run_attempt(lambda: cache.get().get("n"))
    bodies = []

    def body() -> None:
        bodies.append(True)
        write(cache.get())

    stage.proxy.lose_answer(marker)
    with pytest.raises(Exception) as caught:
        run_attempt(body)
    assert type(caught.value).__name__ in ("ConnectionError", "WatchError")
    assert any("Not run again" in note for note in caught.value.__notes__)
    assert (len(bodies), stage.proxy.lost, stage.own.get("n")) == (1, 1, b"1")
    assert stage.stats().in_use == 0


def test_an_idempotent_task_is_run_again(stage: Stage) -> None:
    """It says that it may be: twice, as declared."""
    cache = stage.declare()
    run_attempt(lambda: cache.get().get("n"))
    stage.proxy.lose_answer(b"INCR")
    assert run_attempt(lambda: cache.get().incr("n"), idempotent=True) == 2


@pytest.mark.parametrize(
    "read",
    [
        lambda cache: cache.get("n"),
        lambda cache: cache.execute_command("EVAL_RO", "return redis.call('GET', KEYS[1])", 1, "n"),
        lambda cache: cache.pipeline(transaction=False).get("n").execute()[0],
        lambda cache: cache.pipeline().get("n").execute()[0],
    ],
)
def test_a_read_whose_reply_is_lost_is_done_again(stage: Stage, read: Any) -> None:
    """A single command alone, without the body; else the body."""
    stage.own.set("n", 7)
    cache = stage.declare()
    run_attempt(lambda: cache.get().get("n"))
    stage.proxy.lose_answer(b"n\r\n")
    assert run_attempt(lambda: read(cache.get())) == b"7"
    assert stage.stats().value("failures", "stale") == 1
    assert stage.stats().in_use == 0


def test_a_read_alone_is_sent_again_after_a_write(stage: Stage) -> None:
    """The body is not: its write was done."""
    cache = stage.declare()
    bodies = []

    def body() -> object:
        bodies.append(True)
        cache.get().incr("n")
        stage.proxy.lose_answer(b"GET")
        return cache.get().get("n")

    assert run_attempt(body) == b"1"
    assert len(bodies) == 1


def test_a_write_that_finds_its_connection_dead_has_not_left(stage: Stage) -> None:
    """The server had closed it, even just now: it is seen before anything is sent."""
    cache = stage.declare()

    def body() -> None:
        cache.get().get("n")
        stage.proxy.cut()
        cache.get().incr("n")

    run_attempt(body)
    assert stage.own.get("n") == b"1"
    assert stage.stats().value("failures") == 0
    assert stage.stats().value("closed", "stale") == 1


def test_a_write_of_which_nothing_left_is_done_by_the_replay(stage: Stage) -> None:
    """The system took no byte of it: it cannot have been done."""
    cache = stage.declare()
    run_attempt(lambda: cache.get().get("n"))
    broken = []

    def body() -> None:
        with cache.get().pipeline() as pipeline:
            pipeline.watch("n")
            if not broken:
                broken.append(True)
                # This end alone: what is sent next is refused by the system.
                pipeline.connection._raw.shutdown(socket.SHUT_WR)
            pipeline.multi()
            pipeline.incr("n").execute()

    run_attempt(body)
    assert stage.own.get("n") == b"1"
    assert stage.stats().value("failures", "stale") == 1


def test_a_large_write_that_left_in_part_is_not_done(stage: Stage) -> None:
    """A server acts on whole commands only; a pipeline may have been done in part."""
    cache = stage.declare(timeout=0.5)
    large = b"x" * 30_000_000
    for send, kind in (
        (lambda client: client.set("n", large), FailureKind.UNAVAILABLE),
        (lambda client: client.pipeline().incr("m").set("n", large).execute(), FailureKind.UNAVAILABLE),
        (
            lambda client: client.pipeline(transaction=False).incr("m").set("n", large).execute(),
            FailureKind.INDETERMINATE,
        ),
    ):
        run_attempt(lambda: cache.get().get("n"))
        stage.proxy.silence()
        with pytest.raises(Exception) as caught:
            run_attempt(lambda send=send: send(cache.get()))
        failure = classify(caught.value)
        assert failure is not None
        assert (failure.kind, failure.timed_out) == (kind, True)
        stage.proxy.cut()
        stage.proxy.resume()
    assert stage.own.get("n") is None


def test_a_silent_server_is_bounded(stage: Stage) -> None:
    """By the timeout of the client, for the whole of an answer."""
    cache = stage.declare(timeout=0.3)
    for send, kind in (
        (lambda client: client.get("n"), FailureKind.UNAVAILABLE),
        (lambda client: client.incr("n"), FailureKind.INDETERMINATE),
    ):
        run_attempt(lambda: cache.get().get("n"))
        stage.proxy.silence()
        with pytest.raises(Exception) as caught:
            run_attempt(lambda send=send: send(cache.get()))
        failure = classify(caught.value)
        assert failure is not None
        assert (type(caught.value).__name__, failure.kind, failure.timed_out) == ("TimeoutError", kind, True)
        stage.proxy.cut()
        stage.proxy.resume()


def test_a_trickling_answer_is_bounded(stage: Stage) -> None:
    """Each byte comes in time; their sum does not."""
    over = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"{stage.scheme}://127.0.0.1:{listener.getsockname()[1]}"
        trickle = stage.add(url, timeout=0.5, protocol=2, name="trickle")

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(b"+OK\r\n+OK\r\n")
                connection.recv(1000)
                connection.sendall(b"$100\r\n")
                while not over.wait(0.05):
                    connection.sendall(b"x")

        server = threading.Thread(target=serve, daemon=True)
        server.start()
        with pytest.raises(Exception) as caught:
            run_attempt(lambda: trickle.get().get("n"))
        assert type(caught.value).__name__ == "TimeoutError"
        failure = classify(caught.value)
        assert failure is not None
        assert failure.phase is Phase.REQUEST
        over.set()
        server.join(5)


def test_siblings_of_a_dead_connection_are_retired(stage: Stage) -> None:
    """Where one was dead, the others are suspect."""
    cache = stage.declare()

    def open_two() -> None:
        first, second = cache.get().connection_pool.get_connection("_"), cache.get().connection_pool.get_connection("_")
        for connection in (first, second):
            cache.get().connection_pool.release(connection)

    run_attempt(open_two)
    assert stage.stats().open == 2
    stage.proxy.lose_answer(b"GET")
    run_attempt(lambda: cache.get().get("n"))
    assert stage.stats().open == 1
    assert stage.stats().value("closed", "stale") == 2


def test_a_watched_key_that_changed_replays_the_body(stage: Stage) -> None:
    """The transaction did nothing, as the server says."""
    cache = stage.declare()
    bodies = []

    def body() -> object:
        with cache.get().pipeline() as pipeline:
            pipeline.watch("n")
            if not bodies:
                stage.own.incr("n")
            bodies.append(True)
            pipeline.multi()
            return pipeline.incr("n").execute()

    assert run_attempt(body) == [2]
    assert len(bodies) == 2


@pytest.mark.parametrize("answer", [b"-LOADING Valkey is loading the dataset in memory\r\n", b"-OOM full\r\n"])
def test_a_server_that_refuses_is_unavailable(stage: Stage, answer: bytes) -> None:
    """Nothing was done: not even of a write."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"{stage.scheme}://127.0.0.1:{listener.getsockname()[1]}"
        cache = stage.add(url, protocol=2, name="refusing")

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(b"+OK\r\n+OK\r\n")
                connection.recv(1000)
                connection.sendall(answer)
                connection.recv(1000)

        server = threading.Thread(target=serve, daemon=True)
        server.start()
        with pytest.raises(Exception) as caught:
            run_attempt(lambda: cache.get().incr("n"))
        failure = classify(caught.value)
        assert failure is not None
        assert failure.kind is FailureKind.UNAVAILABLE
        assert failure.code == answer[1:].split()[0].decode()
        assert not any("had left already" in note for note in caught.value.__notes__)
        cache.close()
        server.join(5)


def test_a_wrong_password_is_permanent(stage: Stage) -> None:
    """It is asked for once, and the body is not run again."""
    url = f"{stage.scheme}://:mistaken@{stage.proxy.host}:{stage.proxy.port}/0"
    cache = stage.add(url, name="wrong")
    with pytest.raises(Exception) as caught:
        run_attempt(lambda: cache.get().get("n"))
    failure = classify(caught.value)
    assert failure is not None
    assert failure.kind is FailureKind.PERMANENT
    assert stage.proxy.accepted == 1
    assert "mistaken" not in repr(
        (caught.value, cache, cache.get(), cache.get().connection_pool, caught.value.__notes__)
    )
