"""Coroutines of an attempt on the process's event loop: what they share, how they are ended, and what a fork sees."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import logging
import os
import signal
import threading
import time
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import celery
import pytest
from celery import Celery
from celery.exceptions import Retry, SoftTimeLimitExceeded

from tests.support.interruptions import Interruption, in_a_thread
from workerpools import PooledTask, WorkerPools
from workerpools._process import event_loop
from workerpools._run import attempts
from workerpools.adapter import Scoped, scoped
from workerpools.testing import run_attempt

PATIENCE = 10.0


@pytest.fixture(autouse=True)
def ended() -> Iterator[None]:
    """Each test starts its own loop, and leaves none."""
    yield
    event_loop.end(PATIENCE)
    assert "workerpools-loop" not in [thread.name for thread in threading.enumerate()]


@pytest.fixture
def app() -> Celery:
    app = Celery("shop", broker="memory://", backend="cache+memory://", set_as_current=False)
    WorkerPools(app)
    return app


@pytest.fixture
def struck() -> Iterator[Any]:
    """A function that has SIGUSR1 raise a time limit in the main thread, as Celery's children do."""

    def strike(*_: object) -> None:
        raise SoftTimeLimitExceeded

    before = signal.signal(signal.SIGUSR1, strike)
    yield lambda: os.kill(os.getpid(), signal.SIGUSR1)
    signal.signal(signal.SIGUSR1, before)


def task_of(app: Celery, body: Any, **options: Any) -> Any:
    return app.task(base=PooledTask, bind=True, shared=False, lazy=False, name=f"shop.{body.__name__}", **options)(body)


def test_a_body_is_the_task_it_would_be_without_async(app: Celery) -> None:
    """Its request, the current task, its deadline, effects and keys are its own, in every task it gathers."""
    seen: list[Any] = []

    async def part(self: Any) -> tuple[Any, ...]:
        await asyncio.sleep(0)
        attempt = attempts.current()
        self.effect("a part")
        return attempt, self.request.id, celery.current_task.request.id, self.deadline.remaining() is not None

    async def body(self: Any, number: int) -> int:
        seen.extend(await asyncio.gather(part(self), part(self)))
        seen.append(await part(self))
        seen.append([str(effect) for effect in self.effects])
        seen.append(self.idempotency_key("charge") == self.idempotency_key("charge"))
        return number

    task = task_of(app, body, soft_time_limit=30)
    assert task.apply((7,), task_id="the-id").get() == 7
    parts, effects, same_key = seen[:3], seen[3], seen[4]
    assert len({part[0] for part in parts}) == 1
    assert parts[0][0] is not None
    assert [part[1:] for part in parts] == [("the-id", "the-id", True)] * 3
    assert effects == ["a part"] * 3
    assert same_key
    # Nothing of it stays with the loop's thread.
    assert WorkerPools(app).run(part_of(task)) == (None, None)


async def part_of(task: Any) -> tuple[Any, ...]:
    return attempts.current(), task.request.id


def test_requests_of_bodies_that_run_at_once_are_apart(app: Celery) -> None:
    """Threads wait on one loop; each body sees its own request, also after others have come and gone."""
    both = threading.Barrier(2)

    async def body(self: Any, number: int) -> list[str]:
        found = [self.request.id]
        await asyncio.to_thread(both.wait, PATIENCE)
        for _ in range(20):
            await asyncio.sleep(0)
            found.append(self.request.id)
        return found

    task = task_of(app, body)
    results: dict[str, list[str]] = {}

    def run(name: str) -> None:
        results[name] = task.apply((1,), task_id=name).get()

    threads = [threading.Thread(target=run, args=(name,)) for name in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert results == {"one": ["one"] * 21, "two": ["two"] * 21}


def test_how_bodies_call_each_other(app: Celery) -> None:
    """A call within an async body is awaited and joins the attempt; a sync body's call waits; apply() is refused."""

    async def inner(self: Any) -> Any:
        await asyncio.sleep(0)
        return attempts.current()

    inner_task = task_of(app, inner)

    async def outer(self: Any) -> bool:
        return await inner_task() is attempts.current() is not None

    def sync(self: Any) -> bool:
        return inner_task() is attempts.current() is not None

    async def applies(self: Any) -> None:
        inner_task.apply(throw=True)

    assert task_of(app, outer).apply(throw=True).get() is True
    assert task_of(app, sync).apply(throw=True).get() is True
    with pytest.raises(RuntimeError, match=r"shop\.inner is async def.*await task"):
        task_of(app, applies).apply(throw=True)
    with pytest.raises(RuntimeError, match="await the coroutine instead"):
        run_attempt(lambda: WorkerPools().run(waits()))


async def waits() -> None:
    WorkerPools().run(asyncio.sleep(0))


def test_retry_and_commit_hold(app: Celery) -> None:
    """``self.retry()`` finds its request; what waits for the commit runs after it, and not after a failure."""
    done: list[str] = []
    pools = WorkerPools(app)

    class Session(Scoped):
        def finish(self) -> bool:
            done.append(f"commit {threading.current_thread() is threading.main_thread()}")
            return False

    async def body(self: Any, fails: bool) -> None:
        scoped("session", Session, "a session")
        pools.on_commit(lambda: done.append("after"))
        done.append("body")
        if fails:
            raise self.retry(countdown=1)

    task = task_of(app, body)
    task.apply((False,), throw=True)
    assert done == ["body", "commit True", "after"]
    done.clear()
    with pytest.raises(Retry):
        task._orig_run(True) if hasattr(task, "_orig_run") else _worker_like(task, True)
    assert done == ["body"]


def _worker_like(task: Any, *args: Any) -> None:
    task.push_request(args=args, called_directly=False, id="1", retries=0)
    try:
        task.run(*args)
    finally:
        task.pop_request()


def test_a_soft_limit_cancels_the_body_and_waits_for_its_cleanup(struck: Any) -> None:
    done: list[str] = []
    pools = WorkerPools()

    async def body() -> None:
        asyncio.get_running_loop().call_later(0.05, struck)
        try:
            await asyncio.sleep(PATIENCE)
        finally:
            await asyncio.sleep(0.05)
            done.append("clean")

    with pytest.raises(SoftTimeLimitExceeded):
        run_attempt(lambda: pools.run(body()))
    assert done == ["clean"]
    assert pools.run(asyncio.sleep(0, "the loop goes on")) == "the loop goes on"


def test_a_cleanup_that_fails_or_hangs_does_not_hide_the_limit(struck: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_loop, "CLEANUP", 0.1)
    pools = WorkerPools()
    attempt: list[Any] = []
    free = asyncio.Event()

    async def fails() -> None:
        struck_soon = asyncio.get_running_loop().call_later(0.05, struck)
        try:
            await asyncio.sleep(PATIENCE)
        finally:
            struck_soon.cancel()
            raise ValueError("of the clean-up")

    async def hangs() -> None:
        attempt.append(attempts.current())
        asyncio.get_running_loop().call_later(0.05, struck)
        while not free.is_set():
            try:
                await free.wait()
            except asyncio.CancelledError:
                continue

    with pytest.raises(SoftTimeLimitExceeded):
        run_attempt(lambda: pools.run(fails()))
    began = time.monotonic()
    with pytest.raises(SoftTimeLimitExceeded):
        run_attempt(lambda: pools.run(hangs()))
    assert time.monotonic() - began < 3.0
    # What still lives is known.
    assert [task.done() for task in attempt[0].left_tasks] == [False]
    event_loop.running.started().call_soon_threadsafe(free.set)


def test_the_deadline_cancels_a_body_where_nothing_else_does() -> None:
    began = time.monotonic()
    with pytest.raises(SoftTimeLimitExceeded):
        run_attempt(lambda: asyncio.sleep(PATIENCE), time_limit=0.4)
    assert time.monotonic() - began < 2.0


def test_what_outlives_the_body_is_ended_with_it() -> None:
    """Tasks that it left, and tasks of those; one that does not end forbids nothing but is awaited in a bound."""
    ended: list[str] = []

    async def background(name: str) -> None:
        try:
            await asyncio.sleep(PATIENCE)
        finally:
            await asyncio.sleep(0.02)
            ended.append(name)

    async def body() -> str:
        async def first() -> None:
            kept.append(asyncio.create_task(background("second")))
            await background("first")

        kept = [asyncio.create_task(first())]
        await asyncio.sleep(0.01)
        return "returned"

    assert run_attempt(body) == "returned"
    assert sorted(ended) == ["first", "second"]


def test_no_exception_ends_the_process_or_the_loop() -> None:
    """A body that cancels itself fails as a task; an exit reaches the calling thread, if somebody awaits it."""
    import concurrent.futures

    async def cancels() -> None:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        await asyncio.sleep(1)

    async def exits() -> None:
        raise SystemExit(3)

    async def leaves() -> str:
        task = asyncio.create_task(exits())
        await asyncio.sleep(0.01)
        assert task.done()
        with pytest.raises(SystemExit):
            task.result()
        return "went on"

    with pytest.raises(concurrent.futures.CancelledError):
        run_attempt(cancels)
    with pytest.raises(SystemExit) as caught:
        WorkerPools().run(exits())
    assert caught.value.code == 3
    assert run_attempt(leaves) == "went on"


def test_what_a_body_used_needs_no_garbage_collector(app: Celery) -> None:
    class Used:
        pass

    freed = threading.Event()

    async def body(self: Any) -> None:
        used = Used()
        weakref.finalize(used, freed.set)
        await asyncio.sleep(0)
        kept.set(used)

    kept: contextvars.ContextVar[Used] = contextvars.ContextVar("kept")
    task = task_of(app, body)
    gc.disable()
    try:
        task()
        assert freed.wait(PATIENCE)
    finally:
        gc.enable()


def test_one_loop_for_all_that_ends_in_order() -> None:
    pools, loops, ended = WorkerPools(), set[Any](), list[str]()

    async def which() -> None:
        loops.add(asyncio.get_running_loop())

    for _ in range(3):
        pools.run(which())
    assert len(loops) == 1

    def leave() -> None:
        async def forever() -> None:
            try:
                await asyncio.sleep(PATIENCE)
            finally:
                ended.append("cancelled")

        # Past the calls: what a client library starts for itself.
        kept.append(asyncio.ensure_future(forever()))

    kept: list[Any] = []
    import contextvars

    event_loop.running.started().call_soon_threadsafe(leave, context=contextvars.Context())
    pools.run(asyncio.sleep(0))
    event_loop.end(PATIENCE)
    assert ended == ["cancelled"]
    assert loops.pop().is_closed()
    # The next coroutine has another.
    pools.run(which())
    assert len(loops) == 1


@pytest.mark.parametrize("where", ["main thread", "loop"])
def test_a_forked_child_has_a_loop_of_its_own(where: str) -> None:
    """It never touches its parent's epoll instance and self-pipe, even where user code has kept the parent's loop."""
    pools = WorkerPools()
    parents: list[Any] = []

    async def which() -> Any:
        parents.append(asyncio.get_running_loop())
        return parents[-1]

    loop = pools.run(which())

    def child() -> None:
        try:
            signal.alarm(20)
            with contextlib.suppress(OSError):
                loop.add_reader(0, print)
            loop.call_soon_threadsafe(print)
            if where == "main thread":
                assert pools.run(asyncio.sleep(0, "fresh")) == "fresh"
            found: list[str] = []
            thread = threading.Thread(target=lambda: found.append(pools.run(asyncio.sleep(0, "fresh"))))
            thread.start()
            thread.join(10)
            assert found == ["fresh"]
            assert event_loop.running.loop is not loop
            event_loop.end(5.0)
            os._exit(0)
        finally:
            os._exit(1)

    def fork() -> int:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if pid == 0:
            child()
        return pid

    async def fork_here() -> int:
        return fork()

    pid = fork() if where == "main thread" else pools.run(fork_here())
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert pools.run(which()) is loop
    # Registering works as before.
    reading, writing = os.pipe()

    async def read() -> bytes:
        heard: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        loop.add_reader(reading, lambda: heard.done() or heard.set_result(os.read(reading, 1)))
        try:
            return await asyncio.wait_for(heard, 5)
        finally:
            loop.remove_reader(reading)

    os.write(writing, b"x")
    assert pools.run(read()) == b"x"


def test_limits_struck_at_random_leave_the_loop_whole(struck: Any) -> None:
    """At any point of the wait, of the start and of the end."""
    import random

    pools, cleaned, counts = WorkerPools(), [0], {"limit": 0, "done": 0}

    async def body() -> None:
        try:
            await asyncio.gather(*(asyncio.sleep(0.0005) for _ in range(3)))
        finally:
            await asyncio.sleep(0)
            cleaned[0] += 1

    pools.run(asyncio.sleep(0))
    chance = random.Random(13)
    for _ in range(300):
        timer = threading.Timer(chance.uniform(0, 0.003), struck)
        try:
            try:
                timer.start()
                run_attempt(body)
                counts["done"] += 1
            finally:
                timer.join()
        except SoftTimeLimitExceeded:
            counts["limit"] += 1
        assert attempts.current() is None
        assert attempts.running() == []
    assert counts["limit"] > 30
    assert pools.run(asyncio.sleep(0, "whole")) == "whole"

    async def others() -> int:
        return len(asyncio.all_tasks()) - 1

    assert pools.run(others()) == 0


@pytest.mark.parametrize("listed", [True, False])
def test_no_lock_of_logging_that_a_signal_has_left_stops_the_loop(
    monkeypatch: pytest.MonkeyPatch, listed: bool
) -> None:
    """A time limit that strikes where a body logs may leave one in the main thread's hands, and the loop logs, too."""
    WorkerPools()
    if not listed:
        # As dictConfig() leaves it.
        monkeypatch.setattr(logging, "_handlerList", [])

    async def logs() -> None:
        logging.getLogger(f"shop.{number}").warning("on the loop")

    number = 0
    while True:
        number += 1
        with Interruption(("/logging/__init__.py",), number) as struck, contextlib.suppress(SystemExit):
            logging.getLogger(f"shop.struck.{number}").warning("in the main thread")
        if not struck.where:
            break
        assert event_loop.call(event_loop.Call(logs()), PATIENCE), struck.where
    assert number > 40


def test_a_lock_of_logging_in_use_is_not_let_go() -> None:
    """A handler may wait for a coroutine."""
    pools, sent = WorkerPools(), list[str]()

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            assert in_a_thread(lambda: self.lock is not None and not self.lock.acquire(blocking=False))
            sent.append(pools.run(asyncio.sleep(0, record.getMessage())))
            assert in_a_thread(lambda: self.lock is not None and not self.lock.acquire(blocking=False))

    logger, handler = logging.getLogger("shop.handled"), Handler()
    logger.addHandler(handler)
    try:
        logger.warning("over the network")
    finally:
        logger.removeHandler(handler)
    assert sent == ["over the network"]
