"""A thread that may still work for a failed body forbids running it again; any other one does not."""

from __future__ import annotations

import contextvars
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from multiprocessing.pool import ThreadPool
from queue import SimpleQueue
from typing import Any, cast

import pytest
from sqlalchemy.exc import DBAPIError

from tests.support.databases import Database
from tests.support.proxy import TcpProxy
from tests.support.shop import Shop, insert
from tests.support.stand import wait_until
from tests.support.upstream import EchoUpstream
from workerpools._run import threads
from workerpools._run.attempts import Attempt
from workerpools._run.threads import Living, may_act


@pytest.mark.parametrize(
    ("thread", "counts"),
    [
        (Living("the attempt's", started=True), True),
        (Living("of anyone else"), False),
        (Living("ours", started=True, own=True), False),
        (Living("worker with work", busy=True), True),
        (Living("the attempt's worker, with work", started=True, busy=True), True),
        (Living("idle worker", busy=False), False),
        (Living("the attempt's worker, idle", started=True, busy=False), False),
        (Living("worker that runs another task", busy=True, own=True), False),
    ],
)
def test_may_act(thread: Living, counts: bool) -> None:
    """Which threads may still do something for the task."""
    assert may_act(thread) is counts


@pytest.fixture
def shop(database: Database, proxy_to: Any) -> Iterator[Shop]:
    """An app whose database is reached through a proxy."""
    made = Shop(database, "psycopg2", proxy=proxy_to(database))
    yield made
    made.pools.close()


@pytest.fixture
def api(shop: Shop, echo: EchoUpstream, proxy_to: Any) -> EchoUpstream:
    """The upstream of the shop's client."""
    shop.add_api(f"http://127.0.0.1:{proxy_to(echo).port}")
    return echo


@pytest.fixture
def over() -> Iterator[threading.Event]:
    """Set at the end of the test, or by it: what a thread of the body waits for."""
    event = threading.Event()
    yield event
    event.set()


@pytest.fixture
def executor(over: threading.Event) -> Iterator[ThreadPoolExecutor]:
    """An executor whose worker has been idle since before the task."""
    with ThreadPoolExecutor(1, thread_name_prefix="module") as made:
        made.submit(int).result()
        yield made
        over.set()


class Taking(SimpleQueue[Any]):
    """A queue from which work is taken a while before the worker has it in a variable, from the second on.

    Args:
        over: The end of the while.
    """

    def __init__(self, over: threading.Event) -> None:
        self.over = over
        self.taken = 0

    def get(self, *arguments: Any, **options: Any) -> Any:
        """Return the next work."""
        found = super().get(*arguments, **options)
        self.taken += 1
        if self.taken == 2:
            self.over.wait()
        return found


def loses(shop: Shop, begins: Callable[[], object], **options: Any) -> tuple[Any, list[int]]:
    """Return a task whose first run calls ``begins`` and then loses its connection; and the list of its runs."""
    runs: list[int] = []

    @shop.task(**options)
    def task(self: Any) -> None:
        runs.append(1)
        insert(self.session, 1)
        begins()
        if len(runs) == 1:
            shop.proxy.close_all()
        insert(self.session, 2)

    return task, runs


def notes(caught: pytest.ExceptionInfo[BaseException]) -> str:
    return " ".join(caught.value.__notes__)


def started(target: Callable[[], object], **options: Any) -> threading.Thread:
    thread = threading.Thread(target=target, **options)
    thread.start()
    return thread


@pytest.mark.parametrize(
    "kind",
    [
        "plain",
        "daemon",
        "timer",
        "copied context",
        "of a thread",
        "of a worker",
        "executor",
        "new executor",
        "taken",
        "pool",
        "generator",
        "processes",
    ],
)
def test_no_replay_while_a_thread_of_the_body_lives(
    shop: Shop, over: threading.Event, executor: ThreadPoolExecutor, kind: str
) -> None:
    """Whatever it is: it would do its work in both runs. The note names it."""
    pools = [ThreadPool(1)]
    late = ThreadPoolExecutor(1, thread_name_prefix="late")
    processes = ProcessPoolExecutor(1, mp_context=get_context("fork"))

    def values() -> Iterator[int]:
        over.wait()
        yield 1

    def begins() -> None:
        if kind == "plain":
            started(over.wait, name="late")
        elif kind == "daemon":
            started(over.wait, name="late", daemon=True)
        elif kind == "timer":
            timer = threading.Timer(60, int)
            timer.name = "late"
            timer.start()
            started(lambda: (over.wait(), timer.cancel()), name="canceller")
        elif kind == "copied context":
            threading.Thread(target=contextvars.copy_context().run, args=(over.wait,), name="late").start()
        elif kind == "of a thread":
            started(lambda: started(over.wait, name="late")).join()
        elif kind == "of a worker":
            executor.submit(started, over.wait, name="late").result()
        elif kind == "executor":
            executor.submit(over.wait)
        elif kind == "new executor":
            late.submit(over.wait)
        elif kind == "taken":
            late._work_queue = cast(Any, Taking(over))
            late.submit(int).result()
            late.submit(over.wait)
            wait_until(lambda: late._work_queue.empty(), "the work taken")
        elif kind == "pool":
            pools[0].apply_async(over.wait)
        elif kind == "generator":
            # It is run by the thread that hands work to the workers.
            pools[0].imap(int, values())
        else:
            processes.submit(time.sleep, 2.0)

    pools[0].apply(int)
    if kind == "processes":
        processes.submit(int).result()
    task, runs = loses(shop, begins)
    with pytest.raises(DBAPIError) as caught:
        task()
    assert len(runs) == 1
    named = {
        "executor": "'module_0'",
        "new executor": "'late_0'",
        # From Python 3.13 on the worker's variables are seen as they are.
        "taken": "'late_0'" if sys.version_info >= (3, 13) else "'Event.wait'",
        "pool": "(_handle_tasks)",
        "generator": "(_handle_tasks)",
        "processes": "Thread-",
    }.get(kind, "'late'")
    assert "Not run again: " in notes(caught)
    assert "may still be at work" in notes(caught)
    assert named in notes(caught)
    assert shop.rows() == []
    over.set()
    late.shutdown()
    processes.shutdown()
    pools[0].close()
    pools[0].join()


def test_an_idempotent_task_runs_again_all_the_same(shop: Shop, over: threading.Event) -> None:
    """It said so."""
    task, runs = loses(shop, lambda: started(over.wait), idempotent=True)
    task()
    assert len(runs) == 2


def test_a_retry_is_forbidden_as_a_replay_is(database: Database, proxy_to: Any, over: threading.Event) -> None:
    """A body that goes back to the broker runs again, too."""
    proxy: TcpProxy = proxy_to(database)
    shop = Shop(database, "psycopg2", proxy=proxy, eager=False)
    runs: list[int] = []

    @shop.task()
    def task(self: Any) -> None:
        runs.append(1)
        started(over.wait, name="late")
        proxy.stop()
        proxy.close_all()
        self.db.dispose()
        insert(self.session, 1)

    with pytest.raises(DBAPIError) as caught:
        task.apply(throw=True)
    assert "'late'" in notes(caught)
    assert len(runs) == 1
    shop.close()


@pytest.mark.parametrize(
    "kind", ["joined executor", "idle executor", "finished", "older", "of an older one", "ours", "of a value"]
)
def test_other_threads_forbid_nothing(
    shop: Shop, over: threading.Event, executor: ThreadPoolExecutor, kind: str
) -> None:
    """Those that ended without an effect, that wait for work, or that were there before."""

    def begins() -> None:
        if kind == "joined executor":
            with ThreadPoolExecutor(2) as pool:
                pool.submit(int)
        elif kind == "idle executor":
            executor.submit(int).result()
        elif kind == "finished":
            started(int).join()
        elif kind == "ours":
            started(over.wait, name="workerpools-leaks")
        elif kind == "of an older one":
            asked.set()
            answered.wait(30)
        elif kind == "of a value":
            client.get()

    def serves() -> None:
        asked.wait(30)
        started(over.wait)
        answered.set()

    asked, answered = threading.Event(), threading.Event()
    client = shop.pools.add(lambda: started(over.wait), name="client")
    if kind == "older":
        started(over.wait)
    elif kind == "of an older one":
        started(serves)
    task, runs = loses(shop, begins)
    task()
    assert len(runs) == 2
    assert shop.rows() == [1, 2]


@pytest.mark.parametrize("copied", [False, True])
def test_the_effect_of_a_thread_that_ended_counts(shop: Shop, api: EchoUpstream, copied: bool) -> None:
    """Also where its context was not the body's."""

    def begins() -> None:
        post: Callable[[], Any] = lambda: shop.api.get().post("/echo/1")  # noqa: E731
        started((lambda: contextvars.copy_context().run(post)) if copied else post).join()

    task, runs = loses(shop, begins)
    with pytest.raises(DBAPIError) as caught:
        task()
    assert (len(runs), len(api.requests())) == (1, 1)
    assert "POST by 'api' had left already" in notes(caught)


def test_an_effect_between_the_failure_and_the_decision_counts(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread has it, and ends, while the failure is examined."""
    from workerpools._run import loop

    judge = loop.judge

    def judged(*arguments: Any) -> Any:
        started(lambda: task.effect("sent the mail")).join()
        return judge(*arguments)

    task, runs = loses(shop, int)
    monkeypatch.setattr(loop, "judge", judged)
    with pytest.raises(DBAPIError) as caught:
        task()
    assert len(runs) == 1
    assert "sent the mail had left already" in notes(caught)


def test_a_thread_of_the_enclosing_task_is_not_the_inner_ones(shop: Shop, over: threading.Event) -> None:
    """The inner body may run again; the enclosing one may not."""
    inner, runs = loses(shop, int)

    @shop.task()
    def outer(self: Any) -> None:
        started(over.wait, name="late")
        inner.apply().get(disable_sync_subtasks=False)

    outer()
    assert len(runs) == 2


def test_a_worker_that_has_not_woken_up_yet(over: threading.Event) -> None:
    """Work counts from the moment it is submitted: in the queue, on its way out of it, and in its worker."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="module")
    pool.submit(int).result()
    attempt = Attempt()
    assert "'module_0'" not in threads.working(attempt)
    begun = threading.Event()

    def waits() -> None:
        begun.set()
        over.wait()

    pool.submit(waits)
    # The worker's name, or that of what it has taken and not begun.
    assert any("module_0" in name or "waits" in name for name in threads.working(attempt))
    assert begun.wait(10)
    assert "'module_0'" in threads.working(attempt)
    over.set()
    pool.shutdown()


def test_following_twice_changes_nothing() -> None:
    """Every WorkerPools asks for it."""
    threads.follow()
    start = threading.Thread.start
    threads.follow()
    assert threading.Thread.start is start
