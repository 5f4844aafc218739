"""The adapter contract, as tests against a live server."""

from __future__ import annotations

import itertools
import os
import signal
import socket
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any, TypeVar

import pytest
from celery import Celery
from celery.exceptions import SoftTimeLimitExceeded

from workerpools._celery.pools import WorkerPools
from workerpools._celery.task import PooledTask
from workerpools._pools.adapter import Adapter
from workerpools._pools.resource import Resource
from workerpools._process.descriptors import numbers
from workerpools._run import coroutines
from workerpools._run.delivery import RetryPolicy
from workerpools._run.events import Event, EventKind
from workerpools._run.failure import Failure
from workerpools._stats.snapshot import ResourceStats
from workerpools.errors import DeadlineExceeded
from workerpools.testing._proxy import TcpProxy

__all__ = ["AdapterContract", "run_attempt"]

R = TypeVar("R")

#: The timeout for every expected event, in seconds.
PATIENCE = 10.0

_numbers = itertools.count(1)


def run_attempt(
    body: Callable[[], R],
    *,
    idempotent: bool = False,
    replay: RetryPolicy | bool = True,
    time_limit: float | None = None,
) -> R:
    """Run ``body`` as a task body, eagerly, in the calling thread; return its result.

    Effects, replays, sessions and the deadline work as in a worker. There is no broker, so nothing is retried.

    Args:
        body: Called without arguments, and again where a replay is safe.
        idempotent: As for :class:`workerpools.PooledTask`.
        replay: As for :class:`workerpools.PooledTask`.
        time_limit: The task's soft time limit, in seconds, which determines its deadline; None for no limit.

    Raises:
        BaseException: Any exception of the task.
    """
    app = Celery("workerpools.testing", broker="memory://", set_as_current=False)
    options: dict[str, Any] = {"idempotent": idempotent, "replay": replay, "soft_time_limit": time_limit}

    # Celery copies the signature, and not every callable has one.
    def attempt() -> R:
        return body()

    task: Any = app.task(
        attempt,
        base=PooledTask,
        name=f"workerpools.testing.{next(_numbers)}",
        shared=False,
        lazy=False,
        **options,
    )
    result: R = task.apply(throw=True).get()
    return result


class AdapterContract:
    """Tests that every adapter must pass. Subclass it in a test module, under a name that begins with ``Test``.

    Override the fixture :meth:`server` and the methods :meth:`adapter` and :meth:`read`. Also override :meth:`write`
    and :meth:`written` if the client has operations that must not run twice, and :meth:`hold` if a body can keep a
    connection in use. Every connection passes through a :class:`TcpProxy`: ``self.adapter(host, port)`` is called with
    the proxy's address.

    The methods of an asynchronous client are coroutine functions; they are awaited on the process's event loop.

    Attributes:
        effects: Whether the client has operations that must not run twice; requires :meth:`write` and :meth:`written`.
        holds: Whether a body can keep a connection in use after its end; requires :meth:`hold`.
        reclaims: Whether connections left in use by an attempt are returned to the pool.
        answer_to: Bytes that identify the last request of :meth:`write` on the wire, whose answer is lost.
        secret: A secret passed to the adapter by :meth:`adapter`, which must not be shown; empty if there is none.
        grace: The tolerance of bounded waits, in seconds.
    """

    effects: bool = True
    holds: bool = True
    reclaims: bool = True
    answer_to: bytes = b""
    secret: str = ""
    grace: float = 2.0

    # To be overridden.

    @pytest.fixture
    def server(self) -> tuple[str, int]:
        """The host and port of a live server."""
        raise NotImplementedError("override the fixture server()")

    def adapter(self, host: str, port: int) -> Adapter[Any]:
        """Return a new adapter for the server at this address, with its default timeouts.

        The timeouts that apply to a silent server must be longer than a second.

        Args:
            host: The proxy's host.
            port: The proxy's port.
        """
        raise NotImplementedError

    def read(self, value: Any) -> object:
        """Use the value without an effect, for at least one round trip. Concurrent calls use separate connections.

        Args:
            value: The adapter's value.
        """
        raise NotImplementedError

    def write(self, value: Any) -> object:
        """Perform one operation that must not run twice.

        Args:
            value: The adapter's value.
        """
        raise NotImplementedError

    def written(self) -> int:
        """Return how often the server has performed :meth:`write`'s operation. Use a connection of the test's own."""
        raise NotImplementedError

    def hold(self, value: Any) -> object:
        """Check out a connection; return the object that keeps it in use.

        Args:
            value: The adapter's value.
        """
        raise NotImplementedError

    def _read(self, value: Any) -> object:
        return _waited(self.read(value))

    def _write(self, value: Any) -> object:
        return _waited(self.write(value))

    def _hold(self, value: Any) -> object:
        return _waited(self.hold(value))

    # Shared fixtures.

    @pytest.fixture
    def proxy(self, server: tuple[str, int]) -> Iterator[TcpProxy]:
        """The proxy between the adapter and the server."""
        with TcpProxy(*server) as opened:
            yield opened

    @pytest.fixture
    def pools(self) -> Iterator[WorkerPools]:
        """The WorkerPools of the adapter."""
        pools = WorkerPools()
        yield pools
        pools.close(1.0)

    @pytest.fixture
    def resource(self, pools: WorkerPools, proxy: TcpProxy) -> Resource[Any]:
        """The adapter's resource."""
        return pools.add(self.adapter(proxy.host, proxy.port), name="contract")

    # Life cycle.

    def test_declaring_opens_nothing(self, pools: WorkerPools, proxy: TcpProxy) -> None:
        """Nor does preparing: sockets wait for the first use, which is after the fork."""
        adapter = self.adapter(proxy.host, proxy.port)
        adapter.prepare()
        resource = pools.add(adapter, name="contract")
        assert (resource.is_open, proxy.accepted, _sockets(proxy)) == (False, 0, set())
        self._read(resource.get())
        assert proxy.accepted > 0

    def test_what_an_adapter_says_of_itself(self, resource: Resource[Any]) -> None:
        """``kind``, ``server``, ``libraries`` and ``leak_after`` have the types that exporters and messages expect."""
        adapter = resource.adapter
        assert isinstance(adapter.kind, str)
        assert len(adapter.kind.encode()) <= 16
        assert adapter.server is None or [type(part) for part in adapter.server] == [str, int]
        assert not isinstance(adapter.libraries, str)
        assert all(isinstance(name, str) for name in adapter.libraries)
        assert adapter.leak_after is None or adapter.leak_after > 0

    def test_no_secret_is_shown(self, resource: Resource[Any]) -> None:
        """Neither by ``describe()`` nor by any ``repr``."""
        shown = [resource.adapter.describe(), repr(resource.adapter), repr(resource), repr(resource.get())]
        assert all(shown)
        if self.secret:
            assert [text for text in shown if self.secret in text] == []

    def test_one_value_per_process(self, pools: WorkerPools, resource: Resource[Any]) -> None:
        """Concurrent threads get the same value, opened once."""
        opened = list[Event]()
        pools.subscribe(lambda event: opened.append(event) if event.kind is EventKind.VALUE_OPENED else None)
        ready = threading.Barrier(8)

        def use() -> int:
            ready.wait(PATIENCE)
            return id(resource.get())

        with ThreadPoolExecutor(8) as threads:
            values = {future.result(PATIENCE) for future in [threads.submit(use) for _ in range(8)]}
        assert (len(values), len(opened)) == (1, 1)

    def test_many_threads_use_it_at_once(self, resource: Resource[Any]) -> None:
        """The value is thread-safe, and no connection is counted as in use afterwards."""
        with ThreadPoolExecutor(4) as threads:
            uses = [threads.submit(run_attempt, lambda: self._read(resource.get())) for _ in range(20)]
            for use in uses:
                use.result(PATIENCE)
        assert (_stats(resource).in_use, _stats(resource).pending) == (0, 0)

    def test_use_after_close_opens_again(self, resource: Resource[Any], proxy: TcpProxy) -> None:
        """Closing affects the value only: the next use opens another one."""
        self._read(resource.get())
        resource.close()
        proxy.wait_for(lambda proxy: proxy.open == 0)
        assert (resource.is_open, _sockets(proxy)) == (False, set())
        self._read(resource.get())
        assert resource.is_open
        assert proxy.open > 0

    # Fork.

    def test_fork_while_idle(self, resource: Resource[Any], proxy: TcpProxy) -> None:
        """The inherited connection is unreachable in a child, whose first use opens its own value; the parent's
        connection keeps working."""
        value = resource.get()
        self._read(value)
        before = _sockets(proxy)
        _in_child(lambda: self._check_child(resource, value, before))
        self._read(resource.get())
        assert resource.get() is value
        assert _sockets(proxy) == before

    def test_fork_while_in_use(self, resource: Resource[Any], proxy: TcpProxy) -> None:
        """The same while a thread of the parent waits for an answer, which arrives after the child has ended."""
        value = resource.get()
        self._read(value)
        proxy.silence(new=False)
        reading = _start(lambda: self._read(value))
        proxy.wait_for(lambda proxy: proxy.held > 0)
        before = _sockets(proxy)
        _in_child(lambda: self._check_child(resource, value, before))
        proxy.resume()
        reading.result(PATIENCE)
        self._read(resource.get())
        assert _sockets(proxy) == before

    def _check_child(self, resource: Resource[Any], inherited: Any, sockets: set[tuple[int, int]]) -> None:
        assert sockets, "the parent had no connection"
        null = os.stat(os.devnull).st_rdev
        assert [number for number, _ in sockets if os.fstat(number).st_rdev != null] == []
        assert not resource.is_open
        assert resource.get() is not inherited
        self._read(resource.get())
        resource.close()

    # Closing.

    def test_close_waits_for_work_in_flight(self, resource: Resource[Any], proxy: TcpProxy) -> None:
        """Work in flight succeeds, and the value is closed after it."""
        value = resource.get()
        self._read(value)
        proxy.silence()
        reading = _start(lambda: self._read(value))
        proxy.wait_for(lambda proxy: proxy.held > 0)
        closing = _start(lambda: resource.close(PATIENCE))
        # Before Python 3.11 not the built-in one.
        with pytest.raises(FutureTimeoutError):
            closing.result(0.2)
        proxy.resume()
        reading.result(PATIENCE)
        closing.result(PATIENCE)
        proxy.wait_for(lambda proxy: proxy.open == 0)
        assert _sockets(proxy) == set()

    def test_close_is_bounded(self, resource: Resource[Any], proxy: TcpProxy) -> None:
        """Closing waits for hanging work no longer than its timeout."""
        value = resource.get()
        self._read(value)
        proxy.silence()
        reading = _start(lambda: self._read(value))
        proxy.wait_for(lambda proxy: proxy.held > 0)
        began = time.monotonic()
        _start(lambda: resource.close(0.5)).result(0.5 + self.grace)
        assert time.monotonic() - began >= 0.4
        proxy.cut()
        _ended(reading)
        assert _sockets(proxy) == set()

    # Failures and effects.

    def test_dead_idle_connection_costs_no_failure(self, resource: Resource[Any], proxy: TcpProxy) -> None:
        """The connection is replaced, or the request or the body is repeated: in any case the task succeeds."""
        run_attempt(lambda: self._read(resource.get()))
        proxy.cut()
        run_attempt(lambda: self._read(resource.get()))
        assert _stats(resource).open == len(_sockets(proxy)) > 0

    def test_an_error_reaches_the_body_unchanged(self, resource: Resource[Any], proxy: TcpProxy) -> None:
        """It is the client library's own, leaves the task unchanged, and carries a note."""
        seen = list[Exception]()

        def body() -> None:
            try:
                self._read(resource.get())
            except Exception as error:
                seen.append(error)
                raise

        proxy.stop()
        with pytest.raises(Exception) as caught:
            run_attempt(body)
        assert caught.value is seen[-1]
        assert type(caught.value).__module__.partition(".")[0] in {*resource.adapter.libraries, "builtins", "socket"}
        assert "it runs eagerly, without a broker to retry through" in _note(caught.value)
        assert _stats(resource).value("failures", "unavailable") == len(seen) == 1
        assert (_stats(resource).in_use, _stats(resource).pending, _stats(resource).open) == (0, 0, 0)

    def test_a_lost_answer_to_a_write(self, resource: Resource[Any], proxy: TcpProxy) -> None:
        """The write was performed without the client's knowledge: it is not repeated. Either its outcome is resolved,
        or the task fails with a note that gives the reason."""
        if not self.effects:
            pytest.skip("the client has no effects")
        run_attempt(lambda: self._read(resource.get()))
        before, bodies, note = self.written(), 0, ""

        def body() -> None:
            nonlocal bodies
            bodies += 1
            self._write(resource.get())

        proxy.lose_answer(self.answer_to)
        try:
            run_attempt(body)
        except Exception as error:
            note = _note(error)
            assert note
        assert (proxy.lost, bodies, self.written() - before) == (1, 1, 1), note

    def test_an_effect_forbids_a_replay(self, resource: Resource[Any], proxy: TcpProxy) -> None:
        """After a write the body is never run again, whatever fails later."""
        if not self.effects:
            pytest.skip("the client has no effects")
        before, bodies = self.written(), 0

        def body() -> None:
            nonlocal bodies
            bodies += 1
            self._write(resource.get())
            proxy.stop()
            proxy.cut()
            self._read(resource.get())

        with pytest.raises(Exception) as caught:
            run_attempt(body)
        assert "had left already" in _note(caught.value)
        assert (bodies, self.written() - before) == (1, 1)

    def test_classify_never_raises(self, resource: Resource[Any]) -> None:
        """Any exception is accepted, and an unrelated one is not a failure of this client."""
        classify = resource.adapter.classify
        bitten = ValueError("its own cause")
        bitten.__cause__ = bitten
        for foreign in (bitten, KeyError("key"), Exception(), AssertionError("")):
            assert classify(foreign, ()) is None
        for error in (OSError(), ConnectionResetError(104, "reset"), TimeoutError(), *_own_errors(resource.adapter)):
            found = classify(error, ())
            assert found is None or isinstance(found, Failure)

    # The deadline.

    def test_deadline_over_a_silent_connection(self, resource: Resource[Any], proxy: TcpProxy) -> None:
        """An open connection falls silent: the task ends in time, with its own time limit."""
        run_attempt(lambda: self._read(resource.get()))
        proxy.silence()
        self._check_deadline(resource)

    def test_deadline_while_connecting(self, resource: Resource[Any], proxy: TcpProxy) -> None:
        """The same for a server that accepts the connection and never answers."""
        proxy.silence()
        self._check_deadline(resource)

    def _check_deadline(self, resource: Resource[Any]) -> None:
        began = 0.0

        def body() -> None:
            nonlocal began
            began = time.monotonic()
            self._read(resource.get())

        with pytest.raises((SoftTimeLimitExceeded, DeadlineExceeded)):
            run_attempt(body, time_limit=1.0)
        assert time.monotonic() - began < 1.0 + self.grace
        assert (_stats(resource).in_use, _stats(resource).pending) == (0, 0)

    # Statistics.

    def test_statistics(self, resource: Resource[Any], proxy: TcpProxy) -> None:
        """They follow the leases and the connections, and return to zero."""
        for _ in range(3):
            run_attempt(lambda: self._read(resource.get()))
        stats = _stats(resource)
        assert stats.value("attempts") == 3
        assert stats.open == proxy.open == len(_sockets(proxy))
        assert stats.value("opened") == proxy.accepted
        assert stats.value("opened") + stats.value("reused") >= 3
        assert stats.histogram("use_time").count >= 3
        assert (stats.in_use, stats.pending, stats.value("leaks"), stats.value("failures")) == (0, 0, 0, 0)
        assert stats.kind == resource.adapter.kind

        proxy.silence()
        reading = _start(lambda: self._read(resource.get()))
        proxy.wait_for(lambda proxy: proxy.held > 0)
        assert _stats(resource).in_use == 1
        proxy.resume()
        reading.result(PATIENCE)
        assert _stats(resource).in_use == 0

        resource.close()
        stats = _stats(resource)
        assert stats.value("closed", "shutdown") == stats.value("closed") == stats.value("opened")
        assert stats.open == 0

    def test_a_connection_that_is_left_in_use_is_a_leak(self, resource: Resource[Any]) -> None:
        """It is counted at the end of its attempt, and returned to the pool if the adapter supports that."""
        if not self.holds:
            pytest.skip("nothing keeps a connection in use")
        kept = list[object]()
        run_attempt(lambda: kept.append(self._hold(resource.get())))
        stats = _stats(resource)
        assert (stats.value("leaks"), stats.in_use) == (1, 0 if self.reclaims else 1)
        run_attempt(lambda: self._read(resource.get()))

    # Recycling.

    def test_recycle(self, pools: WorkerPools, resource: Resource[Any], proxy: TcpProxy) -> None:
        """The next use is over a new connection, and the earlier ones are closed."""
        run_attempt(lambda: self._read(resource.get()))
        before = _sockets(proxy)
        pools.recycle()
        run_attempt(lambda: self._read(resource.get()))
        run_attempt(lambda: self._read(resource.get()))
        assert _sockets(proxy)
        assert not _sockets(proxy) & before
        assert _stats(resource).value("closed", "recycled") == len(before)

    def test_recycle_leaves_work_in_flight_alone(
        self, pools: WorkerPools, resource: Resource[Any], proxy: TcpProxy
    ) -> None:
        """An attempt that waits for an answer receives it; others use new connections meanwhile."""
        run_attempt(lambda: self._read(resource.get()))
        proxy.silence(new=False)
        before = proxy.accepted
        reading = _start(lambda: run_attempt(lambda: self._read(resource.get())))
        proxy.wait_for(lambda proxy: proxy.held > 0)
        pools.recycle()
        run_attempt(lambda: self._read(resource.get()))
        assert proxy.accepted > before
        proxy.resume()
        reading.result(PATIENCE)
        assert _stats(resource).value("failures") == 0


def _waited(result: Any) -> object:
    """Wait for what is to be awaited on the process's event loop."""
    return coroutines.run(result) if hasattr(type(result), "__await__") else result


def _stats(resource: Resource[Any]) -> ResourceStats:
    pools: WorkerPools = resource.pools
    return next(each for each in pools.stats().totals() if each.name == resource.name)


def _sockets(proxy: TcpProxy) -> set[tuple[int, int]]:
    """Return this process's sockets connected to the proxy, as pairs of descriptor and inode."""
    return {(number, inode) for number, inode in numbers() if _peer(number) == (proxy.host, proxy.port)}


def _peer(number: int) -> object:
    try:
        # A duplicate: closing this object must not close the original.
        with socket.socket(fileno=os.dup(number)) as asked:
            return asked.getpeername()
    except OSError:
        return None


def _start(work: Callable[[], R]) -> Future[R]:
    """Run ``work`` in a daemon thread."""
    future = Future[R]()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def _ended(work: Future[Any]) -> None:
    """Wait for the end of ``work``, successful or not."""
    work.exception(PATIENCE)


def _in_child(check: Callable[[], object]) -> None:
    """Run ``check`` in a forked child; its failure fails the test."""
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        # Forking a process with threads is the point of the test.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        try:
            # The kernel ends a child that hangs.
            signal.alarm(30)
            check()
            os._exit(0)
        except BaseException:
            os.write(writing, traceback.format_exc()[-4000:].encode())
        finally:
            os._exit(1)
    os.close(writing)
    with open(reading, "rb") as pipe:
        said = pipe.read().decode(errors="replace")
    _, status = os.waitpid(child, 0)
    assert status == 0, f"the child ended with {os.waitstatus_to_exitcode(status)}:\n{said}"


def _note(error: BaseException) -> str:
    """Return the note with the reason why the task was not run again."""
    notes = [str(note) for note in getattr(error, "__notes__", ())]
    found = [note for note in notes if note.startswith("workerpools: ") and ". Not run again: " in note]
    assert len(found) == 1, f"{error!r} has these notes: {notes}"
    return found[0]


def _own_errors(adapter: Adapter[Any]) -> Iterator[BaseException]:
    """Yield an instance of every exception of the client library that needs no arguments."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in adapter.libraries:
            for found in list(vars(module).values()):
                if isinstance(found, type) and issubclass(found, BaseException):
                    try:
                        yield found()
                    except Exception:
                        continue
