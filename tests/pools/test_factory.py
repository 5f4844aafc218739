"""``Factory``: a value made by functions, whose errors prove what its declaration says that they prove."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
from celery import Celery

from tests.support.forking import run_in_fork
from workerpools import ConfigurationError, FailureKind, PooledTask, WorkerPools
from workerpools.adapter import Factory, Failure, Sent
from workerpools.testing import run_attempt


class Server:
    """Answers each line with the number of lines so far; ends all connections when it is told to."""

    def __init__(self) -> None:
        self.lines: list[bytes] = []
        self.connections: list[socket.socket] = []
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.address = self.listening.getsockname()
        self.ended = threading.Semaphore(0)
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self.listening.accept()
            except OSError:
                return
            self.connections.append(connection)
            threading.Thread(target=self._answer, args=[connection], daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with suppress(OSError):
            while line := connection.recv(100):
                self.lines.append(line)
                connection.sendall(b"%d\n" % len(self.lines))
        self.ended.release()

    def cut(self) -> None:
        for connection in self.connections:
            connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.listening.shutdown(socket.SHUT_RDWR)
        self.listening.close()
        for connection in self.connections:
            connection.close()


class Line:
    """A client that keeps its socket to itself."""

    def __init__(self, address: Any) -> None:
        self.opened_in = os.getpid()
        self._socket = socket.create_connection(address, 3.0)

    def ask(self, text: str) -> int:
        self._socket.sendall(text.encode() + b"\n")
        answer = self._socket.recv(100)
        if not answer:
            raise ConnectionResetError("the line is dead")
        return int(answer)

    def close(self) -> None:
        self._socket.close()

    def drop(self) -> None:
        """Close the descriptor without a shutdown, which the parent's connection would see, too."""
        self._socket.close()


@pytest.fixture
def server() -> Iterator[Server]:
    served = Server()
    yield served
    served.close()


@pytest.fixture
def pools() -> Iterator[WorkerPools]:
    with WorkerPools() as opened:
        yield opened


def stale(error: BaseException) -> FailureKind | None:
    return FailureKind.STALE if isinstance(error, OSError) else None


def test_opens_once_and_closes(server: Server, pools: WorkerPools) -> None:
    """By the functions given, or as a generator; what they make is the value."""
    closed: list[Line] = []

    def generator() -> Iterator[Line]:
        value = Line(server.address)
        yield value
        value.close()
        closed.append(value)

    made = [
        pools.add(Factory(open=lambda: Line(server.address), close=closed.append), name="function"),
        pools.add(Factory(generator), name="generator"),
    ]
    for resource in made:
        value = resource.get()
        assert resource.get() is value
        resource.close()
        assert closed.pop() is value
        assert resource.get() is not value


@pytest.mark.parametrize(
    ("options", "idempotent", "asked"),
    [
        # The value that the error ended is replaced, and the body runs again where that is safe.
        ({"classify": stale, "effects": False}, False, 2),
        ({"classify": stale}, True, 2),
        # Nobody saw what the body did before the error.
        ({"classify": stale}, False, None),
        ({"classify": lambda error: Failure(FailureKind.STALE, Sent.NOTHING), "effects": False}, False, 2),
        ({"classify": lambda error: FailureKind.INDETERMINATE, "effects": False}, False, None),
        ({"classify": lambda error: FailureKind.PERMANENT, "effects": False}, False, None),
        ({"classify": lambda error: None, "effects": False}, True, None),
        ({"effects": False}, True, None),
    ],
)
def test_classify(
    server: Server, pools: WorkerPools, options: dict[str, Any], idempotent: bool, asked: int | None
) -> None:
    """Only what the declaration says leads to another run of the body."""
    resource = pools.add(Factory(lambda: Line(server.address), **options), name="line")
    runs: list[Line] = []

    def body() -> int:
        runs.append(resource.get())
        return runs[-1].ask("one")

    assert run_attempt(body, idempotent=idempotent) == 1
    server.cut()
    if asked is None:
        with pytest.raises(ConnectionResetError) as caught:
            run_attempt(body, idempotent=idempotent)
        assert len(runs) == 2
        if options.get("classify") is stale:
            notes = caught.value.__notes__
            assert (
                "its classify= takes ConnectionResetError for stale. Not run again: a use of 'line' had left"
                in notes[0]
            )
    else:
        assert run_attempt(body, idempotent=idempotent) == asked
        assert len(runs) == 3
        assert runs[2] is not runs[1] is runs[0]
        assert server.ended.acquire(timeout=5)


@pytest.mark.parametrize(
    ("kind", "replaced"), [(kind, kind.value in ("stale", "indeterminate", "unavailable")) for kind in FailureKind]
)
def test_a_broken_value_is_replaced(server: Server, pools: WorkerPools, kind: FailureKind, replaced: bool) -> None:
    """For the next attempt, when the one that failed was not run again."""
    resource = pools.add(Factory(lambda: Line(server.address), classify=lambda error: kind), name="line")
    values: list[Line] = []

    def body() -> None:
        values.append(resource.get())
        raise TimeoutError

    for _ in range(2):
        with pytest.raises(TimeoutError):
            run_attempt(body)
    assert (values[0] is not values[1]) is replaced


def test_a_use_counts_for_another_resources_failure(server: Server, pools: WorkerPools) -> None:
    """What the first value did is not done twice because the second one's connection was dead."""
    seen = pools.add(Factory(lambda: Line(server.address), classify=stale, effects=False), name="seen")
    for effects in (True, False):
        unseen = pools.add(Factory(lambda: Line(server.address), effects=effects), name=f"unseen {effects}")
        run_attempt(lambda: seen.get().ask("warm"))
        dead = server.connections[-1]
        dead.shutdown(socket.SHUT_RDWR)
        asked = len(server.lines)

        def body(unseen: Any = unseen) -> int:
            unseen.get().ask("unseen")
            return seen.get().ask("seen")

        if effects:
            with pytest.raises(ConnectionResetError):
                run_attempt(body)
            assert server.lines[asked:] == [b"unseen\n"]
        else:
            run_attempt(body)
            assert server.lines[asked:] == [b"unseen\n", b"unseen\n", b"seen\n"]


def test_discard(server: Server, pools: WorkerPools) -> None:
    """Called in the child with the parent's value, after known sockets are replaced; the parent notices nothing."""
    order: list[tuple[int, str]] = []

    def discard(value: Line) -> None:
        order.append((os.getpid(), os.readlink(f"/proc/self/fd/{value._socket.fileno()}")))
        value.drop()

    known = pools.add(
        Factory(lambda: Line(server.address), discard=discard, connections=lambda line: [line._socket]), name="known"
    )
    hidden = pools.add(Factory(lambda: Line(server.address), discard=Line.drop), name="hidden")
    fails = pools.add(Factory(lambda: Line(server.address), discard=lambda line: 1 / 0), name="fails")
    unused = pools.add(Factory(lambda: Line(server.address), discard=lambda line: os._exit(9)), name="unused")
    parents = [resource.get() for resource in (known, hidden, fails)]

    def child() -> None:
        assert order == [(os.getpid(), "/dev/null")]
        assert parents[1]._socket.fileno() == -1
        for resource in (known, hidden, fails):
            assert resource.get() not in parents
            assert resource.get().ask("child") > 0
            # Nobody discards the child's own.
            assert resource.get()._socket.fileno() >= 0

    run_in_fork(child)
    assert order == []
    assert [line.ask("parent") for line in parents] == [4, 5, 6]
    assert not unused.is_open


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"open": Line.__name__}, "open='Line'"),
        ({"open": Line, "classify": FailureKind.STALE}, "classify=.*wanted: a function"),
        ({"open": Line, "discard": 1}, "discard=1"),
        ({"open": Line, "effects": 0}, "effects=0; wanted: True or False"),
    ],
)
def test_declaration_is_checked(arguments: dict[str, Any], message: str) -> None:
    """Where it stands."""
    with pytest.raises(ConfigurationError, match=message):
        Factory(**arguments)


def test_a_generator_function_closes_its_value_itself() -> None:
    """Two ways to close are refused."""

    def generator() -> Iterator[Any]:
        yield

    with pytest.raises(ConfigurationError, match="generator function closes it after the yield"):
        Factory(generator, close=print)


class Session:
    """A client that belongs to an event loop; opening and closing it take a while."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.closed = False

    async def close(self) -> None:
        await asyncio.sleep(0)
        assert asyncio.get_running_loop() is self.loop
        self.closed = True


async def open_session() -> Session:
    await asyncio.sleep(0)
    return Session()


async def open_at_once() -> Session:
    return Session()


def test_a_coroutine_opens_and_closes_on_the_loop() -> None:
    """Before the body, also for a parameter; a plain body is refused; on the loop alone, what does not wait."""
    app = Celery("sessions", set_as_current=False)
    with WorkerPools(app) as pools:

        class SessionTask(PooledTask):
            session = pools.add(Factory(open_session, effects=False))
            prompt = pools.add(open_at_once)

        other = pools.add(Factory(open_session), name="other")

        @app.task(base=SessionTask, bind=True)
        async def uses(self: Any, injected: Any = other.inject()) -> tuple[Any, ...]:
            assert self.session.loop is asyncio.get_running_loop()
            return self.session, self.prompt, injected, [str(effect) for effect in self.effects]

        @app.task(base=SessionTask, bind=True)
        def plain(self: Any) -> object:
            return self.session

        @app.task(base=PooledTask)
        async def undeclared() -> object:
            return other.get()

        with pytest.raises(ConfigurationError, match=r"open_session\(\) waits while it opens its value"):
            undeclared()
        first = uses()
        assert first[3] == ["a use of 'other'"]
        assert uses()[:3] == first[:3]
        assert undeclared() is first[2]
        with pytest.raises(ConfigurationError, match=r"SessionTask\.session: a coroutine opens its value"):
            plain()
        SessionTask.session.recycle()
        second = uses()
        assert second[0] is not first[0]
        assert first[0].closed
    assert all(session.closed for session in second[:3])


@pytest.mark.parametrize("close", [Session.close, None])
def test_what_a_coroutine_has_opened_is_closed_by_a_coroutine(close: Any) -> None:
    """By default by its own ``close()``."""
    with WorkerPools() as pools:
        resource = pools.add(Factory(open_session, close=close), name="session")
        session: Any = resource.get()
    assert session.closed


def test_an_error_of_opening_is_classified() -> None:
    """As one that the body raises."""
    asked: list[BaseException] = []

    async def refused() -> Session:
        raise ConnectionRefusedError("no")

    app = Celery("refusing", set_as_current=False)
    with WorkerPools(app) as pools:

        class Refused(PooledTask):
            session = pools.add(Factory(refused, classify=lambda error: asked.append(error) or None))

        @app.task(base=Refused, bind=True)
        async def uses(self: Any) -> object:
            return self.session

        with pytest.raises(ConnectionRefusedError):
            uses()
    assert [type(error) for error in asked] == [ConnectionRefusedError]


def test_coroutines_that_do_not_fit_are_refused() -> None:
    async def values() -> Any:
        yield Session()

    with pytest.raises(ConfigurationError, match="asynchronous generator function"):
        Factory(values)
    with pytest.raises(ConfigurationError, match="make open= one, too"):
        Factory(lambda: None, close=Session.close)
